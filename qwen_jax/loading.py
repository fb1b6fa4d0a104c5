"""What goes on at the same time while a model loads: its weights, its tokenizer, its programs.

To read a tokenizer keeps Python busy for half a second, to find or compile a program XLA, to send
the weights a few threads that copy. What enters a prompt into the cache depends on no tokenizer, so
that its program, the largest, comes first.
"""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from qwen_jax.choices import check_speculation
from qwen_jax.engine.blocks import load_blocks
from qwen_jax.engine.compiling import Expected, compile_ahead
from qwen_jax.engine.drafts import USUAL_DRAFTED
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.form import form_of, load_packed, load_packed_on
from qwen_jax.engine.layout import EngineOptions, Layout
from qwen_jax.engine.memory import check_weights_fit, device
from qwen_jax.engine.split_blocks import load_split_blocks
from qwen_jax.engine.split_packed import pack_split
from qwen_jax.engine.split_weights import SplitWeights, least, splits_of
from qwen_jax.engine.weights import Weights, prepare, prepared_shapes
from qwen_jax.errors import UserError
from qwen_jax.mesh import ONE, MeshShape
from qwen_jax.model.cache import PAGE
from qwen_jax.model.split import Split, Whole
from qwen_jax.opening import open_model
from qwen_jax.text.tokenizer import Tokenizer
from qwen_jax.weights.checkpoint import Checkpoint
from qwen_jax.weights.loader import iter_parameters
from qwen_jax.weights.open_files import Progress
from qwen_jax.weights.shards import iter_split


class Speculation(NamedTuple):
    """How tokens are drafted.

    Attributes:
        tokens: of a text in a step, at most.
        model: the draft model's checkpoint; without one they are looked up.
    """

    tokens: int
    model: Checkpoint | None = None

    @classmethod
    def asked(
        cls, method: str, model: str | Path | None, tokens: int | None, mesh: MeshShape
    ) -> "Speculation | None":
        """What `api.load` says of it. Raises UserError where it can't be."""
        check_speculation(method, model, tokens, mesh.devices)
        if method == "none":
            return None
        return cls(tokens or USUAL_DRAFTED, None if model is None else open_model(model))


def load_engine(
    checkpoint: Checkpoint,
    dtype: jnp.dtype,
    asked: str,
    options: EngineOptions,
    expected: Expected | None,
    progress: Progress | None,
    mesh: MeshShape = ONE,
    speculation: Speculation | None = None,
) -> tuple[Engine, Tokenizer]:
    """Puts a checkpoint on the device, or on those of a mesh.

    Args:
        dtype: of the parameters.
        asked: the weights' form, as `api.load` says.
        options: without what a tokenizer knows.
        expected: what will be asked for, or None where nothing is to be compiled ahead.
        progress: called with bytes read and bytes in all.
        mesh: the devices that the model is dealt out to, and how many times.
        speculation: how tokens are drafted, if they are.

    Raises:
        UserError: the checkpoint is damaged or too large, or drafts can't be had; of a bad
            tokenizer and bad weights the tokenizer is told.
        UnsupportedError: the kernel was asked for by name and can't run this model.
    """
    config, platform = checkpoint.config, device().platform
    draft = None
    if speculation is not None:
        options = options | EngineOptions(draft_tokens=speculation.tokens)
        if speculation.model is not None:
            # Before the model, whose cache takes what is left.
            draft = _load_draft(speculation.model, dtype, options)
            options |= EngineOptions(draft_bytes=draft.bytes_per_token)
    implementation = options.get("implementation", "auto")
    texts = None if expected is None else expected.texts
    slots = options.get("slots")
    form = form_of(
        asked, checkpoint, dtype, implementation=implementation, slots=slots, texts=texts, mesh=mesh
    )
    split, *elsewhere = splits_of(mesh)
    if isinstance(split, Split) and form.exchanging:
        split = dataclasses.replace(split, exchange=True)
    dealt = isinstance(split, Split)
    check_weights_fit(config, dtype, form.held if form.blocks or dealt else None, mesh.devices)
    options = options | EngineOptions(
        texts=texts, slots=slots or form.rows, split=split, sharers=mesh.devices
    )
    layout = Layout.of(config, dtype, platform, loaded=False, held=form.held, **options)
    if layout.draft_tokens and layout.shapes.slots == 1:
        raise UserError(
            "speculate needs room for drafts, the rows of other texts, but slots is 1; leave slots "
            "out, or choose more."
        )
    tokens = least(layout.cache_tokens) if dealt else layout.cache_tokens
    options |= EngineOptions(cache_tokens=tokens)
    programs = None if expected is None else expected.programs(layout)
    shapes: Weights | None = None
    # A CPU's cores are busy with the weights.
    if programs is not None and platform != "cpu" and not dealt:
        shapes = form.shapes or prepared_shapes(
            config, checkpoint.parameters, dtype, implementation
        )
        early = programs._replace(rows=(), halves=())
        compile_ahead(layout, shapes, early, _beside(layout, draft))

    def read() -> tuple[Tokenizer, EngineOptions]:
        tokenizer = read_tokenizer(checkpoint)
        if speculation is not None and speculation.model is not None:
            _check_same_vocabulary(tokenizer, checkpoint, speculation.model)
        of_tokenizer = EngineOptions(
            stop_ids=tokenizer.stop_ids,
            valid_tokens=tokenizer.vocab_size,
            unused_ids=tokenizer.unused_ids,
        )
        whole = options | of_tokenizer
        if programs is not None and shapes is not None:
            known = Layout.of(config, dtype, platform, loaded=False, **whole)
            compile_ahead(known, shapes, programs._replace(pieces=()), _beside(known, draft))
        return tokenizer, whole

    with ThreadPoolExecutor(1, "tokenizer") as thread:
        reading = thread.submit(read)

        def watched(done: int, total: int) -> None:
            if reading.done():
                reading.result()  # raises what is wrong with it before all weights are there
            if progress is not None:
                progress(done, total)

        try:
            weights: Weights
            if isinstance(split, Split) and form.plan is not None:
                weights = load_packed_on(
                    split, checkpoint, form.plan, dtype, implementation, watched
                )
            elif isinstance(split, Split) and form.blocks:
                weights = load_split_blocks(checkpoint, split, watched)
            elif isinstance(split, Split):
                dealt_out = iter_split(checkpoint, dtype, split, watched)
                if form.exchanging:
                    weights = pack_split(config, dealt_out, dtype, implementation, split)
                else:
                    weights = SplitWeights(dict(dealt_out), config, split)
            elif form.plan is not None:
                weights = load_packed(checkpoint, form.plan, dtype, implementation, watched)
            elif form.blocks:
                weights = load_blocks(checkpoint, watched)
            else:
                parameters = iter_parameters(checkpoint, dtype, progress=watched)
                weights = prepare(config, parameters, dtype, implementation)
            checkpoint.check_unchanged()
        finally:
            tokenizer, whole = reading.result()
    engine = Engine(config, weights, **whole)
    engine.others = tuple(_again(engine, there, whole) for there in elsewhere)
    if draft is not None:
        engine.drafts_with(draft)
    if programs is not None and not dealt:
        engine.expect(programs)
    return engine, tokenizer


