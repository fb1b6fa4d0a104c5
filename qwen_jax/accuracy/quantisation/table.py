"""What the types of a file cost, as tables."""

from collections.abc import Iterator, Sequence

from qwen_jax.accuracy.distribution.comparison import Estimate
from qwen_jax.accuracy.quantisation.costs import Cost, Quantisation, Upgrade
from qwen_jax.reporting.table import Table, number

MOST = 15
"""Lines of a table of tensors in a terminal; report.html and report.json have all."""


def quantisation_tables(q: Quantisation, most: int | None = MOST) -> list[Table]:
    """Everything, in sections; of tensors and of what can be moved up, so many lines."""
    return [*_sections(q, most)]


def quantisation_line(q: Quantisation) -> str:
    """What it comes to, in a sentence without its full stop."""
    if not q.tensors:
        return f"all {q.same} tensors are the base's, so that there is nothing to gain"
    said = f"the types of {q.file} cost a mean KL divergence of {_both(q.total)}"
    if first := next((up for up in q.upgrades if up.told), None):
        return f"{said}; {first.tensor} deserves more bits first, {' to '.join(first.types)}"
    return said


def _sections(q: Quantisation, most: int | None) -> Iterator[Table]:
    size = f"{q.bytes / 1e6:.2f} MB of weights, {q.bytes / q.base_bytes:.0%} of the base's"
    rows = [("file", f"{q.file}, {size}"), ("base", q.base)]
    rows.append(("text", f"{q.tokens} tokens, {q.passes:.0f} forward passes of it"))
    rows.append(("KL divergence", f"{_both(q.total)} nats a token"))
    rows.append(("same top token", f"{q.same_top:.1%}"))
    yield Table((), rows, caption=f"quantisation: {quantisation_line(q)}")
    if not q.tensors:
        return
    yield _sum_table(q)
    yield from _upgrade_tables(q, most)
    caption = (
        "what each kind and each layer costs: errors of weights and of their products, the largest "
        "RMS of each; KL of the base with it quantised, and what the file loses with it restored"
    )
    yield _cost_table(q, "kind", q.kinds, caption)
    yield _cost_table(q, "layer", q.layers)
    measured = sorted((t for t in q.tensors if t.saved), key=_saved, reverse=True)
    left = f"; {len(q.tensors) - len(measured)} of {len(q.tensors)} were left out for their cost"
    left = left if len(measured) < len(q.tensors) else ""
    if measured:
        caption = f"tensors, by what the file loses once each is the base's{left}"
        yield _cost_table(q, "tensor", measured[:most], caption + _cut(measured, most))


def _saved(cost: Cost) -> float:
    return cost.saved.value if cost.saved else 0.0


def _cut(rows: Sequence[object], most: int | None) -> str:
    return f"; the first {most} of {len(rows)}" if most is not None and len(rows) > most else ""


def _sum_table(q: Quantisation) -> Table:
    rows = [
        (
            f"{one.measured} of {one.of} {one.grain}",
            number(one.alone),
            _share(q.total.value - one.alone, q),
            number(one.saved),
            _share(q.total.value - one.saved, q),
        )
        for one in q.sums
    ]
    caption = (
        "sums of what single changes give, one at a time quantised in the base, and one at a time "
        "restored in the file; what is left of the total is interaction"
    )
    header = ("one at a time", "quantised", "left", "restored", "left")
    return Table(header, rows, range(1, 5), caption)


def _upgrade_tables(q: Quantisation, most: int | None) -> Iterator[Table]:
    told = [up for up in q.upgrades if up.told]
    if not q.upgrades:
        yield Table((), (), caption="No tensor can be moved up to the types asked for.")
        return
    rest = len(q.upgrades) - len(told)
    caption = (
        "which tensor deserves more bits: KL saved by moving one tensor up, by the megabyte; "
        f"{rest} others save no more than chance{_cut(told, most)}"
    )
    rows = [_upgrade_row(q, up) for up in told[:most]]
    header = ("tensor", "from", "to", "more bytes", "KL saved", "of total", "KL saved / MB")
    yield Table(header, rows, range(3, 7), caption)


def _upgrade_row(q: Quantisation, up: Upgrade) -> tuple[str, ...]:
    saved = _share(up.saved.value, q)
    return (
        *(_short(up.tensor), *up.types, f"{up.bytes:,}", _both(up.saved), saved),
        number(up.per_megabyte),
    )


def _cost_table(q: Quantisation, grain: str, costs: Sequence[Cost], caption: str = "") -> Table:
    rows = [
        (
            _short(cost.name),
            ", ".join(cost.types),
            f"{cost.bytes / q.bytes:.1%}",
            number(cost.weight_error),
            "-" if cost.output_error is None else number(cost.output_error),
            "-" if cost.alone is None else number(cost.alone.value),
            "-" if cost.alone is None else _share(cost.alone.value, q),
            "-" if cost.saved is None else _both(cost.saved),
            "-" if cost.saved is None else _share(cost.saved.value, q),
        )
        for cost in costs
    ]
    header = (
        grain,
        "types",
        "bytes",
        "weights",
        "output",
        "quantised",
        "share",
        "restored",
        "share",
    )
    return Table(header, rows, range(2, 9), caption)


def _short(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def _share(value: float, q: Quantisation) -> str:
    return f"{value / q.total.value:.0%}" if q.total.value else "-"


def _both(e: Estimate) -> str:
    return f"{number(e.value)} ± {e.error:.1g}".replace("e-0", "e-")
