"""What a lens found: the cost of every tensor, kind and layer, and what more bits would save."""

import dataclasses
from collections.abc import Sequence

from qwen_jax.accuracy.distribution.comparison import Estimate

TOLD = 2.0
"""Standard errors that a saving must be above 0 to be told from it."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one tensor, of all of one kind, or of a layer; KL in nats a token.

    Attributes:
        name: the tensor's, or its kind's or layer's.
        types: in which the file has it, the largest share of bytes first.
        bytes: that the file spends on it,
        bits: and bits a value.
        weight_error: RMS of the weights' error over that of the weights; of several, the largest.
        output_error: the same of the products with the base's own activations; None of vectors.
        alone: KL of the base with this one quantised; None where it was not measured.
        saved: KL that the file loses once this one is the base's; None likewise.
    """

    name: str
    types: tuple[str, ...]
    bytes: int
    bits: float
    weight_error: float
    output_error: float | None
    alone: Estimate | None
    saved: Estimate | None


@dataclasses.dataclass(frozen=True)
class Upgrade:
    """A tensor moved up to a type of more bits, all others as the file has them.

    Attributes:
        tensor, types: which, and the type that it has and the one that it gets.
        bytes: that it takes more.
        saved: KL that the file loses, in nats a token.
    """

    tensor: str
    types: tuple[str, str]
    bytes: int
    saved: Estimate

    @property
    def per_megabyte(self) -> float:
        """KL saved by 10^6 bytes."""
        return self.saved.value / self.bytes * 1e6

    @property
    def told(self) -> bool:
        """Whether the saving is more than chance."""
        return self.saved.value > TOLD * self.saved.error


@dataclasses.dataclass(frozen=True)
class Sums:
    """What single changes of one grain come to, beside the whole.

    Attributes:
        grain: "tensors", "kinds" or "layers".
        measured: how many of them were,
        of: of those that differ.
        alone: the sum of their KL alone,
        saved: and of what each saves; the rest of the total is interaction.
    """

    grain: str
    measured: int
    of: int
    alone: float
    saved: float


@dataclasses.dataclass(frozen=True)
class Quantisation:
    """What the types of a file cost, on one text.

    Attributes:
        file, base: the two.
        tokens: of the text.
        total: KL(base || file), in nats a token.
        same_top: share of positions with the same likeliest token.
        bytes, base_bytes: of all tensors.
        same: tensors that are the base's value for value.
        tensors: those that differ, as a forward pass meets them; likewise
        kinds, layers: theirs.
        sums: of each grain.
        upgrades: from the most KL saved a byte to the least; behind them those not told from 0.
        passes: forward passes of the text that all took.
    """

    file: str
    base: str
    tokens: int
    total: Estimate
    same_top: float
    bytes: int
    base_bytes: int
    same: int
    tensors: tuple[Cost, ...]
    kinds: tuple[Cost, ...]
    layers: tuple[Cost, ...]
    sums: tuple[Sums, ...]
    upgrades: tuple[Upgrade, ...]
    passes: float


def sums(grain: str, costs: Sequence[Cost]) -> Sums:
    """Of those that were measured."""
    pairs = [(cost.alone, cost.saved) for cost in costs if cost.alone and cost.saved]
    return Sums(
        grain,
        len(pairs),
        len(costs),
        sum(alone.value for alone, _ in pairs),
        sum(saved.value for _, saved in pairs),
    )


def ranked(upgrades: Sequence[Upgrade]) -> tuple[Upgrade, ...]:
    """By the KL saved a byte, those told from 0 first."""
    return tuple(sorted(upgrades, key=lambda up: (not up.told, -up.per_megabyte)))
