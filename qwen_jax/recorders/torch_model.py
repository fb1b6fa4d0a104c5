"""What record_torch asks of a model before it puts hooks in; a part of its script."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Sequence
from typing import Any

import torch

from qwen_jax.recorders.dump import RecorderError

QUANTISED = ("gptq", "awq", "fp8")
"""Kinds of checkpoints whose files hold what the engine multiplies with."""


def find(model: torch.nn.Module, needed: Sequence[str]) -> tuple[Any, Any]:
    """The decoder in a model, and the module around it that has the head; the decoder, where there
    is none.

    Args:
        needed: paths of modules that every layer must have.

    Raises:
        RecorderError: the model is of another kind, or not whole.
    """
    if not isinstance(model, torch.nn.Module):
        raise RecorderError(f"The model is a {type(model).__name__}, but must be a torch module.")
    if any(hasattr(m, "_orig_mod") or m._compiled_call_impl for m in model.modules()):
        raise RecorderError("The model is compiled, and hooks change that; record it uncompiled.")
    parts = ("embed_tokens", "layers", "norm")
    decoder: Any = next((m for m in model.modules() if all(hasattr(m, p) for p in parts)), None)
    if decoder is None:
        raise RecorderError(
            f"{type(model).__name__} has no module with {', '.join(parts)}; give it whole, as "
            "AutoModelForCausalLM makes it, or write your engine's names into this file."
        )
    for i, layer in enumerate(decoder.layers):
        for path in needed:
            if inside(layer, path) is None:
                raise RecorderError(
                    f"Layer {i}, a {type(layer).__name__}, has no {path}; run all layers in one "
                    "process, or write your engine's names into MODULES and NORMS."
                )
        here, all_of_them = (inside(layer, f"self_attn.{n}num_heads") for n in ("", "total_"))
        if None not in (here, all_of_them) and here != all_of_them:
            raise RecorderError(
                f"This process has {here} of {all_of_them} heads; run without tensor parallelism."
            )
        cache = str(inside(layer, "self_attn.attn.kv_cache_dtype") or "")
        if cache.startswith(("fp8", "int8")):
            raise RecorderError(f"The cache is kept in {cache}; record with --kv-cache-dtype=auto.")
    owners = [m for m in model.modules() if hasattr(m, "lm_head") and decoder in list(m.modules())]
    return decoder, owners[-1] if owners else decoder


def inside(module: Any, path: str) -> Any:
    """What a path of attributes leads to, or None."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def weights_dtype(decoder: Any, owner: Any, paths: Sequence[str]) -> torch.dtype:
    """Of a layer's matrices, which are at these paths.

    Raises:
        RecorderError: they are in no file as the engine has them.
    """
    config = getattr(getattr(owner, "config", None), "quantization_config", None) or {}
    kind = config.get("quant_method") if isinstance(config, dict) else config.quant_method
    dtypes: list[torch.dtype] = []
    for i, layer in enumerate(decoder.layers):
        for path in paths:
            module, weight = inside(layer, path), inside(layer, f"{path}.weight")
            plain = isinstance(weight, torch.Tensor) and weight.is_floating_point()
            if plain and weight.element_size() > 1:
                dtypes.append(weight.dtype)
            elif module is not None and str(getattr(kind, "value", kind)) not in QUANTISED:
                raise RecorderError(
                    f"layers.{i}.{path} is a quantised {type(module).__name__}, whose weights are "
                    "in no file that run.py reads; load the model unquantised."
                )
    return (dtypes or [decoder.embed_tokens.weight.dtype])[0]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def library(decoder: torch.nn.Module) -> str:
    """Whose module it is, with the version where it is an installed library's."""
    name = type(decoder).__module__.split(".")[0]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return f"{name} {importlib.metadata.version(name)}"
    return name
