"""Weight streams stored in another way."""

from pallas_kernels.decode_step import (
    HEAD,
    Packed,
    StepPlan,
    alike,
    empty_stream,
    put_matrix,
    tile_offsets,
)


def in_float32(packed: Packed, plan: StepPlan) -> tuple[Packed, StepPlan]:
    """The same weights, with which the reference rounds no input of a product."""
    wide = StepPlan(plan.shape, plan.blocks, alike("float32"))
    stream, offsets = empty_stream(wide), tile_offsets(wide)
    for phase in range(HEAD + 1):
        for layer in range(1 if phase == HEAD else plan.shape.layers):
            matrix = packed.matrix(plan, phase, layer)
            stream = put_matrix(stream, offsets[phase], matrix, layer, phase, "float32")
    return packed._replace(stream=stream, tile_offsets=offsets), wide
