"""A conversation -> the text that a chat model was trained to continue."""

import atexit
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_jax.errors import UserError
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
# Qwen2.5's template drops a message with any other role without a word.
ROLES = ("system", "user", "assistant", "tool")


def render_chat(
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    special_tokens: Mapping[str, str] | None = None,
    source: str = "the model",
) -> str:
    """The prompt for a conversation, as transformers' `apply_chat_template` renders it.

    Args:
        template: Jinja source. None: ChatML with DEFAULT_SYSTEM; the caller tells the user.
        messages: each a `role` (one of ROLES) and `content` (text); an assistant's may have
            `tool_calls` instead of content.
        add_generation_prompt: end with the opening of the assistant's turn.
        tools: JSON schemas of functions that the model may call.
        special_tokens: `Tokenizer.special_tokens`, which some templates write out.
        source: the file's name, for messages.

    Raises:
        UserError: the messages are malformed, or the template is faulty, refuses them, takes
            too long or writes too much.
    """
    messages = [_checked(message, index) for index, message in enumerate(messages)]
    if not messages:
        raise UserError("the conversation has no messages; give at least one from the user.")
    if template is None:
        if tools or any(m["role"] == "tool" or m.get("tool_calls") for m in messages):
            raise UserError(
                f"{source}: it has no chat template, so there is no known way to show it tools; "
                "leave them out or use a file that has one."
            )
        template = CHATML_TEMPLATE
    context = {
        **(special_tokens or {}),
        "messages": messages,
        "tools": None if tools is None else list(tools),
        "add_generation_prompt": add_generation_prompt,
    }
    return _renderer().render(template, context, source)


@functools.cache
def _renderer() -> TemplateRenderer:
    renderer = TemplateRenderer()
    atexit.register(renderer.close)
    return renderer


def _checked(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UserError(
            f"message {index} is {message!r:.80}; give a dict with 'role' and 'content'."
        )
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise UserError(
            f"message {index} has the role {role!r:.80}; give one of {', '.join(ROLES)}."
        )
    calls = message.get("tool_calls")
    if calls is not None and not (
        isinstance(calls, Sequence) and all(isinstance(call, Mapping) for call in calls)
    ):
        raise UserError(
            f"message {index} has tool_calls {calls!r:.80}; give a list of dicts, one per call."
        )
    if not isinstance(content, str) and not (content is None and role == "assistant" and calls):
        raise UserError(f"message {index} ({role}) has the content {content!r:.80}; give text.")
    return dict(message)
