"""How fast each GGUF tensor type becomes float32 and bfloat16, against gguf.quants in one run.

    python -m benchmarks.decode_blocks

Half a minute. Prints a table in million values a second, then one JSON line. gguf.quants uses one
thread and writes float32; `decode_into` uses all cores. F32 is left out, a view in gguf.quants,
and F64, which it does not read.
"""

import json
import os
import time
from collections.abc import Callable
from functools import partial

import gguf
import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type

from qwen_jax.weights.blocks import DECODABLE, decode_into

VALUES = 1 << 23
ROW = 1024


def random_rows(rng: np.random.Generator, kind: Type) -> np.ndarray:
    """Uint8 [rows, bytes]: normal values where the type has them, else random bytes."""
    if kind in (Type.F16, Type.BF16):
        dtype = np.float16 if kind is Type.F16 else ml_dtypes.bfloat16
        return rng.standard_normal((VALUES // ROW, ROW), np.float32).astype(dtype).view(np.uint8)
    block, size = GGML_QUANT_SIZES[kind]
    return rng.integers(0, 256, (VALUES // ROW, ROW // block * size), dtype=np.uint8)


def speed(run: Callable[[], object]) -> float:
    """Million values a second, the best of five."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return round(VALUES / min(times) / 1e6, 1)


def main() -> None:
    rng = np.random.default_rng(0)
    outs = [np.zeros(VALUES, dtype) for dtype in (np.float32, ml_dtypes.bfloat16)]
    print("| type | float32 | bfloat16 | gguf.quants | float32 / gguf.quants |")
    print("| --- | --- | --- | --- | --- |")
    results = {}
    for kind in sorted(DECODABLE - {Type.F32, Type.F64}):
        rows = random_rows(rng, kind)
        raw = rows.reshape(-1)
        with np.errstate(all="ignore"):
            theirs = speed(partial(gguf.quants.dequantize, rows, kind))
        ours = [speed(partial(decode_into, raw, kind, out)) for out in outs]
        results[kind.name] = [*ours, theirs]
        print(
            f"| {kind.name} | {ours[0]:.0f} | {ours[1]:.0f} | {theirs:.0f} | "
            f"{ours[0] / theirs:.1f} |"
        )
    summary = {"benchmark": "decode_blocks", "cores": os.cpu_count(), "million_per_second": results}
    print("\n" + json.dumps(summary))


if __name__ == "__main__":
    main()
