"""Numbers of a JSON schema that llguidance keeps as they are, and those that it would change.

It reads each as a float of 64 bits, and not always as the nearest one, so that an integer beyond
2^53 and a float of 17 digits may come out as another number.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any, TypeGuard

from qwen_jax.errors import UserError

_WHOLE = (1 << 53) - 1
"""Up to here a float holds every integer, and the next."""
_POWERS = 22
"""Up to here a float holds 10^n, so that digits that it holds, over that, are rounded once."""
_MOST_MULTIPLE = (1 << 32) // 10
"""Of multipleOf's digits: llguidance has 32 bits for ten times a remainder."""
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is one of JSON's: true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_kept(number: float) -> bool:
    """Whether llguidance writes this number for this number, and an integer only for one."""
    if isinstance(number, int) or abs(number) > _WHOLE:
        return abs(number) <= _WHOLE
    _, digits, exponent = Decimal(repr(number)).as_tuple()
    assert isinstance(exponent, int)  # Infinity is no number of JSON.
    whole = int("".join(map(str, digits)))
    return int(float(whole)) == whole and abs(exponent) <= _POWERS


def changed(value: Any) -> Iterator[float]:
    """The numbers in a value of JSON that llguidance would change."""
    if is_number(value):
        if not is_kept(value):
            yield value
    elif isinstance(value, list):
        for item in value:
            yield from changed(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from changed(item)


def changed_bounds(schema: Mapping[str, Any]) -> Iterator[int]:
    """The bounds of an integer that llguidance would move, or make nothing of."""
    if schema.get("type") != "integer":
        return
    for name in BOUNDS:
        bound = schema.get(name)
        if type(bound) is not int or is_kept(bound):
            continue
        largest = bound == (1 << 63) - 1  # that it knows, and any beyond become
        in_floats = abs(bound) < 10**18 and float(bound) == bound
        if not (largest and name == "maximum") and not (in_floats and name in BOUNDS[:2]):
            yield bound


def check(schema: Mapping[str, Any], place: str) -> None:
    """Raises UserError where bounds that are no integer's, or a multiple, would be moved."""
    for name in BOUNDS:
        bound = schema.get(name)
        plain = name.removeprefix("exclusive").lower()
        if bound is True and plain not in schema:
            raise UserError(
                f"{place}/{name} of the JSON schema is true, which says nothing without {plain}; "
                "give a number."
            )
        if bound is None or isinstance(bound, bool):
            continue
        of_integer = schema.get("type") == "integer" and isinstance(bound, int)
        if not of_integer and not is_kept(bound):
            raise UserError(
                f"{place}/{name} of the JSON schema is {bound!r:.60}, which would be rounded; give "
                'one of 15 digits at most, or a whole number beside "type": "integer".'
            )
    if "multipleOf" in schema:
        _check_multiple(schema["multipleOf"], place)


def check_together(multiples: Collection[float]) -> None:
    """Raises UserError where llguidance can't find the least common multiple of two of them."""
    exact = [abs(Decimal(repr(number))).normalize() for number in multiples]
    places = max((-int(number.as_tuple().exponent) for number in exact), default=0)
    largest = sorted(int(number.scaleb(max(places, 0))) for number in exact)[-2:]
    if len(largest) > 1 and math.prod(largest) > _MOST_MULTIPLE:
        shown = ", ".join(f"{number!r:.20}" for number in multiples)
        raise UserError(
            f"The JSON schema has multipleOf {shown:.100} and allOf, anyOf or $ref, by which a "
            "number may have to be of two of them, which have too many digits together; give one."
        )


def _check_multiple(number: float, place: str) -> None:
    """Finds digits as llguidance does: times ten, until nothing is behind the point."""
    if number == 0:
        raise UserError(f"{place}/multipleOf of the JSON schema is 0; give a number above it.")
    exact = abs(Fraction(repr(number)))
    value, places = abs(float(number)), 0
    while value % 1 and value <= _MOST_MULTIPLE:
        value, places = value * 10, places + 1
    if value > _MOST_MULTIPLE or Fraction(int(value), 10**places) != exact:
        raise UserError(
            f"{place}/multipleOf of the JSON schema is {number!r:.60}, of more digits than an "
            "answer can be held to; give fewer."
        )
