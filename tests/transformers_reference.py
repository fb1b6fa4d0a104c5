"""Hugging Face transformers as the reference: float32, eager attention. Needs torch."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from qwen_jax.config import ModelConfig
from tests.tiny_checkpoints import hf_config

# Tiny matrices gain nothing from threads, and lose much where pytest-xdist runs several.
torch.set_num_threads(1)


def model(config: ModelConfig, params: Mapping[str, np.ndarray]) -> Any:
    """The reference model with these parameters, checked to take every one of them."""
    kwargs = {k: v for k, v in hf_config(config).items() if k != "architectures"}
    reference = AutoModelForCausalLM.from_config(Qwen2Config(**kwargs), attn_implementation="eager")
    state = {name: torch.from_numpy(value) for name, value in params.items()}
    missing, unexpected = reference.load_state_dict(state, strict=False)
    if unexpected or set(missing) - ({"lm_head.weight"} if config.tied else set()):
        raise ValueError(f"{missing=} {unexpected=}")
    reference.tie_weights()
    return reference.float().eval()


def logits(reference: Any, tokens: list[int]) -> np.ndarray:
    """Logits after every position, float32 `[T, V]`."""
    with torch.no_grad():
        out: np.ndarray = reference(torch.tensor([tokens])).logits[0].float().numpy()
    return out


def greedy(reference: Any, tokens: list[int], steps: int) -> tuple[list[int], np.ndarray]:
    """A greedy continuation, and how far each choice was ahead of its runner-up.

    Every step runs the whole text again: the plainest decoding there is.
    """
    text, margins = list(tokens), np.empty(steps)
    for i in range(steps):
        last = logits(reference, text)[-1]
        second, first = np.sort(last)[-2:]
        margins[i] = first - second
        text.append(int(last.argmax()))
    return text[len(tokens) :], margins
