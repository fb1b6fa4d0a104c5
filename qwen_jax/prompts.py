"""Which prompts a config asks for, and how they are to be answered."""

import dataclasses
import itertools
import os
import stat
import sys
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from qwen_jax import (
    choices,
    in_force,
    prompt_lines,
    prompt_records,
    recommended,
    regular_files,
    strict_json,
    utf8,
)
from qwen_jax.completions import Completion
from qwen_jax.engine.sampling import Sampling
from qwen_jax.errors import UserError
from qwen_jax.in_force import DRAWS
from qwen_jax.opening import BUNDLED
from qwen_jax.options import Options
from qwen_jax.prompt_lines import Item, Wrong
from qwen_jax.requests import Request, reseeded
from qwen_jax.text.constraint import Constraint, check_installed, constraint_of
from qwen_jax.text.messages import plain_tools
from qwen_jax.text.streaming import stops_of

HAIKU = "Write a haiku that contains the word lantern."
"""What the bundled model is asked where nobody asks anything."""


def sampling_of(config: ConfigDict) -> Sampling:
    """The config's sampling settings, checked. Raises UserError where one makes no sense."""
    fields = dict(config.sampling)
    return Sampling(**fields | {"logit_bias": _logit_bias(fields["logit_bias"])})


def options_of(config: ConfigDict) -> Options:
    """The config's answer settings, checked."""
    choices.check_max_tokens(config.max_tokens)
    choices.check_top_logprobs(config.top_logprobs)
    choices.check_samples(config.n)
    choices.check_slots(config.slots)
    recommended.check_choice(config.generation_config)
    return Options(
        max_tokens=config.max_tokens,
        sampling=sampling_of(config),
        stop=stops_of(config.stop),
        stop_ids=_stop_ids(config.stop_ids),
        top_logprobs=config.top_logprobs,
        system=config.system,
        raw=config.raw,
        suffix=config.suffix,
        tools=_tools(config.tools),
        continue_final_message=config.continue_final_message,
        constraint=_constraint(config.constrain),
    )


def single(config: ConfigDict, options: Options, *, piped: bool = False) -> Item:
    """The prompt of a config without a prompt file; `-` reads standard input.

    One line break at the end of standard input, as `echo` leaves it, is not part of the prompt.

    Args:
        piped: whether what is piped in is the prompt where the config has none.
    """
    prompt = config.prompt
    if prompt == "-" or (prompt is None and piped and _is_piped()):
        text = utf8.without_line_break(utf8.decoded(sys.stdin.buffer.read(), "stdin"))
        if not text and prompt is None:
            raise UserError(
                "What is piped in is the prompt, but it is empty; pipe in a text, or give --prompt."
            )
        return Item(text, options, "stdin")
    if prompt is not None:
        return Item(prompt, options, "--prompt")
    if config.model != BUNDLED:
        raise UserError(
            "There is no prompt; give --prompt='...', --prompt=- for stdin, or --prompt_file."
        )
    return Item(HAIKU, options, "--prompt")


