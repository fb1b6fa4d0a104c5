"""How long a GPU waits for its weights, and for the first token, with files of real sizes.

    python -m benchmarks.gpu_load [--models 0.5b:F16 7b:Q8_0 7b:Q4_K_M] [--folder /tmp] [--new]

Writes random models (14 GB in all), which leaves them in the page cache. Of each it measures, in a
process of its own, the stages of a load one after another; the same with the tensors decoded on
the host, as every device had it before; and `run.py` as a whole, with an empty compilation cache
and twice with the one that it has filled: for one prompt, and for a file of the 384 uneven
requests of `gpu_requests`, unless `--one`. Memory is what no file backs. Needs Linux; takes five
minutes, of which `--new` saves the host's way. Prints two tables, then one JSON line.
"""

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_requests import lengths
from benchmarks.load_memory import Peak, own_bytes
from benchmarks.random_model import SIZES, write

RUN = [sys.executable, str(Path(__file__).parents[1] / "run.py")]
STAGES = ("imports", "device", "file", "tokenizer", "decoded", "packed", "packed again")


def measure(path: Path, on_host: bool) -> dict[str, Any]:
    """Seconds of each stage, on its own; on the host, only those of a whole load."""
    seconds: dict[str, float] = {}
    last = time.perf_counter()

    def lap(stage: str) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[stage], last = round(now - last, 3), now

    from qwen_jax import choices, opening
    from qwen_jax.engine import memory, weights
    from qwen_jax.executables.per_user import use_compilation_cache
    from qwen_jax.loading import read_tokenizer
    from qwen_jax.tasks import generate
    from qwen_jax.weights import loader

    assert generate
    lap("imports")
    memory.device()
    lap("device")
    use_compilation_cache()
    checkpoint = opening.open_model(path)
    lap("file")
    read_tokenizer(checkpoint)
    lap("tokenizer")
    dtype = choices.dtype_of("auto")
    if on_host:
        loader.decodes_there = lambda device: False

    import jax

    def load(pack: bool) -> None:
        parameters = loader.iter_parameters(checkpoint, dtype)
        if pack:
            jax.block_until_ready(weights.prepare(checkpoint.config, parameters, dtype, "auto"))
        else:
            for _, value in parameters:
                last_one = value
            last_one.block_until_ready()

    before = own_bytes()
    with Peak() as peak:
        lap("")
        if not on_host:
            load(pack=False)
            lap("decoded")
        load(pack=True)
        lap("packed")
        if not on_host:
            load(pack=True)
            lap("packed again")
    seconds.pop("")
    return {
        "seconds": seconds,
        "before": before,
        "peak": peak.bytes,
        "device_peak": memory.peak_memory()[1],
        "compilation": round(memory.compile_seconds(), 2),
        "device": memory.device().device_kind,
    }


def write_requests(path: Path) -> None:
    """A file of prompts; each digit is a token. Drawn afresh."""
    rng = np.random.default_rng()
    with path.open("w") as file:
        for prompt, answer in lengths(384):
            text = "".join(map(str, rng.integers(0, 10, prompt)))
            file.write(json.dumps({"prompt": text, "max_tokens": answer}) + "\n")


def run(path: Path, cache: Path, *asked: str) -> dict[str, float]:
    """Of one `run.py`: seconds to the first byte and to its end, and its peak."""
    command = [*RUN, f"--model={path}", *asked]
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        env=os.environ | {"XDG_CACHE_HOME": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with Peak(process.pid) as peak:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        first = time.perf_counter() - start
        process.stdout.read()
        said = process.stderr.read().decode()
        code = process.wait()
    if code:
        raise RuntimeError(f"{' '.join(command)} failed: {said}")
    compiled = re.search(r"compilation ([\d.]+) s", said)
    return {
        "first token": round(first, 2),
        "whole": round(time.perf_counter() - start, 2),
        "compilation": float(compiled[1]) if compiled else 0.0,
        "peak": peak.bytes,
    }


def measured(path: Path, way: str, cache: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.gpu_load", "--measure", str(path), way]
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["0.5b:F16", "7b:Q8_0", "7b:Q4_K_M"])
    parser.add_argument("--folder", type=Path, help="where to write the models; they are removed")
    parser.add_argument("--new", action="store_true", help="leave out the host's way")
    parser.add_argument("--one", action="store_true", help="leave out the file of prompts")
    parser.add_argument("--measure", nargs=2, metavar=("FILE", "WAY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        file, way = arguments.measure
        print(json.dumps(measure(Path(file), way == "host")))
        return
    loads: dict[str, dict[str, Any]] = {}
    runs: dict[str, list[dict[str, float]]] = {}
    for model in arguments.models:
        size, kind = model.split(":")
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            path, cache = Path(folder) / "model.gguf", Path(folder) / "cache"
            write(path, SIZES[size], 0, kind)
            prompt = ("--prompt=Hello", "--max_tokens=32")
            runs[model] = [run(path, cache, *prompt) for _ in range(3)]
            if not arguments.one:
                many = path.with_name("prompts.jsonl")
                write_requests(many)
                asked = (f"--prompt_file={many}", "--raw")
                runs[f"{model}, 384 prompts"] = [run(path, cache, *asked) for _ in range(3)]
            loads[model] = measured(path, "device", cache)
            if not arguments.new:
                loads[f"{model}, on the host"] = measured(path, "host", cache)
    print(f"| seconds | {' | '.join(STAGES)} | host peak | device peak |")
    print(f"| --- |{' --- |' * (len(STAGES) + 2)}")
    for model, load in loads.items():
        cells = [f"{load['seconds'][s]:.2f}" if s in load["seconds"] else "" for s in STAGES]
        peaks = [f"{load[key] / 1e9:.2f} GB" for key in ("peak", "device_peak")]
        print(f"| {model} | {' | '.join(cells + peaks)} |")
    print("\n| run.py | cache | first token | whole | compilation | host peak |")
    print("| --- | --- | --- | --- | --- | --- |")
    for model, three in runs.items():
        for cache_is, one in zip(("cold", "warm", "warm"), three, strict=True):
            print(
                f"| {model} | {cache_is} | {one['first token']:.2f} s | {one['whole']:.2f} s | "
                f"{one['compilation']:.2f} s | {one['peak'] / 1e9:.2f} GB |"
            )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    record = {
        "benchmark": "gpu_load",
        "loads": loads,
        "runs": runs,
        "commit": commit.stdout.strip(),
        "jax": importlib.metadata.version("jax"),
        "cores": os.cpu_count(),
    }
    print("\n" + json.dumps(record))


if __name__ == "__main__":
    main()
