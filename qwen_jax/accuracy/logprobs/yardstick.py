"""How far a right engine's log-probabilities may be from ours: measured, not derived.

A bound that is carried through all layers is far above what happens, and would hide what it should
tell. So our own engine computes each text twice, in float32 and in bfloat16. What lies between the
two at a position, as the root mean square over the vocabulary, is what one rounding of bfloat16
everywhere costs there; float16 and TF32, whose unit is an eighth, cost an eighth. What float32
costs is measured once, against float64 on the beginning of the longest text, as a part of the same
figure. To each comes what float32 rounds in the log-softmax (`exact.carried`), which is the most of
it where a probability is close to 1.

An engine counts as right in one of these where its errors are at most `RMS` of that on average and
`WORST` anywhere. Engines differ in the order of their sums and in what they fuse; these limits are
a choice, not a theorem, so every verdict shows the figures it rests on. transformers (eager and
sdpa) in each of the three, and llama.cpp in float32, come to 0.9 to 1.4 on average and 4.9 at most
on a small random model (tests/accuracy/test_logprobs_clean.py).
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, Int

from qwen_jax.accuracy.exact.bounds import L
from qwen_jax.accuracy.exact.forward import forward
from qwen_jax.accuracy.exact.parameters import CheckpointSource
from qwen_jax.accuracy.exact.rounding import UNIT
from qwen_jax.accuracy.logprobs.paths import BLOCK, Predicted, Rows, rms_nats
from qwen_jax.accuracy.logprobs.reading import Logged
from qwen_jax.accuracy.measures.metrics import first_not_finite, log_softmax
from qwen_jax.api import Model
from qwen_jax.errors import UserError
from qwen_jax.weights.loader import Checkpoint

RMS, WORST = 2.0, 12.0
OWN = 32
"""Tokens on which our float32 is held against float64."""

UNIFORM = 3**-0.5
"""A rounding's root mean square over its bound: it may come to anything up to that."""

LEAST = 16
"""Values from which on something is said of an engine."""


class Measure(Protocol):
    """How far a right engine's log-probabilities may be from the model's.

    Attributes:
        levels: what an engine may have computed in, the finest first.
        stops: tokens that somebody may have put before a text.
    """

    @property
    def levels(self) -> "tuple[Level, ...]": ...

    @property
    def stops(self) -> tuple[int, ...]: ...

    def rows(self, text: Logged, before: tuple[int, ...] = (), prompt: bool = True) -> Rows:
        """Every position of a text, with the noise of a level of unit 1."""
        ...

    def columns(self, text: Logged, rows: Rows) -> Iterator[Rows]:
        """The same with what else was logged beside the tokens, where that has to be explained."""
        ...


class Level(NamedTuple):
    """An arithmetic, and what one rounding error of it is: a part of bfloat16's, and besides a part
    of the bound of what float32 rounds in a log-softmax, and of that of the sum in it, whatever the
    logits were computed in."""

    name: str
    unit: float
    softmax: float = UNIFORM
    sums: float = UNIFORM / L


class Fit(NamedTuple):
    """Errors in units of one rounding error of a level: their root mean square, and the largest;
    the first in nats too, each cut at 20."""

    rms: float
    worst: float
    nats: float
    values: int

    @property
    def within(self) -> bool:
        return self.rms <= RMS and self.worst <= WORST

    def __str__(self) -> str:
        return f"{self.rms:.2g} (at most {self.worst:.2g})"


NOTHING = Fit(0.0, 0.0, 0.0, 0)
"""Of no values."""


def fit(predicted: list[Predicted]) -> Fit:
    """Of predictions whose limit is `WORST` rounding errors."""
    if not predicted:
        return NOTHING
    ratios = WORST * np.concatenate([p.ratio for p in predicted])
    if not ratios.size:
        return NOTHING
    with np.errstate(over="ignore"):
        rms = float(np.sqrt(np.mean(ratios**2)))
    nats = rms_nats(np.concatenate([p.error for p in predicted]))
    return Fit(rms, float(ratios.max()), nats, ratios.size)


