"""Everything here runs kernels on a Hopper GPU, and is skipped without one."""

import os

import pytest

from pallas_kernels.implementation import device_refusal

# Several workers share the GPU; the kernels alone don't import the engine, which says so too.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


@pytest.fixture(autouse=True, scope="session")
def hopper() -> None:
    why_not = device_refusal()
    if why_not:
        pytest.skip(f"tests/gpu needs a Hopper GPU: {why_not}")
