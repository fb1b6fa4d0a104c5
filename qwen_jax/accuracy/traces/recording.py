"""Our own engine, traced: the calls it makes anyway, with the tapped tensors as further outputs."""

import dataclasses
import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.gqa_prefill_attention.reference import SLOTS
from qwen_jax.accuracy.beside import Beside
from qwen_jax.accuracy.traces.collecting import MASKED, Collector
from qwen_jax.accuracy.traces.trace import Header, Trace, config_to_json, select, split_name
from qwen_jax.api import Model
from qwen_jax.completions import Completion
from qwen_jax.engine import steps
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.sampling import changes_scores
from qwen_jax.engine.shapes import Piece, Shapes, pieces_of
from qwen_jax.engine.spec import Spec
from qwen_jax.engine.weights import Weights
from qwen_jax.errors import UserError
from qwen_jax.executables.lowering import compiled
from qwen_jax.model.cache import PAGE, Cache
from qwen_jax.model.tap import recording
from qwen_jax.requests import Request
from qwen_jax.versions import version
from qwen_jax.weights.open_files import OpenFile

LIBRARIES = ("qwen_jax", "jax", "jaxlib", "numpy")

KERNEL = (
    "Decode steps are recorded layer by layer, and not from the decode-step kernel, which runs "
    "them otherwise; the part inside of a comparison looks into that of one device."
)


def record(
    model: Model | Engine,
    tokens: Sequence[int],
    *,
    prompt_length: int | None = None,
    chunk: int | None = None,
    names: str | Sequence[str] = "*",
    start: int = 0,
    stop: int | None = None,
) -> Trace:
    """Runs one text through the engine and keeps what `tap` saw.

    Args:
        tokens: the whole text.
        prompt_length: tokens that enter in pieces; the others enter one by one, as in decoding.
            All of them by default.
        chunk: the length of these pieces; by default as the engine cuts them.
        names: globs over canonical names.
        start: the first position to keep.
        stop: the one after the last; the text's end by default.

    Returns:
        The trace. Its notes say whether the logits were the same, bit for bit, without recording.

    Raises:
        UserError: the text is empty, longer than the context or not of this vocabulary; a glob
            matches nothing; positions or lengths are outside the text.
    """
    return Recorder(model, names).record(
        tokens, prompt_length=prompt_length, chunk=chunk, start=start, stop=stop
    )


