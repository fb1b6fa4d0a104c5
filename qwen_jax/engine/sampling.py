"""How users say that tokens are to be chosen, and what a compiled step makes of it.

Order and meaning are those of Hugging Face transformers' logits processors: bias,
repetition penalty, temperature, top-k, top-p, min-p. Presence and frequency penalties,
which transformers lacks, come after the repetition penalty and follow the OpenAI API:
they count generated tokens only, while the repetition penalty sees the prompt too.
`pallas_kernels.sample_tokens` defines it, and does it.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels.sample_tokens import (
    MOST_LOGPROBS,
    Choice,
    Counts,
    Settings,
    sample_tokens,
    settings,
)
from pallas_kernels.sample_tokens.mosaic_gpu import MOST_TOP
from qwen_jax.engine.spec import Spec
from qwen_jax.errors import UserError

_LARGEST = 1e9
"""Of all numbers that scores are changed by, and the inverse of what they are divided by: so that
none overflows float32, whatever is asked together (see the test). A score of -inf that is allowed
would be no better than one that isn't."""


def is_whole(value: Any) -> bool:
    """Whether it is an integer, Python's or NumPy's; True and False are none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return is_whole(value) or isinstance(value, float | np.floating)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How one row chooses its tokens. Raises UserError where a value makes no sense.

    Attributes:
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep the k likeliest tokens (ties kept); 0 keeps all.
        top_p: keep the fewest likeliest tokens whose probability reaches p; 1 keeps all.
        min_p: drop tokens less likely than min_p times the likeliest; 0 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of tokens in
            the prompt or the text so far; 1 is off.
        presence_penalty: subtracted from the logit of every generated token; 0 is off.
        frequency_penalty: subtracted once for each time a token was generated; 0 is off.
        logit_bias: token id to a number added to its logit.
        seed: decides the text; the same seed gives the same text.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            whole, number = is_whole(value), _is_number(value)
            if (field.type is int and not whole) or (field.type is float and not number):
                kind = "a whole number" if field.type is int else "a number"
                text = f"sampling.{field.name} is {value!r}, but it must be {kind}."
                raise UserError(text, field=field.name)
        bias = self.logit_bias
        if not isinstance(bias, Mapping) or not (
            all(map(is_whole, bias)) and all(map(_is_number, bias.values()))
        ):
            raise UserError(
                f"sampling.logit_bias is {bias!r:.60}, but it must map token ids to numbers.",
                field="logit_bias",
            )
        within = f"from {-_LARGEST:g} to {_LARGEST:g}"
        checks = {
            "temperature": (
                self.temperature == 0 or 1 / _LARGEST <= self.temperature <= _LARGEST,
                f"0 (greedy) or from {1 / _LARGEST:g} to {_LARGEST:g}",
            ),
            "top_k": (0 <= self.top_k < 2**31, "from 0 (off) to 2147483647"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            "min_p": (0 <= self.min_p <= 1, "from 0 (off) to 1"),
            "repetition_penalty": (
                1 / _LARGEST <= self.repetition_penalty <= _LARGEST,
                f"from {1 / _LARGEST:g} to {_LARGEST:g}; 1 is off",
            ),
            "presence_penalty": (abs(self.presence_penalty) <= _LARGEST, within),
            "frequency_penalty": (abs(self.frequency_penalty) <= _LARGEST, within),
            "logit_bias": (
                all(abs(v) <= _LARGEST or v == -math.inf for v in self.logit_bias.values()),
                f"{within}, or -inf, which bans a token",
            ),
            "seed": (0 <= self.seed < 2**32, "from 0 to 4294967295"),
        }
        for name, (holds, allowed) in checks.items():
            if not holds:
                text = f"sampling.{name} is {getattr(self, name)}, but it must be {allowed}."
                raise UserError(text, field=name)


class Plan(NamedTuple):
    """What a compiled step contains. There are two, but for more log-probabilities than usual.

    Attributes:
        sampled: some row asks for more than its likeliest token; then any of them may ask for
            anything.
        top: room for so many of the likeliest tokens' log-probabilities; 0 where not sampled.
    """

    sampled: bool = False
    top: int = 0

    @classmethod
    def of(cls, asked: Iterable[tuple[Sampling, int | None]], vocab: int) -> "Plan":
        """The plan that serves rows which ask for these settings and numbers of log-probabilities,
        None for none."""
        rooms = [room_for(top, vocab) for sampling, top in asked if is_sampled(sampling, top)]
        return cls(True, max(rooms)) if rooms else cls()


PLANS = (Plan(), Plan(True, MOST_LOGPROBS))
"""Those that nearly all requests need."""
IN_HALVES = PLANS[1]
"""That of nearly all texts with a constraint, which need a mask anyway."""


def has_penalties(sampling: Sampling) -> bool:
    """Whether a row's scores depend on its tokens so far."""
    penalties = sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty
    return penalties != (1, 0, 0)


