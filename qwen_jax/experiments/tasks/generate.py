"""`generate`: answers to prompts, one item an answer, judged by scores."""

import functools
import math
import sys
from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from tqdm import tqdm

from qwen_jax import prompts, recommended
from qwen_jax.engine.sampling import Plan
from qwen_jax.errors import UserError
from qwen_jax.experiments import scores
from qwen_jax.experiments.task import Metrics, Task, Work
from qwen_jax.generation import Request, Timings
from qwen_jax.prompts import Item
from qwen_jax.recommended import Recommended

Row = tuple[Item, int, Request]


class Generate(Task):
    """Runs the rows in batches of fixed membership: a batch that was cut short runs again as it
    was, so that resuming changes no answer, and only what it had not recorded yet is written."""

    def __init__(self, config: ConfigDict):
        super().__init__(config)
        self.options = prompts.options_of(config)
        self.scores = [scores.score(name) for name in config.experiment.scores]
        if config.prompt == "-":
            raise UserError("An experiment can't read stdin, which a resumed one would lack.")
        if config.prompt_file is not None and not Path(config.prompt_file).is_file():
            raise UserError(f"--prompt_file={config.prompt_file} is no file that can be read.")
        if config.prompt_file is None:
            prompts.single(config, self.options)

    def rows(self) -> tuple[int, int]:
        if self.config.prompt_file is None:
            longest = max(map(len, self._lines()))
        else:
            path = Path(self.config.prompt_file)
            longest = _longest_line(path, path.stat().st_mtime_ns)
        # A token is four bytes of English; a chat's frame is 40 tokens or so.
        return self.config.batch_size, 40 + longest // 4 + self.config.max_tokens

    def shapes(self) -> tuple[Any, ...]:
        plan = Plan.of([self.options["sampling"]], self.config.top_logprobs)
        return (*super().shapes(), plan)

    def _items(self) -> Iterator[Item]:
        if self.config.prompt_file is None:
            return iter([prompts.single(self.config, self.options)])
        return prompts.stream(self.config, self.options)

    def _lines(self) -> Iterator[bytes]:
        if self.config.prompt_file is None:
            text = str(prompts.single(self.config, self.options).prompt)
            yield text.encode("utf-8", "surrogatepass")  # The tokenizer says what is wrong.
        else:
            with Path(self.config.prompt_file).open("rb") as file:
                yield from (line for line in file if line.strip())

    def run(self, work: Work) -> Metrics:
        total = sum(1 for _ in self._lines()) * self.config.n
        size = max(1, min(self.config.batch_size, total))
        # What is wrong with the model is not the first prompt's fault.
        self._follow(work.model().recommended, work.asked)
        rows = prompts.rows(self._items(), self.config.n, work.request)
        earlier = work.recorded()
        pending = next(earlier, None)
        tally, start = _Tally(self), 0
        while part := list(islice(rows, size)):
            done: dict[int, dict[str, Any]] = {}
            # Recorded batch by batch, so what belongs to this one comes next.
            while pending is not None and pending["row"] < start + len(part):
                done[pending["row"] - start] = pending
                pending = next(earlier, None)
            if len(done) < len(part):
                for index, answer in self._run_batch(work, part, size, tally):
                    if index not in done:
                        item, sample, _ = part[index]
                        line = {"row": start + index, "id": item.id, "sample": sample, **answer}
                        work.record(**line)
                        done[index] = line
            tally.add([(part[index][0], done[index]) for index in sorted(done)])
            start += len(part)
            work.progress(start, total)
        if start == 0:
            raise UserError(f"--prompt_file={self.config.prompt_file} holds no prompts.")
        return tally.metrics()

    def _follow(self, said: Recommended, asked: Collection[str]) -> None:
        """Takes what the model recommends into the options, where that is to be followed."""
        config = recommended.resolved(self.config, said, asked)
        self.options = prompts.options_of(config)
        if line := recommended.line(said, config, self.options["sampling"]):
            _say(line)

    def _run_batch(
        self, work: Work, part: list[Row], size: int, tally: "_Tally"
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """The answers of a batch by index, each when it is complete. Padded with idle rows, since
        a smaller batch would have to be compiled for itself."""
        requests = [request for _, _, request in part]
        idle = [Request(requests[0].tokens[:1], max_tokens=0)] * (size - len(part))
        batch = work.model().batch(requests + idle, self.config.top_logprobs)
        waiting = list(range(len(part)))
        for _ in batch:
            for index in [index for index in waiting if batch.finished(index)]:
                waiting.remove(index)
                yield index, prompts.answer(batch.completion(index))
        tally.time(batch.timings)


@functools.cache
def _say(line: str) -> None:
    """Once a process, since points share models and settings."""
    tqdm.write(line, file=sys.stderr)


@functools.cache
def _longest_line(path: Path, changed: int) -> int:
    """Bytes of a file's longest line; points share files, whose time of change is `changed`."""
    with path.open("rb") as file:
        return max(map(len, file), default=0)


class _Tally:
    """Sums over prompts, in constant memory: a prompt's samples are judged when all are there."""

    def __init__(self, task: Generate):
        self._n, self._scores = task.config.n, task.scores
        self._sums: dict[str, tuple[float, float]] = {}
        self._samples: list[dict[str, Any]] = []
        self._prompts = self._tokens = self._stopped = 0
        self._seconds = 0.0
        self._timings = Timings(0, 0, 0, 0, 0, 0)

    def add(self, answers: list[tuple[Item, dict[str, Any]]]) -> None:
        for item, answer in answers:
            self._samples.append(answer)
            if len(self._samples) == self._n:
                self._judge(item)
                self._samples = []

    def _judge(self, item: Item) -> None:
        self._prompts += 1
        self._tokens += sum(len(sample["tokens"]) for sample in self._samples)
        self._stopped += sum(sample["finish_reason"] == "stop" for sample in self._samples)
        for score in self._scores:
            for name, value in score(item, self._samples).items():
                total, squares = self._sums.get(name, (0.0, 0.0))
                self._sums[name] = total + value, squares + value * value

    def time(self, timings: Timings) -> None:
        """Speeds are those of batches that compile nothing: a program runs while the next one is
        compiled, so that what is left of the time says little."""
        self._seconds += timings.prompt_seconds + timings.generation_seconds
        if timings.compile_seconds == 0:
            pairs = zip(vars(self._timings).values(), vars(timings).values(), strict=True)
            self._timings = Timings(*(a + b for a, b in pairs))

    def metrics(self) -> Metrics:
        found: Metrics = {}
        for name, (total, squares) in self._sums.items():
            mean = total / self._prompts
            variance = max(squares / self._prompts - mean * mean, 0.0)
            found[name] = mean
            found[f"{name}_error"] = math.sqrt(variance / max(self._prompts - 1, 1))
        answers = self._prompts * self._n
        found["tokens_per_answer"] = self._tokens / answers
        found["ended_by_itself"] = self._stopped / answers
        found["prompts"] = self._prompts
        if self._timings.prompt_tokens:
            found["prompt_tokens_per_s"] = self._timings.prompt_rate
        if self._timings.generated_tokens:
            found["tokens_per_s"] = self._timings.generation_rate
        if self._seconds:  # Nothing is timed where all was recorded before.
            found["model_seconds"] = self._seconds
        return found
