"""Which operations have to stay in float32 for the mean KL divergence to stay under a bound.

An operation is rounded by rounding what it computes, in the running model, to a narrower dtype;
weights stay as they are. Which ones are rounded is data, so that all sets share one program.
"""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int
from tqdm import tqdm

from qwen_jax.accuracy.exact.rounding import round_to
from qwen_jax.accuracy.measures.metrics import logit_metrics
from qwen_jax.accuracy.traces.trace import AXES, names, split_name
from qwen_jax.api import Model
from qwen_jax.engine import steps
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.spec import Spec
from qwen_jax.engine.weights import Weights
from qwen_jax.errors import UserError
from qwen_jax.model.cache import Cache
from qwen_jax.model.tap import intervening

DTYPES = ("bfloat16", "float16")
MOST_EXHAUSTIVE = 12
"""Operations of which an exhaustive search tries all sets: 4,096 of them."""

Evaluate = Callable[[frozenset[str]], float]
"""The mean KL divergence with a set of operations kept in float32."""


@dataclasses.dataclass(frozen=True)
class Step:
    """An operation that the search kept in float32, or released again; the KL after it."""

    operation: str
    kept: bool
    kld: float


@dataclasses.dataclass(frozen=True)
class PrecisionSearch:
    """What a search found.

    Attributes:
        dtype: what operations are rounded to.
        bound: on the mean KL divergence, in nats.
        operations: all that were searched.
        kept: those that have to stay in float32, in the order of computation.
        kld: the mean KL with them,
        rounded_kld: and with none.
        reached: whether `kld` is under the bound; if not, no set is.
        steps: how the search went.
        evaluations: forward passes of the text, repeated sets not counted twice.
        method: "greedy" or "exhaustive".
    """

    dtype: str
    bound: float
    operations: tuple[str, ...]
    kept: tuple[str, ...]
    kld: float
    rounded_kld: float
    reached: bool
    steps: tuple[Step, ...]
    evaluations: int
    method: str


def search_precision(
    model: Model | Engine,
    tokens: Sequence[int],
    bound: float,
    *,
    dtype: str = "bfloat16",
    operations: Sequence[str] | None = None,
    by_layer: bool = False,
    truth: Float[np.ndarray, "T V"] | None = None,
    exhaustive: bool = False,
) -> PrecisionSearch:
    """Searches with a progress bar on a terminal.

    Args:
        tokens: the text over whose positions the KL divergence is averaged.
        bound: on it, in nats.
        dtype: what the other operations are rounded to.
        operations: those to search, as in `trace.AXES`, all by default; others stay in float32.
        by_layer: each layer's operations are operations of their own, `layers.3.q_proj`.
        truth: the right logits; the model's own, nothing rounded, by default.
        exhaustive: try all sets, from the smallest, instead of greedily.

    Raises:
        UserError: the model is not in float32, an operation is unknown, or there are too many
            for an exhaustive search.
    """
    engine = model.engine if isinstance(model, Model) else model
    if engine.spec.weights != jnp.float32:
        raise UserError(
            f"The precision search needs a model in float32, but {engine.config.source} is in "
            f"{engine.spec.weights.name}; load it with dtype float32."
        )
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}, but it must be one of {', '.join(DTYPES)}.")
    if not bound > 0:
        raise UserError(f"bound is {bound}, but it must be above 0.")
    if not 0 < len(tokens) <= engine.config.context_length:
        raise UserError(
            f"The text has {len(tokens)} tokens, but the precision search takes 1 to "
            f"{engine.config.context_length}, the context of {engine.config.source}."
        )
    units = _units(engine, operations, by_layer)
    if exhaustive and len(units) > MOST_EXHAUSTIVE:
        raise UserError(
            f"An exhaustive search of {len(units)} operations would try 2^{len(units)} sets; name "
            f"at most {MOST_EXHAUSTIVE}, or search greedily."
        )
    evaluate = Evaluation(engine, tokens, units, dtype, truth)
    find = search_exhaustively if exhaustive else search_greedily
    with tqdm(desc="precision", leave=False, disable=not sys.stderr.isatty()) as bar:

        def seen(kept: frozenset[str]) -> float:
            bar.update()
            return evaluate(kept)

        result = find(units, seen, bound)
    return dataclasses.replace(result, dtype=dtype)


def _units(engine: Engine, operations: Sequence[str] | None, by_layer: bool) -> tuple[str, ...]:
    for name in operations or ():
        if name not in AXES:
            raise UserError(f"There is no operation {name!r}; they are {', '.join(AXES)}.")
    wanted = [name for name in AXES if operations is None or name in operations]
    if not by_layer:
        return tuple(wanted)
    return tuple(name for name in names(engine.config) if split_name(name)[1] in wanted)


