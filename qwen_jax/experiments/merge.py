"""Shards into one directory, which is then as if one machine had run all points."""

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qwen_jax import regular_files, utf8
from qwen_jax.errors import UserError
from qwen_jax.experiments import lines
from qwen_jax.experiments.contents import (
    CONFIG,
    CONFIG_FILE,
    ENVIRONMENTS,
    JUDGEMENTS,
    LOCK,
    LOG,
    METRICS,
    OUTPUTS,
    SCORES,
    SHARD,
    Contents,
)
from qwen_jax.experiments.moved import moved
from qwen_jax.experiments.records import difference, foreign_in, hold, refuse_foreign, unused
from qwen_jax.settings import program

_FILES = (METRICS, OUTPUTS, SCORES, JUDGEMENTS, LOG)
"""What shards have a part of each."""


class Missing(NamedTuple):
    """What a merged experiment lacks.

    Attributes:
        points: ids of those that no shard has ended.
        shards: those of which there is no directory, as in "2/3".
    """

    points: list[str]
    shards: list[str]


def merge(named: Sequence[Path], out: Path | None) -> Missing:
    """Writes shards' records into one directory; returns what is missing of them.

    It is then an experiment that the command without --shard goes on with.

    Args:
        named: shards' own directories, and workdirs, which stand for the shards in them.
        out: where it goes; by default into the one workdir that is named.

    Raises:
        UserError: there is nothing to merge, a shard is in use, shards are of different
            experiments, a point is in two of them, a line of one is damaged or a file of it gone,
            or `out` holds an experiment already.
    """
    refuse_named_twice(named)
    shards = [shard for path in named for shard in _shards_in(path)]
    refuse_named_twice(shards)
    with contextlib.ExitStack() as stack:
        for path in shards:
            stack.enter_context(unused(path))
        contents = [Contents.read(path) for path in shards]
        _refuse_others(contents)
        _refuse_doubled(contents)
        for content in contents:
            content.outputs()  # Raises where a line is damaged, or gone.
        if out is None:
            out = _only(named, contents)
        _refuse_used(out)
        stack.callback(os.close, hold(out))
        return _merged(contents, out)


def _shards_in(path: Path) -> list[Path]:
    """The shards in a workdir; any other directory is to be one itself."""
    if not os.path.isdir(path):  # noqa: PTH112 - which answers for names that are too long, too
        return [path]
    found = (shard for shard in path.glob("shard-*-of-*") if (shard / CONFIG).exists())
    return sorted(found) or [path]


def _only(named: Sequence[Path], contents: Sequence[Contents]) -> Path:
    """The one workdir that is named, whose shards are put together in it."""
    if len(named) > 1:
        raise UserError("--workdir=DIRECTORY must say where the merged experiment goes.")
    path, shard = named[0], contents[0].config["shard"]
    if contents[0].path != path:
        return path
    if shard is None:
        raise UserError(
            f"{path} is a whole experiment, with nothing to merge; {program()} report {path} "
            "shows it."
        )
    raise UserError(
        f"{path} is the shard {shard} by itself; name the workdir in which it and the others lie, "
        f"as in {program()} merge {path.parent}, or all of them."
    )


def _refuse_used(out: Path) -> None:
    if (out / CONFIG).exists():
        raise UserError(
            f"{out} holds an experiment already, which {program()} report {out} shows; to merge "
            "once more, give --workdir=DIRECTORY, a new one."
        )
    foreign = foreign_in(out, {LOCK, CONFIG_FILE, *_FILES, ENVIRONMENTS})
    refuse_foreign(out, {name for name in foreign if not SHARD.fullmatch(name)})


def _merged(contents: Sequence[Contents], out: Path) -> Missing:
    ended = {point for content in contents for point in content.ends}
    ids = [point["id"] for point in contents[0].config["points"]]
    _write(contents, out, ids)
    return Missing([point for point in ids if point not in ended], _missing_shards(contents))


def _missing_shards(contents: Sequence[Contents]) -> list[str]:
    """Where all are of one number, those that are not there."""
    there = [content.config["shard"] for content in contents if content.config["shard"]]
    counts = {shard.partition("/")[2] for shard in there}
    if len(counts) != 1 or not (count := counts.pop()).isdigit():
        return []
    # A million that are missing would say no more than the first of them.
    names = (f"{i}/{count}" for i in range(1, min(int(count), 10_000) + 1))
    return [name for name in names if name not in there]


def _refuse_others(contents: Sequence[Contents]) -> None:
    own: dict[str, Any] = {"shard": None, "assigned": [], "config_file": ""}
    for other in contents[1:]:
        if changes := difference(contents[0].config | own, other.config | own):
            hints = [
                f"{m.name} is at commit {m.old} in one and {m.new} in the other; run the other's "
                f"points with {m.pinned}."
                for m in moved(contents[0].config, other.config)
            ]
            lines_of = "\n".join([*hints, changes])
            first = contents[0].path
            raise UserError(
                f"{first} and {other.path} are of different experiments, which "
                f"{_side_by_side(first, other.path)}:\n{lines_of}"
            )


def _side_by_side(*paths: Path) -> str:
    return f"{program()} report {' '.join(map(str, paths))} lays side by side"


def refuse_named_twice(workdirs: Sequence[Path]) -> None:
    """Raises UserError where two paths are one directory."""
    seen: set[Path] = set()
    for path in workdirs:
        if regular_files.resolved(path) in seen:
            raise UserError(f"{path} is named twice; leave one of them out.")
        seen.add(regular_files.resolved(path))


def _refuse_doubled(contents: Sequence[Contents]) -> None:
    """A point that was only begun counts: its outputs would be doubled, too."""
    holder: dict[str, Contents] = {}
    for content in contents:
        for point in content.begun & holder.keys():
            one, other = holder[point], content
            if one.config["shard"] is None is other.config["shard"]:
                raise UserError(
                    f"{one.path} and {other.path} are no shards: both have the point {point}; "
                    f"{_side_by_side(one.path, other.path)}."
                )
            raise UserError(
                f"The point {point} is in {one.path} and in {other.path}; each point may be in one "
                "shard only, so leave one of them out."
            )
        holder |= dict.fromkeys(content.begun, content)


def _write(contents: Sequence[Contents], out: Path, ids: list[str]) -> None:
    """The config goes last: without it, a merge that was cut short can be repeated."""
    for name in _FILES:
        with lines.placed(out / name) as temporary, temporary.open("wb") as merged:
            for content in contents:
                # Line by line: a killed process may have left half of one.
                merged.writelines(lines.whole(content.path / name))
    environments = {path.name: path for content in contents for path in content.environments}
    with lines.written(out / ENVIRONMENTS):
        (out / ENVIRONMENTS).mkdir(exist_ok=True)
    for name, path in environments.items():
        lines.write_atomically(out / ENVIRONMENTS / name, utf8.read(path))
    lines.write_atomically(out / CONFIG_FILE, contents[0].source)
    config = contents[0].config | {"shard": None, "assigned": ids}
    text = json.dumps(config, indent=1, ensure_ascii=False)
    lines.write_atomically(out / CONFIG, text)
