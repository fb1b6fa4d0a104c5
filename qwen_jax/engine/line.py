"""Schedulers that share the pages of one engine: who has some next, and who waits in vain."""

import threading
import time
import weakref
from typing import NamedTuple, Protocol

from qwen_jax.errors import UserError

GONE = 1.0
"""Seconds without a turn after which others need not wait for a scheduler to take what it waits
for: its texts may be those of a generator that nobody asks for more."""
STUCK = 60.0
"""Seconds in which nobody who has pages had a turn, until who waits for them gives up."""
PAUSE = 0.001
"""Seconds between two looks."""


class Holder(Protocol):
    """A scheduler's texts."""

    held: int
    """How many have pages."""


class _Turn(NamedTuple):
    thread: int
    time: float


class Line:
    """First come, first served, as in each scheduler's own line."""

    def __init__(self) -> None:
        self._turns: weakref.WeakKeyDictionary[Holder, _Turn] = weakref.WeakKeyDictionary()
        self._waiting: weakref.WeakKeyDictionary[Holder, None] = weakref.WeakKeyDictionary()

    def turn(self, who: Holder) -> None:
        """It has its turn now."""
        self._turns[who] = _Turn(threading.get_ident(), time.monotonic())

    def is_first(self, who: Holder) -> bool:
        """Whether nobody who has turns has waited for longer."""
        before = [one for one in self._waiting if one is who or self._since(one) < GONE]
        return (who not in self._waiting and not before) or before[:1] == [who]

    def wait(self, who: Holder) -> None:
        """It can't have its pages yet."""
        self._waiting[who] = None

    def leave(self, who: Holder) -> None:
        """It has them, or wants them no more."""
        self._waiting.pop(who, None)

    def check(self, who: Holder) -> None:
        """Raises UserError where waiting is in vain: pages are held by texts of this thread alone,
        which can't go on meanwhile, or by texts that nobody has gone on with for a minute."""
        others = [one for one in self._turns if one is not who and one.held]
        mine = all(self._turns[one].thread == threading.get_ident() for one in others)
        if self.is_first(who) and (mine or min(map(self._since, others)) > STUCK):
            raise UserError(
                "Other texts that are being generated hold the whole cache; finish them, or close "
                "their generators."
            )

    def _since(self, who: Holder) -> float:
        return time.monotonic() - self._turns[who].time
