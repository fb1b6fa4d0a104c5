"""Calls of tools in Qwen's format, however the text is cut, as OpenAI's own types read them."""

import itertools
import json
import re
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from openai.types.chat import ChatCompletion, ChatCompletionChunk

import qwen_jax
from qwen_jax.completions import Completion, Piece, StreamedText
from qwen_jax.options import Options
from qwen_jax.serving import asked
from qwen_jax.serving.replies import ChatReply
from qwen_jax.serving.tool_calls import ToolCalls
from qwen_jax.text.messages import plain_messages
from tests.serving.conftest import Served

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CHAT = [{"role": "user", "content": "Weather in Paris?"}]
BOTH = (
    "I'll look.\n<tool_call>\n"
    '{"name": "weather", "arguments": {"city": "Paris", "note": "<b>é"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)


def parsed(text: str, cuts: list[int], most: int | None = None) -> tuple[str, list[Any]]:
    parser, shown, calls = ToolCalls(most), "", []
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    for start, stop in itertools.pairwise(places):
        piece, complete = parser.feed(text[start:stop])
        shown += piece
        calls += complete
    piece, complete = parser.finish()
    return shown + piece, [(call.name, json.loads(call.arguments)) for call in calls + complete]


_CALL = st.builds(
    lambda name, arguments: (name, arguments),
    st.text(max_size=5),
    st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=4), max_size=2),
)


@given(
    st.lists(st.text("ab<>/_tolc \n", max_size=12) | _CALL, max_size=5),
    st.lists(st.integers(0, 500), max_size=12),
)
def test_any_text_and_calls(parts: list[Any], cuts: list[int]) -> None:
    """What is found in all of the text at once, by a regular expression."""
    text = "".join(
        part
        if isinstance(part, str)
        else f"<tool_call>\n{json.dumps({'name': part[0], 'arguments': part[1]})}\n</tool_call>"
        for part in parts
    )
    if "<tool_call>" in "".join(part for part in parts if isinstance(part, str)):
        return  # text that opens a call by itself
    shown, calls = parsed(text, cuts)
    assert calls == [part for part in parts if not isinstance(part, str)]
    right = re.sub(r"\s*<tool_call>\n.*?\n</tool_call>\s*", "", text, flags=re.DOTALL)
    # White space between two texts that a call parts is nobody's.
    assert re.sub(r"\s", "", shown) == re.sub(r"\s", "", right)


@pytest.mark.parametrize(
    "text, shown, names",
    [
        (BOTH, "I'll look.", ["weather", "now"]),
        ("a <tool_cal", "a <tool_cal", []),
        ("a <tool_call>{broken}</tool_call> b", "a <tool_call>{broken}</tool_call> b", []),
        ('<tool_call>{"name": "f"}</tool_call> \n b', "b", ["f"]),
        ('<tool_call>{"name": 1}</tool_call>', '<tool_call>{"name": 1}</tool_call>', []),
        ('<tool_call>\n{"name": "f"}', "", ["f"]),  # the end of the text closes it, too
        ('<tool_call>\n{"name": "f", ', '<tool_call>\n{"name": "f", ', []),
    ],
)
def test_what_is_a_call(text: str, shown: str, names: list[str]) -> None:
    found, calls = parsed(text, [*range(len(text))])
    assert (found, [name for name, _ in calls]) == (shown, names)


def test_no_more_than_one() -> None:
    assert parsed(BOTH, [30, 60], 1)[1] == [("weather", {"city": "Paris", "note": "<b>é"})]


def reply(model: qwen_jax.Model, **fields: Any) -> ChatReply:
    defaults = Options(max_tokens=9, sampling=qwen_jax.Sampling())
    wanted = asked.chat({"messages": CHAT, "tools": [TOOL], **fields}, defaults)
    assert wanted.tools and wanted.options["tools"] == [TOOL]
    return ChatReply(wanted, model.tokenizer, "m")


