"""Cache audit: whatever way a text takes through the cache, the same must come out.

The engine's own compiled functions run one text in one call, in pieces, token by token, in pages of
any order, in the slot and the pages of a text before it, beside other texts, behind a page that two
texts share, up to the last slot of its table and among slots that hold NaN. Each time what the
slots hold at the end and the log-probabilities after each position are held against a float64
forward pass that has no cache, within the bound of a right engine's rounding. What is outside is
explained by planting faults of caches in that pass until one gives what the engine gave.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
from jax import lax

from qwen_jax.accuracy.beside import Beside
from qwen_jax.accuracy.cache.faults import FAULTS
from qwen_jax.accuracy.cache.forward import Expected, forward
from qwen_jax.accuracy.cache.runs import Shown, run
from qwen_jax.accuracy.cache.scenarios import FULL, LENGTH, scenarios
from qwen_jax.accuracy.cache.slots import Row, Scenario, simulate
from qwen_jax.accuracy.cache.truths import Truths, truths
from qwen_jax.accuracy.exact.bounds import Arithmetic
from qwen_jax.accuracy.exact.parameters import ArraySource, Source
from qwen_jax.accuracy.exact.replay import Residual, compare, first_position
from qwen_jax.accuracy.exact.rounding import UNIT
from qwen_jax.accuracy.finding import Cause, Progress, wrong
from qwen_jax.api import Model
from qwen_jax.engine.engine import Engine
from qwen_jax.errors import UserError
from qwen_jax.reporting.table import Table

MOST = 1 << 24
"""Log-probabilities of a text that are looked at, 128 MB: of a vocabulary of 151,936 those after
every fourth position."""


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
    causes: tuple[Cause, ...] = ()
    evidence: str = ""


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
        tokens: the text; random ones by default. Only the first of them are used.
        source: the right parameters; those that the engine holds by default.
        ways: names of the scenarios to run; all by default.
        progress: hears of scenarios done and in all.

    Raises:
        UserError: the text is too short, or not of this vocabulary.
    """
    engine = model.engine if isinstance(model, Model) else model
    with Beside(engine) as device:
        audit = CacheAudit(engine, tokens, source=source, ways=ways)
        audit.begin(device)
        return audit.findings(progress)


def cache_table(findings: Sequence[CacheFinding]) -> Table:
    """All ways, a row each."""
    faults = wrong(findings)
    rows: list[tuple[str, ...]] = []
    for finding in findings:
        what = "; ".join([*(f"{c.line} ({c.left:.2g})" for c in finding.causes), finding.evidence])
        name = " or ".join(c.name for c in finding.causes) or "unknown"
        cause = "" if finding.verdict != "fault" else name
        rows.append((finding.scenario, f"{finding.ratio:.2g}", f"{finding.error:.1g}", cause, what))
    summary = f"cache: {len(findings)} ways through it, {faults or 'no'} fault"
    header: tuple[str, ...] = (
        "way",
        "of bound",
        "error",
        "cause",
        "what (of the bound once the cause is planted)",
    )
    if not any(cause or what for *_, cause, what in rows):
        header, rows = header[:3], [row[:3] for row in rows]
    return Table(header, rows, (1, 2), summary)


def _arithmetic(engine: Engine) -> Arithmetic:
    """As `Arithmetic.of` reads it off a trace's header."""
    spec = engine.spec
    weights, storage = spec.weights.name, spec.activations.name
    operand = UNIT[weights] if weights != storage else 0.0
    if spec.precision != lax.Precision.HIGHEST and engine.platform != "cpu":
        operand = max(operand, UNIT["tf32"])
    least = 2.0**-24 if weights == "float16" else 0.0
    return Arithmetic(UNIT[storage], operand, max(UNIT[weights], operand), least=least)


