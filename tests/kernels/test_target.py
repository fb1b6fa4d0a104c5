"""What the kernels know of a GPU, against what XLA is told of the same one."""

import re

import pytest

from pallas_kernels.target import HOPPER
from tests.kernels.hopper import H100


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("core_count", HOPPER.multiprocessors),
        ("shared_memory_per_block_optin", HOPPER.shared_bytes),
        ("registers_per_core_limit", HOPPER.registers),
        ("cuda_compute_capability { major", int(HOPPER.compute_capability.split(".")[0])),
    ],
)
def test_it_is_an_h100(field: str, value: int) -> None:
    (stated,) = re.findall(re.escape(field) + r": (\d+)", H100)
    assert int(stated) == value


@pytest.mark.parametrize(
    ("computing", "each", "left"), [(256, 40, 232), (256, 24, 240), (384, 32, 160)]
)
def test_registers_that_fetching_threads_leave(computing: int, each: int, left: int) -> None:
    """The numbers by which the kernels were measured."""
    assert HOPPER.registers_beside(computing, 128, each) == left
    # Eight more for each that computes would be more than there are.
    assert (left + 8) * computing + each * 128 > 168 * 384
