"""What a program asks of the laboratory; `run.py compare` and `run.py certify` ask the same."""

from collections.abc import Sequence
from pathlib import Path

from qwen_jax import opening
from qwen_jax.accuracy.certificate.contents import Certificate
from qwen_jax.accuracy.certificate.issuing import issue
from qwen_jax.accuracy.certificate.verifying import Change, verify
from qwen_jax.accuracy.distribution.comparison import CONTEXT, read_tokens
from qwen_jax.accuracy.exact.parameters import CheckpointSource
from qwen_jax.accuracy.finding import Progress
from qwen_jax.accuracy.quantisation import lens
from qwen_jax.accuracy.references import reference as reference_trace
from qwen_jax.accuracy.report import Report
from qwen_jax.accuracy.tensors import comparison
from qwen_jax.accuracy.tensors.diagnosis import diagnose
from qwen_jax.accuracy.traces.foreign import open_trace
from qwen_jax.accuracy.traces.trace import Trace
from qwen_jax.loading import read_tokenizer
from qwen_jax.reporting.model import described
from qwen_jax.weights.loader import Checkpoint

__all__ = ["Certificate", "Change", "Report", "certify", "compare", "quantisation_costs", "verify"]

ONE_POSITION = "One position: a wrong rotary embedding is the identity there; give a longer text."


def compare(
    candidate: str | Path | Trace,
    *,
    model: str | Path = opening.BUNDLED,
    adapter: str | Path | Sequence[str | Path] = (),
    sha256: str | None = None,
    reference: str = "float64",
    tokens: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Report:
    """What is wrong in an engine's tensors, and why: the part tensors of `run.py compare`.

    Args:
        candidate: a trace, or the path of one or of another engine's dump.
        model, adapter: what the engine computed with, as for `qwen_jax.load`.
        sha256: what the GGUF file's SHA-256 must be.
        reference: "float64", "hf", "llamacpp", or the path of a trace to compare with.
        tokens: ids of the text, where a dump doesn't say them.
        progress: hears of operations done and in all.

    Returns:
        A report: its `diagnosis` has findings and causes, its `comparison` the distances.

    Raises:
        UserError: a file can't be read, or the reference is of another model or text, less exact
            or not finite.
    """
    checkpoint = opening.open_model(model, adapter, sha256=sha256)
    if not isinstance(candidate, Trace):
        candidate = open_trace(candidate, checkpoint.config, tokens=tokens)
    return judged(candidate, checkpoint, reference, progress)


def certify(
    candidate: str | Path,
    other: str | Path | None = None,
    *,
    model: str | Path = opening.BUNDLED,
    adapter: str | Path | Sequence[str | Path] = (),
    sha256: str | None = None,
    tokens: Sequence[int] | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Certificate:
    """Whether an engine, or the whole difference of two, is rounding: `run.py certify`.

    Args:
        candidate, other: paths of traces or of other engines' dumps, of one text; or of logs of
            log-probabilities or of greedily chosen tokens, JSON lines.
        model, adapter: what the engines computed with, as for `qwen_jax.load`.
        sha256: what the GGUF file's SHA-256 must be.
        tokens: ids of the text, where a dump doesn't say them.
        dtype: in which an engine computed whose log doesn't say it.
        progress: hears of operations done and in all, or of texts.

    Returns:
        A certificate: `verdict` is "certified", "cause" or "unexplained", `to_json()` what
        `verify` reads.

    Raises:
        UserError: a file can't be read, the engines computed other models or texts, nothing can be
            judged, or a tensor that nothing else is wrong with is not finite.
    """
    adapters = [adapter] if isinstance(adapter, str | Path) else adapter
    return issue(
        opening.open_model(model, adapters, sha256=sha256),
        [str(dump) for dump in (candidate, other) if dump is not None],
        model=str(model),
        adapters=[str(one) for one in adapters],
        tokens=tokens,
        dtype=dtype,
        progress=progress,
    )


def quantisation_costs(
    model: str | Path,
    base: str | Path,
    *,
    text: str | Path | None = None,
    context: int = CONTEXT,
    upgrades: Sequence[str] = lens.UPGRADES,
    passes: int = lens.PASSES,
    progress: Progress | None = None,
) -> Report:
    """What the types of a quantised file cost: the part quantisation of `run.py compare`.

    Args:
        model: the quantised file, and
        base: what it was made from, both as for `qwen_jax.load`.
        text: a text file; the bundled model's own text where one of the two is that.
        context: tokens of it that are taken.
        upgrades: GGUF types to which tensors of fewer bits are moved up, one at a time.
        passes: forward passes of the text to take at most.
        progress: hears of steps done and in all, of one stage after the other.

    Returns:
        A report: its `quantisation` has the cost of every tensor, kind and layer, and `upgrades`.

    Raises:
        UserError: as `quantisation.lens.look` says, or a file can't be read.
    """
    return quantised(
        opening.open_model(model),
        opening.open_model(base),
        text,
        context=context,
        upgrades=upgrades,
        passes=passes,
        progress=progress,
    )


def quantised(
    file: Checkpoint,
    base: Checkpoint,
    text: str | Path | None,
    *,
    context: int,
    upgrades: Sequence[str],
    passes: int,
    implementation: str = "auto",
    progress: Progress | None = None,
) -> Report:
    """The same of open checkpoints."""
    bundled = {str(file.path), str(base.path)} & {str(opening.locate(opening.BUNDLED))}
    tokens = read_tokens(read_tokenizer(file), min(bundled, default=str(file.path)), text)
    found = lens.look(
        file,
        base,
        tokens[:context],
        upgrades=upgrades,
        passes=passes,
        implementation=implementation,
        progress=progress,
    )
    return Report(quantisation=found, model=described(file))


def judged(
    trace: Trace, checkpoint: Checkpoint, reference: str, progress: Progress | None = None
) -> Report:
    """Replay, diagnosis and the comparison with the reference of an open checkpoint's trace."""
    header = trace.header
    # First: what is wrong with a reference should show before minutes of replay.
    right = reference_trace(
        reference,
        checkpoint,
        header.tokens,
        dtype=header.dtype,
        chunks=header.chunks,
        start=header.start,
        stop=header.stop,
    )
    diagnosis = diagnose(trace, CheckpointSource(checkpoint, header.dtype), progress)
    return Report(
        candidate=header,
        diagnosis=diagnosis,
        comparison=comparison.compare(trace, right, diagnosis.findings),
        notes=(
            *header.notes,
            *(f"of the reference: {note}" for note in right.header.notes),
            *([ONE_POSITION] if header.stop == 1 else []),
        ),
    )
