"""What reaches a terminal: text from files and models, but no commands to it."""

import re

_COMMANDS = re.compile(
    # C0 and C1 control characters but for tab and line feed; what turns the direction of writing,
    # so that a line reads otherwise than it is; and what ends a line for some programs alone.
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]"
)

LONGEST = 4000
"""Characters of one message. A path has 4,096 bytes at most; a value from a file any number."""


def visible(text: str) -> str:
    r"""The text with control characters spelt out, as in \x1b or \u202e."""
    return _COMMANDS.sub(lambda found: _spelt(found[0]), text)


def one_line(text: str) -> str:
    r"""The same, and line feeds too: what is told on one line stays one, whatever it quotes."""
    return visible(text).replace("\n", r"\x0a")


def json_visible(text: str) -> str:
    r"""The same of JSON, in which all of them can be written as \u001b."""
    return _COMMANDS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def message(text: str) -> str:
    """A message on one line, without the middle if it is long: both ends say what to do."""
    if len(text) > LONGEST:
        half = LONGEST // 2
        text = f"{text[:half]} … {text[-half:]}"
    return one_line(text)


def _spelt(character: str) -> str:
    return f"\\x{ord(character):02x}" if ord(character) < 256 else f"\\u{ord(character):04x}"
