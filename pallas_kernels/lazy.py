"""Modules that are imported when they are first used: Mosaic takes 0.3 s, and a process that has
its executables from an earlier one never needs it."""

import importlib
from types import ModuleType
from typing import Any


class _Lazy(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


def lazy(name: str) -> Any:
    """The module of that name."""
    return _Lazy(name)
