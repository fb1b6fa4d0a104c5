"""Another engine's dumps through a mapping file: from every layout to the canonical one."""

import functools
import json
import os
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from qwen_jax.accuracy.traces.foreign import open_trace
from qwen_jax.accuracy.traces.layout import rearrange
from qwen_jax.accuracy.traces.trace import Trace, load, names, shape
from qwen_jax.errors import UserError
from tests.accuracy.test_trace import header
from tests.engines import random_tokens
from tests.golden_cases import odd_config

CONFIG = odd_config(num_layers=2)
TOKENS = random_tokens(CONFIG, 11)
CHUNKS = (8, 1, 1, 1)
N, K, G, H = CONFIG.num_heads, CONFIG.num_kv_heads, CONFIG.group_size, CONFIG.head_dim
SIZES = {"T": 4, "S": 5, "N": N, "K": K, "G": G, "H": H, "D": 7, "F": 3, "V": 2}


@functools.cache
def ours(dtype: str = "float32") -> Trace:
    """Random tensors of a trace, causal scores and probabilities; these and logits float32."""
    rng, length = np.random.default_rng(0), len(TOKENS)
    tensors = {}
    for name in names(CONFIG):
        wide = name.endswith(("scores", "probs", "logits"))
        x = rng.normal(size=shape(name, CONFIG, length, length))
        tensors[name] = x.astype("float32" if wide else dtype)
        if name.endswith(("scores", "probs")):
            future = ~np.tril(np.ones((length, length), bool))[:, None].repeat(N, axis=1)
            tensors[name][future] = -np.inf if name.endswith("scores") else 0
    return Trace(
        header(
            dtype=dtype,
            activation_dtype=dtype,
            tokens=tuple(TOKENS),
            start=0,
            stop=length,
            chunks=CHUNKS,
        ),
        tensors,
    )


def dump(folder: Path, arrays: dict[str, np.ndarray], **mapping: Any) -> Path:
    for name, array in arrays.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{name}.npy", array)
    fields = {"version": 1, "dtype": "float32", "tokens": TOKENS} | mapping
    kept = {key: value for key, value in fields.items() if value is not ...}
    (folder / "mapping.json").write_text(json.dumps(kept))
    return folder


def assert_ours(trace: Trace, dtype: str = "float32") -> None:
    for name, tensor in trace.tensors.items():
        expected = ours(dtype).tensors[name]
        assert tensor.dtype == expected.dtype, name
        np.testing.assert_array_equal(tensor, expected, err_msg=name)


def test_canonical_names_need_no_list_of_tensors(tmp_path: Path) -> None:
    folder = dump(tmp_path, dict(ours().tensors), chunks=CHUNKS, device="a phone")
    trace = open_trace(folder, CONFIG, tokens=TOKENS)
    assert list(trace.tensors) == list(ours().tensors)
    assert trace.header.chunks == CHUNKS and trace.header.device == "a phone"
    assert_ours(trace)


def test_fused_permuted_and_padded_tensors(tmp_path: Path) -> None:
    """One engine with every habit at once."""
    arrays = {"emb": ours().tensors["embed"][None]}
    for i in range(2):
        t = {n: ours().tensors[f"layers.{i}.{n}"] for n in ("q_proj", "k_proj", "v_proj")}
        t |= {n: ours().tensors[f"layers.{i}.{n}"] for n in ("gate_proj", "up_proj", "ffn_act")}
        q, k, v = t["q_proj"], t["k_proj"], t["v_proj"]
        groups = np.concatenate([q.reshape(-1, K, G, H), k[:, :, None], v[:, :, None]], axis=2)
        arrays[f"blk/{i}/qkv"] = np.concatenate([q, k, v], axis=1).reshape(len(q), -1)
        arrays[f"blk/{i}/groups"] = groups
        arrays[f"blk/{i}/gate_up"] = np.stack([t["gate_proj"], t["up_proj"]], axis=-1)
        halves = np.split(t["ffn_act"], 2, axis=1)
        arrays[f"blk/{i}/act.rank0"], arrays[f"blk/{i}/act.rank1"] = halves
        scores = ours().tensors[f"layers.{i}.attn_scores"].transpose(1, 0, 2)
        scores = np.where(np.isinf(scores), np.float32(-1e9), scores)
        arrays[f"blk/{i}/kq"] = np.pad(scores, [(0, 0), (0, 5), (0, 21)])
    folder = dump(
        tmp_path,
        arrays,
        tensors={
            "embed": {"from": "emb", "axes": "1 T D"},
            "layers.{i}.q_proj": {"from": "blk/{i}/qkv", "axes": "T ([N]+K+K H)"},
            "layers.{i}.k_proj": {"from": "blk/{i}/groups", "axes": "T K G+[1]+1 H"},
            "layers.{i}.v_proj": {"from": "blk/{i}/qkv", "axes": "T (N+K+[K] H)"},
            "layers.{i}.gate_proj": {"from": "blk/{i}/gate_up", "axes": "T F [1]+1"},
            "layers.{i}.up_proj": {"from": "blk/{i}/gate_up", "axes": "T F 1+[1]"},
            "layers.{i}.ffn_act": ["blk/{i}/act.rank0", "blk/{i}/act.rank1"],
            "layers.{i}.attn_scores": {
                "from": "blk/{i}/kq",
                "axes": "N [T]+* [S]+*",
                "masked": -1e9,
            },
        },
    )
    trace = open_trace(folder, CONFIG)
    assert len(trace.tensors) == 1 + 2 * 7
    assert_ours(trace)
    # q of the interleaved one too: N is K times G there.
    mapped = {"layers.{i}.q_proj": {"from": "blk/{i}/groups", "axes": "T K [G]+1+1 H"}}
    assert_ours(open_trace(dump(tmp_path, {}, tensors=mapped), CONFIG))