def _is_piped() -> bool:
    """Whether standard input is a pipe or a file, and no terminal or device."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):  # closed, or none of the system's
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def read(config: ConfigDict, options: Options) -> list[Item | Wrong]:
    """All of a file's prompts, and what is wrong with other lines unless that is to end the run.

    Raises UserError where the file holds no prompts, too.
    """
    lines = list(_lines(config, options))
    if not lines:
        raise UserError(f"--prompt_file={config.prompt_file} holds no prompts.")
    wrong = [line.error for line in lines if isinstance(line, Wrong)]
    if wrong and (config.strict or len(wrong) == len(lines)):
        raise UserError(wrong[0])
    return lines


def stream(config: ConfigDict, options: Options) -> Iterator[Item]:
    """The prompts of a file, in order, each checked when its turn comes.

    `prompt_records` says how a file holds prompts. Where an experiment has a template, the prompt
    is made from it and the fields of the line, which may then have any names.

    Raises:
        UserError: the file can't be read, or a line is not what it should be.
    """
    for line in _lines(config, options):
        if isinstance(line, Wrong):
            raise UserError(line.error)
        yield line


def _lines(config: ConfigDict, options: Options) -> Iterator[Item | Wrong]:
    if config.prompt is not None:
        raise UserError("--prompt and --prompt_file exclude each other; give one of them.")
    template = config.experiment.template
    for number, where, given in prompt_records.read(config.prompt_file):
        fields: Mapping[str, Any] = {}
        try:
            if isinstance(given, prompt_records.Damaged):
                fields = given.fields
                raise given.error
            if isinstance(given, str):
                if template is not None:
                    raise UserError(
                        f"{where} is a text without fields, of which experiment.template could "
                        "make a prompt; give JSON lines (.jsonl), or leave the template out."
                    )
                yield Item(given, options, where, number)
                continue
            fields = given
            yield prompt_lines.parse(
                fields, template=template, options=options, where=where, number=number
            )
        except UserError as error:
            yield prompt_lines.wrong(error, fields, number)


def rows(
    items: Iterable[Item | Wrong],
    n: int,
    request_of: Callable[[Item], Request],
    refuse: Callable[[Wrong], None] | None = None,
) -> Iterator[tuple[Item, int, Request]]:
    """Every sample of every prompt. Sample j of n uses the config's seed + (i - 1) n + j for the
    prompt with the id i, which is its line's number where it has none, or a hash of it in place of
    (i - 1) n; of a prompt that names a seed of its own, that seed + j.

    Args:
        n: samples of a prompt that asks for no number of its own.
        refuse: told of what can't be asked, which ends it all where nobody is to be told.
    """
    for item in items:
        try:
            if isinstance(item, Wrong):
                raise UserError(item.error)
            request = request_of(item)
        except UserError as error:
            wrong = (
                item
                if isinstance(item, Wrong)
                else Wrong(item.id, f"{item.where}: {error}", item.carried)
            )
            if refuse is None:
                raise UserError(wrong.error) from error
            refuse(wrong)
            continue
        samples = item.samples(n)
        seed = 0 if "seed" in item.own else place(item.id, samples)
        for sample, seeded in enumerate(reseeded(itertools.repeat(request, samples), seed)):
            yield item, sample, seeded


def place(name: str | int, n: int) -> int:
    """Where a prompt's seeds begin: it follows from its id, so that they stay the same when other
    prompts come or go."""
    if isinstance(name, int):
        return (name - 1) * n
    return zlib.crc32(name.encode("utf-8", "surrogatepass"))


def warn_of_idle(items: Sequence[Item], asked: Collection[str], n: int) -> None:
    """Warns once of what was asked for and does nothing, since answers are greedy.

    Args:
        items: all of the run's.
        asked: fields of the config that somebody set.
        n: samples of each that asks for no number of its own.
    """
    greedy = [item for item in items if item.options["sampling"].temperature == 0]
    idle = {name for item in greedy for name in DRAWS if name in item.own}
    if len(greedy) == len(items):
        idle |= {field.removeprefix("sampling.") for field in asked}
    else:
        n = 1  # Of use to those that aren't greedy.
    in_force.warn_of_greedy(idle, max((item.samples(n) for item in greedy), default=1))


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


def _stop_ids(text: str) -> tuple[int, ...]:
    """ "13,198" as ids."""
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise UserError(f"stop_ids is {text!r:.60}, but it must be like 13,198.") from None


def _tools(path: str | None) -> list[Mapping[str, Any]] | None:
    """The tools in a file of JSON."""
    if path is None:
        return None
    try:
        tools = strict_json.parse(regular_files.read(path, regular_files.MOST_OF_CONFIG), path)
        return plain_tools(tools)
    except OSError as error:
        raise UserError(f"--tools={path} can't be read: {regular_files.why_not(error)}") from error
    except UserError as error:
        raise UserError(f"--tools: {error}") from error


def _constraint(asked: ConfigDict) -> Constraint | None:
    """What answers are held to; a schema and a grammar stand in files."""
    fields, source = dict(asked), ""
    for name in ("json_schema", "lark"):
        if (path := fields[name]) is not None:
            try:
                data = regular_files.read(path, regular_files.MOST_OF_CONFIG)
            except OSError as error:
                why = regular_files.why_not(error)
                raise UserError(f"--{name}={path} can't be read: {why}") from error
            text = utf8.decoded(data, f"--{name}={path}")
            is_schema = name == "json_schema"
            fields[name] = strict_json.parse_object(text, path) if is_schema else text
            source = f"--{name}={path}"
    try:
        found = constraint_of(fields)
    except UserError as error:
        raise UserError(f"{source}: {error}" if source else str(error)) from error
    if found is not None:
        check_installed()
    return found if found is None or not source else dataclasses.replace(found, source=source)


def _logit_bias(pairs: str) -> dict[int, float]:
    """ "42:-1.5,7:3" as a mapping."""
    bias: dict[int, float] = {}
    for pair in filter(None, pairs.split(",")):
        token, _, value = pair.partition(":")
        try:
            number, change = int(token), float(value)
        except ValueError:
            raise UserError(
                f"sampling.logit_bias holds {pair!r:.60}, but it must be like 42:-1.5,7:3."
            ) from None
        if number in bias:
            raise UserError(f"sampling.logit_bias names token {number} twice; keep one of them.")
        bias[number] = change
    return bias
