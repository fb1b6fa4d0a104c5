"""Names of tensors that wrappers lengthen, and the names that transformers gives them.

A model that was saved within another module carries that one's name before its own: `module.` of
DataParallel, `_orig_mod.` of torch.compile, `base_model.model.` of PEFT; Qwen2Model saved without
its head lacks `model.`.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from qwen_jax.errors import UserError
from qwen_jax.weights.tensors import TensorFiles, TensorInfo

_STANDARD = "model."
_ANCHOR = "embed_tokens.weight"
# Modules of these names wrap another, anywhere: the model, or a layer each.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


@dataclasses.dataclass(frozen=True)
class Naming:
    """What stands before `embed_tokens.weight` and `layers.0...` in a checkpoint."""

    prefix: str = _STANDARD

    @classmethod
    def of(cls, names: Iterable[str]) -> "Naming":
        """By where the embedding is; the standard where that is in no place or in several."""
        found = {
            name.removesuffix(_ANCHOR)
            for name in map(unwrapped, names)
            if f".{name}".endswith(f".{_ANCHOR}")
        }
        return cls(found.pop()) if len(found) == 1 else cls()

    @property
    def outer(self) -> str:
        """What stands before `lm_head.weight`."""
        return self.prefix.removesuffix(_STANDARD)

    def canonical(self, name: str) -> str:
        """The name that transformers gives to the tensor `name` of this checkpoint."""
        bare = unwrapped(name)
        for head in (f"{self.outer}lm_head.", "lm_head."):
            if bare.startswith(head):
                return f"lm_head.{bare.removeprefix(head)}"
        if bare.startswith(self.prefix):
            return f"{_STANDARD}{bare.removeprefix(self.prefix)}"
        return name

    def own(self, name: str) -> str:
        """The name, wrappers aside, that this checkpoint gives to transformers' `name`."""
        if name.startswith(_STANDARD):
            return f"{self.prefix}{name.removeprefix(_STANDARD)}"
        return f"{self.outer}{name}"

    def rename(self, files: TensorFiles, path: Path) -> TensorFiles:
        """The files with their tensors under transformers' names; each `info.name` stays.

        Raises UserError where two tensors of the checkpoint `path` would have the same name.
        """
        tensors: dict[str, TensorInfo] = {}
        for name, info in files.tensors.items():
            canonical = self.canonical(name)
            if other := tensors.get(canonical):
                raise UserError(
                    f"{path}: the tensors {other.name!r} and {name!r} are both {canonical!r} once "
                    "their prefixes are taken away; remove the one that is not of this model."
                )
            tensors[canonical] = info
        return dataclasses.replace(files, tensors=tensors)


def unwrapped(name: str) -> str:
    """The name without the modules that wrap the model or its layers."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
