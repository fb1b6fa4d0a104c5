"""record_torch.py on transformers as installed, and on the modules of vLLM and SGLang."""

import itertools
import json
import re
import shlex
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_jax import cli
from qwen_jax.accuracy.traces.trace import AXES
from tests.cli.conftest import REPOSITORY
from tests.golden_cases import CASES
from tests.recorders.judging import copied, judged, kinds, read
from tests.tiny_checkpoints import write_hf

pytestmark = pytest.mark.live
torch = pytest.importorskip("torch", reason="PyTorch is recorded: pip install '.[hf]'")
transformers = pytest.importorskip("transformers", reason="it is recorded: pip install '.[hf]'")

CASE = CASES["untied"]
TOKENS = CASE.prompt()[:24]
FAULTS = ("zero_qkv_bias", "rope_interleaved", "rope_theta_1e4")
DTYPES = ("float32", "bfloat16", "float16")
SERVED = AXES.keys() - {"attn_scores", "attn_probs"}
"""What servers' fused attention doesn't have."""


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.chdir(tmp_path)
    return copied("torch", tmp_path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "model", CASE.config, CASE.parameters()).path


def loaded(path: Path, dtype: str = "float32", attention: str = "eager") -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation=attention
    ).eval()


def plant(model: Any, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.qwen2 import modeling_qwen2

    if fault == "zero_qkv_bias":
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.bias"):
                parameter.data.zero_()
    elif fault == "rope_theta_1e4":
        rotary = model.model.rotary_emb
        half = torch.arange(0, CASE.config.head_dim, 2) / CASE.config.head_dim
        rotary.inv_freq = 1e4**-half
    else:
        half = CASE.config.head_dim // 2

        def interleaved(q: Any, k: Any, cos: Any, sin: Any, *_: Any) -> Any:
            cos, sin = (x[:, None, :, :half].repeat_interleave(2, -1) for x in (cos, sin))

            def turn(x: Any) -> Any:
                other = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
                return x * cos + other * sin

            return turn(q), turn(k)

        monkeypatch.setattr(modeling_qwen2, "apply_rotary_pos_emb", interleaved)


@pytest.mark.parametrize(("dtype", "attention"), list(itertools.product(DTYPES, ("eager", "sdpa"))))
def test_clean_transformers(
    dtype: str, attention: str, path: Path, recorder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = loaded(path, dtype, attention)
    with torch.no_grad(), recorder.recording(model, "dump.safetensors"):
        model(torch.tensor([TOKENS]))
    out = capsys.readouterr().out
    trace = read(out)
    assert trace.header.tokens == tuple(TOKENS) and trace.header.dtype == dtype
    assert trace.header.implementation == f"transformers {transformers.__version__}"
    assert trace.header.scores_dtype == (dtype if attention == "eager" else None)
    assert kinds(trace) == (AXES.keys() if attention == "eager" else SERVED)
    found = judged(out)
    assert not found.faulty and not found.skipped, found.first


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_a_fault_in_transformers(
    fault: str,
    dtype: str,
    path: Path,
    recorder: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = loaded(path, dtype)
    plant(model, fault, monkeypatch)
    with torch.no_grad(), recorder.recording(model, "dump.safetensors"):
        model(torch.tensor([TOKENS]))
    found = judged(capsys.readouterr().out)
    assert found.named == (fault,) and not found.unknown
    assert found.causes[0].layers == (0, 1, 2)


def test_generation_with_a_cache(
    path: Path, recorder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Logits, which are only made where a token is chosen, come from the model's own head."""
    model = loaded(path, "bfloat16")
    with recorder.recording(model, "dump.safetensors"):
        ids = torch.tensor([TOKENS[:9]])
        answer = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    out = capsys.readouterr().out
    trace, found = read(out), judged(out)
    assert trace.header.tokens == tuple(answer[0, :-1].tolist())
    assert trace.header.chunks == (9, 1, 1, 1, 1) and kinds(trace) == AXES.keys()
    assert (
        "the model's own head on final_norm" in trace.header.notes[0]
        and trace.header.notes[0] in out
    )
    assert not found.faulty and not found.skipped


def test_the_script_by_itself(
    path: Path, recorder: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = ",".join(map(str, TOKENS))
    monkeypatch.setattr(sys, "argv", ["record_torch.py", str(path), ids, "--dtype=bfloat16"])
    recorder.main()
    out = capsys.readouterr().out
    assert read(out).header.dtype == "bfloat16" and not judged(out).faulty


def test_the_script_on_a_gguf_file(
    recorder: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, ids = str(REPOSITORY / "qwen_jax" / "data" / "haiku.gguf"), "2046,299,10,279"
    monkeypatch.setattr(sys, "argv", ["record_torch.py", path, ids, "--dtype=float32"])
    recorder.main()
    out = capsys.readouterr().out
    assert kinds(read(out)) == AXES.keys() and not judged(out).faulty


def served(dtype: str = "float32", fault: str = "", server: str = "vllm") -> Any:
    from tests.recorders.servers import Qwen2ForCausalLM

    kind = getattr(torch, dtype)
    return Qwen2ForCausalLM(CASE.config, CASE.parameters(), dtype=kind, fault=fault, server=server)


def by_vllm(recorder: Any, model: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.recorders.servers import fake_vllm

    monkeypatch.setitem(sys.modules, "vllm", fake_vllm(model))
    ids = ",".join(map(str, TOKENS))
    monkeypatch.setattr(sys, "argv", ["record_torch.py", str(path), ids, "--engine=vllm"])
    recorder.main()


def by_sglang(recorder: Any, model: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its server does with --forward-hooks; the first request warms up."""
    hook = recorder.sglang(json.loads(json.dumps({"tokens": TOKENS, "model": str(path)})))
    model.model.register_forward_hook(hook)
    model.serve([1, 2, 3])
    model.serve([*TOKENS[:5], 0])
    model.serve(TOKENS, chunks=[16, 8])
    model.serve(TOKENS)


SERVERS = {"vllm": by_vllm, "sglang": by_sglang}


@pytest.mark.parametrize(("server", "dtype"), list(itertools.product(SERVERS, DTYPES)))
def test_clean_servers(
    server: str,
    dtype: str,
    path: Path,
    recorder: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    SERVERS[server](recorder, served(dtype, server=server), path, monkeypatch)
    out = capsys.readouterr().out
    trace, found = read(out), judged(out)
    assert trace.header.tokens == tuple(TOKENS) and trace.header.dtype == dtype
    assert trace.header.chunks == ((24,) if server == "vllm" else (16, 8))
    assert kinds(trace) == (SERVED if server == "vllm" else SERVED - {"logits"})
    assert not found.faulty and not found.skipped, found.first


@pytest.mark.parametrize(("server", "fault"), list(itertools.product(SERVERS, FAULTS)))
def test_a_fault_in_a_server(
    server: str,
    fault: str,
    path: Path,
    recorder: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    SERVERS[server](recorder, served("bfloat16", fault, server), path, monkeypatch)
    found = judged(capsys.readouterr().out)
    assert found.named == (fault,) and not found.unknown
    assert found.causes[0].layers == (0, 1, 2)


def test_what_was_in_place_is_in_place_again(path: Path, recorder: Any) -> None:
    from transformers.models.qwen2 import modeling_qwen2

    before = modeling_qwen2.apply_rotary_pos_emb, torch.nn.functional.softmax
    model = loaded(path)
    with pytest.raises(ZeroDivisionError), recorder.recording(model, "dump.safetensors"):
        raise ZeroDivisionError
    assert before == (modeling_qwen2.apply_rotary_pos_emb, torch.nn.functional.softmax)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not Path("dump.safetensors").exists()


class Linear4bit(torch.nn.Linear):
    """As bitsandbytes has them."""


def quantised(model: Any) -> Any:
    for name in ("q_proj", "k_proj"):
        module = Linear4bit(2, 2)
        module.weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
        setattr(model.model.layers[0].self_attn, name, module)
    return model


def sharded(model: Any) -> Any:
    model.model.layers[1].self_attn.num_heads, model.model.layers[1].self_attn.total_num_heads = (
        3,
        6,
    )
    return model


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def fp8_cache(model: Any) -> Any:
    model.model.layers[2].self_attn.attn = types.SimpleNamespace(kv_cache_dtype="fp8_e4m3")
    return model


def without_last(model: Any) -> Any:
    model.model.layers[2] = torch.nn.Identity()
    return model


def under_autocast(model: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.tensor([TOKENS]))


@pytest.mark.parametrize(
    ("change", "call", "message"),
    [
        (str, None, "The model is a str, but must be a torch module"),
        (lambda model: model.lm_head, None, "Linear has no module with embed_tokens, layers, norm"),
        (quantised, None, r"layers\.0\.self_attn\.q_proj is a quantised Linear4bit"),
        (sharded, None, "has 3 of 6 heads; run without tensor parallelism"),
        (compiled, None, "The model is compiled, and hooks change that"),
        (fp8_cache, None, "kept in fp8_e4m3; record with --kv-cache-dtype=auto"),
        (without_last, None, "Layer 2, a Identity, has no input_layernorm"),
        (None, lambda model: None, "was not called on the text"),
        (None, lambda model: model(torch.tensor([[1, 2], [3, 4]])), "The batch holds 2 texts"),
        (None, under_autocast, "Under autocast weights are of two dtypes"),
        (
            None,
            lambda model: (model(torch.tensor([[1, 2]])), model(torch.tensor([[1, 2]]))),
            "Call 2 begins at position 0 again",
        ),
    ],
    ids=[
        "name",
        "head",
        "quantised",
        "sharded",
        "compiled",
        "fp8",
        "pipeline",
        "no call",
        "batch",
        "autocast",
        "twice",
    ],
)
def test_what_cannot_be_recorded(
    change: Any, call: Any, message: str, path: Path, recorder: Any
) -> None:
    model = loaded(path)
    changed = change(model) if change else model
    raises = pytest.raises(recorder.RecorderError, match=message)
    with raises as caught, torch.no_grad(), recorder.recording(changed, "dump.safetensors"):
        call(model)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    assert not Path("dump.safetensors").exists()


def test_what_servers_cannot_record(recorder: Any) -> None:
    model = served()
    two = torch.tensor([1, 2, 3, 4, 5]), torch.tensor([0, 1, 2, 0, 1])
    several = pytest.raises(recorder.RecorderError, match="several texts one after another")
    with several, recorder.recording(model, "dump.safetensors"):
        model(*two)
    short = pytest.raises(recorder.RecorderError, match="4 tokens 3 were computed; switch prefix")
    with short, recorder.recording(model, "dump.safetensors", tokens=[1, 2, 3, 4]):
        model.serve([1, 2, 3])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model", "1,x"], "The tokens are '1,x', but must be like 2046,299,10"),
        (["/nowhere", "1,2"], "/nowhere"),
        (["model", "1,2,99"], "Ids go from 1 to 99, but the model has 61."),
        (["model", "1,2", "--engine=vllm"], "No module named 'vllm'"),
        (["model", "1,2", "--output=dump.npz"], "dump.npz, but its name must end in .safetensors"),
        (["model", "1,2", "--output=no/dump.safetensors"], "but there is no folder no."),
    ],
)
def test_the_command_line(
    words: list[str],
    message: str,
    path: Path,
    recorder: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["record_torch.py", *words])
    with pytest.raises(SystemExit) as caught:
        recorder.main()
    last = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2 and last.startswith("record_torch.py: error: ")
    assert message in last


def test_bfloat16_is_written_as_it_is(path: Path, recorder: Any, capsys: Any) -> None:
    import ml_dtypes

    model = loaded(path, "bfloat16")
    with torch.no_grad(), recorder.recording(model, "dump.safetensors"):
        model(torch.tensor([TOKENS]))
    trace = read(capsys.readouterr().out)
    table = model.model.embed_tokens.weight.detach().float().numpy()
    assert trace.tensors["embed"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(trace.tensors["embed"].astype(np.float32), table[TOKENS])


def test_the_documented_engine(
    tmp_path: Path,
    recorder: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The page's first example, and what it shows of the answer."""
    page = (REPOSITORY / "docs" / "diagnose-another-engine.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(import torch\n.*?)```", page, re.DOTALL)
    (shown,) = re.findall(r"^\$ python engine\.py\n(.*?)```", page, re.DOTALL | re.MULTILINE)
    (tmp_path / "qwen_jax").symlink_to(REPOSITORY / "qwen_jax")
    monkeypatch.setitem(sys.modules, "record_torch", recorder)
    exec(program, {})
    first, command = capsys.readouterr().out.splitlines()
    assert shown.startswith(f"{first}\n{command}\n$ {command.strip()}\n")
    assert cli.main(shlex.split(command)[2:]) == 0
    out = capsys.readouterr().out.splitlines()
    lines = [line for line in shown.splitlines() if line.startswith(("FAULT", "First wrong"))]
    assert len(lines) == 2 and set(lines) <= set(out)
    assert any(line.startswith("zero_qkv_bias  all ") for line in out)
