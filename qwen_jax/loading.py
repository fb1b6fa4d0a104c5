"""What goes on at the same time while a model loads: its weights, its tokenizer, its programs.

To read a tokenizer keeps Python busy for half a second, to find or compile a program XLA, to send
the weights a few threads that copy. What enters a prompt into the cache depends on no tokenizer, so
that its program, the largest, comes first.
"""

from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp

from qwen_jax.engine.blocks import load_blocks
from qwen_jax.engine.compiling import Expected, compile_ahead
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.form import form_of, load_packed
from qwen_jax.engine.layout import EngineOptions, Layout
from qwen_jax.engine.memory import check_weights_fit, device
from qwen_jax.engine.split_blocks import load_split_blocks
from qwen_jax.engine.split_weights import SplitWeights, least, splits_of
from qwen_jax.engine.weights import Weights, prepare, prepared_shapes
from qwen_jax.errors import UserError
from qwen_jax.mesh import ONE, MeshShape
from qwen_jax.model.split import Split, Whole
from qwen_jax.text.tokenizer import Tokenizer
from qwen_jax.weights.checkpoint import Checkpoint
from qwen_jax.weights.loader import iter_parameters
from qwen_jax.weights.open_files import Progress
from qwen_jax.weights.shards import iter_split


def load_engine(
    checkpoint: Checkpoint,
    dtype: jnp.dtype,
    asked: str,
    options: EngineOptions,
    expected: Expected | None,
    progress: Progress | None,
    mesh: MeshShape = ONE,
) -> tuple[Engine, Tokenizer]:
    """Puts a checkpoint on the device, or on those of a mesh.

    Args:
        dtype: of the parameters.
        asked: the weights' form, as `api.load` says.
        options: without what a tokenizer knows.
        expected: what will be asked for, or None where nothing is to be compiled ahead.
        progress: called with bytes read and bytes in all.
        mesh: the devices that the model is dealt out to, and how many times.

    Raises:
        UserError: the checkpoint is damaged or too large; of a bad tokenizer and bad weights the
            tokenizer is told.
        UnsupportedError: the kernel was asked for by name and can't run this model.
    """
    config, platform = checkpoint.config, device().platform
    implementation = options.get("implementation", "auto")
    texts = None if expected is None else expected.texts
    slots = options.get("slots")
    form = form_of(
        asked, checkpoint, dtype, implementation=implementation, slots=slots, texts=texts, mesh=mesh
    )
    split, *elsewhere = splits_of(mesh)
    dealt = isinstance(split, Split)
    check_weights_fit(config, dtype, form.held if form.blocks or dealt else None, mesh.devices)
    options = options | EngineOptions(
        texts=texts, slots=slots or form.rows, split=split, sharers=mesh.devices
    )
    layout = Layout.of(config, dtype, platform, loaded=False, held=form.held, **options)
    tokens = least(layout.cache_tokens) if dealt else layout.cache_tokens
    options |= EngineOptions(cache_tokens=tokens)
    programs = None if expected is None else expected.programs(layout)
    shapes: Weights | None = None
    # A CPU's cores are busy with the weights.
    if programs is not None and platform != "cpu" and not dealt:
        shapes = form.shapes or prepared_shapes(
            config, checkpoint.parameters, dtype, implementation
        )
        compile_ahead(layout, shapes, programs._replace(rows=()))

    def read() -> tuple[Tokenizer, EngineOptions]:
        tokenizer = read_tokenizer(checkpoint)
        of_tokenizer = EngineOptions(
            stop_ids=tokenizer.stop_ids,
            valid_tokens=tokenizer.vocab_size,
            unused_ids=tokenizer.unused_ids,
        )
        whole = options | of_tokenizer
        if programs is not None and shapes is not None:
            known = Layout.of(config, dtype, platform, loaded=False, **whole)
            compile_ahead(known, shapes, programs._replace(pieces=()))
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
            if isinstance(split, Split) and form.blocks:
                weights = load_split_blocks(checkpoint, split, watched)
            elif isinstance(split, Split):
                named = dict(iter_split(checkpoint, dtype, split, watched))
                weights = SplitWeights(named, config, split)
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
    if programs is not None and not dealt:
        engine.expect(programs)
    return engine, tokenizer


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
