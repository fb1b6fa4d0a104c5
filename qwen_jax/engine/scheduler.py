"""Who runs when: texts wait in order, take a slot and pages, are extended in pieces, and decoded.

A turn admits whoever fits, first come, first served; puts pieces of admitted prompts into the
cache; and runs some decode steps of every text that is whole. A text that has ended leaves its slot
and its pages to the next one at once. Nobody overtakes: the first in line waits for the pages it
may need until its end, so that nothing that runs is ever thrown out, and everything gets its turn.
"""

import itertools
from collections import deque
from collections.abc import Iterator

from qwen_jax.engine.decoding import Decoding, Steps
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.entering import Entrance, Scoring
from qwen_jax.engine.texts import News, Text


class Scheduler:
    """Texts through one engine. Several may take turns, on any threads: the slots of each are its
    own, and the engine's lock is held while one has its turn."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._entrance = Entrance(engine)
        self._decoding = Decoding(engine, self._entrance.leave)
        self._calls: deque[Steps | Scoring] = deque()

    @property
    def idle(self) -> bool:
        """Whether there is nothing left to do or to tell."""
        entrance = self._entrance
        return not (entrance.waiting or entrance.entering or self._decoding.running or self._calls)

    @property
    def wants_more(self) -> bool:
        """Whether a text that is added now could take its turn at once, or soon."""
        return len(self._entrance.waiting) < self.engine.shapes.slots

    def add(self, text: Text) -> None:
        """Puts a text at the end of the line. It must fit: see `Engine.room`."""
        self._entrance.waiting.append(text)

    def cancel(self, text: Text) -> None:
        """Ends a text wherever it is; nothing more is told of it.

        What is entering the cache goes on to: others may share its pages already.
        """
        text.over = True
        with self.engine.lock:
            if text in self._entrance.waiting:
                self._entrance.waiting.remove(text)
            elif not self._entrance.is_entering(text):
                self._decoding.leave(text)

    def close(self) -> None:
        """Lets go of all that is left, once nothing is to be told any more."""
        with self.engine.lock:
            entrance = self._entrance
            entrance.forget_entering()
            scored = [call.pieces for call in self._calls if isinstance(call, Scoring)]
            left = [text for text, _ in itertools.chain(entrance.entering, *scored)]
            for text in [*entrance.waiting, *self._decoding.running, *left]:
                self._decoding.leave(text)

    def turn(self) -> list[News]:
        """Does what can be done now, and tells what is known by then: `start`, and `news`."""
        with self.engine.lock:
            self.start()
            return self.news()

    def start(self) -> None:
        """Hands the device what can be done now.

        Raises:
            UserError: there is nothing to wait for: other schedulers' texts hold the pages.
        """
        with self.engine.lock:
            self.engine.revive()
            running = self._decoding.running
            self._entrance.admit(busy=bool(running or self._calls))
            for one in self._entrance.extend(len(running)):
                if isinstance(one, Text):
                    self._decoding.begin(one)
                else:
                    self._calls.append(one)
            self._calls += self._decoding.step()

    def news(self) -> list[News]:
        """What is known by now.

        Raises:
            UserError: logits are not finite, or a text bans every token.
        """
        with self.engine.lock:
            return list(self._news())

    def _news(self) -> Iterator[News]:
        yield from self._decoding.step_constrained()
        works = self._decoding.running or self._entrance.entering
        busy = 1 if self.engine.shapes.ahead and works else 0
        while len(self._calls) > busy:
            call = self._calls.popleft()
            if isinstance(call, Scoring):
                yield from self._entrance.read(call)
            else:
                yield from self._decoding.read(call)
