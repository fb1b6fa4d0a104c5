"""Cache audit: whatever way a text takes through the cache, the same must come out.

The engine's own compiled functions run one text in one call, in chunks, token by token, in a used
cache, beside other texts, up to the cache's last slot and among slots that hold NaN. Each time what
the slots hold at the end and the log-probabilities after each position are held against a float64
forward pass that has no cache, within the bound of a right engine's rounding. What is outside is
explained by planting faults of caches in that pass until one gives what the engine gave.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
from jax import lax

from qwen_jax.accuracy.bounds import Arithmetic
from qwen_jax.accuracy.cache_faults import FAULTS
from qwen_jax.accuracy.cache_forward import Expected, forward
from qwen_jax.accuracy.cache_runs import Shown, run
from qwen_jax.accuracy.cache_slots import Entries, Row, Scenario, simulate
from qwen_jax.accuracy.parameters import EngineSource, Source
from qwen_jax.accuracy.replay import Residual, compare, first_position
from qwen_jax.accuracy.rounding import UNIT
from qwen_jax.accuracy.text_table import table
from qwen_jax.api import Model
from qwen_jax.engine.engine import SMALLEST_CHUNK, Engine
from qwen_jax.errors import UserError
from qwen_jax.model.cache import SMALLEST_CAPACITY
from qwen_jax.model.decoder import activation_dtype

Progress = Callable[[int, int], None]

SHORTEST = 3 * SMALLEST_CHUNK
"""Tokens a text must have: three calls of the smallest chunk."""

CHUNK = SMALLEST_CHUNK


@dataclasses.dataclass(frozen=True)
class CacheCause:
    """A fault that gives what the engine gave; `ratio` is the largest error left, in bounds."""

    name: str
    line: str
    ratio: float


@dataclasses.dataclass(frozen=True)
class CacheFinding:
    """One row of one scenario.

    Attributes:
        scenario: its name, with the row's number where there are several.
        verdict: "within rounding" or "fault".
        ratio: the largest error over its bound; at most 1 where nothing is wrong.
        error: of the log-probabilities, RMS over RMS; the largest of the scenario.
        causes: faults that explain it; empty: unknown.
        evidence: where it is first outside, in words.
    """

    scenario: str
    verdict: str
    ratio: float
    error: float
    causes: tuple[CacheCause, ...] = ()
    evidence: str = ""


def scenarios(tokens: Sequence[int], other: Sequence[int], context: int) -> list[Scenario]:
    """All ways through the cache.

    Args:
        tokens: the text, at least `SHORTEST` tokens.
        other: as many tokens of another text.
        context: the most tokens a row may have.
    """
    text, size = tuple(tokens), min(SMALLEST_CAPACITY, context // CHUNK * CHUNK)
    text = text[: size - 2 * CHUNK]
    count, capacity = len(text), size
    half = count // 2

    def chunks(prompt: int) -> tuple[int, ...]:
        return (CHUNK,) * -(-prompt // CHUNK)

    def alone(name: str, prompt: int, **more: object) -> Scenario:
        return Scenario(name, (Row(text, prompt),), chunks(prompt), capacity, **more)  # type: ignore[arg-type]

    full = (text * (size // count + 1))[:size]
    before = (tuple(other) * (size // len(other) + 1))[: -(-count // CHUNK) * CHUNK + CHUNK]
    third = count // 3
    batch = (Row(text, third), Row(tuple(other[:count]), count - 5), Row(text[: half + 3], half))
    whole = Scenario("one call", (Row(text, count),), (len(chunks(count)) * CHUNK,), capacity)
    return [
        whole,
        alone("chunks", count),
        alone("token by token", 1),
        alone("prompt, then decoding", half),
        alone("used cache", half, before=before),
        Scenario("batch", batch, chunks(count - 5), capacity),
        Scenario("full cache", (Row(full, size - CHUNK),), chunks(size - CHUNK), size, idle=1),
        alone("NaN in unused slots", half, poisoned=True),
    ]


def audit_cache(
    model: Model | Engine,
    tokens: Sequence[int] | None = None,
    *,
    source: Source | None = None,
    ways: Collection[str] | None = None,
    progress: Progress | None = None,
) -> list[CacheFinding]:
    """Every way through the cache of an engine, each row a finding.

    Args:
        tokens: the text; random ones by default. What comes after a cache's worth is not used.
        source: the right parameters; those that the engine holds by default.
        ways: names of the scenarios to run; all by default.
        progress: hears of scenarios done and in all.

    Raises:
        UserError: the text is too short, or not of this vocabulary.
    """
    engine = model.engine if isinstance(model, Model) else model
    config = engine.config
    drawn = np.random.default_rng(0).integers(0, engine.valid_tokens, (2, SHORTEST))
    text = drawn[0].tolist() if tokens is None else list(tokens)
    if len(text) < SHORTEST or not all(0 <= t < config.vocab_size for t in text):
        raise UserError(
            f"the text has {len(text)} tokens; a cache audit needs {SHORTEST} at least, each below "
            f"{config.vocab_size}."
        )
    if config.context_length < 2 * SHORTEST:
        raise UserError(
            f"{config.source}: its context of {config.context_length} is too short for a cache "
            f"audit, which takes {2 * SHORTEST} tokens."
        )
    other = (drawn[1].tolist() * (len(text) // SHORTEST + 1))[: len(text)]
    every = [
        scenario
        for scenario in scenarios(text, other, config.context_length)
        if ways is None or scenario.name in ways
    ]
    audit = _Audit(engine, source or EngineSource(engine), every)
    findings: list[CacheFinding] = []
    for done, scenario in enumerate(every, start=1):
        findings += audit.check(scenario)
        if progress:
            progress(done, len(every))
    return findings


def cache_table(findings: Sequence[CacheFinding]) -> str:
    """All ways, a row each."""
    wrong = sum(f.verdict == "fault" for f in findings)
    rows = []
    for finding in findings:
        what = "; ".join([*(f"{c.line} ({c.ratio:.2g})" for c in finding.causes), finding.evidence])
        name = " or ".join(c.name for c in finding.causes) or "unknown"
        cause = "" if finding.verdict != "fault" else name
        rows.append((finding.scenario, f"{finding.ratio:.2g}", f"{finding.error:.1g}", cause, what))
    summary = f"cache: {len(findings)} ways through it, {wrong or 'no'} fault"
    header = ("way", "of bound", "error", "cause", "what (of the bound once the cause is planted)")
    return f"{summary}\n{table(header, rows)}"


def _arithmetic(engine: Engine) -> Arithmetic:
    """As `Arithmetic.of` reads it off a trace's header."""
    weights = np.dtype(engine.cache_dtype).name
    storage = np.dtype(activation_dtype(engine.cache_dtype)).name
    operand = UNIT[weights] if weights != storage else 0.0
    precision = engine.make_model.keywords["precision"]
    if precision != lax.Precision.HIGHEST and engine.platform != "cpu":
        operand = max(operand, UNIT["tf32"])
    least = 2.0**-24 if weights == "float16" else 0.0
    return Arithmetic(UNIT[storage], operand, max(UNIT[weights], operand), least)


