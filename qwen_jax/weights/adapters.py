"""LoRA adapters onto an open checkpoint: which weights they change, checked before any is read."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import logging

from qwen_jax.errors import UserError
from qwen_jax.weights import gguf_lora, names, peft_lora
from qwen_jax.weights.checkpoint import Checkpoint
from qwen_jax.weights.low_rank import LowRank, Merged
from qwen_jax.weights.open_files import OpenFiles
from qwen_jax.weights.peft_lora import Adapter
from qwen_jax.weights.stored import Plain, Stored


def open_adapter(path: Path, opened: OpenFiles) -> Adapter:
    """A PEFT LoRA directory, or a LoRA GGUF file, whose weights are read in `opened`.

    Raises UserError for what is no adapter, or one that is more than plain LoRA.
    """
    if path.is_dir():
        return peft_lora.open_adapter(path, opened)
    if path.suffix in (".safetensors", ".json", ".bin"):
        raise UserError(f"{path}: give the adapter's directory {path.parent}, not a file in it.")
    return gguf_lora.open_adapter(path, opened)


def with_adapters(checkpoint: Checkpoint, paths: Sequence[Path]) -> Checkpoint:
    """The checkpoint with the adapters' changes, which add up in their order.

    Raises UserError where an adapter is no plain LoRA, or for another model.
    """
    for path in paths:
        checkpoint = _with(checkpoint, open_adapter(path, checkpoint.files.opened))
    return checkpoint


def _with(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    ends = {getattr(entry.sources[0], adapter.format) for entry in (names.EMBED, names.LM_HEAD)}
    if checkpoint.config.tied and ends & adapter.weights:
        checkpoint = _untied(checkpoint, adapter)
    own = {
        theirs: (ours, shape)
        for parameter, canonical in zip(
            checkpoint.parameters,
            names.parameters(checkpoint.config, adapter.format),
            strict=True,
        )
        for (ours, shape), theirs in zip(parameter.sources.items(), canonical.sources, strict=True)
    }
    stored = dict(checkpoint.stored)
    changes: list[tuple[str, Plain | LowRank]] = [
        *adapter.replaced.items(),
        *adapter.updates.items(),
    ]
    for weight, change in changes:
        if weight not in own:
            raise UserError(
                f"{adapter.path}: it changes {weight!r}, which {checkpoint.path} with its "
                f"{checkpoint.config.num_layers} layers does not have; {adapter.made_for}."
            )
        name, shape = own[weight]
        if change.shape != shape:
            resized = weight in ends and change.shape[1:] == shape[1:]
            why = (
                "the vocabulary was resized for it, so merge it with peft and give the result"
                if resized
                else adapter.made_for
            )
            raise UserError(
                f"{adapter.path}: its change of {weight!r} has the shape {change.shape}, but the "
                f"weight of {checkpoint.path} has {shape}; {why}."
            )
    for weight, tensor in adapter.replaced.items():
        name, _ = own[weight]
        stored[name] = _replaced(checkpoint, stored[name], tensor, adapter)
    for weight, update in adapter.updates.items():
        name, _ = own[weight]
        base, updates = _parts(stored[name])
        stored[name] = Merged(base, (*updates, update))
    adapters = (*checkpoint.adapters, adapter.path)
    return dataclasses.replace(checkpoint, stored=stored, adapters=adapters)


def _parts(weight: Stored) -> tuple[Stored, tuple[LowRank, ...]]:
    """What stands in the files, and what adapters add to it so far."""
    return (weight.base, weight.updates) if isinstance(weight, Merged) else (weight, ())


def _replaced(
    checkpoint: Checkpoint, weight: Stored, tensor: Plain, adapter: Adapter
) -> Plain | Merged:
    """The adapter's own copy of a weight under what other adapters add."""
    base, updates = _parts(weight)
    if (
        isinstance(base, Plain)
        and base.files is not checkpoint.files  # another adapter's
        and not np.array_equal(base.files.raw(base.name), tensor.files.raw(tensor.name))
    ):
        raise UserError(
            f"{adapter.path}: it replaces {tensor.name!r}, as {base.infos[0].path} does with "
            "other values; give only one of the two adapters."
        )
    return Merged(tensor, updates) if updates else tensor


def _untied(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    """The head as a weight of its own, as it was when the adapter was trained.

    peft's own merge changes a tied embedding and head both, and so another model than the one
    that it runs before the merge.
    """
    if adapter.tied:
        raise UserError(
            f"{adapter.path}: ensure_weight_tying is true, but a change that embedding and head "
            "share is not supported; train without it, or merge the adapter with peft."
        )
    logging.info("%s: the head is no longer tied to the embedding", adapter.path)
    config = dataclasses.replace(checkpoint.config, tied=False)
    head = names.parameters(config, checkpoint.format)[-1]
    (embed,) = checkpoint.parameters[0].sources
    (name,) = head.sources
    return dataclasses.replace(
        checkpoint,
        config=config,
        parameters=(*checkpoint.parameters, head),
        stored={**checkpoint.stored, name: checkpoint.stored[embed]},
    )
