"""The answers of `generate`, prompt by prompt, settings side by side, in pages of bounded size."""

import collections
import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

from qwen_jax.errors import UserError
from qwen_jax.experiments import lines
from qwen_jax.experiments.answers import chosen
from qwen_jax.experiments.answers.settings import SEED, Setting, names_of
from qwen_jax.experiments.contents import OUTPUTS, Contents
from qwen_jax.experiments.report.answer import name as name_of
from qwen_jax.experiments.report.results import Results
from qwen_jax.experiments.rescoring import GENERATE, config_of, same_prompts
from qwen_jax.experiments.task import task_names
from qwen_jax.experiments.tasks.generate import Generate
from qwen_jax.reporting.page import Texts
from qwen_jax.terminal import visible

PAGE = 2_000_000
"""Letters of texts that one page holds, and what comes with them."""

LONGEST = 20_000
"""Letters of one text that a page shows."""

MOST = 200_000
"""Answers of one report, the first of each setting; the records have all."""

_METRICS = 6
_ASKED = ("prompt_file", "prompt", "n", "experiment.template", "experiment.task")
"""Fields on which the prompts of a point depend."""

Prompt = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Answers:
    """Pages of prompts with their answers; the first is the report's.

    Attributes:
        left_out: answers that no page has.
    """

    pages: tuple[Texts, ...]
    left_out: int = 0


def answers(results: Results, stem: str) -> Answers | None:
    """All of them, those prompts first on which settings differ most; None where there are none.

    Args:
        stem: of the names of further pages, which end in -2.html and so on.
    """
    settings, metrics = results.settings, _metrics(results)
    found = _Collected(settings, metrics)
    for run, content in zip(results.names, results.contents, strict=True):
        found.read(run, content)
    if not found.prompts:
        return None
    answer = results.answer
    ranked = metrics.index(answer.metric) if answer and answer.metric in metrics else 0
    prompts = sorted(found.prompts.values(), key=lambda prompt: -_spread(prompt, ranked))
    several = len(results.names) > 1
    shared = {
        "settings": [visible(name_of(setting, several)) for setting in settings],
        "metrics": metrics,
        "metric": ranked,
        "lower": [chosen.lower_is_better(results.asked, name) for name in metrics],
        "first": _first(results),
    }
    parts = list(_paged(prompts))
    names, start = [], 1
    for number, part in enumerate(parts, start=1):
        file = f"{stem}.html" if number == 1 else f"{stem}-{number}.html"
        names.append((f"{start:,} to {start + len(part) - 1:,}", file))
        start += len(part)
    pages = []
    for index, part in enumerate(parts):
        others = [pair for i, pair in enumerate(names) if i != index]
        pages.append(
            Texts(_caption(part, prompts, found.left_out), shared | {"prompts": part}, others)
        )
    return Answers(tuple(pages), found.left_out)


def _caption(part: Sequence[Prompt], prompts: Sequence[Prompt], left_out: int) -> str:
    said = (
        "Prompts on which settings differ most come first; words that the other one lacks are "
        "marked."
    )
    if len(part) < len(prompts):
        said += f" {len(part):,} of {len(prompts):,} prompts are on this page; others are on"
    if left_out:
        said = f"{left_out:,} answers are in {OUTPUTS} alone. {said}"
    return said


class _Collected:
    """Answers by prompt, read from records line by line."""

    def __init__(self, settings: Sequence[Setting], metrics: Sequence[str]):
        self.prompts: dict[str, Prompt] = {}
        self.left_out = 0
        self._metrics, self._count = metrics, 0
        self._points = {
            (setting.run, point.id): (index, point)
            for index, setting in enumerate(settings)
            for point in setting.points
        }

    def read(self, run: str, content: Contents) -> None:
        """Adds the answers of one directory."""
        rows: dict[str, dict[int, list[tuple[int, Any]]]] = collections.defaultdict(dict)
        names: dict[str, dict[int, str]] = collections.defaultdict(dict)
        for line in lines.read(content.path / OUTPUTS):
            if (run, line.get("point")) not in self._points or not _is_answer(line):
                continue
            if self._count >= MOST:
                self.left_out += 1
                continue
            self._count += 1
            unit = line["row"] - line["sample"]
            names[line["point"]][unit] = json.dumps(line.get("id", unit))
            rows[line["point"]].setdefault(unit, []).append((line["sample"], _shown(line)))
        asked: dict[str, dict[int, str]] = {}
        for id, units in rows.items():
            index, point = self._points[run, id]
            keys = names_of(names[id])
            text_of = _asked(content, point.overrides, asked)
            for unit, samples in sorted(units.items()):
                key = keys[unit]
                prompt = self.prompts.setdefault(
                    key, {"id": _plain(key), "asked": text_of.get(unit, ""), "of": []}
                )
                values = point.scored.values
                prompt["of"].append(
                    {
                        "setting": index,
                        "seed": point.overrides.get(SEED),
                        "scores": [values.get(name, {}).get(key) for name in self._metrics],
                        "answers": [
                            shown for _, shown in sorted(samples, key=lambda pair: pair[0])
                        ],
                    }
                )


