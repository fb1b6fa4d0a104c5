"""Where a model lies by its name, and what is there, open and checked."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from qwen_jax.weights.adapters import with_adapters
from qwen_jax.weights.hub import resolve
from qwen_jax.weights.loader import Checkpoint, open_checkpoint

BUNDLED = "haiku"
"""The name of the model that ships with the package."""


def locate(model: str | Path = BUNDLED) -> Path:
    """The path of a model: the bundled one, a file, a directory, or what `load` says of `hf:`."""
    if str(model) == BUNDLED:
        return Path(str(resources.files("qwen_jax") / "data" / f"{BUNDLED}.gguf"))
    return resolve(str(model))


def locate_adapter(adapter: str | Path) -> Path:
    """The path of an adapter: a PEFT directory, a LoRA GGUF file, or one of the Hub as `hf:`."""
    return resolve(str(adapter), adapter=True)


def open_model(
    model: str | Path = BUNDLED,
    adapter: str | Path | Sequence[str | Path] = (),
    *,
    sha256: str | None = None,
) -> Checkpoint:
    """The checkpoint that `load` would read, open and checked, with its adapters."""
    adapters = [adapter] if isinstance(adapter, str | Path) else adapter
    checkpoint = open_checkpoint(locate(model), sha256=sha256)
    return with_adapters(checkpoint, [locate_adapter(path) for path in adapters])