class _Audit:
    def __init__(self, engine: Engine, source: Source, every: Sequence[Scenario]):
        self.engine, self.source = engine, source
        self.arithmetic = _arithmetic(engine)
        # Rows share beginnings, and what comes later changes nothing before it.
        texts = sorted({row.tokens for s in every for row in s.rows}, key=len, reverse=True)
        self.truths: dict[tuple[int, ...], list[Expected]] = {}
        for text in texts:
            if not any(known[: len(text)] == text for known in self.truths):
                alone = Scenario("alone", (Row(text, len(text)),), (len(text),), len(text))
                self.truths[text] = list(self.forward(simulate(alone, alone.rows[0])))

    def truth(self, row: Row) -> Iterator[Expected]:
        """What a row's slots should hold, and its log-probabilities: no cache, no other row."""
        text, count = row.tokens, len(row.tokens)
        (known,) = (t for t in self.truths if t[:count] == text)
        for e in self.truths[known]:
            yield dataclasses.replace(e, value=e.value[:count], bound=e.bound[:count])

    def check(self, scenario: Scenario) -> Iterator[CacheFinding]:
        shown = run(self.engine, scenario, self.engine.valid_tokens)
        for number, (row, seen) in enumerate(zip(scenario.rows, shown, strict=True)):
            name = f"{scenario.name}, row {number}" if len(shown) > 1 else scenario.name
            yield self.row(name, scenario, row, seen)

    def row(self, name: str, scenario: Scenario, row: Row, seen: Shown) -> CacheFinding:
        ratio, evidence, error = 0.0, "", 0.0
        for expected, judged, first in self.judge(self.truth(row), scenario, row, seen):
            if not judged.within and not evidence:
                place = "after position" if expected.layer is None else "in slot"
                evidence = f"first outside: {expected.name}, {place} {first} of {len(row.tokens)}"
            ratio = max(ratio, judged.ratio)
            error = judged.relative
        if ratio <= 1:
            return CacheFinding(name, "within rounding", ratio, error)
        causes = tuple(self.causes(scenario, row, seen))
        return CacheFinding(name, "fault", ratio, error, causes, evidence)

    def judge(
        self, every: Iterator[Expected], scenario: Scenario, row: Row, seen: Shown
    ) -> Iterator[tuple[Expected, Residual, int]]:
        """Each tensor against the engine's, with the first slot or position that is outside."""
        for expected in every:
            shown = slice(0, None)
            if expected.layer is None:
                found = seen.logits
                decoded = any(len(r.tokens) > r.prompt for r in scenario.rows)
                shown = slice(row.prompt - 1 if decoded else 0, None)
            else:
                found = seen.keys if expected.name.startswith("keys") else seen.values
                found = found[expected.layer]
            three = found[shown], expected.value[shown], expected.bound[shown]
            yield expected, compare(*three), first_position(*three) + (shown.start or 0)

    def forward(self, entries: Entries) -> Iterator[Expected]:
        return forward(self.source, entries, self.arithmetic, self.engine.valid_tokens)

    def causes(self, scenario: Scenario, row: Row, seen: Shown) -> Iterator[CacheCause]:
        """Faults that give what the engine gave; one is given up at the first layer outside."""
        right = simulate(scenario, row)
        for fault in FAULTS:
            entries = simulate(scenario, row, fault.rules)
            if entries.same(right):
                continue
            largest = 0.0
            for _, judged, _ in self.judge(self.forward(entries), scenario, row, seen):
                largest = max(largest, judged.ratio)
                if not judged.within:
                    break
            else:
                yield CacheCause(fault.name, fault.line, largest)