def _is_answer(line: dict[str, Any]) -> bool:
    return isinstance(line.get("text"), str) and all(
        type(line.get(name)) is int for name in ("row", "sample")
    )


def _shown(line: dict[str, Any]) -> list[Any]:
    """A text, why it ended, and its tokens with their log-probabilities where these are there."""
    text = visible(line["text"])
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]} … and {len(text) - LONGEST:,} more letters"
    found = [text, visible(str(line.get("finish_reason")))]
    logprobs, pieces = line.get("logprobs"), line.get("pieces")
    if isinstance(logprobs, list) and isinstance(pieces, list) and len(text) <= LONGEST:
        found_of = (entry.get("logprob") for entry in logprobs if isinstance(entry, dict))
        values = [value for value in found_of if isinstance(value, int | float)]
        if len(values) == len(pieces):
            shaded = zip(pieces, values, strict=True)
            return [*found, [[visible(str(p)), round(v, 3)] for p, v in shaded]]
    return found


def _plain(key: str) -> str:
    """An id as its line has it."""
    try:
        return visible(str(json.loads(key)))
    except ValueError:  # one of several prompts of the name
        return visible(key)


def _asked(content: Contents, overrides: Any, known: dict[str, dict[int, str]]) -> dict[int, str]:
    """Prompts by their first row, where the file they are from is as it was."""
    fields = content.config["config"] | overrides
    key = repr([fields.get(name) for name in _ASKED])
    if key in known:
        return known[key]
    known[key] = {}
    with contextlib.suppress(UserError):  # The answers can be read without.
        config, row = config_of(content.config, overrides), 0
        if GENERATE in task_names(config) and same_prompts(content, config):
            for item in Generate(config).items():
                text = item.prompt if isinstance(item.prompt, str) else json.dumps(item.prompt)
                known[key][row] = visible(text[:LONGEST])
                row += item.samples(config.n)
    return known[key]


def _metrics(results: Results) -> list[str]:
    scored = dict.fromkeys(
        name
        for setting in results.settings
        for point in setting.points
        for name, of in point.scored.of.items()
        if of == "prompt"
    )
    ranked = [results.answer.metric] if results.answer else []
    return [name for name in dict.fromkeys([*ranked, *scored]) if name in scored][:_METRICS]


def _spread(prompt: Prompt, metric: int) -> float:
    values = [one["scores"][metric] for one in prompt["of"] if len(one["scores"]) > metric]
    held = [value for value in values if value is not None]
    return max(held) - min(held) if held else 0.0


def _first(results: Results) -> list[int]:
    """Which two settings stand beside each other at first: the baseline, and the worst of all or,
    where that is the baseline, the best."""
    if results.answer is None:
        return [0, min(1, len(results.settings) - 1)]
    ranked = [entry.setting for entry in results.answer.entries]
    base = results.answer.baseline
    other = ranked[0] if base is ranked[-1] else ranked[-1]
    return [results.settings.index(base), results.settings.index(other)]


def _paged(prompts: Sequence[Prompt]) -> Iterator[list[Prompt]]:
    part: list[Prompt] = []
    size = 0
    for prompt in prompts:
        own = len(json.dumps(prompt, ensure_ascii=False))
        if part and size + own > PAGE:
            yield part
            part, size = [], 0
        part.append(prompt)
        size += own
    if part:
        yield part
