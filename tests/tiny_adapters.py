"""Tiny LoRA adapters as PEFT directories and as GGUF files, drawn or made from given matrices."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file

from tests.tiny_checkpoints import gguf_name

Pairs = dict[str, tuple[np.ndarray, np.ndarray]]
"""By the Hugging Face name of a weight: B [out, rank] and A [rank, in]."""

TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")


def random_pairs(
    params: Mapping[str, np.ndarray],
    rank: int = 4,
    targets: tuple[str, ...] = TARGETS,
    seed: int = 0,
) -> Pairs:
    rng = np.random.default_rng(seed)
    return {
        name: (
            rng.normal(0, 0.3, (value.shape[0], rank)).astype(np.float32),
            rng.normal(0, 0.3, (rank, value.shape[1])).astype(np.float32),
        )
        for name, value in params.items()
        if value.ndim == 2 and any(target in name for target in targets)
    }


def write_peft(
    directory: Path,
    pairs: Pairs,
    *,
    dtype: Any = np.float32,
    more: Mapping[str, np.ndarray] | None = None,
    **config: Any,
) -> Path:
    """A directory as peft saves it; `more` are further tensors, `config` fields that differ."""
    tensors = dict(more or {})
    for name, (left, right) in pairs.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if "embed_tokens" in name:
            tensors[f"{module}.lora_embedding_A"] = left.T.astype(dtype)
            tensors[f"{module}.lora_embedding_B"] = right.T.astype(dtype)
        else:
            tensors[f"{module}.lora_A.weight"] = right.astype(dtype)
            tensors[f"{module}.lora_B.weight"] = left.astype(dtype)
    directory.mkdir(parents=True, exist_ok=True)
    contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(contiguous, directory / "adapter_model.safetensors")
    rank = next((right.shape[0] for _, right in pairs.values()), 1)
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "use_rslora": False} | config
    (directory / "adapter_config.json").write_text(json.dumps(fields), encoding="utf-8")
    return directory


def write_gguf_lora(
    path: Path, pairs: Pairs, *, alpha: float | None = 8.0, **metadata: str | None
) -> Path:
    """A file as llama.cpp's converter writes it; `metadata` by key, "__" standing for "."."""
    keys: dict[str, str | None] = {"general__type": "adapter", "adapter__type": "lora"}
    writer = gguf.GGUFWriter(path, (metadata.pop("architecture", None) or "qwen2"))
    for key, value in (keys | metadata).items():
        if value is not None:
            writer.add_string(key.replace("__", "."), value)
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for name, (left, right) in pairs.items():
        own = gguf_name(name)
        embed = own == "token_embd.weight"
        writer.add_tensor(f"{own}.lora_a", left if embed else right)
        writer.add_tensor(f"{own}.lora_b", np.ascontiguousarray(right.T) if embed else left)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
