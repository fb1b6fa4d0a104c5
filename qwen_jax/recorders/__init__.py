"""Scripts that record another engine's tensors for `run.py compare`; `run.py recorder` prints them.

A user copies one file beside an engine, in an environment without qwen_jax. So they import nothing
of ours but `dump`, what all of them write, and `source` puts its text in that line's place.
"""

import re
from pathlib import Path

from qwen_jax import ready_made
from qwen_jax.errors import UserError

_HOME = Path(__file__).parent
_SHARED = re.compile(r"^from qwen_jax\.recorders\.dump import .*\n", re.MULTILINE)


def names() -> list[str]:
    """What `source` takes."""
    return sorted(path.stem.removeprefix("record_") for path in _HOME.glob("record_*.py"))


def source(name: str) -> str:
    """The script, of one file. Raises UserError where there is none of the name."""
    if name not in names():
        meant = [other for other in names() if name.lower() in title(other).lower()]
        hint = f"did you mean {meant[0]}?" if meant else f"they are {', '.join(names())}."
        raise UserError(f"{name!r:.60} is no recorder; {hint}")
    shared = (_HOME / "dump.py").read_text("utf-8").split("import annotations\n", 1)[1].strip()
    return _SHARED.sub(lambda _: f"{shared}\n\n", _text(name))


def title(name: str) -> str:
    """What it is, in a line."""
    return ready_made.title(_text(name), name)


def _text(name: str) -> str:
    return (_HOME / f"record_{name}.py").read_text("utf-8")
