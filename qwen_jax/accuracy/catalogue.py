"""Every fault by name, in the order of the areas."""

from qwen_jax.accuracy.faults import Fault
from qwen_jax.accuracy.faults_attention import ATTENTION, CACHE, MASK
from qwen_jax.accuracy.faults_other import FEED_FORWARD, NORM, PRECISION
from qwen_jax.accuracy.faults_rope import FAULTS as ROPE
from qwen_jax.accuracy.faults_weights import WEIGHTS

FAULTS: dict[str, Fault] = {
    fault.name: fault
    for faults in (WEIGHTS, NORM, ROPE, ATTENTION, MASK, CACHE, FEED_FORWARD, PRECISION)
    for fault in faults
}
