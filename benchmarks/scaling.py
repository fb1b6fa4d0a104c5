"""The tables of docs/scaling.md: what `qwen_jax.scaling` says, beside what was measured.

    python -m benchmarks.scaling

Runs nothing on a device. Ends with one line of JSON.
"""

import json

from benchmarks.random_model import SIZES, qwen
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

MEASURED = {"0.5b": (872, 995), "1.5b": (1506, 1658), "7b": (4557, 4299)}
"""Microseconds a step of XLA's path on one H200, 1 and 8 rows of 128 tokens: gpu_decode.md."""


def main() -> None:
    print("| size | rows | model, µs | measured, µs |\n| --- | --- | --- | --- |")
    for size, times in MEASURED.items():
        for rows, measured in zip((1, 8), times, strict=True):
            modelled = step(SIZES[size], BFLOAT16, 1, rows, 128).seconds * 1e6
            print(f"| {size} | {rows} | {modelled:,.0f} | {measured:,} |")
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
            one, many = (step(config, BFLOAT16, tp, rows, CONTEXT) for rows in (1, 64))
            shown = [
                f"{x.seconds * 1e3:.2f}" if x.weights + x.cache < H200.memory else "-"
                for x in (one, many)
            ]
            cells.append(f"{one.weights / 1e9:.1f}; {' / '.join(shown)}")
            record[size][tp] = [one.seconds, many.seconds]
        print(f"| {size} | {' | '.join(cells)} |")
    print("\n" + json.dumps({"seconds": record}))


if __name__ == "__main__":
    main()
