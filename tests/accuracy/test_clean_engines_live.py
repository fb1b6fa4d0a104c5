"""Clean engines raise no alarm: transformers and llama.cpp as they are installed."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from qwen_jax.accuracy.exact.parameters import CheckpointSource
from qwen_jax.accuracy.exact.replay import replay
from qwen_jax.accuracy.references import reference
from qwen_jax.accuracy.tensors.diagnosis import diagnose
from qwen_jax.accuracy.traces.trace import Trace, split_name
from qwen_jax.weights.loader import open_checkpoint
from tests.accuracy.clean_engines import DTYPES, LLAMACPP, TRANSFORMERS
from tests.accuracy.test_references import float32_copy
from tests.golden_cases import Case, odd_config
from tests.tiny_checkpoints import write_hf

pytestmark = pytest.mark.live

LIBRARY = {"llamacpp": "llama_cpp", "eager": "torch", "sdpa": "torch"}
FTYPES = {"F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q4_K_M": 15, "IQ4_XS": 30, "BF16": 32}
"""llama.cpp's numbers of the kinds of files that its quantiser writes."""


@pytest.mark.parametrize("clean", [*TRANSFORMERS, *LLAMACPP], ids=lambda clean: clean.name)
def test_no_alarm(tmp_path: Path, clean: Any) -> None:
    pytest.importorskip(LIBRARY[clean.engine])
    found = clean.judged(tmp_path, clean.run)
    assert not found.faulty and not found.causes, found.first


@pytest.mark.parametrize(
    ("attention", "dtype", "head_dim", "theta"),
    list(itertools.product(("eager", "sdpa"), DTYPES, (64, 128), (1e4, 1e6))),
)
def test_transformers_on_a_longer_text(
    tmp_path: Path, attention: str, dtype: str, head_dim: int, theta: float
) -> None:
    """With all that it shows, and without its scores, which attn_out then depends on."""
    pytest.importorskip("torch")
    from qwen_jax.accuracy.references import hf

    sizes = {"head_dim": head_dim, "rope_dim": head_dim, "num_heads": 4, "num_kv_heads": 2}
    case = Case(odd_config(num_layers=2, rope_theta=theta, **sizes), seed=5)
    path = write_hf(tmp_path, case.config, case.parameters()).path
    source = CheckpointSource(path, dtype)
    tokens, calls = case.prompt()[:96], (70, 24, 1, 1)
    trace = hf.trace(open_checkpoint(path), tokens, dtype=dtype, chunks=calls, attention=attention)
    inner = ("attn_scores", "attn_probs")
    few = {n: x for n, x in trace.tensors.items() if split_name(n)[1] not in inner}
    for tensors in (trace.tensors, few):
        judged, skipped = replay(Trace(trace.header, tensors), source)
        assert not [f for f in judged if f.faulty] and not skipped


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
