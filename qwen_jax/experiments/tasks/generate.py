"""`generate`: answers to prompts, one item an answer, judged by scores."""

import contextlib
import functools
import itertools
import math
import sys
from collections.abc import Callable, Collection, Iterator
from fractions import Fraction
from typing import Any, ClassVar, NamedTuple

from ml_collections import ConfigDict
from tqdm import tqdm

from qwen_jax import prompts, ready_made, recommended
from qwen_jax.completions import Completion, Timings
from qwen_jax.errors import UserError
from qwen_jax.experiments import energy, judging, kinds, scores
from qwen_jax.experiments.models import Choice
from qwen_jax.experiments.task import Metrics, Task, Work
from qwen_jax.in_force import DRAWS
from qwen_jax.options import prompt_options
from qwen_jax.prompts import Item
from qwen_jax.recommended import Recommended
from qwen_jax.requests import Request
from qwen_jax.task_fields import ANSWER, PROMPT
from qwen_jax.terminal import visible

_ANSWER = {
    "row": kinds.NATURAL,
    "sample": kinds.NATURAL,
    "text": kinds.TEXT,
    "finish_reason": kinds.TEXT,
    "tokens": kinds.list_of(kinds.NATURAL),
}


class _Prompts(NamedTuple):
    """A file of prompts that was found right.

    Attributes:
        own: what prompts say of drawing answers, and of how many, by themselves; each combination
            once.
        alike: how many say nothing of how many answers they want,
        more: and how many answers the others want together.
    """

    own: list[dict[str, Any]]
    alike: int
    more: int


_RIGHT: dict[str, _Prompts] = {}
"""By all that decides it."""

_OF_ALL_ANSWERS = (
    *("tokens_per_answer", "ended_by_itself", "prompts", "tokens_per_s", "model_seconds"),
    energy.METRIC,
)
"""Metrics that need no score."""

_OWN = ("temperature", "n", *DRAWS)


class Generate(Task):
    """Asks for the answers that are not recorded yet, and records each when it is complete.

    A text follows from its prompt and its row alone, so that resuming changes no answer.

    Attributes:
        own: see `_Prompts`.
        total: how many answers there are to be.
    """

    reads: ClassVar[tuple[str, ...] | None] = (
        *(*PROMPT, *ANSWER, "experiment.template", "experiment.scores"),
        "experiment.judge",
    )

    def __init__(self, config: ConfigDict):
        super().__init__(config)
        self.options = prompts.options_of(config)
        names = config.experiment.scores
        self.scores = [scores.score(name) for name in names if name != scores.JUDGE]
        judging.check(config)
        if judging.is_asked(config):
            try:
                Choice.of(judging.config_of(config)).check()
            except UserError as error:
                raise UserError(f"experiment.judge: {error}") from error
        if "-" in (config.prompt, config.prompt_file):
            raise UserError("An experiment can't read stdin, which a resumed one would lack.")
        self.own, alike, more = self._checked_prompts()
        self.total = alike * config.n + more

    def _checked_prompts(self) -> _Prompts:
        """Raises UserError where a prompt makes no sense, or there are none.

        A file is read once for all points that put its prompts alike.
        """
        config = self.config
        if config.prompt_file is None:
            if config.experiment.template is not None:
                raise UserError(
                    "experiment.template does nothing without prompt_file, from whose fields it "
                    "makes prompts; set that, or leave the template out."
                )
            self._check_item(next(self.items()))
            return _Prompts([{}], 1, 0)
        path, put = ready_made.path(config.prompt_file), prompt_options(self.options)
        experiment, stamp = config.experiment, (0, 0)
        with contextlib.suppress(OSError):  # told of by whoever opens it
            stamp = (path.stat().st_mtime_ns, path.stat().st_size)
        asked = (experiment.template, experiment.scores, experiment.judge.template)
        key = repr((type(self), path, stamp, config.prompt, put, asked))
        if key in _RIGHT:
            return _RIGHT[key]
        found, alike, more = set(), 0, 0
        for item in self.items():
            self._check_item(item)
            found.add(tuple((name, item.own[name]) for name in _OWN if name in item.own))
            alike, more = alike + ("n" not in item.own), more + item.own.get("n", 0)
        if not found:
            raise UserError(f"--prompt_file={config.prompt_file} holds no prompts; add some.")
        return _RIGHT.setdefault(key, _Prompts([dict(own) for own in found], alike, more))

    def _check_item(self, item: Item) -> None:
        """Raises UserError where a score asks for what the prompt's line lacks."""
        scores.check_fields(self.config.experiment.scores, item)
        if judging.is_asked(self.config):
            judging.asked(self.config, item, "")

    def items(self) -> Iterator[Item]:
        """The prompts, in order."""
        if self.config.prompt_file is None:
            return iter([prompts.single(self.config, self.options)])
        return prompts.stream(self.config, self.options)

    def fault_of(self, item: dict[str, Any]) -> str:
        return kinds.fault(item, _ANSWER)

    def known_metrics(self) -> Collection[str] | None:
        of_scores = scores.metrics_of(self.config.experiment.scores)
        return None if of_scores is None else [*of_scores, *_OF_ALL_ANSWERS]

    def run(self, work: Work) -> Metrics:
        # What is wrong with the model is not the first prompt's fault.
        self._follow(work.model().recommended, work.asked)
        recorded = Recorded(work.recorded)
        tally = Tally(self, work.score, energy.of_engine(work.model().engine))
        asked: dict[int, tuple[int, Item, int]] = {}
        numbers = itertools.count()

        def requests() -> Iterator[Request]:
            rows = prompts.rows(self.items(), self.config.n, work.request)
            for row, (item, sample, request) in enumerate(rows):
                if row in recorded:
                    tally.add(row, sample, item, recorded.answer(row))
                else:
                    asked[next(numbers)] = row, item, sample
                    yield request

        def fail(number: int, error: UserError) -> None:
            raise UserError(f"{asked[number][1].where}: {error}") from error

        # Without one of its answers a point has no result: means over the others would flatter it.
        generation = work.model().run(requests(), fail)
        with contextlib.closing(iter(generation)) as pieces:
            for number, _, completion in pieces:
                tally.time(generation.timings)
                if completion is not None:
                    row, item, sample = asked.pop(number)
                    answer = self._answer(work, completion)
                    work.record(row=row, id=item.id, sample=sample, **answer)
                    tally.add(row, sample, item, answer)
                    work.progress(tally.answers, self.total)
        return tally.metrics()

    @staticmethod
    def _answer(work: Work, completion: Completion) -> dict[str, Any]:
        """What is recorded: with log-probabilities their tokens' texts, too, for whoever reads
        them without the model."""
        answer = prompts.answer(completion)
        if completion.logprobs is not None:
            pieces = map(work.model().tokenizer.token_bytes, completion.tokens)
            answer["pieces"] = [piece.decode("utf-8", "replace") for piece in pieces]
        return answer

    def _follow(self, said: Recommended, asked: Collection[str]) -> None:
        """Takes what the model recommends into the options, where that is to be followed."""
        config = recommended.resolved(self.config, said, asked)
        self.options = prompts.options_of(config)
        if line := recommended.line(said, config, self.options["sampling"]):
            _say(line)


