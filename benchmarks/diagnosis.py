"""Plants every fault of the catalogue in the engine and looks whether the laboratory names it.

Clean runs first, in float32, bfloat16 and float16 (any alarm is a failure); then every fault alone,
pairs and triples at random, and faults that are not in the catalogue, which must be answered
"unknown" with the right operation. On two small random models and on the bundled one.
"""

import argparse
import collections
import dataclasses
import datetime
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from qwen_jax import api
from qwen_jax.accuracy.exact.parameters import EngineSource
from qwen_jax.accuracy.tensors.diagnosis import Diagnosis, diagnose, possible_faults
from qwen_jax.accuracy.tensors.faults.catalogue import FAULTS
from qwen_jax.accuracy.tensors.faults.fault import Fault, Planted
from qwen_jax.accuracy.tensors.planting import planted
from qwen_jax.accuracy.traces.recording import Recorder
from qwen_jax.config import ModelConfig
from qwen_jax.engine.engine import Engine
from qwen_jax.model.tap import intervening
from qwen_jax.weights.names import parameters

PROMPT, CHUNK, LENGTH = 32, 16, 48
"""Two chunks of a prompt and sixteen decode steps: mask and cache faults need several calls."""


def random_engine(*, heads: int, tied: bool, seed: int, dtype: str = "float32") -> Engine:
    """A small model with peaked attention, large biases and norms away from one."""
    config = ModelConfig(3, 96, heads, 2, 32, 224, 128, 1024, 1e6, 1e-6, tied, source="random")
    rng = np.random.default_rng(seed)
    weights = {}
    for parameter in parameters(config, "gguf"):
        if parameter.keep_float32:
            value = 1 + 0.3 * rng.standard_normal(parameter.shape)
        elif parameter.name.endswith("bias"):
            value = 0.5 * rng.standard_normal(parameter.shape)
        else:
            value = 1.5 * rng.standard_normal(parameter.shape) / parameter.shape[1] ** 0.5
        kept = "float32" if parameter.keep_float32 else dtype
        weights[parameter.name] = jnp.asarray(value, kept)
    return Engine(config, weights)


def models(dtype: str = "float32") -> dict[str, Engine]:
    return {
        "random tied, N=6, K=2": random_engine(heads=6, tied=True, seed=1, dtype=dtype),
        "random untied, N=K=2": random_engine(heads=2, tied=False, seed=2, dtype=dtype),
        "bundled": api.load(dtype=dtype).engine,
    }


def text(engine: Engine, seed: int) -> list[int]:
    rng = np.random.default_rng([seed, 7])
    return rng.integers(0, engine.config.vocab_size, LENGTH).tolist()


class Once(Recorder):
    """Records without the run beside it, which would double what is compiled for every case."""

    def __init__(self, engine: Engine):
        super().__init__(engine)
        self._plain = self._traced


def examine(engine: Engine, faults: Sequence[Fault], seed: int) -> Diagnosis:
    with planted(engine, [Planted(fault) for fault in faults]) as wrong:
        trace = Once(wrong).record(text(engine, seed), prompt_length=PROMPT, chunk=CHUNK)
    return diagnose(trace, EngineSource(engine))


def clean(prompts: int) -> dict[str, dict[str, float]]:
    """By model and dtype: alarms, operations judged, and the largest error over its bound."""
    out = {}
    for dtype in ("float32", "bfloat16", "float16"):
        for name, engine in models(dtype).items():
            recorder, source = Recorder(engine), EngineSource(engine)
            alarms, judged, largest = 0, 0, 0.0
            for seed in tqdm(range(prompts), desc=f"clean, {name}, {dtype}", disable=None):
                trace = recorder.record(text(engine, seed), prompt_length=PROMPT, chunk=CHUNK)
                diagnosis = diagnose(trace, source)
                alarms += len(diagnosis.faulty)
                judged += len(diagnosis.findings)
                largest = max(largest, *(f.residual.ratio for f in diagnosis.findings))
            out[f"{name}, {dtype}"] = {"alarms": alarms, "judged": judged, "largest": largest}
    return out


def apart(first: Fault, second: Fault, config: ModelConfig) -> bool:
    """Whether two faults can be planted together and both be seen: they change other operations,
    or the same ones in other ways, and neither wipes out what the other does."""
    if not set(first.operations) & set(second.operations):
        return True
    if first.parameters and second.parameters:
        return False
    changed = [{key for c in f.knobs(config) for key in c} for f in (first, second)]
    return not changed[0] & changed[1] and not {first.name, second.name} & ERASING


