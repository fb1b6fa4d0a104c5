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
from qwen_jax.errors import ContextFullError, UserError
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

WITH_ARGUMENT = ("system", "set", "save", "load")
WITHOUT = ("retry", "tokens", "clear", "help", "quit")
_NAMES = [field.name for field in dataclasses.fields(Sampling) if field.name != "logit_bias"]


def parsed(line: str) -> tuple[str, str]:
    """The name of a command and what stands behind it, of a line that begins with a slash. Raises
    UserError where there is no such command, or it takes nothing."""
    word, *more = line.split(maxsplit=1)
    name, rest = word[1:], more[0].strip() if more else ""
    if name not in (*WITH_ARGUMENT, *WITHOUT):
        meant = hints.meant(name, (*WITH_ARGUMENT, *WITHOUT))
        way = f"did you mean /{meant}?" if meant else "see /help."
        raise UserError(f"There is no command {word!r:.60}; {way}")
    if rest and name in WITHOUT:
        raise UserError(f"/{name} takes no argument, but has {rest!r:.60}; leave it out.")
    return name, rest


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
        return self._answered([*self.messages, {"role": "user", "content": text}])

    def retry(self) -> Iterator[StreamedText]:
        """Answers the last message of the user's again, by another seed, which makes a difference
        where there is a temperature. Raises UserError, and the last answer stays, where that can't
        be done."""
        asked = list(self.messages)
        while asked and asked[-1]["role"] not in ("user", "system"):
            asked.pop()
        if not asked or asked[-1]["role"] != "user":
            raise UserError("There is no message to answer again; write one.")
        return self._answered(asked, 1)

    def _answered(self, asked: list[dict[str, Any]], further: int = 0) -> Iterator[StreamedText]:
        """Answers other messages than are there, which take their place once they are answered.

        Args:
            further: how far the seed goes on with that.
        """
        said, failed, options = "", False, Options(**self._options)
        sampling = options["sampling"]
        sampling = dataclasses.replace(sampling, seed=(sampling.seed + further) % 2**32)
        options["sampling"] = sampling
        if sampling.temperature == 0:  # Whose answers have no seed.
            options["sampling"] = dataclasses.replace(sampling, seed=0)
        pieces = self._model.stream(asked, **options)
        try:
            for piece in pieces:
                said += piece
                yield piece
        except UserError as error:
            failed = True
            if isinstance(error, ContextFullError):
                raise self._full(error, asked) from error
            raise
        finally:
            cast(Any, pieces).close()
            # A new message stays said where its answer is ended before it has begun.
            if not failed and (said or len(asked) > len(self.messages)):
                answer = [{"role": "assistant", "content": said}] * bool(said)
                self.messages, self._options["sampling"] = [*asked, *answer], sampling

    def _full(self, error: ContextFullError, asked: list[dict[str, Any]]) -> UserError:
        roles = [message["role"] for message in asked[:-1]]
        ways = ["shorten the message"]
        if "system" in roles:
            ways.append("give a shorter system prompt with /system")
        if set(roles) - {"system"}:
            ways.append("begin anew with /clear")
            ways.append("go on with another chat with /load")
        return UserError(
            f"With this message the chat has {error.tokens} tokens, but the model has a context of "
            f"{error.context} and the answer needs at least one; {', or '.join(ways)}."
        )

    def command(self, name: str, rest: str) -> str:
        """Does what a command says, but for retry and quit.

        Args:
            name, rest: as `parsed` has them.

        Returns:
            What is to be told.

        Raises:
            UserError: it makes no sense.
        """
        known: dict[str, Callable[[str], str]] = {
            "system": self._set_system,
            "set": self._set,
            "tokens": self._tokens,
            "save": self._save,
            "load": self._load,
            "clear": self._clear,
            "help": lambda _: HELP,
        }
        return known[name](rest)

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
            number = None
        if type(number) not in (int, float):
            raise UserError(f"{name} is {value!r:.60}, but it must be a number.")
        if name == "max_tokens":
            choices.check_max_tokens(number)
            self._options["max_tokens"] = number
            return
        try:
            sampling = dataclasses.replace(self._options["sampling"], **{name: number})
        except UserError as error:  # It has the names of flags and configs.
            raise UserError(str(error).removeprefix("sampling.")) from error
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
        template = self._model.tokenizer.template_for()
        messages = plain_messages(found.get("messages", []), template)
        self.messages = messages
        return f"{len(messages)} messages from {name}"

    def _clear(self, _: str) -> str:
        self.messages = [message for message in self.messages if message["role"] == "system"]
        return "the chat begins anew"
