"""Our own engine, traced: the calls it makes anyway, with the tapped tensors as further outputs."""

import dataclasses
import functools
import importlib.metadata
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jaxtyping import Array, Float, Int

from qwen_jax.accuracy.collecting import Collector
from qwen_jax.accuracy.trace import Header, Trace, config_to_json, select
from qwen_jax.api import Model
from qwen_jax.engine import steps
from qwen_jax.engine.engine import CHUNK, SMALLEST_CHUNK, Engine, Prompt, bucket
from qwen_jax.engine.weights import PackedWeights
from qwen_jax.errors import UserError
from qwen_jax.generation import Completion, Request
from qwen_jax.model.cache import SMALLEST_CAPACITY, Cache, StackedCache
from qwen_jax.model.decoder import Parameters, activation_dtype
from qwen_jax.model.tap import recording
from qwen_jax.weights.checksum import sha256

LIBRARIES = ("qwen_jax", "jax", "jaxlib", "numpy")


class Call(NamedTuple):
    """One call of the engine: `length` tokens from position `start` on, padded to `padded`."""

    start: int
    length: int
    padded: int


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
        prompt_length: tokens that enter in chunks; the others enter one by one, as in decoding.
            All of them by default.
        chunk: tokens a call of the prompt takes at most; the engine's own 512 by default.
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
        make = self.engine.make_model
        self._plain = jax.jit(functools.partial(_plain_chunk, make), donate_argnums=1)
        self._traced = jax.jit(
            functools.partial(_traced_chunk, make, tuple(self.names)), donate_argnums=1
        )

    def record(
        self,
        tokens: Sequence[int],
        *,
        prompt_length: int | None = None,
        chunk: int | None = None,
        start: int = 0,
        stop: int | None = None,
        capacity: int | None = None,
        see: Callable[[Call, Float[np.ndarray, "T V"]], object] | None = None,
    ) -> Trace:
        """As the function `record`.

        Args:
            capacity: slots of the cache; by default the bucket that holds the text.
            see: is shown the logits of every call as they are without recording.
        """
        calls = plan_calls(len(tokens), prompt_length, chunk)
        header = self._header(tokens, calls, start, len(tokens) if stop is None else stop)
        needed = max(call.start + call.padded for call in calls)
        slots = max(bucket(needed, SMALLEST_CAPACITY), capacity or 0)
        collector = Collector(header, self.names)
        same, worst = True, 0.0
        both = (self._run(f, tokens, calls, slots) for f in (self._traced, self._plain))
        for call, (tensors, logits), (_, plain) in zip(calls, *both, strict=True):
            plain = np.asarray(plain)[0, : call.length]
            seen = np.asarray(logits)[0, : call.length]
            if seen.tobytes() != plain.tobytes():
                same, worst = False, max(worst, _difference(seen, plain))
            if see is not None:
                see(call, plain)
            for name, x in tensors.items():
                if collector.wants(name, call.start, call.length):
                    # Cut on the host: a slice on the device would be compiled for every length.
                    collector.add(name, call.start, np.asarray(x)[0, : call.length])
        note = "Recording changes no bit of the logits."
        if not same:
            note = f"Recording changes the logits, by {worst:.3g} at most."
        return collector.trace(note)

    def _run(
        self, function: Callable[..., Any], tokens: Sequence[int], calls: list[Call], slots: int
    ) -> Iterator[tuple[dict[str, jax.Array], jax.Array]]:
        """The tensors and logits of every call, one after another through one cache."""
        engine = self.engine
        cache = engine.create_cache(1, slots)
        for call in calls:
            padded = np.zeros((1, call.padded), np.int32)
            padded[0, : call.length] = tokens[call.start : call.start + call.length]
            length = np.array([call.start + call.length], np.int32)
            cache, tensors, logits = function(
                engine.weights, cache, padded, np.int32(call.start), length
            )
            yield tensors, logits

    def _header(self, tokens: Sequence[int], calls: list[Call], start: int, stop: int) -> Header:
        engine, config = self.engine, self.engine.config
        if len(tokens) > config.context_length:
            raise UserError(
                f"The text has {len(tokens)} tokens, but {config.source} has a context of "
                f"{config.context_length}; shorten it."
            )
        decodes = any(call.length == 1 for call in calls)
        try:
            return Header(
                model=config.source,
                model_sha256=model_hash(config.source),
                config=config_to_json(config),
                implementation=f"qwen_jax ({engine.make_model.keywords['implementation']})",
                dtype=engine.cache_dtype.name,
                activation_dtype=activation_dtype(engine.cache_dtype).name,
                cache_dtype=engine.cache_dtype.name,
                matmul_precision=engine.make_model.keywords["precision"].name.lower(),
                device=jax.local_devices()[0].device_kind,
                versions={name: importlib.metadata.version(name) for name in LIBRARIES},
                tokens=tuple(int(token) for token in tokens),
                start=start,
                stop=stop,
                chunks=tuple(call.length for call in calls),
                notes=(
                    "Decode steps are recorded layer by layer: of the decode-step kernel, which "
                    "runs them otherwise, no inner tensor leaves the chip.",
                )
                if decodes and isinstance(engine.weights, PackedWeights)
                else (),
            )
        except UserError as error:
            raise UserError(f"{config.source}: {error}") from None


