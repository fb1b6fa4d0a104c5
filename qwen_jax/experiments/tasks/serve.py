"""`serve`: what users wait for while requests arrive, one item a repetition of the whole load.

A request's time to first token (TTFT) is from its arrival to its first text, its time per output
token (TPOT) that from there to its end, for each token after the first. Texts are told of after
each call of some decode steps, so that both are what a user sees, and not what the device does.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from qwen_jax.api import Model
from qwen_jax.errors import UserError
from qwen_jax.experiments import energy, kinds
from qwen_jax.experiments.task import Metrics, Work
from qwen_jax.experiments.tasks.generate import Generate
from qwen_jax.generation import NotYet
from qwen_jax.requests import Request, reseeded
from qwen_jax.task_fields import ANSWER, PROMPT

_PERCENTILES = (50, 90, 99)
_TIMES = ("arrived", "first", "ended")
_ITEM = {
    "repeat": kinds.NATURAL,
    **{name: kinds.list_of(kinds.NUMBER) for name in _TIMES},
    "tokens": kinds.list_of(kinds.NATURAL),
}
_ENERGY = {energy.METRIC: kinds.NUMBER}
"""Of an item, too, where it could be measured."""


_METRICS = (
    *("good_per_s", "good_share", "requests_per_s", "tokens_per_s", energy.METRIC),
    *(f"{name}_p{q}_ms" for name in ("ttft", "tpot", "latency") for q in _PERCENTILES),
)

Clock = Callable[[], float]


class Served(NamedTuple):
    """Of each request: seconds from the beginning, and how many tokens it got; of all together
    what a token took of energy, where that is known."""

    arrived: list[float]
    first: list[float]
    ended: list[float]
    tokens: list[int]
    joules_per_token: float | None = None


class Serve(Generate):
    """Sends the prompts, over and over, until all requests are answered."""

    reads = (*PROMPT, *ANSWER, "experiment.template", "experiment.serve")

    def __init__(self, config: ConfigDict):
        super().__init__(config)
        for name, value in config.experiment.serve.items():
            if value is not None and not value > 0:
                raise UserError(f"experiment.serve.{name} is {value:g}, but it must be above 0.")
        if config.n != 1:
            raise UserError(f"n is {config.n}, but serve answers each request once; leave it out.")

    def known_metrics(self) -> Collection[str]:
        return _METRICS

    def fault_of(self, item: dict[str, Any]) -> str:
        return kinds.fault(item, _ITEM | (_ENERGY if energy.METRIC in item else {}))

    def run(self, work: Work) -> Metrics:
        serve, model = self.config.experiment.serve, work.model()
        self._follow(model.recommended, work.asked)
        found = [_served(item) for item in work.recorded()]
        if len(found) < serve.repeats:
            items = list(itertools.islice(itertools.cycle(self.items()), serve.requests))
            requests = list(reseeded(map(work.request, items)))
            slots = serve.concurrency or model.engine.shapes.slots
            for _ in model.run(requests[: 2 * slots]):  # compiles
                pass
            meter = energy.of_engine(model.engine)
            for repeat in range(len(found), serve.repeats):
                if meter is not None:
                    meter.restart()
                one = served(model, requests, self._arrivals(repeat), slots)
                if meter is not None:
                    one = one._replace(joules_per_token=meter.per_token(sum(one.tokens)))
                found.append(one)
                known = {k: v for k, v in one._asdict().items() if v is not None}
                work.record(repeat=repeat, **known)
                work.progress(repeat + 1, serve.repeats)
        each = [self._figures(one) for one in found]
        for repeat, figures in enumerate(each):
            work.score("repeat", repeat, repeat, figures)
        metrics: Metrics = {}
        for name in (name for name in each[0] if all(name in figures for figures in each)):
            values = np.array([figures[name] for figures in each])
            metrics[name] = float(values.mean())
            if len(values) > 1:
                metrics[f"{name}_error"] = float(values.std(ddof=1) / len(values) ** 0.5)
        return metrics

    def _arrivals(self, repeat: int) -> list[float] | None:
        """Seconds at which requests come, as a Poisson process has them; None: when one ends."""
        serve = self.config.experiment.serve
        if serve.rate is None:
            return None
        rng = np.random.default_rng([self.config.sampling.seed, repeat])
        return np.cumsum(rng.exponential(1 / serve.rate, serve.requests)).tolist()

    def _figures(self, one: Served) -> Metrics:
        """Speeds, percentiles, and how many requests a second were good in both times."""
        serve = self.config.experiment.serve
        arrived, first, ended = (np.array(times) for times in one[:3])
        tokens = np.array(one.tokens)
        ttft, latency = 1e3 * (first - arrived), 1e3 * (ended - arrived)
        several = tokens > 1
        tpot = np.zeros_like(ttft)
        tpot[several] = 1e3 * (ended - first)[several] / (tokens[several] - 1)
        good = (ttft <= serve.good_ttft_ms) & (tpot <= serve.good_tpot_ms)
        seconds = float(ended.max() - arrived.min())
        found = {
            "good_per_s": float(good.sum()) / seconds,
            "good_share": float(good.mean()),
            "requests_per_s": len(tokens) / seconds,
            "tokens_per_s": float(tokens.sum()) / seconds,
        }
        if one.joules_per_token is not None:
            found[energy.METRIC] = one.joules_per_token
        for name, values in (("ttft", ttft), ("tpot", tpot[several]), ("latency", latency)):
            for q in _PERCENTILES:
                if len(values):
                    found[f"{name}_p{q}_ms"] = float(np.percentile(values, q))
        return found


def _served(item: dict[str, Any]) -> Served:
    return Served(**{name: item[name] for name in Served._fields if name in item})


def served(
    model: Model,
    requests: list[Request],
    arrivals: list[float] | None,
    concurrency: int,
    clock: Clock = time.perf_counter,
) -> Served:
    """Answers requests as they arrive, of which no more than `concurrency` are answered at a time;
    others wait, and their waiting counts.

    Args:
        arrivals: seconds; None has as many requests under way as may be.
    """
    arrived: dict[int, float] = {}
    first: dict[int, float] = {}
    ended: dict[int, float] = {}
    tokens: dict[int, int] = {}
    asked: dict[int, int] = {}
    start = clock()

    def sent() -> Iterator[Request | NotYet]:
        left, numbers = iter(range(len(requests))), itertools.count()
        index = next(left, None)
        while index is not None:
            number, now = next(numbers), clock() - start
            due = 0.0 if arrivals is None else arrivals[index]
            if now < due or len(asked) >= concurrency:
                yield NotYet()
                continue
            arrived[index] = now if arrivals is None else due
            asked[number] = index
            yield requests[index]
            index = next(left, None)

    with contextlib.closing(iter(model.run(sent()))) as pieces:
        for number, _, completion in pieces:
            now, index = clock() - start, asked[number]
            first.setdefault(index, now)
            if completion is not None:
                del asked[number]
                ended[index], tokens[index] = now, len(completion.tokens)
    order = range(len(requests))
    return Served(
        arrived=[arrived[i] for i in order],
        first=[first[i] for i in order],
        ended=[ended[i] for i in order],
        tokens=[tokens[i] for i in order],
    )
