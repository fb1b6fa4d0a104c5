"""Which prompts a config asks for, and how they are to be answered."""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from qwen_jax import api, settings, utf8
from qwen_jax.api import BUNDLED, Message, Options
from qwen_jax.errors import UserError
from qwen_jax.generation import Completion, Request
from qwen_jax.sampling import Sampling
from qwen_jax.text.streaming import StopStrings

HAIKU = "Write a haiku that contains the word lantern."
"""What the bundled model is asked where nobody asks anything."""

FIELDS: dict[str, tuple[type, ...]] = {
    "prompt": (str,),
    "messages": (list,),
    "id": (str, int),
    "system": (str,),
    "raw": (bool,),
    "max_tokens": (int,),
    "seed": (int,),
}
"""Fields of a line of JSON, and their types."""


@dataclasses.dataclass(frozen=True)
class Item:
    """One prompt: what to answer, how, where it stood and the caller's name for it.

    `fields` is the line of JSON that a template made the prompt from.
    """

    prompt: str | list[Message]
    options: Options
    where: str
    id: str | int = 1
    has_seed: bool = False
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.prompt == "":
            raise UserError(f"{self.where}: the prompt is empty; ask something.")


def sampling_of(config: ConfigDict) -> Sampling:
    """The config's sampling settings, checked. Raises UserError where one makes no sense."""
    fields = dict(config.sampling)
    return Sampling(**fields | {"logit_bias": _logit_bias(fields["logit_bias"])})


def options_of(config: ConfigDict) -> Options:
    """The config's answer settings, checked."""
    for name in ("max_tokens", "n", "batch_size"):
        if config[name] < 1:
            raise UserError(f"{name} is {config[name]}, but it must be at least 1.")
    StopStrings(config.stop)  # Refuses an empty one.
    return Options(
        max_tokens=config.max_tokens,
        sampling=sampling_of(config),
        stop=tuple(config.stop),
        system=config.system,
        raw=config.raw,
    )


def single(config: ConfigDict, options: Options) -> Item:
    """The prompt of a config without a prompt file; `-` reads standard input.

    One line break at the end of standard input, as `echo` leaves it, is not part of the prompt.
    """
    if config.prompt is None:
        if config.model != BUNDLED:
            raise UserError(
                "There is no prompt; give --prompt='...', --prompt=- for stdin, or --prompt_file."
            )
        return Item(HAIKU, options, "--prompt")
    if config.prompt == "-":
        text = utf8.decoded(sys.stdin.buffer.read(), "stdin")
        return Item(utf8.without_line_break(text), options, "stdin")
    return Item(config.prompt, options, "--prompt")


def read(config: ConfigDict, options: Options) -> list[Item]:
    """All of `stream`. Raises UserError where the file holds no prompts, too."""
    items = list(stream(config, options))
    if not items:
        raise UserError(f"--prompt_file={config.prompt_file} holds no prompts.")
    return items


def stream(config: ConfigDict, options: Options) -> Iterator[Item]:
    """The prompts of a file, in order, each checked when its turn comes.

    A `.jsonl` file holds one object a line with `prompt` or `messages`, and optionally `id`,
    `system`, `raw`, `max_tokens` and `seed`; any other file holds one prompt a line. Lines end
    with LF or CR LF, and with nothing else; empty ones are skipped. Where an experiment has a
    template, the prompt is made from it and the line's fields, which may then have any other
    names.

    Raises:
        UserError: the file can't be read, or a line is not what it should be.
    """
    if config.prompt is not None:
        raise UserError("--prompt and --prompt_file exclude each other; give one of them.")
    path = Path(config.prompt_file)
    is_json = path.suffix.lower() == ".jsonl"
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                where = f"{path}, line {number}"
                text = utf8.decoded(line, where, from_start=number == 1)
                text = utf8.without_line_break(text)
                if not text.strip():
                    continue
                if is_json:
                    record = _parse(text, where)
                    yield _item(record, config.experiment.template, options, where, number)
                else:
                    yield Item(text, options, where, number)
    except OSError as error:
        raise UserError(f"--prompt_file={path} can't be read: {error.strerror}.") from error


