"""What the types of a quantised file cost, tensor by tensor, and which tensor deserves more bits.

What a tensor costs is measured twice: in the base, where it alone is quantised, and in the file,
where it alone is not. Errors of several tensors add up in some places and cancel in others, so that
neither sums to the whole; both sums are told, and what is left is interaction.
"""

import collections
from collections.abc import Callable, Collection, Iterable, Sequence

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from qwen_jax.accuracy.distribution.comparison import Estimate, mean
from qwen_jax.accuracy.finding import Progress
from qwen_jax.accuracy.measures.residuals import relative_error
from qwen_jax.accuracy.quantisation.costs import Cost, Quantisation, Upgrade, ranked, sums
from qwen_jax.accuracy.quantisation.outputs import output_errors
from qwen_jax.accuracy.quantisation.pairs import Pair, check_same_weights, pairs
from qwen_jax.accuracy.quantisation.sweep import Said, Sweep
from qwen_jax.accuracy.quantisation.weights import FILE, Variant
from qwen_jax.errors import UserError
from qwen_jax.weights.checkpoint import Checkpoint
from qwen_jax.weights.encoding import TYPES, whole

UPGRADES = ("Q6_K", "Q8_0")
PASSES = 400
FEWEST = 16
"""Tokens of a text, below which no standard error means anything."""


def look(
    file: Checkpoint,
    base: Checkpoint,
    tokens: Sequence[int],
    *,
    upgrades: Sequence[str] = UPGRADES,
    passes: int = PASSES,
    implementation: str = "auto",
    progress: Progress | None = None,
) -> Quantisation:
    """Measures a file's types against its base, all arithmetic in float32.

    Args:
        file, base: open checkpoints of one model; the base in more bits.
        tokens: of the text, T of them.
        upgrades: GGUF types to which tensors of fewer bits are moved up, one at a time.
        passes: forward passes of the text to take at most. Kinds and layers are always measured;
            single tensors from the one that these promise most, as far as the passes go.
        implementation: of the model's operations, as for `qwen_jax.load`.
        progress: hears of steps done and in all, of one stage after the other.

    Raises:
        UserError: the base is of another model, of other weights or coarser, the file is not
            quantised, a type is unknown, the text too short or too long, or a value not finite.
    """
    check_upgrades(upgrades)
    check_passes(passes)
    _check_text(file, tokens)
    every = pairs(file, base)
    weight_errors = _weight_errors(every, progress)
    check_same_weights(file, base, every, weight_errors)
    differing = [pair for pair in every if weight_errors[pair.name]]
    sweep = Sweep(file.config, every, tokens, implementation)
    said: dict[Variant, Said] = {}
    kinds = _grouped(differing, lambda pair: pair.kind)
    layers = _grouped([pair for pair in differing if pair.layer is not None], _layer_of)
    groups = [*kinds.values(), *layers.values()]
    errors = output_errors(sweep, progress) if differing else {}
    said |= sweep.run([v for group in groups for v in _both(group)], progress)
    lens = _Lens(said, weight_errors, errors)
    moves = _moves(differing, [Type[name] for name in upgrades])
    left = passes - sweep.passes(said)
    chosen: list[Variant] = []
    for pair in lens.promising(differing, kinds, layers):
        wanted = [v for v in (*_both([pair]), *moves[pair.name]) if v not in said]
        left -= sweep.passes(wanted)
        if left < 0:
            break
        chosen += wanted
    if chosen:
        said |= sweep.run(chosen, progress)
    tensors = tuple(lens.cost(pair.name, [pair]) for pair in differing)
    of_kinds, of_layers = (
        tuple(lens.cost(name, group) for name, group in grain.items()) for grain in (kinds, layers)
    )
    return Quantisation(
        file=str(file.path),
        base=str(base.path),
        tokens=len(tokens),
        total=mean(said[FILE].kld),
        same_top=float(said[FILE].same_top.mean()),
        bytes=sum(pair.bytes for pair in every),
        base_bytes=sum(pair.base_bytes for pair in every),
        same=len(every) - len(differing),
        tensors=tensors,
        kinds=of_kinds,
        layers=of_layers,
        sums=(sums("tensors", tensors), sums("kinds", of_kinds), sums("layers", of_layers)),
        upgrades=ranked(
            [
                lens.upgrade(pair, move)
                for pair in differing
                for move in moves[pair.name]
                if move in said
            ]
        ),
        passes=sweep.passes(said),
    )


