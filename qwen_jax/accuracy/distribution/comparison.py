"""The distribution report: a candidate's next-token probabilities against a base's, over a text.

Conventions and statistics are those of llama.cpp's `llama-perplexity --kl-divergence`
(tools/perplexity/perplexity.cpp), so that figures can be laid side by side:

- The text is cut into windows of `context` tokens, the rest is dropped, and every window starts
  from an empty cache. Of its W positions those from W // 2 to W - 2 are scored: each of them has
  half a window to look at, and a next token. Special tokens in a text file are read as plain text.
- A mean's uncertainty is sqrt((<x^2> - <x>^2) / (n - 1)), zero up to 10 tokens; that of a
  perplexity, a ratio or a difference follows to first order, with the covariance of both.
- KL(base || candidate) is in nats and leaves out tokens whose base log-probability is -16 or less.
- Percentiles interpolate linearly. Fewer than 100 scored tokens are refused.

What differs: sums and exponentials are float64 here and partly float32 there; and a base that is
computed in the same run, or saved as safetensors, is not rounded to 16 bits (see `base_file`).
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int
from tqdm import tqdm

from qwen_jax import utf8
from qwen_jax.accuracy.distribution import base_file
from qwen_jax.accuracy.distribution.base_file import SavedBase, scored
from qwen_jax.accuracy.measures.metrics import (
    first_not_finite,
    kl_divergence,
    log_softmax,
    same_top,
)
from qwen_jax.api import Model
from qwen_jax.errors import UserError
from qwen_jax.opening import BUNDLED, locate
from qwen_jax.text.tokenizer import Tokenizer

CONTEXT = 512
SMALLEST_CONTEXT = 4
SMALLEST_COUNT = 100
FLOOR = -16.0

KLD_PERCENTILES = (100.0, 99.9, 99.0, 95.0, 90.0, 50.0, 10.0, 5.0, 1.0, 0.1, 0.0)
DP_PERCENTILES = (100.0, 99.9, 99.0, 95.0, 90.0, 75.0, 50.0, 25.0, 10.0, 5.0, 1.0, 0.1, 0.0)

# Positions whose log-probabilities are in float64 at a time.
_ROWS = 32


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value and its uncertainty, one standard deviation."""

    value: float
    error: float


@dataclasses.dataclass(frozen=True)
class Scores:
    """What is kept of each of n scored tokens.

    Attributes:
        nll: -ln p of the token that came, by the candidate,
        nll_base: and by the base.
        kld: KL(base || candidate) of the distributions it came from.
        same_top: whether both have the same likeliest token.
    """

    nll: Float[np.ndarray, "n"]
    nll_base: Float[np.ndarray, "n"]
    kld: Float[np.ndarray, "n"]
    same_top: Bool[np.ndarray, "n"]

    @property
    def dp(self) -> Float[np.ndarray, "n"]:
        """p(candidate) - p(base) of the token that came."""
        return np.exp(-self.nll) - np.exp(-self.nll_base)


@dataclasses.dataclass(frozen=True)
class Distribution:
    """All statistics of one comparison; percentiles are pairs of percent and value.

    Attributes:
        candidate, base: what was compared.
        contexts, context: windows, and the tokens of each.
        ppl, ppl_base: perplexities.
        correlation: of ln PPL of both, from -1 to 1.
        ln_ratio, ratio, difference: ln(PPL / PPL base), PPL / PPL base and PPL - PPL base.
        kld, kld_percentiles: KL divergence in nats.
        dp, dp_percentiles, dp_rms: change of the right token's probability, from -1 to 1.
        same_top: share of positions with the same likeliest token.
        scores: of every scored token.
    """

    candidate: str
    base: str
    contexts: int
    context: int
    ppl: Estimate
    ppl_base: Estimate
    correlation: float
    ln_ratio: Estimate
    ratio: Estimate
    difference: Estimate
    kld: Estimate
    kld_percentiles: tuple[tuple[float, float], ...]
    dp: Estimate
    dp_percentiles: tuple[tuple[float, float], ...]
    dp_rms: Estimate
    same_top: Estimate
    scores: Scores


