"""The default config of `run.py`, and what it means: ml_collections in, our types out.

Light on purpose: `--help` and a refused flag must not wait for JAX.
"""

import difflib
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from qwen_jax.errors import UserError


def get_config() -> ConfigDict:
    """Every setting with its default: the bundled model writes a haiku, greedily."""
    return ConfigDict(
        {
            # A GGUF file, a Hugging Face directory, hf:owner/repo[:quant], or the bundled model.
            "model": "haiku",
            "sha256": placeholder(str),
            "dtype": "auto",
            "implementation": "auto",
            "matmul_precision": "highest",
            # One prompt, or a file of them: one a line, or .jsonl with one object a line.
            "prompt": placeholder(str),
            "prompt_file": placeholder(str),
            "system": placeholder(str),
            "raw": False,
            "max_tokens": 256,
            "stop": (),
            "n": 1,
            "batch_size": 8,
            # JSON lines: of a prompt file's answers, instead of stdout.
            "output": placeholder(str),
            # Log-probabilities of the chosen token and of this many of the likeliest.
            "top_logprobs": placeholder(int),
            "sampling": {
                "temperature": 0.0,
                "top_k": 0,
                "top_p": 1.0,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                # Pairs of token id and number, as in "42:-1.5,7:3".
                "logit_bias": "",
                "seed": 0,
            },
        }
    )


FLAGS: dict[str, tuple[str, str]] = {
    "model": ("model", "GGUF file, Hugging Face directory, hf:owner/repo[:quant], or 'haiku'."),
    "sha256": ("sha256", "What the GGUF file's SHA-256 must be."),
    "dtype": ("dtype", "auto, float32, bfloat16 or float16."),
    "implementation": ("implementation", "auto, mosaic_gpu or xla, for every operation."),
    "prompt": ("prompt", "The user's message; - reads it from stdin."),
    "prompt_file": ("prompt_file", "Prompts, one a line; .jsonl for one object a line."),
    "system": ("system", "The system prompt; without it the chat template decides."),
    "raw": ("raw", "Continue the prompt, without a chat around it."),
    "max_tokens": ("max_tokens", "The most tokens to generate."),
    "n": ("n", "Samples of each prompt."),
    "batch_size": ("batch_size", "Prompts of a file that run together."),
    "output": ("output", "Where the answers to a prompt file go, as JSON lines."),
    "top_logprobs": ("top_logprobs", "Report log-probabilities, and this many of the likeliest."),
    "temperature": ("sampling.temperature", "0 is greedy."),
    "top_k": ("sampling.top_k", "Keep the k likeliest tokens; 0 keeps all."),
    "top_p": ("sampling.top_p", "Keep the likeliest tokens up to this probability; 1 keeps all."),
    "min_p": ("sampling.min_p", "Drop tokens less likely than this share of the likeliest."),
    "seed": ("sampling.seed", "Decides what is drawn; the same seed gives the same text."),
}
"""Flags that stand for a config field: name to (field, help). They win over --config."""


def type_of(field: str) -> type:
    """The type of a config field, placeholders included."""
    *parents, name = field.split(".")
    config = get_config()
    for parent in parents:
        config = config[parent]
    return config.get_type(name)


def flatten(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field with its dotted name."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def check(config: Any) -> None:
    """Raises UserError unless `config` has exactly the fields of the default config."""
    if not isinstance(config, ConfigDict):
        # Where the file could not be loaded, this is an object whose use raises the reason.
        kind = getattr(config, "__name__", type(config).__name__)
        raise UserError(f"--config: get_config() must return a ConfigDict, but returned {kind}.")
    known = dict(flatten(get_config()))
    given = dict(flatten(config))
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "see run.py --help for the fields."
            raise UserError(f"--config: the config sets {name}, which is not a field; {hint}")
    for name in known:
        if name not in given:
            raise UserError(f"--config: the config lacks {name}; start from settings.get_config().")
