"""`run.py chat`: a chat of several turns, on a terminal or a pipe."""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator

from qwen_jax import pins, prompts, recommended, settings, startup
from qwen_jax.completions import StreamedText
from qwen_jax.conversation import Conversation, parsed
from qwen_jax.errors import UserError
from qwen_jax.in_force import describe
from qwen_jax.options import Options
from qwen_jax.settings import Command
from qwen_jax.tasks.generate import load
from qwen_jax.terminal import visible

QUOTES = '"""'
"""A line of them begins a message of several lines, and ends it."""


def run(command: Command) -> int:
    """Chats until there is no more to read; returns the exit code."""
    config = command.config
    prompts.options_of(config)  # What is wrong is told before anything is loaded.
    pins.pin_and_tell(config, pins.OF_RUN)
    with startup.timed("load"):
        model = load(config)
    asked = settings.asked(config, command.overrides)
    config = recommended.resolved(config, model.recommended, asked)
    options = prompts.options_of(config)
    if said := recommended.line(model.recommended, config, options["sampling"]):
        _tell(said)
    own = ("max_tokens", "sampling", "stop", "stop_ids")
    kept = Options(**{name: options[name] for name in own})  # type: ignore[literal-required,typeddict-item]
    conversation = Conversation(model, kept, config.system)
    _tell(f"{config.model}, {describe(options['sampling'])}; /help lists what else there is.")
    for text, is_command in _messages():
        try:
            if not is_command:
                _show(conversation.answer(text))
            elif not _obeyed(conversation, text):
                break
        except UserError as error:
            _tell(f"error: {error}")
        except KeyboardInterrupt:
            _tell("")
    return 0


def _obeyed(conversation: Conversation, line: str) -> bool:
    """Does what a command says; False where the chat is to end."""
    name, rest = parsed(line)
    if name == "retry":
        _show(conversation.retry())
    elif name != "quit":
        _tell(conversation.command(name, rest))
    return name != "quit"


def _show(pieces: Iterator[StreamedText]) -> None:
    """Prints an answer as it comes; Ctrl-C ends it, and not the chat."""
    shown: Callable[[str], str] = visible if sys.stdout.isatty() else str
    reason = None
    with contextlib.closing(pieces):  # type: ignore[type-var]
        try:
            for piece in pieces:
                reason = piece.finish_reason
                print(shown(piece), end="", flush=True)
        except KeyboardInterrupt:
            reason = "interrupted"
        if reason is not None:
            print(flush=True)
    if reason not in (None, "stop"):
        _tell(f"({reason})")


def _messages() -> Iterator[tuple[str, bool]]:
    """What is written, message by message, until the end of it; and whether it is a command, which
    nothing between quotes is."""
    read = _reader()
    while (line := _line(read, "> ")) is not None:
        is_command = line.strip().startswith("/")
        if line.strip() == QUOTES:
            lines: list[str] = []
            while (more := _line(read, ". ")) is not None and more.strip() != QUOTES:
                lines.append(more)
            line = "\n".join(lines)
        if line.strip():
            yield line, is_command


def _line(read: Callable[[str], str | None], prompt: str) -> str | None:
    """A line, or None at the end; Ctrl-C drops what was written of one."""
    while True:
        try:
            return read(prompt)
        except KeyboardInterrupt:
            _tell("")
        except EOFError:
            return None


def _reader() -> Callable[[str], str | None]:
    """With prompt_toolkit on a terminal: editing, history, and pasted lines as one message."""
    if sys.stdin.isatty() and sys.stderr.isatty():
        if importlib.util.find_spec("prompt_toolkit") is not None:
            from prompt_toolkit import PromptSession
            from prompt_toolkit.output import create_output

            session: PromptSession[str] = PromptSession(output=create_output(sys.stderr))
            return session.prompt
        return _plain_with_prompt
    return _plain


def _plain(_: str) -> str | None:
    line = sys.stdin.readline()
    return line.removesuffix("\n") if line else None


def _plain_with_prompt(prompt: str) -> str | None:
    print(prompt, end="", file=sys.stderr, flush=True)
    return _plain(prompt)


def _tell(text: str) -> None:
    print(visible(text), file=sys.stderr, flush=True)
