"""How long a user waits: for --help, a Qwen-sized header and tokenizer, and the first token.

The first token of `python run.py` is timed from the start of the process to the first byte on
stdout, with an empty compilation cache and with the one that the run before has filled.

    python -m benchmarks.startup [--rounds 5]
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
from pathlib import Path
from statistics import median

from benchmarks.random_model import qwen, write
from qwen_jax.text.tokenizer import Tokenizer
from qwen_jax.weights.gguf_file import open_gguf

RUN = [sys.executable, str(Path(__file__).parents[1] / "run.py")]


def help_seconds() -> float:
    start = time.perf_counter()
    subprocess.run([*RUN, "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def first_token_seconds(cache: Path) -> float:
    """From the start of the process to its first byte of text."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    start = time.perf_counter()
    command = subprocess.Popen(
        RUN, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert command.stdout is not None
    command.stdout.read(1)
    seconds = time.perf_counter() - start
    command.stdout.read()
    if command.wait():
        raise RuntimeError(f"{' '.join(RUN)} failed")
    return seconds


def header_seconds(path: Path) -> tuple[float, float]:
    """Of reading all before the tensors' bytes, and of building the tokenizer."""
    start = time.perf_counter()
    metadata = open_gguf(path).metadata
    parsed = time.perf_counter()
    Tokenizer.from_gguf(metadata, str(path))
    return parsed - start, time.perf_counter() - parsed


def main(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "vocabulary.gguf"
        # Qwen2.5's 151,936 tokens on the smallest of models.
        config = qwen(1, 32, 2, 1, 16, 32, 151_936, True)
        write(path, config, 0, "F16")
        headers, tokenizers = zip(*(header_seconds(path) for _ in range(rounds)), strict=True)
        cold, warm = [], []
        for turn in range(rounds):
            cache = Path(name) / f"cache{turn}"
            cold.append(first_token_seconds(cache))
            warm.append(first_token_seconds(cache))
    seconds = {
        "--help": [help_seconds() for _ in range(rounds)],
        "header of 151,936 tokens": list(headers),
        "its tokenizer": list(tokenizers),
        "first token, cold cache": cold,
        "first token, warm cache": warm,
    }
    print("| seconds | median | least | most |\n| --- | --- | --- | --- |")
    for what, times in seconds.items():
        print(f"| {what} | {median(times):.2f} | {min(times):.2f} | {max(times):.2f} |")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    record = {
        "benchmark": "startup",
        "seconds": {what: [round(t, 3) for t in times] for what, times in seconds.items()},
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "jax": importlib.metadata.version("jax"),
        "cores": os.cpu_count(),
    }
    print("\n" + json.dumps(record))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    main(parser.parse_args().rounds)
