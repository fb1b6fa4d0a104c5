"""Faults of engines that deal a model out to several devices: parts missing, exchanged, twice."""

from collections.abc import Callable

from qwen_jax.accuracy import transforms
from qwen_jax.accuracy.exact.parameters import BIASED, Arrays, Weights
from qwen_jax.accuracy.tensors.faults.fault import Fault, area
from qwen_jax.config import ModelConfig

DEVICES = (2, 4, 8)
BY_INPUTS = ("o_proj", "down_proj")
"""Whose products devices add up; of the others each has some rows."""

DEALT = (*BIASED, *BY_INPUTS, "gate_proj", "up_proj")


def of_first(tp: int) -> Callable[[Weights, str], Arrays]:
    """Inputs of the other devices count for nothing."""
    return lambda weights, name: tuple(
        transforms.first_block(w, w.shape[1] // tp) for w in weights[name]
    )


def of_next(tp: int) -> Callable[[Weights, str], Arrays]:
    """A device's inputs are multiplied with the columns of the next one's."""
    return lambda weights, name: tuple(transforms.next_parts(w, tp) for w in weights[name])


def first_twice(tp: int) -> Callable[[Weights, str], Arrays]:
    """The second device has what the first has."""

    def parameters(weights: Weights, name: str) -> Arrays:
        axis = 1 if name in BY_INPUTS else 0
        return tuple(transforms.first_twice(array, tp, axis) for array in weights[name])

    return parameters


def divides(tp: int) -> Callable[[ModelConfig], bool]:
    return lambda c: not any(n % tp for n in (c.num_heads, c.num_kv_heads, c.ffn_size))


def _of(tp: int) -> tuple[Fault, ...]:
    return (
        Fault(
            f"all_reduce_missing_tp{tp}",
            BY_INPUTS,
            f"of {tp} devices' sums the first one's stands for all",
            parameters=of_first(tp),
            possible=divides(tp),
        ),
        Fault(
            f"heads_of_next_device_tp{tp}",
            ("o_proj",),
            f"the heads of {tp} devices come in another order than o_proj's columns",
            parameters=of_next(tp),
            possible=divides(tp),
        ),
        Fault(
            f"part_twice_tp{tp}",
            DEALT,
            f"the second of {tp} devices has the first one's part of the weights",
            parameters=first_twice(tp),
            possible=divides(tp),
        ),
    )


SHARDING = area("sharding", (fault for tp in DEVICES for fault in _of(tp)))
