"""Peak host memory while a GGUF file loads, against its bound.

The bound: the parameters in the compute dtype plus twice the largest tensor in float32. What
counts is memory that no file backs (RssAnon and RssShmem in /proc/self/status, sampled every
millisecond by a thread): the mapped pages of the file (RssFile) belong to the page cache and go
when memory is short. Each load runs in its own process; its growth over the moment before the load
is reported, after JAX has made its first array. On a CPU device the parameters themselves are in
that growth.

    python -m benchmarks.load_memory [--megabytes 300]

Needs Linux. Takes half a minute. Prints a table, then one JSON line.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType as Type

from benchmarks.random_model import random_matrix
from qwen_jax.config import ModelConfig
from qwen_jax.weights import names
from qwen_jax.weights.checkpoint import open_checkpoint
from tools.demo_gguf import add_sizes

MIB = 1 << 20
TYPES = (Type.Q8_0, Type.Q4_K, Type.Q6_K, Type.F16)


def write_model(path: Path, megabytes: int) -> None:
    """A Qwen2 of D 1024, F 4096, V 32,768, with as many layers as `megabytes` hold."""
    layers = max(1, round((megabytes - 35) / 14.5))
    config = ModelConfig(layers, 1024, 16, 4, 64, 4096, 32768, 4096, 1e6, 1e-6, tied=True)
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "qwen2", use_temp_file=True)
    add_sizes(writer, config)
    kinds = itertools.cycle(TYPES)
    for parameter in names.parameters(config, "gguf"):
        for name, shape in parameter.sources.items():
            if len(shape) == 1:
                writer.add_tensor(name, rng.normal(1, 0.1, shape).astype(np.float32))
            else:
                kind = next(kinds)
                writer.add_tensor(name, random_matrix(rng, shape, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def own_bytes(process: int | str = "self") -> int:
    """Memory of a process that no file backs; 0 once it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return sum(int(fields.get(key, "0").split()[0]) * 1024 for key in ("RssAnon", "RssShmem"))


class Peak:
    """The most `own_bytes` of a process within a `with`, sampled every millisecond."""

    def __init__(self, process: int | str = "self"):
        self.process, self.bytes, self._done = process, 0, threading.Event()
        self._sampler = threading.Thread(target=self._sample)

    def _sample(self) -> None:
        while not self._done.wait(0.001):
            self.bytes = max(self.bytes, own_bytes(self.process))

    def __enter__(self) -> "Peak":
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._sampler.join()
        self.bytes = max(self.bytes, own_bytes(self.process))


def measure(path: Path, dtype: str) -> dict[str, Any]:
    """Loads once in this process: the growth's peak, its bound, and the time."""
    import jax
    import jax.numpy as jnp

    from qwen_jax.weights.loader import load_parameters

    checkpoint = open_checkpoint(path)
    jnp.zeros(1).block_until_ready()
    baseline = own_bytes()
    with Peak() as peak:
        start = time.perf_counter()
        params = load_parameters(checkpoint, dtype)
        seconds = time.perf_counter() - start
    parameter_bytes = sum(value.nbytes for value in params.values())
    largest = 4 * max(info.elements for info in checkpoint.tensors.values())
    return {
        "dtype": dtype,
        "device": jax.devices()[0].device_kind,
        "file_mib": round(path.stat().st_size / MIB, 1),
        "parameters_mib": round(parameter_bytes / MIB, 1),
        "bound_mib": round((parameter_bytes + 2 * largest) / MIB, 1),
        "peak_mib": round((peak.bytes - baseline) / MIB, 1),
        "seconds": round(seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=300, help="size of the model file")
    parser.add_argument("--measure", nargs=2, metavar=("FILE", "DTYPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(Path(arguments.measure[0]), arguments.measure[1])))
        return
    loads = []
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.gguf"
        write_model(path, arguments.megabytes)
        for dtype in ("float32", "bfloat16", "float16"):
            command = [
                sys.executable,
                "-m",
                "benchmarks.load_memory",
                "--measure",
                str(path),
                dtype,
            ]
            result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            loads.append(json.loads(result.stdout))
    print("| dtype | file | parameters | peak growth | bound | peak / bound | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for load in loads:
        ratio = load["peak_mib"] / load["bound_mib"]
        print(
            f"| {load['dtype']} | {load['file_mib']} MiB | {load['parameters_mib']} MiB | "
            f"{load['peak_mib']} MiB | {load['bound_mib']} MiB | {ratio:.2f} | {load['seconds']} |"
        )
    print("\n" + json.dumps({"benchmark": "load_memory", "loads": loads}))


if __name__ == "__main__":
    main()