def plan_calls(length: int, prompt_length: int | None, chunk: int | None) -> list[Call]:
    """The calls a text goes through: the prompt in chunks, padded as the engine does, then ones.

    On packed weights the engine's chunks are longer; these are recorded with their scores.

    Raises:
        UserError: there is no text, or a length is outside it.
    """
    prompt = length if prompt_length is None else prompt_length
    if length < 1 or not 1 <= prompt <= length:
        raise UserError(
            f"prompt_length is {prompt}, but it must be from 1 to the text's {length} tokens."
        )
    size = CHUNK if chunk is None else chunk
    if size < 1:
        raise UserError(f"chunk is {size}, but it must be at least 1.")
    lengths = [min(size, prompt - start) for start in range(0, prompt, size)]
    lengths += [1] * (length - prompt)
    starts = itertools.accumulate(lengths, initial=0)
    calls = [Call(start, n, n) for start, n in zip(starts, lengths, strict=False)]
    last = (prompt - 1) // size
    padded = min(bucket(calls[last].length, SMALLEST_CHUNK), size)
    return [*calls[:last], calls[last]._replace(padded=padded), *calls[last + 1 :]]


def trace_generation(
    model: Model,
    request: Request,
    completion: Completion,
    *,
    names: str | Sequence[str] = "*",
    positions: str = ":",
) -> Trace:
    """Replays a generation with recording: the prompt in chunks, then each token it chose.

    The last token chosen never entered the model and is left out. A note in the header says that
    this is a replay, and whether its logits choose the same tokens, where the run was greedy.

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
    capacity = model.engine.capacity([Prompt(request.tokens, request.max_tokens)])
    chosen: list[int] = []
    # Rows without a token are padding, which the engine never chooses.
    rows = min(model.tokenizer.vocab_size, model.config.vocab_size)
    used = np.setdiff1d(np.arange(rows), model.tokenizer.unused_ids)

    def see(call: Call, logits: Float[np.ndarray, "T V"]) -> None:
        chosen.extend(used[logits[:, used].argmax(axis=-1)].tolist())

    trace = Recorder(model, names).record(
        tokens, prompt_length=prompt, start=start, stop=stop, capacity=capacity, see=see
    )
    notes = ["A replay of the generated tokens, made after the run."]
    if request.sampling.temperature == 0 and completion.tokens:
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
    parts = text.split(":")
    try:
        bounds = [int(part) if part.strip() else None for part in parts]
    except ValueError:
        bounds = []
    if len(bounds) != 2:
        raise UserError(f"The positions are {text!r}, but must be start:stop, such as 0:16 or 8:.")
    start, stop, _ = slice(*bounds).indices(length)
    if start >= stop:
        raise UserError(
            f"The positions {text!r} hold none of the text's {length}; choose others, such as 0:16."
        )
    return start, stop


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
    return sha256(path)


def _plain_chunk(
    make: steps.ModelMaker,
    weights: Parameters | PackedWeights,
    cache: Cache,
    tokens: Int[Array, "B T"],
    start: Int[Array, ""],
    lengths: Int[Array, "B"],
) -> tuple[Cache, dict[str, jax.Array], Float[Array, "B T V"]]:
    """The call without records; one token goes through the decode-step kernel, if any does."""
    if tokens.shape[1] == 1 and isinstance(cache, StackedCache):
        assert isinstance(weights, PackedWeights)
        logits, cache = steps.forward_packed(weights, tokens[:, 0], cache, start[None], lengths)
        return cache, {}, logits[:, None]
    cache, logits = steps.chunk_logits(make, weights, cache, tokens, start, lengths)
    return cache, {}, logits


def _traced_chunk(
    make: steps.ModelMaker,
    names: Sequence[str],
    weights: Parameters | PackedWeights,
    cache: Cache,
    tokens: Int[Array, "B T"],
    start: Int[Array, ""],
    lengths: Int[Array, "B"],
) -> tuple[Cache, dict[str, jax.Array], Float[Array, "B T V"]]:
    """The same with the named tensors besides."""
    with recording() as seen:
        cache, logits = steps.chunk_logits(make, weights, cache, tokens, start, lengths)
    return cache, {name: seen[name] for name in names}, logits


def _difference(ours: Float[np.ndarray, "T V"], theirs: Float[np.ndarray, "T V"]) -> float:
    """The greatest absolute difference; infinite where only one of the two is finite."""
    difference = np.abs(ours.astype(np.float64) - theirs)
    difference[(ours == theirs) | (np.isnan(ours) & np.isnan(theirs))] = 0
    return float(np.where(np.isnan(difference), np.inf, difference).max())
