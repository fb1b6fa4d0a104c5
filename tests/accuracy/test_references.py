"""The references on one text: float64, transformers, llama.cpp, and a recorded trace."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qwen_jax
from qwen_jax import opening
from qwen_jax.accuracy.references import cut, reference
from qwen_jax.accuracy.traces.recording import record
from qwen_jax.accuracy.traces.trace import Trace, names
from qwen_jax.engine.engine import Engine
from qwen_jax.errors import UserError
from qwen_jax.weights.loader import load_parameters, open_checkpoint
from tests import numpy_reference
from tests.engines import relative
from tests.golden_cases import CASES
from tests.quantised_checkpoints import gptq, write_quantised
from tests.tiny_adapters import random_pairs, write_peft
from tests.tiny_checkpoints import random_parameters, tiny_config, write_gguf, write_hf

BOUND = 1e-5
"""Of the norm of every tensor, as for the logits of float32 in tests/test_parity_live.py."""

CHUNKS = (12, 9, 1, 1, 1)
PROMPT, TEXT = 21, sum(CHUNKS)


@pytest.fixture(scope="module", params=["tied", "yarn"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    case = CASES[request.param]
    path = tmp_path_factory.mktemp("model") / f"{request.param}.gguf"
    return write_gguf(path, case.config, case.parameters()).path


def tokens(model: Path) -> list[int]:
    return CASES[model.stem].prompt()[:TEXT]


def assert_same(ours: Trace, theirs: Trace, bound: float) -> None:
    """Every tensor, masked places where they should be and nowhere else."""
    assert list(ours.tensors) == list(theirs.tensors) == names(theirs.header.model_config)
    for name, expected in theirs.tensors.items():
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(np.isfinite(ours.tensors[name]), finite, err_msg=name)
        assert relative(ours.tensors[name][finite], expected[finite]) <= bound, name


def test_float64_equals_another_float64(tmp_path: Path) -> None:
    case = CASES["yarn"]
    model = write_gguf(tmp_path / "yarn.gguf", case.config, case.parameters()).path
    trace = reference("float64", model, tokens(model), chunks=CHUNKS)
    exact = numpy_reference.forward(case.config, case.parameters(), tokens(model))
    assert list(trace.tensors) == names(case.config)
    assert trace.header.chunks == CHUNKS
    for name, expected in exact.items():
        assert trace.tensors[name].dtype == np.float64
        # The angles of the rotation come from float32 frequencies.
        assert relative(trace.tensors[name], expected) <= 1e-6, name


def test_float64_needs_nothing_after_the_last_position(model: Path) -> None:
    whole = reference("float64", model, tokens(model), chunks=CHUNKS)
    part = reference(
        "float64", model, tokens(model), chunks=CHUNKS, names="layers.1.*", start=5, stop=14
    )
    assert part.header.chunks == CHUNKS and part.header.tokens == tuple(tokens(model))
    for name, tensor in part.tensors.items():
        expected = cut(whole, name, 5, 14).tensors[name]
        # Products of fewer rows may add up in another order.
        np.testing.assert_allclose(tensor, expected, rtol=1e-12, atol=1e-12, err_msg=name)


def test_float64_rounds_parameters_as_the_candidate_does(model: Path) -> None:
    """Which a bfloat16 engine's embedding, a mere look-up, shows to the last bit."""
    checkpoint = open_checkpoint(model)
    engine = Engine(checkpoint.config, load_parameters(checkpoint, "bfloat16"))
    candidate = record(engine, tokens(model), names="embed")
    truth = reference("float64", model, tokens(model), dtype="bfloat16", names="embed")
    np.testing.assert_array_equal(candidate.tensors["embed"], truth.tensors["embed"])


def test_a_recorded_trace_is_a_reference(model: Path, tmp_path: Path) -> None:
    recorded = reference("float64", model, tokens(model), names="*attn_scores,logits")
    recorded.save(tmp_path / "t.safetensors")
    again = reference(str(tmp_path / "t.safetensors"), model, tokens(model), names="logits", stop=7)
    assert list(again.tensors) == ["logits"]
    np.testing.assert_array_equal(again.tensors["logits"], recorded.tensors["logits"][:7])
    with pytest.raises(UserError, match="none of the tensors embed"):
        reference(str(tmp_path / "t.safetensors"), model, tokens(model), names="embed")
    with pytest.raises(UserError, match="differ from the 24 given from position 3 on"):
        other = [*tokens(model)]
        other[3] = (other[3] + 1) % 61
        reference(str(tmp_path / "t.safetensors"), model, other)
    with pytest.raises(UserError, match="positions 0 to 7, but 0 to 24"):
        cut(again, "*", 0, 24)