ERASING = frozenset(
    {"rope_missing", "rope_q_missing", "rope_k_missing", "final_norm_missing"}
    | {name for name in FAULTS if name.startswith(("zeroed_", "zero_"))}
)
"""With these, another fault of the same operation changes nothing: nothing is left to be wrong."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What was planted where, and what came back."""

    model: str
    planted: tuple[str, ...]
    named: tuple[str, ...]
    ties: tuple[tuple[str, ...], ...]
    unknown: tuple[str, ...]
    seconds: float

    @property
    def exact(self) -> bool:
        return set(self.named) == set(self.planted) and not self.unknown

    @property
    def unique(self) -> bool:
        return self.exact and not self.ties


def run(
    engines: dict[str, Engine], drawn: Iterable[tuple[str, tuple[Fault, ...]]], what: str
) -> list[Case]:
    cases = []
    for seed, (model, faults) in enumerate(tqdm(list(drawn), desc=what, disable=None)):
        began = time.perf_counter()
        found = examine(engines[model], faults, seed)
        cases.append(
            Case(
                model,
                tuple(f.name for f in faults),
                found.named,
                tuple(tie for cause in found.causes for tie in cause.ties),
                tuple(u.finding.name for u in found.unknown),
                time.perf_counter() - began,
            )
        )
    return cases


def draw(
    engines: dict[str, Engine], count: int, size: int, rng: np.random.Generator
) -> Iterable[tuple[str, tuple[Fault, ...]]]:
    """Sets of faults that can be there together, the models in turn."""
    for model in itertools.islice(itertools.cycle(engines), count):
        config = engines[model].config
        able = possible_faults(config)
        while True:
            chosen = [able[i] for i in rng.choice(len(able), size, replace=False)]
            if all(apart(a, b, config) for a, b in itertools.combinations(chosen, 2)):
                yield model, tuple(chosen)
                break


Strange = Callable[[jax.Array], jax.Array]

OUTSIDE: dict[str, tuple[str, Strange]] = {
    "q_rope of head 0 negated": ("q_rope", lambda x: x.at[:, :, 0].multiply(-1)),
    "values of head 1 shifted by one dimension": (
        "v_proj",
        lambda x: x.at[:, :, 1].set(jnp.roll(x[:, :, 1], 1, axis=-1)),
    ),
    "o_proj 1.01 times too large": ("o_proj", lambda x: x * 1.01),
    "the last dimension of ffn_norm zero": ("ffn_norm", lambda x: x.at[..., -1].set(0)),
    "gate clipped to 1": ("gate_proj", lambda x: jnp.minimum(x, 1)),
    "ffn_act plus 0.01": ("ffn_act", lambda x: x + 0.01),
    "dimension 5 of the stream not added to": ("ffn_residual", lambda x: x.at[..., 5].set(0)),
    "logits divided by 0.9": ("logits", lambda x: x / 0.9),
}
"""Faults that no entry of the catalogue describes: an operation, and what becomes of its tensor."""


@dataclasses.dataclass(frozen=True)
class Outside:
    """A fault that is not in the catalogue, and the answer."""

    model: str
    line: str
    operation: str
    unknown: tuple[str, ...]
    named: tuple[str, ...]

    @property
    def right(self) -> bool:
        """Unknown, in its operation and nowhere else."""
        return self.unknown == (self.operation,) and not self.named


def outside(engines: dict[str, Engine]) -> list[Outside]:
    out = []
    for (model, engine), (line, (operation, strange)) in itertools.product(
        engines.items(), OUTSIDE.items()
    ):

        def intervene(
            name: str, x: jax.Array, operation: str = operation, strange: Strange = strange
        ) -> jax.Array:
            return strange(x) if name.split(".")[-1] == operation else x

        with intervening(intervene):
            trace = Once(engine).record(text(engine, 0), prompt_length=PROMPT, chunk=CHUNK)
        found = diagnose(trace, EngineSource(engine))
        where = tuple(sorted({u.finding.operation for u in found.unknown}))
        out.append(Outside(model, line, operation, where, found.named))
    return out


def share(cases: Sequence[Case], what: Callable[[Case], bool]) -> float:
    return sum(map(what, cases)) / max(len(cases), 1)