def rows(
    items: Iterable[Item], n: int, request_of: Callable[[Item], Request]
) -> Iterator[tuple[Item, int, Request]]:
    """Every sample of every prompt. Row i uses the config's seed + i, unless its prompt names
    a seed of its own: then sample j uses that seed + j."""
    for index, item in enumerate(items):
        try:
            request = request_of(item)
        except UserError as error:
            raise UserError(f"{item.where}: {error}") from error
        seed = 0 if item.has_seed else index * n
        for sample, seeded in enumerate(api.reseeded([request] * n, seed)):
            yield item, sample, seeded


def answer(completion: Completion) -> dict[str, Any]:
    """A completion as the fields of a line of JSON."""
    record: dict[str, Any] = {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "tokens": completion.tokens,
    }
    if completion.logprobs is not None:
        record["logprobs"] = [
            {"token": e.token, "logprob": e.logprob, "top": e.top} for e in completion.logprobs
        ]
    return record


def _filled(template: str, record: dict[str, Any], where: str) -> dict[str, Any]:
    """The record with a prompt made from the template, and without the fields it took."""
    if "messages" in record:
        raise UserError(f"{where} has 'messages', which a template can't fill; drop one of them.")
    try:
        prompt = template.format_map(record)
    except KeyError as error:
        raise UserError(f"{where} has no {error}, which the template asks for.") from error
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise UserError(f"{where}: the template {template!r} can't be filled: {error}.") from error
    return {name: value for name, value in record.items() if name in FIELDS} | {"prompt": prompt}


def _item(
    fields: dict[str, Any], template: str | None, options: Options, where: str, number: int
) -> Item:
    record = fields if template is None else _filled(template, fields, where)
    if ("prompt" in record) == ("messages" in record):
        raise UserError(f"{where} must have either 'prompt' or 'messages'.")
    for name, value in record.items():
        kinds = FIELDS.get(name)
        if kinds is None:
            known = ", ".join(FIELDS)
            raise UserError(f"{where} has the field {name!r}; the fields are {known}.")
        if type(value) not in kinds:
            words = " or ".join(settings.KINDS[kind] for kind in kinds)
            raise UserError(f"{where}: {name} is {value!r:.60}, but it must be {words}.")
    if record.get("max_tokens", 1) < 1:
        raise UserError(f"{where}: max_tokens is {record['max_tokens']}, but it must be positive.")
    own = options.copy()
    own["system"] = record.get("system", options["system"])
    own["raw"] = record.get("raw", options["raw"])
    own["max_tokens"] = record.get("max_tokens", options["max_tokens"])
    if "seed" in record:
        try:
            own["sampling"] = dataclasses.replace(options["sampling"], seed=record["seed"])
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    asked = record["prompt"] if "prompt" in record else record["messages"]
    return Item(asked, own, where, record.get("id", number), "seed" in record, fields)


def _parse(line: str, where: str) -> dict[str, Any]:
    """A line's JSON object, without the fields that are null."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a field appears twice")
        return dict(pairs)

    try:
        record = json.loads(line, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error.msg} at column {error.colno}.") from error
    except (ValueError, RecursionError) as error:
        # ValueError also for a number of more digits than Python reads.
        raise UserError(f"{where} is not JSON that can be read: {error}.") from error
    if not isinstance(record, dict):
        raise UserError(f"{where} is {record!r:.60}, but it must be an object.")
    return {name: value for name, value in record.items() if value is not None}


def _logit_bias(pairs: str) -> dict[int, float]:
    """ "42:-1.5,7:3" as a mapping."""
    bias: dict[int, float] = {}
    for pair in filter(None, pairs.split(",")):
        token, _, value = pair.partition(":")
        try:
            number, change = int(token), float(value)
        except ValueError:
            raise UserError(
                f"sampling.logit_bias holds {pair!r}, but it must be like 42:-1.5,7:3."
            ) from None
        if number in bias:
            raise UserError(f"sampling.logit_bias names token {number} twice; keep one of them.")
        bias[number] = change
    return bias