class _Lens:
    """What variants said, as costs."""

    def __init__(
        self,
        said: dict[Variant, Said],
        weight_errors: dict[str, float],
        output_errors: dict[str, float],
    ):
        self.said, self.weight_errors, self.output_errors = said, weight_errors, output_errors

    def alone(self, group: Collection[Pair]) -> Estimate | None:
        found = self.said.get(Variant(True, _names(group)))
        return mean(found.kld) if found else None

    def saved(self, variant: Variant) -> Estimate | None:
        """What a change to the file saves, position by position, so that its error is its own."""
        found = self.said.get(variant)
        return mean(self.said[FILE].kld - found.kld) if found else None

    def cost(self, name: str, group: Sequence[Pair]) -> Cost:
        size = sum(pair.bytes for pair in group)
        by_type: collections.Counter[str] = collections.Counter()
        for pair in group:
            by_type[pair.file.kind] += pair.bytes
        outputs = [self.output_errors[p.name] for p in group if p.name in self.output_errors]
        return Cost(
            name=name,
            types=tuple(kind for kind, _ in by_type.most_common()),
            bytes=size,
            bits=8 * size / sum(pair.size for pair in group),
            weight_error=max(self.weight_errors[pair.name] for pair in group),
            output_error=max(outputs, default=None),
            alone=self.alone(group),
            saved=self.saved(Variant(False, _names(group))),
        )

    def upgrade(self, pair: Pair, move: Variant) -> Upgrade:
        assert move.type is not None
        more = _bytes(pair, move.type) - pair.bytes
        saved = self.saved(move)
        assert saved is not None
        return Upgrade(pair.name, (pair.file.kind, move.type.name), more, saved)

    def promising(
        self,
        pairs: Sequence[Pair],
        kinds: dict[str, list[Pair]],
        layers: dict[str, list[Pair]],
    ) -> list[Pair]:
        """Those first of whose kind and layer most is saved."""

        def promise(pair: Pair) -> float:
            groups = [kinds[pair.kind], *filter(None, [layers.get(_layer_of(pair))])]
            values = [self.saved(Variant(False, _names(group))) for group in groups]
            return float(np.prod([max(value.value, 0.0) for value in values if value]))

        return sorted(pairs, key=promise, reverse=True)


def check_upgrades(types: Sequence[str]) -> None:
    """Raises UserError where one is no type that can be written."""
    for name in types:
        if name not in TYPES:
            raise UserError(
                f"compare.upgrades has {name!r:.40}, but the types are {', '.join(TYPES)}."
            )


def check_passes(passes: int) -> None:
    """Raises UserError where no pass is left to take."""
    if passes < 1:
        raise UserError(f"compare.passes is {passes}, but it must be at least 1.")


def _check_text(file: Checkpoint, tokens: Sequence[int]) -> None:
    if not FEWEST <= len(tokens) <= file.config.context_length:
        raise UserError(
            f"The text has {len(tokens)} tokens, but the part quantisation takes {FEWEST} to "
            f"{file.config.context_length}, the context of {file.path}."
        )


def _weight_errors(every: Sequence[Pair], progress: Progress | None) -> dict[str, float]:
    found = {}
    for done, pair in enumerate(every, 1):
        found[pair.name] = relative_error(pair.values(base=False), pair.values(base=True))
        if progress:
            progress(done, len(every))
    return found


def _grouped(every: Iterable[Pair], name: Callable[[Pair], str]) -> dict[str, list[Pair]]:
    found: dict[str, list[Pair]] = {}
    for pair in every:
        found.setdefault(name(pair), []).append(pair)
    return found


def _layer_of(pair: Pair) -> str:
    return f"layer {pair.layer}"


def _names(group: Iterable[Pair]) -> frozenset[str]:
    return frozenset(pair.name for pair in group)


def _both(group: Sequence[Pair]) -> tuple[Variant, Variant]:
    """Quantised alone, and alone not."""
    return Variant(True, _names(group)), Variant(False, _names(group))


def _moves(every: Sequence[Pair], types: Sequence[Type]) -> dict[str, list[Variant]]:
    """Of each tensor: the types of more bits that it can be moved up to, and the base has."""
    return {
        pair.name: [
            Variant(False, _names([pair]), kind)
            for kind in types
            if len(pair.shape) > 1
            and whole(pair.shape[-1], kind)
            and pair.bytes < _bytes(pair, kind) <= pair.base_bytes
        ]
        for pair in every
    }


def _bytes(pair: Pair, kind: Type) -> int:
    """That a tensor takes in a type."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return pair.size // block * size
