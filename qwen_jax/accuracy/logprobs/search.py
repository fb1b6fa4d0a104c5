"""One engine's log against the model: within rounding, a proven cause, or unexplained.

A cause is named only if

- the log as it is doesn't lie within rounding of so fine an arithmetic,
- with the cause recomputed every value of every text does (see `yardstick`),
- and the error has become `GAIN` times smaller, so that no fit merely creeps under a bound;
- of several explanations the finest arithmetic counts, then the fewest causes, and those that do
  as well are all told.
"""

import dataclasses
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from qwen_jax.accuracy.exact.rounding import UNIT
from qwen_jax.accuracy.finding import Progress
from qwen_jax.accuracy.logprobs import causes
from qwen_jax.accuracy.logprobs.causes import Change, Changes, Sample
from qwen_jax.accuracy.logprobs.paths import Path, Predicted, Rows, predict
from qwen_jax.accuracy.logprobs.reading import Logged
from qwen_jax.accuracy.logprobs.yardstick import LEAST, NOTHING, Fit, Level, Measure, at, fit

GAIN = 4.0
SAMPLE_TEXTS, SAMPLE_ROWS = 12, 48
"""What causes are fitted on; they are proven on everything."""

TOLD = ("float32", "bfloat16")
"""The arithmetics to whose rounding a cause has to explain the difference."""

_BEAM, _HINT = 2, 1.2
"""From how many single causes a second is looked for, and by how much each has to help."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What is known of one log.

    Attributes:
        verdict: "rounding", "cause", "unexplained" or "not judged".
        level: the arithmetic whose rounding is meant.
        before: errors from the model's own log-probabilities, in units of one rounding error of
            that level (of bfloat16 where nothing explains them),
        after: and once the causes are recomputed.
        causes: which, together; none where it is rounding.
        others: explanations by as many causes that do as well.
        where: where the errors lie, in words.
        why: what could not be judged, in words.
        declared: a dtype that the log's lines say, where it is finer than that level.
    """

    verdict: str
    level: str = ""
    before: Fit = NOTHING
    after: Fit | None = None
    causes: tuple[str, ...] = ()
    others: tuple[tuple[str, ...], ...] = ()
    where: str = ""
    why: str = ""
    declared: str = ""


@dataclasses.dataclass(frozen=True)
class Context:
    """Ids that were before the text by somebody's mistake, or the prompt that wasn't."""

    name: str
    before: tuple[int, ...] = ()
    prompt: bool = True


def contexts(texts: Collection[Logged], stops: Sequence[int]) -> list[Context]:
    """Those that are tried: one of these tokens before a text, and no prompt where there is one."""
    tried = [Context(f"token_before {i}", (i,)) for i in dict.fromkeys(stops)]
    if any(text.prompt for text in texts):
        tried.append(Context("prompt_dropped", prompt=False))
    return tried


def judge(
    log: Mapping[str, Logged], yardstick: Measure, digits: float, progress: Progress
) -> Verdict:
    """Holds every text of a log against the model.

    Args:
        digits: half a step of the decimals that the log keeps.
        progress: called with texts done and in all, in every pass over them, and with causes tried
            and in all.

    Raises:
        UserError: a text has ids that the model hasn't, or is too long for it.
    """
    texts = [text for text in log.values() if text.prompt is not None]
    left_out = len(log) - len(texts)
    why = (
        f"{left_out} of {len(log)} texts: their prompts' ids are not in the log ('prompt')"
        if left_out
        else ""
    )
    search = _Search(texts, yardstick, digits, progress)
    if search.values < LEAST:
        few = f"{search.values} values after a first token, where {LEAST} are needed"
        return Verdict("not judged", why="; ".join(filter(None, (why, few))))
    return dataclasses.replace(search.verdict(), why=why)


