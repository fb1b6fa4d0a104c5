"""In what form a checkpoint's weights lie on the device: numbers, or the file's own blocks.

A CPU decodes blocks as it uses them, where numbers would take too much memory. A GPU's decode step
multiplies them as they are, which takes it half as long for few texts; a phase of it (queries,
keys and values, say) whose matrices are not all in blocks that it knows is expanded.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from gguf.constants import GGMLQuantizationType

import pallas_kernels
from pallas_kernels.decode_step import HEAD, MOST_ROWS, StepPlan, Stored
from pallas_kernels.decode_step import refusal as kernel_refusal
from pallas_kernels.decode_step.packed.blocks import Blocks
from pallas_kernels.decode_step.packed.storages import STORAGES
from qwen_jax.config import ModelConfig
from qwen_jax.engine import split_packed
from qwen_jax.engine.blocks import FLOAT32, packed_bytes
from qwen_jax.engine.memory import Budget, device, packs
from qwen_jax.engine.packing import MATRICES
from qwen_jax.engine.split_blocks import cut_through
from qwen_jax.engine.weights import Weights, pack, plan_for
from qwen_jax.engine.weights import refusal as refusal_on_one
from qwen_jax.errors import UserError
from qwen_jax.mesh import ONE, MeshShape
from qwen_jax.model.split import Split
from qwen_jax.weights.checkpoint import Checkpoint
from qwen_jax.weights.names import Parameter
from qwen_jax.weights.on_device import block_type, iter_decoded, raw_shape
from qwen_jax.weights.open_files import Progress
from qwen_jax.weights.shards import on_devices, part_of

FEW_TEXTS = 8
"""Up to which blocks are the faster form on a GPU; more texts share what numbers take to read."""


class Form(NamedTuple):
    """How weights are held.

    Attributes:
        held: bytes of all of them on the device.
        blocks: whether any stay in blocks.
        plan: on a GPU, how those lie in the weight stream.
        shapes: of the weights then, for programs that are compiled before they are there.
        rows: texts that run at the same time, at most, where that has a bound.
        cut: matrices of which some are numbers, since a device's part of them is not whole blocks.
        exchanging: whether several devices take a step together, by the decode step's kernel on
            each, which reads its part from a weight stream.
    """

    held: int
    blocks: bool = False
    plan: StepPlan | None = None
    shapes: Weights | None = None
    rows: int | None = None
    cut: tuple[str, ...] = ()
    exchanging: bool = False


def form_of(
    asked: str,
    checkpoint: Checkpoint,
    dtype: jnp.dtype,
    *,
    implementation: str = "auto",
    slots: int | None = None,
    texts: int | None = None,
    mesh: MeshShape = ONE,
) -> Form:
    """The form that the weights will have.

    Args:
        asked: "auto", "packed" or "expanded".
        slots, texts: how many texts may run at the same time, and how many there will be, where
            that is known.
        mesh: the devices that they are dealt out to, or have all of them; `Form.held` is what one
            has.

    Raises:
        UserError: they can't stay in blocks, and it was asked for; or they can't be dealt out, or
            the decode step's kernel was asked for on several devices.
    """
    on_cpu, dealt = device().platform == "cpu", mesh.tp > 1
    apart = _apart(checkpoint.config, dtype, implementation, mesh) if dealt else None
    exchanging = dealt and apart is None
    own = part_of(checkpoint, mesh.tp, 0) if dealt else checkpoint
    budget = Budget.of(own.config, dtype, sharers=mesh.devices)
    numbers = Form(budget.weights, exchanging=exchanging)
    few = not on_cpu and texts is not None and texts <= FEW_TEXTS
    if asked == "expanded" or (asked == "auto" and not few and not packs(budget, 0)):
        return numbers
    if on_cpu:
        found = _on_cpu(own, dtype)
    elif apart is not None:
        found = (
            "on a GPU only the decode step's kernel multiplies blocks, and the devices of mesh "
            f"{mesh} take their steps without: {apart}"
        )
    else:
        found = _in_stream(own, dtype, implementation, slots)
    if isinstance(found, str):
        if asked == "packed":
            raise UserError(f"weights is 'packed', but {found}; choose auto or expanded.")
        return numbers
    cut = cut_through(checkpoint, mesh.tp) if on_cpu and dealt else ()
    found = found._replace(cut=cut, exchanging=exchanging)
    few = few and (texts or 0) <= (found.rows or 0)
    return found if asked == "packed" or few or packs(budget, found.held) else numbers


def _apart(
    config: ModelConfig, dtype: jnp.dtype, implementation: str, mesh: MeshShape
) -> str | None:
    """Why several devices don't take a decode step together by its kernel, or None."""
    mesh.check(config)
    why = no_kernel(config, dtype, mesh)
    if implementation == "mosaic_gpu" and why:
        raise UserError(
            "implementation is 'mosaic_gpu', but the decode step's kernel can't run this model on "
            f"the devices of mesh {mesh}: {why}; choose auto, which has products by XLA between "
            "kernels for attention on each, or xla."
        )
    if pallas_kernels.choose("decode_step", implementation, why) == "mosaic_gpu":
        return None
    if implementation == "xla":
        return "implementation is xla"
    return why or pallas_kernels.refusal("decode_step")


