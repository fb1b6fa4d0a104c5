"""`eval`: tasks of lm-evaluation-harness, one item a request to the model; needs extra `eval`."""

import functools
import importlib.util
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from qwen_jax.errors import UserError
from qwen_jax.experiments.task import Metrics, Task, Work


class Evaluate(Task):
    """Runs the config's tasks, some of which may be files of your own.

    The harness asks for everything before it scores anything; what is recorded of an interrupted
    run answers its requests without the model.
    """

    def __init__(self, config: ConfigDict):
        super().__init__(config)
        settings = config.experiment.eval
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError("The task eval needs lm-evaluation-harness: install qwen_jax[eval].")
        if not settings.tasks:
            raise UserError("experiment.eval.tasks is empty; name tasks of lm-evaluation-harness.")
        if settings.include is not None and not Path(settings.include).is_dir():
            raise UserError(f"experiment.eval.include={settings.include} is no directory.")

    def run(self, work: Work) -> Metrics:
        # Heavy, and of an extra: imported where it is needed.
        import lm_eval

        from qwen_jax.experiments.harness import Harness

        settings = self.config.experiment.eval
        answers = {item["request"]: item["response"] for item in work.recorded()}

        def keep(key: str, line: dict[str, Any]) -> None:
            work.record(request=key, **line)

        found = lm_eval.simple_evaluate(
            model=Harness(work.model(), self.config.batch_size, answers=answers, keep=keep),
            tasks=list(settings.tasks),
            num_fewshot=settings.shots,
            limit=settings.limit,
            task_manager=_manager(settings.tasks, settings.include),
            random_seed=self.config.sampling.seed,
            numpy_random_seed=self.config.sampling.seed,
            fewshot_random_seed=self.config.sampling.seed,
            bootstrap_iters=100,
            log_samples=False,
            verbosity="ERROR",
        )
        return _metrics(found["results"])


@functools.cache
def _manager(tasks: tuple[str, ...], include: str | None) -> Any:
    """Knows the tasks. The harness' own, thousands of files, are read only where they are needed:
    that takes half a minute. Raises UserError for a task that nobody knows."""
    from lm_eval.tasks import TaskManager

    if include is not None:
        own = TaskManager(include_path=include, include_defaults=False)
        if set(tasks) <= set(own.all_tasks):
            return own
    manager = TaskManager(include_path=include)
    if unknown := set(tasks) - set(manager.all_tasks):
        raise UserError(f"lm-evaluation-harness has no task {min(unknown)!r}.")
    return manager


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
