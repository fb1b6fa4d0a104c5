"""Chat messages and tools as people and APIs write them -> as chat templates read them."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from qwen_jax import hints, strict_json
from qwen_jax.errors import UserError
from qwen_jax.strict_json import written

# Qwen2.5's template drops a message with any other role without a word.
ROLES = ("system", "user", "assistant", "tool")

READ = ("role", "content", "tool_calls")
UNREAD = ("name", "tool_call_id", "annotations", "reasoning_content", "reasoning", "parsed")
"""Fields that clients send along, as of an answer that they give back whole, and that Qwen2.5's
template does not show to the model."""
REFUSED = {
    "refusal": "put what was said into content",
    "audio": "Qwen2.5 reads text alone",
    "function_call": "give tool_calls, which replaced it",
}
"""Fields of OpenAI's messages that would say something, and what to do."""
_OF_PART = ("type", "text")
_OF_CALL = ("id", "type", "index", "function")
_OF_FUNCTION = ("name", "arguments", "parsed_arguments")


def plain_messages(
    messages: Sequence[Mapping[str, Any]], template: str | None = None
) -> list[dict[str, Any]]:
    """The messages, checked, with text as content and objects as arguments of tool calls.

    OpenAI's form is taken too: content in parts, which are joined by line breaks as vLLM and
    llama.cpp do, and arguments as JSON text, which a template would escape a second time. Fields
    that are None are left out, as transformers does.

    Args:
        template: may read fields that no other does.

    Raises:
        UserError: a message is not what it should be, or has a field that nobody reads.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise UserError(f"messages is {written(messages)}, but it must be a list of messages.")
    if not messages:
        raise UserError("the conversation has no messages; give at least one from the user.")
    return [_plain_message(message, index, template) for index, message in enumerate(messages)]


def plain_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[Mapping[str, Any]] | None:
    """The tools, checked. Raises UserError where one is no schema of a function with a name."""
    if tools is None:
        return None
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        text = f"tools is {written(tools)}, but it must be a list of JSON schemas."
        raise UserError(text, field="tools")
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UserError(
                f"tool {index} is {written(tool)}; give it as "
                '{"type": "function", "function": {"name": …, "parameters": …}}.',
                field="tools",
            )
    return list(tools)


def _plain_message(message: Mapping[str, Any], index: int, template: str | None) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        text = f"message {index} is {written(message)}; give an object with role and content."
        raise UserError(text)
    role = message.get("role")
    if role not in ROLES:
        has = "no role" if role is None else f"the role {written(role)}"
        raise UserError(f"message {index} has {has}; give one of {', '.join(ROLES)}.")
    where = f"message {index} ({role})"
    plain = {name: value for name, value in message.items() if value is not None}
    _check_read(plain, (*READ, *UNREAD), where, template)
    if "tool_calls" in plain:
        plain["tool_calls"] = _plain_calls(plain["tool_calls"], role, where)
    if "content" in plain:
        plain["content"] = _plain_content(plain["content"], where)
    elif not plain.get("tool_calls"):
        raise UserError(f"{where} has no content; give text.")
    return plain


def _check_read(
    given: Mapping[str, Any], known: Collection[str], where: str, template: str | None = None
) -> None:
    """Raises UserError where nobody reads a field: it was meant to do something."""
    for name, value in given.items():
        # A template has it as `message.name`, `message["name"]` or `message.get("name")`.
        read = rf"[.\"']{re.escape(str(name))}\b"
        if value is None or name in known or re.search(read, template or ""):
            continue
        if way := REFUSED.get(name):
            raise UserError(f"{where} has the field {name!r}, which is not read; {way}.")
        meant = hints.meant(str(name), known)
        way = f"did you mean {meant!r}?" if meant else f"it may have {', '.join(known)}."
        raise UserError(f"{where} has the field {name!r:.60}, which nobody reads; {way}")


def _plain_content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) else [None]
    texts = []
    for part in parts:
        if not isinstance(part, Mapping) or not isinstance(kind := part.get("type"), str):
            raise UserError(f"{where} has the content {written(content)}; give text.")
        if kind != "text":
            raise UserError(
                f"{where} has a part of type {kind!r:.40}, but Qwen2.5 reads text alone; give "
                "parts of type 'text'."
            )
        if not isinstance(part.get("text"), str):
            text = f"{where} has a part whose text is {written(part.get('text'))}; give text."
            raise UserError(text)
        _check_read(part, _OF_PART, f"{where}, a part of type 'text',")
        texts.append(part["text"])
    return "\n".join(texts)


def _plain_calls(calls: Any, role: str, where: str) -> list[dict[str, Any]]:
    if (
        isinstance(calls, str)
        or not isinstance(calls, Sequence)
        or not all(isinstance(call, Mapping) for call in calls)
    ):
        text = f"{where} has tool_calls {written(calls)}; give a list of objects, one a call."
        raise UserError(text)
    if calls and role != "assistant":
        raise UserError(f"{where} has tool_calls, but only an assistant calls tools.")
    return [_plain_call(call, f"{where}, tool call {index}") for index, call in enumerate(calls)]


def _plain_call(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Both forms, {"function": {"name": …, "arguments": …}} and what stands in it alone."""
    if "function" not in call:
        return _plain_function(call, where, (*_OF_FUNCTION, *_OF_CALL))
    function = call["function"]
    if not isinstance(function, Mapping):
        raise UserError(f"{where}: function is {written(function)}, not an object.")
    _check_read(call, _OF_CALL, where)
    return {**call, "function": _plain_function(function, where, _OF_FUNCTION)}


def _plain_function(
    function: Mapping[str, Any], where: str, known: Collection[str]
) -> dict[str, Any]:
    name = function.get("name")
    if not isinstance(name, str):
        has = "no name" if name is None else f"the name {written(name)}"
        raise UserError(f"{where} has {has}; name the function.")
    _check_read(function, known, where)
    return {**function, "arguments": _plain_arguments(function.get("arguments"), where)}


def _plain_arguments(arguments: Any, where: str) -> Mapping[str, Any]:
    """An object as it is, JSON text as the object that it holds, and nothing as no arguments."""
    found = {} if arguments in (None, "") else arguments
    if isinstance(found, str):
        found = strict_json.parse(found, f"{where}, arguments {arguments!r:.80}")
    if not isinstance(found, Mapping):
        text = f"{where} has arguments {written(arguments)}; give an object, or one as JSON."
        raise UserError(text)
    return found