class Recorder:
    """Records texts through one engine; its programs are compiled once for all of them.

    A program is traced when its shape comes first: what surrounds that (a planted fault) holds
    for all texts after it.
    """

    def __init__(self, model: Model | Engine, names: str | Sequence[str] = "*"):
        self.engine = model.engine if isinstance(model, Model) else model
        self.names = select(self.engine.config, names)
        self._together: dict[str, list[str]] = {}
        for name in self.names:
            # To fetch hundreds of small arrays from a device apart takes longer than to make them.
            operation = split_name(name)[1]
            small = operation not in MASKED and self.engine.shapes.ahead
            key = operation if small else name
            self._together.setdefault(key, []).append(name)
        spec = self.engine.spec
        self._plain = jax.jit(functools.partial(_plain_call, spec), donate_argnums=1)
        self._traced = jax.jit(
            functools.partial(_traced_call, spec, self._together), donate_argnums=1
        )

    def check(self, tokens: Sequence[int], prompt_length: int | None = None) -> None:
        """Raises the UserErrors of `record`, which may begin later."""
        calls = plan_calls(len(tokens), prompt_length, None, self.engine.shapes)
        self._header(tokens, calls, 0, len(tokens))

    def record(
        self,
        tokens: Sequence[int],
        *,
        prompt_length: int | None = None,
        chunk: int | None = None,
        start: int = 0,
        stop: int | None = None,
        see: Callable[[Piece, Float[np.ndarray, "T V"]], object] | None = None,
    ) -> Trace:
        """As the function `record`.

        Args:
            see: is shown the logits of every call as they are without recording.
        """
        calls = plan_calls(len(tokens), prompt_length, chunk, self.engine.shapes)
        header = self._header(tokens, calls, start, len(tokens) if stop is None else stop)
        collector = Collector(header, self.names)
        same, worst = True, 0.0
        with Beside(self.engine) as device:  # on a GPU all programs compile at the same time
            traced, plain = (
                self._run(f, tokens, calls, device) for f in (self._traced, self._plain)
            )
            for call in calls:
                beside = device.begin(next, plain)
                tensors, logits = next(traced)
                seen, right = (np.asarray(x)[0, : call.length] for x in (logits, beside()[1]))
                if seen.tobytes() != right.tobytes():
                    same, worst = False, max(worst, _difference(seen, right))
                if see is not None:
                    see(call, right)
                for key, stacked in tensors.items():
                    some = self._together[key]
                    if collector.wants(some[0], call.start, call.length):
                        # Cut on the host: on the device it would be compiled for each length.
                        for name, x in zip(some, np.asarray(stacked), strict=True):
                            collector.add(name, call.start, x[0, : call.length])
            traced.close()  # and their caches with them
            plain.close()
        note = "Recording changes no bit of the logits."
        if not same:
            note = f"Recording changes the logits, by {worst:.3g} at most."
        kernel = [KERNEL] if calls[-1].padded == 1 and _in_one_kernel(self.engine) else []
        trace, source = collector.trace(*kernel, note), self.engine.config.source
        header = dataclasses.replace(trace.header, model_sha256=model_hash(source))
        return Trace(header, trace.tensors)

    def _run(
        self, function: Any, tokens: Sequence[int], calls: list[Piece], device: Beside
    ) -> Generator[tuple[dict[str, jax.Array], jax.Array], None, None]:
        """The tensors and logits of every call, one after another through one cache."""
        engine = self.engine
        # Bits depend on how many slots attention takes a turn, but not on what is behind them.
        capacity = max(len(tokens), min(SLOTS, PAGE * engine.layout.table_width))
        cache = Cache.create(engine.spec.cached, 1, capacity, engine.spec.cache)
        compiling = {}
        if device.apart:
            empty = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), cache)
            for n in dict.fromkeys(call.padded for call in calls):
                text = (jax.ShapeDtypeStruct(shape, np.int32) for shape in ((1, n), (1,), (1,)))
                compiling[n] = device.begin(compiled, function, engine.weights, empty, *text)
        for call in calls:
            if call.padded in compiling:
                compiling.pop(call.padded)()
            padded = np.zeros((1, call.padded), np.int32)
            padded[0, : call.length] = tokens[call.start : call.start + call.length]
            start, length = np.array([call.start, call.start + call.length], np.int32)[:, None]
            cache, tensors, logits = function(engine.weights, cache, padded, start, length)
            yield tensors, logits

    def _header(self, tokens: Sequence[int], calls: list[Piece], start: int, stop: int) -> Header:
        """But for what takes a second: the file's hash, and whether a step is one kernel."""
        spec, config = self.engine.spec, self.engine.config
        if len(tokens) > config.context_length:
            raise UserError(
                f"The text has {len(tokens)} tokens, but {config.source} has a context of "
                f"{config.context_length}; shorten it."
            )
        try:
            return Header(
                model=config.source,
                model_sha256=None,
                config=config_to_json(config),
                implementation=f"qwen_jax ({spec.implementation})",
                dtype=spec.weights.name,
                activation_dtype=spec.activations.name,
                cache_dtype=spec.cache.name,
                matmul_precision=spec.precision.name.lower(),
                device=jax.local_devices()[0].device_kind,
                versions={name: version(name) for name in LIBRARIES},
                tokens=tuple(int(token) for token in tokens),
                start=start,
                stop=stop,
                chunks=tuple(call.length for call in calls),
            )
        except UserError as error:
            raise UserError(f"{config.source}: {error}") from None


def plan_calls(
    length: int, prompt_length: int | None, chunk: int | None, shapes: Shapes
) -> list[Piece]:
    """The calls a text goes through: the prompt in the engine's pieces, then token by token.

    Each piece has a call of its own, on a GPU too: what several in one give is the same.

    Raises:
        UserError: there is no text, or a length is outside it.
    """
    prompt = length if prompt_length is None else prompt_length
    if length < 1 or not 0 <= prompt <= length:
        raise UserError(
            f"prompt_length is {prompt}, but it must be from 0 to the text's {length} tokens."
        )
    if chunk is not None:
        if not 1 <= chunk <= PAGE:
            raise UserError(f"chunk is {chunk}, but it must be from 1 to {PAGE}, a page.")
        shapes = dataclasses.replace(shapes, lengths=(chunk,))
    return [
        *pieces_of(0, prompt, shapes),
        *(Piece(position, 1, 1) for position in range(prompt, length)),
    ]


