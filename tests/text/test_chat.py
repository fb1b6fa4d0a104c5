"""Chats become the very text that transformers would make of them."""

from typing import Any

import pytest

from qwen_jax.errors import UserError
from qwen_jax.text.chat import CHATML_TEMPLATE, DEFAULT_SYSTEM, render_chat
from tests.text.conftest import fixture_path

SYSTEM = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
USER = {"role": "user", "content": "Is 1 < 2 & é?"}
CHAT = [
    {"role": "system", "content": "Be brief."},
    USER,
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "  spaces kept \n"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "It's <hot> & größer",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln <3"}}}
TOOL_CHAT = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "12 °C"},
    {"role": "tool", "content": "rain"},
    {"role": "assistant", "content": "Cold.", "tool_calls": [CALL, CALL]},
]


@pytest.fixture(scope="module")
def qwen_template() -> str:
    return fixture_path("qwen2.5-instruct-chat-template.jinja").read_text(encoding="utf-8")


def test_default_system_prompt(qwen_template: str) -> None:
    expected = (
        SYSTEM + "<|im_end|>\n<|im_start|>user\nIs 1 < 2 & é?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render_chat(qwen_template, [USER]) == expected
    assert render_chat(None, [USER]) == expected
    assert SYSTEM.endswith(DEFAULT_SYSTEM)


def test_own_system_prompt(qwen_template: str) -> None:
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nIs 1 < 2 & é?<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n"
        "<|im_start|>user\n  spaces kept \n<|im_end|>\n"
    )
    for template in (qwen_template, None):
        assert render_chat(template, CHAT, add_generation_prompt=False) == expected
        assert render_chat(template, CHAT) == expected + "<|im_start|>assistant\n"


def test_tools(qwen_template: str) -> None:
    text = render_chat(qwen_template, TOOL_CHAT, tools=TOOLS)
    assert text.startswith(SYSTEM + "\n\n# Tools\n\nYou may call one or more functions")
    assert "It's <hot> & größer" in text  # neither HTML nor \u00f6
    assert text.endswith(
        '<|im_start|>assistant\n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln <3"}}'
        "\n</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n12 °C\n</tool_response>"
        "\n<tool_response>\nrain\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nCold."
        '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln <3"}}\n</tool_call>'
        '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln <3"}}\n</tool_call>'
        "<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("chat", [[USER], CHAT, TOOL_CHAT], ids=["short", "long", "tools"])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "tools"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_equals_transformers(
    chat: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    add_generation_prompt: bool,
    qwen_template: str,
) -> None:
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    oracle = transformers.Qwen2Tokenizer(vocab={"a": 0, "<|endoftext|>": 1}, merges=[])
    expected = oracle.apply_chat_template(
        chat,
        tools=tools,
        chat_template=qwen_template,
        add_generation_prompt=add_generation_prompt,
        tokenize=False,
    )
    ours = render_chat(
        qwen_template, chat, tools=tools, add_generation_prompt=add_generation_prompt
    )
    assert ours == expected


def test_what_templates_may_use() -> None:
    template = (
        "{% for m in messages %}\n"
        "    {% if loop.index0 == 1 %}\n"
        "        {% continue %}\n"
        "    {% endif %}\n"
        "    {% if loop.index0 == 3 %}{% break %}{% endif %}\n"
        "    {{- m.content | trim }}|\n"
        "{% endfor %}\n"
        "{{ bos_token }}{{ unknown }}{{ strftime_now('%%') }}"
        "{% generation %}{{ tools | tojson(indent=1) }}{% endgeneration %}"
    )
    text = render_chat(template, CHAT, special_tokens={"bos_token": "<s>"})
    assert text == "Be brief.|\nYes.|\n<s>%null"


def test_surrogates_and_controls_survive_the_pipe() -> None:
    content = "\x00\n\r\u2028\udcff \U0001f680"
    assert render_chat("{{ messages[0].content }}", [USER | {"content": content}]) == content


@pytest.mark.parametrize(
    "template, message",
    [
        ("a\n{% if %}", "has a syntax error in line 2: Expected an expression"),
        ("{% bogus %}", "has a syntax error in line 1: Encountered unknown tag 'bogus'"),
        ("{{ x.y }}", "failed with UndefinedError: 'x' is undefined"),
        ("{{ messages[5].role }}", "failed with UndefinedError"),
        ("{{ raise_exception('Roles\nmust alternate.') }}", "refuses the conversation: Roles must"),
        ("{{ 1 / 0 }}", "failed with ZeroDivisionError"),
        ("{{ 'a' + 1 }}", "failed with TypeError"),
        ("{{ messages | sort(attribute='content.x') | first + 1 }}", "failed with"),
        ("{% include 'other' %}", "failed with"),
        ("{{ [].append(1) }}", "failed with SecurityError"),
    ],
)
def test_faulty_templates(template: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        render_chat(template, [USER], source="x.gguf")
    text = str(caught.value)
    assert text.startswith(f"x.gguf: its chat template {message}")
    assert "\n" not in text and text.endswith(".")


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "the conversation has no messages"),
        (["hi"], 'message 0 is "hi"; give an object'),
        ([USER, {"content": "x"}], "message 1 has no role; give one of system, user"),
        ([{"role": "developer", "content": "x"}], 'message 0 has the role "developer"'),
        ([{"role": ["user"], "content": "x"}], "message 0 has the role"),
        ([{"role": "user"}], r"message 0 \(user\) has no content; give text"),
        ([{"role": "user", "content": ["x"]}], r'has the content \["x"\]'),
        ([{"role": "assistant", "content": None}], r"\(assistant\) has no content"),
        ([{"role": "assistant", "content": "", "tool_calls": "x"}], 'has tool_calls "x"'),
        ([{"role": "assistant", "content": "", "tool_calls": [1]}], r"has tool_calls \[1\]"),
        ([USER | {"name": object()}], "are not JSON"),
    ],
)
def test_malformed_messages(messages: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        render_chat(CHATML_TEMPLATE, messages)


def test_without_a_template_there_are_no_tools() -> None:
    for chat, tools in ((TOOL_CHAT, None), ([USER], TOOLS)):
        with pytest.raises(UserError, match="has no chat template, so there is no known way"):
            render_chat(None, chat, tools=tools)
