"""Runs the points that are not finished yet, one after another, whatever becomes of each."""

import contextlib
import logging
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
from tqdm import tqdm

from qwen_jax import hosts
from qwen_jax.api import Model
from qwen_jax.engine import memory
from qwen_jax.errors import UserError
from qwen_jax.experiments import ahead, environment, judging, kinds, profiling
from qwen_jax.experiments.answers.chosen import Asked
from qwen_jax.experiments.contents import LOG, OF_UNIT
from qwen_jax.experiments.lines import NotWritten, written
from qwen_jax.experiments.models import Models
from qwen_jax.experiments.plan import Planned
from qwen_jax.experiments.records import Records
from qwen_jax.experiments.scores import JUDGE
from qwen_jax.experiments.stopping import Clock, OutOfTime, why_hopeless
from qwen_jax.experiments.task import Metrics, Work
from qwen_jax.experiments.tasks.generate import Generate
from qwen_jax.prompts import Item
from qwen_jax.requests import Request

_log = logging.getLogger(__name__)
_log.setLevel(logging.INFO)
_log.propagate = False


class Runner:
    """Runs planned points into records; `run` returns how many have failed."""

    def __init__(
        self,
        records: Records,
        *,
        command: str,
        retry_failed: bool,
        profile: bool,
        asked: Asked,
        max_time: float | None = None,
        stop_worse: bool = False,
    ):
        self._records, self._command, self._asked = records, command, asked
        self._retry, self._profile, self._stop_worse = retry_failed, profile, stop_worse
        self._clock = Clock(max_time)
        self._models = Models(records.directory)
        self.out_of_time = False

    def run(self, planned: list[Planned]) -> int:
        """Runs what is left of the points; counts those that have failed, now or before."""
        records = self._records
        with _logged_to(records.directory / LOG):
            left = [item for item in planned if self._is_left(item.point.id)]
            name = environment.save(records.directory)
            records.event(
                "session",
                time=_now(),
                environment=name,
                points=len(left),
                command=self._command,
                answer=self._asked.fields(),
            )
            with tqdm(
                total=len(planned),
                initial=len(planned) - len(left),
                desc="points",
                disable=not sys.stderr.isatty(),
            ) as bar:
                for item in left:
                    bar.set_postfix_str(item.point.label[:60])
                    self._run_or_skip(item)
                    if self.out_of_time:
                        break
                    if (end := records.ends.get(item.point.id, {})).get("event") == "finished":
                        ahead.check_ended(item, planned, end["metrics"], self._asked)
                    bar.update()
            unjudged = 0 if self.out_of_time else self._judge(planned)
        ids = {item.point.id for item in planned}
        failed = sum(e["event"] == "failed" for id, e in records.ends.items() if id in ids)
        return failed + unjudged

    def _judge(self, planned: list[Planned]) -> int:
        """Has answers judged that are to be and aren't yet; returns of how many points that
        failed."""
        failed = 0
        judge = Judge(self._records, self._models)
        for item in planned:
            end = self._records.ends.get(item.point.id, {})
            wanted = JUDGE in item.point.config.experiment.scores
            if not wanted or end.get("event") != "finished" or JUDGE in end["metrics"]:
                continue
            try:
                with hosts.waiting_for_loss():
                    metrics = judge.run(item)
            except NotWritten:
                raise
            except Exception as error:
                reason, what = _explain(error), traceback.format_exc()
                _log.info("not judged %s: %s\n%s", item.point.id, reason, what)
                logging.getLogger("absl").warning(
                    "The answers of %s are not judged: %s", item.point.label, reason["reason"]
                )
                failed += 1
                continue
            self._records.event("scored", point=item.point.id, time=_now(), metrics=metrics)
        return failed

    def _is_left(self, point: str) -> bool:
        end = self._records.ends.get(point)
        return end is None or (end["event"] == "failed" and self._retry)

    def _run_or_skip(self, item: Planned) -> None:
        if self._clock.is_over:
            self.out_of_time = True
        elif self._stop_worse and (
            reason := why_hopeless(self._records.directory, item, self._asked)
        ):
            self._records.event("skipped", point=item.point.id, time=_now(), reason=reason)
            _log.info("skipped %s: %s", item.point.id, reason)
        else:
            self._run(item)

    def _run(self, item: Planned) -> None:
        point, records = item.point, self._records
        records.event("started", point=point.id, time=_now())
        _log.info("started %s: %s", point.id, point.label)
        start, compiled = time.perf_counter(), memory.compile_seconds()
        try:
            with (
                hosts.waiting_for_loss(),
                PointWork(item, records, self._models, self._clock) as work,
                profiling.traced(records.directory, point.id, self._profile) as operations,
            ):
                metrics = checked(item.task.run(work))
        except KeyboardInterrupt:
            records.event("interrupted", point=point.id, time=_now())
            raise
        except OutOfTime:
            records.event("interrupted", point=point.id, time=_now())
            self.out_of_time = True
            return
        except NotWritten:
            raise
        except (Exception, SystemExit) as error:
            # Whatever it is, the other points may well run; the log has the traceback.
            reason, what = _explain(error), traceback.format_exc()
            _log.info("failed %s: %s\n%s", point.id, reason, what)
            records.event("failed", point=point.id, time=_now(), **reason)
            return
        fields: dict[str, Any] = {
            "metrics": metrics,
            "seconds": round(time.perf_counter() - start, 4),
            "compile_seconds": round(memory.compile_seconds() - compiled, 4),
            "peak_bytes": memory.peak_memory()[1],
        }
        if operations:
            fields["operations"] = operations
        records.event("finished", point=point.id, time=_now(), **fields)
        _log.info("finished %s: %s", point.id, metrics)


