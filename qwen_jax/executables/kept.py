"""Functions whose executables are kept between processes: found by shapes, without tracing.

To trace and lower a model takes Python seconds, even where XLA's part of compiling is cached, as
it is by JAX. An executable from the store is loaded by C++.
"""

import contextlib
import hashlib
import itertools
import math
import pickle
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
from absl import logging
from jax.experimental import serialize_executable

from pallas_kernels import compat
from qwen_jax.executables import identity
from qwen_jax.executables.lowering import compiled
from qwen_jax.executables.store import Store

LOADED = "/qwen_jax/executables/load_duration"
"""JAX's monitoring hears so how many seconds it took to load an executable."""

_store: Store | None = None


def keep_in(folder: Path | None) -> None:
    """From now on executables are kept in a folder; with None they aren't."""
    global _store
    _store = None if folder is None else Store(folder)


class Kept:
    """A jitted function of a module. Without a store it is just that.

    With one, its executable for some shapes and static arguments is looked for in this process,
    then in the store, and else compiled and kept. JAX's settings count as they are then.

    Args:
        home: the module, and `name` the function in it, which takes positional arguments.
        static: which of them are static.
        large: one that is the same from call to call, of so many arrays that to look at all their
            shapes again would take as long as the call. It may be let go of meanwhile.
        unless: where it says so of the arguments, the program is not to be kept.
    """

    def __init__(
        self,
        home: ModuleType,
        name: str,
        static: tuple[int, ...] = (),
        large: int | None = None,
        unless: Callable[..., bool] = lambda *_: False,
    ):
        self._home, self._name, self._static, self._unless = home, name, static, unless
        self._large, self._seen = large, _Seen(lambda: None, 0, True)
        self._numbers: dict[_Shapes, int] = {}
        self._count = itertools.count()
        self._lock = threading.Lock()
        self._found: dict[Hashable, Future[jax.stages.Compiled]] = {}

    def __call__(self, *args: Any) -> Any:
        if _store is None or self._unless(*args) or not (key := self._key(args)).here:
            return self._function(*args)
        return self._executable(key, args)(*self._dynamic(args))

    def prepare(self, *args: Any) -> None:
        """Loads or compiles what a call will need, given arrays or shapes alone."""
        if _store is None or self._unless(*args):
            compiled(self._function, *args)
        else:
            self._executable(self._key(args), args)

    @property
    def _function(self) -> Any:
        return getattr(self._home, self._name)

    def _dynamic(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(arg for i, arg in enumerate(args) if i not in self._static)

    def _key(self, args: tuple[Any, ...]) -> "_Key":
        statics = tuple([args[i] for i in self._static])
        rest = [a for i, a in enumerate(args) if i not in self._static and i != self._large]
        if self._large is None:
            return _Key(_store, statics, 0, _Shapes.of(rest), _is_here(rest))
        seen = self._seen
        if seen.what() is not (large := args[self._large]):
            number = self._numbers.setdefault(_Shapes.of(large), next(self._count))
            self._seen = seen = _Seen(weakref.ref(large), number, _is_here(large))
        return _Key(_store, statics, seen.number, _Shapes.of(rest), seen.here)

    def _executable(self, key: "_Key", args: tuple[Any, ...]) -> jax.stages.Compiled:
        # Where another thread is at it already, its result is waited for.
        if (future := self._found.get(key)) is None:
            with self._lock:
                mine = key not in self._found
                future = self._found.setdefault(key, Future())
            if mine:
                try:
                    future.set_result(self._load_or_compile(args))
                except BaseException as error:
                    del self._found[key]
                    future.set_exception(error)
        return future.result()

    def _load_or_compile(self, args: tuple[Any, ...]) -> jax.stages.Compiled:
        assert _store is not None
        start = time.perf_counter()
        device = jax.local_devices()[0]
        leaves, structure = jax.tree.flatten((self._dynamic(args), {}))
        try:
            parts = (
                f"{self._home.__name__}.{self._name}",
                identity.described(tuple(args[i] for i in self._static)),
                identity.tree(structure),
                identity.shapes(leaves),
                identity.surroundings(device),
            )
        except identity.Unnamed as error:
            logging.debug("%s is not kept, for it has no name: %s", self._name, error)
            return self._compile(args)
        name = f"{self._name}-{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()}"
        if (body := _store.get(name)) is not None:
            try:
                compat.find_runtime()
                program, result = pickle.loads(body)
                loaded = serialize_executable.deserialize_and_load(
                    program, structure, result, device.client, [device]
                )
            except Exception as error:  # of pickle's, JAX's and XLA's own kinds
                logging.debug("%s can't be loaded: %s", name, error)
            else:
                jax.monitoring.record_event_duration_secs(LOADED, time.perf_counter() - start)
                return loaded
        compiled = self._compile(args)
        try:
            program, _, result = serialize_executable.serialize(compiled)
            body = pickle.dumps((program, result))
        except Exception as error:
            logging.debug("%s can't be kept: %s", name, error)
        else:
            _store.put(name, body)
        return compiled

    def _compile(self, args: tuple[Any, ...]) -> jax.stages.Compiled:
        def shape(x: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype)

        given = (a if i in self._static else jax.tree.map(shape, a) for i, a in enumerate(args))
        with _without_jax_cache() as options:
            return compiled(self._function, *given, options=options)


@contextlib.contextmanager
def _without_jax_cache() -> Iterator[dict[str, str | bool]]:
    """Compiles on this thread go past JAX's own cache, if with these options.

    A CPU's executable that came out of that cache would lack its functions once it is serialized
    again, and nothing needs to be kept twice. An option, if only its default, makes another key.
    """
    from jax._src.config import persistent_cache_min_compile_time_secs

    with persistent_cache_min_compile_time_secs(math.inf):
        yield {"xla_embed_ir_in_executable": False}


class _Shapes(NamedTuple):
    """Of a pytree of arrays."""

    structure: Any
    leaves: tuple[tuple[tuple[int, ...], Any], ...]

    @classmethod
    def of(cls, tree: Any) -> "_Shapes":
        leaves, structure = jax.tree.flatten(tree)
        return cls(structure, tuple([(leaf.shape, leaf.dtype) for leaf in leaves]))


class _Seen(NamedTuple):
    """The large argument of the last call, and the number that its shapes have got."""

    what: Callable[[], object]
    number: int
    here: bool


class _Key(NamedTuple):
    """What tells executables apart within a process; `here` if arrays are on its device."""

    store: Store | None
    statics: tuple[Any, ...]
    large: int
    rest: _Shapes
    here: bool


def _is_here(tree: Any) -> bool:
    """Whether a call's arrays are on the default device: all are where the first one is.

    Inside a program that is being traced they are nowhere.
    """
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    if any(isinstance(array, jax.core.Tracer) for array in arrays):
        return False
    return not arrays or arrays[0].devices() == {jax.local_devices()[0]}
