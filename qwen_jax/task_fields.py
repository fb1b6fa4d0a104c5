"""Which fields of a config each task reads, so that a flag that would do nothing is refused."""

from collections.abc import Iterable

from qwen_jax.errors import UserError

MODEL = (
    "model", "adapter", "sha256", "dtype", "weights", "implementation", "matmul_precision", "slots",
)  # fmt: skip
PROMPT = ("prompt", "system", "raw", "suffix", "tools", "continue_final_message")
ANSWER = (
    "prompt_file", "max_tokens", "stop", "stop_ids", "n", "batch_invariant", "top_logprobs",
    "generation_config", "sampling", "constrain",
)  # fmt: skip
SERVED = tuple(
    f"sampling.{name}"
    for name in (
        "temperature", "top_k", "top_p", "min_p",
        "repetition_penalty", "presence_penalty", "frequency_penalty",
    )
)  # fmt: skip
"""What a request that doesn't say is answered with; a seed for all of them would repeat answers."""

FIELDS = {
    "generate": (
        *(*MODEL, "mesh", "hosts", "speculate", *PROMPT, *ANSWER),
        *("output", "ordered", "resume", "strict", "trace"),
    ),
    "chat": (
        *(*MODEL, "mesh", "speculate", "system", "batch_invariant", "max_tokens", "stop"),
        *("stop_ids", "generation_config", "sampling"),
    ),
    "serve": (
        *(*MODEL, "mesh", *SERVED, "speculate", "batch_invariant", "max_tokens"),
        *("generation_config", "serve"),
    ),
    "inspect": (*MODEL, "mesh"),
    "compare": (*MODEL, "mesh", *PROMPT, "batch_invariant", "compare", "workdir"),
    "certify": ("model", "adapter", "sha256", "output", "compare.tokens", "dtype", "certify"),
    "experiment": (
        *(*MODEL, "mesh", "hosts", *PROMPT, *ANSWER),
        *("experiment", "runner", "answer", "workdir"),
    ),
    "configs": (),
    "recorder": (),
    "merge": ("workdir", "answer"),
    "report": ("workdir", "answer"),
    "score": ("experiment.scores", "answer"),
}
"""Fields, or groups of them, by task."""


def among(field: str, groups: Iterable[str]) -> bool:
    """Whether a field, given by its dotted name, or a group that it is in, is one of these."""
    return any(field == group or field.startswith(f"{group}.") for group in groups)


def reads(task: str, field: str) -> bool:
    """Whether a task looks at a field."""
    return among(field, FIELDS[task])


def check(task: str, given: Iterable[tuple[str, str]]) -> None:
    """Raises UserError where one of the fields, each after what is said of it, does nothing for
    the task."""
    for said, field in given:
        if not reads(task, field):
            others = " or ".join(other for other in FIELDS if reads(other, field))
            raise UserError(f"{said} does nothing for {task}; it belongs to {others}.")