def _beside(layout: Layout, draft: Engine | None) -> tuple[Layout, Weights] | None:
    """A draft model's layout where it has the pages of a model's, and its weights."""
    return None if draft is None else (draft.layout._replace(pages=layout.pages), draft.weights)


def _load_draft(checkpoint: Checkpoint, dtype: jnp.dtype, options: EngineOptions) -> Engine:
    """A draft model, which has no room for a cache yet."""
    config, implementation = checkpoint.config, options.get("implementation", "auto")
    check_weights_fit(config, dtype)
    weights = prepare(config, iter_parameters(checkpoint, dtype), dtype, implementation)
    checkpoint.check_unchanged()
    alike = ("precision", "implementation", "slots", "batch_invariant")
    own: dict[str, Any] = {name: value for name, value in options.items() if name in alike}
    return Engine(config, weights, cache_tokens=PAGE, **own)


def _check_same_vocabulary(tokenizer: Tokenizer, checkpoint: Checkpoint, draft: Checkpoint) -> None:
    """Raises UserError where a draft model's ids mean other tokens."""
    theirs = read_tokenizer(draft)
    if (token := tokenizer.first_difference(theirs)) is not None:
        raise UserError(
            f"draft_model {draft.path} has {theirs.token_name(token)} for token {token}, which is "
            f"{tokenizer.token_name(token)} in {checkpoint.path}; choose one of the same "
            "vocabulary."
        )


def _again(engine: Engine, split: Whole, options: EngineOptions) -> Engine:
    """The same model on other devices."""
    weights = engine.weights
    if isinstance(split, Split):
        assert isinstance(weights, SplitWeights)
        weights = weights.on(split)
    else:
        weights = split.placed(weights)
    return Engine(engine.config, weights, **options | EngineOptions(split=split))


def read_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The checkpoint's own tokenizer. Raises UserError where none fits or it is damaged."""
    if checkpoint.format == "gguf":
        tokenizer = Tokenizer.from_gguf(checkpoint.metadata, str(checkpoint.path))
    else:
        tokenizer = Tokenizer.from_hf(checkpoint.path)
    rows = checkpoint.config.vocab_size
    # Fewer: the other rows are padding. An added token without a row (a padding token that a
    # trainer named, say) does no harm before a prompt holds it.
    if tokenizer.text_size > rows:
        raise UserError(
            f"{checkpoint.path}: the tokenizer has {tokenizer.vocab_size} tokens, but the "
            f"embedding only {rows} rows; they belong to different models, so take both from the "
            "same checkpoint."
        )
    if min(tokenizer.stop_ids) >= rows:
        raise UserError(
            f"{checkpoint.path}: the tokens that end a text have the ids {tokenizer.stop_ids}, but "
            f"the embedding has only {rows} rows, so no text would end; take the tokenizer and the "
            "weights from the same checkpoint."
        )
    return tokenizer