def test_dumps_of_every_call_are_joined(tmp_path: Path) -> None:
    """Scores of a call see the keys so far only."""
    arrays, start = {}, 0
    for call, length in enumerate(CHUNKS):
        stop = start + length
        arrays[f"{call}/probs"] = ours().tensors["layers.1.attn_probs"][start:stop, :, :stop]
        arrays[f"{call}/logits"] = ours().tensors["logits"][start:stop]
        start = stop
    mapping = {"layers.1.attn_probs": "{c}/probs", "logits": "{c}/logits"}
    assert_ours(open_trace(dump(tmp_path, arrays, chunks=CHUNKS, tensors=mapping), CONFIG))


@pytest.mark.parametrize("stored", ["float32", "uint16", "void"])
def test_bfloat16_in_what_numpy_can_store(stored: str, tmp_path: Path) -> None:
    arrays = {}
    for name, tensor in ours("bfloat16").tensors.items():
        narrow = tensor.dtype == ml_dtypes.bfloat16
        arrays[name] = tensor.astype(np.float32) if stored == "float32" else tensor
        if narrow and stored == "uint16":
            arrays[name] = tensor.view(np.uint16)
    folder = dump(tmp_path, arrays, dtype="bfloat16")
    trace = open_trace(folder, CONFIG)
    assert trace.tensors["logits"].dtype == np.float32
    assert_ours(trace, "bfloat16")


def test_safetensors_with_a_mapping_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "dump.safetensors"
    save_file({"e": ours().tensors["embed"], "unused": np.zeros(3)}, path)
    fields = {"version": 1, "dtype": "float32", "tensors": {"embed": "e"}, "start": 0}
    (tmp_path / "dump.mapping.json").write_text(json.dumps(fields))
    assert_ours(open_trace(path, CONFIG, tokens=TOKENS))
    (tmp_path / "dump.mapping.json").rename(tmp_path / "other.json")
    with pytest.raises(UserError, match=r"dump.mapping.json is not there to say"):
        open_trace(path, CONFIG, tokens=TOKENS)
    assert_ours(open_trace(path, CONFIG, tokens=TOKENS, mapping=tmp_path / "other.json"))


