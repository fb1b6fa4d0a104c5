"""What Python callers give, held against the types that a function or a dataclass declares.

A wrong one is told in a sentence where it is given; without this it would surface as a TypeError of
NumPy or JAX far inside, or, as `batch_invariant="no"`, do the opposite in silence. Contents of
iterables that may be gone through but once, and values of mappings, are left to whoever reads them.
"""

import collections.abc
import dataclasses
import functools
import inspect
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, Union, Unpack, get_args, get_origin

import jax
import numpy as np

from qwen_jax import hints, strict_json
from qwen_jax.engine.sampling import Sampling, is_whole
from qwen_jax.errors import UserError

P = ParamSpec("P")
T = TypeVar("T")

_WORDS: dict[Any, tuple[str, str]] = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("True or False", "True or False"),
    str: ("a text", "texts"),
    Path: ("a Path", "Paths"),
    type(None): ("None", "None"),
    collections.abc.Mapping: ("a dict", "dicts"),
}
_OF_JSON = _WORDS | {
    bool: ("true or false", "true or false"),
    type(None): ("null", "null"),
    collections.abc.Mapping: ("an object", "objects"),
}

_SAMPLING = [field.name for field in dataclasses.fields(Sampling)]

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """The function, which raises UserError where an argument is not of its declared type."""
    signature = inspect.signature(function)
    kinds = {name: parameter.annotation for name, parameter in signature.parameters.items()}

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise UserError(f"{function.__name__}: {error}.") from error
        for name, value in given.items():
            if get_origin(kinds[name]) is Unpack:
                (options,) = get_args(kinds[name])
                _check_known(function.__name__, value, [*options.__annotations__, *kinds])
                for option in value.keys() & options.__annotations__.keys():
                    check(option, value[option], options.__annotations__[option])
            elif kinds[name] is not inspect.Parameter.empty:
                check(name, value, kinds[name])
        return function(*args, **kwargs)

    return call


def _check_known(function: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raises UserError for a name that is no argument's."""
    for name in given:
        if name in known:
            continue
        hint = hints.meant(name, known)
        if (field := hints.meant(name, _SAMPLING, 0.8)) and not hint:
            hint = f"sampling=Sampling({field}=…)"
        meant = f"; did you mean {hint}?" if hint else f": it takes {', '.join(known)}."
        raise UserError(f"{function} takes no argument {name!r:.60}{meant}")


def check_fields(instance: Any) -> None:
    """Raises UserError where a field of a dataclass is not of its declared type."""
    for field in dataclasses.fields(instance):
        check(field.name, getattr(instance, field.name), field.type)


def check(name: str, value: Any, kind: Any, *, json: bool = False) -> None:
    """Raises UserError where a value is not of a type, which may be any annotation used here.

    Args:
        json: it was given as JSON, in whose words it is told.
    """
    if not fits(value, kind):
        shown, wanted = _shown(value, json), words(kind, of=_OF_JSON if json else _WORDS)
        text = f"{name} is {shown}, but it must be {wanted}{_item(value, kind, json)}."
        raise UserError(text, field=name)


def _shown(value: Any, json: bool) -> str:
    return strict_json.written(value) if json else " ".join(_SHORT.repr(value).split())


def _item(value: Any, kind: Any, json: bool) -> str:
    """Of a list, the first item that is of no type that it might be, in words."""
    if isinstance(value, str | bytes) or not isinstance(value, collections.abc.Sequence):
        return ""
    of = [get_args(part)[0] for part in (kind, *get_args(kind)) if get_origin(part) in _LISTS]
    wrong = [[i for i, item in enumerate(value) if not fits(item, part)][:1] for part in of]
    if not (found := max(wrong, default=[])):
        return ""
    return f"; item {found[0]} is {_shown(value[found[0]], json)}"


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type: numbers of NumPy are numbers, arrays of one axis are lists of
    them, True is none, and a text is no list of texts."""
    if type(value) is kind:
        return True
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any or isinstance(kind, TypeVar | str):
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if kind is int:
        return is_whole(value)
    if kind is float:
        return is_whole(value) or isinstance(value, float | np.floating)
    if kind is bool:
        return isinstance(value, bool | np.bool_)
    if isinstance(value, str | bytes) and origin in _LISTS:
        return False
    if isinstance(value, np.ndarray | jax.Array) and origin in _LISTS:
        return value.ndim == 1 and parts[0] in (int, float) and fits(value.dtype.type(0), parts[0])
    if origin is tuple and parts[1:] != (...,):
        whole = isinstance(value, tuple | list) and len(value) == len(parts)
        return whole and all(map(fits, value, parts))
    if not isinstance(value, origin or kind):
        return False
    if origin not in _LISTS or not isinstance(value, collections.abc.Sequence):
        return True
    return all(fits(item, parts[0]) for item in _telling(value))


_LISTS = (collections.abc.Sequence, collections.abc.Iterable, list)


def _telling(items: typing.Sequence[Any]) -> typing.Iterable[Any]:
    """One item of each type, where the type tells all: a prompt may have 100,000 ids."""
    ones = {type(item): item for item in items}
    containers = (collections.abc.Sequence, np.ndarray)
    nested = any(issubclass(kind, containers) and kind is not str for kind in ones)
    return items if nested else ones.values()


def words(
    kind: Any, plural: bool = False, of: typing.Mapping[Any, tuple[str, str]] = _WORDS
) -> str:
    """A type in words: `of` has those of its simple parts, and of several such."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        said = [words(part, plural, of) for part in parts]
        return " or ".join((", ".join(said[:-1]), said[-1]))
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if (simple := origin or kind) in of:
        return of[simple][plural]
    if origin in _LISTS:
        return f"{'lists' if plural else 'a list'} of {words(parts[0], True, of)}"
    if origin is tuple:
        return f"({', '.join(words(part, of=of) for part in parts)})"
    if origin is collections.abc.Callable:
        return "a function"
    return f"{getattr(kind, '__name__', kind)}s" if plural else f"a {kind.__name__}"
