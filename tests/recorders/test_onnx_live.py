"""record_onnx.py on PyTorch's exports, and on graphs like those of the GenAI model builder."""

import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_jax.accuracy.traces.trace import AXES
from tests.golden_cases import Case, odd_config
from tests.recorders.conftest import Record
from tests.recorders.judging import copied, judged, kinds, read, said
from tests.tiny_checkpoints import write_hf

pytestmark = pytest.mark.live
for library in ("onnx", "onnxruntime"):
    pytest.importorskip(library, reason=f"{library} is recorded: pip install onnx onnxruntime")

CASE = Case(odd_config(num_layers=2, tied=False), seed=6)
TOKENS = CASE.prompt()[:20]


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.chdir(tmp_path)
    return copied("onnx", tmp_path)


def checkpoint(folder: Path) -> Path:
    return write_hf(folder / "model", CASE.config, CASE.parameters()).path


def exported(folder: Path) -> Path:
    """By PyTorch's exporter, of transformers as installed; its weights lie in a second file."""
    torch = pytest.importorskip("torch", reason="it exports: pip install '.[hf]'")
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs it: pip install onnxscript")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint(folder), dtype="float32", attn_implementation="eager"
    ).eval()
    path, ids = folder / "graph" / "model.onnx", torch.tensor([TOKENS[:7]])
    path.parent.mkdir()
    torch.onnx.export(
        model, (ids,), path, dynamo=True, kwargs={"use_cache": False}, external_data=True,
        dynamic_shapes={"input_ids": {1: "t"}, "use_cache": None}, verbose=False,
    )  # fmt: skip
    return path


def test_a_clean_export(tmp_path: Path, record: Record) -> None:
    path = exported(tmp_path)
    out = record(path, f"--model={tmp_path / 'model'}")
    trace, found = read(out), judged(out)
    assert trace.header.tokens == tuple(TOKENS) and trace.header.dtype == "float32"
    assert trace.header.implementation.startswith("ONNX Runtime ") and kinds(trace) == AXES.keys()
    assert not found.faulty and not found.skipped, found.first


def built(folder: Path, fault: str = "") -> Path:
    from tests.recorders.onnx_graphs import write

    return write(folder / "built.onnx", CASE.config, CASE.parameters(), fault)


def test_a_clean_graph_of_fused_operations(tmp_path: Path, record: Record) -> None:
    out = record(built(tmp_path), f"--model={checkpoint(tmp_path)}")
    trace, found = read(out), judged(out)
    assert kinds(trace) == AXES.keys() - {"attn_scores", "attn_probs"}
    assert not found.faulty and not found.skipped, found.first


@pytest.mark.parametrize("fault", ["zero_qkv_bias", "rope_interleaved", "rope_theta_1e4"])
def test_a_fault(fault: str, tmp_path: Path, record: Record) -> None:
    out = record(built(tmp_path, fault), f"--model={checkpoint(tmp_path)}")
    found = judged(out)
    assert found.named == (fault,) and not found.unknown
    assert found.causes[0].layers == (0, 1)


def test_values_by_name(tmp_path: Path, record: Record, recorder: Any) -> None:
    path = built(tmp_path)
    listed = dict(line.split() for line in record(path, "--list").splitlines())
    name = "/model/layers.1/attn/q_rotary/RotaryEmbedding/output_0"
    assert listed["layers.1.q_rope"] == name and not Path("dump.safetensors").exists()
    recorder.TAKE["q_rope"] = "/model/layers.{i}/attn/q_proj/Add/output_0"
    out = record(path)
    assert said(out)["model"] == "MODEL"
    trace = read(out.replace("MODEL", str(checkpoint(tmp_path))))
    for i in range(2):
        rotated, before = (trace.tensors[f"layers.{i}.q_{kind}"] for kind in ("rope", "proj"))
        np.testing.assert_array_equal(rotated, before)
    recorder.TAKE["q_rope"] = "/model/layers.{i}/nothing"
    with pytest.raises(recorder.RecorderError, match="q_rope is said to be /model"):
        recorder.record(path, TOKENS, recorder.Dump("dump.safetensors"), "MODEL", "CPU")


def renamed(path: Path) -> Path:
    import onnx

    model = onnx.load(path)
    for i, node in enumerate(model.graph.node):
        node.name = f"node_{i}"
    onnx.save(model, path)
    return path


def quantised(path: Path) -> Path:
    import onnx

    model = onnx.load(path)
    next(n for n in model.graph.node if n.op_type == "MatMul").op_type = "MatMulNBits"
    onnx.save(model, path)
    return path


def narrow(path: Path) -> Path:
    import onnx

    model = onnx.load(path)
    for x in model.graph.initializer:
        value = onnx.numpy_helper.to_array(x)
        x.CopyFrom(onnx.numpy_helper.from_array(value.astype(np.float16), x.name))
    onnx.save(model, path)
    return path


def of_another_input(path: Path) -> Path:
    import onnx

    model = onnx.load(path)
    ids = model.graph.input[0]
    model.graph.input.append(onnx.helper.make_tensor_value_info("pixels", 1, [1]))
    ids.type.tensor_type.shape.dim[1].dim_value = 5
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("change", "flags", "tokens", "message"),
    [
        (renamed, (), "1,2", "No node's name says a module of MODULES (node_0, node_1, node_2"),
        (quantised, (), "1,2", "The graph multiplies by MatMulNBits"),
        (narrow, (), "1,2", "computes a graph of float16 in float32"),
        (of_another_input, (), "1,2,3,4,5", "has an input pixels, which is not known"),
        (of_another_input, (), "1,2", "The graph takes 5 tokens and no other number, but got 2"),
        (Path, (), "1,9999", "ONNX Runtime says"),
        (Path, (), "1;2", "The tokens are '1;2', but must be like 2046,299,10"),
        (Path, ("--provider=TPU",), "1,2", "The provider is TPU, but there are"),
        (Path, ("--output=x/dump.safetensors",), "1,2", "there is no folder x"),
        (lambda path: "nowhere.onnx", (), "1,2", "nowhere.onnx is no file"),
        (lambda path: "record_onnx.py", (), "1,2", "record_onnx.py is no ONNX graph"),
    ],
)
def test_what_cannot_be_recorded(
    change: Any,
    flags: tuple[str, ...],
    tokens: str,
    message: str,
    tmp_path: Path,
    record: Record,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        record(change(built(tmp_path)), *flags, tokens=tokens)
    last = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2 and message in last
    assert not Path("dump.safetensors").exists()