E = np.zeros((11, 96), np.float32)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"version": 3}, 'no JSON object with "version": 1'),
        ({"colour": "red"}, "key 'colour' is unknown"),
        ({"chunks": 8}, "key 'chunks' holds 8"),
        ({"chunks": [8, 2]}, r"chunks are \(8, 2\)"),
        ({"tokens": [1, "a"]}, "'tokens' must be a list of integers"),
        ({"tokens": ...}, "the text is not known"),
        ({"dtype": ...}, 'key "dtype".* is missing'),
        ({"dtype": "int4"}, "dtype is 'int4'"),
        ({"tensors": {"embed": "f"}}, "'embed' from 'f' in .* is not there"),
        ({"tensors": {"embed": {"axes": "T D"}}}, "'embed' needs a name"),
        ({"tensors": {"embed": {"from": []}}}, "'embed' must be names"),
        ({"tensors": {"embed": {"from": "e", "shape": 3}}}, "key 'shape' is unknown"),
        ({"tensors": {"layers.2.o_proj": "e"}}, "'layers.2.o_proj' is none"),
        ({"tensors": {"layers.{i}.o": "e"}}, "'layers.0.o' is none"),
        ({"tensors": {"layers.{i}.o_proj": "e{i}"}}, "'layers.0.o_proj' from 'e0' .* not there"),
        ({"tensors": {"layers.0.q_proj": "e"}}, r"\(11, 96\), but the axes 'T N H' are 3"),
        ({"tensors": {"embed": {"from": "e", "axes": "T F"}}}, "must keep T D"),
        ({"tensors": {"embed": {"from": "e", "axes": "D T"}}}, "an axis of 11, but 'D' .* is 96"),
        ({"tensors": {"embed": {"from": "e", "axes": "T D)"}}}, "odd parenthesis"),
        ({"tensors": {"embed": {"from": ["e", "s"]}}}, "cannot be joined"),
        ({"tensors": {"embed": {"from": "e", "dtype": "int8"}}}, "\"dtype\" is 'int8'"),
        ({"tensors": {"embed": "i"}}, "is of dtype int64"),
        ({"tensors": {"embed": "bits"}}, "holds uint16 bits, which are no float32"),
        (
            {"tensors": {"logits": {"from": "third", "dtype": "float16"}}},
            "values that are no float16",
        ),
        ({"tensors": {"logits": "e.{c}"}, "start": 1}, "needs every position"),
        ({"start": 5}, "of the axes 'T D' is 6"),
    ],
)
def test_mappings_that_do_not_fit_are_refused(
    mapping: dict[str, Any], message: str, tmp_path: Path
) -> None:
    arrays = {"e": E, "s": E[:3], "i": E.astype(int), "bits": E.astype(np.uint16)}
    arrays["third"] = np.full((11, 61), 1 / 3, np.float32)
    folder = dump(tmp_path, arrays, **({"tensors": {"embed": "e"}} | mapping))
    with pytest.raises(UserError, match=message) as error:
        open_trace(folder, CONFIG)
    assert str(error.value).startswith(str(folder))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    folder = dump(tmp_path, {"e": E}, tensors={"embed": "e"})
    whole = (folder / "e.npy").read_bytes()
    for keep in (0, 20, len(whole) - 1):
        (folder / "e.npy").write_bytes(whole[:keep])
        with pytest.raises(UserError, match=r"e.npy: the file is no .npy file, or truncated"):
            open_trace(folder, CONFIG)
    (folder / "e.npy").unlink()
    with pytest.raises(UserError, match=r"there is no .npy or safetensors file"):
        open_trace(folder, CONFIG)
    (folder / "mapping.json").write_text("{")
    with pytest.raises(UserError, match=r"mapping\.json: it is not JSON"):
        open_trace(folder, CONFIG)
    with pytest.raises(UserError, match="no such file or directory"):
        open_trace(folder / "none", CONFIG)


@pytest.mark.parametrize(
    "content",
    [
        b"PK\x03\x04 the beginning of an archive",
        b"\x93NUMPY\x01\x00\x10\x00(((((((((((((((\n",
        b"\x93NUMPY\x01\x00\x50\x00"
        + b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999, 64)}".ljust(80),
    ],
    ids=["archive", "header", "size"],
)
def test_files_that_are_no_arrays_are_refused(content: bytes, tmp_path: Path) -> None:
    dump(tmp_path, {"x": ours().tensors["embed"]}, tensors={"embed": "x"})
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.npy: the file is no \.npy file, or truncated"):
        open_trace(tmp_path, CONFIG)
    (tmp_path / "mapping.json").write_bytes(b"[" * 100_000)
    with pytest.raises(UserError, match=r"mapping\.json: its JSON is nested too deeply"):
        open_trace(tmp_path, CONFIG)


def test_traces_of_another_model_or_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    ours().save(path)
    assert_ours(open_trace(path, CONFIG, tokens=TOKENS))
    with pytest.raises(UserError, match=r"has rope_theta 1000000\.0, but model has 10000\.0"):
        open_trace(path, odd_config(num_layers=2, rope_theta=1e4))
    with pytest.raises(UserError, match="differ from the 10 given from position 10 on"):
        open_trace(path, CONFIG, tokens=TOKENS[:-1])
    # One checkpoint as GGUF and as a directory: 1e-6 in float32 and in float64.
    open_trace(path, odd_config(num_layers=2, rms_eps=float(np.float32(1e-6))))


