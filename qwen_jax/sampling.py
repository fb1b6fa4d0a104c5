"""Logits to token, on the device: pure functions of logits, parameters and a key.

Order and meaning are those of Hugging Face transformers' logits processors: bias,
repetition penalty, temperature, top-k, top-p, min-p. Presence and frequency penalties,
which transformers lacks, come after the repetition penalty and follow the OpenAI API:
they count generated tokens only, while the repetition penalty sees the prompt too.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from qwen_jax.errors import UserError

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
        draws: some row has a temperature, so random numbers are needed.
        filters: some row uses top-k, top-p or min-p, so logits must be sorted.
        penalties: some row uses a penalty, so tokens must be counted.
        bias: some row has a logit bias.
        logprobs: the chosen token's log-probability is wanted.
        top_logprobs: how many of the likeliest tokens are reported.
    """

    draws: bool = False
    filters: bool = False
    penalties: bool = False
    bias: bool = False
    logprobs: bool = False
    top_logprobs: int = 0


class RowParameters(NamedTuple):
    """The numbers of `Sampling`, one a row: data, so changing them compiles nothing."""

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    min_p: Float[Array, "B"]
    repetition: Float[Array, "B"]
    presence: Float[Array, "B"]
    frequency: Float[Array, "B"]
    bias: Float[Array, "B V"] | None
    key: Key[Array, "B"]


class Counts(NamedTuple):
    """Tokens of each row so far; present only where the plan has penalties."""

    prompt: Bool[Array, "B V"]
    generated: Int[Array, "B V"]


class Logprobs(NamedTuple):
    """The model's own log-probabilities, before any processor: the chosen token's and the top."""

    chosen: Float[Array, "B"]
    top_ids: Int[Array, "B top"]
    top: Float[Array, "B top"]


class Choice(NamedTuple):
    """What one step chose; with log-probabilities where the plan has them."""

    token: Int[Array, "B"]
    logprobs: Logprobs | None


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
    plan = Plan(
        draws=any(r.temperature > 0 for r in rows),
        filters=any(
            r.temperature > 0 and (r.top_k > 0 or r.top_p < 1 or r.min_p > 0) for r in rows
        ),
        penalties=any(
            (r.repetition_penalty, r.presence_penalty, r.frequency_penalty) != (1, 0, 0)
            for r in rows
        ),
        bias=any(r.logit_bias for r in rows),
        logprobs=logprobs or top_logprobs > 0,
        top_logprobs=top_logprobs,
    )
    bias = np.zeros((len(rows), vocab_size), np.float32) if plan.bias else None
    for i, row in enumerate(rows):
        check_bias(row, vocab_size)
        for token, value in row.logit_bias.items():
            assert bias is not None
            bias[i, token] = value

    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([getattr(r, name) for r in rows], dtype)

    return plan, _on_device(
        temperature=column("temperature", np.float32),
        top_k=column("top_k", np.int32),
        top_p=column("top_p", np.float32),
        min_p=column("min_p", np.float32),
        repetition=column("repetition_penalty", np.float32),
        presence=column("presence_penalty", np.float32),
        frequency=column("frequency_penalty", np.float32),
        bias=bias,
        seeds=column("seed", np.uint32),
    )


@jax.jit
def _on_device(seeds: Int[Array, "B"], **columns: Any) -> RowParameters:
    """One call for all of them, compiled: one by one, and the keys traced anew for every batch,
    they would cost milliseconds."""
    return RowParameters(key=jax.vmap(jax.random.key)(seeds), **columns)


def penalise(
    logits: Float[Array, "B V"], params: RowParameters, counts: Counts
) -> Float[Array, "B V"]:
    """Repetition penalty (Keskar et al., 2019), then presence and frequency penalties."""
    generated = counts.generated > 0
    factor = params.repetition[:, None]
    penalised = jnp.where(logits > 0, logits / factor, logits * factor)
    logits = jnp.where(counts.prompt | generated, penalised, logits)
    return (
        logits - params.presence[:, None] * generated - params.frequency[:, None] * counts.generated
    )


def keep(logits: Float[Array, "B V"], params: RowParameters) -> Float[Array, "B V"]:
    """Top-k, then top-p of what is left, then min-p: dropped tokens become -inf."""
    vocab = logits.shape[-1]
    k = jnp.where(params.top_k > 0, jnp.minimum(params.top_k, vocab), vocab)
    descending = -jnp.sort(-logits, axis=-1)
    kth = jnp.take_along_axis(descending, k[:, None] - 1, axis=-1)
    descending = jnp.where(descending < kth, -jnp.inf, descending)
    # A token stays while the probability before it hasn't reached p; the first always does.
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    stays = (before < params.top_p[:, None]) | (params.top_p[:, None] >= 1)
    stays = stays.at[:, 0].set(True)
    least = jnp.min(jnp.where(stays, descending, jnp.inf), axis=-1, keepdims=True)
    # p_i < min_p * p_max, in logits, so that no second softmax is needed.
    floor = logits.max(axis=-1, keepdims=True) + jnp.log(params.min_p[:, None])
    return jnp.where(logits < jnp.maximum(jnp.maximum(kth, least), floor), -jnp.inf, logits)


def choose(
    logits: Float[Array, "B V"],
    params: RowParameters,
    counts: Counts | None,
    step: Int[Array, "B"],
    plan: Plan,
) -> Choice:
    """Chooses one token a row.

    Args:
        logits: the model's, float32, -inf where a vocabulary row is padding.
        counts: tokens so far, where the plan has penalties.
        step: how many tokens each row has generated; with the seed it decides the draw.
    """
    scores = logits
    if params.bias is not None:
        scores = scores + params.bias
    if plan.penalties:
        assert counts is not None
        scores = penalise(scores, params, counts)
    token = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    if plan.draws:
        heat = params.temperature[:, None]
        hot = scores / jnp.where(heat > 0, heat, 1)
        if plan.filters:
            hot = keep(hot, params)
        drawn = jax.vmap(jax.random.categorical)(
            jax.vmap(jax.random.fold_in)(params.key, step), hot
        )
        token = jnp.where(params.temperature > 0, drawn.astype(jnp.int32), token)
    if not plan.logprobs:
        return Choice(token, None)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    top, ids = jax.lax.top_k(logprobs, plan.top_logprobs)
    chosen = jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]
    return Choice(token, Logprobs(chosen, ids.astype(jnp.int32), top))