class Judge:
    """Judges the answers of points, going on where an earlier session was killed."""

    def __init__(self, records: Records, models: Models):
        self._records, self._models = records, models

    def run(self, item: Planned) -> Metrics:
        """Judges what isn't yet, writes what each prompt scored, and returns the metrics."""
        point, config, task = item.point, item.point.config, item.task
        assert isinstance(task, Generate)
        texts = {a["row"]: a["text"] for a in self._records.outputs(point, task.fault_of)}
        known = self._records.judged(point, lambda line: kinds.fault(line, judging.JUDGEMENT))
        answers = list(judging.answered(config, task.items(), texts))
        values = {a.row: (a, known[a.row]["judge"]) for a in answers if a.row in known}
        left = [answer for answer in answers if answer.row not in known]
        if left:
            file = self._records.judgements()
            try:
                model = self._models.get(judging.config_of(config))
                words = config.experiment.judge.words
                for some in judging.batches(left):
                    found = judging.judged(model, words, (answer.asked for answer in some))
                    for answer, value in zip(some, found, strict=True):
                        values[answer.row] = answer, value
                        line = {"row": answer.row, "asked": answer.asked, "judge": value}
                        file.append({"point": point.id, **line})
                file.sync()
            finally:
                file.close()
        units = list(judging.by_unit(values))
        for unit, of, value in units:
            line = {"of": "prompt", "unit": unit, "id": of.id, "scores": {JUDGE: value}}
            self._records.scored(point, line)
        return judging.metrics_of([value for _, _, value in units])


class PointWork(Work):
    """One point's view of the records, with a progress bar of its own."""

    def __init__(self, item: Planned, records: Records, models: Models, clock: Clock):
        self._clock = clock
        self.config, self.asked = item.point.config, item.point.asked
        self.directory = records.directory
        self._point, self._records, self._models = item.point, records, models
        self._task = item.task
        self._bar = tqdm(
            desc="  this point", leave=False, position=1, disable=not sys.stderr.isatty()
        )

    def __enter__(self) -> "PointWork":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def model(self, config: ConfigDict | None = None) -> Model:
        return self._models.get(self.config if config is None else config)

    def request(self, item: Item) -> Request:
        return self._models.request(self.config, item)

    def recorded(self) -> Iterator[dict[str, Any]]:
        return self._records.outputs(self._point, self._task.fault_of)

    def record(self, **item: Any) -> None:
        self._records.output(self._point, item)

    def score(self, of: str, unit: int, name: str | int, scores: Mapping[str, float]) -> None:
        line = {"of": of, "unit": unit, "id": name, "scores": checked(scores)}
        if wrong := kinds.fault(line, OF_UNIT):
            raise UserError(f"What a unit scored can't be recorded: {wrong}.")
        self._records.scored(self._point, line)

    def progress(self, done: int, total: int) -> None:
        if done < total:
            self._clock.check()
        self._bar.total = total
        self._bar.update(done - self._bar.n)


def checked(metrics: Mapping[str, float]) -> Metrics:
    """The metrics as Python's numbers, which NumPy's and JAX's need not be; true is 1. Raises
    UserError where they are none that records can hold."""
    if not isinstance(metrics, Mapping):
        raise UserError(f"The metrics are {metrics!r:.60}, but they must be numbers by name.")
    plain = {name: getattr(value, "item", lambda v=value: v)() for name, value in metrics.items()}
    plain = {name: int(v) if isinstance(v, bool) else v for name, v in plain.items()}
    if wrong := {name: value for name, value in plain.items() if not kinds.NUMBER.has(value)}:
        raise UserError(f"The metrics {wrong!r:.200} are not finite numbers.")
    return plain


def _explain(error: BaseException) -> dict[str, str]:
    """What kind of failure it was, and one sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError | memory.TooLarge) or "RESOURCE_EXHAUSTED" in text:
        return {"kind": "out of memory", "reason": text[:500]}
    if isinstance(error, UserError):
        return {"kind": "not finite" if "not finite" in text else "bad input", "reason": text}
    if isinstance(error, NotImplementedError):
        return {"kind": "not implemented", "reason": text}
    return {"kind": "error", "reason": f"{type(error).__name__}: {text[:500]}"}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


class _LogFile(logging.FileHandler):
    """A log that is a record: where it can't be written, nothing else is."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exception(), OSError):  # a message that can't be put together
            return super().handleError(record)
        with written(Path(self.baseFilename)):
            raise


@contextlib.contextmanager
def _logged_to(path: Path) -> Iterator[None]:
    """Adds this module's messages to a file, and the warnings that the terminal gets."""
    with written(path):
        handler = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    loggers = (_log, logging.getLogger("absl"))
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        with contextlib.suppress(OSError):  # What is left in it was refused before.
            handler.close()


def devices_line() -> str:
    """Where everything runs, for the terminal and the log."""
    device = memory.device()
    return (
        f"process {jax.process_index()} of {jax.process_count()}, {len(jax.local_devices())} "
        f"{device.device_kind}, JAX {jax.__version__}"
    )