@given(
    order=st.permutations("TNH"),
    cut=st.integers(0, 2),
    pad=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_any_order_flattening_and_padding(order: list[str], cut: int, pad: int, seed: int) -> None:
    """The layout is built beside the array it describes."""
    x = np.random.default_rng(seed).normal(size=(4, N, H))
    stored = x.transpose(["TNH".index(letter) for letter in order])
    stored = np.pad(stored, [(0, pad), (0, 0), (0, 0)], constant_values=np.nan)
    words = [f"[{order[0]}]+*", *order[1:]]
    flat = words
    if cut < 2:
        shape = list(stored.shape)
        shape[cut : cut + 2] = [shape[cut] * shape[cut + 1]]
        stored = stored.reshape(shape)
        flat = [*words[:cut], f"({words[cut]} {words[cut + 1]})", *words[cut + 2 :]]
    np.testing.assert_array_equal(rearrange(stored, " ".join(flat), "T N H", SIZES), x)
    np.testing.assert_array_equal(
        rearrange(stored[None], " ".join(["1", *flat]), "T (N H)", SIZES), x.reshape(4, -1)
    )


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("", "are empty"),
        ("T N X", "have 'X'"),
        ("T N+K H", "one part must be in"),
        ("T [N]+[K] H", "one part must be in"),
        ("T N 32", "keep '32'"),
        ("T K H", "must keep T N H"),
        ("T [N]+K H", "an axis of 6, but 'N.K' .* is 8"),
        ("T (N *) H", "keep '[*]'"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(layout: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        rearrange(np.zeros((4, N, H)), layout, "T N H", SIZES)


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "layers many times": ({"layers": [0] * 3_000_000, "tensors": {}}, ""),
    "layers there are not": ({"layers": [2]}, 'the key "layers" must hold numbers from 0 to 1'),
    "layers of text": ({"layers": ["0"]}, 'the key "layers" must hold numbers from 0 to 1'),
    "pieces": ({"tensors": {"embed": ["x"] * 1_000_000}}, "has 1000000 names"),
    "long": ({"tensors": {"layers.{i}.q_proj": "{i}" * 1_000_000}}, "the longest of 3000000"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_mapping_becomes_no_larger_than_it_is(case: str, tmp_path: Path) -> None:
    fields, words = HOSTILE[case]
    path = dump(tmp_path, {"embed": ours().tensors["embed"]}, **fields)
    if words:
        with pytest.raises(UserError, match=re.escape(words)):
            open_trace(path, CONFIG)
    else:
        assert list(open_trace(path, CONFIG).tensors) == ["embed"]


def test_dumps_are_files_of_a_bounded_size(tmp_path: Path) -> None:
    mapping, folder = tmp_path / "m.json", tmp_path / "dump"
    folder.mkdir()
    with mapping.open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(UserError, match=r"m\.json: .*it has more than 16000000 bytes"):
        open_trace(folder, CONFIG, mapping=mapping)
    mapping.write_text('{"version": 1, "version": 2}')
    with pytest.raises(UserError, match=r"m\.json: the key 'version' appears twice"):
        open_trace(folder, CONFIG, mapping=mapping)
    for name in ("embed.npy", "x.safetensors"):
        for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
            make(folder / name)
            dump(folder, {}, tensors={"embed": "embed"})
            with pytest.raises(UserError, match=rf"dump/{name}.*it is a (pipe|device), and no"):
                open_trace(folder, CONFIG)
            (folder / name).unlink()


def test_operands_of_every_layer_in_one_line(tmp_path: Path) -> None:
    told = {"layers.{i}.q_proj": "q8_0", "logits": "float16"}
    trace = open_trace(dump(tmp_path, dict(ours().tensors), operands=told), CONFIG)
    expected = {"layers.0.q_proj": "q8_0", "layers.1.q_proj": "q8_0", "logits": "float16"}
    assert trace.header.operands == expected
    trace.save(tmp_path / "again")
    assert load(tmp_path / "again").header == trace.header


def test_scores_are_held_to_the_dtype_they_are_stored_in(tmp_path: Path) -> None:
    """Or told to be of: that every value fits a narrower one is what a faulty engine's do."""
    name = "layers.0.attn_scores"
    narrow = ours().tensors[name].astype(ml_dtypes.bfloat16).astype(np.float32)
    folder = dump(tmp_path, {"s": narrow, "e": ours("bfloat16").tensors["embed"].view(np.uint16)})
    for spec, dtype in [("s", "float32"), ({"from": "s", "dtype": "bfloat16"}, "bfloat16")]:
        dump(folder, {}, dtype="bfloat16", tensors={name: spec, "embed": "e"})
        trace = open_trace(folder, CONFIG)
        assert (trace.tensors[name].dtype, trace.tensors["embed"].dtype) == (dtype, "bfloat16")
