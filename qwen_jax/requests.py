"""What is asked: a prompt's ids, and how to answer it."""

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from qwen_jax.arguments import check_fields
from qwen_jax.choices import check_max_tokens, check_top_logprobs
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.sampling import Sampling, check_bias
from qwen_jax.errors import UserError
from qwen_jax.text.constraint import Constraint
from qwen_jax.text.matching import Matcher
from qwen_jax.text.streaming import stops_of
from qwen_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt's ids, and how to answer it.

    Attributes:
        tokens: the prompt's ids.
        max_tokens: the most tokens to generate.
        sampling: how tokens are chosen.
        stop: a string that ends the text, or several, control tokens included; they are cut off.
        stop_ids: ids that end the text, besides those of the model; they are not shown.
        top_logprobs: None for no log-probabilities, else how many of the likeliest to keep.
        constraint: what all of the text must be, as far as max_tokens reach.
    """

    tokens: Sequence[int]
    max_tokens: int = 256
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    stop: Sequence[str] = ()
    stop_ids: Sequence[int] = ()
    top_logprobs: int | None = None
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        # What can be gone through once would stop nobody after it was checked.
        if isinstance(self.stop_ids, Iterator):
            object.__setattr__(self, "stop_ids", tuple(self.stop_ids))
        object.__setattr__(self, "stop", stops_of(self.stop))
        check_fields(self)
        check_max_tokens(self.max_tokens)
        check_top_logprobs(self.top_logprobs)

    def reseeded(self, seed: int) -> "Request":
        """The same with another seed. What is checked is not checked again, for each sample."""
        found, sampling = copy.copy(self), copy.copy(self.sampling)
        object.__setattr__(sampling, "seed", seed)
        object.__setattr__(found, "sampling", sampling)
        return found


def check_fits(request: Request, engine: Engine, tokenizer: Tokenizer) -> None:
    """Raises UserError where a stop id or a biased one is no token of the model, more
    log-probabilities are asked for than it has tokens, or nothing can be held to the constraint."""
    vocabulary, source = tokenizer.vocab_size, engine.config.source
    for token in request.stop_ids:
        if not 0 <= token < vocabulary:
            raise UserError(
                f"stop_ids holds {token!r:.40}, but token ids are 0 to {vocabulary - 1}.",
                field="stop_ids",
            )
    if request.top_logprobs is not None and request.top_logprobs > vocabulary:
        raise UserError(
            f"top_logprobs is {request.top_logprobs!r:.40}, but it must be from 0 to the "
            f"{vocabulary} tokens of {source}.",
            field="top_logprobs",
        )
    check_bias(request.sampling, engine.config.vocab_size)
    if request.constraint is not None:
        Matcher(request.constraint, tokenizer)


def reseeded(requests: Iterable[Request], first: int = 0) -> Iterator[Request]:
    """The requests with row i's seed raised by first + i, so that no two rows draw alike."""
    for i, request in enumerate(requests, start=first):
        yield request.reseeded((request.sampling.seed + i) % 2**32)
