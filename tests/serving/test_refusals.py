"""What is refused, in OpenAI's form: a status, the field and the way out."""

import json
import re
from pathlib import Path
from typing import Any

import httpx
import hypothesis.strategies as st
import openai
import pytest
from hypothesis import HealthCheck, given, settings

import qwen_jax
from qwen_jax.serving import fields
from tests.serving.conftest import Served, served

SNOW = [{"role": "user", "content": "haiku: snow"}]
CHAT = "/v1/chat/completions"
FORM = {"message", "type", "param", "code"}


def refused(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == FORM and error["message"].endswith((".", "?"))
    assert "haiku.gguf" not in error["message"]  # nobody need know where it lies
    return error


@pytest.mark.parametrize(
    "wrong, param, words",
    [
        ({"temperature": "hot"}, "temperature", "must be a number"),
        ({"temperature": -1}, "temperature", "temperature is -1, but it must be 0 (greedy)"),
        ({"temperature": True}, "temperature", "must be a number"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"top_k": 1.5}, "top_k", "must be a whole number"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "must map token ids to numbers"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "from -100 to 100"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "logit_bias names token 99999"),
        ({"n": 0}, "n", "from 1 to 128"),
        ({"n": 129}, "n", "from 1 to 128"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens", "give one of them"),
        ({"stop": ""}, "stop", "a text that is not empty"),
        ({"stop": ["x"] * 17}, "stop", "give 16 at most"),
        ({"stop_ids": [-1]}, "stop_ids", "stop_ids holds -1"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
        ({"stream_options": {}}, "stream_options", "needs stream"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "There is no field"),
        ({"tool_choice": "auto", "tools": [{}]}, "tools", "tool 0 is {}"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"temprature": 1}, "temprature", "did you mean 'temperature'?"),
        ({"functions": [{"name": "f"}]}, "functions", "give tools"),
        ({"store": True}, "store", "keeps nothing"),
        ({"modalities": ["audio"]}, "modalities", "writes text alone"),
        ({"messages": []}, "messages", "no messages"),
        ({"messages": [{"role": "user"}]}, "messages", "message 0 (user) has no content"),
        ({"messages": None}, "messages", "messages is missing"),
        ({"messages": "hi"}, "messages", "must be a list of objects"),
        # In the words of JSON.
        (
            {"messages": [None]},
            "messages",
            "is [null], but it must be a list of objects; item 0 is n",
        ),
        ({"messages": [{"role": True}]}, "messages", "message 0 has the role true; give one of"),
        ({"stream": 1}, "stream", "stream is 1, but it must be true or false."),
        ({"stream": "yes"}, "stream", 'stream is "yes", but it must be true or false.'),
        ({"max_tokens": True}, "max_tokens", "max_tokens is true, but it must be a whole number."),
        ({"response_format": "json"}, "response_format", "must be an object."),
        ({"logit_bias": [1]}, "logit_bias", "logit_bias is [1], but it must be an object."),
        ({"logit_bias": {"5": True}}, "logit_bias", 'has "5": true, but it must map'),
        ({"tool_choice": 5}, "tool_choice", "must be a text or an object."),
        ({"store": True}, "store", "store is true, which is not served"),
    ],
)
def test_a_field(haiku: Served, wrong: dict[str, Any], param: str | None, words: str) -> None:
    error = refused(haiku.post(CHAT, {"messages": SNOW} | wrong), 400)
    assert error["param"] == param and words in error["message"]
    assert error["type"] == "invalid_request_error"


def form(**fields: Any) -> dict[str, Any]:
    return {"response_format": fields}


def tools(*listed: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"tools": list(listed), **more}


FUNCTION = {"type": "function", "function": {"name": "f"}}
SCHEMA = {"schema": {"type": "object"}}


@pytest.mark.parametrize(
    "wrong, param, words",
    [
        (
            form(type="json_object", json_schema=SCHEMA),
            ".json_schema",
            "does nothing with the type",
        ),
        (form(type="text", json_schema=SCHEMA), ".json_schema", "set the type to 'json_schema'"),
        (form(type="xml"), ".type", "has the type 'xml'; give text, json_object or"),
        (form(), ".type", "response_format has no type"),
        (form(type="json_schema"), ".json_schema", "has no schema"),
        (form(type="json_schema", json_schema={"schem": {}}), ".json_schema.schem", "'schema'?"),
        (form(type="json_schema", json_schema={"schema": 1}), ".json_schema.schema", "an object"),
        (form(type="text", schema={}), ".schema", "There is no field 'response_format.schema'"),
        (form(type=None, json_schema=None), ".type", "response_format has no type"),
        (tools(FUNCTION), "tools", "never mentions tools"),
        (tools({**FUNCTION, "x": 1}), "tools[0].x", "There is no field 'tools[0].x'"),
        (
            tools(FUNCTION, {"type": "function", "function": {"name": "g", "paramters": {}}}),
            "tools[1].function.paramters",
            "did you mean 'parameters'?",
        ),
        (
            tools({"type": "function", "function": {"name": "g", "parameters": []}}),
            "tools[0].function.parameters",
            "must be an object",
        ),
        (tools({"name": "g", "paramters": {}}), "tools[0].paramters", "mean 'parameters'?"),
        (tools({"type": "web_search", "name": "g"}), "tools[0].type", "calls functions alone"),
        (tools({**FUNCTION, "x": 1}, tool_choice="none"), "tools[0].x", "There is no field"),
        (
            tools(FUNCTION, tool_choice={**FUNCTION, "mode": "auto"}),
            "tool_choice.mode",
            "There is no field 'tool_choice.mode'",
        ),
        (
            tools(FUNCTION, tool_choice={"type": "function", "function": {"name": "f", "x": 1}}),
            "tool_choice.function.x",
            "There is no field",
        ),
        (tools(FUNCTION, tool_choice={"type": "function"}), "tool_choice", "give 'none', 'auto'"),
        (tools(FUNCTION, tool_choice="required", regex="a"), "tool_choice", "is no regex"),
        ({"regex": "("}, "regex", "unclosed"),
        ({"lark": "start: nothing"}, "lark", "nothing"),
        (
            form(type="json_schema", json_schema={"schema": {"type": "x"}}),
            "",
            "#/type of the JSON schema is 'x'",
        ),
        ({"messages": [{"role": "user", "content": "x", "nmae": 1}]}, "messages", "mean 'name'?"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "y": 1}]}]},
            "messages",
            "the field 'y', which nobody reads",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "refusal": "no"}, *SNOW]},
            "messages",
            "put what was said into content",
        ),
    ],
)
def test_inside_a_field(haiku: Served, wrong: dict[str, Any], param: str, words: str) -> None:
    """What stands in an object is read or refused, too."""
    if "response_format" in wrong:
        param = f"response_format{param}"
    error = refused(haiku.post(CHAT, {"messages": SNOW} | wrong), 400)
    assert error["param"] == param and words in error["message"]


