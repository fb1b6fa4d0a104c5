"""How users say that tokens are to be chosen, and what a compiled step makes of it.

Order and meaning are those of Hugging Face transformers' logits processors: bias,
repetition penalty, temperature, top-k, top-p, min-p. Presence and frequency penalties,
which transformers lacks, come after the repetition penalty and follow the OpenAI API:
they count generated tokens only, while the repetition penalty sees the prompt too.
`pallas_kernels.sample_tokens` defines it, and does it.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.sample_tokens import (
    MOST_LOGPROBS,
    Choice,
    Counts,
    Logprobs,
    Settings,
    sample_tokens,
    settings,
)
from pallas_kernels.sample_tokens.mosaic_gpu import MOST_TOP
from qwen_jax.errors import UserError

__all__ = ["Choice", "Counts", "Logprobs", "Plan", "RowParameters", "Sampling", "plan_rows"]

_LARGEST = 1e30
"""Numbers beyond this, or nearer to 0 than its inverse, would overflow float32 logits."""


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
                raise UserError(f"sampling.{field.name} is {value!r}, but it must be {kind}.")
        bias = self.logit_bias
        if not isinstance(bias, Mapping) or not (
            all(map(is_whole, bias)) and all(map(_is_number, bias.values()))
        ):
            raise UserError(
                f"sampling.logit_bias is {bias!r:.60}, but it must map token ids to numbers."
            )
        within = f"from {-_LARGEST} to {_LARGEST}"
        checks = {
            "temperature": (
                self.temperature == 0 or 1 / _LARGEST <= self.temperature <= _LARGEST,
                f"0 (greedy) or from {1 / _LARGEST:g} to {_LARGEST}",
            ),
            "top_k": (0 <= self.top_k < 2**31, "from 0 (off) to 2147483647"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            "min_p": (0 <= self.min_p <= 1, "from 0 (off) to 1"),
            "repetition_penalty": (
                1 / _LARGEST <= self.repetition_penalty <= _LARGEST,
                f"from {1 / _LARGEST:g} to {_LARGEST}; 1 is off",
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
                raise UserError(
                    f"sampling.{name} is {getattr(self, name)}, but it must be {allowed}."
                )


class Plan(NamedTuple):
    """What the compiled step contains; hashable, so each plan is compiled once.

    Attributes:
        draws: some row has a temperature.
        penalties: some row uses a penalty, so tokens must be counted.
        bias: some row has a logit bias.
        logprobs: log-probabilities are wanted, and there is room for so many of the likeliest;
            0 where none are.
    """

    draws: bool = False
    penalties: bool = False
    bias: bool = False
    logprobs: int = 0

    @classmethod
    def of(cls, rows: Iterable[Sampling], top_logprobs: int | None = None) -> "Plan":
        """The plan that serves every row; `top_logprobs` is None where none are wanted."""
        rows = list(rows)
        return cls(
            draws=any(r.temperature > 0 for r in rows),
            penalties=any(
                (r.repetition_penalty, r.presence_penalty, r.frequency_penalty) != (1, 0, 0)
                for r in rows
            ),
            bias=any(r.logit_bias for r in rows),
            logprobs=0 if top_logprobs is None else max(top_logprobs, MOST_LOGPROBS),
        )


class RowParameters(NamedTuple):
    """The numbers of `Sampling`, one a row: data, so changing them compiles nothing."""

    settings: Settings
    bias: Float[Array, "B V"] | None


def check_bias(row: Sampling, vocab_size: int) -> None:
    """Raises UserError where a biased token id lies outside the vocabulary."""
    for token in row.logit_bias:
        if not 0 <= token < vocab_size:
            raise UserError(
                f"sampling.logit_bias names token {token}, but the vocabulary has {vocab_size} "
                "tokens."
            )


def plan_rows(
    rows: Sequence[Sampling], vocab_size: int, logprobs: bool = False, top_logprobs: int = 0
) -> tuple[Plan, RowParameters]:
    """The plan that serves every row, and the rows' parameters.

    Raises:
        UserError: a biased token id lies outside the vocabulary, or more log-probabilities
            are wanted than it has tokens.
    """
    if not 0 <= top_logprobs <= vocab_size:
        raise UserError(
            f"top_logprobs is {top_logprobs}, but it must be from 0 to the vocabulary's "
            f"{vocab_size} tokens."
        )
    logprobs = logprobs or top_logprobs > 0
    plan = Plan.of(rows, top_logprobs if logprobs else None)
    bias = np.zeros((len(rows), vocab_size), np.float32) if plan.bias else None
    for i, row in enumerate(rows):
        check_bias(row, vocab_size)
        for token, value in row.logit_bias.items():
            assert bias is not None
            bias[i, token] = value

    def column(name: str) -> list[float]:
        return [getattr(row, name) for row in rows]

    asked = settings(
        len(rows),
        temperature=column("temperature"),
        top_k=column("top_k"),
        top_p=column("top_p"),
        min_p=column("min_p"),
        repetition=column("repetition_penalty"),
        presence=column("presence_penalty"),
        frequency=column("frequency_penalty"),
        biased=[bool(row.logit_bias) for row in rows],
        seed=column("seed"),
        logprobs=top_logprobs if logprobs else -1,
    )
    return plan, _on_device(asked, bias)


@jax.jit
def _on_device(asked: Settings, bias: Float[Array, "B V"] | None) -> RowParameters:
    """One call for all of them, compiled: one by one they would cost milliseconds."""
    return RowParameters(asked, bias)


def choose(
    logits: Float[Array, "B V"],
    params: RowParameters,
    counts: Counts | None,
    step: Int[Array, "B"],
    plan: Plan,
    *,
    valid_tokens: int,
    implementation: str = "auto",
) -> Choice:
    """Chooses one token a row; the choice has log-probabilities where the plan has them.

    Args:
        logits: the model's, float32, -inf where a row of the vocabulary is no token.
        counts: tokens so far, where the plan has penalties.
        step: how many tokens each row has generated; with the seed it decides the draw.
        valid_tokens: ids from here on are never chosen.
        implementation: of what is chosen; log-probabilities of more tokens than the kernel has
            room for, up to the whole vocabulary, are XLA's in any case.
    """
    if not any(plan):
        return _likeliest(logits, valid_tokens)
    choice = sample_tokens(
        logits,
        params.settings,
        step,
        valid_tokens=valid_tokens,
        bias=params.bias,
        counts=counts,
        top_logprobs=min(plan.logprobs, logits.shape[-1]) or 1,
        draws=plan.draws,
        implementation="xla" if plan.logprobs > MOST_TOP else implementation,
    )
    return choice if plan.logprobs else choice._replace(logprobs=None)


def _likeliest(logits: Float[Array, "B V"], valid_tokens: int) -> Choice:
    """What `sample_tokens` chooses where nothing is asked, which XLA does 9 µs faster."""
    own = jnp.where(jnp.arange(logits.shape[-1]) < valid_tokens, logits, -jnp.inf)
    # Not by the largest alone: a maximum over many numbers may leave out a NaN.
    finite = (own < jnp.inf).all(axis=-1) & (own > -jnp.inf).any(axis=-1)
    token = jnp.argmax(own, axis=-1).astype(jnp.int32)
    return Choice(token, jnp.zeros_like(finite), finite, None)
