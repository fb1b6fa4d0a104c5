"""`eval`: tasks of lm-evaluation-harness, one item a request to the model; needs extra `eval`."""

import contextlib
import functools
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from qwen_jax import hints, prompts, ready_made
from qwen_jax.errors import UserError
from qwen_jax.experiments import harness_settings, kinds
from qwen_jax.experiments.task import Metrics, Task, Work
from qwen_jax.in_force import DRAWS
from qwen_jax.settings import flatten, get_config

_SCORE = kinds.Kind(
    "a log-probability, and true or false",
    lambda value: (
        isinstance(value, list)
        and len(value) == 2
        and kinds.NUMBER.has(value[0])
        and kinds.TRUTH.has(value[1])
    ),
)
_RESPONSES = {"generate_until": kinds.TEXT, "loglikelihood": _SCORE}
"""By the type of a request."""


class Evaluate(Task):
    """Runs the config's tasks, some of which may be files of your own.

    The harness asks for everything before it scores anything; what is recorded of an interrupted
    run answers its requests without the model.
    """

    reads = (
        *("experiment.eval", "system", "max_tokens", "stop", "stop_ids", "n", "sampling"),
        "generation_config",
    )

    def __init__(self, config: ConfigDict):
        super().__init__(config)
        self.options = prompts.options_of(config)
        settings = config.experiment.eval
        if not settings.tasks:
            raise UserError("experiment.eval.tasks is empty; name tasks of lm-evaluation-harness.")
        if settings.include is not None and not ready_made.path(settings.include).is_dir():
            raise UserError(f"experiment.eval.include={settings.include} is no directory.")
        if settings.fewshot_as_multiturn and not settings.apply_chat_template:
            raise UserError(
                "experiment.eval.fewshot_as_multiturn needs experiment.eval.apply_chat_template."
            )
        if config.n != 1:
            raise UserError(
                f"n is {config.n}, but a task of lm-evaluation-harness has its own number of "
                "samples; set `repeats` in the task's file."
            )
        for name, least in (("shots", 0), ("limit", 1)):
            if settings[name] is not None and settings[name] < least:
                raise UserError(
                    f"experiment.eval.{name} is {settings[name]}, but it must be at least {least}."
                )
        harness_settings.check_installed()
        self._where = (
            tuple(settings.tasks),
            settings.include and str(ready_made.path(settings.include)),
        )
        _manager(*self._where)

    def fault_of(self, item: dict[str, Any]) -> str:
        known = kinds.among(_RESPONSES, " or ".join(_RESPONSES))
        return kinds.fault(item, {"request": kinds.TEXT, "type": known}) or kinds.fault(
            item, {"response": _RESPONSES[item["type"]]}
        )

    def run(self, work: Work) -> Metrics:
        # Heavy, and of an extra: imported where it is needed.
        import lm_eval

        from qwen_jax.experiments.harness import Harness

        settings, seed = self.config.experiment.eval, self.config.sampling.seed
        overrides = self._overrides(work.asked)
        if changed := self._changed():  # The tasks' data is read for it.
            _check_effect(changed, _configs(*self._where), overrides, settings.shots)
        answers = {item["request"]: item["response"] for item in work.recorded()}

        def keep(key: str, line: dict[str, Any]) -> None:
            work.record(request=key, **line)

        # Its processes would be forked, and JAX's threads with them; a hundred draws need none.
        os.environ.setdefault("DISABLE_MULTIPROC", "1")
        multiturn = settings.fewshot_as_multiturn
        if multiturn is None:  # As lm_eval's own command line has it.
            multiturn = settings.apply_chat_template
        # The harness prints, and our stdout is for the table.
        with contextlib.redirect_stdout(sys.stderr):
            found = lm_eval.simple_evaluate(
                model=Harness(
                    work.model(),
                    seed=seed,
                    generation_config=self.config.generation_config,
                    overrides=overrides,
                    answers=answers,
                    keep=keep,
                ),
                tasks=list(settings.tasks),
                num_fewshot=settings.shots,
                limit=settings.limit,
                task_manager=_manager(*self._where),
                apply_chat_template=settings.apply_chat_template,
                fewshot_as_multiturn=multiturn,
                system_instruction=self.config.system,
                random_seed=seed,
                numpy_random_seed=seed,
                fewshot_random_seed=seed,
                bootstrap_iters=100,
                log_samples=True,  # What each document scored is in them alone.
                verbosity="ERROR",
            )
        metrics = _metrics(found["results"])
        units = of_documents(found["samples"], metrics)
        for unit, (name, scored) in enumerate(units.items()):
            work.score("document", unit, name, scored)
        return metrics

    def _changed(self) -> list[str]:
        """Fields about answers that are not the defaults, which would be no loss."""
        default = dict(flatten(get_config()))
        return [f for f, value in flatten(self.config) if _is_of_answers(f) and value != default[f]]

    def _overrides(self, asked: Iterable[str]) -> dict[str, Any]:
        """What the config says of answers where somebody asks, in the harness' words."""
        sampling = self.options["sampling"]
        words: dict[str, dict[str, Any]] = {
            "max_tokens": {"max_gen_toks": self.options["max_tokens"]},
            "stop": {"until": list(self.options["stop"])},
            "stop_ids": {"stop_ids": list(self.options["stop_ids"])},
            "sampling.temperature": {
                "temperature": sampling.temperature,
                "do_sample": sampling.temperature > 0,
            },
        }
        found: dict[str, Any] = {}
        for field in filter(_is_of_answers, asked):
            name = field.removeprefix("sampling.")
            found |= words[field] if field in words else {name: getattr(sampling, name)}
        return found


