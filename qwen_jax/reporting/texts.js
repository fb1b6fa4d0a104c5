"use strict";
// Answers beside each other, prompt by prompt. The data stand in the page as JSON; everything that
// users and models wrote goes in as text, never as markup.
(() => {
  const AT_ONCE = 20, LONGEST_DIFF = 800, LEAST_ALIKE = 0.25;

  for (const root of document.querySelectorAll(".texts")) show(root);

  function show(root) {
    const data = JSON.parse(root.querySelector("script").textContent);
    const bar = make(root, "div", "bar");
    const names = data.settings.map((name, index) => [index, name]);
    const left = choice(bar, "A", names, data.first[0]);
    const right = choice(bar, "B", names, data.first[1]);
    const metric = choice(bar, "score", data.metrics.map((name, index) => [index, name]), data.metric);
    const which = choice(bar, "show", [
      ["all", "all prompts"], ["a", "A better than B"], ["b", "B better than A"],
      ["unequal", "scores differ"], ["texts", "texts differ"],
    ], "all");
    const search = make(bar, "input");
    search.type = "search";
    search.placeholder = "Words of prompts and answers";
    search.setAttribute("aria-label", search.placeholder);
    const count = make(bar, "span", "note");
    count.setAttribute("role", "status");
    const list = make(root, "div");
    const more = make(root, "button", "more");
    more.type = "button";
    more.textContent = "More";
    let found = [], drawn = 0;

    const of = (prompt, setting) => prompt.of.filter((one) => one.setting === setting);
    const mean = (prompt, setting) => {
      const values = of(prompt, setting).map((one) => one.scores[metric.value]).filter(isNumber);
      return values.length ? values.reduce((a, b) => a + b, 0) / values.length : null;
    };
    const texts = (prompt, setting) => of(prompt, setting).map((one) => one.answers.map((a) => a[0]));

    function wanted(prompt) {
      const [a, b] = [mean(prompt, +left.value), mean(prompt, +right.value)];
      const order = a === null || b === null ? 0 : (a - b) * (data.lower[metric.value] ? -1 : 1);
      const held = {
        all: true, a: order > 0, b: order < 0, unequal: order !== 0,
        texts: JSON.stringify(texts(prompt, +left.value)) !== JSON.stringify(texts(prompt, +right.value)),
      }[which.value];
      if (!held) return false;
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      if (!words.length) return true;
      const all = JSON.stringify([prompt.id, prompt.asked, prompt.of.map((one) => one.answers)]).toLowerCase();
      return words.every((word) => all.includes(word));
    }

    function update() {
      found = data.prompts.filter(wanted);
      drawn = 0;
      list.replaceChildren();
      count.textContent = `${found.length} of ${data.prompts.length} prompts`;
      draw();
    }

    function draw() {
      for (const prompt of found.slice(drawn, drawn + AT_ONCE)) article(prompt);
      drawn = Math.min(found.length, drawn + AT_ONCE);
      more.hidden = drawn === found.length;
    }

    function article(prompt) {
      const at = make(list, "article");
      at.tabIndex = -1;
      make(at, "h3").textContent = prompt.id;
      if (prompt.asked) make(at, "div", "asked").textContent = prompt.asked;
      const pair = make(at, "div", "pair");
      const [a, b] = [+left.value, +right.value];
      side(pair, "A", prompt, a, b);
      if (a !== b) side(pair, "B", prompt, b, a);
      const others = [...new Set(prompt.of.map((one) => one.setting))].filter((s) => s !== a && s !== b);
      if (!others.length) return;
      const details = make(at, "details");
      make(details, "summary").textContent = `${others.length} more`;
      details.addEventListener("toggle", () => {
        if (details.open && details.childElementCount === 1) {
          const rest = make(details, "div", "pair");
          for (const setting of others) side(rest, "", prompt, setting, a);
        }
      });
    }

    function side(parent, letter, prompt, setting, other) {
      const at = make(parent, "div", "one");
      make(at, "b").textContent = `${letter} ${data.settings[setting]}`.trim();
      const theirs = texts(prompt, other).flat();
      const against = letter === "" ? null : mean(prompt, other);
      let number = 0;
      for (const one of of(prompt, setting)) {
        const line = make(at, "div");
        if (one.seed !== null) make(line, "span", "score").textContent = `seed ${one.seed}`;
        one.scores.forEach((value, index) => {
          if (!isNumber(value)) return;
          const chip = make(line, "span", "score");
          chip.textContent = `${data.metrics[index]} ${plain(value)}`;
          if (index === +metric.value && isNumber(against) && value !== against) {
            chip.classList.add((value > against) !== data.lower[index] ? "up" : "down");
          }
        });
        for (const [text, reason, pieces] of one.answers) {
          const box = make(at, "div", "answer");
          box.tabIndex = 0;
          if (pieces) shade(box, pieces);
          else marked(box, text, letter === "" ? undefined : theirs[number]);
          if (reason !== "stop") make(at, "div", "note").textContent = `ended by ${reason}`;
          number += 1;
        }
      }
      if (!number) make(at, "div", "note").textContent = "no answer";
    }

    for (const field of [left, right, metric, which]) field.addEventListener("change", update);
    search.addEventListener("input", update);
    more.addEventListener("click", draw);
    document.addEventListener("keydown", (event) => {
      if (!"jk".includes(event.key) || /INPUT|SELECT|TEXTAREA/.test(event.target.tagName)) return;
      const all = [...list.children];
      const now = all.indexOf(document.activeElement.closest("article"));
      const next = all[now + (event.key === "j" ? 1 : -1)];
      if (next) {
        next.focus();
        next.scrollIntoView({ block: "center" });
      }
    });
    update();
  }

  function isNumber(value) {
    return typeof value === "number";
  }

  function plain(value) {
    return Number.isInteger(value) ? String(value) : value.toPrecision(3);
  }

  function make(parent, tag, name) {
    const made = document.createElement(tag);
    if (name) made.className = name;
    parent.append(made);
    return made;
  }

  function choice(bar, title, options, first) {
    const label = make(bar, "label");
    label.append(`${title} `);
    const select = make(label, "select");
    for (const [value, text] of options) {
      const option = make(select, "option");
      option.value = value;
      option.textContent = text;
    }
    select.value = String(first);
    label.hidden = !options.length;
    return select;
  }

  /** Tokens with a colour the stronger the less likely they were. */
  function shade(box, pieces) {
    for (const [text, logprob] of pieces) {
      const span = make(box, "span");
      span.textContent = text;
      span.title = `probability ${Math.exp(logprob).toPrecision(3)}`;
      span.style.background = `rgb(213 94 0 / ${Math.min(0.75, -logprob / 6).toFixed(2)})`;
    }
  }

  /** The text, with the words that the other one doesn't have in the same order. */
  function marked(box, text, other) {
    const [a, b] = [words(text), other === undefined ? null : words(other)];
    if (b === null || text === other || a.length > LONGEST_DIFF || b.length > LONGEST_DIFF) {
      box.textContent = text;
      return;
    }
    const common = inCommon(a, b);
    const said = Math.max(...[a, b].map((all) => all.filter((word) => word.trim()).length));
    const alike = [...common].filter((index) => a[index].trim()).length;
    if (alike < LEAST_ALIKE * said) {  // Where nearly all is marked in one of them, nothing is.
      box.textContent = text;
      return;
    }
    a.forEach((word, index) => {
      if (common.has(index) || !word.trim()) box.append(word);
      else make(box, "mark").textContent = word;
    });
  }

  function words(text) {
    return text.split(/(\s+)/);
  }

  /** Indices of `a` in a longest common subsequence with `b`. */
  function inCommon(a, b) {
    const wide = b.length + 1;
    const longest = new Uint16Array((a.length + 1) * wide);
    for (let i = a.length - 1; i >= 0; i--) {
      for (let j = b.length - 1; j >= 0; j--) {
        longest[i * wide + j] = a[i] === b[j]
          ? longest[(i + 1) * wide + j + 1] + 1
          : Math.max(longest[(i + 1) * wide + j], longest[i * wide + j + 1]);
      }
    }
    const found = new Set();
    for (let i = 0, j = 0; i < a.length && j < b.length;) {
      if (a[i] === b[j]) { found.add(i); i++; j++; }
      else if (longest[(i + 1) * wide + j] >= longest[i * wide + j + 1]) i++;
      else j++;
    }
    return found;
  }
})();
