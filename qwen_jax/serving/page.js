"use strict";
const at = (id) => document.getElementById(id);
const messages = [];
const about = new WeakMap(); // an element of tokens -> what is known of them
let running = null; // stops the answer that is being made

function put(parent, tag, kind, text = "") {
  const made = document.createElement(tag);
  made.className = kind;
  made.textContent = text; // Whatever a model writes, it is text and no markup.
  parent.append(made);
  return made;
}

function headers() {
  const found = { "Content-Type": "application/json" };
  const key = at("key").value.trim();
  if (key) found.Authorization = `Bearer ${key}`;
  return found;
}

function body(said) {
  const found = { stream: true, logprobs: true, top_logprobs: 5 };
  for (const field of at("fields").querySelectorAll("input[name]")) {
    if (field.validity.badInput) throw new Error(`${field.labels[0].textContent.trim()} is no number.`);
    if (field.value !== "") found[field.name] = Number(field.value);
  }
  const system = at("system").value;
  found.messages = system ? [{ role: "system", content: system }, ...said] : said;
  return found;
}

/** The objects of a stream; fails with what the server says where it refuses. */
async function* events(response) {
  if (!response.ok) {
    let said = `The server answers with ${response.status}.`;
    try {
      said = (await response.json()).error.message;
    } catch {} // no JSON: something stands between
    if (response.status === 401) at("settings").open = true;
    throw new Error(said);
  }
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The connection has ended before the answer.");
    held += decoder.decode(value, { stream: true });
    const found = held.split("\n\n");
    held = found.pop();
    for (const one of found) {
      const data = one.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

/** The text of each token, or null where together they are not the text: a stop cut it. */
function texts(tokens, whole) {
  const decoder = new TextDecoder();
  const found = tokens.map((token) => decoder.decode(new Uint8Array(token.bytes), { stream: true }));
  return found.join("") === whole ? found : null;
}

function show(answer, text, tokens) {
  const low = at("chat").scrollHeight - at("chat").scrollTop - at("chat").clientHeight < 60;
  const parts = texts(tokens, text);
  let waiting = []; // tokens of a character that is not complete
  tokens.forEach((token, index) => {
    waiting.push(token);
    if (!parts || parts[index] === "") return;
    mark(put(answer, "span", "token", parts[index]), waiting);
    waiting = [];
  });
  if (!parts) tokens.length ? mark(put(answer, "span", "token", text), tokens) : answer.append(text);
  if (low) at("chat").scrollTop = at("chat").scrollHeight;
}

function mark(span, tokens) {
  about.set(span, tokens);
  const least = Math.min(...tokens.map((token) => token.logprob));
  span.style.setProperty("--doubt", (1 - Math.exp(least)).toFixed(3));
}

const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(2)} %`;

function explain(span) {
  for (const other of document.querySelectorAll(".token.shown")) other.classList.remove("shown");
  const box = at("about");
  box.hidden = span === null;
  if (span === null) return;
  span.classList.add("shown");
  box.replaceChildren();
  for (const token of about.get(span)) {
    const rows = put(box, "table", "");
    const others = token.top_logprobs.filter((other) => String(other.bytes) !== String(token.bytes));
    const all = [token, ...others].sort((a, b) => b.logprob - a.logprob);
    for (const one of all) {
      const row = put(rows, "tr", one === token ? "chosen" : "");
      put(row, "th", "", JSON.stringify(one.token));
      put(row, "td", "", percent(one.logprob));
      put(row, "td", "", one.logprob.toFixed(4));
    }
  }
  const place = span.getClientRects()[0];
  const left = Math.min(place.left, innerWidth - box.offsetWidth - 8);
  const below = place.bottom + 6 + box.offsetHeight < innerHeight;
  box.style.left = `${Math.max(8, left)}px`;
  box.style.top = `${Math.max(8, below ? place.bottom + 6 : place.top - 6 - box.offsetHeight)}px`;
}

/**
 * Answers a message. One that fails is no part of the chat: what is refused once would be refused
 * with every later message, too.
 *
 * To answer it again, `earlier` is what `messages` have of it, and `place` shows the answer; both
 * stay if that fails.
 */
async function answer(question, earlier = [], place = null) {
  explain(null);
  document.querySelectorAll(".note button").forEach((button) => button.remove());
  const shown = put(at("chat"), "p", "answer");
  const note = put(at("chat"), "div", "note");
  const line = put(note, "span", "");
  const begun = performance.now();
  const stop = new AbortController();
  const before = messages.slice(0, messages.length - earlier.length);
  let text = "", tokens = 0, early = 0, first = null, last = null, reason = "", failed = false;
  const tell = () => {
    const said = [`${tokens} tokens`];
    if (tokens > early) said.push(`${((1000 * (tokens - early)) / (last - first)).toFixed(1)} tokens/s`);
    said.push(`first after ${((first - begun) / 1000).toFixed(2)} s`);
    line.textContent = [...said, reason].filter(Boolean).join(" · ");
  };
  running = stop;
  at("send").textContent = "Stop";
  try {
    const asked = { method: "POST", headers: headers(), body: JSON.stringify(body([...before, question])), signal: stop.signal };
    for await (const event of events(await fetch("v1/chat/completions", asked))) {
      for (const choice of event.choices) {
        const piece = choice.delta.content ?? "", entries = choice.logprobs?.content ?? [];
        reason = choice.finish_reason ?? reason;
        if (piece !== "" || entries.length) {
          last = performance.now();
          tokens += entries.length;
          first ??= ((early = tokens), last);
          text += piece;
          show(shown, piece, entries);
        }
        if (first !== null) tell();
      }
    }
  } catch (error) {
    if (error.name === "AbortError") reason = "stopped";
    else {
      failed = true;
      // Browsers have words of their own for a server that is not there, and none says so.
      const said = error instanceof TypeError ? "The server can't be reached." : error.message;
      put(note, "span", "error", said).setAttribute("role", "alert");
    }
    if (first !== null) tell();
    else line.textContent = reason;
  }
  if (!note.textContent) line.textContent = `nothing · ${reason}`;
  // Who has begun anew meanwhile wants to hear no more of it.
  if (running !== stop) return;
  running = null;
  at("send").textContent = "Send";
  const turn = text ? [question, { role: "assistant", content: text }] : failed ? earlier : [question];
  messages.splice(before.length, Infinity, ...turn);
  const kept = place && turn === earlier ? place : shown;
  kept.hidden = false;
  (kept === shown ? place : shown)?.remove();
  const again = put(note, "button", "", "Again");
  again.type = "button";
  again.onclick = () => {
    kept.hidden = true;
    note.remove();
    answer(question, turn, kept);
  };
}

at("ask").onsubmit = (event) => {
  event.preventDefault();
  if (running) return running.abort();
  const text = at("text").value;
  if (!text.trim()) return;
  at("text").value = "";
  put(at("chat"), "p", "user", text);
  at("chat").scrollTop = at("chat").scrollHeight;
  answer({ role: "user", content: text });
};
at("text").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!running) at("ask").requestSubmit();
};
at("anew").onclick = () => {
  running?.abort();
  running = null;
  at("send").textContent = "Send";
  messages.length = 0;
  at("chat").replaceChildren();
  explain(null);
  at("text").focus();
};
at("marks").onchange = () => at("chat").classList.toggle("plain", !at("marks").checked);
at("fields").onsubmit = (event) => event.preventDefault();
at("key").onchange = greet;
at("chat").onscroll = () => explain(null);
const tokenOf = (event) => event.target.closest?.(".token") ?? null;
at("chat").onpointerover = (event) => explain(tokenOf(event));
at("chat").onpointerleave = (event) => event.pointerType === "mouse" && explain(null);
document.onclick = (event) => explain(tokenOf(event));

/** Says whose model answers here. */
async function greet() {
  const found = await fetch("v1/models", { headers: headers() });
  const model = found.ok ? (await found.json()).data[0].id : "an API key is needed: see Settings";
  at("model").textContent = model;
  if (found.ok) document.title = model;
}
greet();
