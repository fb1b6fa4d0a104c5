"""Decoders that misread blocks, written out block by block, are found and named."""

import struct

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from qwen_jax.accuracy.weights.audit import audit_weights
from qwen_jax.weights.loader import open_checkpoint
from tests.tiny_checkpoints import canonical, random_parameters, tiny_config, write_gguf

CONFIG = tiny_config(num_layers=1, ffn_size=256)
TENSOR, PARAMETER = "blk.0.ffn_down.weight", "layers.0.down_proj.weight"


def half(raw, at):
    return struct.unpack_from("<e", raw, at)[0]


def q8_0(block, d_at=0, quants_at=2, scale=True):
    d = half(block, d_at) if scale else 1.0
    return [np.float32(d) * q for q in struct.unpack_from("32b", block, quants_at)]


def q4_0(block, zero=8, high_first=False, interleaved=False):
    d, packed = np.float32(half(block, 0)), block[2:18]
    low, high = [b & 15 for b in packed], [b >> 4 for b in packed]
    if high_first:
        low, high = high, low
    quants = [*low, *high]
    if interleaved:
        quants[::2], quants[1::2] = low, high
    return [d * np.float32(q - zero) for q in quants]


def q5_0(block):
    """Without the fifth bit."""
    d, packed = np.float32(half(block, 0)), block[6:22]
    return [d * np.float32(q - 16) for q in [b & 15 for b in packed] + [b >> 4 for b in packed]]


