"""Everything here runs kernels on a Hopper GPU, and is skipped without one."""

import pytest

from pallas_kernels.implementation import device_refusal


@pytest.fixture(autouse=True, scope="session")
def hopper() -> None:
    why_not = device_refusal()
    if why_not:
        pytest.skip(f"tests/gpu needs a Hopper GPU: {why_not}")
