"""What the engine does for a draft model besides running its steps."""

import itertools
from collections.abc import Sequence

from qwen_jax.config import ModelConfig
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.extending import Pieces
from qwen_jax.engine.memory import weight_bytes
from qwen_jax.engine.shapes import pieces_of
from qwen_jax.engine.texts import Text

BYTES_A_SECOND, LAYER_SECONDS = 4.2e12, 8e-6
"""Of an H200's decode steps: how fast weights are read, and what a layer takes besides."""


def share_of(draft: Engine, engine: Engine) -> float:
    """What a token takes a draft model, in steps of the model."""

    def seconds(config: ModelConfig, of: Engine) -> float:
        read = weight_bytes(config, of.spec.weights) / BYTES_A_SECOND
        return read + (0 if of.platform == "cpu" else config.num_layers * LAYER_SECONDS)

    return seconds(draft.config, draft) / seconds(engine.config, engine)


def catch_up(draft: Engine, texts: Sequence[Text]) -> None:
    """Puts into a draft model's cache what came of texts in steps without it, as far as the host
    knows. What it doesn't yet is missing until the next call; the draft is the worse for it, and
    what the model says of it is not."""
    pieces = []
    for text in texts:
        assert text.record is not None
        for start, stop in text.record.missing:
            pieces += [(text, piece) for piece in pieces_of(start, stop, draft.shapes)]
        text.record.missing.clear()
    pieces.sort(key=lambda one: one[1].padded)
    for length, alike in itertools.groupby(pieces, key=lambda one: one[1].padded):
        left = list(alike)
        size = draft.pieces_for(len(left), length)
        for first in range(0, len(left), size):
            some = left[first : first + size]
            tokens = [text.record.tokens for text, _ in some if text.record is not None]
            Pieces.of(draft, some, tokens, size).into(draft)
