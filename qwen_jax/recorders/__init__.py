"""Scripts that record another engine's tensors for `run.py compare`; `run.py recorder` prints them.

A user copies one file beside an engine, in an environment without qwen_jax. So they import nothing
of ours but parts of this room, and `source` puts their texts in, below what a user may change.
"""

import re
from pathlib import Path

from qwen_jax import ready_made
from qwen_jax.errors import UserError

_HOME = Path(__file__).parent
_PART = re.compile(r"^from qwen_jax\.recorders\.(\w+) import .*\n", re.MULTILINE)
_DEFINITION = re.compile(r"^(?:class|def|@)", re.MULTILINE)


def names() -> list[str]:
    """What `source` takes."""
    return sorted(path.stem.removeprefix("record_") for path in _HOME.glob("record_*.py"))


def source(name: str) -> str:
    """The script, of one file. Raises UserError where there is none of the name."""
    if name not in names():
        meant = [other for other in names() if name.lower() in title(other).lower()]
        hint = f"did you mean {meant[0]}?" if meant else f"they are {', '.join(names())}."
        raise UserError(f"{name!r:.60} is no recorder; {hint}")
    parts: dict[str, str] = {}
    script = _without_imports(_text(f"record_{name}"), parts)
    first = _DEFINITION.search(script)
    assert first is not None
    tables, rest = script[: first.start()], script[first.start() :]
    return "\n\n\n".join([tables.rstrip(), *parts.values(), rest])


def _without_imports(text: str, parts: dict[str, str]) -> str:
    """The text without imports of parts, which are added, those that they import first."""
    for name in _PART.findall(text):
        if name not in parts:
            _, body = _text(name).split("import annotations\n", 1)
            parts[name] = _without_imports(body, parts).strip()
    return _PART.sub("", text)


def title(name: str) -> str:
    """What it is, in a line."""
    return ready_made.title(_text(f"record_{name}"), name)


def _text(module: str) -> str:
    return (_HOME / f"{module}.py").read_text("utf-8")
