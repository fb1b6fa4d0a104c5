"""Every way to store weights."""

from pallas_kernels.decode_step.packed import ggml, integers
from pallas_kernels.decode_step.packed.plain import Numbers
from pallas_kernels.decode_step.packed.storage import Storage

_NUMBERS = map(Numbers, ("bfloat16", "float16", "float32"))
STORAGES: dict[str, Storage] = {
    each.name: each for each in (*_NUMBERS, *ggml.FORMATS, *integers.FORMATS)
}
"""By name; that of numbers is their dtype's, that of GGUF's blocks the type's in lower case."""