def test_an_unknown_reference_is_refused(model: Path) -> None:
    with pytest.raises(UserError, match="'vllm', which is neither a file nor one of float64, hf"):
        reference("vllm", model, tokens(model))


@pytest.mark.live
def test_transformers_gives_the_same_tensors(model: Path, tmp_path: Path) -> None:
    """One model as a GGUF file, which our loader reads for it; one as a directory of its own."""
    pytest.importorskip("torch", reason="needs pip install '.[hf]'")
    case, path = CASES[model.stem], model
    if model.stem == "yarn":
        path = write_hf(tmp_path / "hf", case.config, case.parameters()).path
    checkpoint = open_checkpoint(path)
    engine = Engine(checkpoint.config, load_parameters(checkpoint, "float32"))
    ours = record(engine, tokens(model), prompt_length=PROMPT, chunk=12)
    theirs = reference("hf", path, tokens(model), chunks=CHUNKS)
    assert ours.header.chunks == theirs.header.chunks == CHUNKS
    assert_same(ours, theirs, BOUND)
    assert_same(theirs, reference("float64", path, tokens(model), chunks=CHUNKS), BOUND)


@pytest.mark.live
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_transformers_computes_in_the_dtype_it_is_told(model: Path, dtype: str) -> None:
    pytest.importorskip("torch", reason="needs pip install '.[hf]'")
    theirs = reference("hf", model, tokens(model), dtype=dtype, names="*")
    assert {str(x.dtype) for x in theirs.tensors.values()} == {dtype}
    truth = reference("float64", model, tokens(model), dtype=dtype)
    # Norms are rounded too, in some 70 operations one after another: far from 1, where faults are.
    unit = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    assert relative(theirs.tensors["logits"], truth.tensors["logits"]) <= 70 * unit


def test_llamacpp_gives_the_same_tensors(tmp_path: Path) -> None:
    """On the bundled model in float32, since llama.cpp wants a tokenizer."""
    pytest.importorskip("llama_cpp", reason="needs pip install '.[llamacpp]'")
    path = float32_copy(tmp_path / "haiku.gguf")
    model = qwen_jax.load(path, dtype="float32")
    text = model.tokens("haiku: snow")
    prompt = len(text) - 3
    ours = record(model, text, prompt_length=prompt, chunk=16)
    theirs = reference("llamacpp", path, text, chunks=ours.header.chunks)
    assert_same(ours, theirs, BOUND)


def float32_copy(path: Path) -> Path:
    """The bundled model with its quantised matrices decoded."""
    import gguf

    reader = gguf.GGUFReader(opening.locate())
    writer = gguf.GGUFWriter(path, "qwen2")
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            kind, *inner = field.types
            writer.add_key_value(field.name, field.contents(), kind, *inner[:1])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.live
@pytest.mark.parametrize("kind", ["adapter", "prefix", "GPTQ"])
def test_transformers_has_the_weights_that_the_engine_has(tmp_path: Path, kind: str) -> None:
    """Also where its own reader would drop an adapter, or make up weights it does not find."""
    pytest.importorskip("torch", reason="live parity needs pip install '.[hf]'")
    config = tiny_config()
    params = random_parameters(config)
    adapters: list[str] = []
    if kind == "GPTQ":
        settings = {"quant_method": "gptq", "bits": 4, "group_size": 32}
        path = write_quantised(tmp_path / "hf", config, params, gptq(), settings).path
    else:
        prefix = "module." if kind == "prefix" else ""
        path = write_hf(tmp_path / "hf", config, {prefix + k: v for k, v in params.items()}).path
    if kind == "adapter":
        adapters = [str(write_peft(tmp_path / "lora", random_pairs(params)))]
    checkpoint = opening.open_model(path, *adapters)
    ids = list(range(10))
    theirs = reference("hf", checkpoint, ids)
    ours = Engine(checkpoint.config, load_parameters(checkpoint, "float32")).logits(np.array(ids))
    assert relative(np.asarray(ours), theirs.tensors["logits"]) <= BOUND


@pytest.mark.live
@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"partial_rotary_factor": 0.5}, "transformers' Qwen2 always rotates all"),
        ({"head_dim": None}, r"transformers does not load it \(TypeError: "),
    ],
)
def test_what_transformers_does_not_run(
    tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    pytest.importorskip("torch", reason="live parity needs pip install '.[hf]'")
    config = tiny_config(num_heads=8)
    path = write_hf(tmp_path, config, random_parameters(config), **changes).path
    with pytest.raises(UserError, match=problem):
        reference("hf", path, [1, 2, 3])
