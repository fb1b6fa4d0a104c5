"""Calls of tools in what Qwen2.5 writes, taken out of the text as it comes.

A call is `<tool_call>`, an object of JSON with `name` and `arguments`, and `</tool_call>`; white
space around one is no text. What looks like a call and is none stays text.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qwen_jax import strict_json
from qwen_jax.errors import UserError
from qwen_jax.text.constraint import Constraint
from qwen_jax.text.json_schema import LAYOUT
from qwen_jax.text.messages import plain_tools

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class Call(NamedTuple):
    """A function's name, and its arguments as an object of JSON."""

    id: str
    name: str
    arguments: str

    def as_json(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


def forced(tools: Sequence[Mapping[str, Any]], name: str | None, several: bool) -> Constraint:
    """Answers that are calls of these tools, with arguments that fit their schemas.

    Args:
        tools: as `messages.plain_tools` takes them.
        name: of the one to call; None for any of them.
        several: more than one call may come.

    Raises:
        UserError: there is none of that name, or its schema can't be held to.
    """
    functions = [tool.get("function", tool) for tool in plain_tools(tools) or ()]
    called = [function for function in functions if name in (None, function["name"])]
    if not called:
        known = ", ".join(repr(function["name"]) for function in functions)
        raise UserError(f"tool_choice names {name!r:.60}, but the tools are {known}.")
    rules = ['start: call ("\\n" call)*' if several else "start: call"]
    rules.append("call: " + " | ".join(f"call{i}" for i in range(len(called))))
    for i, function in enumerate(called):
        schema = function.get("parameters") or {"type": "object"}
        held = json.dumps({**json.loads(Constraint.json_schema(schema).text), "x-guidance": LAYOUT})
        head = json.dumps(f'{OPEN}\n{{"name": {json.dumps(function["name"])}, "arguments": ')
        tail = json.dumps(f"}}\n{CLOSE}")
        rules += [f"call{i}: {head} arguments{i} {tail}", f"arguments{i}: %json {held}"]
    return Constraint.lark("\n".join(rules))


class ToolCalls:
    """Tells text from calls, wherever the pieces are cut.

    Args:
        most: calls to take; what comes after them is dropped. None takes all.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self._held = ""
        self._inside = self._after = False
        self._gap = ""  # the white space before what may prove to be no call
        self.calls: list[Call] = []

    def feed(self, piece: str) -> tuple[str, list[Call]]:
        """Text that is safe to show, and the calls that are complete now."""
        self._held += piece
        text, before = "", len(self.calls)
        while True:
            if self._after:
                self._held = self._held.lstrip()
                self._after = not self._held
            head, tag, rest = self._held.partition(CLOSE if self._inside else OPEN)
            if not tag:
                break
            if self._inside:
                text += self._take(head, CLOSE)
            else:
                shown = head.rstrip()
                text += self._shown(shown)
                self._gap = head[len(shown) :]
            self._held = rest
            self._inside = not self._inside
        if not self._inside:
            safe = len(self._held) - self._possible_start()
            text, self._held = text + self._shown(self._held[:safe]), self._held[safe:]
        return text, self.calls[before:]

    def finish(self) -> tuple[str, list[Call]]:
        """What was held back, now that no more comes: the model may end inside of a call."""
        before, held, self._held = len(self.calls), self._held, ""
        text = self._take(held, "") if self._inside else self._shown(held)
        return text, self.calls[before:]

    def _take(self, content: str, close: str) -> str:
        """Notes a call; returns its text where it is none."""
        if self._full:
            return ""
        try:
            found = strict_json.parse_object(content, "a call")
        except UserError:
            found = {}
        name, arguments = found.get("name"), found.get("arguments", {})
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return f"{self._gap}{OPEN}{content}{close}"
        written = json.dumps(arguments, ensure_ascii=False)
        self.calls.append(Call(f"call_{secrets.token_hex(12)}", name, written))
        self._after = True
        return ""

    @property
    def _full(self) -> bool:
        return self._most is not None and len(self.calls) >= self._most

    def _shown(self, text: str) -> str:
        return "" if self._full else text

    def _possible_start(self) -> int:
        """Length of the longest end that may begin a call, with the white space before it."""
        longest = min(len(self._held), len(OPEN) - 1)
        tag = next((n for n in range(longest, 0, -1) if OPEN.startswith(self._held[-n:])), 0)
        rest = self._held[: len(self._held) - tag]
        return tag + len(rest) - len(rest.rstrip())
