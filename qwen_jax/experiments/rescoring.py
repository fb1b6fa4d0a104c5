"""Answers that are recorded, judged again: without a model, and without a change to them."""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from qwen_jax import settings
from qwen_jax.errors import UserError
from qwen_jax.experiments import inputs, lines, records
from qwen_jax.experiments.contents import METRICS, OUTPUTS, SCORES, Contents
from qwen_jax.experiments.scores import JUDGE
from qwen_jax.experiments.task import Metrics, task_names
from qwen_jax.experiments.tasks.generate import Generate, Recorded, Tally

Line = dict[str, Any]
GENERATE = "generate"
"""The task whose answers can be judged again."""


def rescore(directory: Path, names: Sequence[str]) -> int:
    """Judges the answers of finished points of `generate`; returns of how many points.

    Scores of other names that were there stay.

    Args:
        names: the scores; without any, those of each point's config.

    Raises:
        UserError: the directory is in use or holds no such answers, or the file of prompts has
            changed since.
    """
    Contents.read(directory)  # Before a lock is written where no experiment is.
    lock = records.hold(directory)
    try:
        contents = Contents.read(directory)
        contents.outputs()  # Raises where a line is damaged, or gone.
        judged = list(_judged(contents, names))
        if not judged:
            raise UserError(
                f"{directory} has no finished point with answers to judge; an experiment of the "
                "task generate has some."
            )
        _write(contents, [line for found, _ in judged for line in found])
        _tell(contents, {event["point"]: event for _, event in judged})
        return len(judged)
    finally:
        os.close(lock)


def _judged(contents: Contents, names: Sequence[str]) -> Iterator[tuple[list[Line], Line]]:
    """Of each point the lines of its units, and the event that says so."""
    ends, wanted = contents.ends, set(contents.assigned)
    for point in contents.config["points"]:
        end = ends.get(point["id"], {})
        if point["id"] in wanted and end.get("event") == "finished":
            config = config_of(contents.config, point["overrides"])
            if GENERATE not in task_names(config):
                continue
            given = tuple(names) or config.experiment.scores
            # What a model has said stays as it is.
            config.experiment.scores = tuple(name for name in given if name != JUDGE)
            config.experiment.judge = settings.get_config().experiment.judge
            if not config.experiment.scores:
                raise UserError(
                    f"{contents.path} names no scores that need no model; --scores=NAME says what "
                    "to judge by."
                )
            found, metrics = _of_point(contents, point["id"], config)
            event = {"event": "scored", "point": point["id"], "time": _now(), "metrics": metrics}
            yield found, event | {"scores": list(config.experiment.scores)}


def config_of(description: Mapping[str, Any], overrides: Mapping[str, Any]) -> ConfigDict:
    """A point's config, from what config.json says."""
    config = settings.get_config()
    known = dict(settings.flatten(config))
    fields = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in (description["config"] | overrides).items()
        if name in known  # What later versions have besides says nothing to this one.
    }
    settings.update(config, fields, "config.json")
    return config


def _of_point(contents: Contents, point: str, config: ConfigDict) -> tuple[list[Line], Metrics]:
    if not same_prompts(contents, config):
        raise UserError(
            f"{config.prompt_file} is not the file that {contents.path} had answers to; restore it "
            "to judge them."
        )
    try:
        task = Generate(config)
    except UserError as error:
        raise UserError(f"The point {point}: {error}") from error
    found: list[Line] = []

    def keep(of: str, unit: int, name: str | int, scores: Mapping[str, float]) -> None:
        found.append({"point": point, "of": of, "unit": unit, "id": name, "scores": dict(scores)})

    def read() -> Iterator[Line]:
        start = f'{{"point": "{point}"'.encode()

        def fault(line: Line) -> str:
            return task.fault_of(line) if _is_of_generate(line) else ""

        found = lines.read(contents.path / OUTPUTS, start, fault=fault)
        return filter(_is_of_generate, found)

    recorded, tally, row = Recorded(read), Tally(task, keep), 0
    for item in task.items():
        for sample in range(item.samples(config.n)):
            if row not in recorded:
                raise UserError(
                    f"{contents.path / OUTPUTS} has no answer of the point {point} to "
                    f"{item.where}; restore the file."
                )
            tally.add(row, sample, item, recorded.answer(row))
            row += 1
    return found, tally.of_scores()


def _is_of_generate(line: Line) -> bool:
    """Only of several tasks each item names its own."""
    return line.get("task", GENERATE) == GENERATE


def same_prompts(contents: Contents, config: ConfigDict) -> bool:
    """Whether a point's file of prompts is what it was: answers go with its lines."""
    name = config.prompt_file
    return name is None or inputs.of_texts(config).get(name) == contents.config["inputs"].get(name)


def _write(contents: Contents, new: Sequence[Line]) -> None:
    """One line a unit, with what was known of it before."""
    merged: dict[tuple[str, str, int], Line] = {}
    for line in (*contents.scores(), *new):
        key = line["point"], line["of"], line["unit"]
        known = merged[key]["scores"] if key in merged else {}
        merged[key] = line | {"scores": known | line["scores"]}
    encoded = (json.dumps(line, ensure_ascii=False) + "\n" for line in merged.values())
    pieces = (text.encode("utf-8", "backslashreplace") for text in encoded)
    lines.write_pieces(contents.path / SCORES, pieces)


def _tell(contents: Contents, events: Mapping[str, Line]) -> None:
    file = lines.Lines(contents.path / METRICS)
    try:
        for event in events.values():
            file.append(event)
        file.sync()
    finally:
        file.close()


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
