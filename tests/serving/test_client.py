"""What the `openai` client and curl get, held against `model.generate`."""

import contextlib
import dataclasses
import io
import json
import math
import re
import shutil
import subprocess

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

import qwen_jax
from tests.cli.test_readme import README, snippet
from tests.serving.conftest import Served, served

SNOW = [{"role": "user", "content": "haiku: snow"}]


def test_chat(haiku: Served, model: qwen_jax.Model) -> None:
    right = model.generate(SNOW, max_tokens=24)
    found = haiku.client().chat.completions.create(model="haiku", messages=SNOW)
    (choice,) = found.choices
    assert (choice.message.content, choice.finish_reason) == (right.text, "stop")
    assert found.usage.prompt_tokens == right.prompt_tokens
    assert found.usage.completion_tokens == len(right.tokens)
    assert found.usage.total_tokens == right.prompt_tokens + len(right.tokens)


def test_what_readme_shows(haiku: Served) -> None:
    """Of `openai`, and of curl."""
    code, shown = snippet("import openai")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code.replace("http://localhost:8000", haiku.url), {})
    pieces, whole = (text.strip().replace("|", "") for text in (out.getvalue(), shown))
    assert pieces == whole
    body, said = re.search(r"--json '(.*?)' \| jq .*\n(.*)", README).groups()
    found = haiku.post("/v1/chat/completions", json.loads(body)).json()
    assert found["choices"][0]["message"]["content"] == json.loads(said)


def test_the_schema_that_readme_shows(model: qwen_jax.Model) -> None:
    text, said = re.search(r"cat poem.json\n(.*?)\$ .*?\n(.*?)\n", README, re.DOTALL).groups()
    held = qwen_jax.Constraint.json_schema(text)
    assert model.generate("haiku: snow", constraint=held).text == said


def test_a_stream_is_the_whole(haiku: Served, model: qwen_jax.Model) -> None:
    right = model.generate(SNOW, max_tokens=24)
    chunks = list(
        haiku.client().chat.completions.create(
            model="haiku", messages=SNOW, stream=True, stream_options={"include_usage": True}
        )
    )
    *pieces, last = chunks
    assert len(pieces) > 3 and len({chunk.id for chunk in chunks}) == 1
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in pieces) == right.text
    assert [c.choices[0].finish_reason for c in pieces][-2:] == [None, "stop"]
    assert last.choices == [] and last.usage.completion_tokens == len(right.tokens)


def test_settings_are_those_of_generate(haiku: Served, model: qwen_jax.Model) -> None:
    """Each sample of n has the seed raised by its index."""
    sampling = qwen_jax.Sampling(
        temperature=1.1,
        top_p=0.9,
        top_k=50,
        min_p=0.01,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.1,
        logit_bias={300: -5.0},
        seed=7,
    )
    right = model.generate([SNOW], sampling=sampling, n=3, max_tokens=12)
    wire = dataclasses.asdict(sampling)
    extra = {name: wire.pop(name) for name in ("top_k", "min_p", "repetition_penalty")}
    wire["logit_bias"] = {"300": -5.0}
    found = haiku.client().chat.completions.create(
        model="haiku", messages=SNOW, n=3, max_completion_tokens=12, extra_body=extra, **wire
    )
    assert [c.message.content for c in found.choices] == [c.text for c in right]
    assert [c.index for c in found.choices] == [0, 1, 2]
    assert found.usage.prompt_tokens == right[0].prompt_tokens


def test_without_a_seed_answers_differ(haiku: Served) -> None:
    ask = haiku.client().completions.create
    texts = {ask(model="haiku", prompt="snow", temperature=1.5).choices[0].text for _ in range(4)}
    assert len(texts) > 1


