"""The laboratory names what goes wrong between devices, from a trace of a run on two."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from qwen_jax.accuracy.exact.parameters import CheckpointSource
from qwen_jax.accuracy.tensors.diagnosis import diagnose
from qwen_jax.accuracy.tensors.planting import planted
from qwen_jax.accuracy.traces.recording import record
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.split_packed import pack_split
from qwen_jax.engine.split_weights import SplitWeights, splits_of
from qwen_jax.mesh import MeshShape
from qwen_jax.model.split import Split
from qwen_jax.weights.checkpoint import open_checkpoint
from qwen_jax.weights.shards import iter_split
from tests.mesh.test_split import CONFIG, TOKENS, WIDE, engine, small, tiny
from tests.tiny_checkpoints import random_parameters, write_hf

pytestmark = pytest.mark.hosts


class Deaf(Split):
    """Devices that don't add up what they have of a product."""

    def sum(self, x: jax.Array) -> jax.Array:
        return x

    def look_up(self, rows: jax.Array, ids: jax.Array) -> jax.Array:
        return Split(self.devices).look_up(rows, ids)


def from_parts(whole: jax.Array, order: tuple[int, int]) -> jax.Array:
    """What two devices have that got the parts of these."""
    shards = [shard.data for shard in whole.addressable_shards]
    devices = [shard.device for shard in whole.addressable_shards]
    dealt = [jax.device_put(shards[i], device) for i, device in zip(order, devices, strict=True)]
    return jax.make_array_from_single_device_arrays(whole.shape, whole.sharding, dealt)


def wrong(fault: str) -> Engine:
    right = engine(2)
    named, split = dict(right.weights.named), right.spec.split
    if fault == "all_reduce_missing_tp2":
        split = Deaf(split.devices)
    order = {"heads_of_next_device_tp2": (1, 0), "part_twice_tp2": (0, 0)}.get(fault)
    for name, x in named.items():
        dealt = "_proj" in name if fault == "part_twice_tp2" else "o_proj" in name
        if order and dealt:
            named[name] = from_parts(x, order)
    weights = SplitWeights(named, CONFIG, split)
    return small(Engine(CONFIG, weights, slots=2, split=split, cache_tokens=1024))


@pytest.mark.parametrize(
    "fault", ["", "all_reduce_missing_tp2", "heads_of_next_device_tp2", "part_twice_tp2"]
)
def test_it_is_named(fault: str) -> None:
    """And nothing else is, but that devices which don't add up have streams of their own from there
    on, of which a trace shows the first one's: what others compute with theirs has no cause."""
    trace = record(wrong(fault) if fault else engine(2), TOKENS[:24])
    found = diagnose(trace, CheckpointSource(tiny(), "float32"))
    assert found.named == ((fault,) if fault else ())
    apart = {"gate_proj", "up_proj", "logits"} if fault == "all_reduce_missing_tp2" else set()
    assert {unknown.finding.operation for unknown in found.unknown} == apart


def test_weight_streams_raise_no_alarm(tmp_path: Path) -> None:
    """As several GPUs hold weights for the decode step's kernel, in bfloat16."""
    checkpoint = open_checkpoint(write_hf(tmp_path, WIDE, random_parameters(WIDE)).path)
    (split,) = splits_of(MeshShape(tp=2))
    assert isinstance(split, Split)
    split, dtype = dataclasses.replace(split, exchange=True), jnp.dtype("bfloat16")
    weights = pack_split(WIDE, iter_split(checkpoint, dtype, split), dtype, "auto", split)
    right = small(Engine(WIDE, weights, slots=2, split=split, cache_tokens=1024))
    source = CheckpointSource(checkpoint, "bfloat16")
    found = diagnose(record(right, TOKENS[:24]), source)
    assert (found.named, found.unknown) == ((), ())
    with planted(right, "zero_qkv_bias") as wrong:
        assert diagnose(record(wrong, TOKENS[:24]), source).named == ("zero_qkv_bias",)
