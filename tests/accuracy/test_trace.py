"""Traces on disk: what was saved comes back bit for bit, and whatever does not fit is refused."""

import dataclasses
import errno
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from qwen_jax.accuracy.traces import trace as trace_module
from qwen_jax.accuracy.traces.trace import (
    AXES,
    METADATA,
    Header,
    Trace,
    config_from_json,
    config_to_json,
    load,
    names,
    select,
    shape,
)
from qwen_jax.errors import UserError
from tests.golden_cases import YARN, odd_config

CONFIG = odd_config(num_layers=2)


def header(**changes: Any) -> Header:
    fields: dict[str, Any] = {
        "model": "m.gguf",
        "model_sha256": None,
        "config": config_to_json(CONFIG),
        "implementation": "test",
        "dtype": "bfloat16",
        "activation_dtype": "bfloat16",
        "matmul_precision": "highest",
        "device": "cpu",
        "versions": {"numpy": "2"},
        "tokens": (1, 2, 3, 4, 5),
        "start": 1,
        "stop": 4,
        "chunks": (3, 1, 1),
        "notes": ("a note",),
    }
    return Header(**fields | changes)


def random_trace(seed: int = 0, wanted: list[str] | None = None) -> Trace:
    """Of all dtypes, with NaN and infinities, which a faulty engine's trace has."""
    rng = np.random.default_rng(seed)
    dtypes = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
    tensors = {}
    for i, name in enumerate(wanted or names(CONFIG)):
        x = rng.normal(size=shape(name, CONFIG, 3, 4)).astype(dtypes[i % 4])
        x.flat[:3] = np.nan, np.inf, -np.inf
        tensors[name] = x
    return Trace(header(), tensors)


@given(seed=st.integers(0, 2**31), data=st.data())
def test_a_saved_trace_comes_back(
    tmp_path_factory: pytest.TempPathFactory, seed: int, data: st.DataObject
) -> None:
    some = st.lists(st.sampled_from(names(CONFIG)), min_size=1, unique=True)
    trace = random_trace(seed, data.draw(some))
    path = tmp_path_factory.mktemp("trace") / "t.safetensors"
    trace.save(path)
    again = load(path)
    assert again.header == trace.header
    assert list(again.tensors) == [n for n in names(CONFIG) if n in trace.tensors]
    for name, tensor in trace.tensors.items():
        assert again.tensors[name].dtype == tensor.dtype
        assert again.tensors[name].tobytes() == tensor.tobytes(), name


def test_names_are_those_of_the_design() -> None:
    every = names(CONFIG)
    assert len(every) == 3 + 2 * 17 and every[0] == "embed" and every[-1] == "logits"
    assert every[1:4] == ["layers.0.attn_norm", "layers.0.q_proj", "layers.0.k_proj"]
    assert every[17:19] == ["layers.0.ffn_residual", "layers.1.attn_norm"]
    assert set(AXES) == {name.split(".")[-1] for name in every}


def test_shapes_follow_from_the_config() -> None:
    """N 6, K 2, H 32, D 96, F 224, V 61."""
    expected = {
        "embed": (3, 96),
        "layers.1.q_rope": (3, 6, 32),
        "layers.1.v_proj": (3, 2, 32),
        "layers.1.attn_scores": (3, 6, 4),
        "layers.1.attn_out": (3, 192),
        "layers.1.ffn_act": (3, 224),
        "logits": (3, 61),
    }
    assert {name: shape(name, CONFIG, 3, 4) for name in expected} == expected


def test_globs_select_names() -> None:
    assert select(CONFIG, "*") == names(CONFIG)
    assert select(CONFIG, "logits, *.q_*") == [
        *("layers.0.q_proj", "layers.0.q_rope", "layers.1.q_proj", "layers.1.q_rope", "logits")
    ]
    with pytest.raises(UserError, match=r"'layers.2.\*' matches none"):
        select(CONFIG, ["embed", "layers.2.*"])


@pytest.mark.parametrize(
    "changes",
    [{"yarn": YARN, "context_length": 640}, {"rope_dim": 16, "linear_factor": 4.0}],
    ids=["yarn", "partial and linear"],
)
def test_a_config_with_yarn_comes_back(changes: dict[str, object]) -> None:
    config = odd_config(**changes)
    assert config_from_json(json.loads(json.dumps(config_to_json(config))), "m") == config


def test_a_header_from_before_scores_and_operands_were_told_is_read() -> None:
    older = json.loads(header().to_json())
    del older["operands"], older["scores_dtype"]
    assert Header.from_json(json.dumps(older)) == header()


