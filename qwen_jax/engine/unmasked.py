"""Answers under a constraint that are chosen without masks, and checked afterwards.

Where a token that was chosen out of all is allowed, it is the one that a mask would have left: it
has the largest score of all, and so of those allowed, under the same noise. A model that keeps to
its form by itself needs no masks then. Its texts run like free ones, in calls of several steps,
and the host reads along, which takes a microsecond a token and not hundreds. The first token that
isn't allowed ends that: what came after it is thrown away, the text goes back to where it was,
and is held by masks again, until it has been seen to need none.
"""

import dataclasses

from qwen_jax.engine.sampling import Sampling, has_penalties

WORTH = 16
"""Tokens that are to be expected until one isn't allowed. It throws away what its call had to come
and the call after, up to 15 steps of one row on a GPU; held, a row waits for 64 masks each step,
which take twice to nine times as long as a step without (benchmarks/results/constraints.md)."""
FADES = 4096
"""Tokens after which what is known of a form counts half."""
FIRST_WAIT, LONGEST_WAIT = 8, 512
"""Tokens, all as they would have been without a mask, that a text has to show after its first
return, and at most: twice as many each time."""


def may_be(sampling: Sampling) -> bool:
    """Whether a row's choice of all tokens is, where allowed, that of the allowed ones. Filters
    keep other tokens when there are fewer to choose among; and what penalties have counted can't
    be taken back."""
    filters = sampling.top_k, sampling.top_p, sampling.min_p
    return filters == (0, 1, 0) and not has_penalties(sampling)


@dataclasses.dataclass
class Agreement:
    """How often texts of one form would have kept to it by themselves.

    Attributes:
        tokens: that were seen, of late.
        disagreed: of them, those that were not what the model would have chosen of all.
    """

    tokens: float = 0.0
    disagreed: float = 0.0

    def saw(self, tokens: int, disagreed: int) -> None:
        self.tokens += tokens
        self.disagreed += disagreed
        if self.tokens > FADES:
            self.tokens, self.disagreed = self.tokens / 2, self.disagreed / 2

    @property
    def run(self) -> float:
        """Tokens to be expected until the next that disagrees; few where little is known."""
        return (self.tokens + 1) / (self.disagreed + 1)


class Trust:
    """Whether one text is held by masks.

    Attributes:
        masked: it is, and whoever makes its steps next has to know.
        leaving: it is about to be let go: no step with masks is to begin any more.
        returns: how often it has gone back.
    """

    def __init__(self, agreement: Agreement):
        self._agreement = agreement
        self.masked, self.leaving, self.returns = True, False, 0
        self._agreed, self._needed = 0, 0

    def chose(self, alone: bool) -> None:
        """A token was chosen with a mask.

        Args:
            alone: it is what would have been chosen without.
        """
        self._agreement.saw(1, not alone)
        self._agreed = self._agreed + 1 if alone else 0
        if self._agreed >= self._needed and self._agreement.run >= WORTH:
            self.leaving = True

    def let_go(self) -> None:
        """No step with masks is under way any more."""
        self.masked = self.leaving = False

    def kept(self, allowed: int) -> None:
        """So many tokens were chosen without masks, all of them allowed."""
        self._agreement.saw(allowed, 0)

    def went_back(self, allowed: int) -> None:
        """The token after so many was not."""
        self._agreement.saw(allowed + 1, 1)
        self.masked = True
        self.returns += 1
        self._agreed, self._needed = 0, min(max(FIRST_WAIT, 2 * self._needed), LONGEST_WAIT)
