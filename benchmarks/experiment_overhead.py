"""What an experiment costs besides running the model, and whether its memory stays constant.

A sweep of 200 points of the bundled model, each 16 haiku: how much of the wall time, from the start
of the process to its end, is neither execution nor compilation. Execution is the engine's programs,
from the call until the device has the result; what the host does between two of them, such as
turning ids into text and writing records, is not. Then a point with 100,000 prompts:
resident memory while they stream through.

    python -m benchmarks.experiment_overhead [--prompts 100000]
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from qwen_jax.engine import steps
from qwen_jax.engine.memory import compile_seconds
from qwen_jax.experiments.task import Metrics, Work
from qwen_jax.experiments.tasks.generate import Generate

RUN = [sys.executable, str(Path(__file__).parents[1] / "run.py"), "experiment"]
CONFIG = """
from qwen_jax.experiments import axis, product
from qwen_jax.settings import get_config as defaults
def get_config():
    config = defaults()
    config.prompt_file = {prompts!r}
    config.slots, config.max_tokens, config.raw = {slots}, {max_tokens}, {raw}
    config.experiment.task = "benchmarks.experiment_overhead:Timed"
    return config
def get_sweep():
    return product(
        axis("sampling.temperature", [0.5 + 0.1 * i for i in range({temperatures})]),
        axis("sampling.seed", range(0, 16 * {seeds}, 16)),
    )
"""


class Timed(Generate):
    """The task `generate`, with a clock around the engine."""

    def run(self, work: Work) -> Metrics:
        self.seconds = 0.0
        programs = {name: getattr(steps, name) for name in ("extend", "step", "insert")}
        vars(steps).update({name: self._timed(program) for name, program in programs.items()})
        try:
            metrics = super().run(work)
        finally:
            vars(steps).update(programs)
        return metrics | {"engine_seconds": self.seconds}

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            start, compiled = time.perf_counter(), compile_seconds()
            result = jax.block_until_ready(function(*args))
            self.seconds += time.perf_counter() - start - (compile_seconds() - compiled)
            return result

        return timed


def command(folder: Path, **fields: object) -> tuple[list[str], Path]:
    """The command that runs a sweep in a folder, and its workdir."""
    (folder / "config.py").write_text(CONFIG.format(**fields))
    workdir = folder / "run"
    return [*RUN, f"--config={folder / 'config.py'}", f"--workdir={workdir}"], workdir


def overhead(folder: Path) -> dict[str, float]:
    """Seconds of 200 points, and of what."""
    folder.mkdir()
    prompts = folder / "prompts.txt"
    words = ["river", "lantern", "snow", "fern", "crow", "moss", "tide", "dust"] * 2
    prompts.write_text("".join(f"Write a haiku that contains the word {w}.\n" for w in words))
    fields = {"slots": 16, "max_tokens": 64, "raw": False, "temperatures": 10, "seeds": 20}
    argv, workdir = command(folder, prompts=str(prompts), **fields)
    start = time.perf_counter()
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    total = time.perf_counter() - start
    with (workdir / "metrics.jsonl").open() as file:
        ends = [e for line in file if (e := json.loads(line))["event"] == "finished"]
    execution = sum(end["metrics"]["engine_seconds"] for end in ends)
    compiling = sum(end["compile_seconds"] for end in ends)
    return {
        "points": len(ends),
        "total": total,
        "execution": execution,
        "compilation": compiling,
        "other": total - execution - compiling,
        "of which outside points": total - sum(end["seconds"] for end in ends),
        "share": (total - execution - compiling) / total,
    }


def memory(folder: Path, count: int) -> list[tuple[int, float]]:
    """Answers written and resident megabytes, ten times while prompts stream through."""
    folder.mkdir()
    prompts = folder / "prompts.jsonl"
    with prompts.open("w") as file:
        for number in range(count):
            file.write(json.dumps({"id": f"prompt {number}", "prompt": f"rain {number}"}) + "\n")
    fields = {"slots": 128, "max_tokens": 1, "raw": True, "temperatures": 1, "seeds": 1}
    argv, workdir = command(folder, prompts=str(prompts), **fields)
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    outputs, position, answers = workdir / "outputs.jsonl", 0, 0
    seen: list[tuple[int, float]] = []
    while process.poll() is None:
        time.sleep(0.05)
        if outputs.exists():
            with outputs.open("rb") as file:
                file.seek(position)
                data = file.read()
            position += len(data)
            answers += data.count(b"\n")
        status = Path(f"/proc/{process.pid}/status")
        if answers >= (len(seen) + 1) * count // 10:
            fields_of = dict(line.split(":", 1) for line in status.read_text().splitlines())
            if "VmRSS" in fields_of:
                seen.append((answers, int(fields_of["VmRSS"].split()[0]) / 1e3))
    if process.returncode:
        raise RuntimeError(f"{' '.join(argv)} failed")
    return seen


def main(prompts: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        seconds = overhead(Path(name) / "overhead")
        resident = memory(Path(name) / "memory", prompts)
    print("| 200 points | |\n| --- | --- |")
    for what, value in seconds.items():
        shown = f"{value:.1%}" if what == "share" else f"{value:,.1f} s"
        print(f"| {what} | {int(value) if what == 'points' else shown} |")
    print(f"\n| answers of {prompts:,} prompts | resident MB |\n| --- | --- |")
    for answers, megabytes in resident:
        print(f"| {answers:,} | {megabytes:,.0f} |")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    record = {
        "benchmark": "experiment_overhead",
        "seconds": {what: round(value, 3) for what, value in seconds.items()},
        "resident": [(answers, round(megabytes, 1)) for answers, megabytes in resident],
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "jax": importlib.metadata.version("jax"),
        "cores": os.cpu_count(),
    }
    print("\n" + json.dumps(record))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=100_000)
    main(parser.parse_args().prompts)
