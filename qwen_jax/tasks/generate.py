"""`run.py generate`: one prompt streamed to stdout, or a file of prompts as JSON lines."""

import itertools
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
from tqdm import tqdm

from qwen_jax import (
    api,
    choices,
    flag_fields,
    in_force,
    pins,
    prompts,
    recommended,
    regular_files,
    settings,
    startup,
)
from qwen_jax.api import Model
from qwen_jax.completions import Completion
from qwen_jax.engine.compiling import Expected
from qwen_jax.engine.memory import device
from qwen_jax.errors import UserError
from qwen_jax.mesh import MeshShape
from qwen_jax.prompt_lines import SAMPLING, Item, Wrong
from qwen_jax.requests import Request, reseeded
from qwen_jax.settings import Command
from qwen_jax.tasks import answers, batch
from qwen_jax.tasks.answers import Answers
from qwen_jax.tasks.lines import Lines
from qwen_jax.tasks.summary import Summary
from qwen_jax.terminal import visible

_NEEDS = {
    "output": ("prompt_file", "a single prompt's text goes to stdout"),
    "ordered": ("prompt_file", "it is about the order of many answers"),
    "strict": ("prompt_file", "it is about one of many prompts"),
    "resume": ("output", "it is the file to go on with"),
    "trace.names": ("trace.file", "it is the file that tensors are recorded in"),
    "trace.positions": ("trace.file", "it is the file that tensors are recorded in"),
}
"""Fields that do nothing without another one, and why."""


def run(command: Command) -> int:
    """Answers what the config asks for; returns the exit code.

    Whatever can be known to be wrong is, before the model is loaded.
    """
    config = command.config
    options = prompts.options_of(config)
    asked = settings.asked(config, command.overrides)
    is_batch = config.prompt is None and batch.is_one(config.prompt_file)
    if is_batch:
        batch.check_read(config, asked)
    _check_needs(config, asked)
    if is_batch:
        return batch.run(command, load)
    _check_trace(config)
    _check_speculation(config)
    with answers.opened(config) as written:
        single = config.prompt_file is None
        items: list[Item | Wrong] = (
            [prompts.single(config, options, piped=True)]
            if single
            else prompts.read(config, options)
        )
        _tell_of_carried(_right(items))
        if config.output is not None:
            answers.check_ids(items, config.prompt_file)
        pins.pin_and_tell(config, pins.OF_RUN)
        written.check(config, answers.digests_of(items))
        with startup.timed("load"):
            model = load(config, _expected(config, items))
        config, items = _as_recommended(model, command, items)
        written.settle(config, answers.digests_of(items))
        others = sum(not SAMPLING.keys().isdisjoint(item.own) for item in _right(items))
        summary = Summary(model, prompts.sampling_of(config), others)
        refused = 0
        try:
            if single:
                _run_single(model, _right(items)[0], config, summary)
            else:
                refused = _run_file(model, items, config, written, summary)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise UserError(
                f"The {device().device_kind} ran out of memory ({str(error).splitlines()[0]}); "
                "lower slots, or choose a smaller dtype."
            ) from error
        finally:
            summary.show()
    return answers.code_of(refused, len(items), "under 'error'")


def _right(items: Sequence[Item | Wrong]) -> list[Item]:
    return [item for item in items if isinstance(item, Item)]


def _tell_of_carried(items: Sequence[Item]) -> None:
    """Names fields that are no settings: a misspelt one would do nothing in silence."""
    names = {name: None for item in items for name in item.carried}
    if names:
        shown = ", ".join(f"{name!r:.40}" for name in itertools.islice(names, 10))
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        print(f"carried from prompts into their answers: {shown}{more}", file=sys.stderr)


def _samples(items: Sequence[Item | Wrong], n: int) -> int:
    """How many answers are asked for, a line for what is wrong included."""
    return sum(1 if isinstance(item, Wrong) else item.samples(n) for item in items)