def trace_generation(
    model: Model,
    request: Request,
    completion: Completion,
    *,
    names: str | Sequence[str] = "*",
    positions: str = ":",
) -> Trace:
    """Replays a generation with recording: the prompt in pieces, all but its last token, which
    enters alone like each token that was chosen.

    The last token chosen never entered the model and is left out. A note in the header says that
    this is a replay, and whether its logits choose the same tokens, where the run was greedy and
    nothing but them had a say.

    Args:
        request: what was asked for.
        completion: and what came of it.
        names: globs over canonical names.
        positions: "start:stop" of the text, as Python slices; either may be left out.

    Raises:
        UserError: a glob matches nothing, or the positions are none of the text's.
    """
    tokens = [*request.tokens, *completion.tokens[:-1]]
    prompt = len(request.tokens)
    start, stop = parse_positions(positions, len(tokens))
    chosen: list[int] = []
    # Rows without a token are padding, which the engine never chooses.
    rows = min(model.tokenizer.vocab_size, model.config.vocab_size)
    used = np.setdiff1d(np.arange(rows), model.tokenizer.unused_ids)

    def see(call: Piece, logits: Float[np.ndarray, "T V"]) -> None:
        chosen.extend(used[logits[:, used].argmax(axis=-1)].tolist())

    trace = Recorder(model, names).record(
        tokens, prompt_length=prompt - 1, start=start, stop=stop, see=see
    )
    notes = ["A replay of the generated tokens, made after the run."]
    greedy = request.sampling.temperature == 0 and completion.tokens
    if greedy and (request.constraint is not None or changes_scores(request.sampling)):
        notes.append(
            "Its logits are not held against the tokens of the run, in which a constraint, a bias "
            "or a penalty had a say."
        )
    elif greedy:
        pairs = zip(chosen[prompt - 1 :], completion.tokens, strict=True)
        wrong = [i for i, (ours, theirs) in enumerate(pairs) if ours != theirs]
        if wrong:
            notes.append(
                f"Its logits choose other tokens than the run in {len(wrong)} of "
                f"{len(completion.tokens)} places, first after position {prompt - 1 + wrong[0]}."
            )
            logging.warning("Trace: %s", notes[-1])
        else:
            notes.append("Its logits choose the tokens of the run, every one.")
    header = dataclasses.replace(trace.header, notes=(*notes, *trace.header.notes))
    return Trace(header, trace.tensors)


def parse_positions(text: str, length: int) -> tuple[int, int]:
    """`a:b` as Python's slices have it, of a text of `length`.

    Raises:
        UserError: it is no slice, or holds no position.
    """
    start, stop, _ = bounds(text).indices(length)
    if start >= stop:
        raise UserError(
            f"The positions {text!r} hold none of the text's {length}; choose others, such as 0:16."
        )
    return start, stop


def bounds(text: str, of: str = "positions") -> slice:
    """`a:b` as a slice. Raises UserError where it is none."""
    try:
        found = [int(part) if part.strip() else None for part in text.split(":")]
    except ValueError:
        found = []
    if len(found) != 2:
        raise UserError(f"The {of} are {text!r:.60}, but must be start:stop, such as 0:16 or 8:.")
    return slice(*found)


def model_hash(source: str) -> str | None:
    """The SHA-256 of a model that is one file; None for a directory or a model in memory."""
    path = Path(source)
    if not path.is_file():
        return None
    stat = path.stat()
    return _hash(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache
def _hash(path: Path, mtime: int, size: int) -> str:
    """Hashing reads the whole file, so once for each that has not changed."""
    return OpenFile(path).sha256()


def _plain_call(
    spec: Spec,
    weights: Weights,
    cache: Cache,
    tokens: Int[Array, "B T"],
    start: Int[Array, "B"],
    lengths: Int[Array, "B"],
) -> tuple[Cache, dict[str, jax.Array], Float[Array, "B T V"]]:
    """The call without records; one token goes as in the engine's decode steps."""
    if tokens.shape[1] == 1:
        step = weights.forward(spec, len(tokens))
        logits, cache = step(tokens[:, 0], cache, start, lengths > 0)
        return cache, {}, logits[:, None]
    cache, logits = steps.all_logits(spec, weights, cache, tokens, start, lengths)
    return cache, {}, logits


def _traced_call(
    spec: Spec,
    names: Mapping[str, Sequence[str]],
    weights: Weights,
    cache: Cache,
    tokens: Int[Array, "B T"],
    start: Int[Array, "B"],
    lengths: Int[Array, "B"],
) -> tuple[Cache, dict[str, jax.Array], Float[Array, "B T V"]]:
    """The same with the named tensors besides, those that go together in one array."""
    with recording() as seen:
        cache, logits = steps.all_logits(spec, weights, cache, tokens, start, lengths)

    def together(some: Sequence[str]) -> Shaped[Array, "names ..."]:
        if len(some) == 1:
            return seen[some[0]][None]
        # Apart, or each layer has a kernel of its own, in which its copy is fused.
        return jnp.stack(lax.optimization_barrier([seen[name] for name in some]))

    return cache, {key: together(some) for key, some in names.items()}, logits


def _in_one_kernel(engine: Engine) -> bool:
    """Whether a decode step shows nothing of what is inside, traced as it is."""
    cache = Cache.create(engine.spec.cached, 1, PAGE, engine.spec.cache)
    row = np.zeros((1, 1), np.int32), np.zeros(1, np.int32), np.ones(1, np.int32)
    with recording() as seen:
        jax.eval_shape(functools.partial(_plain_call, engine.spec), engine.weights, cache, *row)
    return not seen


def _difference(ours: Float[np.ndarray, "T V"], theirs: Float[np.ndarray, "T V"]) -> float:
    """The greatest absolute difference; infinite where only one of the two is finite."""
    difference = np.abs(ours.astype(np.float64) - theirs)
    difference[(ours == theirs) | (np.isnan(ours) & np.isnan(theirs))] = 0
    return float(np.where(np.isnan(difference), np.inf, difference).max())