def compare_distributions(
    candidate: Model,
    base: Model | SavedBase,
    tokens: Sequence[int] | None = None,
    *,
    context: int = CONTEXT,
    names: tuple[str, str] | None = None,
) -> Distribution:
    """Runs the text through both, window by window, with a progress bar on a terminal.

    Args:
        tokens: the text; a saved base brings its own, and its context.
        context: tokens of a window.
        names: what to call candidate and base in reports.

    Raises:
        UserError: the text is too short, a window longer than the model's context, the base
            belongs to another vocabulary, or is not finite.
    """
    source: Iterator[Float[np.ndarray, "n V"]]
    if isinstance(base, SavedBase):
        windows = base.windows
        source = map(base.logprobs, range(len(windows)))
        vocab, called = base.vocab, base.name
        if tokens is not None and not _begins(tokens, windows):
            raise UserError(
                f"{base.path}: the base was saved for another text; leave out the text, or save "
                "the base again."
            )
    else:
        if tokens is None:
            raise UserError("There is no text; give one, or a saved base, which holds its own.")
        windows = cut(tokens, context)
        source = _finite_logits(base, windows)
        vocab, called = base.config.vocab_size, base.config.source
    if vocab != candidate.config.vocab_size:
        raise UserError(
            f"The base has a vocabulary of {vocab} tokens, but {candidate.config.source} has "
            f"{candidate.config.vocab_size}; both must be of the same model."
        )
    check(candidate, windows)
    bar = tqdm(windows, desc="contexts", leave=False, disable=not sys.stderr.isatty())
    parts = [
        score(ours, theirs, window, normal=isinstance(base, SavedBase))
        for window, ours, theirs in zip(bar, _logits(candidate, windows), source, strict=True)
    ]
    fields = [field.name for field in dataclasses.fields(Scores)]
    scores = Scores(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields))
    return statistics(scores, names or (candidate.config.source, called), windows)


def save_base(
    path: str | Path, model: Model, tokens: Sequence[int], *, context: int = CONTEXT
) -> None:
    """Saves a model's log-probabilities of a text: see `base_file.save` for the two formats.

    Raises:
        UserError: the text is too short, a window too long, a logit not finite, or the file can't
            be written.
    """
    windows = cut(tokens, context)
    check(model, windows)
    bar = tqdm(
        _finite_logits(model, windows),
        total=len(windows),
        desc="contexts",
        leave=False,
        disable=not sys.stderr.isatty(),
    )
    base_file.save(path, model.config.source, windows, iter(bar), model.config.vocab_size)


def read_text(model: Model, path: str | Path | None = None) -> list[int]:
    """`read_tokens` of a model's own tokenizer."""
    return read_tokens(model.tokenizer, model.config.source, path)


def read_tokens(tokenizer: Tokenizer, source: str, path: str | Path | None = None) -> list[int]:
    """The tokens of a text file, its line breaks as they are; of the bundled model's own sample
    text where none is given.

    Args:
        source: where the model lies.

    Raises:
        UserError: the file can't be read, or there is none and the model is not the bundled one.
    """
    if path is not None:
        return tokenizer.encode(utf8.read(path), parse_special=False)
    if Path(source) != locate(BUNDLED):
        raise UserError(
            f"{source} has no text of its own; give a text file, such as WikiText-2's "
            "wiki.test.raw."
        )
    return sample_tokens(tokenizer)


def sample_tokens(tokenizer: Tokenizer) -> list[int]:
    """The bundled model's sample text, as its tokenizer has it: chats, special tokens included."""
    sample = resources.files("qwen_jax") / "data" / f"{BUNDLED}.txt"
    return tokenizer.encode(utf8.decoded(sample.read_bytes(), str(sample)))


def check_context(context: int, name: str = "context") -> None:
    """Raises UserError where windows of so many tokens have nothing to compare."""
    if context < SMALLEST_CONTEXT:
        raise UserError(f"{name} is {context}, but it must be at least {SMALLEST_CONTEXT} tokens.")


def cut(tokens: Sequence[int], context: int) -> Int[np.ndarray, "C W"]:
    """The text in whole windows. Raises UserError where it holds fewer than two."""
    check_context(context)
    if len(tokens) < 2 * context:
        raise UserError(
            f"The text has {len(tokens)} tokens, but windows of {context} need at least "
            f"{2 * context}; give a longer text or a smaller context."
        )
    count = len(tokens) // context
    return np.asarray(tokens[: count * context], np.int32).reshape(count, context)


def _begins(tokens: Sequence[int], windows: Int[np.ndarray, "C W"]) -> bool:
    return np.array_equal(np.asarray(tokens[: windows.size]), windows.ravel())


