"""A conversation -> the text that a chat model was trained to continue."""

import atexit
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_jax.errors import UserError
from qwen_jax.text.messages import plain_messages, plain_tools
from qwen_jax.text.template_renderer import TemplateRenderer

DEFAULT_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
# For checkpoints without a template of their own: what Qwen2.5's does with plain messages.
CHATML_TEMPLATE = (
    "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\n" + DEFAULT_SYSTEM + "<|im_end|>\n' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Marks the end of a message that is to be continued; transformers has the same. A template that
# trims its messages takes the space away, which shows that it does.
_OPEN_END = "CONTINUE_FINAL_MESSAGE_TAG "


def render_chat(
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    special_tokens: Mapping[str, str] | None = None,
    source: str = "the model",
) -> str:
    """The prompt for a conversation, as transformers' `apply_chat_template` renders it.

    Args:
        template: Jinja source. None: ChatML with DEFAULT_SYSTEM; the caller tells the user.
        messages: each a `role` (one of messages.ROLES) and `content` (text, or a list of OpenAI's
            text parts); an assistant's may have `tool_calls` instead of content.
        add_generation_prompt: end with the opening of the assistant's turn.
        continue_final_message: end where the final message's text does, so that the model goes
            on with it; no turn is opened then.
        tools: JSON schemas of functions that the model may call.
        special_tokens: `Tokenizer.special_tokens`, which some templates write out.
        source: the file's name, for messages.

    Raises:
        UserError: the messages are malformed, or the template is faulty, refuses them, knows no
            tools, takes too long or writes too much.
    """
    chat, tools = plain_messages(messages, template), plain_tools(tools)
    _check_knows_tools(template, chat, tools, source)
    final: str = chat[-1].get("content", "")
    if continue_final_message:
        if "content" not in chat[-1] or chat[-1].get("tool_calls"):
            raise UserError(
                "the final message can't be continued: it must have content, and no tool_calls, "
                "which would stand after it."
            )
        chat[-1]["content"] = final + _OPEN_END
    context = {
        **(special_tokens or {}),
        "messages": chat,
        "tools": tools,
        "add_generation_prompt": add_generation_prompt and not continue_final_message,
    }
    text = _renderer().render(CHATML_TEMPLATE if template is None else template, context, source)
    return _open_end(text, final, source) if continue_final_message else text


def _open_end(text: str, final: str, source: str) -> str:
    """The text up to the end of its final message, which `_OPEN_END` marks."""
    end = text.rfind(_OPEN_END.strip())
    if end < 0 or final.strip() not in text:
        raise UserError(
            f"{source}: its chat template leaves out or changes the final message, so it can't be "
            "continued; leave out continue_final_message."
        )
    # As transformers: where the message was trimmed, so is its end.
    return text[:end] if text.startswith(_OPEN_END, end) else text[:end].rstrip()


def _check_knows_tools(
    template: str | None,
    chat: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    source: str,
) -> None:
    """Raises UserError where the template would drop tools, calls or results without a word."""
    used = {
        "tools": bool(tools),
        "tool_calls": any(message.get("tool_calls") for message in chat),
        "tool": any(message["role"] == "tool" for message in chat),
    }
    unknown = [word for word, is_used in used.items() if is_used and word not in (template or "")]
    if unknown:
        without = (
            "it has no chat template"
            if template is None
            else f"its chat template never mentions {', '.join(unknown)}"
        )
        raise UserError(
            f"{source}: {without}, so there is no known way to show it tools; leave them out or "
            "use a file that has one.",
            field="tools" if "tools" in unknown else None,
        )


@functools.cache
def _renderer() -> TemplateRenderer:
    renderer = TemplateRenderer()
    atexit.register(renderer.close)
    return renderer
