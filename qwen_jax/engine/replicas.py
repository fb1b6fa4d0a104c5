"""Texts through several engines of one model, each on devices of its own."""

from collections.abc import Sequence

from qwen_jax.engine.engine import Engine
from qwen_jax.engine.scheduler import Scheduler
from qwen_jax.engine.shared import Client
from qwen_jax.engine.texts import News, Text


class Replicas:
    """A scheduler for each engine, and a line for all: what one `Scheduler` does.

    A text goes to whoever has the fewest. All devices are given their work before any is waited
    for. A prompt's pages are shared only with texts of the same engine.
    """

    def __init__(self, engines: Sequence[Engine]):
        self._all = [Scheduler(engine) for engine in engines]
        self._of: dict[Text, Scheduler] = {}
        self._texts = dict.fromkeys(self._all, 0)

    def add(self, text: Text) -> None:
        chosen = min(self._all, key=self._texts.__getitem__)
        self._of[text] = chosen
        self._texts[chosen] += 1
        chosen.add(text)

    def cancel(self, text: Text) -> None:
        if (scheduler := self._of.get(text)) is not None:
            scheduler.cancel(text)
            self._forget(text)

    def close(self) -> None:
        for scheduler in self._all:
            scheduler.close()

    def turn(self) -> list[News]:
        busy = [scheduler for scheduler in self._all if not scheduler.idle]
        for scheduler in busy:
            scheduler.start()
        news = [one for scheduler in busy for one in scheduler.news()]
        for one in news:
            if one.over:
                self._forget(one.text)
        return news

    def _forget(self, text: Text) -> None:
        if (scheduler := self._of.pop(text, None)) is not None:
            self._texts[scheduler] -= 1


def line_for(engine: Engine) -> Client:
    """Where texts of an engine, and of the same model elsewhere, are to wait. To be closed."""
    engines = [engine, *engine.others]

    def make() -> Scheduler | Replicas:
        return Replicas(engines) if engine.others else Scheduler(engine)

    return Client(engine.shared, make, sum(one.shapes.slots for one in engines))
