"""Which prompts a config asks for, read one at a time."""

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from qwen_jax.api import Message, Options
from qwen_jax.errors import UserError
from qwen_jax.sampling import Sampling

HAIKU = "Write a haiku that contains the word lantern."
"""What the bundled model is asked where nobody asks anything."""

FIELDS = ("prompt", "messages", "id", "system", "raw", "max_tokens", "seed")


@dataclasses.dataclass(frozen=True)
class Item:
    """One prompt of a file: what to answer, how, and the caller's name for it."""

    prompt: str | list[Message]
    options: Options
    id: Any
    has_seed: bool = False


def sampling_of(config: ConfigDict) -> Sampling:
    """The config's sampling settings, checked. Raises UserError where one makes no sense."""
    fields = dict(config.sampling)
    return Sampling(**fields | {"logit_bias": _logit_bias(fields["logit_bias"])})


def options_of(config: ConfigDict) -> Options:
    """The config's answer settings, checked."""
    for name in ("max_tokens", "n", "batch_size"):
        if config[name] < 1:
            raise UserError(f"{name} is {config[name]}, but it must be at least 1.")
    if config.top_logprobs is not None and config.top_logprobs < 0:
        raise UserError(f"top_logprobs is {config.top_logprobs}, but it must be 0 or more.")
    return Options(
        max_tokens=config.max_tokens,
        sampling=sampling_of(config),
        stop=tuple(config.stop),
        system=config.system,
        raw=config.raw,
    )


def single_prompt(config: ConfigDict) -> str:
    """The prompt of a config without a prompt file; `-` reads standard input."""
    if config.prompt is None:
        if config.model != "haiku":
            raise UserError(
                "There is no prompt; give --prompt='...', --prompt=- for stdin, or --prompt_file."
            )
        return HAIKU
    if config.prompt == "-":
        return _decode(sys.stdin.buffer.read(), "stdin")
    return config.prompt


def read_items(path: Path, options: Options) -> Iterator[Item]:
    """The prompts of a file, in order, each checked as it is read.

    A `.jsonl` file holds one object a line with `prompt` or `messages`, and optionally `id`,
    `system`, `raw`, `max_tokens` and `seed`; any other file holds one prompt a line. Empty
    lines are skipped.

    Raises:
        UserError: the file can't be read, or a line is not what it should be.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                text = _decode(line, f"{path}, line {number}").strip("\r\n")
                if not text.strip():
                    continue
                if path.suffix == ".jsonl":
                    yield _item(text, options, f"{path}, line {number}", number)
                else:
                    yield Item(text, options, number)
    except OSError as error:
        raise UserError(f"--prompt_file={path} can't be read: {error.strerror}.") from error


def _item(line: str, options: Options, where: str, number: int) -> Item:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error.msg} at column {error.colno}.") from error
    if not isinstance(record, Mapping) or ("prompt" in record) == ("messages" in record):
        raise UserError(f"{where} must be an object with either 'prompt' or 'messages'.")
    for name in record:
        if name not in FIELDS:
            raise UserError(f"{where} has the field {name!r}; the fields are {', '.join(FIELDS)}.")
    expected = {"prompt": str, "messages": list, "system": str, "raw": bool}
    for name, kind in (expected | {"max_tokens": int, "seed": int}).items():
        value = record.get(name)
        if name in record and (not isinstance(value, kind) or (kind is int and value is True)):
            raise UserError(f"{where}: {name} is {value!r:.60}, but it must be a {kind.__name__}.")
    if record.get("max_tokens", 1) < 1:
        raise UserError(f"{where}: max_tokens is {record['max_tokens']}, but it must be positive.")
    own = options.copy()
    own["system"] = record.get("system", options["system"])
    own["raw"] = record.get("raw", options["raw"])
    own["max_tokens"] = record.get("max_tokens", options["max_tokens"])
    if "seed" in record:
        own["sampling"] = dataclasses.replace(options["sampling"], seed=record["seed"])
    prompt = record["prompt"] if "prompt" in record else record["messages"]
    return Item(prompt, own, record.get("id", number), "seed" in record)


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 at byte {error.start}; convert it.") from error


def _logit_bias(pairs: str) -> dict[int, float]:
    """ "42:-1.5,7:3" as a mapping."""
    bias = {}
    for pair in filter(None, pairs.split(",")):
        token, _, value = pair.partition(":")
        try:
            bias[int(token)] = float(value)
        except ValueError:
            raise UserError(
                f"sampling.logit_bias holds {pair!r}, but it must be like 42:-1.5,7:3."
            ) from None
    return bias
