"""The default config of `run.py`, and what it means: ml_collections in, our types out.

Light on purpose: `--help` and a refused flag must not wait for JAX.
"""

import difflib
import runpy
import traceback
from collections.abc import Iterator
from pathlib import Path
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
    "stop": ("stop", "Text that ends the answer and is cut off; may be given several times."),
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


KINDS = {
    bool: "true or false",
    float: "a number",
    int: "a whole number",
    list: "a list",
    str: "text",
    tuple: "a tuple of texts",
}
"""Types of what users give, in words."""


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


def load(where: str) -> ConfigDict:
    """The config that the program `file.py`, or `file.py:variant`, makes in `get_config`.

    Raises:
        UserError: the program can't be read or fails, or what it returns is no config.
    """
    path, _, variant = where.partition(":")
    try:
        Path(path).open("rb").close()
    except OSError as error:
        raise UserError(f"--config={path} can't be read: {error.strerror}.") from error
    try:
        get = runpy.run_path(path).get("get_config")
        if not callable(get):
            raise UserError(f"{path} defines no get_config(); see configs/haiku.py for one.")
        config = get(variant) if variant else get()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        # It is the user's program and may fail in any way.
        raise UserError(_where_it_failed(error, path)) from error
    return _checked(config, path)


def _where_it_failed(error: BaseException, path: str) -> str:
    lines = [at.lineno for at in traceback.extract_tb(error.__traceback__) if at.filename == path]
    text = str(error)
    if isinstance(error, SyntaxError):
        lines, text = [error.lineno], error.msg
    at = f", line {lines[-1]}" if lines and lines[-1] else ""
    return f"{path}{at}: {type(error).__name__}: {' '.join(text.split())}"


def _checked(config: Any, path: str) -> ConfigDict:
    """The default config with the fields of `config`, each of which must be known and fit."""
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"{path}: get_config() must return a ConfigDict, but returned {type(config).__name__}."
        )
    result = get_config()
    defaults = dict(flatten(result))
    for name, value in flatten(config):
        if name not in defaults:
            raise UserError(f"{path}: the config sets {name}, which is no field; {near(name)}")
        kind = type_of(name)
        fits = type(value) is kind or (kind is float and type(value) is int)
        if not (fits or value is None is defaults[name]):
            raise UserError(f"{path}: {name} is {value!r:.80}, but it must be {KINDS[kind]}.")
        result.update_from_flattened_dict({name: value})
    return result


def near(name: str) -> str:
    """What a misspelt field may have meant."""
    found = difflib.get_close_matches(name, [field for field, _ in flatten(get_config())], n=1)
    return f"did you mean {found[0]}?" if found else "see run.py --help for the fields."