@functools.cache
def _say(line: str) -> None:
    """Once a process, since points share models and settings."""
    tqdm.write(visible(line), file=sys.stderr)


class Recorded:
    """Answers of earlier sessions by their row. They were recorded nearly in the rows' order, so
    that few are in memory at a time."""

    def __init__(self, read: Callable[[], Iterator[dict[str, Any]]]):
        self._rows = {answer["row"] for answer in read()}
        self._left = read()
        self._passed: dict[int, dict[str, Any]] = {}

    def __contains__(self, row: int) -> bool:
        return row in self._rows

    def answer(self, row: int) -> dict[str, Any]:
        """One that is recorded, for the first time that it is asked for."""
        while row not in self._passed:
            answer = next(self._left)
            self._passed[answer["row"]] = answer
        return self._passed.pop(row)


class Tally:
    """Sums over prompts, in constant memory: a prompt's samples are judged when all are there.

    Sums are exact, so that the order in which answers finish changes nothing.
    """

    def __init__(
        self, task: Generate, record: Callable[..., None], meter: energy.Meter | None = None
    ):
        self._n, self._scores, self._record = task.config.n, task.scores, record
        self._meter = meter
        self._sums: dict[str, tuple[Fraction, Fraction]] = {}
        self._samples: dict[int, dict[int, dict[str, Any]]] = {}
        self.answers = self._prompts = self._tokens = self._stopped = 0
        self._last, self._timed_tokens, self._timed_seconds = Timings(), 0, 0.0

    def add(self, row: int, sample: int, item: Item, answer: dict[str, Any]) -> None:
        """The answer of a row, which is this sample of a prompt."""
        self.answers += 1
        first, n = row - sample, item.samples(self._n)
        samples = self._samples.setdefault(first, {})
        samples[sample] = answer
        if len(samples) == n:
            del self._samples[first]
            self._judge(first, item, [samples[i] for i in range(n)])

    def _judge(self, row: int, item: Item, samples: list[dict[str, Any]]) -> None:
        self._prompts += 1
        self._tokens += sum(len(sample["tokens"]) for sample in samples)
        self._stopped += sum(sample["finish_reason"] == "stop" for sample in samples)
        found = scores.judged(self._scores, item, samples)
        for name, value in found.items():
            total, squares = self._sums.get(name, (Fraction(), Fraction()))
            exact = Fraction(value)
            self._sums[name] = total + exact, squares + exact * exact
        if found:
            self._record("prompt", row, item.id, found)

    def time(self, timings: Timings) -> None:
        """What has run by now.

        Speeds are those of stretches in which nothing is compiled: a program runs while the next
        one is compiled, so that what is left of the time says little.
        """
        if timings.compile_seconds == self._last.compile_seconds:
            self._timed_tokens += timings.generated_tokens - self._last.generated_tokens
            self._timed_seconds += timings.seconds - self._last.seconds
        elif self._meter is not None:
            self._meter.restart(timings.generated_tokens)
        self._last = timings

    def of_scores(self) -> Metrics:
        """The means of what was judged, and their errors over prompts."""
        found: Metrics = {}
        for name, (total, squares) in self._sums.items():
            mean = total / self._prompts
            variance = float(max(squares / self._prompts - mean * mean, Fraction()))
            found[name] = float(mean)
            found[f"{name}_error"] = math.sqrt(variance / max(self._prompts - 1, 1))
        return found

    def metrics(self) -> Metrics:
        found = self.of_scores()
        found["tokens_per_answer"] = self._tokens / self.answers
        found["ended_by_itself"] = self._stopped / self.answers
        found["prompts"] = self._prompts
        if self._timed_tokens:
            timed = Timings(generated_tokens=self._timed_tokens, seconds=self._timed_seconds)
            found["tokens_per_s"] = timed.generation_rate
        if self._meter is not None:
            joules = self._meter.per_token(self._last.generated_tokens)
            found |= {} if joules is None else {energy.METRIC: joules}
        if self._last.seconds:  # Nothing is timed where all was recorded before.
            found["model_seconds"] = self._last.seconds
        return found
