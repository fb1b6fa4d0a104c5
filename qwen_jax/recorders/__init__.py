"""Scripts that record another engine's tensors for `run.py compare`; `run.py recorder` prints them.

Each is one file that a user copies beside an engine, in an environment without qwen_jax, so it
imports nothing of ours, and what two of them have in common stands in both.
"""

from pathlib import Path

from qwen_jax import ready_made
from qwen_jax.errors import UserError

_HOME = Path(__file__).parent


def names() -> list[str]:
    """What `source` takes."""
    return sorted(path.stem.removeprefix("record_") for path in _HOME.glob("record_*.py"))


def source(name: str) -> str:
    """The script. Raises UserError where there is none of the name."""
    if name not in names():
        meant = [other for other in names() if name.lower() in title(other).lower()]
        hint = f"did you mean {meant[0]}?" if meant else f"they are {', '.join(names())}."
        raise UserError(f"{name!r:.60} is no recorder; {hint}")
    return (_HOME / f"record_{name}.py").read_text("utf-8")


def title(name: str) -> str:
    """What it is, in a line."""
    return ready_made.title(source(name), name)