def test_an_answer_is_given_back_whole(haiku: Served, model: qwen_jax.Model) -> None:
    """As clients have it, with all that it holds, and beside what they send along."""
    chat: list[Any] = [{**SNOW[0], "name": "Ann"}]
    create = haiku.client().chat.completions.create
    chat.append(create(model="haiku", messages=chat, max_tokens=8).choices[0].message)
    chat.append({"role": "user", "content": "haiku: rust"})
    found = create(model="haiku", messages=chat, max_tokens=8).choices[0].message.content
    said = [*SNOW, {"role": "assistant", "content": chat[1].content}, chat[2]]
    assert found == model.generate(said, max_tokens=8).text
    said[1] |= {"reasoning_content": "hm", "annotations": [], "audio": None}
    again = haiku.post(CHAT, {"messages": said, "max_tokens": 8}).json()
    assert again["choices"][0]["message"]["content"] == found


@pytest.mark.parametrize(
    "body, words",
    [
        ({}, "prompt is missing"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [[]]}, "prompt is empty"),
        ({"prompt": [99999]}, "has the token 99999 at index 0"),
        ({"prompt": ["a", [1]]}, "must be"),
        ({"prompt": "a", "best_of": 2}, "ask for n"),
        ({"prompt": "a", "suffix": "b"}, "no tokens for filling in the middle"),
        ({"prompt": "a", "logprobs": True}, "must be a whole number"),
        ({"prompt": [5] * 5000}, "has 5000 tokens, but this model has"),
    ],
)
def test_a_completion(haiku: Served, body: dict[str, Any], words: str) -> None:
    error = refused(haiku.post("/v1/completions", body), 400)
    others = body.keys() - {"prompt"} or {"prompt"}
    assert words in error["message"] and error["param"] in others