@dataclasses.dataclass
class Yardstick:
    """Our engine in two arithmetics.

    Attributes:
        exact: in float32, with products in full precision.
        rough: in bfloat16.
        levels: what an engine may have computed in, the finest first.
        own: of our float32 against float64, over one rounding of bfloat16.
    """

    exact: Model
    rough: Model
    levels: tuple[Level, ...] = ()
    own: float = 0.0

    @classmethod
    def of(cls, exact: Model, rough: Model, checkpoint: Checkpoint, text: Logged) -> "Yardstick":
        """Measures what float32 costs on the beginning of this text.

        Raises:
            UserError: our own engine is off by more than float32 can be; nothing could be told.
        """
        made = cls(exact, rough)
        ids = text.whole[:OWN]
        truth = None
        for name, value in forward(CheckpointSource(checkpoint), ids.tolist()):
            if name == "logits":
                truth = log_softmax(value)
        assert truth is not None
        ours = log_softmax(made._logits(exact, text, ids))
        rough_ones = log_softmax(made._logits(rough, text, ids))
        own = float(np.sqrt(np.mean((ours - truth) ** 2) / np.mean((rough_ones - truth) ** 2)))
        if not own < UNIT["float16"] / UNIT["bfloat16"] / 4:
            raise UserError(
                f"{exact.config.source}: this engine's float32 is off by {own:.2g} of what "
                f"bfloat16 is, from float64 on the first {len(ids)} tokens of {text.where}, so "
                "that it can judge nobody; ask `compare --parts=tensors` what is wrong here."
            )
        least = UNIT["float32"] / UNIT["bfloat16"]
        levels = (
            Level("float32", max(own, least)),
            Level("float16 or TF32", UNIT["float16"] / UNIT["bfloat16"]),
            Level("bfloat16", 1.0),
        )
        return cls(exact, rough, levels, own)

    def rows(self, text: Logged, before: tuple[int, ...] = (), prompt: bool = True) -> Rows:
        """Every position of a text, with the noise of one rounding of bfloat16.

        Args:
            before: ids put before the text.
            prompt: with the prompt.
        """

        def measured(ids: Int[np.ndarray, "T"]) -> tuple[np.ndarray, np.ndarray]:
            logits, rough = (self._logits(model, text, ids) for model in (self.exact, self.rough))
            return logits, noise(logits, rough)

        return rows_of(text, before, prompt, measured)

    def columns(self, text: Logged, rows: Rows) -> Iterator[Rows]:
        """What besides the tokens' own values a cause has to give: nothing."""
        return iter(())

    @property
    def stops(self) -> tuple[int, ...]:
        """Tokens that somebody may have put before a text."""
        return tuple(self.exact.engine.spec.stop_ids)

    def _logits(self, model: Model, text: Logged, ids: np.ndarray) -> Float[np.ndarray, "T V"]:
        try:
            logits = model.logits(ids.tolist())
        except UserError as error:
            raise UserError(f"{text.where}: {error}") from error
        if (place := first_not_finite(logits)) is not None:
            raise UserError(
                f"{text.where}: after token {place[0]} this engine's logit of token {place[1]} is "
                f"{logits[place]}, from which nothing can be told; leave the text out."
            )
        return logits


def rows_of(
    text: Logged,
    before: tuple[int, ...],
    prompt: bool,
    of: Callable[[Int[np.ndarray, "T"]], tuple[np.ndarray, np.ndarray]],
) -> Rows:
    """Every position of a text, perhaps with other ids before it.

    Args:
        of: from ids to the logits after each, and their noise.
    """
    own = text.whole[0 if prompt else len(text.prompt or ()) :]
    whole = np.concatenate([np.asarray(before, np.int64), own])
    logits, noises = of(whole)
    blank = np.full(len(whole) - len(text.tokens), np.nan)
    return Rows(
        logits,
        noises,
        whole,
        len(blank),
        np.arange(len(whole)),
        np.concatenate([blank, text.logprobs]),
    )


def at(rows: Rows, level: Level) -> Rows:
    """The rows with the noise of `WORST` rounding errors of a level."""
    return rows._replace(
        noise=WORST * level.unit * rows.noise,
        roundings=WORST * level.softmax,
        sums=WORST * level.sums,
    )


def noise(exact: np.ndarray, rough: np.ndarray) -> Float[np.ndarray, "T"]:
    """RMS over the vocabulary at each position, no less than half of the text's own average: where
    two errors happen to cancel, those of another engine need not."""
    squares = np.concatenate(
        [
            ((log_softmax(rough[i : i + BLOCK]) - log_softmax(exact[i : i + BLOCK])) ** 2).mean(-1)
            for i in range(0, len(exact), BLOCK)
        ]
    )
    return np.sqrt((squares + squares.mean()) / 2)
