"""What a scheduler is asked for, and what it tells."""

import dataclasses
import functools
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import UInt32

from qwen_jax.engine.pool import page_keys
from qwen_jax.engine.sampling import Sampling
from qwen_jax.engine.unmasked import Trust

if TYPE_CHECKING:
    from qwen_jax.engine.drafts import Record
    from qwen_jax.engine.steps import Scored

NO_SLOT = -1


class Constraint(Protocol):
    """Which tokens of a text may come next."""

    @property
    def form(self) -> Hashable:
        """One object of all constraints that hold texts to the same."""

    @property
    def forced(self) -> Sequence[int]:
        """Those that must come next, the first of which the mask that was made last allows alone;
        none where there is a choice."""

    @staticmethod
    def fill(constraints: Sequence[Any], masks: UInt32[np.ndarray, "B words"]) -> list[str | None]:
        """Makes the row of each of some constraints of this kind the bits of what may come next,
        tokens that end the text included; None leaves its row. Returns of each why it can't, or
        None."""

    @staticmethod
    def take(constraints: Sequence[Any], tokens: Sequence[Sequence[int]]) -> None:
        """Each goes on behind tokens that were chosen."""

    def follow(self, tokens: Sequence[int]) -> int:
        """Goes on behind as many of these as may come, one after another, those that end the text
        included; returns how many that are."""


@dataclasses.dataclass(eq=False)
class Text:
    """One text's work: tokens to go on from, or tokens to be scored.

    Attributes:
        tokens: its ids, at least one.
        limit: tokens to generate at most; 0 only where it is scored.
        sampling: how they are chosen.
        top: None for no log-probabilities, else how many of the likeliest to report.
        score_from: the first position whose token is scored, given all before it; None where the
            text is to be continued.
        constraint: what its tokens are held to.
    """

    tokens: Sequence[int]
    limit: int = 0
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    top: int | None = None
    score_from: int | None = None
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        self.pages: list[int] = []
        self.shared_tokens = 0
        self.slot = NO_SLOT
        self.given = 0  # tokens that were told of
        self.expected = 0  # tokens there may be after the calls that are under way
        self.row = np.zeros(0, np.int32)  # of `rows.Rows`
        self.last = self.tokens[-1]  # that was told of, or of the prompt
        self.jump: list[int] = []  # tokens that are known, behind the one that is being chosen
        self.over = False
        self.record: Record | None = None  # of drafts, where there may be any
        self.trust: Trust | None = None  # where it may be let go by its constraint's masks

    @property
    def masked(self) -> bool:
        """Whether its tokens are chosen among those that its constraint allows."""
        return self.constraint is not None and (self.trust is None or self.trust.masked)

    @property
    def entering(self) -> int:
        """Tokens that `extend` puts into the cache: the last one is a step's, or only scored."""
        return len(self.tokens) - 1

    @functools.cached_property
    def keys(self) -> list[bytes]:
        """Of the full pages of what enters: found once, however long the text waits in line."""
        return list(page_keys(self.tokens[: self.entering]))


class News(NamedTuple):
    """What has become of a text since the last news of it.

    Attributes:
        tokens: new ones, the one that ends it included.
        logprobs: of each, where asked for.
        scores: of the tokens to be scored, on the host.
        over: nothing more comes.
        error: why it can't go on; the others do.
    """

    text: Text
    tokens: list[int]
    logprobs: list[tuple[float, list[tuple[int, float]]]] | None
    scores: "Scored | None"
    over: bool
    error: str | None = None
