"""What tokenizer.json's post_processor puts around a text."""

from pathlib import Path
from typing import Any

from qwen_jax.errors import UserError


def around(value: Any, path: Path) -> tuple[list[int], list[int]]:
    """Ids before and after a single text, as the tokenizers library puts them.

    Raises UserError for one that is malformed or of another kind. (Asking the library itself would
    be shorter, but it panics at some malformed ones.)
    """
    try:
        return _around(value)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(
            f"{path}: its post_processor is {value!r:.200}, and what that puts around a text is "
            "not known here; correct it, or get the file again from where the model is from."
        ) from None


def _around(value: Any) -> tuple[list[int], list[int]]:
    if value is None or value["type"] == "ByteLevel":  # which moves offsets only
        return [], []
    if value["type"] == "Sequence":
        before: list[int] = []
        after: list[int] = []
        for step in value["processors"]:
            first, last = _around(step)
            before, after = first + before, after + last
        return before, after
    if value["type"] in ("BertProcessing", "RobertaProcessing"):
        (_, first_id), (_, last_id) = value["cls"], value["sep"]
        return _ids([first_id]), _ids([last_id])
    if value["type"] != "TemplateProcessing":
        raise ValueError(value["type"])
    sides: list[list[int]] = [[]]
    for piece in value["single"]:
        if "Sequence" in piece:
            if piece["Sequence"]["id"] != "A":
                raise ValueError(piece)
            sides.append([])
        else:
            sides[-1] += _ids(value["special_tokens"][piece["SpecialToken"]["id"]]["ids"])
    before, after = sides
    return before, after


def _ids(values: list[Any]) -> list[int]:
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(values)
    return values