class _Search:
    def __init__(
        self, texts: Sequence[Logged], yardstick: Measure, digits: float, progress: Progress
    ):
        self.texts, self.yardstick, self.digits = texts, yardstick, digits
        self.progress, self.levels = progress, yardstick.levels
        spread = np.linspace(0, len(texts) - 1, min(SAMPLE_TEXTS, len(texts))).round()
        chosen = set(spread.astype(int).tolist())
        rows_each = -(-SAMPLE_ROWS // max(len(chosen), 1))
        self.chosen = [texts[i] for i in sorted(chosen)]
        self.plain: dict[Level, list[Predicted]] = {level: [] for level in self.levels}
        sample = []
        for done, text in enumerate(texts, start=1):
            rows = yardstick.rows(text)
            for level in self.levels:
                self.plain[level].append(predict(Path(), at(rows, level), digits))
            if done - 1 in chosen:
                sample.append(_some(rows, rows_each))
            progress(done, len(texts))
        self.sample = sample
        self._pairs: dict[Changes, list[Changes]] = {}
        self.fits = {level: fit(found) for level, found in self.plain.items()}
        self.values = self.fits[self.levels[0]].values

    def verdict(self) -> Verdict:
        plain = next((level for level in self.levels if self.fits[level].within), None)
        finer = self.levels if plain is None else self.levels[: self.levels.index(plain)]
        # Between the two a number that is fitted would make up for bfloat16's own roundings.
        told = [level for level in finer if level.name in TOLD]
        if told and (found := self._explained(told)):
            return found
        if plain is not None:
            declared = self._finer_than(plain)
            return Verdict("rounding", plain.name, self.fits[plain], declared=declared)
        coarsest = self.levels[-1]
        return Verdict("unexplained", coarsest.name, self.fits[coarsest], where=self._where())

    def _finer_than(self, level: Level) -> str:
        """What some line says that its engine computed in, where that is no such level."""
        for dtype in dict.fromkeys(text.dtype for text in self.texts if text.dtype in UNIT):
            unit = UNIT[dtype] / UNIT["bfloat16"]
            if level.unit > next((one.unit for one in self.levels if one.unit >= unit), unit):
                return dtype
        return ""

    def _explained(self, levels: Sequence[Level]) -> Verdict | None:
        for level in levels:
            # The dearest last: a pair takes a hundred times what a single cause does.
            found = self._of_stage(self._singles, level) or self._by_context(level)
            if found := found or self._of_pairs(level):
                return found
        return None

    def _of_pairs(self, level: Level) -> Verdict | None:
        for first in self._helpful:
            if found := self._of_stage(self._with(first), level):
                return found
        return None

    def _of_stage(self, candidates: Sequence[Changes], level: Level) -> Verdict | None:
        """The fewest of these changes that explain the log at a level."""
        found = (self._likely(changes, level) for changes in candidates)
        likely = [changes for changes in found if changes is not None]
        for size in sorted({len(c) for c in likely}):
            if proven := self._proven([c for c in likely if len(c) == size], level):
                return self._told(proven, level)
        return None

    @functools.cached_property
    def fitted_on(self) -> Sample:
        rows = [at(rows, self.levels[0]) for rows in self.sample]
        return Sample(rows, [text.sampling for text in self.chosen], self.digits)

    @functools.cached_property
    def _singles(self) -> list[Changes]:
        """What the log declares, all subsets of it, and every cause by itself."""
        own = causes.subsets(causes.declared(self.fitted_on.sampling))
        return [*own, *causes.singles(self.fitted_on)]

    def _with(self, first: Changes) -> list[Changes]:
        """These changes with one more."""
        if first not in self._pairs:
            self._pairs[first] = causes.pairs(self.fitted_on, first, self.progress)
        return self._pairs[first]

    @functools.cached_property
    def _helpful(self) -> list[Changes]:
        """Those that make the error smaller by themselves, the best first."""
        sample = self.fitted_on
        plain = sample.score(())
        scores = {changes: sample.score(changes) for changes in self._singles}
        helpful = [c for c in sorted(scores, key=scores.__getitem__) if plain > _HINT * scores[c]]
        return helpful[:_BEAM]

    def _likely(self, changes: Changes, level: Level) -> Changes | None:
        """The changes with no more digits than this level's rounding tells apart, if they fit."""
        if level is not self.levels[0] and causes.rounds(changes):
            return None
        tried = dict.fromkeys(causes.shorter(changes))
        return next((c for c in tried if self._fits(c, self.sample, level)), None)

    def _fits(self, changes: Changes, rows: Sequence[Rows], level: Level) -> bool:
        found = fit(
            [
                predict(causes.path(changes, text.sampling), at(r, level), self.digits)
                for text, r in zip(self.chosen, rows, strict=True)
            ]
        )
        return found.within and found.values > 0

    def _proven(self, likely: Sequence[Changes], level: Level) -> list[tuple[Changes, Fit]]:
        """Those that hold in every text, the best first."""
        if not likely:
            return []
        found: list[list[Predicted]] = [[] for _ in likely]
        for done, text in enumerate(self.texts, start=1):
            for rows in self._all_of(text, level):
                for changes, kept in zip(likely, found, strict=True):
                    kept.append(predict(causes.path(changes, text.sampling), rows, self.digits))
            self.progress(done, len(self.texts))
        fits = [(changes, fit(kept)) for changes, kept in zip(likely, found, strict=True)]
        return sorted((f for f in fits if self._proves(f[1], level)), key=lambda f: f[1].rms)

    def _proves(self, found: Fit, level: Level) -> bool:
        before = self.fits[level]
        smaller = before.rms >= GAIN * found.rms and before.nats >= GAIN * found.nats
        return found.values >= LEAST and found.within and smaller

    def _told(self, proven: Sequence[tuple[Changes, Fit]], level: Level) -> Verdict:
        named = [tuple(self._said(change) for change in changes) for changes, _ in proven]
        (_, best), *_ = proven
        others = tuple(dict.fromkeys(names for names in named[1:] if names != named[0]))
        return Verdict("cause", level.name, self.fits[level], best, named[0], others)

    def _said(self, change: Change) -> str:
        """With the value that is declared, where it is one."""
        if change.value is None:
            values = {change.on(text.sampling)[change.field] for text in self.texts}
            if len(values) == 1:
                return f"{change.name} {values.pop():g}"
        return change.said

    def _by_context(self, level: Level) -> Verdict | None:
        """Whether another context gives the log: a token before it, or no prompt."""
        for context in contexts(self.texts, self.yardstick.stops):
            if self._of_context(context, self.chosen[:1], level).within:
                found = self._of_context(context, self.texts, level)
                if self._proves(found, level):
                    names = (context.name,)
                    return Verdict("cause", level.name, self.fits[level], found, names)
        return None

    def _of_context(self, context: Context, texts: Sequence[Logged], level: Level) -> Fit:
        return fit(
            [
                predict(Path(), rows, self.digits)
                for text in texts
                for rows in self._all_of(text, level, context.before, context.prompt)
            ]
        )

    def _all_of(
        self, text: Logged, level: Level, before: tuple[int, ...] = (), prompt: bool = True
    ) -> Iterator[Rows]:
        """All that was logged of a text: a value for each token, and what stands beside them."""
        rows = at(self.yardstick.rows(text, before, prompt), level)
        yield rows
        yield from self.yardstick.columns(text, rows)

    def _where(self) -> str:
        """Some texts alone, or some position on, at the finest level that tells them apart."""
        for level in self.levels:
            first = [_first(predicted) for predicted in self.plain[level]]
            wrong = [i for i, place in enumerate(first) if place is not None]
            parts = []
            if 2 * len(wrong) <= len(first):
                names = ", ".join(f"{self.texts[i].name!r:.40}" for i in wrong[:8])
                more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
                parts.append(f"in {len(wrong)} of {len(first)} texts alone ({names}{more})")
            places = [place for place in first if place is not None]
            if places and min(places) >= LEAST:
                span = f"{min(places)}" if len(set(places)) == 1 else f"{min(places)} or later"
                parts.append(f"from position {span} on")
            if parts:
                rest = f"all else is within rounding of {level.name}"
                return f"{', '.join(parts)}; {rest}"
        return ""


def _first(predicted: Predicted) -> int | None:
    """The position of the text's first value that is off."""
    wrong = np.zeros(len(predicted.value), bool)
    wrong[predicted.there] = ~(predicted.ratio <= 1)
    return int(np.argmax(wrong)) + 1 if wrong.any() else None


def _some(rows: Rows, count: int) -> Rows:
    """Positions spread over those that have a value on either side."""
    known = np.flatnonzero(~np.isnan(rows.logged[np.maximum(rows.at(1), 0)]) & (rows.at(1) >= 0))
    if known.size > count:
        known = known[np.linspace(0, known.size - 1, count).round().astype(int)]
    return rows.take(known)
