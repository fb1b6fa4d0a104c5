"""Which fields of a config each task reads, so that a flag that would do nothing is refused."""

from collections.abc import Iterable

from qwen_jax.errors import UserError

_MODEL = (
    "model", "adapter", "sha256", "dtype", "weights", "implementation", "matmul_precision", "slots",
)  # fmt: skip
_PROMPT = ("prompt", "system", "raw", "suffix", "tools", "continue_final_message")
_ANSWER = (
    "prompt_file", "max_tokens", "stop", "stop_ids", "n", "batch_invariant", "top_logprobs",
    "generation_config", "sampling",
)  # fmt: skip

FIELDS = {
    "generate": (*_MODEL, *_PROMPT, *_ANSWER, "output", "ordered", "resume", "strict", "trace"),
    "inspect": _MODEL,
    "compare": (*_MODEL, *_PROMPT, "batch_invariant", "compare", "workdir"),
    "experiment": (*_MODEL, *_PROMPT, *_ANSWER, "experiment", "runner", "workdir"),
    "configs": (),
    "merge": ("workdir",),
    "report": ("workdir",),
}
"""Fields, or groups of them, by task."""


def reads(task: str, field: str) -> bool:
    """Whether a task looks at a field, given by its dotted name."""
    return not {field, field.partition(".")[0]}.isdisjoint(FIELDS[task])


def check(task: str, given: Iterable[tuple[str, str]]) -> None:
    """Raises UserError where one of the fields, each after what is said of it, does nothing for
    the task."""
    for said, field in given:
        if not reads(task, field):
            others = " or ".join(other for other in FIELDS if reads(other, field))
            raise UserError(f"{said} does nothing for {task}; it belongs to {others}.")
