"""Every way to store weights."""

from pallas_kernels.decode_step.packed.plain import Numbers
from pallas_kernels.decode_step.packed.q8_0 import Q8_0
from pallas_kernels.decode_step.packed.storage import Storage

STORAGES: dict[str, Storage] = {
    each.name: each
    for each in (Numbers("bfloat16"), Numbers("float16"), Numbers("float32"), Q8_0())
}
"""By name; that of numbers is their dtype's, that of blocks the file format's."""
