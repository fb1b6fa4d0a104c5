"""What scores ask of a prompt's line."""

from collections.abc import Callable, Sequence
from typing import Any

from qwen_jax.errors import UserError
from qwen_jax.prompts import Item

Samples = Sequence[dict[str, Any]]
Score = Callable[[Item, Samples], dict[str, float]]


def field(item: Item, name: str) -> Any:
    """A field of the line. Raises UserError where it isn't there."""
    if name not in item.fields:
        raise UserError(f"{item.where} has no field {name!r}, which the score asks for; add it.")
    return item.fields[name]


def texts(item: Item, name: str) -> list[str]:
    """A field that holds a text, a number or a truth value, or a list of some, any of which will
    do. Raises UserError for anything else."""
    value = field(item, name)
    found = value if isinstance(value, list) else [value]
    if not found or not all(isinstance(one, str | int | float) for one in found):
        raise UserError(
            f"{item.where}: {name} is {value!r:.60}, but the score asks for a text, or a list of "
            "texts of which one will do."
        )
    return [str(one) for one in found]


def share(samples: Samples, right: Callable[[str], bool]) -> float:
    """Of the samples whose text is right."""
    return sum(right(sample["text"]) for sample in samples) / len(samples)
