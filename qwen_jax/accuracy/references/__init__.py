"""What a candidate is held against: float64, transformers, llama.cpp, or a recorded trace."""

import dataclasses
import importlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qwen_jax.accuracy.exact.forward import forward
from qwen_jax.accuracy.exact.parameters import CheckpointSource, Source
from qwen_jax.accuracy.traces.collecting import Collector
from qwen_jax.accuracy.traces.foreign import mapping_of, open_trace
from qwen_jax.accuracy.traces.recording import model_hash
from qwen_jax.accuracy.traces.trace import Header, Trace, config_to_json, select
from qwen_jax.errors import UserError
from qwen_jax.opening import locate
from qwen_jax.versions import version
from qwen_jax.weights.loader import Checkpoint, open_checkpoint

KINDS = ("float64", "hf", "llamacpp")


def check(kind: str) -> None:
    """Raises UserError where there is no such reference, its extra is not installed, or it is a
    file and no trace."""
    if kind in ("hf", "llamacpp"):
        importlib.import_module(f"qwen_jax.accuracy.references.{kind}")
    elif kind not in KINDS:
        # os.path answers for names that are too long, too.
        if not (os.path.isfile(kind) or os.path.isdir(kind)):  # noqa: PTH112, PTH113
            raise UserError(
                f"The reference is {kind!r:.80}, which is neither a file nor one of "
                f"{', '.join(KINDS)}; check the path."
            )
        mapping_of(Path(kind))


def reference(
    kind: str,
    model: str | Path | Checkpoint,
    tokens: Sequence[int],
    *,
    dtype: str = "float32",
    chunks: Sequence[int] | None = None,
    names: str | Sequence[str] = "*",
    start: int = 0,
    stop: int | None = None,
) -> Trace:
    """A trace of one text to compare with.

    Args:
        kind: "float64" (our operations in NumPy, the truth), "hf" (transformers), "llamacpp"
            (llama.cpp), or the path of a trace of the same model and text.
        model: as for `qwen_jax.load`, or an open checkpoint, perhaps with adapters.
        dtype: of the parameters; float64 takes them rounded to it, transformers also computes
            in it, llama.cpp has that of the file and takes none.
        chunks: how many tokens each call takes; one call by default.
        names: globs over canonical names.
        start: the first position to keep.
        stop: the one after the last; the text's end by default.

    Raises:
        UserError: the kind is unknown, its extra is not installed, the model cannot be read, or
            a recorded trace is of another model, text or position.
    """
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(locate(model))
    last = len(tokens) if stop is None else stop
    check(kind)
    if kind == "float64":
        source = CheckpointSource(checkpoint, dtype)
        return float64(
            source, tokens, dtype=dtype, chunks=chunks, names=names, start=start, stop=stop
        )
    if kind == "hf":
        from qwen_jax.accuracy.references import hf

        return hf.trace(
            checkpoint, tokens, dtype=dtype, chunks=chunks, names=names, start=start, stop=stop
        )
    if kind == "llamacpp":
        from qwen_jax.accuracy.references import llamacpp

        return llamacpp.trace(
            checkpoint, tokens, chunks=chunks, names=names, start=start, stop=stop
        )
    recorded = open_trace(kind, checkpoint.config, tokens=tokens)
    return cut(recorded, names, start, last)


def float64(
    source: Source,
    tokens: Sequence[int],
    *,
    dtype: str = "float32",
    chunks: Sequence[int] | None = None,
    names: str | Sequence[str] = "*",
    start: int = 0,
    stop: int | None = None,
) -> Trace:
    """The truth: every operation in float64, one layer's parameters in memory at a time.

    Args:
        source: where the parameters come from.
        dtype: what they were rounded to, for the header.
    """
    config = source.config
    header = Header(
        model=config.source,
        model_sha256=model_hash(config.source),
        config=config_to_json(config),
        implementation="qwen_jax in NumPy",
        dtype=dtype,
        activation_dtype="float64",
        matmul_precision="highest",
        device="cpu",
        versions={name: version(name) for name in ("qwen_jax", "numpy")},
        tokens=tuple(int(token) for token in tokens),
        start=start,
        stop=len(tokens) if stop is None else stop,
        chunks=tuple(chunks or [len(tokens)]),
    )
    collector = Collector(header, select(config, names))
    for name, value in forward(source, header.tokens[: header.stop], _until(header)):
        collector.add(name, 0, np.asarray(value))
    return collector.trace()


def _until(header: Header) -> list[int]:
    """The calls up to `stop`: what comes later has no influence, so it is not computed."""
    ends = np.minimum(np.cumsum(header.chunks), header.stop)
    lengths = np.diff(ends, prepend=0)
    return lengths[lengths > 0].tolist()


def cut(trace: Trace, names: str | Sequence[str], start: int, stop: int) -> Trace:
    """Some names and positions of a trace.

    Raises:
        UserError: a glob matches nothing, or the trace has none of the names or not all positions.
    """
    header = trace.header
    if not header.start <= start < stop <= header.stop:
        raise UserError(
            f"The trace has positions {header.start} to {header.stop}, but {start} to {stop} are "
            "asked for (the last excluded)."
        )
    wanted = [n for n in select(header.model_config, names) if n in trace.tensors]
    if not wanted:
        raise UserError(f"The trace has none of the tensors {names}.")
    collector = Collector(dataclasses.replace(header, start=start, stop=stop), wanted)
    for name in wanted:
        collector.add(name, header.start, trace.tensors[name])
    return collector.trace()
