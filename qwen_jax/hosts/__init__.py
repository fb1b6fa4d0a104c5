"""Runs of several hosts: what `hosts` says, and how a process becomes one of them.

All run the same command and make the same calls of the devices, which JAX has exchange their parts
(`jax.distributed`). The first one writes; others work on copies of what it goes on with. Light on
purpose: a mistake is told before JAX wakes.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from qwen_jax.errors import UserError

if TYPE_CHECKING:
    from qwen_jax.hosts.join import Joined

AUTO = "auto"
ENVIRONMENTS = "Slurm, Open MPI or Kubernetes"
"""What JAX reads an `auto` from."""

WAIT = 300
"""Seconds that hosts wait for each other at the start."""

NOTICE = 10
"""Seconds after which they say that they wait."""

NEEDS_MESH = (
    "hosts needs mesh, which says how the model is dealt out to their devices: --mesh=tp=2."
)

LOST = 60
"""Seconds after which a host that says nothing is held for lost; one whose process ends is at
once."""


joined: "Joined | None" = None
"""What this process is in a run of several hosts, once it is one."""


class Place(NamedTuple):
    """Where the first host listens, which host this one is, counted from 1, and of how many."""

    address: str
    number: int
    of: int


def parse(text: str) -> Place | None:
    """What `hosts` says; None is what the environment says.

    Raises UserError where it is not of that form.
    """
    if text == AUTO:
        return None
    address = r"(\[[^\]\s]+\]|[\w.-]+):([0-9]{1,5})"
    found = re.fullmatch(rf"{address},([0-9]{{1,6}})/([0-9]{{1,6}})", text, re.ASCII)
    if found is None:
        raise UserError(
            f"hosts is {text!r:.80}, but it must be {AUTO} or ADDRESS:PORT,I/N, where the first of "
            "N hosts listens and which one this is; write it as in 10.0.0.1:9876,1/2."
        )
    port, number, count = (int(part) for part in found.groups()[1:])
    if not 1 <= port <= 65_535:
        raise UserError(f"hosts is {text!r:.80}, but a port is a number from 1 to 65535.")
    if count < 2 or not 1 <= number <= count:
        raise UserError(
            f"hosts is {text!r:.80}, but there must be at least two, of which this is one from 1/N "
            "to N/N."
        )
    return Place(f"{found[1]}:{port}", number, count)


@contextlib.contextmanager
def waiting_for_loss() -> Iterator[None]:
    """What fails inside may have because another host is gone: then this one ends with a sentence
    that says so, if its watch is only given the time."""
    try:
        yield
    except Exception as error:
        if joined is not None and not isinstance(error, UserError):
            joined.wait_for_loss()
        raise