class CacheAudit:
    """An audit under way: `begin` has it done on a device apart, `findings` judges it.

    Args:
        engine, tokens, source, ways: as for `audit_cache`.

    Raises:
        UserError: as there.
    """

    def __init__(
        self,
        engine: Engine,
        tokens: Sequence[int] | None = None,
        *,
        source: Source | None = None,
        ways: Collection[str] | None = None,
    ):
        self.engine = engine
        config, spec = engine.config, engine.spec
        drawn = np.random.default_rng(0).integers(0, spec.valid_tokens, (2, LENGTH)).tolist()
        text = drawn[0] if tokens is None else list(tokens)
        if len(text) < LENGTH or not all(0 <= t < config.vocab_size for t in text):
            raise UserError(
                f"the text has {len(text)} tokens; a cache audit needs {LENGTH} at least, each "
                f"below {config.vocab_size}."
            )
        if config.context_length < FULL:
            raise UserError(
                f"{config.source}: its context of {config.context_length} is too short for a cache "
                f"audit, which takes {FULL} tokens."
            )
        self.source = source
        self.arithmetic = _arithmetic(engine)
        self.used = np.setdiff1d(np.arange(spec.valid_tokens), spec.unused_ids)
        self.every = -(-FULL * len(self.used) // MOST)
        self.scenarios = [
            scenario
            for scenario in scenarios(text, drawn[1], engine.shapes)
            if ways is None or scenario.name in ways
        ]
        self.shown: list[Callable[[], list[Shown]]] = []
        self.truths: Truths = {}
        self._progress: Progress | None = None

    def begin(self, device: Beside) -> None:
        """The truths, and every scenario through the engine."""
        work_out = truths if self.source else device.elsewhere(truths)

        def worked_out() -> Truths:
            self.source = self.source or ArraySource(self.engine.config, device.parameters)
            rows = [row.tokens for s in self.scenarios for row in s.rows if not row.gone]
            terms = self.arithmetic, self.used, self.every
            return work_out(self.source, rows, *terms, progress=self._tell)

        self._truths = device.begin(worked_out)
        self.shown = [
            device.begin(run, self.engine, scenario, self.used, self.every)
            for scenario in self.scenarios
        ]

    def _tell(self, done: int, total: int) -> None:
        if self._progress:
            self._progress(done, total)

    def work_out(self, progress: Progress | None = None) -> None:
        """What is begun: waits for the truths, or works them out where no device is apart."""
        self._progress = progress
        self.truths = self._truths()

    def findings(self, progress: Progress | None = None) -> list[CacheFinding]:
        """Of every row of every scenario that is begun."""
        if not self.truths:
            self.work_out()
        found: list[CacheFinding] = []
        for done, scenario in enumerate(self.scenarios, 1):
            found += self.check(scenario, self.shown.pop(0)())  # 100 MB each of a large vocabulary
            if progress:
                progress(done, len(self.scenarios))
        return found

    def truth(self, row: Row) -> Iterator[Expected]:
        """What a row's slots should hold, and its log-probabilities: no cache, no other row."""
        text, count = row.tokens, len(row.tokens)
        known = next(t for t in self.truths if t[:count] == text)
        for e in self.truths[known]:
            n = count if e.layer is not None else -(-count // self.every)
            yield dataclasses.replace(e, value=e.value[:n], bound=e.bound[:n])

    def check(self, scenario: Scenario, shown: Sequence[Shown]) -> Iterator[CacheFinding]:
        several = sum(not row.gone for row in scenario.rows) > 1
        for number, (row, seen) in enumerate(zip(scenario.rows, shown, strict=True)):
            if not row.gone:
                name = f"{scenario.name}, row {number}" if several else scenario.name
                yield self.row(name, scenario, number, seen)

    def row(self, name: str, scenario: Scenario, number: int, seen: Shown) -> CacheFinding:
        row = scenario.rows[number]
        ratio, evidence, error = 0.0, "", 0.0
        for expected, judged, first in self.judge(self.truth(row), scenario, row, seen):
            if not judged.within and not evidence:
                place = "after position" if expected.layer is None else "in slot"
                evidence = f"first outside: {expected.name}, {place} {first} of {len(row.tokens)}"
            ratio = max(ratio, judged.ratio)
            error = judged.relative
        if ratio <= 1:
            return CacheFinding(name, "within rounding", ratio, error)
        causes = tuple(self.causes(scenario, number, seen))
        return CacheFinding(name, "fault", ratio, error, causes, evidence)

    def judge(
        self, expectations: Iterator[Expected], scenario: Scenario, row: Row, seen: Shown
    ) -> Iterator[tuple[Expected, Residual, int]]:
        """Each tensor against the engine's, with the first slot or position that is outside."""
        for expected in expectations:
            start, stride = 0, 1
            if expected.layer is None:
                found, stride = seen.logits, self.every
                start = -(-row.prompt // stride) if scenario.decodes else 0
            else:
                found = seen.keys if expected.name.startswith("keys") else seen.values
                found = found[expected.layer]
            three = found[start:], expected.value[start:], expected.bound[start:]
            yield expected, compare(*three), (start + first_position(*three)) * stride

    def causes(self, scenario: Scenario, number: int, seen: Shown) -> Iterator[Cause]:
        """Faults that give what the engine gave; one is given up at the first layer outside."""
        row, right = scenario.rows[number], simulate(scenario)[number]
        assert self.source is not None
        for fault in FAULTS:
            entries = simulate(scenario, fault.rules)[number]
            if entries.same(right):
                continue
            largest = 0.0
            planted = forward(self.source, [entries], self.arithmetic, self.used, self.every)
            for _, judged, _ in self.judge((e for _, e in planted), scenario, row, seen):
                largest = max(largest, judged.ratio)
                if not judged.within:
                    break
            else:
                yield Cause(fault.name, fault.line, largest)
