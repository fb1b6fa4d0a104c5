"""Chat messages and tools as people and APIs write them -> as chat templates read them."""

from collections.abc import Mapping, Sequence
from typing import Any

from qwen_jax import strict_json
from qwen_jax.errors import UserError

# Qwen2.5's template drops a message with any other role without a word.
ROLES = ("system", "user", "assistant", "tool")


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages, checked, with text as content and objects as arguments of tool calls.

    OpenAI's form is taken too: content in parts, which are joined by line breaks as vLLM and
    llama.cpp do, and arguments as JSON text, which a template would escape a second time. Fields
    that are None are left out, as transformers does.

    Raises:
        UserError: a message is not what it should be.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise UserError(f"messages is {messages!r:.80}, but it must be a list of messages.")
    if not messages:
        raise UserError("the conversation has no messages; give at least one from the user.")
    return [_plain_message(message, index) for index, message in enumerate(messages)]


def plain_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[Mapping[str, Any]] | None:
    """The tools, checked. Raises UserError where one is no schema of a function with a name."""
    if tools is None:
        return None
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise UserError(f"tools is {tools!r:.80}, but it must be a list of JSON schemas.")
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UserError(
                f"tool {index} is {tool!r:.80}; give it as "
                '{"type": "function", "function": {"name": …, "parameters": …}}.'
            )
    return list(tools)


def _plain_message(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UserError(
            f"message {index} is {message!r:.80}; give a dict with 'role' and 'content'."
        )
    role = message.get("role")
    if role not in ROLES:
        raise UserError(
            f"message {index} has the role {role!r:.80}; give one of {', '.join(ROLES)}."
        )
    where = f"message {index} ({role})"
    plain = {name: value for name, value in message.items() if value is not None}
    if "tool_calls" in plain:
        plain["tool_calls"] = _plain_calls(plain["tool_calls"], role, where)
    if "content" in plain:
        plain["content"] = _plain_content(plain["content"], where)
    elif not plain.get("tool_calls"):
        raise UserError(f"{where} has the content None; give text.")
    return plain


def _plain_content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) else [None]
    texts = []
    for part in parts:
        if not isinstance(part, Mapping) or not isinstance(kind := part.get("type"), str):
            raise UserError(f"{where} has the content {content!r:.80}; give text.")
        if kind != "text":
            raise UserError(
                f"{where} has a part of type {kind!r:.40}, but Qwen2.5 reads text alone; give "
                "parts of type 'text'."
            )
        if not isinstance(part.get("text"), str):
            raise UserError(f"{where} has a part whose text is {part.get('text')!r:.80}.")
        texts.append(part["text"])
    return "\n".join(texts)


def _plain_calls(calls: Any, role: str, where: str) -> list[dict[str, Any]]:
    if (
        isinstance(calls, str)
        or not isinstance(calls, Sequence)
        or not all(isinstance(call, Mapping) for call in calls)
    ):
        raise UserError(f"{where} has tool_calls {calls!r:.80}; give a list of dicts, one a call.")
    if calls and role != "assistant":
        raise UserError(f"{where} has tool_calls, but only an assistant calls tools.")
    return [_plain_call(call, f"{where}, tool call {index}") for index, call in enumerate(calls)]


def _plain_call(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Both forms, {"function": {"name": …, "arguments": …}} and what stands in it alone."""
    if "function" in call:
        if not isinstance(call["function"], Mapping):
            raise UserError(f"{where}: function is {call['function']!r:.80}, not an object.")
        return {**call, "function": _plain_call(call["function"], where)}
    if not isinstance(call.get("name"), str):
        raise UserError(f"{where} has the name {call.get('name')!r:.80}; name the function.")
    return {**call, "arguments": _plain_arguments(call.get("arguments"), where)}


def _plain_arguments(arguments: Any, where: str) -> Mapping[str, Any]:
    """An object as it is, JSON text as the object that it holds, and nothing as no arguments."""
    found = {} if arguments in (None, "") else arguments
    if isinstance(found, str):
        found = strict_json.parse(found, f"{where}, arguments {arguments!r:.80}")
    if not isinstance(found, Mapping):
        raise UserError(f"{where} has arguments {arguments!r:.80}; give an object, or one as JSON.")
    return found