def _as_recommended(
    model: Model, command: Command, items: list[Item | Wrong]
) -> tuple[ConfigDict, list[Item | Wrong]]:
    """The config and the prompts with what the model recommends, where that is to be followed.

    Says what it recommends and what is used, and warns of settings that then do nothing.
    """
    asked = settings.asked(command.config, command.overrides)
    config = recommended.resolved(command.config, model.recommended, asked)
    options = prompts.options_of(config)
    items = [item.over(options) if isinstance(item, Item) else item for item in items]
    if said := recommended.line(model.recommended, config, options["sampling"]):
        print(visible(said), file=sys.stderr)
    prompts.warn_of_idle(_right(items), asked, config.n)
    return config, items


def _check_needs(config: ConfigDict, asked: Collection[str]) -> None:
    """Raises UserError where what somebody asks for does nothing without something else."""
    values = dict(settings.flatten(config))
    for field, (needed, why) in _NEEDS.items():
        if field in asked and values[field] is not False and values[needed] is None:
            flag, other = flag_fields.FLAG_OF[field], flag_fields.FLAG_OF[needed]
            raise UserError(f"--{flag} needs --{other}: {why}.")


def _check_trace(config: ConfigDict) -> None:
    """Raises UserError where a trace is asked for that can't be recorded."""
    if config.trace.file is None:
        return
    if config.prompt_file is not None or config.n != 1:
        raise UserError("--trace records one text; leave out --prompt_file and --n.")
    # Needed for nothing else, and heavy.
    from qwen_jax.accuracy.traces.recording import bounds

    bounds(config.trace.positions)
    path = Path(config.trace.file)
    if why := regular_files.why_taken(path, "trace.safetensors"):
        raise UserError(f"--trace={path} {why}")


def _check_speculation(config: ConfigDict) -> None:
    """Raises UserError where drafts are asked for that no answer could have."""
    choices.check_speculation(
        config.speculate.method,
        config.speculate.draft_model,
        config.speculate.tokens,
        MeshShape.parse(config.mesh).devices,
    )
    held = [name for name, value in config.constrain.items() if value]
    if config.speculate.method != "none" and held:
        raise UserError(
            f"--speculate does nothing beside --{held[0]}: what may come next is found out on the "
            "host after each token; leave one of the two out."
        )


def _expected(config: ConfigDict, items: Sequence[Item | Wrong]) -> Expected:
    """What the model will be asked for, as far as that is known before it is there."""
    options = [item.options for item in _right(items)]
    free = [o for o in options if o.get("constraint") is None]
    choices = {repr(c): c for c in ((o["sampling"], o["top_logprobs"]) for o in free)}
    constrained = [o["sampling"] for o in options if o.get("constraint") is not None]
    return Expected(_samples(items, config.n), [*choices.values()], constrained)


def load(config: ConfigDict, expected: Expected | None = None) -> Model:
    """The config's model, with a progress bar on a terminal."""
    with tqdm(
        desc="loading", unit="B", unit_scale=True, leave=False, disable=not sys.stderr.isatty()
    ) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return api.load(
            config.model,
            adapter=config.adapter,
            dtype=config.dtype,
            weights=config.weights,
            implementation=config.implementation,
            matmul_precision=config.matmul_precision,
            slots=config.slots,
            batch_invariant=bool(config.batch_invariant),
            mesh=config.mesh,
            speculate=config.speculate.method,
            draft_model=config.speculate.draft_model,
            draft_tokens=config.speculate.tokens,
            expected=expected,
            sha256=config.sha256,
            progress=progress,
        )


