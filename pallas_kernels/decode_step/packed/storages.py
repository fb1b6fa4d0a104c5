"""Every way to store weights."""

from pallas_kernels.decode_step.packed.ggml import FORMATS
from pallas_kernels.decode_step.packed.plain import Numbers
from pallas_kernels.decode_step.packed.storage import Storage

STORAGES: dict[str, Storage] = {
    each.name: each
    for each in (Numbers("bfloat16"), Numbers("float16"), Numbers("float32"), *FORMATS)
}
"""By name; that of numbers is their dtype's, that of blocks the file format's in lower case."""
