"""Shared by the tests of `qwen_jax.weights`."""

from pathlib import Path

import pytest

from tests.fake_hub import hub_server

__all__ = ["hub_server"]

FIXTURES = Path(__file__).resolve().parents[3] / "shared" / "fixtures"


@pytest.fixture(scope="session")
def qwen2_vocabulary() -> Path:
    """llama.cpp's vocabulary-only GGUF of Qwen2: 151,936 tokens, no tensors."""
    path = FIXTURES / "ggml-vocab-qwen2.gguf"
    if not path.exists():
        pytest.skip(f"{path} is absent, so a header of real size is NOT tested")
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"
