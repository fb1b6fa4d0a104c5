"""JAX's strict switches, which hold for a whole process and for code that was written for them."""

import jax

from qwen_jax.errors import UserError

_HARMLESS: dict[str, tuple[object, ...]] = {
    "jax_numpy_rank_promotion": ("allow", "warn"),
    "jax_numpy_dtype_promotion": ("standard",),
    "jax_transfer_guard": (None, "allow", "log"),
    "jax_transfer_guard_host_to_device": (None, "allow", "log"),
    "jax_transfer_guard_device_to_device": (None, "allow", "log"),
    "jax_transfer_guard_device_to_host": (None, "allow", "log"),
    "jax_debug_nans": (False,),
    "jax_debug_infs": (False,),
    "jax_enable_x64": (False,),
    "jax_disable_jit": (False,),
    "jax_no_tracing": (False,),
    "jax_no_execution": (False,),
}
"""Switches, and their values under which a model runs."""


def check() -> None:
    """Raises UserError where a switch is on that would end a run in the middle of it."""
    for name, harmless in _HARMLESS.items():
        value = jax.config.values.get(name, harmless[0])
        if value not in harmless:
            shown = getattr(value, "value", value)  # of an enumeration's member
            raise UserError(
                f"JAX's switch {name.upper()} is {shown!r}, under which a model can't run; leave "
                f"it at {harmless[0]!r}."
            )