def test_what_asks_for_nothing_is_let_through(haiku: Served) -> None:
    nothing = {name: known.nothing[0] for name, known in fields.REFUSED.items() if known.nothing}
    ignored = {"user": "u", "metadata": {"a": "b"}, "temperature": None, "tools": None}
    answer = haiku.post(CHAT, {"messages": SNOW, "max_tokens": 1} | nothing | ignored)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "content, kind, status, words",
    [
        (b"{", "application/json", 400, "it is not JSON"),
        (b"[]", "application/json", 400, "must be a JSON object"),
        (b"null", "application/json", 400, "the body: it is null, but it must be a JSON object"),
        (b'{"n": 1, "n": 2}', "application/json", 400, "appears twice"),
        (b"[" * 100_000, "application/json", 400, "nested too deeply"),
        (b'{"seed": 1' + b"0" * 5000 + b"}", "application/json", 400, "digits"),
        (b'{"prompt": "\\ud800"}', "application/json", 400, "half a character"),
        (b'{"temperature": NaN}', "application/json", 400, "NaN is no number of JSON"),
        (b"\xff", "application/json", 400, "UTF-8"),
        (b"{}", "text/plain", 415, "send JSON"),
        (b"{}", "application/x-www-form-urlencoded", 415, "send JSON"),
        (b" " * 5_000_000, "application/json", 413, "more than 4000000 bytes"),
    ],
)
def test_a_body(haiku: Served, content: bytes, kind: str, status: int, words: str) -> None:
    for path in (CHAT, "/v1/completions", "/tokenize"):
        headers = {"Content-Type": kind}
        answer = httpx.post(haiku.url + path, content=content, headers=headers, timeout=60)
        assert words in refused(answer, status)["message"]


def test_paths_and_methods(haiku: Served) -> None:
    assert "/v1/models" in refused(httpx.get(f"{haiku.url}/nothing"), 404)["message"]
    refused(httpx.get(haiku.url + CHAT), 405)
    assert (
        "trained to write" in refused(haiku.post("/v1/embeddings", {"input": "a"}), 400)["message"]
    )
    with pytest.raises(openai.BadRequestError, match="trained to write"):
        haiku.client().embeddings.create(model="haiku", input="a")
    answer = httpx.options(haiku.url + CHAT, headers={"Origin": "http://evil.example"})
    assert not any(name.startswith("access-control") for name in answer.headers)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example"])
def test_a_page_that_points_its_name_here_is_refused(haiku: Served, host: str) -> None:
    refused(httpx.get(f"{haiku.url}/v1/models", headers={"Host": host}), 403)
    for name in ("localhost", "LOCALHOST:1", "127.0.0.1:80", "[::1]", "[::1]:80"):
        assert httpx.get(f"{haiku.url}/health", headers={"Host": name}).status_code == 200


def test_tokens_of_a_prompt(model: qwen_jax.Model) -> None:
    with served(model, max_prompt_tokens=31) as found:
        assert found.post(CHAT, {"messages": SNOW}).status_code == 200
        longer = [{"role": "user", "content": "haiku: snow and a lot of ice"}]
        error = refused(found.post(CHAT, {"messages": longer}), 400)
        assert "31 at most" in error["message"] and error["code"] == "context_length_exceeded"


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=8,
)
_MESSAGES = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content", "name", "tool_calls", "tool_call_id"]),
        st.sampled_from(["system", "user", "assistant", "tool"]) | _JSON,
        max_size=4,
    ),
    max_size=3,
)
_NAMES = sorted(
    {
        *(*fields.CHAT, *fields.TEXT, *fields.TOKENIZE, *fields.DETOKENIZE),
        *(*fields.REFUSED, *fields.IGNORED, "x"),
    }
)
_BODIES = st.fixed_dictionaries(
    {"max_tokens": st.integers(-1, 6)},
    optional={name: st.integers(-2, 3) | _JSON for name in _NAMES if name != "max_tokens"}
    | {"messages": st.just(SNOW) | _MESSAGES, "prompt": st.text(max_size=9) | _JSON},
)


@given(_BODIES, st.sampled_from([CHAT, "/v1/completions", "/tokenize", "/detokenize"]))
@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_any_body_is_answered_or_refused(haiku: Served, body: dict[str, Any], path: str) -> None:
    """No 500, no hang, and nothing is left behind."""
    content = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    answer = _client(haiku.url).post(path, content=content, headers=headers)
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        assert answer.json()["error"].keys() == FORM
    assert "haiku.gguf" not in answer.text
    haiku.settle()


_CLIENTS: dict[str, httpx.Client] = {}


def _client(url: str) -> httpx.Client:
    """One connection for all examples."""
    return _CLIENTS.setdefault(url, httpx.Client(base_url=url, timeout=30))


def test_the_page_names_every_field() -> None:
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    named = set(re.findall(r"`(\w+)`", page.partition("## Fields")[2].partition("## Errors")[0]))
    known = {*fields.CHAT, *fields.TEXT, *fields.REFUSED, *fields.IGNORED}
    assert known <= named
