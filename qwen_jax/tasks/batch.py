"""`run.py generate` with a file in OpenAI's batch format, and answers in that format.

A line has `custom_id`, `url` and `body`; its answer `custom_id` and `response`, whose body is the
completion, or the error of that line alone.
"""

import dataclasses
import itertools
import secrets
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict
from tqdm import tqdm

from qwen_jax import pins, prompt_records, prompts, recommended, settings, startup
from qwen_jax.api import Model
from qwen_jax.errors import UserError
from qwen_jax.experiments import kinds
from qwen_jax.options import Options
from qwen_jax.prompt_lines import SAMPLING
from qwen_jax.prompt_records import Damaged, Record
from qwen_jax.requests import Request
from qwen_jax.serving import asked
from qwen_jax.serving.asked import Asked
from qwen_jax.serving.refusal import RefusalError
from qwen_jax.serving.replies import ChatReply, Reply, TextReply
from qwen_jax.settings import Command
from qwen_jax.task_fields import MODEL, among
from qwen_jax.tasks import answers
from qwen_jax.tasks.lines import Lines
from qwen_jax.tasks.summary import Summary
from qwen_jax.terminal import visible

READS = (
    *(*MODEL, "prompt_file", "output", "ordered", "resume", "strict", "batch_invariant"),
    *("speculate", "max_tokens", "generation_config", "sampling"),
)
"""Fields of a config; all else is said by the bodies."""
_PATHS: dict[str, tuple[Callable[..., Asked], type[Reply]]] = {
    "/v1/chat/completions": (asked.chat, ChatReply),
    "/v1/completions": (asked.text, TextReply),
}
_FIELDS = ("custom_id", "method", "url", "body")
_ANSWER = {"custom_id": kinds.optional(kinds.TEXT), "response": kinds.OBJECT}
FORM = answers.Form(
    "custom_id",
    "give what is new one of its own",
    lambda line: (
        kinds.fault(line, _ANSWER)
        or kinds.fault(line["response"], {"status_code": kinds.NATURAL, "body": kinds.OBJECT})
    ),
    lambda line: (line["custom_id"], 0) if line["response"]["status_code"] == 200 else None,
)


@dataclasses.dataclass
class _Job:
    """A line whose answers are made; `failed` where one of them can't go on."""

    place: int
    record: Record
    name: str
    wanted: Asked
    reply: Reply
    left: int
    failed: bool = False


def is_one(prompt_file: str | None) -> bool:
    """Whether a file's first line is one of a batch."""
    if prompt_file is None or prompt_file == prompt_records.STDIN:
        return False
    _, _, first = next(prompt_records.read(prompt_file), (0, "", ""))
    return isinstance(first, dict) and {"custom_id", "body"} <= first.keys()


def check_read(config: ConfigDict, asked: Collection[str]) -> None:
    """Raises UserError where a field that somebody asks for does nothing for a batch."""
    if idle := [field for field in sorted(asked) if not among(field, READS)]:
        raise UserError(
            f"{idle[0]} does nothing for {config.prompt_file}, a batch in OpenAI's format, whose "
            "bodies say how to answer them; leave it out."
        )


def run(command: Command, load: Callable[[ConfigDict], Model]) -> int:
    """Answers the file; returns the exit code."""
    config = command.config
    records = list(prompt_records.read(config.prompt_file))
    _check_names(records)
    asked = answers.digests(
        (name, {k: v for k, v in given.items() if k != "custom_id"})
        for _, _, given in records
        if isinstance(given, dict) and (name := _name_of(given)) is not None
    )
    with answers.opened(config, FORM) as written:
        written.check(config, asked)
        _tell_of_models(records, config.model)
        pins.pin_and_tell(config, pins.OF_RUN)
        with startup.timed("load"):
            model = load(config)
        set_by_user = settings.asked(config, command.overrides)
        config = recommended.resolved(config, model.recommended, set_by_user)
        written.settle(config, asked)
        sampling = prompts.sampling_of(config)
        if said := recommended.line(model.recommended, config, sampling):
            print(visible(said), file=sys.stderr)
        left = [record for record in records if (_name_of(record[2]), 0) not in written.done]
        if written.done:
            print(
                f"{len(records) - len(left)} of {len(records)} prompts are answered already.",
                file=sys.stderr,
            )
        summary = Summary(model, sampling, sum(map(_has_sampling, left)))
        bar = tqdm(total=len(left), desc="answers", disable=not sys.stderr.isatty())
        try:
            with bar, Lines(written.out, config.ordered, bar) as lines:
                run = _Run(model, config, Options(max_tokens=config.max_tokens, sampling=sampling))
                refused = run.answer(left, lines, summary)
        finally:
            summary.show()
    return answers.code_of(refused, len(records), "in 'response'")


def _check_names(records: list[Record]) -> None:
    """Raises UserError where two lines have one name, by which answers are told apart."""
    seen: dict[str, str] = {}
    for _, where, given in records:
        name = _name_of(given)
        if name is not None and seen.setdefault(name, where) != where:
            raise UserError(f"{where} has the custom_id {name!r:.60}, as {seen[name]}; change one.")


