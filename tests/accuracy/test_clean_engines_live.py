"""Clean engines raise no alarm: transformers and llama.cpp as they are installed."""

from pathlib import Path
from typing import Any

import pytest

from qwen_jax.accuracy.diagnosis import diagnose
from qwen_jax.accuracy.parameters import CheckpointSource
from qwen_jax.accuracy.references import reference
from tests.accuracy.clean_engines import LLAMACPP, TRANSFORMERS
from tests.accuracy.test_references import float32_copy

pytestmark = pytest.mark.live

LIBRARY = {"llamacpp": "llama_cpp", "eager": "torch", "sdpa": "torch"}
FTYPES = {"F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q4_K_M": 15, "IQ4_XS": 30, "BF16": 32}
"""llama.cpp's numbers of the kinds of files that its quantiser writes."""


@pytest.mark.parametrize("clean", [*TRANSFORMERS, *LLAMACPP], ids=lambda clean: clean.name)
def test_no_alarm(tmp_path: Path, clean: Any) -> None:
    pytest.importorskip(LIBRARY[clean.engine])
    found = clean.judged(tmp_path, clean.run)
    assert not found.faulty and not found.causes, found.first


@pytest.mark.parametrize("kind", ["F32", *FTYPES])
def test_llamacpp_on_the_bundled_model(tmp_path: Path, kind: str) -> None:
    """In the files that its own quantiser makes of it."""
    llama_cpp = pytest.importorskip("llama_cpp")
    path = float32_copy(tmp_path / "F32.gguf")
    if kind != "F32":
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype = FTYPES[kind]
        made = tmp_path / f"{kind}.gguf"
        done = llama_cpp.llama_model_quantize(str(path).encode(), str(made).encode(), settings)
        assert done == 0
        path = made
    text = [2046, 299, 10, 279, 1450, 1458, 44, 1459, 1453, 1460, 1461, 46, 1457] * 3
    trace = reference("llamacpp", path, text, chunks=(30, 7, 1, 1))
    found = diagnose(trace, CheckpointSource(path))
    assert not found.faulty and not found.skipped, found.first
