"""A certificate as plain text of at most 100 columns, the verdict first."""

import math
from collections.abc import Iterator

from qwen_jax.accuracy.certificate.contents import Certificate, Engine, Judged, LogDifference, Named
from qwen_jax.accuracy.finding import either, others
from qwen_jax.accuracy.measures.error_shape import ranges
from qwen_jax.reporting.table import Table, filled


def text(certificate: Certificate) -> str:
    """All of it but the hashes and the single tensors, ending in a line break."""
    return "\n\n".join(_sections(certificate)) + "\n"


def _sections(certificate: Certificate) -> Iterator[str]:
    yield filled(statement(certificate))
    size = "bound, nats" if certificate.of == "logs" else "bound/size"
    yield Table(
        ("engine", "values", "of bound", "where", size, "what it is"),
        [
            (str(i), *summary(engine), describe(engine))
            for i, engine in enumerate(certificate.engines, 1)
        ],
    ).text()
    causes = [
        (f"{i}", cause.name, layers(cause.layers), *map(at_most, (cause.before, cause.after)), line)
        for i, engine in enumerate(certificate.engines, 1)
        for cause in engine.causes
        for line in [what(cause)]
    ]
    if causes:
        header = ("engine", "cause", "layers", "as it is", "planted", "what and where")
        yield Table(header, causes).text()
    left = [
        (f"{i}", name, f"{moved:.1e}".replace("e-0", "e-"))
        for i, engine in enumerate(certificate.engines, 1)
        for name, moved in sorted(engine.not_told.items(), key=lambda item: -item[1])
    ]
    if left:
        yield Table(("engine", "not told from", "moves by at most, nats"), left).text()
    d = certificate.difference
    if isinstance(d, LogDifference):
        yield filled("".join(_of_logs(d)))
    elif d is not None:
        yield filled(
            f"logits at positions {d.positions[0]} to {d.positions[1] - 1}: they differ by "
            f"{d.largest:.2g} at most, mean KL {d.mean_kld:.2g}, max KL {d.max_kld:.2g}, same "
            f"likeliest token {d.same_top:.1%}"
        )
    yield Table(("assumption", "what it means"), [*certificate.assumptions.items()]).text()


def _of_logs(d: LogDifference) -> Iterator[str]:
    texts = f"{d.texts} texts of the same tokens in both: "
    yield texts + f"{d.values:,} log-probabilities differ by {d.largest:.2g} nats at most, "
    yield f"{d.rms:.2g} as root mean square"
    if d.parted:
        yield f"; {d.parted} of other tokens"
    if p := d.parting:
        yield (
            f", the first {p.text!r}, whose token {p.position} is {p.tokens[0]} in one and "
            f"{p.tokens[1]} in the other: {p.apart:.2g} nats apart by the model, where rounding "
            f"allows {p.bound:.2g}"
        )


def statement(certificate: Certificate) -> str:
    """The verdict, and what it does not cover."""
    engines = certificate.engines
    several = len(engines) > 1
    left_out = [
        f" Not covered{f' of engine {i}' if several else ''}: {not_covered(engine)}."
        for i, engine in enumerate(engines, 1)
        if engine.not_covered
    ]
    if certificate.of == "logs" and certificate.verdict == "unexplained":
        left_out.append(" `compare --logprobs` measures what rounding makes, and may tell more.")
    return f"{_verdict(certificate, partly=bool(left_out))}{''.join(left_out)}"


def _verdict(certificate: Certificate, partly: bool) -> str:
    engines = certificate.engines
    if certificate.verdict == "certified":
        worst = max((engine.largest for engine in engines), key=lambda one: one.fraction)
        follows = ""
        if len(engines) > 1:
            of = "as far as is covered, the" if partly else "the whole"
            follows = f"; {of} difference of both engines lies within rounding of what they declare"
        values = sum(engine.values for engine in engines)
        most = at_most(worst.fraction)
        return f"CERTIFIED: none of {values:,} values exceeds {most} of its bound{follows}."
    named = [
        f"{either(cause.name, cause.ties)}{f' in engine {i}' if len(engines) > 1 else ''}"
        for i, engine in enumerate(engines, 1)
        for cause in engine.causes
    ]
    if certificate.verdict == "cause":
        return f"NOT CERTIFIED, for a cause: {', '.join(named)}."
    number, first = next(
        (i, engine.unexplained[0]) for i, engine in enumerate(engines, 1) if engine.unexplained
    )
    of = f" of engine {number}" if len(engines) > 1 else ""
    besides = f" Named besides: {', '.join(named)}." if named else ""
    return (
        f"UNEXPLAINED, first at {place(first)}{of}: {at_most(first.fraction)} of its bound."
        f"{besides}"
    )


def summary(engine: Engine) -> tuple[str, ...]:
    largest, size = engine.largest, f"{engine.coarsest.resolution:.1e}".replace("e-0", "e-")
    return f"{engine.values:,}", at_most(largest.fraction), place(largest), size


def place(one: Judged) -> str:
    return f"{one.tensor}, position {one.position}"


def at_most(fraction: float) -> str:
    """Rounded up, for what is said is that nothing exceeds it; above 1 with digits that show it."""
    if fraction > 1:
        shown = (f"{fraction:.{digits}g}" for digits in range(2, 18))
        return next(x for x in shown if float(x) > 1).replace("e+0", "e+")
    return f"{math.ceil(fraction * 100) / 100:.2f}"


def layers(found: tuple[int | None, ...]) -> str:
    """As in "0-3, 7"; "-" stands for what is outside of them."""
    inside = {layer for layer in found if layer is not None}
    return ranges([i in inside for i in range(max(inside) + 2)]) if inside else "-"


def describe(engine: Engine) -> str:
    declared = engine.declared
    dtypes = declared["dtype"]
    if declared["activation_dtype"] != dtypes:
        dtypes += f" and activations in {declared['activation_dtype']}"
    return f"{declared['implementation']}, {dtypes}, {declared['device']}: {engine.dump}"


def what(cause: Named) -> str:
    """What is wrong, where it shows, and what speaks against it."""
    said = f"{cause.line}; seen in {', '.join(cause.operations)}"
    if cause.together:
        said += f"; together with {', '.join(cause.together)}"
    if cause.ties:
        said += f"; as well explained by {' or '.join(others(cause.ties))}"
    return said + f"; but not seen in {', '.join(cause.against)}" * bool(cause.against)


def not_covered(engine: Engine) -> str:
    left = engine.not_covered
    parts = [f"positions {a} to {b - 1}" for a, b in left.positions]
    if left.operations:
        first, *others = left.operations
        parts.append(first + f" and {len(others)} more operations" * bool(others))
    if left.tensors:
        name, why = next(iter(left.tensors.items()))
        more = f" and {len(left.tensors) - 1} more" * (len(left.tensors) > 1)
        parts.append(f"recorded, but not judged: {name}{more}, which {why}")
    return "; ".join(parts)