def table(title: str, cases: Sequence[Case]) -> list[str]:
    lines = [
        f"\n## {title}\n",
        f"{share(cases, lambda c: c.exact):.1%} of {len(cases)} named exactly, "
        f"{share(cases, lambda c: c.unique):.1%} with no other explanation that fits as well; "
        f"{np.mean([c.seconds for c in cases]):.1f} s each.\n",
    ]
    rest = [case for case in cases if not case.unique]
    if rest:
        lines += [
            "| model | planted | named | fits as well | unknown |",
            "| --- | --- | --- | --- | --- |",
        ]
    for case in rest:
        ties = "; ".join(" + ".join(tie) for tie in case.ties)
        columns = [case.model, *map(", ".join, (case.planted, case.named)), ties]
        lines.append(f"| {' | '.join(columns)} | {', '.join(case.unknown)} |")
    return lines


def confusion(cases: Sequence[Case]) -> list[str]:
    """Planted by named, summed over areas."""
    areas = list(dict.fromkeys(fault.area for fault in FAULTS.values()))
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for case in cases:
        hit = set(case.planted) & set(case.named)
        counts.update((FAULTS[name].area, FAULTS[name].area) for name in hit)
        missed = [n for n in case.planted if n not in hit]
        extra = [n for n in case.named if n not in hit]
        for one, other in itertools.zip_longest(missed, extra):
            counts[FAULTS[one].area if one else "nothing", f"not {one}" if one else "extra"] += 1
            if other:
                counts["wrongly named", FAULTS[other].area] += 1
    rows = [*areas, "nothing", "wrongly named"]
    lines = ["\n## Confusion matrix\n", "Faults planted (rows) and named (columns), by area.\n"]
    lines += [f"| | {' | '.join(areas)} | not named |", "| --- |" + " ---: |" * (len(areas) + 1)]
    for row in rows:
        lost = sum(n for (r, c), n in counts.items() if r == row and c.startswith("not "))
        cells = [str(counts[row, column] or ".") for column in areas]
        if any(cell != "." for cell in cells) or lost:
            lines.append(f"| {row} | {' | '.join(cells)} | {lost or '.'} |")
    return lines


def clean_table(quiet: dict[str, dict[str, float]]) -> list[str]:
    head = "| model, dtype | alarms | operations judged | largest error / bound |"
    return ["\n## Clean runs\n", head, "| --- | ---: | ---: | ---: |"] + [
        f"| {name} | {q['alarms']:.0f} | {q['judged']:.0f} | {q['largest']:.2f} |"
        for name, q in quiet.items()
    ]


def outside_table(strange: Sequence[Outside]) -> list[str]:
    lines = ["\n## Faults outside of the catalogue\n", "| model | fault | unknown in | right |"]
    lines += ["| --- | --- | --- | --- |"]
    for one in strange:
        named = f" (named {', '.join(one.named)})" if one.named else ""
        found, right = ", ".join(one.unknown) + named, "yes" if one.right else "NO"
        lines.append(f"| {one.model} | {one.line} | {found} | {right} |")
    return lines


def heading() -> list[str]:
    """Date, device, versions, commit and command of a recorded result."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    python = ".".join(map(str, sys.version_info[:3]))
    return [
        "# The accuracy laboratory on faults planted in the engine\n",
        f"{datetime.date.today()}, {jax.devices()[0].device_kind}, Python {python}, "
        f"JAX {jax.__version__}, NumPy {np.__version__}, commit {commit}\n",
        f"    python -m benchmarks.diagnosis {' '.join(sys.argv[1:])}".rstrip(),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=20, help="clean runs of each dtype")
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--triples", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the tables here")
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    lines: list[str] = []

    def show(more: Sequence[str]) -> None:
        print("\n".join(more), flush=True)
        lines.extend(more)
        if args.out:
            args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")

    show(heading())
    quiet = clean(args.prompts)
    show(clean_table(quiet))
    engines = models()
    strange = outside(engines)
    show(outside_table(strange))
    singles = [(model, (f,)) for model, e in engines.items() for f in possible_faults(e.config)]
    groups = {}
    for title, drawn in {
        "Single faults": singles,
        "Pairs": draw(engines, args.pairs, 2, rng),
        "Triples": draw(engines, args.triples, 3, rng),
    }.items():
        groups[title] = run(engines, drawn, title)
        show(table(title, groups[title]))
    show(confusion([case for cases in groups.values() for case in cases]))
    summary = {
        "faults": len(FAULTS),
        "clean_alarms": sum(q["alarms"] for q in quiet.values()),
        "clean_judged": sum(q["judged"] for q in quiet.values()),
        **{title: round(share(cases, lambda c: c.exact), 4) for title, cases in groups.items()},
        "unknown_right": sum(one.right for one in strange) / len(strange),
        "seed": args.seed,
    }
    show(["\n" + json.dumps(summary)])


if __name__ == "__main__":
    main()
