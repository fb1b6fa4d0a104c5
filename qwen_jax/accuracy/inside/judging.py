"""Every operation of a recorded step again in float64, from what the kernel had before it."""

import dataclasses
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from pallas_kernels.decode_step import Packed, StepPlan
from pallas_kernels.decode_step.common.attention import SLOTS_ALONE
from pallas_kernels.decode_step.inside import Inside
from pallas_kernels.decode_step.packed.plan import DOWN, GATE_UP, HEAD, O_PROJ, QKV
from pallas_kernels.decode_step.ptx.formats import FORMATS
from qwen_jax.accuracy.exact.bounds import LEAST as SMALLEST
from qwen_jax.accuracy.exact.bounds import SECOND_ORDER, U32
from qwen_jax.accuracy.exact.operations import Calls, Context, full_name
from qwen_jax.accuracy.exact.replay import Residual, compare
from qwen_jax.accuracy.exact.rounding import UNIT
from qwen_jax.accuracy.inside.bounds import (
    FLAG,
    KEPT,
    LEAST,
    Declared,
    Valued,
    attended,
    gated,
    norm,
    normed_product,
    product,
    rotated,
)
from qwen_jax.accuracy.inside.held import Matrix, matrix
from qwen_jax.config import ModelConfig

Array = np.ndarray
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class RecordedStep:
    """One step of a kernel: what went in, what it kept, what came out.

    Attributes:
        few: whether the kernel of few rows ran.
        pages, tables: keys and values of earlier positions, as `decode_step` takes them.
    """

    few: bool
    hidden: Float[np.ndarray, "B D"]
    pages: Float[Any, "2L P K C H"]
    tables: Int[np.ndarray, "B n"]
    position: Int[np.ndarray, "B"]
    logits: Float[np.ndarray, "B V"]
    new: Float[np.ndarray, "2L B K H"]
    inside: Inside

    @property
    def rows(self) -> int:
        return len(self.position)

    @property
    def kernel(self) -> str:
        return "few rows" if self.few else "many rows"


@dataclasses.dataclass(frozen=True)
class InsideFinding:
    """One operation of one layer in one step, and its own error.

    Attributes:
        rows: of the step.
        kernel: "few rows" or "many rows".
        operation: by its tensor's canonical name, or `v_cache`, the values that are kept.
        layer: None outside of the layers.
        residual: of the kernel's tensor from float64.
        row: of the largest error over its bound.
        span: operations computed at once, the last one this one.
    """

    rows: int
    kernel: str
    operation: str
    layer: int | None
    residual: Residual
    row: int
    span: tuple[str, ...]

    @property
    def name(self) -> str:
        return full_name(self.operation, self.layer)

    @property
    def verdict(self) -> str:
        return "within rounding" if self.residual.within else "fault"