def q4_k(block, scales):
    """ggml's dequantize_row_q4_K with another get_scale_min_k4."""
    d, dmin = np.float32(half(block, 0)), np.float32(half(block, 2))
    packed, q = block[4:16], block[16:]
    out = []
    for group in range(8):
        sc, m = scales(packed, group)
        run = q[32 * (group // 2) : 32 * (group // 2) + 32]
        for b in run:
            value = b >> 4 if group % 2 else b & 15
            out.append(d * np.float32(sc) * np.float32(value) - dmin * np.float32(m))
    return out


def right_scales(q, j):
    if j < 4:
        return q[j] & 63, q[j + 4] & 63
    return (q[j + 4] & 15) | ((q[j - 4] >> 6) << 4), (q[j + 4] >> 4) | ((q[j] >> 6) << 4)


def scales_without_high_bits(q, j):
    sc, m = right_scales(q, j)
    return (sc, m) if j < 4 else (sc & 15, m & 15)


def scales_as_bytes(q, j):
    return q[j] & 63, q[j + 4] & 63


def scales_in_a_row(q, j):
    bits = int.from_bytes(bytes(q), "little")
    return (bits >> (6 * j)) & 63, (bits >> (6 * (j + 8))) & 63


def scales_exchanged(q, j):
    return right_scales(q, j)[::-1]


def q6_k(block, high=True, zero=32):
    """ggml's dequantize_row_q6_K, by position."""
    ql, qh, sc, d = block[:128], block[128:192], block[192:208], np.float32(half(block, 208))
    out = []
    for i in range(256):
        side, at = i // 128, i % 128
        low = ql[64 * side + at % 64]
        low = low >> 4 if at >= 64 else low & 15
        top = (qh[32 * side + at % 32] >> (2 * (at // 32))) & 3 if high else 0
        scale = np.int8(sc[i // 16] if sc[i // 16] < 128 else sc[i // 16] - 256)
        out.append(d * np.float32(scale) * np.float32((low | top << 4) - zero))
    return out


CASES = {
    "right Q8_0": ("Q8_0", q8_0, None, ""),
    "right Q4_0": ("Q4_0", q4_0, None, ""),
    "right Q4_K": ("Q4_K", lambda b: q4_k(b, right_scales), None, ""),
    "right Q6_K": ("Q6_K", q6_k, None, ""),
    "scale after the quants": (
        "Q8_0",
        lambda b: q8_0(b, d_at=32, quants_at=0),
        "block-offset",
        "byte",
    ),
    "scale from another field": ("Q8_0", lambda b: q8_0(b, d_at=2), "block-offset", "d read at"),
    "no scale": ("Q8_0", lambda b: q8_0(b, scale=False), "scale-ignored", ""),
    "no zero point": ("Q4_0", lambda b: q4_0(b, zero=0), "offset-ignored", ""),
    "no zero point in Q6_K": ("Q6_K", lambda b: q6_k(b, zero=0), "offset-ignored", ""),
    "high half first": ("Q4_0", lambda b: q4_0(b, high_first=True), "half-bytes", "high half"),
    "halves side by side": (
        "Q4_0",
        lambda b: q4_0(b, interleaved=True),
        "half-bytes",
        "side by side",
    ),
    "no fifth bit": ("Q5_0", q5_0, "high-bits-dropped", ""),
    "no high bits in Q6_K": ("Q6_K", lambda b: q6_k(b, high=False), "high-bits-dropped", ""),
    "scales without high bits": (
        "Q4_K",
        lambda b: q4_k(b, scales_without_high_bits),
        "k-scales",
        "high bits",
    ),
    "scales as bytes": ("Q4_K", lambda b: q4_k(b, scales_as_bytes), "k-scales", "packed bytes"),
    "scales in a row": ("Q4_K", lambda b: q4_k(b, scales_in_a_row), "k-scales", "in a row"),
    "scales exchanged": ("Q4_K", lambda b: q4_k(b, scales_exchanged), "k-scales", "exchanged"),
}


def spoilt(tmp_path, kind, read):
    """A checkpoint with one tensor of `kind`, what is right, and its bytes as `read` has them."""
    params = random_parameters(CONFIG)
    types = {"model.layers.0.mlp.down_proj.weight": kind}
    written = write_gguf(tmp_path / "m.gguf", CONFIG, params, types=types)
    held = canonical(written.parameters)
    checkpoint = open_checkpoint(written.path)
    raw = checkpoint.files.raw(TENSOR).tobytes()
    with np.errstate(all="ignore"):
        held[PARAMETER] = np.array(read(raw), np.float32).reshape(held[PARAMETER].shape)
    return checkpoint, held


@pytest.mark.parametrize("case", CASES)
def test_misread_blocks(tmp_path, case):
    kind, decode, cause, detail = CASES[case]
    size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]

    def read(raw):
        return [decode(raw[i : i + size]) for i in range(0, len(raw), size)]

    findings = audit_weights(*spoilt(tmp_path, kind, read))
    faults = [f for f in findings if f.verdict == "fault"]
    if cause is None:
        assert not faults
        return
    (finding,) = faults
    assert finding.tensor == TENSOR
    assert [c.name for c in finding.causes] == [cause]
    assert detail in finding.causes[0].detail
    assert finding.causes[0].left < 1e-6 < finding.error


@pytest.mark.parametrize("shift", [2, -34, 32])
def test_a_wrong_start(tmp_path, shift):
    params = random_parameters(CONFIG)
    written = write_gguf(tmp_path / "m.gguf", CONFIG, params, types="Q8_0")
    checkpoint = open_checkpoint(written.path)
    info = checkpoint.tensors[TENSOR]
    file = np.fromfile(written.path, np.uint8)
    raw = file[info.offset + shift : info.offset + shift + info.nbytes]
    held = canonical(written.parameters)
    with np.errstate(all="ignore"):
        values = gguf.quants.dequantize(raw, info.type).reshape(info.shape)
    (finding,) = (
        f for f in audit_weights(checkpoint, held | {PARAMETER: values}) if f.verdict == "fault"
    )
    assert [(c.name, c.detail) for c in finding.causes] == [("byte-offset", f"by {shift:+d} bytes")]


def test_blocks_of_another_size(tmp_path):
    def read(raw):
        """Q8_1's 36 bytes a block, as far as the file goes."""
        padded = raw + bytes(len(raw))
        return [q8_0(padded[36 * i : 36 * i + 34]) for i in range(len(raw) // 34)]

    checkpoint, held = spoilt(tmp_path, "Q8_0", read)
    # Past the tensor's end the reader meets what the file holds next, so only half is compared.
    rows = CONFIG.hidden_size // 2
    right = gguf.quants.dequantize(checkpoint.files.raw(TENSOR), GGMLQuantizationType.Q8_0)
    held[PARAMETER][rows:] = right.reshape(held[PARAMETER].shape)[rows:]
    (finding,) = (f for f in audit_weights(checkpoint, held) if f.verdict == "fault")
    assert [c.name for c in finding.causes] == ["block-stride"]
