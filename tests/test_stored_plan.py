"""Blocks in the weight stream: which matrices stay so, and the engine runs the same on them."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.decode_step import Stored
from qwen_jax.config import ModelConfig
from qwen_jax.engine import form as form_module
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.form import Form, expanded_in, form_of, load_packed, packed_shapes, stored_plan
from qwen_jax.engine.packing import BlockRows
from qwen_jax.engine.weights import PackedWeights, read_back
from qwen_jax.errors import UserError
from qwen_jax.mesh import MeshShape
from qwen_jax.tasks import inspect
from qwen_jax.weights.checkpoint import Checkpoint
from qwen_jax.weights.loader import load_parameters, open_checkpoint
from tests.engines import Prompt, generate, random_tokens, relative
from tests.tiny_checkpoints import random_parameters, tiny_config, write_gguf

BFLOAT16, FLOAT32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
# Heads of 64 and matrices of whole tiles and whole blocks, as the kernel wants them.
CONFIG = tiny_config(
    num_layers=2, hidden_size=256, num_heads=4, num_kv_heads=2, head_dim=64, ffn_size=512,
    vocab_size=320, context_length=600, tied=False,
)  # fmt: skip
MIXED = {
    "embed_tokens": "Q4_K",
    "lm_head": "Q6_K",
    "q_proj": "Q4_K",
    "k_proj": "Q5_0",
    "v_proj": "Q6_K",
    "o_proj": "IQ4_XS",
    "gate_proj": "Q3_K",
    "up_proj": "Q3_K",
    "down_proj": "Q8_0",
}


def written(path: Path, types: Mapping[str, str], config: ModelConfig = CONFIG) -> Checkpoint:
    params = random_parameters(config)
    chosen = {
        name: kind
        for name in params
        for part, kind in types.items()
        if part in name.split(".") and name.endswith("weight")
    }
    return open_checkpoint(write_gguf(path / "model.gguf", config, params, types=chosen).path)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return written(tmp_path_factory.mktemp("mixed"), MIXED)


@pytest.fixture(scope="module")
def packed(mixed: Checkpoint) -> PackedWeights:
    """For the kernel's reference, which rounds nothing of blocks."""
    plan = stored_plan(mixed, FLOAT32)
    assert plan is not None
    weights = load_packed(mixed, plan, FLOAT32, "xla")
    assert isinstance(weights, PackedWeights)
    return weights


def test_matrices_stay_as_the_file_has_them(mixed: Checkpoint, packed: PackedWeights) -> None:
    layer = Stored("q4_k", "q5_0", "q6_k", "iq4_xs", "q3_k", "q8_0")
    assert packed.plan.layers == (layer, layer) and packed.in_blocks
    assert packed.plan.head == "q6_k"
    assert isinstance(packed.embed, BlockRows)
    expanded = load_parameters(mixed, jnp.float32)
    found = read_back(packed)
    assert sorted(found) == sorted(expanded)
    for name, value in expanded.items():
        np.testing.assert_array_equal(found[name], value)


def test_logits_and_text(mixed: Checkpoint, packed: PackedWeights) -> None:
    expanded, ours = Engine(CONFIG, load_parameters(mixed, jnp.float32)), Engine(CONFIG, packed)
    tokens = random_tokens(CONFIG, 560)
    assert relative(ours.logits(tokens), expanded.logits(tokens)) < 1e-5
    prompts = [Prompt(tokens[:500], 10), Prompt(tokens[500:517], 10)]
    assert generate(ours, prompts) == generate(expanded, prompts)


