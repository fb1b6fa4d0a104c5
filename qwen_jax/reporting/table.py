"""One table, as text that fits a terminal; pages take it as it is."""

import dataclasses
import textwrap
from collections.abc import Collection, Iterator, Sequence

WIDTH = 100
"""Columns of a terminal's text, at most."""


@dataclasses.dataclass(frozen=True)
class Table:
    """A header and the lines under it.

    Attributes:
        header: nothing, where the first column names what the second one is.
        numbers: columns whose cells end at one edge, so that digits stand below each other.
        caption: what is to be said of all of it.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Collection[int] = ()
    caption: str = ""

    def text(self) -> str:
        """Columns as wide as they need; the last one takes what is left of 100 and wraps.

        Under its caption; without rows that is all.
        """
        caption = filled(self.caption)
        return "\n\n".join(part for part in (caption, self._lines()) if part)

    def _lines(self) -> str:
        if not self.rows:
            return ""
        lines = [tuple(line) for line in (self.header, *self.rows) if line]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        indent = sum(widths[:-1]) + 2 * len(widths[:-1])
        out = []
        for line in lines:
            cells = [
                f"{cell:>{width}}" if i in self.numbers else f"{cell:{width}}"
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ]
            before = "".join(f"{cell}  " for cell in cells[:-1])
            wrapped = textwrap.wrap(cells[-1], max(WIDTH - indent, 10)) or [""]
            out.append((before + wrapped[0]).rstrip())
            out += [" " * indent + more for more in wrapped[1:]]
        return "\n".join(out)

    def fitted(self, named: int) -> str:
        """As `text`, and where a line would be too long as `blocks`."""
        text = self.text()
        return text if max(map(len, text.split("\n"))) <= WIDTH else self.blocks(named)

    def blocks(self, named: int) -> str:
        """Columns side by side as long as they fit; what is left follows in more tables.

        All have the first columns, that many, which say which line it is; where these leave too
        little room, they are tables of their own, and the line's number stands for them.
        """
        return "\n\n".join(self._blocks(named))

    def _blocks(self, named: int) -> Iterator[str]:
        table = [list(self.header), *map(list, self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        first, left = list(range(named)), list(range(named, len(widths)))
        if sum(widths) + 2 * (len(widths) - 1) > WIDTH < 2 * sum(widths[i] + 2 for i in first):
            numbers = ["#", *map(str, range(1, len(table)))]
            table = [[number, *line] for number, line in zip(numbers, table, strict=True)]
            widths = [len(numbers[-1]), *widths]
            first, left = [0], list(range(1, len(widths)))
        while left:
            columns = [*first, left.pop(0)]
            while left and sum(widths[i] + 2 for i in (*columns, left[0])) - 2 <= WIDTH:
                columns.append(left.pop(0))
            lines = ["  ".join(f"{line[i]:>{widths[i]}}" for i in columns) for line in table]
            yield "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def filled(sentence: str) -> str:
    return textwrap.fill(sentence, WIDTH)


class Rounded(str):
    """A number as it is shown; a page says it in full where a pointer rests on it."""

    full: str

    @classmethod
    def of(cls, text: str, full: str) -> "Rounded":
        made = cls(text)
        made.full = full
        return made


def number(x: float) -> Rounded:
    """Two significant digits; exponents without their leading zero."""
    return Rounded.of(f"{x:.2g}".replace("e-0", "e-").replace("e+0", "e+"), repr(float(x)))
