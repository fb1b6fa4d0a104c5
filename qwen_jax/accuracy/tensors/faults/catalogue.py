"""Every fault by name, in the order of the areas."""

from qwen_jax.accuracy.tensors.faults.attention import ATTENTION, CACHE, MASK
from qwen_jax.accuracy.tensors.faults.fault import Fault
from qwen_jax.accuracy.tensors.faults.other import FEED_FORWARD, NORM, PRECISION
from qwen_jax.accuracy.tensors.faults.rope import FAULTS as ROPE
from qwen_jax.accuracy.tensors.faults.sharding import SHARDING
from qwen_jax.accuracy.tensors.faults.weights import WEIGHTS

FAULTS: dict[str, Fault] = {
    fault.name: fault
    for faults in (
        *(WEIGHTS, SHARDING, NORM, ROPE, ATTENTION, MASK, CACHE, FEED_FORWARD, PRECISION),
    )
    for fault in faults
}
