"""What a certificate says; docs/certificate.md says what that proves."""

import dataclasses
import json
import math
from typing import Any, Literal

VERSION = 3

Verdict = Literal["certified", "cause", "unexplained"]

ASSUMPTIONS = {
    "same_weights": "every engine computed with the checkpoint's weights, rounded to its dtype",
    "same_text": "every engine computed the token ids that are listed",
    "true_dump": "what was dumped is what the engine's later operations read",
    "declared_arithmetic": "dtypes, operands and precision are those that each engine declares",
    "float32_sums": "sums are accumulated in float32 or wider, in an order that is not adversarial",
    "random_roundings": "roundings within one sum behave as independent and of mean zero",
    "first_order": "through operations that were not recorded, errors pass to first order",
}
"""Names and what they mean: where one does not hold, nothing is proved."""

ASSUMPTIONS_OF_LOGS = {
    name: meaning for name, meaning in ASSUMPTIONS.items() if name != "true_dump"
} | {"true_log": "what was logged are log-probabilities of the model's own distribution"}


@dataclasses.dataclass(frozen=True)
class Judged:
    """A recorded tensor, held against float64 from what the engine had before it.

    Attributes:
        position: of the text, where the largest fraction is; of a fault, the first wrong one.
        fraction: the largest error over its bound.
        resolution: the RMS of the bound over that of the tensor: what is smaller may hide in it.
            Of a log the largest bound, in nats.
        together: operations computed through to it, where tensors between were not recorded.
        values: how many numbers it has.
    """

    tensor: str
    layer: int | None
    position: int
    fraction: float
    resolution: float
    together: tuple[str, ...]
    values: int
    dtype: str


@dataclasses.dataclass(frozen=True)
class NotCovered:
    """What the dump says nothing about.

    Attributes:
        operations: by their tensors' names.
        positions: ranges of the text, the last of each excluded.
        tensors: recorded ones that could not be judged, and why.
    """

    operations: tuple[str, ...]
    positions: tuple[tuple[int, int], ...]
    tensors: dict[str, str]

    def __bool__(self) -> bool:
        return bool(self.operations or self.positions or self.tensors)


@dataclasses.dataclass(frozen=True)
class Named:
    """A cause, proved by planting it: the numbers are the error over its bound without and with."""

    name: str
    line: str
    operations: tuple[str, ...]
    layers: tuple[int | None, ...]
    before: float
    after: float
    together: tuple[str, ...]
    ties: tuple[tuple[str, ...], ...]
    against: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Engine:
    """One engine against float64.

    Attributes:
        dump: the file or directory, as its user named it.
        tokens: ids of its text.
        declared: its arithmetic, by its own account.
        values: how many numbers were judged.
        largest: the tensor that comes closest to its bound, or goes furthest past it.
        coarsest: the one with the coarsest bound.
        first: the first tensor that is wrong in itself.
        unexplained: tensors wrong in themselves that no cause explains.
        not_told: of a log that is certified, causes that fit it as well as none, and the most that
            each moves one of its values, in nats.
    """

    dump: str
    tokens: tuple[int, ...]
    declared: dict[str, Any]
    values: int
    largest: Judged
    coarsest: Judged
    first: Judged | None
    causes: tuple[Named, ...]
    unexplained: tuple[Judged, ...]
    not_covered: NotCovered
    tensors: tuple[Judged, ...]
    not_told: dict[str, float]

    @property
    def verdict(self) -> Verdict:
        if self.first is None:
            return "certified"
        return "unexplained" if self.unexplained else "cause"


@dataclasses.dataclass(frozen=True)
class Difference:
    """Between two engines' logits at the positions that both recorded.

    Attributes:
        positions: of the text, the last excluded.
        largest: of all logits.
        mean_kld: KL(second || first) in nats.
        same_top: the share of positions with the same likeliest token.
    """

    positions: tuple[int, int]
    largest: float
    mean_kld: float
    max_kld: float
    same_top: float


@dataclasses.dataclass(frozen=True)
class Parting:
    """Where two engines' texts part.

    Attributes:
        position: in the text, of the first token that differs.
        tokens: the two.
        apart: their logits, by the model in float64.
        bound: by how much rounding may move these against each other.
    """

    text: str
    position: int
    tokens: tuple[int, int]
    apart: float
    bound: float


@dataclasses.dataclass(frozen=True)
class LogDifference:
    """Between two logs.

    Attributes:
        texts: of the same ids in both.
        values: log-probabilities that both have.
        largest, rms: of these, in nats.
        parted: texts of other ids,
        parting: and the first of those of one prompt.
    """

    texts: int
    values: int
    largest: float
    rms: float
    parted: int
    parting: Parting | None


@dataclasses.dataclass(frozen=True)
class Input:
    """A file that was read; `of` says whose: "checkpoint", "adapter 1", "engine 1"."""

    of: str
    file: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class Certificate:
    """A verdict, the numbers it rests on, and what they were computed from.

    Attributes:
        version: of this format.
        of: "dumps" or "logs".
        verdict: "certified" where every engine is within its bounds; "cause" where all that is not
            has a cause; else "unexplained".
        model, adapters: the checkpoint, as its user named it, and its adapters.
        tokens: ids that were given, where a dump didn't say them.
        dtype: that was given, where a log didn't say it.
        difference: of two engines that both recorded logits, or of two logs.
        versions: of what computed this.
    """

    version: int
    of: str
    verdict: Verdict
    engines: tuple[Engine, ...]
    difference: Difference | LogDifference | None
    model: str
    adapters: tuple[str, ...]
    tokens: tuple[int, ...] | None
    dtype: str | None
    inputs: tuple[Input, ...]
    assumptions: dict[str, str]
    versions: dict[str, str]

    @property
    def certified(self) -> bool:
        return self.verdict == "certified"

    def to_json(self) -> str:
        """For a file; infinities and NaN are text."""
        return json.dumps(_plain(dataclasses.asdict(self)), indent=1, allow_nan=False) + "\n"


def _plain(x: Any) -> Any:
    if isinstance(x, dict):
        return {name: _plain(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(value) for value in x]
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x


def overall(engines: tuple[Engine, ...]) -> Verdict:
    """The one verdict for all of them: an error without a cause outweighs one that has it."""
    found = {engine.verdict for engine in engines}
    order: tuple[Verdict, ...] = ("unexplained", "cause", "certified")
    return next(verdict for verdict in order if verdict in found)
