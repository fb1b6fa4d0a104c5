"""How a prompt is to be put and answered."""

from collections.abc import Iterable
from typing import cast

from qwen_jax.engine.sampling import Sampling
from qwen_jax.text.constraint import Constraint
from qwen_jax.text.prompt import PromptOptions


class Options(PromptOptions, total=False):
    """How to answer a prompt, besides how it is put.

    Attributes:
        max_tokens: the most tokens to generate (256); the context may end the text earlier.
        sampling: how tokens are chosen; greedy by default.
        stop: a string that ends the text, or several, control tokens included; they are cut off.
        stop_ids: ids of tokens that end the text, besides the model's own; they are not shown.
        top_logprobs: None for no log-probabilities, else how many of the likeliest to report.
        constraint: what all of the answer must be, as far as max_tokens reach.
    """

    max_tokens: int
    sampling: Sampling
    stop: str | Iterable[str]
    stop_ids: Iterable[int]
    top_logprobs: int | None
    constraint: Constraint | None


PROMPT_OPTIONS = tuple(PromptOptions.__annotations__)
"""Names of those options that decide the prompt's ids."""


def prompt_options(options: Options) -> PromptOptions:
    """Those of the options that decide the prompt's ids."""
    return cast(PromptOptions, {k: v for k, v in options.items() if k in PROMPT_OPTIONS})
