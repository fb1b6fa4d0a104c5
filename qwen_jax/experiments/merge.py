"""Shards into one directory, which is then as if one machine had run all points."""

import collections
import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_jax import utf8
from qwen_jax.errors import UserError
from qwen_jax.experiments import lines
from qwen_jax.experiments.contents import (
    CONFIG,
    CONFIG_FILE,
    ENVIRONMENTS,
    LOCK,
    LOG,
    METRICS,
    OUTPUTS,
    SHARD,
    Contents,
)
from qwen_jax.experiments.moved import moved
from qwen_jax.experiments.records import difference, foreign_in, hold, refuse_foreign, unused


def shards_in(workdir: Path) -> list[Path]:
    """The shards' own directories in a workdir."""
    return sorted(path for path in workdir.glob("shard-*-of-*") if (path / CONFIG).exists())


def merge(shards: Sequence[Path], out: Path) -> list[str]:
    """Writes the shards' records into `out`; returns the ids of points that none has ended.

    `out` is then an experiment that the command without --shard goes on with.

    Raises:
        UserError: there is nothing to merge, a shard is in use, shards are of different
            experiments, a point is in two of them, a line of one is damaged or a file of it gone,
            or `out` holds an experiment already.
    """
    if len(shards) < 2:
        raise UserError(
            f"Merging takes two or more shards, but {out} has {len(shards)}; name them all."
        )
    if (out / CONFIG).exists():
        raise UserError(f"{out} holds an experiment already; give --workdir=DIRECTORY, a new one.")
    refuse_named_twice(shards)
    foreign = foreign_in(out, {LOCK, CONFIG_FILE, METRICS, OUTPUTS, LOG, ENVIRONMENTS})
    refuse_foreign(out, {name for name in foreign if not SHARD.fullmatch(name)})
    with contextlib.ExitStack() as stack:
        for path in shards:
            stack.enter_context(unused(path))
        contents = [Contents.read(path) for path in shards]
        _refuse_others(contents)
        _refuse_doubled(contents)
        for content in contents:
            collections.deque(content.outputs(), maxlen=0)  # Raises where a line is damaged.
        stack.callback(os.close, hold(out))
        return _merged(contents, out)


def _merged(contents: Sequence[Contents], out: Path) -> list[str]:
    ended = {point for content in contents for point in content.ends}
    ids = [point["id"] for point in contents[0].config["points"]]
    _write(contents, out, ids)
    return [point for point in ids if point not in ended]


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
            raise UserError(
                f"{contents[0].path} and {other.path} are of different experiments:\n{lines_of}"
            )


def refuse_named_twice(workdirs: Sequence[Path]) -> None:
    """Raises UserError where two paths are one directory."""
    seen: set[Path] = set()
    for path in workdirs:
        if path.resolve() in seen:
            raise UserError(f"{path} is named twice; leave one of them out.")
        seen.add(path.resolve())


def _refuse_doubled(contents: Sequence[Contents]) -> None:
    """A point that was only begun counts: its outputs would be doubled, too."""
    holder: dict[str, Path] = {}
    for content in contents:
        for point in content.begun:
            if point in holder:
                raise UserError(
                    f"The point {point} is in {holder[point]} and in {content.path}; each point "
                    "may be in one shard only, so leave one of them out."
                )
            holder[point] = content.path


def _write(contents: Sequence[Contents], out: Path, ids: list[str]) -> None:
    """The config goes last: without it, a merge that was cut short can be repeated."""
    for name in (METRICS, OUTPUTS, LOG):
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
