"""Where a report comes from: command, versions, commit and date."""

import dataclasses
import functools
import importlib.metadata
import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from qwen_jax.versions import version

PACKAGES = (
    *("qwen_jax", "jax", "jaxlib", "flax", "numpy", "gguf", "tokenizers", "ml_collections"),
    *("jax-cuda13-plugin", "jax-cuda12-plugin", "lm_eval"),
)
_ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Origin:
    """Of one run.

    Attributes:
        command: as it was typed.
        commit: of the sources, None where they are no working tree.
        changed: whether they had changes that are in no commit.
    """

    command: str
    versions: dict[str, str]
    commit: str | None
    changed: bool
    date: str

    @classmethod
    def now(cls, argv: Sequence[str]) -> "Origin":
        """Of a command that is running."""
        date = time.strftime("%Y-%m-%d %H:%M %z")
        head, changed = _state()
        return cls(shlex.join(argv), installed(), head, changed, date)

    def rows(self) -> list[tuple[str, str]]:
        rows = [("command", self.command)]
        rows.append(("versions", ", ".join(f"{name} {n}" for name, n in self.versions.items())))
        if self.commit:
            note = ", with changes that are in no commit" if self.changed else ""
            rows.append(("commit", self.commit + note))
        return [*rows, ("date", self.date)]


def installed() -> dict[str, str]:
    """Versions of the packages that may change a result."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def _state() -> tuple[str | None, bool]:
    """The commit, and whether the sources differ from it."""
    return git("rev-parse", "HEAD").strip() or None, bool(git("diff", "HEAD", "--stat"))


def git(*arguments: str) -> str:
    """What git says of the sources, or nothing where they are no working tree."""
    if not (_ROOT / ".git").exists():
        return ""
    try:
        done = subprocess.run(
            ["git", "-C", str(_ROOT), *arguments], capture_output=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf-8", "replace")
