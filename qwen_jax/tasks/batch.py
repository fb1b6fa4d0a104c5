"""`run.py generate` with a file in OpenAI's batch format, and answers in that format.

A line has `custom_id`, `url` and `body`; its answer `custom_id` and `response`, whose body is the
completion, or the error of that line alone.
"""

import dataclasses
import itertools
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict
from tqdm import tqdm

from qwen_jax import pins, prompt_records, prompts, recommended, settings, startup
from qwen_jax.api import Model
from qwen_jax.errors import UserError
from qwen_jax.options import Options
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
    *(*MODEL, "prompt_file", "output", "ordered", "strict", "batch_invariant", "speculate"),
    *("max_tokens", "generation_config", "sampling"),
)
"""Fields of a config; all else is said by the bodies."""
_PATHS: dict[str, tuple[Callable[..., Asked], type[Reply]]] = {
    "/v1/chat/completions": (asked.chat, ChatReply),
    "/v1/completions": (asked.text, TextReply),
}
_FIELDS = ("custom_id", "method", "url", "body")


@dataclasses.dataclass
class _Job:
    """A line whose answers are made."""

    place: int
    name: str
    wanted: Asked
    reply: Reply
    left: int


def is_one(prompt_file: str | None) -> bool:
    """Whether a file's first line is one of a batch."""
    if prompt_file is None or prompt_file == prompt_records.STDIN:
        return False
    _, _, first = next(prompt_records.read(prompt_file), (0, "", ""))
    return isinstance(first, dict) and {"custom_id", "body"} <= first.keys()


def run(command: Command, load: Callable[[ConfigDict], Model]) -> int:
    """Answers the file; returns the exit code."""
    config = command.config
    set_by_user = settings.asked(config, command.overrides)
    if idle := [field for field in sorted(set_by_user) if not among(field, READS)]:
        raise UserError(
            f"{idle[0]} does nothing for {config.prompt_file}, a batch in OpenAI's format, whose "
            "bodies say how to answer them; leave it out."
        )
    records = list(prompt_records.read(config.prompt_file))
    _check_names(records)
    _tell_of_models(records, config.model)
    with answers.opened(config) as written:
        pins.pin_and_tell(config, pins.OF_RUN)
        with startup.timed("load"):
            model = load(config)
        config = recommended.resolved(config, model.recommended, set_by_user)
        sampling = prompts.sampling_of(config)
        if said := recommended.line(model.recommended, config, sampling):
            print(visible(said), file=sys.stderr)
        summary = Summary(model, sampling)
        bar = tqdm(total=len(records), desc="answers", disable=not sys.stderr.isatty())
        try:
            with bar, Lines(written.out, config.ordered, bar) as lines:
                run = _Run(model, config, Options(max_tokens=config.max_tokens, sampling=sampling))
                refused = run.answer(records, lines, summary)
        finally:
            summary.show()
    return answers.code_of(refused, len(records), "in 'response'")


def _check_names(records: list[Record]) -> None:
    """Raises UserError where two lines have one name, by which answers are told apart."""
    seen: dict[str, str] = {}
    for _, where, given in records:
        name = given.get("custom_id") if isinstance(given, dict) else None
        if isinstance(name, str) and seen.setdefault(name, where) != where:
            raise UserError(f"{where} has the custom_id {name!r:.60}, as {seen[name]}; change one.")


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
                    owners[next(numbers)] = job, index
                    yield request

        for number, _, completion in summary.follow(self._model.run(requests())):
            if completion is None:
                continue
            job, index = owners.pop(number)
            job.reply.end(index, completion)
            job.left -= 1
            if not job.left:
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
        if url not in _PATHS or fields.get("method", "POST") != "POST":
            known = " or ".join(_PATHS)
            raise UserError(f"{where}: url is {url!r:.60}, but it must be POST {known}.")
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
        return _Job(place, name, wanted, reply, wanted.answers), requests

    def _seeded(self, name: str) -> Options:
        """The defaults with a seed that follows from a line's name, not from its place."""
        sampling = self._defaults["sampling"]
        seed = (sampling.seed + prompts.place(name, 1)) % 2**32
        return Options(**self._defaults | {"sampling": dataclasses.replace(sampling, seed=seed)})

    def _refuse(
        self, place: int, record: Record, error: RefusalError | UserError, lines: Lines
    ) -> None:
        _, where, given = record
        if self._config.strict:
            raise UserError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from error
        self._refused += 1
        fields = given.fields if isinstance(given, Damaged) else given
        name = fields.get("custom_id") if isinstance(fields, dict) else None
        found = error if isinstance(error, RefusalError) else RefusalError(400, str(error))
        lines.put(place, _line(name if isinstance(name, str) else None, 400, found.body()))


def _line(name: str | None, status: int, body: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the answers."""
    return {
        "id": f"batch_req_{secrets.token_hex(12)}",
        "custom_id": name,
        "response": {"status_code": status, "request_id": secrets.token_hex(12), "body": body},
        "error": None,
    }