def test_a_config_from_before_there_were_other_rotations_is_read() -> None:
    older = config_to_json(CONFIG)
    del older["rope_dim"], older["linear_factor"]
    assert config_from_json(older, "m") == CONFIG
    older["yarn"] = dataclasses.asdict(YARN)
    assert config_from_json(older, "m") == dataclasses.replace(CONFIG, yarn=YARN)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": ()}, "no token ids"),
        ({"tokens": (1, 2, 3, 4, 61)}, "go from 1 to 61, but the model has 0 to 60"),
        ({"start": 4}, "positions 4 to 4"),
        ({"stop": 6}, "positions 1 to 6"),
        ({"chunks": (3, 1)}, r"chunks are \(3, 1\)"),
        ({"chunks": (5, 0)}, r"chunks are \(5, 0\)"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"cache_dtype": "q8"}, "cache_dtype is 'q8'"),
        ({"scores_dtype": "int8"}, "scores_dtype is 'int8'"),
        ({"operands": {"layers.0.q_rope": "q8_0"}}, "'layers.0.q_rope': 'q8_0'.*projections"),
        ({"operands": {"layers.9.q_proj": "q8_0"}}, "'layers.9.q_proj'"),
        ({"operands": {"logits": "int4"}}, "'logits': 'int4'.*one of float16, bfloat16, q8_0"),
        ({"operands": {"logits": ["q8_0"]}}, "'logits'"),
        ({"config": {}}, "config does not describe a model"),
        ({"config": config_to_json(CONFIG) | {"num_layers": "two"}}, "does not describe a model"),
        ({"config": config_to_json(CONFIG) | {"num_layers": 10**9}}, "must be at most 10000"),
        ({"config": config_to_json(CONFIG) | {"num_kv_heads": 4}}, "num_kv_heads is 4"),
    ],
)
def test_headers_that_contradict_themselves_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        header(**changes)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no tensor"),
        ({"layers.2.q_proj": np.zeros((3, 6, 32))}, "'layers.2.q_proj' is none of this model's"),
        ({"embed": np.zeros((4, 96))}, r"'embed' has the shape \(4, 96\), but T D .* \(3, 96\)"),
        ({"embed": np.zeros((3, 96), np.int32)}, "'embed' is of dtype int32"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tensors: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Trace(header(), tensors)


def rewritten(path: Path, **fields: Any) -> Path:
    """The trace with other header fields; None takes one out."""
    text = json.loads(random_trace(wanted=["embed"]).header.to_json()) | fields
    kept = {key: value for key, value in text.items() if value is not ...}
    tensors = random_trace(wanted=["embed"]).tensors
    save_file(dict(tensors), path, metadata={METADATA: json.dumps(kept)})
    return path


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": 2}, "no JSON object of version 1"),
        ({"tokens": ...}, "field 'tokens' is missing"),
        ({"colour": "red"}, "field 'colour' is unknown"),
        ({"tokens": [1, 2.5]}, "tokens must be a list of int"),
        ({"start": "1"}, "start must be of type int"),
        ({"model_sha256": [1]}, "model_sha256 must be of type str, or null"),
        ({"device": None}, "device must be of type str"),
        ({"stop": 5}, r"'embed' has the shape \(3, 96\)"),
    ],
)
def test_damaged_headers_are_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = rewritten(tmp_path / "t.safetensors", **fields)
    with pytest.raises(UserError, match=message) as error:
        load(path)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize(
    ("keep", "message"),
    [(0, "is empty"), (7, "has 7 bytes"), (100, "claims to end at byte"), (-1, "the last tensor")],
)
def test_truncated_files_are_refused(keep: int, message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    random_trace(wanted=["embed", "logits"]).save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=message):
        load(path)


def test_a_trace_written_to_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Header and tensors are of one file: another that takes its name is not looked at, and what
    changes the one that is open is told."""
    path, other = tmp_path / "t.safetensors", tmp_path / "other.safetensors"
    random_trace(wanted=["embed"]).save(path)
    save_file({"x": np.zeros(1)}, other)
    read = trace_module.read_with_metadata

    def replaced(*args: Any) -> Any:
        found = read(*args)
        other.replace(path)
        return found

    monkeypatch.setattr(trace_module, "read_with_metadata", replaced)
    assert load(path).tensors.keys() == {"embed"}

    def cut(*args: Any) -> Any:
        found = read(*args)
        path.write_bytes(path.read_bytes()[:-8])
        return found

    random_trace(wanted=["embed"]).save(path)
    monkeypatch.setattr(trace_module, "read_with_metadata", cut)
    with pytest.raises(UserError, match="was written to while it was read"):
        load(path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"version": 1, "version": 1}', "{", "[]"])
def test_a_header_that_is_no_json(text: str, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"x": np.zeros(1)}, path, metadata={METADATA: text})
    with pytest.raises(UserError, match=r"t\.safetensors: the header: "):
        load(path)


def test_types_that_numpy_has_not(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"x": np.zeros(4, ml_dtypes.float8_e4m3fn)}, path)
    with pytest.raises(UserError, match="the tensor 'x' is of type F8_E4M3, and only F16"):
        trace_module.read_safetensors(path)


def test_files_that_are_no_traces_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file or directory"):
        load(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="Is a directory"):
        load(tmp_path)
    plain = tmp_path / "plain.safetensors"
    save_file({"embed": np.zeros((3, 96))}, plain)
    with pytest.raises(UserError, match="no trace of qwen_jax"):
        load(plain)
    with pytest.raises(UserError, match=r"can't be written .*; make room, or"):
        random_trace(wanted=["embed"]).save(tmp_path / "no" / "such" / "directory")


def test_other_tools_can_read_the_file(tmp_path: Path) -> None:
    trace = random_trace(wanted=["embed"])
    trace.save(tmp_path / "t.safetensors")
    (tensor,) = load_file(tmp_path / "t.safetensors").values()
    assert tensor.tobytes() == trace.tensors["embed"].tobytes()
    assert dataclasses.asdict(trace.header)["tokens"] == (1, 2, 3, 4, 5)


def test_half_a_trace_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full after some of it leaves what was there before."""
    whole, path = random_trace(wanted=["embed"]), tmp_path / "t.safetensors"
    whole.save(path)
    before = path.read_bytes()

    def full(tensors: object, to: str, **how: object) -> None:
        Path(to).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("qwen_jax.accuracy.traces.trace.save_file", full)
    with pytest.raises(UserError, match="No space left"):
        whole.save(path)
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]