def _run_single(model: Model, item: Item, config: ConfigDict, summary: Summary) -> None:
    """Streams one sample as it comes; of several each is printed when it and all before it are
    complete."""
    request = model.request(item.prompt, **item.options)
    if config.trace.file is not None:
        from qwen_jax.accuracy.traces.trace import select

        select(model.config, config.trace.names)  # Refuses what matches nothing.
    generation = model.run(reseeded(itertools.repeat(request, config.n)))
    ended: dict[int, Completion] = {}
    printed = 0
    # A terminal obeys what a model may write; a file gets the text as it is.
    shown: Callable[[str], str] = visible if sys.stdout.isatty() else str

    def put(number: int, completion: Completion) -> None:
        if config.n > 1:
            print(f"--- sample {number + 1}\n{shown(completion.text)}", end="")
        if completion.tokens:  # none where Ctrl-C came first
            print(flush=True)
        _print_logprobs(model, completion)

    try:
        for number, text, completion in summary.follow(generation):
            if config.n == 1:
                print(shown(text), end="", flush=True)
            if completion is not None:
                ended[number] = completion
            while printed in ended:
                put(printed, ended[printed])
                printed += 1
    finally:
        for number, completion in sorted((ended | generation.unfinished).items()):
            if number >= printed:
                put(number, completion)
    if config.trace.file is not None:
        from qwen_jax.accuracy.traces.recording import trace_generation

        names = config.trace.names.split(",")
        trace_generation(
            model, request, ended[0], names=names, positions=config.trace.positions
        ).save(config.trace.file)
        print(f"wrote {config.trace.file}", file=sys.stderr)


def _print_logprobs(model: Model, completion: Completion) -> None:
    name = model.tokenizer.token_name
    for entry in completion.logprobs or ():
        top = "  ".join(f"{name(token)} {logprob:.3f}" for token, logprob in entry.top)
        print(f"{name(entry.token):<16} {entry.logprob:8.3f}   {top}".rstrip(), file=sys.stderr)


def _run_file(
    model: Model,
    items: Sequence[Item | Wrong],
    config: ConfigDict,
    answered: Answers,
    summary: Summary,
) -> int:
    """Writes each answer when it is complete; with `ordered`, when all before it are, too.

    Prompts become ids when they are about to get a slot, so that thousands of them don't delay the
    first answer. One that proves to be wrong then, or while its answer is made, gets a line that
    says why; where it is `strict` it ends the run, and what is written stays. What has been
    answered is not answered again.

    Returns:
        How many prompts were refused.
    """
    asked: dict[int, tuple[Item, dict[str, Any], int]] = {}
    numbers, places, refused = itertools.count(), itertools.count(), 0
    failed: set[str] = set()
    left = answered.left(items, config.n)
    if answered.done:
        print(
            f"{len(items) - len(left)} of {len(items)} prompts are answered already.",
            file=sys.stderr,
        )

    def requests() -> Iterator[Request]:
        def request(item: Item) -> Request:
            return model.request(item.prompt, **item.options)

        told = None if config.strict else refuse
        for item, sample, made in prompts.rows(left, config.n, request, told):
            if (item.id, sample) not in answered.done:
                line = {"id": item.id, "sample": sample, **item.carried, **made_by(made)}
                asked[next(numbers)] = item, line, next(places)
                yield made

    def made_by(request: Request) -> dict[str, Any]:
        dtype, used = str(model.engine.spec.weights), in_force.describe(request.sampling)
        made = {"model": config.model, "dtype": dtype, "sampling": used}
        # Who judges log-probabilities has to know what was before them.
        return made if request.top_logprobs is None else made | {"prompt": request.tokens}

    def refuse(wrong: Wrong) -> None:
        nonlocal refused
        refused += 1
        lines.put(next(places), {"id": wrong.id, "error": wrong.error, **wrong.carried})

    def fail(number: int, error: UserError) -> None:
        item, line, place = asked.pop(number)
        why = f"{item.where}: {error}"
        if config.strict:
            raise UserError(why) from error
        failed.add(item.where)
        which = {"id": item.id, "sample": line["sample"]}
        lines.put(place, {**which, "error": why, **item.carried})

    total = _samples(items, config.n) - len(answered.done)
    generation = model.run(requests(), fail)
    bar = tqdm(total=total, desc="answers", disable=not sys.stderr.isatty())
    with bar, Lines(answered.out, config.ordered, bar) as lines:
        for number, _, completion in summary.follow(generation):
            if completion is None:
                continue
            _, line, place = asked.pop(number)
            lines.put(place, line | prompts.answer(completion))
    return refused + len(failed)