def changes_scores(sampling: Sampling) -> bool:
    """Whether a row has penalties or biases, which its slot has to know."""
    return has_penalties(sampling) or bool(sampling.logit_bias)


def looks_at_scores(samplings: Iterable[Sampling], batch_invariant: bool) -> bool:
    """Whether a step in halves looks at what slots know of penalties and biases: where a row has
    any, and where neighbours must not decide which program runs. To look moves 230 MB for 64 rows
    of 151,936 tokens, a quarter of what else a step of 0.5B does.
    """
    return batch_invariant or any(map(changes_scores, samplings))


def is_sampled(sampling: Sampling, top: int | None) -> bool:
    """Whether a row asks for more than its likeliest token."""
    return top is not None or sampling.temperature > 0 or changes_scores(sampling)


def room_for(top: int | None, vocab: int) -> int:
    """Few sizes, so that there are few programs: what users ask for, what the kernel has room
    for, everything."""
    return next(n for n in (MOST_LOGPROBS, MOST_TOP, vocab) if n >= min(top or 0, vocab))


def check_bias(row: Sampling, vocab_size: int) -> None:
    """Raises UserError where a biased token id lies outside the vocabulary."""
    for token in row.logit_bias:
        if not 0 <= token < vocab_size:
            raise UserError(
                f"sampling.logit_bias names token {token}, but the vocabulary has {vocab_size} "
                "tokens.",
                field="logit_bias",
            )


def settings_of(sampling: Sampling, top: int | None, masked: bool = False) -> Settings:
    """The numbers of one row, each an array of one.

    Args:
        masked: it has a mask of tokens that it may choose.
    """
    shared = _settings(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition=sampling.repetition_penalty,
        presence=sampling.presence_penalty,
        frequency=sampling.frequency_penalty,
        biased=bool(sampling.logit_bias),
        masked=masked,
        logprobs=-1 if top is None else top,
    )
    seed: Any = np.array([sampling.seed], np.uint32)  # an array of JAX's as soon as it is used
    return shared._replace(seed=seed)


@functools.lru_cache(maxsize=256)
def _settings(**numbers: float) -> Settings:
    """What many requests share: all but the seed."""
    return settings(1, **numbers)


def choose(
    logits: Float[Array, "B V"],
    rows: Settings,
    step: Int[Array, "B"],
    counts: Counts | None = None,
    bias: Float[Array, "B V"] | None = None,
    allowed: UInt32[Array, "B words"] | None = None,
    *,
    plan: Plan,
    spec: Spec,
) -> Choice:
    """Chooses one token a row; the choice has log-probabilities where the plan is sampled.

    Args:
        logits: the model's, float32.
        step: how many tokens each row has generated; with the seed it decides the draw.
        counts, bias, allowed: looked at for the rows that ask.
        spec: says which ids are never chosen. Log-probabilities of more tokens than the kernel
            has room for, up to the whole vocabulary, are XLA's whatever implementation it names.
    """
    if spec.unused_ids:
        logits = logits.at[:, jnp.asarray(spec.unused_ids)].set(-jnp.inf, mode="drop")
    if not plan.sampled:
        return _likeliest(logits, spec.valid_tokens)
    return sample_tokens(
        logits,
        rows,
        step,
        valid_tokens=spec.valid_tokens,
        bias=bias,
        counts=counts,
        allowed=allowed,
        top_logprobs=min(plan.top, logits.shape[-1]),
        implementation="xla" if plan.top > MOST_TOP else spec.implementation,
    )


def _likeliest(logits: Float[Array, "B V"], valid_tokens: int) -> Choice:
    """What `sample_tokens` chooses where nothing is asked, which XLA does 12 µs faster.

    One pass finds the largest, its id, and whether all are numbers: a maximum by itself may leave
    out a NaN, and passes of their own for that take a GPU 3 to 5 µs.
    """
    own = jnp.where(jnp.arange(logits.shape[-1]) < valid_tokens, logits, -jnp.inf)

    def larger(ours: tuple[Any, ...], theirs: tuple[Any, ...]) -> tuple[Any, ...]:
        (a, i, fine), (b, j, too) = ours, theirs
        other = (b > a) | ((b == a) & (j < i))
        return jnp.where(other, b, a), jnp.where(other, j, i), fine & too

    ids = lax.broadcasted_iota(jnp.int32, own.shape, 1)
    nothing = jnp.float32(-jnp.inf), jnp.int32(2**31 - 1), jnp.bool_(True)
    largest, token, fine = lax.reduce((own, ids, own < jnp.inf), nothing, larger, (1,))
    finite = fine & (largest > -jnp.inf)
    return Choice(token, jnp.zeros_like(finite), finite, None)
