"""LoRA adapters as PEFT saves them: adapter_config.json and adapter_model.safetensors.

The scale of an update is lora_alpha / r, or lora_alpha / sqrt(r) where it is rank-stabilised
(Kalajdzievski, 2023, arXiv:2312.03732). Every field of the config that could make of it more than
W + scale * B A is used or refused, and so is every tensor.
"""

import dataclasses
import functools
import math
import re
from pathlib import Path
from typing import Any

from absl import logging

from qwen_jax.errors import UserError
from qwen_jax.regular_files import is_there
from qwen_jax.strict_json import read_object
from qwen_jax.weights import names
from qwen_jax.weights.low_rank import Factor, LowRank
from qwen_jax.weights.open_files import OpenFiles
from qwen_jax.weights.prefixes import unwrapped
from qwen_jax.weights.safetensors import read_safetensors
from qwen_jax.weights.stored import Plain
from qwen_jax.weights.tensors import TensorFiles

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_REFUSED = {
    "use_dora": "DoRA also changes the length of each row",
    "lora_bias": "its updates have biases",
    "use_qalora": "QALoRA pools the inputs",
    "use_bdlora": "its matrices are of blocks",
    "alora_invocation_tokens": "it is switched on in the middle of a text",
    "layer_replication": "it repeats layers",
    "target_parameters": "it changes parameters that are no modules",
    "trainable_token_indices": "it replaces single rows of the embedding",
    "arrow_config": "it routes between adapters",
    "kasa_config": "it is of KaSA",
    "monteclora_config": "it is of MonteCLoRA",
}
"""Fields that must be absent, false or empty, and what they would mean."""

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that take the update's first value out of the model's own weight."""

_OTHERS = {
    "adapter_model.bin": ", and adapter_model.bin is a pickle, which could run any program and is "
    "not read; save it again with peft's save_pretrained",
    "adapters.safetensors": ", and adapters.safetensors is MLX's; merge it with mlx_lm.fuse, and "
    "give the result",
}
"""Files that adapters have instead, and what to say of them."""

_USED = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
_USED |= {"init_lora_weights", "base_model_name_or_path", "ensure_weight_tying"}

_NEUTRAL = {
    *("auto_mapping", "bias", "exclude_modules", "fan_in_fan_out", "inference_mode"),
    *("layers_pattern", "layers_to_transform", "lora_dropout", "megatron_config", "megatron_core"),
    *("modules_to_save", "peft_version", "qalora_group_size", "revision", "runtime_config"),
    *("target_modules", "task_type", "corda_config", "eva_config", "loftq_config"),
    *("lora_ga_config", "velora_config", "ephemeral_gpu_offload"),
}
"""Fields of training, or of what the tensors' names say. All modules of Qwen2 are `nn.Linear`, for
which peft sets fan_in_fan_out to false."""

_PEFT = "base_model.model."
_STANDARD = "model."
_UPDATE = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<side>[AB])(\.default)?")
_REPLACED = re.compile(
    r"(?P<module>.+?)(\.base_layer|\.modules_to_save(\.default)?)?\.(?P<kind>weight|bias)"
)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An open adapter.

    Attributes:
        format: of the names that weights have here.
        updates: what is added to which matrix.
        replaced: weights that the adapter has whole, from `modules_to_save`, `bias` or an
            embedding that was saved with it.
        made_for: which model it is for, as far as it says, for messages.
        tied: whether embedding and head are to change together.
    """

    path: Path
    format: names.Format
    updates: dict[str, LowRank]
    replaced: dict[str, Plain]
    made_for: str = "the adapter is for another model"
    tied: bool = False

    @property
    def weights(self) -> set[str]:
        return {*self.updates, *self.replaced}


def open_adapter(directory: Path, opened: OpenFiles) -> Adapter:
    """An adapter, whose weights are read in `opened`.

    Raises UserError, naming file, field and value, for what is not plain LoRA."""
    config = _Config.read(directory)
    path = directory / WEIGHTS
    files = TensorFiles((path,), {}, read_safetensors(path, opened), opened=opened)
    factors: dict[str, dict[str, Factor]] = {}
    replaced: dict[str, Plain] = {}
    for name, info in files.tensors.items():
        tensor = Plain(files, name, info.shape)
        tensor.check(path)
        plain = _canonical(name)
        if found := _UPDATE.fullmatch(plain):
            factors.setdefault(found["module"], {})[found["side"]] = Factor(tensor)
        elif found := _EMBEDDING.fullmatch(plain):
            # Its A has a column for each token: the update is the transpose of B A.
            side = {"A": "B", "B": "A"}[found["side"]]
            factors.setdefault(found["module"], {})[side] = Factor(tensor, transposed=True)
        elif "lora_" not in plain and (found := _REPLACED.fullmatch(plain)):
            replaced[f"{found['module']}.{found['kind']}"] = tensor
        else:
            raise UserError(
                f"{path}: the tensor {name!r} is no part of plain LoRA; merge the adapter into its "
                "model with peft (merge_and_unload), and give the result."
            )
    updates = {
        f"{module}.weight": _update(module, pair, config, path) for module, pair in factors.items()
    }
    if not updates and not replaced:
        raise UserError(f"{path}: it has no tensors; train the adapter, or leave it out.")
    return Adapter(directory, "safetensors", updates, replaced, config.made_for, config.tied)


