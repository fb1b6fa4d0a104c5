"""What an experiment costs besides running the model, and whether its memory stays constant.

A sweep of 200 points of the bundled model, each 16 haiku: how much of the wall time, from the start
of the process to its end, is neither execution nor compilation. Execution is the engine's programs,
from the call until the device has the result; what the host does between two of them, such as
turning ids into text and writing records, is not. The same in seconds of processor time, which
other processes on the machine disturb less. Then a point with 100,000 prompts: resident memory
while they stream through.

    python -m benchmarks.experiment_overhead [--prompts 100000]
"""

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from qwen_jax.engine import calls
from qwen_jax.engine.memory import compile_seconds
from qwen_jax.executables.kept import Kept
from qwen_jax.experiments.task import Metrics, Work
from qwen_jax.experiments.tasks.generate import Generate

RUN = [sys.executable, str(Path(__file__).parents[1] / "run.py"), "experiment"]
CLOCKS = "clocks.jsonl"
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
        clocks = {name: Clock(getattr(calls, name)) for name in ("extend", "step", "insert")}
        vars(calls).update(clocks)
        try:
            metrics = super().run(work)
        finally:
            vars(calls).update({name: clock.program for name, clock in clocks.items()})
        of = [(clock.seconds, clock.processor_seconds) for clock in clocks.values()]
        with (work.directory / CLOCKS).open("a") as file:
            file.write(json.dumps([sum(seconds) for seconds in zip(*of, strict=True)]) + "\n")
        return metrics


class Clock:
    """One of the engine's programs, and how long its calls take until the device has the result."""

    def __init__(self, program: Kept):
        self.program, self.prepare = program, program.prepare
        self.seconds = self.processor_seconds = 0.0

    def __call__(self, *args: Any) -> Any:
        start, busy, compiled = time.perf_counter(), time.process_time(), compile_seconds()
        result = jax.block_until_ready(self.program(*args))
        compiling = compile_seconds() - compiled
        self.seconds += time.perf_counter() - start - compiling
        self.processor_seconds += time.process_time() - busy - compiling
        return result


def command(folder: Path, **fields: object) -> tuple[list[str], Path]:
    """The command that runs a sweep in a folder, and its workdir."""
    (folder / "config.py").write_text(CONFIG.format(**fields))
    workdir = folder / "run"
    return [*RUN, f"--config={folder / 'config.py'}", f"--workdir={workdir}"], workdir


def overhead(folder: Path) -> dict[str, tuple[float, float]]:
    """Seconds of 200 points, and of what: by the clock, and of processor time."""
    folder.mkdir()
    prompts = folder / "prompts.txt"
    words = ["river", "lantern", "snow", "fern", "crow", "moss", "tide", "dust"] * 2
    prompts.write_text("".join(f"Write a haiku that contains the word {w}.\n" for w in words))
    fields = {"slots": 16, "max_tokens": 64, "raw": False, "temperatures": 10, "seeds": 20}
    argv, workdir = command(folder, prompts=str(prompts), **fields)
    start, busy = time.perf_counter(), _of_children()
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    total, busy = time.perf_counter() - start, _of_children() - busy
    with (workdir / "metrics.jsonl").open() as file:
        ends = [e for line in file if (e := json.loads(line))["event"] == "finished"]
    if len(ends) != 200:
        raise RuntimeError(f"{' '.join(argv)} finished {len(ends)} points of 200")
    with (workdir / CLOCKS).open() as file:
        of_engine = [json.loads(line) for line in file]
    execution, executing = (sum(seconds) for seconds in zip(*of_engine, strict=True))
    compiling = sum(end["compile_seconds"] for end in ends)
    other, others = total - execution - compiling, busy - executing - compiling
    return {
        "total": (total, busy),
        "execution": (execution, executing),
        "compilation": (compiling, compiling),
        "other": (other, others),
        "share": (other / total, others / busy),
    }


def _of_children() -> float:
    """Seconds of processor time of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


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
    print("| 200 points | by the clock | processor time |\n| --- | --- | --- |")
    for what, values in seconds.items():
        clock, busy = (f"{v:.1%}" if what == "share" else f"{v:,.1f} s" for v in values)
        print(f"| {what} | {clock} | {busy} |")
    print(f"\n| answers of {prompts:,} prompts | resident MB |\n| --- | --- |")
    for answers, megabytes in resident:
        print(f"| {answers:,} | {megabytes:,.0f} |")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    record = {
        "benchmark": "experiment_overhead",
        "seconds": {what: [round(v, 3) for v in values] for what, values in seconds.items()},
        "resident": [(answers, round(megabytes, 1)) for answers, megabytes in resident],
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "jax": importlib.metadata.version("jax"),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[1],
    }
    print("\n" + json.dumps(record))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=100_000)
    main(parser.parse_args().prompts)
