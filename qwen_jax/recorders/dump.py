"""What every recorder writes; `recorders.source` puts this into the script that it prints."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file


class RecorderError(Exception):
    """What can't be recorded, and why, in one sentence."""


class Dump:
    """The tensors of one text, call by call, and the file that they go to.

    Args:
        path: of the dump, x.safetensors; what the names in it mean goes to x.mapping.json.

    Attributes:
        tokens: ids of the calls so far,
        chunks: and how many each call took.

    Raises:
        RecorderError: nothing can be written there.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if self.path.suffix != ".safetensors":
            raise RecorderError(f"The dump is {path}, but its name must end in .safetensors.")
        if not self.path.parent.is_dir():
            raise RecorderError(f"The dump is {path}, but there is no folder {self.path.parent}.")
        self.tokens: list[int] = []
        self.chunks: list[int] = []
        self.notes: list[str] = []
        self.calls: list[dict[str, np.ndarray]] = []
        self.tensors: dict[str, dict[str, Any]] = {}

    def begin(self, tokens: Sequence[int]) -> None:
        """A call of the engine on so many more tokens of the text."""
        self.tokens += [int(token) for token in tokens]
        self.chunks.append(len(tokens))
        self.calls.append({})

    def put(
        self,
        name: str,
        array: np.ndarray,
        axes: str | Mapping[str, str],
        layer: int | None = None,
        **more: Any,
    ) -> None:
        """An array of the call at hand, a copy that nobody else writes to.

        Args:
            axes: how it lies, in the letters of docs/trace-format.md; where it isn't the tensor of
                its own name, or not one alone, the tensors in it and how each lies.
            more: of the mapping's keys of a tensor, `dtype` and `masked`.

        Raises:
            RecorderError: it has come already.
        """
        prefix, pattern = ("", "") if layer is None else (f"layers.{layer}.", "layers.{i}.")
        if prefix + name in self.calls[-1]:
            raise RecorderError(
                f"{prefix}{name} came twice in a call; record plain inference on one text."
            )
        self.calls[-1][prefix + name] = array
        for kind, lie in ({name: axes} if isinstance(axes, str) else axes).items():
            source = f"call{{c}}.{pattern}{name}"
            self.tensors[pattern + kind] = {"from": source, "axes": lie, **more}

    def write(self, model: str, **fields: Any) -> None:
        """Writes all that every call and layer has, and says what to type next.

        Args:
            model: what `run.py compare` takes as --model.
            fields: of the mapping, such as `dtype`, `implementation` and `device`.

        Raises:
            RecorderError: there is nothing to write.
        """
        layers = sorted({int(n.split(".")[1]) for n in self.calls[0] if n.startswith("layers.")})
        arrays: dict[str, np.ndarray] = {}
        tensors: dict[str, dict[str, Any]] = {}
        for pattern, spec in self.tensors.items():
            source = spec["from"].removeprefix("call{c}.")
            each = {i: source.replace("{i}", str(i)) for i in (layers if "{i}" in pattern else [0])}
            whole = [i for i, name in each.items() if all(name in call for call in self.calls)]
            arrays |= {
                f"call{c}.{each[i]}": np.ascontiguousarray(call[each[i]])
                for c, call in enumerate(self.calls)
                for i in whole
            }
            if len(whole) == len(each):
                tensors[pattern] = spec
                continue
            self.notes.append(f"{pattern} is left out where not every call has it.")
            for i in whole:
                source = spec["from"].replace("{i}", str(i))
                tensors[pattern.replace("{i}", str(i))] = spec | {"from": source}
        if not tensors:
            raise RecorderError("None of the engine's tensors is known to this recorder.")
        mapping = {"version": 1, **fields, "notes": self.notes, "tokens": self.tokens}
        mapping |= {"chunks": self.chunks, "layers": layers, "tensors": tensors}
        part = self.path.with_suffix(".part")  # a dump is whole or not there
        save_file(arrays, part)
        text = json.dumps(mapping, indent=2) + "\n"
        self.path.with_suffix(".mapping.json").write_text(text, encoding="utf-8")
        part.replace(self.path)
        for note in self.notes:
            print(f"note: {note}")
        print(f"{self.path}: {len(arrays)} arrays, {len(self.tokens)} tokens. Next:")
        candidate = shlex.quote(str(self.path))
        print(f"  python run.py compare --model={shlex.quote(model)} --candidate={candidate}")


def token_ids(text: str) -> list[int]:
    """Raises RecorderError where it is no list of ids."""
    try:
        ids = [int(part) for part in text.split(",")]
    except ValueError:
        ids = [-1]
    if min(ids) < 0:
        raise RecorderError(f"The tokens are {text!r:.60}, but must be like 2046,299,10.")
    return ids
