"""A certificate computed again from the same inputs, and compared field by field."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax import opening, regular_files, strict_json
from qwen_jax.accuracy.certificate.contents import VERSION, Certificate
from qwen_jax.accuracy.certificate.inputs import owners, place
from qwen_jax.accuracy.certificate.issuing import issue, versions
from qwen_jax.accuracy.certificate.logs import is_log
from qwen_jax.accuracy.finding import Progress
from qwen_jax.accuracy.traces.foreign import dump_of
from qwen_jax.errors import UserError
from qwen_jax.weights.open_files import OpenFile

_OF_BOUND = ("fraction", "before", "after")
_CLOSE, _FRACTION = 1e-12, 1e-6
"""Two machines may sum in float64 in other orders: an error of 2^-53 sqrt(n), in the fraction of a
bound of 8 * 2^-24 sqrt(n) or more."""


@dataclasses.dataclass(frozen=True)
class Change:
    """A field whose value is not what comes out now."""

    field: str
    recorded: Any
    found: Any

    def __str__(self) -> str:
        return f"{self.field} is {self.recorded!r:.80}, but comes out as {self.found!r:.80}"


def verify(
    path: str | Path,
    dumps: Sequence[str | Path] = (),
    *,
    model: str | Path | None = None,
    adapter: Sequence[str | Path] | None = None,
    progress: Progress | None = None,
) -> Change | None:
    """Whether a certificate is what its inputs give: first their hashes, then every number.

    Args:
        path: of the certificate.
        dumps, model, adapter: where the inputs are now, if they have moved.
        progress: hears of operations done and in all.

    Returns:
        The first field that differs, or None where all is the same. Versions may differ.

    Raises:
        UserError: the certificate is damaged, or an input is not there.
    """
    recorded = read(path)
    engines = recorded["engines"]
    if dumps and len(dumps) != len(engines):
        raise UserError(f"{path}: it is of {len(engines)} dumps, but {len(dumps)} are named.")
    names = [str(dump) for dump in dumps] or [engine["dump"] for engine in engines]
    named = recorded["model"] if model is None else model
    adapters = recorded["adapters"] if adapter is None else adapter
    if changed := _changed_input(Path(path), recorded, str(named), adapters, names):
        return changed
    again = issue(
        opening.open_model(named, adapters),
        names,
        model=str(named),
        adapters=[str(one) for one in adapters],
        tokens=recorded["tokens"],
        dtype=recorded["dtype"],
        progress=progress,
    )
    found = json.loads(again.to_json())
    for moved in ("model", "adapters", "versions"):
        found[moved] = recorded[moved]
    for was, now in zip(engines, found["engines"], strict=True):
        now["dump"] = was["dump"]
    given = {"engine": bool(dumps), "checkpoint": model is not None, "adapter": adapter is not None}
    for was, now in zip(recorded["inputs"], found["inputs"], strict=False):
        if given[was["of"].split(" ")[0]] and was["sha256"] == now["sha256"]:
            now["file"] = was["file"]  # the same one by another name
    return next(_changes(str(path), recorded, found), None)


def other_versions(recorded: Mapping[str, Any]) -> str:
    """What computed a certificate, where it is not what computes now; else nothing."""
    ours = versions()
    made = {name: of for name, of in recorded["versions"].items() if of != ours.get(name)}
    return ", ".join(f"{name} {of}" for name, of in made.items())


def read(path: str | Path) -> dict[str, Any]:
    """A certificate's fields, of which those that say what to compute are what they must be.

    Raises UserError where it can't be read, or is damaged.
    """
    path = Path(path)
    fields = strict_json.read_object(path, most=regular_files.MOST_BYTES, expected="certificate")
    if missing := {"verdict", "engines"} - fields.keys():  # it is something else
        raise _damaged(path, min(missing), "missing")
    if fields.get("version") != VERSION:
        raise UserError(
            f"{path}: its version is {fields.get('version')!r:.40}, but this is for certificates "
            f"of version {VERSION}; verify it with the qwen_jax that made it."
        )
    known = {field.name for field in dataclasses.fields(Certificate)}
    if odd := fields.keys() ^ known:
        raise _damaged(path, min(odd), "missing" if min(odd) in known else "unknown")
    for name, is_sound in _SOUND.items():
        if not is_sound(fields[name]):
            raise _damaged(path, name, f"{fields[name]!r:.60}")
    return fields


def _texts(x: Any) -> bool:
    return isinstance(x, list) and all(isinstance(text, str) for text in x)


def _ids(x: Any) -> bool:
    return isinstance(x, list) and all(type(token) is int for token in x)


def _is_engine(x: Any) -> bool:
    return isinstance(x, dict) and isinstance(x.get("dump"), str)


def _is_input(x: Any) -> bool:
    return isinstance(x, dict) and _texts([x.get(name) for name in ("of", "file", "sha256")])


_SOUND: dict[str, Callable[[Any], bool]] = {
    "model": lambda x: isinstance(x, str),
    "adapters": _texts,
    "tokens": lambda x: x is None or _ids(x),
    "dtype": lambda x: x is None or isinstance(x, str),
    "engines": lambda x: isinstance(x, list) and len(x) in (1, 2) and all(map(_is_engine, x)),
    "inputs": lambda x: isinstance(x, list) and all(map(_is_input, x)),
    "versions": lambda x: isinstance(x, dict) and _texts(list(x.values())),
}
"""Of fields that say what to compute; all others are compared with what comes out."""


def _damaged(path: Path | str, field: str, what: str) -> UserError:
    return UserError(f"{path}: it is damaged: the field {field} is {what}; issue it anew.")


def _changed_input(
    path: Path,
    recorded: dict[str, Any],
    model: str,
    adapters: Sequence[str | Path],
    dumps: Sequence[str],
) -> Change | None:
    """The first file that is not the one that was read."""
    owned = owners(
        opening.locate(model),
        [opening.locate_adapter(one) for one in adapters],
        [Path(dump) if is_log(dump) else dump_of(dump) for dump in dumps],
    )
    for i, one in enumerate(recorded["inputs"]):
        if one["of"] not in owned:
            raise _damaged(path, f"inputs.{i}.of", f"{one['of']!r:.60}")
        file = place(one, recorded["inputs"], owned[one["of"]])
        found = OpenFile(file).sha256()
        if found != one["sha256"]:
            return Change(f"inputs.{i}.sha256 ({file})", one["sha256"], found)
    return None


def _changes(path: str, recorded: Any, found: Any, field: str = "") -> Iterator[Change]:
    """Raises UserError where one of both has a field that the other has not."""
    inner = field + "." if field else ""
    if isinstance(recorded, dict) and isinstance(found, dict):
        if odd := recorded.keys() ^ found.keys():
            raise _damaged(path, inner + min(odd), "missing" if min(odd) in found else "unknown")
        for name in found:
            yield from _changes(path, recorded[name], found[name], inner + name)
    elif isinstance(recorded, list) and isinstance(found, list) and len(recorded) == len(found):
        for i, (was, now) in enumerate(zip(recorded, found, strict=True)):
            yield from _changes(path, was, now, f"{inner}{i}")
    elif type(recorded) is type(found) is float:
        close = _FRACTION if field.rpartition(".")[2] in _OF_BOUND else _CLOSE
        if not math.isclose(recorded, found, rel_tol=_FRACTION, abs_tol=close):
            yield Change(field, recorded, found)
    elif recorded != found or type(recorded) is not type(found):
        yield Change(field, recorded, found)
