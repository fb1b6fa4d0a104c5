"""Shared by the tests of kernels."""

from collections.abc import Iterator

import pytest

import pallas_kernels


@pytest.fixture
def as_if_on_hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels are chosen as if a Hopper GPU were there."""
    monkeypatch.setattr(pallas_kernels.implementation, "device_refusal", lambda: None)
    pallas_kernels.choose.cache_clear()
    yield
    pallas_kernels.choose.cache_clear()
