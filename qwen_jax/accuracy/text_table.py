"""Plain tables that fit a terminal."""

import textwrap
from collections.abc import Sequence

WIDTH = 100


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need; the last one takes what is left of 100 and wraps."""
    lines = [tuple(header), *(tuple(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header) - 1)]
    indent = sum(widths) + 2 * len(widths)
    out = []
    for line in lines:
        before = "".join(f"{cell:{width}}  " for cell, width in zip(line, widths, strict=False))
        wrapped = textwrap.wrap(line[-1], max(WIDTH - indent, 20)) or [""]
        out.append((before + wrapped[0]).rstrip())
        out += [" " * indent + more for more in wrapped[1:]]
    return "\n".join(out)
