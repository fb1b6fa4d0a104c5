"""A chat of several turns: what was said, how answers are made, and what its commands do."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from qwen_jax import choices, hints, regular_files, strict_json
from qwen_jax.api import Model
from qwen_jax.completions import StreamedText
from qwen_jax.engine.sampling import Sampling
from qwen_jax.errors import UserError
from qwen_jax.in_force import describe
from qwen_jax.options import Options
from qwen_jax.text.messages import plain_messages

HELP = """\
/system TEXT      begin with this system prompt; without a text, without one
/set NAME VALUE   change a setting, as in /set temperature 0.7; without a name, show them
/retry            answer the last message once more
/tokens           how much of the context is taken
/save FILE        write the chat to a file
/load FILE        go on with a chat of a file
/clear            begin anew
/help, /quit      this list, and the end; so is Ctrl-D
Ctrl-C ends an answer. Text between lines of three quotes, \"\"\", is one message."""

_NAMES = [field.name for field in dataclasses.fields(Sampling) if field.name != "logit_bias"]


class Conversation:
    """What was said so far.

    Args:
        model: answers.
        options: how.
        system: the system prompt, if any.
    """

    def __init__(self, model: Model, options: Options, system: str | None = None):
        self._model, self._options = model, options
        self.messages: list[dict[str, Any]] = []
        self._set_system(system or "")

    def answer(self, text: str) -> Iterator[StreamedText]:
        """Answers a message as it comes. What is left of it before its end, as by Ctrl-C, stays
        said. Raises UserError, and the message was never there, where it can't be answered."""
        self.messages.append({"role": "user", "content": text})
        return self._answered()

    def _answered(self) -> Iterator[StreamedText]:
        said, options = "", Options(**self._options)
        if options["sampling"].temperature == 0:  # Whose answers have no seed.
            options["sampling"] = dataclasses.replace(options["sampling"], seed=0)
        pieces = self._model.stream(self.messages, **options)
        try:
            for piece in pieces:
                said += piece
                yield piece
        except UserError:
            self.messages.pop()
            raise
        finally:
            cast(Any, pieces).close()
            if said:
                self.messages.append({"role": "assistant", "content": said})

    def retry(self) -> Iterator[StreamedText]:
        """Answers the last message of the user's again, by another seed, which makes a difference
        where there is a temperature. Raises UserError where there is no message."""
        while self.messages and self.messages[-1]["role"] != "user":
            if self.messages[-1]["role"] == "system":
                break
            self.messages.pop()
        if not self.messages or self.messages[-1]["role"] != "user":
            raise UserError("There is no message to answer again; write one.")
        sampling = self._options["sampling"]
        seed = (sampling.seed + 1) % 2**32
        self._options["sampling"] = dataclasses.replace(sampling, seed=seed)
        return self._answered()

    def command(self, line: str) -> str:
        """Does what a line that begins with a slash says, but for /retry and /quit; returns what is
        to be told. Raises UserError where it makes no sense."""
        name, _, rest = line[1:].partition(" ")
        known: dict[str, Callable[[str], str]] = {
            "system": self._set_system,
            "set": self._set,
            "tokens": self._tokens,
            "save": self._save,
            "load": self._load,
            "clear": self._clear,
            "help": lambda rest: HELP,
        }
        if name not in known:
            names = [*known, "retry", "quit"]
            meant = hints.meant(name, names)
            way = f"did you mean /{meant}?" if meant else "see /help."
            raise UserError(f"There is no command {line.split()[0]!r:.60}; {way}")
        return known[name](rest.strip())

    def _set_system(self, text: str) -> str:
        rest = [message for message in self.messages if message["role"] != "system"]
        self.messages = [{"role": "system", "content": text}] * bool(text) + rest
        return "the system prompt is set" if text else "without a system prompt of yours"

    def _set(self, text: str) -> str:
        name, _, value = text.partition(" ")
        if name:
            self._change(name, value.strip())
        most, sampling = self._options["max_tokens"], self._options["sampling"]
        return f"max_tokens {most}, {describe(sampling)}"

    def _change(self, name: str, value: str) -> None:
        if name not in (*_NAMES, "max_tokens"):
            meant = hints.meant(name, [*_NAMES, "max_tokens"])
            way = (
                f"did you mean {meant}?" if meant else f"known are max_tokens, {', '.join(_NAMES)}."
            )
            raise UserError(f"There is no setting {name!r:.60}; {way}")
        try:
            number = json.loads(value)
        except ValueError:
            raise UserError(f"{name} is {value!r:.60}, but it must be a number.") from None
        if name == "max_tokens":
            choices.check_max_tokens(number)
            self._options["max_tokens"] = number
        else:
            sampling = dataclasses.replace(self._options["sampling"], **{name: number})
            self._options["sampling"] = sampling

    def _tokens(self, _: str) -> str:
        context = self._model.config.context_length
        count = len(self._model.tokens(self.messages)) if self.messages else 0
        return f"{count} of {context} tokens"

    def _save(self, name: str) -> str:
        if not name:
            raise UserError("/save needs the name of a file.")
        path = Path(name)
        if why := regular_files.why_taken(path, "chat.json"):
            raise UserError(f"/save {path} {why}")
        content = json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n"
        try:
            path.write_text(content, encoding="utf-8")
        except OSError as error:
            why = regular_files.why_not_written(error)
            raise UserError(f"{path} can't be written: {why}") from error
        return f"wrote {path}"

    def _load(self, name: str) -> str:
        if not name:
            raise UserError("/load needs the name of a file.")
        found = strict_json.read_object(Path(name))
        messages = plain_messages(found.get("messages", []))
        self.messages = messages
        return f"{len(messages)} messages from {name}"

    def _clear(self, _: str) -> str:
        self.messages = [message for message in self.messages if message["role"] == "system"]
        return "the chat begins anew"
