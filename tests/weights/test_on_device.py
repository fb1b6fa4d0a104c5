"""What an accelerator does with a checkpoint's bytes, compiled for the CPU: the host's bits."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf.constants import GGML_QUANT_SIZES
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax import opening
from qwen_jax.errors import UserError
from qwen_jax.weights import loader, on_device
from qwen_jax.weights.blocks import FORMATS, decode_into
from qwen_jax.weights.loader import Checkpoint, load_parameters, open_checkpoint
from tests.quantised_checkpoints import gptq, write_quantised
from tests.tiny_adapters import random_pairs, write_peft
from tests.tiny_checkpoints import random_parameters, tiny_config, write_gguf, write_hf
from tests.weights.test_blocks import assert_same, random_raw

CONFIG = tiny_config(tied=False)
PARAMS = random_parameters(CONFIG)
Q_PROJ, K_PROJ, V_PROJ = (f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv")
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@pytest.fixture(autouse=True)
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything goes the accelerator's way, in pieces that divide few tensors."""
    monkeypatch.setattr(loader, "decodes_there", lambda _: True)
    monkeypatch.setattr(on_device, "PIECE", 9_000)


def extreme_raw(kind: Type, num_blocks: int, seed: int = 0) -> np.ndarray:
    """Random bytes, so that NaN, infinite, subnormal and negative scales occur."""
    raw = random_raw(kind, num_blocks, seed)
    if kind is Type.MXFP4:
        # Scales of 2^-127 and less are subnormal even in float32; XLA's CPU takes them for zeros.
        raw.reshape(num_blocks, -1)[:, 0] |= 2
    return raw