def test_shapes_are_known_before(mixed: Checkpoint, packed: PackedWeights) -> None:
    shapes = packed_shapes(mixed, packed.plan, FLOAT32, "xla")
    assert jax.tree.structure(shapes) == jax.tree.structure(packed)
    for ours, theirs in zip(jax.tree.leaves(shapes), jax.tree.leaves(packed), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


def test_a_phase_is_expanded_where_one_matrix_has_no_blocks_of_ours(tmp_path: Path) -> None:
    """Values in a type that no kernel multiplies; gate and up, of which a tile has both, apart."""
    others = {"v_proj": "TQ2_0", "up_proj": "Q4_K", "embed_tokens": "F16"}
    checkpoint = written(tmp_path, MIXED | others)
    plan = stored_plan(checkpoint, FLOAT32)
    assert plan is not None
    number = "float32"
    assert plan.layers[0] == Stored(number, number, number, "iq4_xs", number, "q8_0")
    assert expanded_in(plan) == ("qkv_proj", "gate_up_proj")
    lines = inspect.memory_lines(CONFIG, FLOAT32, form=Form(10**6, blocks=True, plan=plan, rows=16))
    told = [" ".join(line.split()) for line in lines]
    assert told[1].startswith("weights 1.0 MB (in blocks, multiplied as they are; expanded ")
    assert told[2] == "all but qkv_proj, gate_up_proj, which are expanded to float32"
    weights = load_packed(checkpoint, plan, FLOAT32, "xla")
    assert isinstance(weights, PackedWeights) and isinstance(weights.embed, jax.Array)
    found = read_back(weights)
    for name, value in load_parameters(checkpoint, jnp.float32).items():
        np.testing.assert_array_equal(found[name], value)
    plain = written(tmp_path, dict.fromkeys(MIXED, "BF16"))
    assert stored_plan(plain, FLOAT32) is None


def test_damaged_blocks(tmp_path: Path) -> None:
    checkpoint = written(tmp_path, MIXED)
    info = checkpoint.tensors["blk.1.ffn_down.weight"]
    with info.path.open("r+b") as file:
        file.seek(info.offset)
        file.write(b"\xff\xff")
    checkpoint = open_checkpoint(checkpoint.path)
    plan = stored_plan(checkpoint, FLOAT32)
    assert plan is not None
    why = r"'blk\.1\.ffn_down\.weight' has values that are not finite"
    with pytest.raises(UserError, match=why):
        load_packed(checkpoint, plan, FLOAT32, "xla")


class Gpu:
    platform = "gpu"


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hopper's, for what is decided before anything runs on them."""
    monkeypatch.setattr(form_module, "device", Gpu)
    monkeypatch.setattr("qwen_jax.engine.memory.free_memory", lambda: 10**9)
    monkeypatch.setattr(pallas_kernels.implementation, "device_refusal", lambda: None)
    pallas_kernels.choose.cache_clear()
    yield
    pallas_kernels.choose.cache_clear()


def test_rule_of_auto_on_a_gpu(mixed: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks for few texts, and where numbers don't fit; who asks for them gets them."""
    monkeypatch.setattr(form_module, "device", Gpu)
    free = 10**9
    monkeypatch.setattr("qwen_jax.engine.memory.free_memory", lambda: free)

    def form(asked: str, **how: int | None) -> Form:
        return form_of(asked, mixed, BFLOAT16, **how)  # type: ignore[arg-type]

    blocks = form("packed")
    assert blocks.plan == stored_plan(mixed, BFLOAT16) and blocks.rows == 64
    shapes = packed_shapes(mixed, blocks.plan, BFLOAT16, "auto")
    assert blocks.held == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    assert form("auto", texts=8) == blocks
    assert not form("auto", texts=9).blocks
    assert not form("auto").blocks
    assert not form("auto", texts=1, slots=65).blocks
    assert not form("expanded", texts=1).blocks
    free = form("expanded").held
    assert form("auto", texts=9) == blocks


@pytest.mark.usefixtures("gpus")
def test_on_several_gpus(mixed: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks where one would have them, each device's part by itself."""

    def form(asked: str, implementation: str = "auto", tp: int = 2, texts: int = 9) -> Form:
        mesh = MeshShape(tp=tp)
        asks = {"implementation": implementation, "mesh": mesh, "texts": texts}
        return form_of(asked, mixed, BFLOAT16, **asks)  # type: ignore[arg-type]

    part, whole = form("packed"), form("packed", tp=1)
    assert part.blocks and part.plan is not None and whole.plan is not None
    assert part.exchanging and not whole.exchanging
    assert part.plan.shape.ffn * 2 == whole.plan.shape.ffn
    # Half of o_proj's 256 inputs is half of a block.
    assert part.plan.layers[0] == whole.plan.layers[0]._replace(o_proj="bfloat16")
    assert form("auto", texts=8) == part
    assert form("packed", "mosaic_gpu").plan == part.plan
    numbers = form("auto")
    assert numbers.exchanging and not numbers.blocks
    for implementation in ("auto", "mosaic_gpu"):
        assert form("expanded", implementation) == numbers
    assert form("expanded", "xla") == numbers._replace(exchanging=False)
    with pytest.raises(UserError, match="mesh tp=2 take their steps without: implementation is xl"):
        form("packed", "xla")
    older = "the default device has compute capability 8.0"
    with monkeypatch.context() as patch:
        patch.setattr(pallas_kernels.implementation, "device_refusal", lambda: older)
        pallas_kernels.choose.cache_clear()
        with pytest.raises(UserError, match=f"mesh tp=2 take their steps without: {older}; choose"):
            form("packed")
        pallas_kernels.choose.cache_clear()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert form("auto", texts=1) == numbers._replace(exchanging=False)
    why = "the devices belong to 2 processes; choose"
    with pytest.raises(UserError, match=f"mesh tp=2: {why}"):
        form("auto", "mosaic_gpu")
    with pytest.raises(UserError, match=f"mesh tp=2 take their steps without: {why}"):
        form("packed")


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(("ffn", "down"), [(704, "q8_0"), (672, "bfloat16")])
def test_a_feed_forward_that_is_not_whole_tiles(tmp_path: Path, ffn: int, down: str) -> None:
    """A half of 704 is 11 blocks of 32, in 2.75 tiles; one of 672 ends within a block."""
    config = dataclasses.replace(CONFIG, ffn_size=ffn)
    checkpoint = written(tmp_path, MIXED, config)
    for tp, stored in ((1, "q8_0"), (2, down)):
        found = form_of("packed", checkpoint, BFLOAT16, mesh=MeshShape(tp=tp))
        assert found.plan is not None and {each.down for each in found.plan.layers} == {stored}
        assert found.plan.shape.ffn == ffn // tp
    plan = stored_plan(checkpoint, FLOAT32)
    assert plan is not None
    weights = load_packed(checkpoint, plan, FLOAT32, "xla")
    assert isinstance(weights, PackedWeights)
    back = read_back(weights)
    for name, value in load_parameters(checkpoint, jnp.float32).items():
        np.testing.assert_array_equal(back[name], value)


def test_refusals_on_a_gpu(
    mixed: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(form_module, "device", Gpu)
    with pytest.raises(UserError, match="at most 64 slots, and slots is 65; choose auto"):
        form_of("packed", mixed, BFLOAT16, slots=65)
    with pytest.raises(UserError, match="kernel multiplies blocks, and implementation is xla"):
        form_of("packed", mixed, BFLOAT16, implementation="xla")
    with pytest.raises(UserError, match="can't run them: the cache is float32"):
        form_of("packed", mixed, FLOAT32)
    plain = written(tmp_path, dict.fromkeys(MIXED, "F16"))
    with pytest.raises(UserError, match="no matrices in blocks that the decode step multiplies"):
        form_of("packed", plain, BFLOAT16)
