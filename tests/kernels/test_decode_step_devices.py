"""A decode step of a model that several devices have together: each one's kernel has its heads and
its share of the feed-forward and of the vocabulary, and stores sums into the others' memory."""

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pallas_kernels.decode_step import GATE_UP, HEAD, StepPlan, empty_stream, tile_offsets
from pallas_kernels.decode_step.common import exchange, launch
from pallas_kernels.decode_step.common.devices import Devices
from pallas_kernels.decode_step.few_rows import mosaic_gpu as few_rows
from pallas_kernels.decode_step.many_rows import mosaic_gpu as many_rows
from pallas_kernels.decode_step.packed.plan import QKV, ModelShape
from pallas_kernels.decode_step.ptx import thread as t
from tests.kernels import emulated_step as emulated
from tests.kernels.emulated_step import SEED, Case, drawn, relative
from tests.kernels.float64_step import exact_step
from tests.kernels.simt import Deadlock
from tests.kernels.streams import matrices, put_numbers

SHAPE = ModelShape(3, 256, 4, 4, 128, 512, 512, 1e-6)
"""Of all devices together. Three layers: what is stored in one is stored again two later."""
UNEVEN = dataclasses.replace(SHAPE, ffn=640)
"""Of which two devices have two and a half tiles of the feed-forward each."""


pytestmark = pytest.mark.emulated


def part_of(shape: ModelShape, devices: int) -> ModelShape:
    sizes = ("heads", "kv_heads", "ffn", "vocab")
    return dataclasses.replace(shape, **{name: getattr(shape, name) // devices for name in sizes})


def share(case: Case, devices: int, number: int) -> Case:
    """What one of so many devices has of a case."""
    whole = case.plan.shape
    plan = StepPlan.uniform(part_of(whole, devices), case.plan.blocks, case.plan.head)
    held, stream = matrices(case.packed, case.plan), empty_stream(plan)

    def rows(matrix: np.ndarray) -> np.ndarray:
        return np.split(matrix, devices)[number]

    def qkv(x: np.ndarray) -> np.ndarray:
        heads, kv = whole.heads * whole.head_dim, whole.kv_heads * whole.head_dim
        return np.concatenate([rows(each) for each in np.split(x, [heads, heads + kv])])

    for (phase, layer), matrix in held.items():
        x = np.asarray(matrix, np.float32)
        if phase == QKV:
            x = qkv(x)
        elif phase == GATE_UP:
            x = np.concatenate([rows(each) for each in np.split(x, 2)])
        else:
            x = rows(x) if phase == HEAD else rows(x.T).T
        stream = put_numbers(plan, stream, x, phase, layer)
    packed = case.packed._replace(
        stream=np.asarray(stream),
        bias=np.stack([qkv(x) for x in case.packed.bias]),
        tile_offsets=tile_offsets(plan),
    )
    pages = np.split(case.pages, devices, axis=2)[number]
    return case._replace(plan=plan, packed=packed, pages=pages)


def on_devices(
    patch: pytest.MonkeyPatch, case: Case, devices: int, seed: int, kernel: types.ModuleType
) -> list[tuple[np.ndarray, np.ndarray]]:
    parts = [share(case, devices, number) for number in range(devices)]
    return emulated.run_on_devices(patch, parts, seed, kernel=kernel)


def storing_here_alone(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(exchange.Exchange, "everywhere", lambda self, address: [address])


def meeting_nobody_else(patch: pytest.MonkeyPatch) -> None:
    """Devices clear their words when others have stored some already."""
    real = launch.plgpu.semaphore_wait
    patch.setattr(
        launch.plgpu, "semaphore_wait", lambda sem, count, **how: real(sem, count // 2, **how)
    )


def adding_its_own_twice(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Devices, "of", first_of_two)


def first_of_two(context: Any, words: int, logits: int, count: int) -> Devices:
    """What every device takes itself for."""
    found = [[t.address_on(context, ref, n) for n in range(count)] for ref in (words, logits)]
    return Devices(t.integer(0), *found)


@pytest.mark.parametrize("mistake", [storing_here_alone, meeting_nobody_else, adding_its_own_twice])
def test_mistakes_are_found(
    monkeypatch: pytest.MonkeyPatch, mistake: Callable[[pytest.MonkeyPatch], None]
) -> None:
    case = drawn(SHAPE, 3, [20], 1)
    parts = [share(case, 2, number) for number in range(2)]
    right = exact_step(case)[0]

    def shows(seed: int) -> bool:
        try:
            (logits, _), _ = emulated.run_on_devices(monkeypatch, parts, SEED + seed, mistake)
        except Deadlock:
            return True
        return relative(logits, right) > 0.1

    # Of devices that don't meet a third of all orders of events shows it.
    assert any(map(shows, range(24)))


@pytest.mark.parametrize(
    ("kernel", "shape", "devices", "positions", "blocks"),
    [
        (few_rows, SHAPE, 2, [130], 5),
        (few_rows, SHAPE, 2, [0, 40, 129], 6),
        (few_rows, SHAPE, 4, [7], 2),
        (many_rows, SHAPE, 2, [3, 0, 140, 20, 60], 3),
        # Whole tiles of all devices together, not of each.
        (few_rows, UNEVEN, 2, [40, 3], 5),
        (many_rows, UNEVEN, 2, [3, 40, 20], 3),
    ],
)
def test_is_the_model_of_one_device(
    monkeypatch: pytest.MonkeyPatch,
    kernel: types.ModuleType,
    shape: ModelShape,
    devices: int,
    positions: list[int],
    blocks: int,
) -> None:
    case = drawn(shape, blocks, positions, 2)
    truth, xla = exact_step(case), emulated.expected(case)
    first = on_devices(monkeypatch, case, devices, SEED, kernel)
    for logits, _ in first[1:]:
        # All choose the same tokens from them.
        assert np.array_equal(logits, first[0][0])
    again = on_devices(monkeypatch, case, devices, SEED + 1, kernel)
    for one, other in zip(first, again, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    new = np.concatenate([new for _, new in first], axis=2)
    for ours, theirs, right in zip((first[0][0], new), xla, truth, strict=True):
        error, of_xla = relative(ours, right), relative(theirs, right)
        print(f"seed {SEED}: kernel {error:.2e}, xla {of_xla:.2e}")
        assert error <= 1.5 * of_xla
