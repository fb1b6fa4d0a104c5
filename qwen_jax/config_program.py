"""Config files: programs of the user's that are run for the config, or the sweep, they make."""

import contextlib
import inspect
import re
import runpy
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from qwen_jax import hints, ready_made, regular_files, settings
from qwen_jax.errors import UserError


def load(where: str) -> ConfigDict:
    """The config that the program `file.py`, or `file.py:variant`, makes in `get_config`.

    Raises:
        UserError: the program can't be read or fails, or what it returns is no config.
    """
    return _checked(call(where, "get_config", "configs/haiku.py"), where.partition(":")[0])


def call(where: str, function: str, example: str) -> Any:
    """What a function of the program `file.py` returns, asked for the variant of `file.py:variant`.

    Raises:
        UserError: the program can't be read, lacks the function (`example` has one), or fails.
    """
    path, _, variant = where.partition(":")
    try:
        regular_files.opened(path).close()
    except OSError as error:
        if hint := hints.meant(path, ready_made.names()):
            why = f"{error.strerror}; did you mean {hint}?"
        else:
            why = f"{regular_files.why_not(error)[:-1]}, or see {settings.program()} configs."
        raise UserError(f"--config={path} can't be read: {why}") from error
    try:
        with _neighbours_of(path):
            get = runpy.run_path(path).get(function)
            if not callable(get):
                raise UserError(f"{path} defines no {function}(); see {example} for one.")
            # A sweep that is the same for all variants takes no argument.
            takes_variant = function == "get_config" or inspect.signature(get).parameters
            return get(variant) if variant and takes_variant else get()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        # It is the user's program and may fail in any way.
        raise UserError(_where_it_failed(error, path)) from error


_OTHER_TYPE = re.compile(
    r"^Could not override field '([^']+)' \(reference\)\. (.*) is of original type .* and cannot "
    r"be casted to type <class '(?:.*\.)?(\w+)'>$",
    re.DOTALL,
)
"""What ml_collections says of a value of another type: the field, the value, the type's name."""


@contextlib.contextmanager
def _neighbours_of(path: str) -> Iterator[None]:
    """Lets a program import the modules beside it, as Python does for the one that it is given;
    another program's neighbours of the same names are others."""
    directory, before = str(Path(path).parent.resolve()), set(sys.modules)
    sys.path.insert(0, directory)
    try:
        yield
    finally:
        sys.path.remove(directory)
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).is_relative_to(directory):
                del sys.modules[name]


def _where_it_failed(error: BaseException, path: str) -> str:
    lines = [at.lineno for at in traceback.extract_tb(error.__traceback__) if at.filename == path]
    text = str(error)
    if isinstance(error, SyntaxError):
        lines, text = [error.lineno], error.msg
    at = f"{path}, line {lines[-1]}" if lines and lines[-1] else path
    if isinstance(error, TypeError) and (wrong := _OTHER_TYPE.search(text)):
        field, value, kind = wrong.groups()
        kinds = {kind.__name__: said for kind, said in settings.KINDS.items()}
        must = kinds.get(kind, "a group of fields")
        return f"{at} sets {field} to {' '.join(value.split()):.80}, but it must be {must}."
    return f"{at}: {type(error).__name__}: {' '.join(text.split())}"


def _checked(config: Any, path: str) -> ConfigDict:
    """The default config with the fields of `config`, each of which must be known and fit."""
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"{path}: get_config() must return a ConfigDict, but returned {type(config).__name__}."
        )
    result = settings.get_config()
    settings.update(result, dict(settings.flatten(config)), f"{path}: the config")
    return result