def test_logprobs(haiku: Served, model: qwen_jax.Model) -> None:
    right = model.generate(SNOW, max_tokens=24, top_logprobs=3)
    create = haiku.client().chat.completions.create
    whole = create(model="haiku", messages=SNOW, logprobs=True, top_logprobs=3)
    chunks = create(model="haiku", messages=SNOW, logprobs=True, top_logprobs=3, stream=True)
    streamed = [
        entry
        for chunk in chunks
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    content = whole.choices[0].logprobs.content
    assert streamed == content
    shown = right.logprobs[:-1]  # the last token ends the text
    assert [entry.logprob for entry in content] == [entry.logprob for entry in shown]
    assert b"".join(bytes(entry.bytes) for entry in content).decode() == right.text
    for ours, theirs in zip(shown, content, strict=True):
        assert [top.logprob for top in theirs.top_logprobs] == [p for _, p in ours.top]
        assert math.isclose(theirs.top_logprobs[0].logprob, theirs.logprob, abs_tol=1e-6)


def test_completions(haiku: Served, model: qwen_jax.Model) -> None:
    """Texts and ids, one or several, each continued as it is."""
    ask = haiku.client().completions.create
    right = model.generate(["snow", "an old pond"], raw=True, max_tokens=8, top_logprobs=2)
    ids = [model.tokenizer.encode(text) for text in ("snow", "an old pond")]
    for prompt in (["snow", "an old pond"], ids):
        found = ask(model="haiku", prompt=prompt, max_tokens=8, logprobs=2)
        assert [choice.text for choice in found.choices] == [c.text for c in right]
        assert found.usage.prompt_tokens == sum(map(len, ids))
        logprobs = found.choices[0].logprobs
        assert logprobs.token_logprobs == [e.logprob for e in right[0].logprobs]
        assert "".join(logprobs.tokens) == right[0].text
        starts = [len("".join(logprobs.tokens[:i])) for i in range(len(logprobs.tokens))]
        assert logprobs.text_offset == starts
        assert all(len(top) == 2 for top in logprobs.top_logprobs)
    assert ask(model="haiku", prompt=ids[0], max_tokens=8).choices[0].text == right[0].text
    pieces = [c.choices[0] for c in ask(model="haiku", prompt="snow", max_tokens=8, stream=True)]
    assert "".join(piece.text for piece in pieces) == right[0].text
    assert pieces[-1].finish_reason == "length"


def test_stops(haiku: Served, model: qwen_jax.Model) -> None:
    text = model.generate(SNOW, max_tokens=24).text
    create = haiku.client().chat.completions.create
    for stop in ("\n", ["zzz", "\n"]):
        choice = create(model="haiku", messages=SNOW, stop=stop).choices[0]
        assert (choice.message.content, choice.finish_reason) == (text.partition("\n")[0], "stop")
    (token,) = model.tokenizer.encode("\n")
    choice = create(model="haiku", messages=SNOW, extra_body={"stop_ids": [token]}).choices[0]
    assert choice.message.content == text.partition("\n")[0]


def test_a_final_message_is_continued(haiku: Served, model: qwen_jax.Model) -> None:
    chat = [*SNOW, {"role": "assistant", "content": "the first snow"}]
    right = model.generate(chat, continue_final_message=True, max_tokens=24)
    found = haiku.client().chat.completions.create(
        model="haiku", messages=chat, extra_body={"continue_final_message": True}
    )
    assert found.choices[0].message.content == right.text


def test_models_and_tokens(haiku: Served, model: qwen_jax.Model) -> None:
    client = haiku.client()
    (entry,) = client.models.list().data
    assert entry.id == client.models.retrieve("haiku").id == "haiku"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4', only 'haiku'"):
        client.chat.completions.create(model="gpt-4", messages=SNOW)
    found = haiku.post("/tokenize", {"messages": SNOW}).json()
    assert found["tokens"] == model.tokens(SNOW) and found["count"] == len(found["tokens"])
    found = haiku.post("/tokenize", {"prompt": "snow"}).json()
    assert found["tokens"] == model.tokenizer.encode("snow")


def test_metrics_count(haiku: Served) -> None:
    def numbers() -> dict[str, float]:
        text = httpx.get(f"{haiku.url}/metrics").text
        return {
            sample.name: sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if not sample.labels
        }

    before = numbers()
    found = haiku.client().chat.completions.create(model="haiku", messages=SNOW)
    after = numbers()
    for name in ("prompt", "generated"):
        key = f"qwen_jax_{name}_tokens_total"
        grown = after[key] - before[key]
        usage = found.usage.prompt_tokens if name == "prompt" else found.usage.completion_tokens
        assert grown == usage
    assert (
        after["qwen_jax_first_token_seconds_count"] > before["qwen_jax_first_token_seconds_count"]
    )
    assert after["qwen_jax_answers_present"] == 0
    assert httpx.get(f"{haiku.url}/health").json() == {"status": "ok"}


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(haiku: Served, model: qwen_jax.Model) -> None:
    right = model.generate(SNOW, max_tokens=24).text
    body = {"messages": SNOW, "stream": True}
    command = ["curl", "-sN", f"{haiku.url}/v1/chat/completions", "--json", json.dumps(body)]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == right


def test_a_key(model: qwen_jax.Model) -> None:
    from qwen_jax.serving.limits import Key

    with served(model, Key("hush")) as found:
        assert found.client("hush").models.list().data[0].id == "haiku"
        for key in ("hus", "hush2", "HUSH"):
            with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
                found.client(key).models.list()
        assert httpx.get(f"{found.url}/v1/models").status_code == 401
        assert httpx.get(f"{found.url}/metrics").status_code == 401
        assert httpx.get(f"{found.url}/health").status_code == 200


POEM = {
    "type": "object",
    "properties": {"lines": {"type": "integer"}, "about": {"enum": ["snow", "ice"]}},
    "required": ["lines", "about"],
    "additionalProperties": False,
}


def test_answers_are_held_to_a_schema(haiku: Served, model: qwen_jax.Model) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "poem", "schema": POEM, "strict": True}}
    create = haiku.client().chat.completions.create
    whole = create(model="haiku", messages=SNOW, response_format=form, max_tokens=40)
    right = model.generate(SNOW, max_tokens=40, constraint=qwen_jax.Constraint.json_schema(POEM))
    (choice,) = whole.choices
    assert (choice.message.content, choice.finish_reason) == (right.text, "stop")
    assert json.loads(right.text)["about"] in ("snow", "ice")
    chunks = create(model="haiku", messages=SNOW, response_format=form, max_tokens=40, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == right.text
    cut = create(model="haiku", messages=SNOW, response_format=form, max_tokens=4).choices[0]
    assert cut.finish_reason == "length"


def test_answers_are_held_to_other_constraints(haiku: Served) -> None:
    create = haiku.client().chat.completions.create
    for extra, pattern in (
        ({"regex": "[ab]{2,3}c"}, "[ab]{2,3}c"),
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"lark": 'start: "x" /[yz]/'}, "x[yz]"),
        ({"response_format": {"type": "json_object"}}, r"\{.*"),
    ):
        found = create(model="haiku", messages=SNOW, extra_body=extra, temperature=1, seed=3)
        assert re.fullmatch(pattern, found.choices[0].message.content, re.DOTALL)
    plain = create(model="haiku", messages=SNOW, response_format={"type": "text"})
    assert "\n" in plain.choices[0].message.content
    for extra, words in (
        ({"regex": "[a"}, "unclosed character class"),
        ({"regex": "a", "choice": ["b"]}, "regex and choice exclude each other"),
        ({"response_format": {"type": "xml"}}, "give text, json_object or json_schema"),
        ({"response_format": {"type": "json_schema"}}, "has no schema"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"patternProperties": {}}},
                }
            },
            "patternProperties",
        ),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            create(model="haiku", messages=SNOW, extra_body=extra)
