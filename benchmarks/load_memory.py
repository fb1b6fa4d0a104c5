"""Peak host memory while a GGUF file loads, against its bound.

The bound: the parameters in the compute dtype plus twice the largest tensor in float32. What
counts is anonymous memory (RssAnon in /proc/self/status, sampled every millisecond by a thread):
the mapped pages of the file (RssFile) belong to the page cache and go when memory is short. Each
load runs in its own process; its growth over the moment before the load is reported, after JAX has
made its first array. On a CPU device the parameters themselves are in that growth.

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
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type

from qwen_jax.config import ModelConfig
from qwen_jax.weights import names
from qwen_jax.weights.checkpoint import open_checkpoint
from tools.demo_gguf import add_sizes

MIB = 1 << 20
TYPES = (Type.Q8_0, Type.Q4_K, Type.Q6_K, Type.F16)
# Where the float16 scales of a block lie; random ones would overflow.
SCALES = {Type.Q8_0: (0,), Type.Q4_K: (0, 2), Type.Q6_K: (208,)}


def random_matrix(rng: np.random.Generator, shape: tuple[int, ...], kind: Type) -> np.ndarray:
    """Random bytes under scales of 2^-10, row-major in blocks."""
    rows, columns = shape
    if kind is Type.F16:
        return rng.normal(0, 0.02, shape).astype(np.float16)
    block, size = GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (rows * columns // block, size), dtype=np.uint8)
    for offset in SCALES[kind]:
        raw[:, offset : offset + 2] = np.frombuffer(np.float16(2**-10).tobytes(), np.uint8)
    return raw.reshape(rows, -1)


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


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon; this needs Linux")


def measure(path: Path, dtype: str) -> dict[str, Any]:
    """Loads once in this process: the growth's peak, its bound, and the time."""
    import jax
    import jax.numpy as jnp

    from qwen_jax.weights.loader import load_parameters

    checkpoint = open_checkpoint(path)
    jnp.zeros(1).block_until_ready()
    baseline, peak, done = anonymous_bytes(), 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    params = load_parameters(checkpoint, dtype)
    seconds = time.perf_counter() - start
    done.set()
    sampler.join()
    peak = max(peak, anonymous_bytes())
    parameter_bytes = sum(value.nbytes for value in params.values())
    largest = 4 * max(info.elements for info in checkpoint.tensors.values())
    return {
        "dtype": dtype,
        "device": jax.devices()[0].device_kind,
        "file_mib": round(path.stat().st_size / MIB, 1),
        "parameters_mib": round(parameter_bytes / MIB, 1),
        "bound_mib": round((parameter_bytes + 2 * largest) / MIB, 1),
        "peak_mib": round((peak - baseline) / MIB, 1),
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
