"""LoRA adapters as GGUF files, as llama.cpp's convert_lora_to_gguf.py writes them.

Tensors are a weight's GGUF name with ".lora_a" and ".lora_b", or whole weights, such as norms. As
in llama.cpp the scale is adapter.lora.alpha / rank, or 1 where there is no alpha.
"""

import math
from pathlib import Path

from qwen_jax.errors import UserError
from qwen_jax.weights import names
from qwen_jax.weights.gguf_file import open_gguf
from qwen_jax.weights.low_rank import Factor, LowRank
from qwen_jax.weights.open_files import OpenFiles
from qwen_jax.weights.peft_lora import Adapter
from qwen_jax.weights.stored import Plain

_EMBED = names.EMBED.sources[0].gguf


def open_adapter(path: Path, opened: OpenFiles) -> Adapter:
    """An adapter, whose weights are read in `opened`.

    Raises UserError, naming key and value, for a GGUF file that is not plain LoRA for Qwen2."""
    files = open_gguf(path, opened)

    def need(key: str, wanted: str, why: str) -> None:
        if (given := files.metadata.get(key)) != wanted:
            raise UserError(f"{path}: {key} is {given!r}, and {why}.")

    need("general.type", "adapter", "an adapter has 'adapter'; give a whole model as --model")
    need("adapter.type", "lora", "only 'lora' is supported; choose a LoRA adapter")
    need("general.architecture", "qwen2", "only 'qwen2' is supported; choose one for Qwen2.5")
    if "adapter.alora.invocation_tokens" in files.metadata:
        raise UserError(
            f"{path}: adapter.alora.invocation_tokens is there, so it is switched on in the middle "
            "of a text, which is not plain LoRA; choose another adapter."
        )
    alpha = files.metadata.get("adapter.lora.alpha", 0.0)
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise UserError(f"{path}: adapter.lora.alpha is {alpha!r}, not a number; convert again.")
    sides: dict[str, dict[str, Plain]] = {}
    replaced: dict[str, Plain] = {}
    for name, info in files.tensors.items():
        tensor = Plain(files, name, info.shape)
        tensor.check(path)
        weight, _, side = name.rpartition(".lora_")
        if side in ("a", "b"):
            sides.setdefault(weight, {})[side] = tensor
        else:  # mergekit-extract-lora adds norms
            replaced[name] = tensor
    if not files.tensors:
        raise UserError(f"{path}: it has no tensors; train the adapter, or leave it out.")
    updates = {weight: _update(weight, pair, alpha, path) for weight, pair in sides.items()}
    return Adapter(path, "gguf", updates, replaced)


def _update(weight: str, pair: dict[str, Plain], alpha: float, path: Path) -> LowRank:
    if missing := {"a", "b"} - pair.keys():
        raise UserError(f"{path}: {weight!r} has no .lora_{min(missing)}; convert again.")
    # Of the embedding, whose rows are looked up, the file has a [V, rank] and b [D, rank].
    looked_up = weight == _EMBED
    left, right = (
        (Factor(pair["a"]), Factor(pair["b"], transposed=True))
        if looked_up
        else (Factor(pair["b"]), Factor(pair["a"]))
    )
    if {len(left.shape), len(right.shape)} != {2} or left.shape[1] != right.shape[0]:
        raise UserError(
            f"{path}: the updates of {weight!r} have the shapes {left.shape} and {right.shape}, "
            "which do not multiply; convert the adapter again."
        )
    return LowRank(left, right, alpha / left.shape[1] if alpha else 1.0)
