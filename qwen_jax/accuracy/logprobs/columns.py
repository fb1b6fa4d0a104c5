"""What two logs prove without the model: little, and no more is said.

Of one number a token, a shift by one shows, numbers on a narrow dtype's grid do, and where in the
texts the two agree. Log-probabilities of several tokens at a position (`top`) also tell a
temperature, which scales their differences, from another normaliser, which moves them all alike.
Which filter, penalty or padding moved it, whether bfloat16's rounding is all there is, and which
of the two is right, only the model tells.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from qwen_jax.accuracy.exact.rounding import UNIT, round_interval, round_to
from qwen_jax.accuracy.logprobs.figures import Pair
from qwen_jax.accuracy.logprobs.paths import rms_nats
from qwen_jax.accuracy.logprobs.yardstick import LEAST

GAIN = 10.0
"""By so much a shift has to make the difference smaller: neighbours' values have nothing to do with
each other, so that by chance it makes none."""

ULPS = 64.0
"""Roundings of float32, of a log-softmax and what feeds it, that two numbers may be apart and still
count as the same number."""


@dataclasses.dataclass(frozen=True)
class Columns:
    """What is known of the difference.

    Attributes:
        verdict: "rounding", "cause" or "unexplained".
        causes: names, with values.
        line: in words.
        notes: what else was seen, which proves nothing.
    """

    verdict: str
    causes: tuple[str, ...] = ()
    line: str = ""
    notes: tuple[str, ...] = ()


class _Tops(NamedTuple):
    """Log-probabilities that both have at one position, of two tokens or more."""

    a: Float[np.ndarray, "n"]
    b: Float[np.ndarray, "n"]


def columns(pairs: Sequence[Pair], digits: tuple[float, float]) -> Columns:
    """Looks for what can be proven.

    Args:
        digits: half a step of the decimals that each log keeps.
    """
    pairs = [pair for pair in pairs if pair.places.size]
    values = [np.concatenate([pair.values[i] for pair in pairs]) for i in (0, 1)] if pairs else []
    if not values or len(values[0]) < LEAST:
        count = len(values[0]) if values else 0
        return Columns("unexplained", line=f"{count} values in both, where {LEAST} are needed")
    a, b = values
    d, limit = b - a, _limit(a, digits)
    notes = (*_where(pairs, digits), *_grids(a, b))
    if (np.abs(d) <= limit).all():
        units = float((np.abs(d) / (UNIT["float32"] * (np.abs(a) + 8))).max())
        line = f"no two values are further apart than {units:.2g} roundings of float32"
        return Columns("rounding", line=line, notes=notes)
    tops = [top for pair in pairs for top in _tops(pair)]
    found = _shift(pairs) or _grid_alone(a, b, digits) or _of_tops(tops, digits)
    if found:
        return Columns("cause", (found[0],), found[1], notes)
    return Columns("unexplained", line=_left(bool(tops)), notes=notes)


def _limit(a: Float[np.ndarray, "n"], digits: tuple[float, float]) -> Float[np.ndarray, "n"]:
    return ULPS * UNIT["float32"] * (np.abs(a) + 8) + sum(digits)


def _left(tops: bool) -> str:
    known = "no shift by one, no number format" + (
        ", no temperature and no normaliser alone" if tops else ""
    )
    return (
        f"{known} explains it; whether it is rounding of bfloat16, a filter, a penalty, padding or "
        "a fault can't be told without the model" + ("" if tops else ", nor without 'top'")
    )


def _shift(pairs: Sequence[Pair]) -> tuple[str, str] | None:
    plain = rms_nats(np.concatenate([pair.difference for pair in pairs]))
    for by, name, line in (
        (1, "written_early", "each token of the second log has the value of the token after it"),
        (-1, "written_late", "each token of the second log has the value of the token before it"),
    ):
        moved = []
        for pair in pairs:
            b = pair.b.logprobs
            a = np.full(len(b), np.nan)
            if by == 1:
                a[:-1] = pair.a.logprobs[1:]
            else:
                a[1:] = pair.a.logprobs[:-1]
            d = b - a
            moved.append(d[~np.isnan(d)])
        joined = np.concatenate(moved)
        if len(joined) >= LEAST and plain >= GAIN * rms_nats(joined):
            return name, f"{line}: apart {plain:.2g} nats as it is, {rms_nats(joined):.2g} so (RMS)"
    return None


def _on_grid(x: Float[np.ndarray, "n"], dtype: str) -> bool:
    return bool((round_to(x, dtype, np) == x).all())


def _grids(a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"]) -> list[str]:
    notes = []
    for which, x in (("first", a), ("second", b)):
        for dtype in ("bfloat16", "float16"):
            if _on_grid(x, dtype):
                notes.append(f"every value of the {which} log is a number of {dtype}")
                break
    return notes


def _grid_alone(
    a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"], digits: tuple[float, float]
) -> tuple[str, str] | None:
    """Whether one is the other rounded to a narrow dtype."""
    for wide, narrow, which in ((a, b, "second"), (b, a, "first")):
        for dtype in ("bfloat16", "float16"):
            if not _on_grid(narrow, dtype) or _on_grid(wide, dtype):
                continue
            middle, width = round_interval(wide, _limit(wide, digits), dtype)
            if (np.abs(narrow - middle) <= width).all():
                line = f"each value of the {which} log is the other's rounded to {dtype}"
                return f"logprobs_{dtype}", line
    return None


def _tops(pair: Pair) -> list[_Tops]:
    found = []
    for place in pair.places:
        token = int(pair.a.tokens[place])
        a, b = ({**one.top[place], token: float(one.logprobs[place])} for one in (pair.a, pair.b))
        both = sorted(a.keys() & b.keys())
        if len(both) > 1:
            found.append(_Tops(*(np.array([x[i] for i in both]) for x in (a, b))))
    return found


def _of_tops(tops: Sequence[_Tops], digits: tuple[float, float]) -> tuple[str, str] | None:
    if sum(len(top.a) - 1 for top in tops) < LEAST:
        return None
    # Against the likeliest: differences of logits, in which no normaliser is.
    a, b, sizes = (
        np.concatenate(parts)
        for parts in zip(
            *((t.a - t.a.max(), t.b - t.b[t.a.argmax()], _limit(t.a, digits)) for t in tops),
            strict=True,
        )
    )
    moved = np.concatenate([t.b - t.a for t in tops])
    if (np.abs(b - a) <= 2 * sizes).all():
        sign = "higher" if (moved >= -sizes).all() else "lower" if (moved <= sizes).all() else ""
        what = {
            "higher": "as of tokens that are left out (top-k, top-p, min-p)",
            "lower": "as of more rows in the softmax (a padded vocabulary)",
        }.get(sign, "to either side")
        return (
            "normaliser",
            f"at each position all values of the second log are moved alike, {what}; which, only "
            "the model tells",
        )
    factor = float(a @ b / (a @ a))
    slack = 2 * sizes * max(1.0, abs(factor))
    if factor > 0 and (np.abs(b - factor * a) <= slack).all():
        return (
            f"temperature {float(f'{1 / factor:.4g}'):g}",
            "the second log's differences within a position are the first's over that number: a "
            "temperature of the second, or its inverse of the first",
        )
    return None


def _where(pairs: Sequence[Pair], digits: tuple[float, float]) -> list[str]:
    """Whether the two agree in some texts, or up to some token."""
    first = []
    for pair in pairs:
        wrong = np.abs(pair.difference) > _limit(pair.values[0], digits)
        first.append(int(pair.places[np.argmax(wrong)]) if wrong.any() else None)
    off = [place for place in first if place is not None]
    notes = []
    if off and len(off) < len(first):
        names = [pair.a.name for pair, place in zip(pairs, first, strict=True) if place is not None]
        notes.append(
            f"{len(off)} of {len(first)} texts differ by more than float32's rounding: "
            + ", ".join(f"{name!r:.40}" for name in names[:8])
            + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        )
    if off and min(off) >= LEAST:
        notes.append(f"up to token {min(off)} of a text there is no more than float32's rounding")
    return notes