class Evaluation:
    """The mean KL divergence of a text with a set of operations in float32, one program for all."""

    def __init__(
        self,
        engine: Engine,
        tokens: Sequence[int],
        units: Sequence[str],
        dtype: str,
        truth: Float[np.ndarray, "T V"] | None = None,
    ):
        self.engine, self.units = engine, tuple(units)
        self.tokens = np.asarray([tokens], np.int32)
        self._run = jax.jit(functools.partial(_logits, engine.spec, self.units, dtype))
        self.truth = self.logits(frozenset(units)) if truth is None else truth

    def logits(self, kept: frozenset[str]) -> Float[np.ndarray, "T V"]:
        keep = np.array([unit in kept for unit in self.units])
        spec = self.engine.spec
        cache = Cache.create(spec.config, 1, self.tokens.size, spec.cache)
        return np.asarray(self._run(self.engine.weights, cache, self.tokens, keep))[0]

    def __call__(self, kept: frozenset[str]) -> float:
        return logit_metrics(self.logits(kept), self.truth).mean_kld


def _logits(
    spec: Spec,
    units: tuple[str, ...],
    dtype: str,
    weights: Weights,
    cache: Cache,
    tokens: Int[Array, "B T"],
    keep: Bool[Array, " units"],
) -> Float[Array, "B T V"]:
    start = jnp.zeros(1, jnp.int32)
    with intervening(Rounding(units, dtype, keep)):
        lengths = start + tokens.shape[1]
        return steps.all_logits(spec, weights, cache, tokens, start, lengths)[1]


class Rounding:
    """An intervention that rounds every tensor whose operation is not kept.

    The model's attention never holds its probabilities, so with this open it is computed once
    more, from those that are rounded.
    """

    def __init__(self, units: tuple[str, ...], dtype: str, keep: Bool[Array, " units"]):
        self.units, self.dtype, self.keep = units, dtype, keep
        self._probs: jax.Array | None = None
        self._values: jax.Array | None = None

    def __call__(self, name: str, x: jax.Array) -> jax.Array:
        operation = split_name(name)[1]
        if operation == "v_cache":
            self._values = x
        if operation == "attn_out":
            x = self._attend(x)
        unit = name if name in self.units else operation
        if unit in self.units:
            kept = self.keep[self.units.index(unit)]
            x = jnp.where(kept, x, round_to(x, self.dtype, jnp))
        if operation == "attn_probs":
            self._probs = x
        return x

    def _attend(self, x: Float[Array, "B T NH"]) -> Float[Array, "B T NH"]:
        assert self._probs is not None and self._values is not None
        batch, steps, heads, slots = self._probs.shape
        kv_heads = self._values.shape[1]
        grouped = self._probs.reshape(batch, steps, kv_heads, heads // kv_heads, slots)
        out = jnp.einsum(
            "BTKGS,BKSH->BTKGH", grouped, self._values, precision=lax.Precision.HIGHEST
        )
        return out.reshape(x.shape)


def search_greedily(units: Sequence[str], evaluate: Evaluate, bound: float) -> PrecisionSearch:
    """Keeps the operation that lowers the KL most until it is under the bound; then releases,
    the least needed first, whatever can go without passing the bound again."""
    # Not `>`: a rounding that overflows makes the KL NaN, which is under no bound.
    known = _Memory(evaluate)
    kept: frozenset[str] = frozenset()
    steps: list[Step] = []
    while not known(kept) <= bound and len(kept) < len(units):
        added = known.best(kept | {unit} for unit in units if unit not in kept)
        steps.append(Step(min(added - kept), True, known(added)))
        kept = added
    while known(kept) <= bound and kept:
        fewer = known.best(kept - {unit} for unit in kept)
        if not known(fewer) <= bound:
            break
        steps.append(Step(min(kept - fewer), False, known(fewer)))
        kept = fewer
    return _result(units, kept, known, bound, steps, "greedy")


def search_exhaustively(units: Sequence[str], evaluate: Evaluate, bound: float) -> PrecisionSearch:
    """Tries all sets of one size, then of the next, until one is under the bound; of those of
    its size the one with the lowest KL."""
    known = _Memory(evaluate)
    known(frozenset())
    for size in range(len(units) + 1):
        kept = known.best(map(frozenset, itertools.combinations(units, size)))
        if known(kept) <= bound:
            break
    return _result(units, kept, known, bound, [], "exhaustive")


class _Memory:
    """Evaluates a set once."""

    def __init__(self, evaluate: Evaluate):
        self._evaluate = evaluate
        self.klds: dict[frozenset[str], float] = {}

    def __call__(self, kept: frozenset[str]) -> float:
        if kept not in self.klds:
            self.klds[kept] = self._evaluate(kept)
        return self.klds[kept]

    def best(self, candidates: Iterable[frozenset[str]]) -> frozenset[str]:
        return min(candidates, key=lambda kept: np.nan_to_num(self(kept), nan=np.inf))


def _result(
    units: Sequence[str],
    kept: frozenset[str],
    known: _Memory,
    bound: float,
    steps: list[Step],
    method: str,
) -> PrecisionSearch:
    return PrecisionSearch(
        dtype="",
        bound=bound,
        operations=tuple(units),
        kept=tuple(unit for unit in units if unit in kept),
        kld=known(kept),
        rounded_kld=known(frozenset()),
        reached=known(kept) <= bound,
        steps=tuple(steps),
        evaluations=len(known.klds),
        method=method,
    )
