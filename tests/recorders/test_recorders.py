"""`run.py recorder`, and what every recorder writes."""

import ast
import json
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qwen_jax import recorders
from qwen_jax.accuracy.traces.foreign import open_trace
from qwen_jax.recorders.dump import Dump, RecorderError, token_ids
from tests.cli.conftest import REPOSITORY, Run, refuses, run
from tests.golden_cases import odd_config
from tests.recorders.judging import said

__all__ = ["refuses", "run"]

NAMES = ("jax", "llamacpp", "onnx", "torch")


def test_they_are_listed(run: Run) -> None:
    result = run("recorder")
    assert result.code == 0
    assert tuple(line.split()[0] for line in result.out.splitlines()) == NAMES
    page = (REPOSITORY / "docs" / "diagnose-another-engine.md").read_text(encoding="utf-8")
    assert textwrap.indent(f"$ python run.py recorder\n{result.out}", "    ") in page
    assert result.err == "run.py recorder NAME > record_NAME.py gives one to copy.\n"


@pytest.mark.parametrize("name", NAMES)
def test_a_script_stands_alone(name: str, run: Run) -> None:
    """It needs no qwen_jax, says how it is called, and is no longer than one reads."""
    result = run("recorder", name)
    tree = ast.parse(result.out)
    imported = [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    ]
    imported += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    assert "numpy" in imported and not any(n.startswith("qwen_jax") for n in imported)
    defined = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    assert defined.count("Dump") == defined.count("RecorderError") == 1
    told = ast.get_docstring(tree) or ""
    assert f"record_{name}" in told and "What to change: " in told
    assert result.out.startswith(f'"""{recorders.title(name)}\n') and result.err == ""


def test_what_is_no_recorder(refuses: Callable[..., None]) -> None:
    refuses(["recorder", "sglang"], "'sglang' is no recorder; did you mean torch?")
    refuses(["recorder", "Flax"], "'Flax' is no recorder; did you mean jax?")
    refuses(["recorder", "mlx"], "'mlx' is no recorder; they are jax, llamacpp, onnx, torch.")
    refuses(["recorder", "../dump"], "is no recorder")
    refuses(["recorder", "jax", "onnx"], "recorder takes one name, but got jax onnx.")
    refuses(["recorder", "jax", "--model=haiku"], "--model does nothing for recorder")


CONFIG = odd_config(num_layers=2)


def test_a_dump_is_read_as_it_was_put(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls are joined, fused arrays taken apart, and what is missing somewhere is left out."""
    monkeypatch.chdir(tmp_path)
    rng, dump = np.random.default_rng(0), Dump("a dump.safetensors")
    width = (CONFIG.num_heads + 2 * CONFIG.num_kv_heads) * CONFIG.head_dim
    fused = {"q_proj": "T ([N]+K+K H)", "k_proj": "T (N+[K]+K H)", "v_proj": "T (N+K+[K] H)"}
    put: dict[str, list[np.ndarray]] = {"embed": [], "qkv": []}
    for tokens in ([5, 6, 7], [8]):
        dump.begin(tokens)
        for name, size in {"embed": CONFIG.hidden_size, "qkv": width}.items():
            put[name].append(rng.normal(size=(len(tokens), size)).astype(np.float32))
        dump.put("embed", put["embed"][-1], "T D")
        for layer in range(2):
            dump.put("qkv", put["qkv"][-1], fused, layer)
        dump.put("ffn_act", np.zeros((len(tokens), CONFIG.ffn_size), np.float32), "T F", 1)
        if len(tokens) > 1:
            dump.put("logits", np.zeros((3, 64), np.float32), "T [V]+*")
    dump.write("my model", dtype="float32", implementation="mine")
    out = capsys.readouterr().out
    assert said(out) == {"model": "my model", "candidate": "a dump.safetensors"}
    assert "note: logits is left out where not every call has it." in out
    assert "note: layers.{i}.ffn_act is left out where not every call has it." in out
    trace = open_trace("a dump.safetensors", CONFIG)
    assert trace.header.tokens == (5, 6, 7, 8) and trace.header.chunks == (3, 1)
    names = {f"layers.{i}.{n}_proj" for i in range(2) for n in "qkv"}
    assert trace.tensors.keys() == {"embed", "layers.1.ffn_act", *names}
    np.testing.assert_array_equal(trace.tensors["embed"], np.concatenate(put["embed"]))
    heads = np.concatenate(put["qkv"]).reshape(4, -1, CONFIG.head_dim)
    q, k, v = np.split(heads, [CONFIG.num_heads, CONFIG.num_heads + CONFIG.num_kv_heads], axis=1)
    for name, expected in {"q": q, "k": k, "v": v}.items():
        np.testing.assert_array_equal(trace.tensors[f"layers.1.{name}_proj"], expected)
    assert json.loads(Path("a dump.mapping.json").read_text())["layers"] == [0, 1]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a dump.mapping.json", "a dump.safetensors",
    ]  # fmt: skip


def test_what_a_dump_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecorderError, match=r"is dump\.pt, but its name must end in"):
        Dump("dump.pt")
    with pytest.raises(RecorderError, match="there is no folder x"):
        Dump("x/dump.safetensors")
    dump = Dump("dump.safetensors")
    dump.begin([1])
    dump.put("q_proj", np.zeros((1, 2)), "T (N H)", 3)
    with pytest.raises(RecorderError, match=r"layers\.3\.q_proj came twice in a call"):
        dump.put("q_proj", np.zeros((1, 2)), "T (N H)", 3)
    dump.begin([2])
    with pytest.raises(RecorderError, match="None of the engine's tensors"):
        dump.write("MODEL", dtype="float32")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "1,,2", "1 2", "1,-2", "1.5", "x" * 200])
def test_ids_are_whole_numbers(text: str) -> None:
    with pytest.raises(RecorderError, match="must be like 2046,299,10") as caught:
        token_ids(text)
    assert len(str(caught.value)) < 160
    assert token_ids("2046,299,10") == [2046, 299, 10]
