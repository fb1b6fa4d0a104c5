"""Faulty parameters, made by hand or by a faulty decoder, are found and named."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.accuracy.measures.residuals import residual, rounding
from qwen_jax.accuracy.weights.audit import audit_weights
from qwen_jax.accuracy.weights.table import weights_table
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.weights import pack
from qwen_jax.errors import UserError
from qwen_jax.weights.loader import load_parameters, open_checkpoint
from tests.tiny_checkpoints import (
    canonical,
    gguf_name,
    random_parameters,
    tiny_config,
    write_gguf,
    write_hf,
)

CONFIG = tiny_config()
TYPES = ("F32", "F16", "BF16", "Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS")
DTYPES = ("float32", "bfloat16", "float16")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.gguf"
    return write_gguf(path, CONFIG, random_parameters(CONFIG), types="Q8_0")


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    config = tiny_config(tied=False)
    path = tmp_path_factory.mktemp("weights") / "untied.gguf"
    return write_gguf(path, config, random_parameters(config), types="Q8_0")


@pytest.fixture
def held(written):
    """What a right loader in float32 holds, by canonical name; each test spoils its own copy."""
    return {name: value.copy() for name, value in canonical(written.parameters).items()}


def faults(path, held):
    return {f.tensor: f for f in audit_weights(path, held) if f.verdict in ("fault", "missing")}


def named(finding):
    return [cause.name for cause in finding.causes]


class TestNoAlarm:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        "kind", ["F32", "F16", "BF16", "Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS"]
    )
    def test_gguf(self, tmp_path, kind, dtype):
        config = tiny_config(num_layers=1)
        path = write_gguf(tmp_path / "m.gguf", config, random_parameters(config), types=kind).path
        checkpoint = open_checkpoint(path)
        findings = audit_weights(checkpoint, load_parameters(checkpoint, dtype))
        assert {f.verdict for f in findings} == {"exact"}
        assert len(findings) == len(checkpoint.tensors)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_hugging_face(self, tmp_path, dtype):
        config = tiny_config(tied=False, num_layers=1)
        write_hf(tmp_path, config, random_parameters(config), dtype="bfloat16", shards=2)
        checkpoint = open_checkpoint(tmp_path)
        findings = audit_weights(checkpoint, load_parameters(checkpoint, dtype))
        assert {f.verdict for f in findings} == {"exact"}

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("tied", [True, False])
    def test_packed_weights(self, tmp_path, dtype, tied):
        sizes = {"head_dim": 64, "num_heads": 4, "num_layers": 2, "ffn_size": 256}
        config = tiny_config(hidden_size=256, vocab_size=512, tied=tied, **sizes)
        path = write_gguf(tmp_path / "m.gguf", config, random_parameters(config), types="Q8_0").path
        checkpoint = open_checkpoint(path)
        parameters = load_parameters(checkpoint, dtype)
        packed = pack(config, parameters.items(), jnp.dtype(dtype), "xla")
        for held in (packed, Engine(config, parameters)):
            assert {f.verdict for f in audit_weights(checkpoint, held)} == {"exact"}

    def test_names_of_the_other_format(self, written, tmp_path):
        params = written.parameters
        by_gguf = {gguf_name(name): value for name, value in params.items()}
        hf = write_hf(tmp_path, CONFIG, params).path
        for path, held in ((written.path, params), (written.path, by_gguf), (hf, by_gguf)):
            assert not faults(path, held)

    def test_progress_counts_tensors(self, written, held):
        heard = []
        audit_weights(written.path, held, progress=lambda *done: heard.append(done))
        assert heard == [(i + 1, len(heard)) for i in range(26)]

    def test_names_nobody_knows(self, written):
        with pytest.raises(UserError, match=r"the name of a tensor of .*token_embd\.weight"):
            audit_weights(written.path, {"x": np.zeros(3)})


def _q_rows(held, new):
    name = "layers.0.qkv_proj.weight"
    rows = CONFIG.num_heads * CONFIG.head_dim
    held[name][:rows] = new(held[name][:rows])


def _llama_permute(rows):
    """As llama.cpp's convert_hf_to_gguf.py has it."""
    n, h = CONFIG.num_heads, CONFIG.head_dim
    return rows.reshape(n, 2, h // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _llama_unpermute(rows):
    """The inverse, written as an index: row 2 i + j of a head goes to j H/2 + i."""
    h = CONFIG.head_dim
    index = [head * h + 2 * i + j for head in range(6) for j in (0, 1) for i in range(h // 2)]
    return rows[index]


def _change(name, new):
    return lambda held: held.__setitem__(name, new(held[name]))


def _exchange(first, second):
    def spoil(held):
        held[first], held[second] = held[second], held[first]

    return spoil


def _zero_rows(name, start, stop):
    def spoil(held):
        held[name][start:stop] = 0

    return spoil


def _blocks_only_first(x):
    out = np.zeros_like(x)
    out[:, :32] = x[:, :32]
    return out


WHOLE = {
    "k bias zeroed": (
        _zero_rows("layers.1.qkv_proj.bias", 192, 256),
        {"blk.1.attn_k.bias": "zeroed"},
    ),
    "embedding zeroed": (_change("embed", np.zeros_like), {"token_embd.weight": "zeroed"}),
    "half a tensor zeroed": (
        _zero_rows("layers.0.o_proj.weight", 128, 256),
        {"blk.0.attn_output.weight": "zeroed"},
    ),
    "transposed": (
        _change("layers.1.down_proj.weight", lambda x: x.T),
        {"blk.1.ffn_down.weight": "transposed"},
    ),
    "transposed square": (
        _change("embed", lambda x: np.concatenate([x[:256].T, x[256:]])),
        {"token_embd.weight": None},
    ),
    "fused and transposed": (
        _change("layers.1.qkv_proj.weight", lambda x: x.T),
        {f"blk.1.attn_{x}.weight": "transposed" for x in "qkv"},
    ),
    "dimensions reversed": (
        _change("layers.1.down_proj.weight", lambda x: x.reshape(512, 256).T),
        {"blk.1.ffn_down.weight": "dims-reversed"},
    ),
    "layers exchanged": (
        _exchange("layers.0.down_proj.weight", "layers.1.down_proj.weight"),
        {"blk.0.ffn_down.weight": "layer-order", "blk.1.ffn_down.weight": "layer-order"},
    ),
    "norms exchanged": (
        _exchange("layers.0.attn_norm", "layers.0.ffn_norm"),
        {"blk.0.attn_norm.weight": "swapped", "blk.0.ffn_norm.weight": "swapped"},
    ),
    "up before gate": (
        _change("layers.0.gate_up_proj.weight", lambda x: np.concatenate([x[512:], x[:512]])),
        {"blk.0.ffn_gate.weight": "fused-order", "blk.0.ffn_up.weight": "fused-order"},
    ),
    "k, q, v": (
        _change(
            "layers.0.qkv_proj.weight", lambda x: np.concatenate([x[192:256], x[:192], x[256:]])
        ),
        {"blk.0.attn_q.weight": "fused-order", "blk.0.attn_k.weight": "fused-order"},
    ),
    "first block of each row": (
        _change("layers.1.o_proj.weight", _blocks_only_first),
        {"blk.1.attn_output.weight": "first-block-only"},
    ),
    "scaled": (
        _change("layers.0.o_proj.weight", lambda x: x * np.float32(0.37)),
        {"blk.0.attn_output.weight": "scaled"},
    ),
    "norm plus one": (
        _change("layers.1.ffn_norm", lambda x: x + 1),
        {"blk.1.ffn_norm.weight": "norm-plus-one"},
    ),
    "norm never loaded": (_change("final_norm", np.ones_like), {"output_norm.weight": "ones"}),
    "permuted": (
        lambda held: _q_rows(held, _llama_permute),
        {"blk.0.attn_q.weight": "rows-permuted"},
    ),
    "unpermuted": (
        lambda held: _q_rows(held, _llama_unpermute),
        {"blk.0.attn_q.weight": "rows-unpermuted"},
    ),
    "through bfloat16": (
        _change("embed", lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32)),
        {"token_embd.weight": "narrowed"},
    ),
    "cut to bfloat16": (
        _change("embed", lambda x: (x.view(np.uint32) >> 16 << 16).view(np.float32)),
        {"token_embd.weight": "truncated"},
    ),
    "head zeroed": (
        lambda held: held.__setitem__("lm_head", np.zeros_like(held["embed"])),
        {"lm_head": "tied-head-zeroed"},
    ),
    "one value": (
        lambda held: held["layers.0.down_proj.weight"].__setitem__((7, 11), 3.0),
        {"blk.0.ffn_down.weight": None},
    ),
}


class TestWholeTensors:
    @pytest.mark.parametrize("case", WHOLE)
    def test_is_named(self, case, written, held):
        spoil, expected = WHOLE[case]
        spoil(held)
        found = faults(written.path, held)
        assert found.keys() >= expected.keys()
        for tensor, cause in expected.items():
            assert named(found[tensor]) == ([cause] if cause else [])
            assert found[tensor].error > 1e-5
            for claimed in found[tensor].causes:
                assert claimed.left < 1e-5 * found[tensor].error + 1e-7
        untouched = {f.tensor for f in audit_weights(written.path, held)} - found.keys()
        assert len(untouched) >= 22

    @pytest.mark.parametrize("case", ["scaled", "k bias zeroed", "unpermuted", "layers exchanged"])
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_is_named_in_sixteen_bits(self, case, dtype, written, held):
        spoil, expected = WHOLE[case]
        spoil(held)
        found = faults(written.path, {name: jnp.asarray(x, dtype) for name, x in held.items()})
        assert {tensor: named(f)[0] for tensor, f in found.items()} == expected

    def test_where_an_unknown_fault_is(self, written, held):
        held["layers.1.qkv_proj.weight"][64:96, 5] += 1  # head 2 of q
        (finding,) = faults(written.path, held).values()
        assert finding.tensor == "blk.1.attn_q.weight" and not finding.causes
        assert finding.outside == 32
        assert "rows 64 to 95 (heads 2); the first, [64, 5], is" in finding.evidence

    def test_untied_head_taken_as_tied(self, untied):
        held = canonical(untied.parameters)
        (finding,) = faults(untied.path, held | {"lm_head": held["embed"]}).values()
        assert finding.tensor == "output.weight" and named(finding) == ["head-tied"]
        del held["lm_head"]
        (finding,) = faults(untied.path, held).values()
        assert finding.verdict == "missing" and named(finding) == ["head-tied"]

    def test_float16_overflow(self, tmp_path):
        params = random_parameters(CONFIG)
        params["model.layers.0.mlp.down_proj.weight"][3, 3] = 1e6
        path = write_gguf(tmp_path / "m.gguf", CONFIG, params).path
        held = {name: jnp.asarray(x, "float16") for name, x in canonical(params).items()}
        (finding,) = faults(path, held).values()
        assert finding.tensor == "blk.0.ffn_down.weight" and finding.outside == 1
        assert "1 not finite" in finding.evidence and named(finding) == ["narrowed"]

    def test_the_table_fits(self, written, held):
        for case in ("up before gate", "norm plus one", "one value", "head zeroed"):
            WHOLE[case][0](held)
        text = weights_table(audit_weights(written.path, held)).text()
        assert max(map(len, text.splitlines())) <= 100
        assert text.startswith("weights: 27 tensors, 22 exact, 5 fault\n")
        assert "norm-plus-one" in text and "unknown" in text

    def test_the_same_in_several_layers_is_one_row(self, written, held):
        for i in range(CONFIG.num_layers):
            held[f"layers.{i}.qkv_proj.bias"] = 0 * held[f"layers.{i}.qkv_proj.bias"]
        text = weights_table(audit_weights(written.path, held)).text()
        assert text.count("zeroed") == 3
        assert f"blk.*.attn_k.bias  zeroed      1        0  in {CONFIG.num_layers} layers;" in text


class TestBound:
    @given(st.floats(-6e4, 6e4, width=32), st.sampled_from(DTYPES))
    def test_rounding_to_nearest_is_inside_and_two_units_are_not(self, value, dtype):
        kind = jnp.dtype(dtype)
        right = np.array([value], np.float32)
        rounded = right.astype(kind)
        assert residual(rounded, right).fits
        unit = np.spacing(rounded) if kind != ml_dtypes.bfloat16 else None
        if unit is not None and abs(value) > 1e-3:
            wrong = (rounded + 4 * unit).astype(kind)
            assert not residual(wrong, right).fits

    def test_bound_is_half_a_unit_of_the_dtype(self):
        for dtype, unit in (("bfloat16", 2**-8), ("float16", 2**-11)):
            bound = rounding(np.ones(1, np.float32), jnp.dtype(dtype))
            assert unit <= bound[0] <= unit * 1.001

    def test_nan_equals_nan_alone(self):
        nan, one = np.full(2, np.nan, np.float32), np.ones(2, np.float32)
        assert residual(nan, nan).fits
        assert residual(one, nan).outside == residual(nan, one).outside == 2

    def test_takes_device_arrays(self, written, held):
        on_device = {name: jax.device_put(x) for name, x in held.items()}
        assert not faults(written.path, on_device)
