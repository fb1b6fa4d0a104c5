"""The tables of docs/scaling.md: what `qwen_jax.scaling` says, beside what was measured.

    python -m benchmarks.scaling

Runs nothing on a device. Ends with one line of JSON.
"""

import json

from benchmarks.random_model import SIZES, qwen
from qwen_jax.engine.form import no_kernel
from qwen_jax.errors import UserError
from qwen_jax.mesh import MeshShape
from qwen_jax.scaling import BFLOAT16, CONTEXT, H200, step

LARGER = {
    "3b": qwen(36, 2048, 16, 2, 128, 11008, 151936, True),
    "14b": qwen(48, 5120, 40, 8, 128, 13824, 152064, False),
    "32b": qwen(64, 5120, 40, 8, 128, 27648, 152064, False),
    "72b": qwen(80, 8192, 64, 8, 128, 29568, 152064, False),
}
ALL = dict(sorted((SIZES | LARGER).items(), key=lambda item: item[1].num_parameters))

MEASURED: dict[tuple[str, int], dict[bool, tuple[int, ...]]] = {
    ("0.5b", 1): {True: (390, 474, 755), False: (872, 995)},
    ("1.5b", 1): {False: (1506, 1658)},
    ("7b", 1): {True: (3368, 3916, 4463), False: (4557, 4299)},
    ("7b", 2): {True: (1887, 2392, 3111), False: (3343, 3577, 4749)},
    ("32b", 1): {True: (14704, 15710, 19292)},
    ("32b", 2): {True: (7737, 9034, 11933), False: (11001, 11414, 13976)},
    ("72b", 2): {True: (17012, 18918, 24313), False: (20417, 22606, 25902)},
}
"""Microseconds a step of 1, 8 and 64 rows of 128 tokens on so many H200, by the decode step's
kernel and not: gpu_decode.md and gpu_mesh.md."""


def main() -> None:
    print("| size, GPUs | path | model, µs | measured, µs | off |\n| --- | --- | --- | --- | --- |")
    for (size, tp), paths in MEASURED.items():
        for kernel, times in paths.items():
            modelled = [
                step(ALL[size], BFLOAT16, tp, rows, 128, kernel=kernel).seconds * 1e6
                for rows in (1, 8, 64)[: len(times)]
            ]
            off = " / ".join(f"{x / t - 1:+.0%}" for x, t in zip(modelled, times, strict=True))
            ours, theirs = (" / ".join(f"{x:,.0f}" for x in row) for row in (modelled, times))
            path = "kernel" if kernel else "XLA"
            print(f"| {size}, {tp} | {path} | {ours} | {theirs} | {off} |")
    print(f"\nGB of weights a device; ms a step of 1 / 64 texts of {CONTEXT:,}\n")
    print("| size | tp=1 | tp=2 | tp=4 | tp=8 |\n| --- | --- | --- | --- | --- |")
    record: dict[str, dict[int, list[float]]] = {}
    for size, config in ALL.items():
        cells = []
        record[size] = {}
        for tp in (1, 2, 4, 8):
            try:
                MeshShape(tp=tp).check(config)
            except UserError:
                cells.append("-")
                continue
            kernel = no_kernel(config, BFLOAT16, MeshShape(tp=tp)) is None
            one, many = (
                step(config, BFLOAT16, tp, rows, CONTEXT, kernel=kernel) for rows in (1, 64)
            )
            shown = [
                f"{x.seconds * 1e3:.2f}" if x.weights + x.cache < H200.memory else "-"
                for x in (one, many)
            ]
            mark = "" if kernel else " *"
            cells.append(f"{one.weights / 1e9:.1f}; {' / '.join(shown)}{mark}")
            record[size][tp] = [one.seconds, many.seconds]
        print(f"| {size} | {' | '.join(cells)} |")
    print("\n" + json.dumps({"seconds": record}))


if __name__ == "__main__":
    main()