def test_as_openais_objects(model: qwen_jax.Model) -> None:
    whole = reply(model)
    whole.end(0, Completion(BOTH, (1, 2), "stop", 5))
    (choice,) = ChatCompletion.model_validate(whole.whole(), strict=True).choices
    assert (choice.message.content, choice.finish_reason) == ("I'll look.", "tool_calls")
    first, second = choice.message.tool_calls
    assert first.id != second.id and second.function.name == "now"
    given_back = {"content": "I'll look.", "role": "assistant"}
    (plain,) = plain_messages([choice.message.model_dump()])
    assert given_back.items() <= plain.items() and len(plain["tool_calls"]) == 2
    assert json.loads(first.function.arguments) == {"city": "Paris", "note": "<b>é"}

    streamed, content, calls = reply(model), "", {}
    for start in range(0, len(BOTH), 7):
        text = StreamedText(BOTH[start : start + 7])
        text.finish_reason = "stop" if start + 7 >= len(BOTH) else None
        for delta in streamed.delta(0, Piece(0, text, None)):
            chunk = ChatCompletionChunk.model_validate(streamed.chunk(delta), strict=True)
            (one,) = chunk.choices
            content += one.delta.content or ""
            for call in one.delta.tool_calls or ():
                calls[call.index] = (call.function.name, json.loads(call.function.arguments))
    assert content == "I'll look." and one.finish_reason == "tool_calls"
    assert calls == {0: ("weather", {"city": "Paris", "note": "<b>é"}), 1: ("now", {})}

    single = reply(model, parallel_tool_calls=False)
    single.end(0, Completion(BOTH, (1, 2), "stop", 5))
    (message,) = [choice["message"] for choice in single.whole()["choices"]]
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["weather"]


def test_a_call_that_is_cut_off_is_text(model: qwen_jax.Model) -> None:
    whole = reply(model)
    whole.end(0, Completion(BOTH[:40], (1, 2), "length", 5))
    (choice,) = whole.whole()["choices"]
    assert choice["finish_reason"] == "length" and choice["message"]["content"] == BOTH[:40]


def test_a_model_that_knows_no_tools_says_so(haiku: Served) -> None:
    body = {"messages": CHAT, "tools": [TOOL]}
    answer = haiku.post("/v1/chat/completions", body)
    assert answer.status_code == 400 and "never mentions tools" in answer.text
    assert haiku.post("/v1/chat/completions", body | {"tool_choice": "none"}).status_code == 200


WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Oslo"]}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]


@pytest.mark.parametrize(
    "choice, parallel, names",
    [
        ("required", True, {"weather", "now"}),
        ({"type": "function", "function": {"name": "weather"}}, True, {"weather"}),
        ("required", False, {"weather", "now"}),
    ],
)
def test_a_call_is_forced(
    model: qwen_jax.Model, choice: Any, parallel: bool, names: set[str]
) -> None:
    """Of a model that knows nothing of tools; the answer ends, or is cut, but is nothing else."""
    body = {
        "messages": CHAT,
        "tools": TOOLS,
        "tool_choice": choice,
        "parallel_tool_calls": parallel,
    }
    wanted = asked.chat(body, Options(max_tokens=60, sampling=qwen_jax.Sampling()))
    assert wanted.tools and wanted.options["tools"] == TOOLS
    answers = model.generate(
        ["x"],
        n=4,
        sampling=qwen_jax.Sampling(temperature=1.0),
        max_tokens=70,
        constraint=wanted.options["constraint"],
    )
    ended = [answer for answer in answers if answer.finish_reason == "stop"]
    assert ended
    for answer in ended:
        shown, calls = parsed(answer.text, [])
        assert shown == "" and {name for name, _ in calls} <= names
        assert len(calls) == 1 or (choice == "required" and parallel)
        for name, arguments in calls:
            if name == "weather":
                assert arguments["city"] in ("Paris", "Oslo") and type(arguments["days"]) is int


@pytest.mark.parametrize(
    "more, words",
    [
        ({"tool_choice": "must"}, "give 'none', 'auto', 'required'"),
        ({"tool_choice": {"type": "function"}}, "give 'none', 'auto', 'required'"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "are 'weather', 'now'"),
        ({"tool_choice": "required", "regex": "a"}, "give one of them"),
        (
            {
                "tool_choice": "required",
                "tools": [
                    {"function": {"name": "f", "parameters": {"oneOf": []}}, "type": "function"}
                ],
            },
            "'oneOf'",
        ),
    ],
)
def test_calls_that_cannot_be_forced(haiku: Served, more: dict[str, Any], words: str) -> None:
    answer = haiku.post("/v1/chat/completions", {"messages": CHAT, "tools": TOOLS} | more)
    assert answer.status_code == 400 and words in answer.json()["error"]["message"]