def no_kernel(config: ModelConfig, dtype: jnp.dtype, mesh: MeshShape) -> str | None:
    """Why the devices that have a model can't take a decode step by its kernel, or None."""
    if mesh.tp == 1:
        return refusal_on_one(config, dtype)
    if mesh.dp > 1:
        return f"its devices have to be JAX's first ones, and dp={mesh.dp} has models on others"
    return split_packed.refusal(config, dtype, range(mesh.tp))


def _on_cpu(checkpoint: Checkpoint, dtype: jnp.dtype) -> Form | str:
    """The form in blocks, or why there is none."""
    if dtype != FLOAT32:
        return f"blocks are decoded to float32, and dtype is {dtype.name}"
    held = packed_bytes(checkpoint)
    if held is None:
        return f"{checkpoint.path} has no matrices in blocks or in 16 bits that could stay so"
    return Form(held, blocks=True)


def _in_stream(
    checkpoint: Checkpoint, dtype: jnp.dtype, implementation: str, slots: int | None
) -> Form | str:
    """The same on a GPU."""
    plan, config = stored_plan(checkpoint, dtype), checkpoint.config
    if plan is None:
        return f"{checkpoint.path} has no matrices in blocks that the decode step multiplies"
    if implementation == "xla":
        return "only the decode step's kernel multiplies blocks, and implementation is xla"
    if why := kernel_refusal(plan, 1, dtype, config.rope_dim // 2):
        return f"the decode step's kernel can't run them: {why}"
    served = [
        rows
        for rows in range(1, MOST_ROWS + 1)
        if kernel_refusal(plan, rows, dtype, config.rope_dim // 2) is None
    ]
    rows = max(served)
    if slots is not None and slots > rows:
        return f"blocks of this model run in at most {rows} slots, and slots is {slots}"
    shapes = packed_shapes(checkpoint, plan, dtype, implementation)
    held = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    return Form(held, blocks=True, plan=plan, shapes=shapes, rows=rows)


def stored_plan(checkpoint: Checkpoint, dtype: jnp.dtype) -> StepPlan | None:
    """How the decode step stores the matrices: in their blocks, phase by phase, or in `dtype`; None
    where none stay in blocks.
    """
    by_name = {parameter.name: parameter for parameter in checkpoint.parameters}
    layers = range(checkpoint.config.num_layers)

    def phase(name: str) -> list[tuple[str, ...]]:
        """The storages of a phase's sources in each layer."""
        found = [_storages(checkpoint, by_name[f"layers.{i}.{name}.weight"]) for i in layers]
        alike = name != "gate_up_proj" or all(len({*each}) == 1 for each in found)
        if alike and all(None not in each for each in found):
            return [tuple(x for x in each if x is not None) for each in found]
        return [(dtype.name,) * len(each) for each in found]

    qkv, o_proj, gate_up, down = map(phase, MATRICES)
    (head,) = _storages(checkpoint, by_name["embed" if checkpoint.config.tied else "lm_head"])
    stored = tuple(Stored._make((*qkv[i], *o_proj[i], gate_up[i][0], *down[i])) for i in layers)
    plan = plan_for(checkpoint.config, dtype.name)
    plan = StepPlan(plan.shape, plan.blocks, stored, head or dtype.name)
    return plan if any(isinstance(each, Blocks) for each in plan.storages) else None


def _storages(checkpoint: Checkpoint, parameter: Parameter) -> tuple[str | None, ...]:
    """Of each of its sources the storage that keeps its blocks, if there is one."""

    def of(name: str) -> str | None:
        blocks = checkpoint.stored[name].blocks
        storage = STORAGES.get(blocks.name) if blocks is not None else None
        return storage.name if isinstance(storage, Blocks) else None

    return tuple(map(of, parameter.sources))


def expanded_in(plan: StepPlan) -> tuple[str, ...]:
    """The matrices that a plan doesn't keep in blocks, by their parameters' names."""
    return tuple(name for name in (*MATRICES, "lm_head") if not _any_of(name, _blocks_of(plan)))


def _any_of(name: str, parameters: frozenset[str]) -> bool:
    return any(name in parameter.split(".") for parameter in parameters)


@functools.cache
def _blocks_of(plan: StepPlan) -> frozenset[str]:
    """Parameters whose matrices the plan keeps in blocks; the head as "lm_head"."""
    found = set()
    for layer in range(len(plan.layers)):
        for phase, name in enumerate(MATRICES):
            if isinstance(STORAGES[plan.stored(phase, layer)[0]], Blocks):
                found.add(f"layers.{layer}.{name}.weight")
    if isinstance(STORAGES[plan.stored(HEAD, 0)[0]], Blocks):
        found.add("lm_head")
    return frozenset(found)


def _kept(checkpoint: Checkpoint, plan: StepPlan) -> tuple[set[str], GGMLQuantizationType | None]:
    """Parameters that stay bytes, and the type of an embedding among them that isn't the head."""
    kept = {*_blocks_of(plan)}
    if checkpoint.config.tied:
        return {"embed" if name == "lm_head" else name for name in kept}, None
    (embed,) = (p for p in checkpoint.parameters if p.name == "embed")
    (kind,) = (block_type(checkpoint.stored[name]) for name in embed.sources)
    return (kept | {"embed"} if kind is not None else kept), kind


def packed_shapes(
    checkpoint: Checkpoint, plan: StepPlan, dtype: jnp.dtype, implementation: str
) -> Weights:
    """What `load_packed` will return, as shapes alone."""
    kept, embed = _kept(checkpoint, plan)

    def shape(parameter: Parameter) -> object:
        if parameter.name not in kept:
            kind = FLOAT32 if parameter.keep_float32 else dtype
            return jax.ShapeDtypeStruct(parameter.shape, kind)
        shapes = (raw_shape(checkpoint, name) for name in parameter.sources)
        return tuple(jax.ShapeDtypeStruct(shape, jnp.uint8) for shape in shapes)

    given = {parameter.name: shape(parameter) for parameter in checkpoint.parameters}
    made: Weights = jax.eval_shape(
        lambda given: pack(checkpoint.config, given.items(), dtype, implementation, plan, embed),
        given,
    )
    return made


def load_packed(
    checkpoint: Checkpoint,
    plan: StepPlan,
    dtype: jnp.dtype,
    implementation: str,
    progress: Progress | None = None,
) -> Weights:
    """The checkpoint's weights on the device, in blocks where the plan has them so.

    Raises:
        UserError: a value is not finite.
    """
    kept, embed = _kept(checkpoint, plan)
    parameters = iter_decoded(checkpoint, dtype, None, progress, kept)
    return pack(checkpoint.config, parameters, dtype, implementation, plan, embed)


def load_packed_on(
    split: Split,
    checkpoint: Checkpoint,
    plan: StepPlan,
    dtype: jnp.dtype,
    implementation: str,
    progress: Progress | None = None,
) -> Weights:
    """The same on a mesh; the plan is of what one of its devices has.

    Raises:
        UserError: a value is not finite.
    """
    kept, embed = _kept(part_of(checkpoint, split.size, 0), plan)

    def parts(own: Checkpoint, device: jax.Device, told: Progress) -> Iterator[tuple[str, Any]]:
        return iter_decoded(own, dtype, device, told, kept)

    parameters = on_devices(checkpoint, split, parts, progress)
    config = checkpoint.config
    return split_packed.pack_split(config, parameters, dtype, implementation, split, plan, embed)
