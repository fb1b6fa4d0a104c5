"""record_llamacpp.py on llama.cpp as llama-cpp-python has built it."""

import types
from pathlib import Path

import gguf
import pytest

from qwen_jax.accuracy.traces.trace import AXES
from tests.accuracy.clean_engines import WITHOUT_TOKENIZER, Clean
from tests.recorders.conftest import Record
from tests.recorders.judging import copied, judged, kinds, read
from tests.tiny_checkpoints import write_gguf

pytestmark = pytest.mark.live
pytest.importorskip("llama_cpp", reason="it is recorded: pip install '.[llamacpp]' compiles it")

CASE = Clean("llamacpp", "Q4_K").case
TOKENS = CASE.prompt()[:24]


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.chdir(tmp_path)
    return copied("llamacpp", tmp_path)


def written(name: str, types: str = "F32", fault: str = "") -> Path:
    params, config = CASE.parameters(), CASE.config
    if fault == "zero_qkv_bias":
        params = {n: 0 * x if n.endswith(".bias") else x for n, x in params.items()}
    keys = {"qwen2.rope.freq_base": 1e4} if fault == "rope_theta_1e4" else {}
    metadata = WITHOUT_TOKENIZER | keys
    return write_gguf(Path(name), config, params, types=types, metadata=metadata).path


def as_llama(path: Path) -> Path:
    """The same file as one of the llama architecture, which rotates dimensions 2i and 2i + 1."""
    read, out = gguf.GGUFReader(path), path.with_name("as_llama.gguf")
    writer = gguf.GGUFWriter(out, "llama")
    for name, field in read.fields.items():
        if name.startswith("qwen2."):
            key, value = name.replace("qwen2.", "llama."), field.contents()
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    writer.add_string("tokenizer.ggml.model", "none")
    for tensor in read.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_K"])
def test_a_clean_engine(kind: str, record: Record) -> None:
    out = record(written(f"{kind}.gguf", kind), "--decode=3")
    trace, found = read(out), judged(out)
    assert trace.header.chunks == (21, 1, 1, 1) and trace.header.implementation == "llama.cpp"
    assert kinds(trace) == AXES.keys()
    assert bool(trace.header.operands) == (kind != "F32")
    assert not found.faulty and not found.skipped, found.first


def test_operands_are_those_of_the_reference(record: Record) -> None:
    """Which looks them up in the file, where the recorder takes them from the graph."""
    from qwen_jax.accuracy.references.llamacpp import operands
    from qwen_jax.weights.loader import open_checkpoint

    path = written("q8.gguf", "Q8_0")
    assert read(record(path)).header.operands == operands(open_checkpoint(path))


@pytest.mark.parametrize("fault", ["zero_qkv_bias", "rope_theta_1e4", "rope_interleaved"])
def test_a_fault(fault: str, record: Record) -> None:
    """In the file that llama.cpp is given, judged by the right one."""
    right = written("right.gguf")
    wrong = as_llama(right) if fault == "rope_interleaved" else written("wrong.gguf", fault=fault)
    out = record(wrong).replace(f"--model={wrong}", f"--model={right}")
    found = judged(out)
    assert found.named == (fault,) and not found.unknown


@pytest.mark.parametrize(
    ("path", "flags", "tokens", "message"),
    [
        ("right.gguf", (), "1,x", "tokens are '1,x', but must be like 2046,299,10"),
        ("right.gguf", (), "1,99999", "fails with status -1 at tokens 0 to 1"),
        ("right.gguf", ("--decode=2",), "1,2", "decode is 2, but must be 0 to 1"),
        ("right.gguf", ("--output=x.npz",), "1,2", "its name must end in .safetensors"),
        ("nowhere.gguf", (), "1,2", "nowhere.gguf is no file; name a GGUF file"),
        ("record_llamacpp.py", (), "1,2", "llama.cpp cannot load the file"),
    ],
)
def test_what_cannot_be_recorded(
    path: str,
    flags: tuple[str, ...],
    tokens: str,
    message: str,
    record: Record,
    capsys: pytest.CaptureFixture[str],
) -> None:
    written("right.gguf")
    with pytest.raises(SystemExit) as caught:
        record(path, *flags, tokens=tokens)
    last = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2 and message in last
    assert not Path("dump.safetensors").exists()
