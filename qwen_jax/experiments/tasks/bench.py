"""`bench`: speed of prefill and of decoding, warmed up, as medians with their spread."""

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from qwen_jax.engine import steps
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.memory import TooLarge
from qwen_jax.engine.rows import Rows, pack_rows
from qwen_jax.engine.sampling import Plan, Sampling, settings_of
from qwen_jax.engine.shapes import fitting, pieces_of
from qwen_jax.errors import UserError
from qwen_jax.experiments import kinds
from qwen_jax.experiments.task import Metrics, Task, Work
from qwen_jax.model.cache import PAGE, pages_for
from qwen_jax.prompts import sampling_of

_PREFILL, _DECODE, _STEP = "prefill_tokens_per_s", "decode_tokens_per_s", "ms_per_step"
_TAKEN = ("prefill_seconds", "decode_seconds")


class Bench(Task):
    """One item a repetition: the seconds of a prefill and of the decoding steps after it.

    Every slot holds a text of random tokens. They are put into the cache and decoded by the calls
    that the scheduler makes when it is full, greedily, with nothing of the host between them.
    """

    reads = ("experiment.bench", "sampling.seed")

    def __init__(self, config: ConfigDict):
        super().__init__(config)
        for name, value in config.experiment.bench.items():
            if value < 1:
                raise UserError(f"experiment.bench.{name} is {value}, but it must be at least 1.")
        sampling_of(config)  # Checks the seed, from which the tokens are drawn.

    def known_metrics(self) -> Collection[str]:
        return _PREFILL, _DECODE, _STEP

    def fault_of(self, item: dict[str, Any]) -> str:
        return kinds.fault(item, dict.fromkeys(_TAKEN, kinds.SECONDS))

    def run(self, work: Work) -> Metrics:
        engine, bench = work.model().engine, self.config.experiment.bench
        texts = Texts(engine, bench.prompt_tokens, bench.new_tokens, self.config.sampling.seed)
        taken = [tuple(item[name] for name in _TAKEN) for item in work.recorded()]
        try:
            if len(taken) < bench.repeats:
                texts.run()  # compiles
            for repeat in range(len(taken), bench.repeats):
                taken.append(texts.run())
                work.record(repeat=repeat, **dict(zip(_TAKEN, taken[-1], strict=True)))
                work.progress(repeat + 1, bench.repeats)
        finally:
            texts.close()
        prefills, decodes = zip(*taken, strict=True)
        prompts, new = texts.count * bench.prompt_tokens, texts.count * texts.steps
        for repeat, (prefill, decode) in enumerate(taken):
            speeds = {_PREFILL: prompts / prefill, _DECODE: new / decode}
            speeds[_STEP] = 1e3 * decode / texts.steps
            work.score("repeat", repeat, repeat, speeds)
        return {
            **_speed(_PREFILL, prompts, prefills),
            **_speed(_DECODE, new, decodes),
            _STEP: 1e3 * statistics.median(decodes) / texts.steps,
        }


class Texts:
    """One for each slot of an engine, with pages of their own.

    Args:
        new: tokens that each is to get; `steps` is that many in whole calls.

    Raises:
        UserError: they are longer than the context, or than all pages.
    """

    def __init__(self, engine: Engine, prompt: int, new: int, seed: int):
        self.engine, self.count = engine, engine.shapes.slots
        self.steps = -(-new // engine.shapes.steps) * engine.shapes.steps
        config, longest = engine.config, prompt + self.steps
        if longest > config.context_length:
            raise UserError(
                f"{prompt} tokens of a prompt and {self.steps} new ones are more than the context "
                f"of {config.context_length}."
            )
        if self.count * pages_for(longest) > engine.pool.available:
            raise TooLarge(
                f"{self.count} texts of up to {longest} tokens are more than the cache has room "
                f"for, {engine.pool.size * PAGE} tokens; lower slots."
            )
        # Texts that end would leave less to do.
        self._spec = dataclasses.replace(engine.spec, stop_ids=())
        self._held = engine.pool.take(self.count * pages_for(longest))
        each = np.reshape(self._held, (self.count, -1)).tolist()
        self._tables = engine.tables(each, self.count)
        drawn = np.random.default_rng(seed).integers(0, config.vocab_size, (self.count, prompt))
        self._tokens = drawn.astype(np.int32)

    def run(self) -> tuple[float, float]:
        """Seconds of prefill, and of decoding."""
        start = time.perf_counter()
        self._prefill()
        jax.block_until_ready(self.engine.pages)
        middle = time.perf_counter()
        self._decode()
        jax.block_until_ready(self.engine.pages)
        return middle - start, time.perf_counter() - middle

    def close(self) -> None:
        """Gives the pages back."""
        self.engine.pool.release(self._held)

    def _prefill(self) -> None:
        """All but the last token, which is the first step's."""
        shapes, length = self.engine.shapes, self._tokens.shape[1] - 1
        pieces = [(row, p) for row in range(self.count) for p in pieces_of(0, length, shapes)]
        for padded, alike in itertools.groupby(pieces, lambda pair: pair[1].padded):
            sizes = shapes.sizes(padded)
            for some in _batched(alike, sizes[-1]):
                rows = np.zeros(fitting(sizes, len(some)), np.int32)
                tokens = np.zeros((len(rows), padded), np.int32)
                start, lengths = np.zeros_like(rows), np.zeros_like(rows)
                for i, (row, piece) in enumerate(some):
                    stop = piece.start + piece.length
                    rows[i], start[i], lengths[i] = row, piece.start, stop
                    tokens[i, : piece.length] = self._tokens[row, piece.start : stop]
                self.engine.pages = steps.extend(
                    self._spec,
                    self.engine.weights,
                    self.engine.pages,
                    self._tables[rows],
                    tokens,
                    start,
                    lengths,
                )

    def _decode(self) -> None:
        engine, size = self.engine, self.engine.shapes.steps
        every: Any = np.arange(self.count, dtype=np.int32)
        last: Any = self._tokens[:, -1]
        same: Any = functools.partial(np.full_like, every)
        state, settings = steps.State.create(self.count), settings_of(Sampling(), None)
        columns = jax.tree.map(lambda x: np.repeat(x, self.count), settings)
        for call in range(self.steps // size):
            rows = Rows(
                slot=every,
                live=same(1),
                fresh=same(call == 0),
                token=last,
                generated=same(0),
                start=same(self._tokens.shape[1] - 1),
                limit=same(self.steps),
                settings=columns,
            )
            engine.pages, state, _, _ = steps.step(
                self._spec,
                engine.weights,
                engine.pages,
                self._tables,
                state,
                None,
                pack_rows(rows),
                Plan(),
                size,
            )


def _batched(items: Iterable[Any], most: int) -> Iterator[list[Any]]:
    """As itertools.batched, which Python 3.11 lacks."""
    left = iter(items)
    while some := list(itertools.islice(left, most)):
        yield some


def _speed(name: str, tokens: int, seconds: tuple[float, ...]) -> Metrics:
    """Tokens a second: the median, and half the distance between the quartiles as its spread."""
    rates = sorted(tokens / s for s in seconds)
    low, high = np.percentile(rates, (25, 75))
    return {name: statistics.median(rates), f"{name}_error": float(high - low) / 2}