def _name_of(given: object) -> str | None:
    """A line's custom_id, if it has one."""
    name = given.get("custom_id") if isinstance(given, dict) else None
    return name if isinstance(name, str) else None


def _has_sampling(record: Record) -> bool:
    """Whether a line says itself how its tokens are chosen."""
    _, _, given = record
    body = given.get("body") if isinstance(given, dict) else None
    return isinstance(body, dict) and any(body.get(name) is not None for name in SAMPLING)


def _tell_of_models(records: list[Record], model: str) -> None:
    """Says so where bodies name other models: files that were written for OpenAI's do."""
    bodies = [given.get("body") for _, _, given in records if isinstance(given, dict)]
    named = {str(body["model"]) for body in bodies if isinstance(body, dict) and "model" in body}
    if others := sorted(named - {model}):
        shown = ", ".join(f"{name!r:.60}" for name in others[:3])
        print(visible(f"bodies name {shown}; {model} answers them."), file=sys.stderr)


class _Run:
    """The lines of one file."""

    def __init__(self, model: Model, config: ConfigDict, defaults: Options):
        self._model, self._config, self._defaults = model, config, defaults
        self._refused = 0

    def answer(self, records: list[Record], lines: Lines, summary: Summary) -> int:
        """Writes every line's answer; returns how many are refused."""
        owners: dict[int, tuple[_Job, int]] = {}
        numbers = itertools.count()

        def requests() -> Iterator[Request]:
            for place, record in enumerate(records):
                try:
                    job, made = self._begun(place, record)
                except (RefusalError, UserError) as error:
                    self._refuse(place, record, error, lines)
                    continue
                for index, request in enumerate(made):
                    if not job.failed:
                        owners[next(numbers)] = job, index
                        yield request

        def fail(number: int, error: UserError) -> None:
            job, _ = owners.pop(number)
            if not job.failed:
                job.failed = True
                self._refuse(job.place, job.record, error, lines)

        for number, _, completion in summary.follow(self._model.run(requests(), fail)):
            if completion is None:
                continue
            job, index = owners.pop(number)
            job.reply.end(index, completion)
            job.left -= 1
            if not (job.left or job.failed):
                lines.put(job.place, _line(job.name, 200, job.reply.whole()))
        return self._refused

    def _begun(self, place: int, record: Record) -> tuple[_Job, list[Request]]:
        _, where, given = record
        if isinstance(given, Damaged):
            raise given.error
        fields = given if isinstance(given, dict) else {}
        if wrong := [name for name in fields if name not in _FIELDS]:
            raise UserError(f"{where}: {wrong[0]!r:.60} is no field of a batch's line.")
        name, url, body = (fields.get(key) for key in ("custom_id", "url", "body"))
        if not isinstance(name, str):
            raise UserError(f"{where}: custom_id is {name!r:.60}, but it must be text.")
        if (method := fields.get("method", "POST")) != "POST":
            raise UserError(f"{where}: method is {method!r:.60}, but it must be POST.")
        if url not in _PATHS:
            known = " or ".join(_PATHS)
            raise UserError(f"{where}: url is {url!r:.60}, but it must be {known}.")
        if not isinstance(body, dict):
            raise UserError(f"{where}: body is {body!r:.60}, but it must be an object.")
        understand, form = _PATHS[url]
        wanted = understand(body, self._seeded(name), draw=False)
        if wanted.stream:
            raise UserError(f"{where}: stream is true, but a batch's answers are whole.")
        if wanted.echo:
            raise UserError(f"{where}: echo is true, which only the server takes; leave it out.")
        requests = wanted.requests(self._model, None)
        reply = form(wanted, self._model.tokenizer, self._config.model)
        return _Job(place, record, name, wanted, reply, wanted.answers), requests

    def _seeded(self, name: str) -> Options:
        """The defaults with a seed that follows from a line's name, not from its place."""
        sampling = self._defaults["sampling"]
        seed = (sampling.seed + prompts.place(name, 1)) % 2**32
        return Options(**self._defaults | {"sampling": dataclasses.replace(sampling, seed=seed)})

    def _refuse(
        self, place: int, record: Record, error: RefusalError | UserError, lines: Lines
    ) -> None:
        _, where, given = record
        text = f"{where}: {str(error).removeprefix(f'{where}: ')}"
        if self._config.strict:
            raise UserError(text) from error
        self._refused += 1
        param, code = (error.param, error.code) if isinstance(error, RefusalError) else (None, None)
        told = RefusalError(400, text, param=param, code=code)
        name = _name_of(given.fields if isinstance(given, Damaged) else given)
        lines.put(place, _line(name, 400, told.body()))


def _line(name: str | None, status: int, body: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the answers."""
    return {
        "id": f"batch_req_{secrets.token_hex(12)}",
        "custom_id": name,
        "response": {"status_code": status, "request_id": secrets.token_hex(12), "body": body},
        "error": None,
    }
