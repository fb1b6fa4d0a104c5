"""All ways through a cache that an engine takes, and some that it could."""

from collections.abc import Sequence

from qwen_jax.accuracy.cache.slots import WIDTH, Part, Row, Scenario
from qwen_jax.engine.shapes import Shapes, pieces_of
from qwen_jax.model.cache import PAGE

LENGTH = 2 * PAGE + 40
"""Tokens of the text: two full pages and some of a third one, which decoding enters."""

PADDED = 2 * PAGE + PAGE // 2
"""Of all in one call: a multiple of what kernels take."""

PROMPT = 2 * PAGE - 8

FULL = WIDTH * PAGE
"""Tokens that a context must have room for."""


def scenarios(tokens: Sequence[int], other: Sequence[int], shapes: Shapes) -> list[Scenario]:
    """All of them; a text has pages 1, 2 and 3, and slot 0, where nothing else is said.

    Args:
        tokens: the text, `LENGTH` tokens.
        other: as many of another one.
        shapes: of the engine's calls.
    """
    text, different = tuple(tokens[:LENGTH]), tuple(other[:LENGTH])
    whole, half = Row(text, LENGTH), Row(text, PROMPT)
    page_each = tuple(Part(0, at, min(PAGE, LENGTH - at), PAGE) for at in range(0, LENGTH, PAGE))
    long = (text + different)[:FULL]
    full = Row(long, FULL - 8)
    past_the_end = (Part(0, FULL, 0, 1, decode=True),)
    before = Row(long[:3:-1], FULL - 12, gone=True)
    several = (
        Row(text, PROMPT, (1, 4, 2), slot=2),
        Row(different[: PAGE + 30], 100, (6, 3), slot=0),
        Row(text[50:90], 31, (5,), slot=1),
    )
    # They begin alike to the middle of the second page, and share the first one.
    branch = (text[:200] + different)[:LENGTH]
    alike = (half, Row(branch, PROMPT - 9, (1, 4, 5), slot=1, shared=PAGE))

    def scenario(name: str, *rows: Row, poisoned: bool = False) -> Scenario:
        return Scenario(name, rows, calls(rows, range(len(rows)), shapes), poisoned)

    return [
        Scenario("one call", (whole,), ((Part(0, 0, LENGTH, PADDED),),)),
        scenario("pieces", whole),
        Scenario("pieces in one call", (whole,), (page_each,)),
        scenario("token by token", Row(text[: PAGE + 16], 0)),
        scenario("prompt, then decoding", half),
        scenario("pages in any order", Row(text, PROMPT, (3, 1, 4))),
        _after("used slot", before, Row(text, PROMPT, (5, 4, 6)), shapes),
        _after("used slot and pages", before, Row(text, PROMPT, (3, 2, 1)), shapes),
        scenario("several texts", *several),
        scenario("shared page", *alike),
        Scenario("full cache", (full,), (*calls((full,), [0], shapes), past_the_end)),
        scenario("NaN in unused slots", half, poisoned=True),
    ]


def _after(name: str, first: Row, second: Row, shapes: Shapes) -> Scenario:
    """A text that begins when another has ended."""
    rows = first, second
    return Scenario(name, rows, (*calls(rows, [0], shapes), *calls(rows, [1], shapes)))


def calls(
    rows: Sequence[Row], which: Sequence[int], shapes: Shapes
) -> tuple[tuple[Part, ...], ...]:
    """The prompts of some rows enter one after another, then all decode together."""
    entering = [
        (Part(number, *piece),)
        for number in which
        for piece in pieces_of(rows[number].shared, rows[number].prompt, shapes)
    ]
    longest = max(len(rows[number].tokens) - rows[number].prompt for number in which)
    decoding = [
        tuple(_step(number, rows[number], count) for number in which) for count in range(longest)
    ]
    return (*entering, *decoding)


def _step(number: int, row: Row, count: int) -> Part:
    start = min(row.prompt + count, len(row.tokens))
    return Part(number, start, int(start < len(row.tokens)), 1, decode=True)
