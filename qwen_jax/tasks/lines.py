"""Lines of JSON while they are made: as they come, or in the order of their places."""

import json
from collections.abc import Mapping
from types import TracebackType
from typing import IO, Any

from tqdm import tqdm

from qwen_jax.terminal import json_visible


class Lines:
    """Written to a file, with a bar of how many; what is held back is written at the end.

    Args:
        out: the open file.
        ordered: a line waits for those of all places before its own, from 0 on.
        bar: counts them.
    """

    def __init__(self, out: IO[str], ordered: bool, bar: "tqdm[Any]"):
        self._out, self._ordered, self._bar = out, ordered, bar
        self._held: dict[int, str] = {}
        self._written = 0

    def __enter__(self) -> "Lines":
        return self

    def put(self, place: int, line: Mapping[str, Any]) -> None:
        """Writes a line, or holds it back."""
        self._held[place] = json_visible(json.dumps(line, ensure_ascii=False))
        if not self._ordered:
            self._write(place)
        while self._written in self._held:
            self._write(self._written)
            self._written += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for place in sorted(self._held):
            self._write(place)

    def _write(self, place: int) -> None:
        # Around the bar, where both are on one terminal.
        tqdm.write(self._held.pop(place), self._out)
        self._out.flush()
        self._bar.update()