def judge(
    steps: Sequence[RecordedStep],
    packed: Packed,
    plan: StepPlan,
    config: ModelConfig,
    layers: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> list[InsideFinding]:
    """Every operation of some steps; weights are read a matrix at a time, for all of them.

    Args:
        layers: all by default. Embeddings and logits are judged in any case.
        progress: hears of layers done and in all.
    """
    every = [_Step(step, packed, plan, config) for step in steps]
    chosen = range(plan.shape.layers) if layers is None else layers
    found: list[InsideFinding] = []

    def weights(phase: int, layer: int) -> dict[bool, Matrix]:
        if {step.few for step in steps} == {True}:
            return {True: matrix(packed, plan, phase, layer, few=True)}
        many = matrix(packed, plan, phase, layer, few=False)
        # Weights that are numbers are the same for both.
        both = many.rounding is not None and any(step.few for step in steps)
        few = matrix(packed, plan, phase, layer, few=True) if both else many
        return {True: few, False: many}

    for one in every:
        found += one.embed()
    for done, layer in enumerate(chosen, 1):
        for phase in range(HEAD):
            held = weights(phase, layer)
            for one in every:
                judged = (one.attention, one.o_proj, one.gate_up, one.down)[phase]
                found += judged(layer, held[one.step.few])
        if progress:
            progress(done, len(chosen) + 1)
    held = weights(HEAD, 0)
    for one in every:
        found += one.head(held[one.step.few])
    if progress:
        progress(len(chosen) + 1, len(chosen) + 1)
    return found


class _Step:
    """A recorded step's operations; each method yields the findings of one phase of a layer."""

    def __init__(self, step: RecordedStep, packed: Packed, plan: StepPlan, config: ModelConfig):
        self.step, self.plan, self.inside = step, plan, step.inside
        self.declared = Declared(plan, step.few, np.dtype(step.new.dtype).name)
        position = np.asarray(step.position)
        calls = Calls(position, position, position + 1)
        self.ctx = Context(config, calls, np.zeros(step.rows, int))
        self.norms = np.asarray(packed.norms, np.float64)
        self.bias = np.asarray(packed.bias, np.float64)

    def embed(self) -> Iterator[InsideFinding]:
        right = self.step.hidden.astype(np.float64)
        expected = Valued(right, self.declared.flag * np.abs(right))
        yield self._finding("embed", None, self.inside.hidden[0], expected, ())

    def attention(self, layer: int, weights: Matrix) -> Iterator[InsideFinding]:
        """Up to attention's results."""
        step, shape, rows = self.step, self.plan.shape, self.step.rows
        x, normed = yield from self._normed("attn_norm", layer, self.inside.hidden[layer])
        y = normed_product(x, weights, self._kept(QKV), self.bias[layer])
        y = y.plus(FLAG * np.abs(y.value))
        ends = np.cumsum([shape.heads, shape.kv_heads, shape.kv_heads]) * shape.head_dim
        cut = [
            np.split(part, ends[:-1], axis=1) for part in (y.value, y.limit, self.inside.qkv[layer])
        ]
        recorded: dict[str, Array] = {}
        for name, right, limit, found in zip("qkv", *cut, strict=True):
            yield self._finding(f"{name}_proj", layer, found, Valued(right, limit), normed)
            recorded[name] = found.astype(np.float64).reshape(rows, -1, shape.head_dim)
        keys, values = (step.new[n * shape.layers + layer] for n in range(2))
        cache = self.declared.cache
        for name, found in (("q", self.inside.queries[layer]), ("k", keys)):
            expected = rotated(f"{name}_rope", self.ctx, recorded[name], cache)
            yield self._finding(f"{name}_rope", layer, found, expected, ())
        expected = Valued.exactly(recorded["v"]).rounded(cache)
        yield self._finding("v_cache", layer, values, expected, ())
        attended_to = [self._attended(layer, row, keys[row], values[row]) for row in range(rows)]
        expected = Valued(*(np.concatenate(each) for each in zip(*attended_to, strict=True)))
        expected = self._exchanged(expected, O_PROJ)
        span = ("attn_scores", "attn_probs")
        yield self._finding("attn_out", layer, self.inside.attn_out[layer], expected, span)

    def _attended(self, layer: int, row: int, key: Array, value: Array) -> Valued:
        step, shape, position = self.step, self.plan.shape, int(self.step.position[row])
        slots = step.pages.shape[3]
        mine = step.tables[row, : -(-position // slots)]

        def all_of(first: int, own: Array) -> Array:
            """`[S, K, H]`, from pages `[n, K, C, H]` and the step's own."""
            pages = np.asarray(step.pages[first, mine]).astype(np.float64)
            before = pages.swapaxes(1, 2).reshape(-1, *own.shape)[:position]
            return np.concatenate([before, own[None].astype(np.float64)])

        at = np.array([position])
        ctx = dataclasses.replace(self.ctx, calls=Calls(at, at, at + 1), tokens=np.zeros(1, int))
        return attended(
            ctx,
            self.inside.queries[layer, row][None].astype(np.float64),
            all_of(layer, key),
            all_of(shape.layers + layer, value),
            self.declared.cache,
            position > SLOTS_ALONE,
        )

    def o_proj(self, layer: int, weights: Matrix) -> Iterator[InsideFinding]:
        """Attention's results and the hidden state."""
        y = product(Valued.exactly(self.inside.attn_out[layer]), weights, self._kept(O_PROJ))
        expected = self._added(self.inside.hidden[layer], y.plus(2 * U32 * np.abs(y.value)))
        found = self.inside.attn_residual[layer]
        yield self._finding("attn_residual", layer, found, expected, ("o_proj",))

    def gate_up(self, layer: int, weights: Matrix) -> Iterator[InsideFinding]:
        """Up to their product."""
        before, ffn = self.inside.attn_residual[layer], self.plan.shape.ffn
        x, normed = yield from self._normed("ffn_norm", layer, before)
        y = normed_product(x, weights, self._kept(GATE_UP))
        gate, up = y.columns(0, ffn), y.columns(ffn, 2 * ffn)
        expected = self._exchanged(gated(self.ctx, gate, up), DOWN)
        span = (*normed, "gate_proj", "up_proj")
        yield self._finding("ffn_act", layer, self.inside.ffn_act[layer], expected, span)

    def down(self, layer: int, weights: Matrix) -> Iterator[InsideFinding]:
        """Each part of the product, and the hidden state with all of them added."""
        x, parts = Valued.exactly(self.inside.ffn_act[layer]), self.inside.down_parts[layer]
        each = []
        for ends in itertools.pairwise(self.inside.part_columns):
            y = product(x.columns(*ends), weights.columns(*ends), self._kept(DOWN))
            each.append(y.plus((2 * U32 + FLAG) * np.abs(y.value)))
        expected = Valued(*(np.stack(all_of, axis=1) for all_of in zip(*each, strict=True)))
        yield self._finding("down_proj", layer, parts.swapaxes(0, 1), expected, ())
        before, sums = self.inside.attn_residual[layer], parts.astype(np.float64)
        # One part after another is added.
        sizes = np.abs(before.astype(np.float64)) + np.abs(sums).sum(0)
        right = self._added(before, Valued(sums.sum(0), len(sums) * U32 * sizes))
        yield self._finding("ffn_residual", layer, self.inside.hidden[layer + 1], right, ())

    def head(self, weights: Matrix) -> Iterator[InsideFinding]:
        """The logits."""
        x, normed = yield from self._normed("final_norm", None, self.inside.hidden[-1])
        expected = normed_product(x, weights, self._kept(HEAD))
        yield self._finding("logits", None, self.step.logits, expected, normed)

    def _normed(
        self, name: str, layer: int | None, hidden: Array
    ) -> Generator[InsideFinding, None, tuple[Valued, tuple[str, ...]]]:
        """A product's input after a norm, and what was computed at once for it: what many rows take
        in is recorded, and judged; few rows make it where it is taken in."""
        index = -1 if layer is None else 2 * layer + (name == "ffn_norm")
        right = norm(name, self.ctx, hidden.astype(np.float64), self.norms[index])
        recorded = self.inside.normed
        if recorded is None:
            return right, (name,)
        scales = recorded.scales[index].astype(np.float64)[:, None]
        found = recorded.inputs[index].astype(np.float64) * scales
        format = self.declared.format(HEAD)  # that of all phases, where rows are many
        rounding = UNIT[format] * np.abs(right.value) + LEAST[format] * np.abs(scales)
        yield self._finding(name, layer, found, right.plus(rounding), ())
        return Valued.exactly(found), ()

    def _exchanged(self, x: Valued, phase: int) -> Valued:
        """As the next product's input."""
        if self.step.few:
            return x.plus((U32 + FLAG) * np.abs(x.value))
        format = self.declared.format(phase)
        return x.rounded(format, FORMATS[format].scale if phase == DOWN else 1.0)

    def _added(self, hidden: Array, what: Valued) -> Valued:
        """Added to the hidden state, in which there was no flag where a block did so."""
        before = hidden.astype(np.float64)
        after = before + what.value
        flags = self.declared.flag * (np.abs(before) + np.abs(after))
        return Valued(after, what.limit + flags + U32 * np.abs(after))

    def _kept(self, phase: int) -> tuple[float, float] | None:
        return KEPT[self.declared.format(phase)] if self.step.few else None

    def _finding(
        self, operation: str, layer: int | None, found: Array, right: Valued, span: tuple[str, ...]
    ) -> InsideFinding:
        limit = SECOND_ORDER * right.limit + SMALLEST
        residual = compare(
            found.astype(np.float64), right.value.reshape(found.shape), limit.reshape(found.shape)
        )
        row = residual.worst[0]
        return InsideFinding(
            self.step.rows, self.step.kernel, operation, layer, residual, row, (*span, operation)
        )