def _is_of_answers(field: str) -> bool:
    return field in ("max_tokens", "stop", "stop_ids") or field.startswith("sampling.")


def _check_effect(
    fields: Iterable[str],
    configs: Sequence[Any],
    overrides: Mapping[str, Any],
    shots: int | None,
) -> None:
    """Raises UserError where one of the config's fields changes nothing in any task's answers."""
    tasks = {c.task: c.generation_kwargs for c in configs if c.output_type == "generate_until"}
    settings = [harness_settings.overridden(options, overrides) for options in tasks.values()]
    draws = any(harness_settings.generation(s).sampling.temperature > 0 for s in settings)
    examples = any(c.num_fewshot for c in configs) if shots is None else shots > 0
    for field in fields:
        if field == "sampling.seed" and examples:
            continue  # It chooses them, too.
        if not tasks:
            raise UserError(f"{field} changes nothing: these tasks generate no text; drop it.")
        if field.removeprefix("sampling.") in DRAWS and not draws:
            raise UserError(
                f"{field} changes nothing: {', '.join(tasks)} answers greedily; set "
                "sampling.temperature or drop it."
            )


@functools.cache
def _configs(tasks: tuple[str, ...], include: str | None) -> list[Any]:
    """What the tasks, and those of groups among them, say of themselves."""
    loaded = _manager(tasks, include).load(list(tasks))["tasks"].values()
    return [task.config for task in loaded]


@functools.cache
def _manager(tasks: tuple[str, ...], include: str | None) -> Any:
    """Knows the tasks. The harness' own, thousands of files, are read only where they are needed:
    that takes half a minute. Raises UserError for a task that nobody knows."""
    with contextlib.redirect_stdout(sys.stderr):  # It prints, and our stdout is for the table.
        from lm_eval.tasks import TaskManager

    if include is not None:
        own = TaskManager(include_path=include, include_defaults=False)
        if set(tasks) <= set(own.all_tasks):
            return own
    manager = TaskManager(include_path=include)
    if unknown := set(tasks) - set(manager.all_tasks):
        name = min(unknown)
        meant = hints.meant(name, manager.all_tasks)
        way = f"did you mean {meant}?" if meant else "`lm_eval ls tasks` lists them."
        of_own = "" if include is None else f", and {include} holds no file of it"
        raise UserError(f"lm-evaluation-harness has no task {name!r:.60}{of_own}; {way}")
    return manager


def of_documents(
    samples: Mapping[str, Sequence[Mapping[str, Any]]], metrics: Metrics
) -> dict[str, Metrics]:
    """What each document scored, by task and number, of those metrics that are means over them."""
    units: dict[str, Metrics] = {}
    for task, lines in samples.items():
        for line in lines:
            rule = "" if line["filter"] == "none" else f".{line['filter']}"
            of_one = units.setdefault(f"{task}:{line['doc_id']}", {})
            for name in line["metrics"]:
                value, metric = line[name], f"{task}.{name}{rule}"
                if isinstance(value, int | float) and metric in metrics:
                    of_one[metric] = float(value)
    for metric, value in metrics.items():
        found = [of_one[metric] for of_one in units.values() if metric in of_one]
        if found and not math.isclose(math.fsum(found) / len(found), value, abs_tol=1e-9):
            for of_one in units.values():
                of_one.pop(metric, None)
    return {name: of_one for name, of_one in units.items() if of_one}


def _metrics(results: dict[str, dict[str, Any]]) -> Metrics:
    """ "acc,none" of a task becomes task.acc, "acc_stderr,none" task.acc_error."""
    metrics: Metrics = {}
    for task, values in results.items():
        for key, value in values.items():
            name, _, rule = key.partition(",")
            if isinstance(value, int | float) and rule:
                rule = "" if rule == "none" else f".{rule}"
                ending = "_error" if name.endswith("_stderr") else ""
                metrics[f"{task}.{name.removesuffix('_stderr')}{rule}{ending}"] = float(value)
    return metrics
