"""What comes of a request: its text piece by piece, the whole of it, and how long it took."""

import dataclasses
from dataclasses import fields
from typing import NamedTuple


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """A chosen token's log-probability under the model, and the likeliest ones', best first.

    They are the model's own: before bias, penalties, temperature and filters.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Completion:
    """What became of one request.

    Attributes:
        text: without control tokens and the stop token, cut before a stop string.
        tokens: every id the model chose, the stop token included.
        finish_reason: "stop" (a stop token or string), "length" (max_tokens or the context
            is used up) or "interrupted".
        prompt_tokens: ids in the prompt.
        logprobs: one entry a token, where asked for.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Timings:
    """Seconds and tokens of a run; compilation is counted apart.

    Attributes:
        prompt_tokens: of all prompts,
        shared_tokens: and how many of these were in the cache already.
        generated_tokens: of all answers.
        seconds: from the first prompt to the last token, compilation left out.
        first_token_seconds: from the first prompt to the first token, compilation included.
        compile_seconds: tracing, lowering and compiling.
        drafted_tokens: of drafts,
        accepted_tokens: and how many of these are in the answers.
    """

    prompt_tokens: int = 0
    shared_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
    first_token_seconds: float = 0.0
    compile_seconds: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def generation_rate(self) -> float:
        """Tokens generated a second, prompts included in the time."""
        return self.generated_tokens / max(self.seconds, 1e-9)

    def __add__(self, other: "Timings") -> "Timings":
        """Of both; the first token is the first one's."""
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        first = self.first_token_seconds or other.first_token_seconds
        return Timings(**sums | {"first_token_seconds": first})


class StreamedText(str):
    """A piece of a text as it comes.

    Attributes:
        tokens: the ids it was made of. Those of a character that is not complete, or of what may
            become a stop string, come with the piece that shows it.
        logprobs: of these, where asked for.
        finish_reason: of the last piece, whose text may be empty: see `Completion`.
    """

    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: str | None = None


class Piece(NamedTuple):
    """New text of the request of this number, from 0; its completion with the last piece."""

    number: int
    text: StreamedText
    completion: Completion | None
