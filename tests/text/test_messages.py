"""Final messages are continued as transformers does it, and OpenAI's forms become plain ones."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.errors import UserError
from qwen_jax.text.chat import CHATML_TEMPLATE, render_chat
from qwen_jax.text.messages import plain_messages
from tests.text.conftest import fixture_path

USER = {"role": "user", "content": "Count."}
SYSTEM = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
ASKED = SYSTEM + "<|im_end|>\n<|im_start|>user\nCount.<|im_end|>\n<|im_start|>assistant\n"
TRIMMING = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content | trim + '</>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# What transformers 5.24 renders with continue_final_message, of the last message's text.
CONTINUED = {
    "one, two": "one, two",
    "one, two ": "one, two ",
    "one\n\n": "one\n\n",
    " one": " one",
    "": "",
    "a CONTINUE_FINAL_MESSAGE_TAG b": "a CONTINUE_FINAL_MESSAGE_TAG b",
    "<|im_end|>\nx": "<|im_end|>\nx",
}


def _chat(text: Any, role: str = "assistant") -> list[dict[str, Any]]:
    return [USER, {"role": role, "content": text}]


def _continue(template: str | None, chat: list[dict[str, Any]]) -> str:
    return render_chat(template, chat, continue_final_message=True)


@pytest.mark.parametrize(("text", "end"), CONTINUED.items())
def test_a_final_message_stays_open(text: str, end: str) -> None:
    assert _continue(CHATML_TEMPLATE, _chat(text)) == ASKED + end


def test_a_template_may_trim_what_is_continued() -> None:
    assert _continue(TRIMMING, _chat(" one,  ")) == "<user>Count.</>\n<assistant>one,"
    assert _continue(TRIMMING, _chat("")) == "<user>Count.</>\n<assistant>"


@pytest.mark.live
@pytest.mark.parametrize("template", [CHATML_TEMPLATE, TRIMMING, "qwen"])
@pytest.mark.parametrize("text", [*CONTINUED, "  one,\t \n", "\n"])
def test_continued_equals_transformers(template: str, text: str) -> None:
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    if template == "qwen":
        template = fixture_path("qwen2.5-instruct-chat-template.jinja").read_text("utf-8")
    oracle = transformers.Qwen2Tokenizer(vocab={"a": 0, "<|endoftext|>": 1}, merges=[])
    for role in ("assistant", "user"):
        chat = _chat(text, role)
        expected = oracle.apply_chat_template(
            chat, chat_template=template, continue_final_message=True, tokenize=False
        )
        assert _continue(template, chat) == expected


@pytest.mark.parametrize(
    ("template", "final", "words"),
    [
        ("{{ messages[0].content }}", {"content": "x"}, "leaves out or changes the final message"),
        ("{{ messages[1].content | upper }}", {"content": "x"}, "leaves out or changes"),
        (
            "{{ messages[1].tool_calls }}",
            {"tool_calls": [{"name": "f"}]},
            "must have content, and no tool_calls",
        ),
        (
            "{{ messages[1].tool_calls }}",
            {"content": "x", "tool_calls": [{"name": "f"}]},
            "must have content, and no tool_calls",
        ),
    ],
)
def test_what_cannot_be_continued(template: str, final: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        _continue(template, [USER, {"role": "assistant", **final}])


def test_the_callers_messages_stay_as_they_are() -> None:
    chat = _chat("one")
    _continue(CHATML_TEMPLATE, chat)
    assert chat == _chat("one")


SHOW = "{% for m in messages %}{{ m.content is defined }} {{ m.content }}|{% endfor %}"


def test_parts_of_text_are_joined_by_line_breaks() -> None:
    """As vLLM and llama.cpp join them for a template that takes text."""
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert render_chat(SHOW, _chat(parts)) == "True Count.|True one\ntwo|"
    assert render_chat(SHOW, _chat([])) == "True Count.|True |"
    assert _continue(CHATML_TEMPLATE, _chat(parts)) == ASKED + "one\ntwo"


CALLS = (
    "{% for m in messages %}{% for c in m.tool_calls or [] %}"
    "{{ (c.function or c).arguments | tojson }}{{ c.id }};{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ({"city": "Oslo"}, '{"city": "Oslo"}'),
        ('{"city": "Oslo"}', '{"city": "Oslo"}'),
        (' {"a": [1, {"b": "\\u00f8"}]}\n', '{"a": [1, {"b": "ø"}]}'),
        ("{}", "{}"),
        ("", "{}"),
        (None, "{}"),
    ],
)
def test_arguments_as_json_text_are_objects(arguments: object, shown: str) -> None:
    function = {"name": "time", "arguments": arguments}
    for call in ({"id": 1, "type": "function", "function": function}, {"id": 1, **function}):
        for content in ({}, {"content": None}, {"content": "x"}):
            chat = [USER, {"role": "assistant", "tool_calls": [call], **content}]
            assert render_chat(CALLS, chat) == f"{shown}1;"


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"content": [{"type": "image_url", "image_url": {}}]}, "a part of type 'image_url', but"),
        ({"content": [{"type": "text", "text": None}]}, "a part whose text is null"),
        ({"content": [{"text": "x"}]}, "has the content"),
        ({"content": {"type": "text", "text": "x"}}, "has the content"),
        ({"content": "x", "tool_calls": {"name": "f"}}, 'has tool_calls {"name": "f"}; give a'),
        ({"tool_calls": []}, "has no content"),
        ({"tool_calls": [{"function": "f"}]}, 'tool call 0: function is "f", not an object'),
        ({"tool_calls": [{"function": {"arguments": "{}"}}]}, "tool call 0 has no name"),
        ({"tool_calls": [{"name": "f", "arguments": "{'a': 1}"}]}, "it is not JSON .Expecting"),
        ({"tool_calls": [{"name": "f", "arguments": '{"a": NaN}'}]}, "NaN is no number of JSON"),
        ({"tool_calls": [{"name": "f", "arguments": '{"a": 1, "a": 2}'}]}, "'a' appears twice"),
        ({"tool_calls": [{"name": "f", "arguments": '"Oslo"'}]}, "give an object, or one as JSON"),
        ({"tool_calls": [{"name": "f", "arguments": [1]}]}, "give an object, or one as JSON"),
        ({"role": "user", "content": "x", "tool_calls": [{"name": "f"}]}, "only an assistant"),
        ({"content": "x", "nmae": "y"}, "the field 'nmae', .*; did you mean 'name'"),
        ({"content": "x", "date": "y"}, "the field 'date', which nobody reads; it may have role, "),
        ({"content": "x", "refusal": "I won't."}, "the field 'refusal', .*; put what was said"),
        ({"content": "x", "audio": {"id": "a"}}, "the field 'audio', .*; Qwen2.5 reads text alone"),
        (
            {"content": "x", "function_call": {"name": "f"}},
            "the field 'function_call', .*tool_call",
        ),
        ({"content": [{"type": "text", "text": "a", "txt": 1}]}, "a part .* 'txt', .*mean 'text'"),
        ({"tool_calls": [{"name": "f", "argumnts": {}}]}, "'argumnts', .*did you mean 'arguments'"),
        ({"tool_calls": [{"fn": 1, "function": {"name": "f"}}]}, "tool call 0 has the field 'fn'"),
        ({"tool_calls": [{"function": {"name": "f", "id": 1}}]}, "tool call 0 has the field 'id'"),
    ],
)
def test_refused(message: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=rf"^message 1 \(\w+\).*{words}"):
        render_chat(CALLS, [USER, {"role": "assistant", **message}])


def test_an_answer_can_be_given_back_whole() -> None:
    """What clients send along says nothing, nor do fields that are null."""
    nothing = dict.fromkeys(["refusal", "audio", "function_call", "x"])
    call = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": ""}}
    whole = {"content": "x", "annotations": [], "reasoning_content": "hm", "tool_calls": [call]}
    chat = [USER | {"name": "Ann"}, {"role": "assistant", **whole, **nothing}]
    assert render_chat(CALLS, chat) == "{}c;"


def test_a_template_may_read_other_fields() -> None:
    """Of its own, as messages of a model that was trained further have them."""
    for read in (".mood", "['mood']", ".get('mood')"):
        template = "{% for m in messages %}{{ m" + read + " }}{% endfor %}"
        assert render_chat(template, [USER | {"mood": "calm"}]) == "calm"
        with pytest.raises(UserError, match="the field 'mode', which nobody reads"):
            render_chat(template, [USER | {"mode": "calm"}])


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ("weather", 'tools is "weather"'),
        ({"name": "f"}, 'tools is {"name": "f"}'),
        (["f"], 'tool 0 is "f"; give it as'),
        ([{"type": "function"}], "tool 0 is"),
        ([{"type": "function", "function": {"description": "x"}}], "tool 0 is"),
    ],
)
def test_refused_tools(tools: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        render_chat("{{ tools }}", [USER], tools=tools)


@pytest.mark.parametrize(
    ("chat", "tools", "word"),
    [
        ([USER], [{"name": "f"}], "tools"),
        ([USER, {"role": "assistant", "tool_calls": [{"name": "f"}]}], None, "tool_calls"),
        ([USER, {"role": "tool", "content": "x"}], None, "tool"),
    ],
)
def test_tools_are_not_dropped_by_a_template_that_knows_none(
    chat: list[dict[str, Any]], tools: list[dict[str, Any]] | None, word: str
) -> None:
    with pytest.raises(UserError, match=f"its chat template never mentions {word}, so"):
        render_chat("{{ messages[0].content }}", chat, tools=tools)


@pytest.fixture(scope="module")
def qwen_template() -> str:
    return fixture_path("qwen2.5-instruct-chat-template.jinja").read_text("utf-8")


TOOLS = [{"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}}]


def _tool_chat(arguments: object, content: object) -> list[dict[str, Any]]:
    function = {"name": "time", "arguments": arguments}
    calls = [{"id": "1", "type": "function", "function": function}, function]
    return [
        {"role": "user", "content": content},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": content},
        {"role": "assistant", "content": "", "tool_calls": None},
    ]


def test_openais_form_in_qwens_template(qwen_template: str) -> None:
    text = [{"type": "text", "text": "a"}, {"type": "text", "text": "b <|im_end|>"}]
    chat = _tool_chat('{"city": "Köln <3", "at": null}', text)
    rendered = render_chat(qwen_template, chat, tools=TOOLS, continue_final_message=True)
    call = '\n<tool_call>\n{"name": "time", "arguments": {"city": "Köln <3", "at": null}}\n'
    head, _, rest = rendered.partition("<|im_end|>\n<|im_start|>user\n")
    assert head.startswith(SYSTEM) and '\n{"type": "function", "function": {"name": "time"' in head
    assert rest == (
        "a\nb <|im_end|><|im_end|>\n"
        f"<|im_start|>assistant{call}</tool_call>{call}</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\na\nb <|im_end|>\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.live
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("last", [False, True])
def test_openais_form_equals_transformers_plain_one(
    qwen_template: str, tools: list[dict[str, Any]] | None, last: bool
) -> None:
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    oracle = transformers.Qwen2Tokenizer(vocab={"a": 0, "<|endoftext|>": 1}, merges=[])
    arguments = {"city": "Köln <3", "deep": [1, {"a": None, "b": 1e-7}], "ok": True}
    expected = oracle.apply_chat_template(
        _tool_chat(arguments, "a\n\nb"),
        tools=tools,
        chat_template=qwen_template,
        add_generation_prompt=not last,
        continue_final_message=last,
        tokenize=False,
    )
    parts = [{"type": "text", "text": "a\n"}, {"type": "text", "text": "b"}]
    chat = _tool_chat(json.dumps(arguments), parts)
    assert render_chat(qwen_template, chat, tools=tools, continue_final_message=last) == expected


leaves = st.none() | st.booleans() | st.integers(-1, 1) | st.floats() | st.text(max_size=3)
leaves |= st.sampled_from(["user", "assistant", "tool", "text", "{}", "[1]", '{"a": 1}'])
names = st.sampled_from(
    ["role", "content", "tool_calls", "function", "name", "arguments", "type", "text", "x"]
)
values = st.recursive(
    leaves, lambda v: st.lists(v, max_size=3) | st.dictionaries(names, v), max_leaves=10
)


@given(
    st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant", "tool"])},
            optional={"content": values, "tool_calls": values},
        ),
        max_size=2,
    )
    | values
)
@settings(deadline=None, max_examples=200)
def test_any_json_is_messages_or_refused_in_a_line(value: Any) -> None:
    try:
        plain = plain_messages(value)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert all(type(m.get("content", "")) is str for m in plain)
        assert plain_messages(plain) == plain