def on_host(raw: np.ndarray, kind: Type, dtype: type) -> tuple[np.ndarray, bool]:
    block, size = GGML_QUANT_SIZES[kind]
    out = np.empty(len(raw) // size * block, dtype)
    return out, decode_into(raw, kind, out)


@pytest.mark.parametrize("kind", sorted(FORMATS), ids=lambda kind: kind.name)
def test_random_blocks_equal_the_hosts_to_the_bit(kind: Type) -> None:
    raw = extreme_raw(kind, 4096)
    values = jax.jit(on_device.decoded, static_argnums=1)(raw, kind)
    assert_same(np.asarray(values), on_host(raw, kind, np.float32)[0])


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(sorted(FORMATS)),
    dtype=st.sampled_from(sorted(DTYPES)),
    sizes=st.sampled_from([(1, 1, 3), (2, 3, 5), (1, 5, 5)]),
    row=st.integers(0, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_piece_is_rounded_put_in_its_place_and_judged(kind, dtype, sizes, row, seed):
    across, rows, height = sizes
    row = min(row, height - rows)
    block, _ = GGML_QUANT_SIZES[kind]
    raw = extreme_raw(kind, rows * across, seed)
    expected, finite = on_host(raw, kind, DTYPES[dtype])
    out = jnp.full((height, across * block), 7, dtype)
    place = np.array([row, 4], np.int32)
    # An earlier weight that is not finite stays the one that is told of.
    for before, after in ((9, 9 if finite else 4), (2, 2)):
        got, bad = on_device.insert(jnp.array(out), jnp.int32(before), raw, place, kind)
        assert bad == after
    got = np.asarray(got)
    assert_same(got[row : row + rows], expected.reshape(rows, -1))
    assert (np.delete(got, range(row, row + rows), 0) == 7).all()


def mixed_gguf(path: Path) -> Checkpoint:
    """Types that differ within a fused parameter, and between layers."""
    kinds = ["Q4_K", "Q6_K", "Q8_0", "F16", "BF16", "IQ4_XS", "Q5_0", "TQ1_0"]
    matrices = [name for name, value in PARAMS.items() if value.ndim == 2]
    types = {name: kinds[i % len(kinds)] for i, name in enumerate(matrices)}
    assert len({types[name] for name in (Q_PROJ, K_PROJ, V_PROJ)}) == 3
    return open_checkpoint(write_gguf(path / "a.gguf", CONFIG, PARAMS, types=types).path)


def split_gguf(path: Path) -> Checkpoint:
    written = write_gguf(path / "a.gguf", CONFIG, PARAMS, types="Q5_1", split_max_tensors=5)
    return open_checkpoint(written.path)


def float64(path: Path) -> Checkpoint:
    rng = np.random.default_rng(0)
    params = {name: value + rng.normal(0, 1e-9, value.shape) for name, value in PARAMS.items()}
    return open_checkpoint(write_hf(path, CONFIG, params, dtype="float64").path)


def bfloat16(path: Path) -> Checkpoint:
    return open_checkpoint(write_hf(path, CONFIG, PARAMS, dtype="bfloat16", shards=2).path)


def four_bits(path: Path) -> Checkpoint:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
    return open_checkpoint(write_quantised(path, CONFIG, PARAMS, gptq(), config).path)


def with_an_adapter(path: Path) -> Checkpoint:
    base = write_gguf(path / "a.gguf", CONFIG, PARAMS, types="Q8_0")
    return opening.open_model(base.path, write_peft(path / "b", random_pairs(PARAMS)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "make", [mixed_gguf, split_gguf, float64, bfloat16, four_bits, with_an_adapter]
)
def test_every_parameter_is_what_the_host_makes_of_it(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    make: Callable[[Path], Checkpoint],
    dtype: str,
) -> None:
    checkpoint = make(tmp_path)
    there = load_parameters(checkpoint, dtype)
    monkeypatch.setattr(loader, "decodes_there", lambda _: False)
    here = load_parameters(checkpoint, dtype)
    assert list(there) == list(here)
    for name, value in here.items():
        assert_same(np.asarray(there[name]), np.asarray(value))


@pytest.mark.parametrize("most", [1, 700, 9_000, 1 << 30])
def test_pieces_of_any_size_cover_every_row_once_or_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, most: int
) -> None:
    checkpoint = mixed_gguf(tmp_path)
    expected = load_parameters(checkpoint, "float32")
    monkeypatch.setattr(on_device, "PIECE", most)
    heard: list[tuple[int, int]] = []
    got = load_parameters(checkpoint, "float32", progress=lambda *now: heard.append(now))
    for name, value in expected.items():
        assert np.array_equal(got[name], value)
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    assert heard == sorted(heard) and heard[-1] == (total, total)


def refusal(params: dict[str, np.ndarray], path: Path, dtype: str, types: dict[str, str]) -> str:
    written = write_gguf(path / "a.gguf", CONFIG, params, types=types)
    with pytest.raises(UserError) as caught:
        load_parameters(open_checkpoint(written.path), dtype)
    assert str(caught.value).startswith(str(written.path))
    return str(caught.value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize("row", [0, 33, -1])
def test_the_first_weight_with_a_value_that_is_not_finite_is_named(
    tmp_path: Path, dtype: str, kind: str, row: int
) -> None:
    values, later = PARAMS[K_PROJ].copy(), PARAMS["lm_head.weight"].copy()
    values[row, 7] = later[3, 3] = np.inf if kind == "F32" else 1e7
    params = PARAMS | {K_PROJ: values, "lm_head.weight": later}
    with np.errstate(all="ignore"):
        said = refusal(params, tmp_path, dtype, {K_PROJ: kind, "lm_head.weight": kind})
    assert "'blk.0.attn_k.weight' has values that" in said
    assert ("float16 cannot hold" in said) == (dtype == "float16")


def test_what_float16_cannot_hold(tmp_path: Path) -> None:
    values = PARAMS[V_PROJ].copy()
    values[5, 7] = 65520  # the first that rounds to infinity
    said = refusal(PARAMS | {V_PROJ: values}, tmp_path, "float16", {})
    assert "'blk.0.attn_v.weight' has values that float16 cannot hold" in said
    norm = {"model.norm.weight": PARAMS["model.norm.weight"] + np.float32(1e5)}
    written = write_gguf(tmp_path / "b.gguf", CONFIG, PARAMS | norm)
    loaded = load_parameters(open_checkpoint(written.path), "float16")
    assert np.array_equal(loaded["final_norm"], norm["model.norm.weight"])


def test_more_layers_take_no_more_programs(tmp_path: Path) -> None:
    def programs(layers: int) -> int:
        on_device.insert.clear_cache()
        config = tiny_config(num_layers=layers)
        path = tmp_path / f"{layers}.gguf"
        written = write_gguf(path, config, random_parameters(config), types="Q8_0")
        load_parameters(open_checkpoint(written.path), "bfloat16")
        return on_device.insert._cache_size()

    assert programs(1) == programs(3) <= 12


def test_no_more_is_sent_ahead_than_there_are_senders_for() -> None:
    begun, most = 0, 0
    lock = threading.Lock()

    def send(number: int) -> int:
        nonlocal begun, most
        with lock:
            begun += 1
            most = max(most, begun - taken)
        return number

    taken = 0
    with ThreadPoolExecutor(on_device.SENDERS) as pool:
        for expected, number in enumerate(on_device._ahead(pool, send, range(100))):
            assert number == expected
            taken += 1
    assert most <= 2 * on_device.SENDERS


def test_one_accelerator_decodes_and_a_cpu_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    (cpu, *_) = jax.devices("cpu")
    for device in (None, cpu, jax.sharding.SingleDeviceSharding(cpu)):
        assert not loader.decodes_there(device)