def check(model: Model, windows: Int[np.ndarray, "C W"]) -> None:
    count, context = windows.shape
    if context > model.config.context_length:
        raise UserError(
            f"Windows of {context} tokens are longer than the context of {model.config.source}, "
            f"{model.config.context_length}; choose a smaller context."
        )
    tokens = count * len(range(context)[scored(context)])
    if tokens < SMALLEST_COUNT:
        raise UserError(
            f"Only {tokens} tokens would be scored, of {count} windows of {context}, and "
            f"statistics need at least {SMALLEST_COUNT}; give a longer text."
        )


def _logits(model: Model, windows: Int[np.ndarray, "C W"]) -> Iterator[Float[np.ndarray, "n V"]]:
    """Of each window, after its scored positions."""
    for window in windows:
        yield model.logits(window.tolist())[scored(windows.shape[1])]


def _finite_logits(
    model: Model, windows: Int[np.ndarray, "C W"]
) -> Iterator[Float[np.ndarray, "n V"]]:
    """The same of a base, from which nothing can be told where it is not finite."""
    for number, logits in enumerate(_logits(model, windows)):
        if (place := first_not_finite(logits)) is not None:
            position, token = place
            raise UserError(
                f"{model.config.source}: the base's logit of token {token} is "
                f"{logits[position, token]}, at scored position {position} of window {number}; "
                "choose a base that is finite, as float32 is."
            )
        yield logits


def score(
    candidate: Float[np.ndarray, "n V"],
    base: Float[np.ndarray, "n V"],
    window: Int[np.ndarray, "W"],
    normal: bool,
) -> Scores:
    """Of one window; `normal` where the base is log-probabilities already, taken as they are."""
    came = window[len(window) // 2 + 1 :]
    nll, nll_base, kld, same = [], [], [], []
    for start in range(0, len(came), _ROWS):
        rows = slice(start, start + _ROWS)
        ours = log_softmax(candidate[rows])
        theirs = base[rows].astype(np.float64) if normal else log_softmax(base[rows])
        at = came[rows, None]
        nll.append(-np.take_along_axis(ours, at, 1)[:, 0])
        nll_base.append(-np.take_along_axis(theirs, at, 1)[:, 0])
        kld.append(kl_divergence(theirs, ours, FLOOR))
        same.append(same_top(ours, theirs))
    return Scores(*map(np.concatenate, (nll, nll_base, kld, same)))


def statistics(
    scores: Scores, names: tuple[str, str], windows: Int[np.ndarray, "C W"]
) -> Distribution:
    """Everything the report says of the windows' scored tokens; `names` are candidate and base."""
    n = len(scores.kld)
    log_ppl, log_base = mean(scores.nll), mean(scores.nll_base)
    ppl, base = float(np.exp(log_ppl.value)), float(np.exp(log_base.value))
    # var(x) + var(y) - 2 cov(x, y) is var(x - y), which does not cancel where both are alike.
    ln_ratio = mean(scores.nll - scores.nll_base)
    ratio = float(np.exp(ln_ratio.value))
    spread = np.std(scores.nll) * np.std(scores.nll_base)
    covariance = np.mean(scores.nll * scores.nll_base) - log_ppl.value * log_base.value
    squares = mean(scores.dp**2)
    rms = squares.value**0.5
    same = float(scores.same_top.mean())
    return Distribution(
        candidate=names[0],
        base=names[1],
        contexts=windows.shape[0],
        context=windows.shape[1],
        ppl=Estimate(ppl, ppl * log_ppl.error),
        ppl_base=Estimate(base, base * log_base.error),
        correlation=float(covariance / spread) if spread else float("nan"),
        ln_ratio=ln_ratio,
        ratio=Estimate(ratio, ratio * ln_ratio.error),
        difference=Estimate(ppl - base, mean(ppl * scores.nll - base * scores.nll_base).error),
        kld=mean(scores.kld),
        kld_percentiles=_percentiles(scores.kld, KLD_PERCENTILES),
        dp=mean(scores.dp),
        dp_percentiles=_percentiles(scores.dp, DP_PERCENTILES),
        dp_rms=Estimate(rms, 0.5 / rms * squares.error if rms else 0.0),
        same_top=Estimate(same, (same * (1 - same) / (n - 1)) ** 0.5),
        scores=scores,
    )


def mean(values: Float[np.ndarray, "n"]) -> Estimate:
    """The mean and its standard error, zero up to 10 values."""
    n = len(values)
    return Estimate(float(values.mean()), float(values.std()) / (n - 1) ** 0.5 if n > 10 else 0.0)


def _percentiles(
    values: Float[np.ndarray, "n"], percents: Sequence[float]
) -> tuple[tuple[float, float], ...]:
    found = np.percentile(values, percents).tolist()
    return tuple(zip(percents, found, strict=True))
