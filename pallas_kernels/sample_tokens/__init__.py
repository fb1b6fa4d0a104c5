"""Choosing one token a row: exact, whatever rows ask, and without sorting the vocabulary."""

import jax
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels.implementation import choose
from pallas_kernels.sample_tokens import mosaic_gpu
from pallas_kernels.sample_tokens.reference import reference
from pallas_kernels.sample_tokens.rows import (
    Choice,
    Counts,
    Logprobs,
    Settings,
    count,
    pack,
    settings,
    words,
)

MOST_LOGPROBS = 20
"""Of a token that a row may ask for, where a program is not made for more."""

__all__ = [
    "MOST_LOGPROBS",
    "Choice",
    "Counts",
    "Logprobs",
    "Settings",
    "count",
    "pack",
    "sample_tokens",
    "settings",
    "words",
]


def sample_tokens(
    logits: Float[Array, "B V"],
    settings: Settings,
    step: Int[Array, "B"],
    *,
    valid_tokens: int,
    bias: Float[Array, "B V"] | None = None,
    counts: Counts | None = None,
    allowed: UInt32[Array, "B words"] | None = None,
    top_logprobs: int = MOST_LOGPROBS,
    draws: bool = True,
    implementation: str = "auto",
) -> Choice:
    """Chooses a token for every row. What rows ask is data: any mix of it is one program.

    In the order of transformers' logits processors: bias, repetition penalty, presence and
    frequency penalties, the mask; where a row has a temperature, division by it, top-k (all tokens
    tied with the k-th stay), top-p of what is left, min-p; then a draw, by Gumbel noise that is a
    function of the row's seed, its step and the token alone. Tokens from `valid_tokens` on and
    those not allowed are never chosen.

    Top-p keeps the fewest tokens whose probability reaches p. transformers sorts ascending and
    removes tokens as long as the cumulative probability is at most 1 - p, never the last; of equal
    tokens it removes as many as here, but its sort is not stable: which ones is not defined. Here
    those of the lowest ids go first. Kernel and reference may differ in tokens whose scores with
    noise differ by less than 1e-5, or for which the cumulative probability is within 1e-6 of it
    1 - p.

    `qwen_jax.engine.sampling.choose` is this with `params` made by
    `settings` (the seed in place of a key; `biased` for rows with biases), `counts` a mask of all
    tokens and int32 counts of those generated, which `count` brings up to date, and `valid_tokens`
    where it masked what is past the vocabulary. Of a plan nothing is left: with arrays for biases,
    counts and masks always there, which are read only for rows that ask for them, every batch of a
    size is one program.

    Args:
        settings: one number a row of each; the function of that name makes them.
        step: how many tokens each row has generated; with the seed it decides the draw.
        bias: added to the logits of rows with `settings.biased`.
        counts: tokens so far, for rows with penalties.
        allowed: for rows with `settings.masked`, a bit for every token that may be chosen, as
            `pack` makes them.
        top_logprobs: how many log-probabilities a row may ask for.
        draws: False promises that no row has a temperature, which XLA compiles in half the time;
            the kernel is the same.

    Raises:
        ValueError: shapes disagree, or a number is out of range.
        UnsupportedError: `implementation` can't serve the case.
    """
    rows, vocab = logits.shape
    if not 0 < valid_tokens <= vocab:
        raise ValueError(f"{valid_tokens=} must be from 1 to the vocabulary's {vocab} tokens")
    if not 1 <= top_logprobs <= vocab:
        raise ValueError(f"{top_logprobs=} must be from 1 to the vocabulary's {vocab} tokens")
    for name, array, shape in (
        *((f"settings.{name}", array, (rows,)) for name, array in settings._asdict().items()),
        ("step", step, (rows,)),
        ("bias", bias, (rows, vocab)),
        ("counts.seen", counts and counts.seen, (rows, words(vocab))),
        ("counts.generated", counts and counts.generated, (rows, vocab)),
        ("allowed", allowed, (rows, words(vocab))),
    ):
        if array is not None and array.shape != shape:
            raise ValueError(
                f"{name} is {array.shape}, but for logits {logits.shape} it is {shape}"
            )
    why_not = mosaic_gpu.refusal(vocab, logits.dtype, top_logprobs)
    with jax.named_scope("sample_tokens"):
        chosen = choose("sample_tokens", implementation, why_not)
        given = (logits, settings, step, bias, counts, allowed, valid_tokens, top_logprobs)
        if chosen == "mosaic_gpu":
            return mosaic_gpu.sample_tokens(*given)
        return reference(*given, draws)