def _canonical(name: str) -> str:
    """A tensor's name from the model on: peft's prefix is off, and `model.` is there."""
    bare = unwrapped(name).removeprefix(_PEFT)
    inner = bare.startswith(("layers.", "embed_tokens.", "norm."))  # trained without a head
    return f"{_STANDARD}{bare}" if inner else bare


def _update(module: str, pair: dict[str, Factor], config: "_Config", path: Path) -> LowRank:
    if missing := {"A", "B"} - pair.keys():
        raise UserError(f"{path}: {module!r} has no lora_{min(missing)}; get the file again.")
    left, right, rank = pair["B"], pair["A"], config.rank(module)
    if {len(left.shape), len(right.shape)} != {2} or (left.shape[1], right.shape[0]) != (
        rank,
        rank,
    ):
        raise UserError(
            f"{path}: the updates of {module!r} have the shapes {left.shape} and {right.shape}, "
            f"but {CONFIG} says rank {rank}; take both from the same adapter."
        )
    return LowRank(left, right, config.scale(module))


@dataclasses.dataclass(frozen=True)
class _Config:
    path: Path
    fields: dict[str, Any]

    @classmethod
    def read(cls, directory: Path) -> "_Config":
        path = directory / CONFIG
        if not is_there(path):
            if below := sorted(file.parent for file in directory.glob(f"*/{CONFIG}")):
                raise UserError(
                    f"{directory}: the directory has no {CONFIG}, but {below[0]} has; give that."
                )
            has = (
                "is a whole model, for --model"
                if (directory / "config.json").is_file()
                else "is no adapter"
            )
            raise UserError(
                f"{directory}: it has no {CONFIG}, so it {has}; give a directory that peft saved, "
                "or a LoRA GGUF file."
            )
        if not is_there(directory / WEIGHTS):
            others = [text for name, text in _OTHERS.items() if (directory / name).is_file()]
            instead = others[0] if others else "; get it from where the adapter is from"
            raise UserError(f"{directory}: it has no {WEIGHTS}{instead}.")
        config = cls(path, read_object(path))
        config.check()
        return config

    def check(self) -> None:
        if self.fields.get("peft_type") != "LORA":
            raise self.refuse("peft_type", "only LORA is supported")
        for key, meaning in _REFUSED.items():
            if self.fields.get(key):
                raise self.refuse(key, f"{meaning}, which is not plain LoRA")
        first = self.fields.get("init_lora_weights")
        if isinstance(first, str) and first.startswith(_CHANGES_BASE):
            raise self.refuse(
                "init_lora_weights",
                "the adapter is for a changed model; save it as plain LoRA with peft's "
                "path_initial_model_for_weight_conversion",
            )
        known = _USED | _NEUTRAL | _REFUSED.keys()
        for key in sorted(key for key, value in self.fields.items() if value and key not in known):
            _say_not_used(self.path, key)

    def refuse(self, key: str, why: str) -> UserError:
        given = f"is {self.fields[key]!r:.80}" if key in self.fields else "is missing"
        return UserError(
            f"{self.path}: {key} {given}, and {why}; merge the adapter into its model with peft "
            "(merge_and_unload), and give the result."
        )

    @property
    def made_for(self) -> str:
        base = self.fields.get("base_model_name_or_path")
        return f"the adapter is for {base}" if base else "the adapter is for another model"

    @property
    def tied(self) -> bool:
        return bool(self.fields.get("ensure_weight_tying"))

    def rank(self, module: str) -> int:
        rank = self._of(module, "r", "rank_pattern")
        if type(rank) is not int or rank < 1:
            raise UserError(f"{self.path}: r is {rank!r} for {module!r}, not a positive number.")
        return rank

    def scale(self, module: str) -> float:
        alpha = self._of(module, "lora_alpha", "alpha_pattern")
        if type(alpha) not in (int, float) or not -1e30 < alpha < 1e30:
            raise UserError(f"{self.path}: lora_alpha is {alpha!r} for {module!r}, not a number.")
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self.fields.get("use_rslora") else rank)

    def _of(self, module: str, key: str, pattern_key: str) -> Any:
        """A module's own value by the first pattern that fits its name's end, else the general."""
        patterns = self.fields.get(pattern_key) or {}
        if not isinstance(patterns, dict):
            raise self.refuse(pattern_key, "it must be a mapping")
        for pattern, value in patterns.items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
            except re.error as error:
                raise self.refuse(pattern_key, f"{pattern!r} is no pattern ({error})") from None
        return self.fields.get(key)


@functools.cache
def _say_not_used(path: Path, key: str) -> None:
    """Once an adapter, however often it is opened."""
    logging.warning("%s: %s is not known here and was not used", path, key)
