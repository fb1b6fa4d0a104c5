r"""Trains the model that ships with qwen_jax and writes it as a GGUF file.

    python -m tools.train_demo --out=qwen_jax/data/haiku.gguf

Needs the extra `train`. The text is generated (`tools/demo_corpus.py`), nothing is downloaded,
and the result is a function of the flags and the machine. The default run is meant for a GPU.
Progress goes to stderr; at the end the written file is evaluated as `tools.eval_demo` does it.
"""

import functools
import itertools
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from qwen_jax.config import ModelConfig
from qwen_jax.model.cache import Cache
from qwen_jax.model.decoder import Parameters, Qwen2
from tools import demo_gguf, demo_rows, eval_demo
from tools.demo_corpus import chats, word_source
from tools.demo_tokenizer import train_vocabulary

_OUT = flags.DEFINE_string("out", "qwen_jax/data/haiku.gguf", "The GGUF file to write.")
_SEED = flags.DEFINE_integer("seed", 0, "Decides text, first parameters and order.")
_STEPS = flags.DEFINE_integer("steps", 4000, "Optimiser steps.")
_ROWS = flags.DEFINE_integer("rows", 96, "Rows of a step.")
_LENGTH = flags.DEFINE_integer("length", 512, "Tokens of a row, and the model's context.")
_CHATS = flags.DEFINE_integer("chats", 400_000, "Chats to generate; used again when all are seen.")
_WORKERS = flags.DEFINE_integer("workers", os.cpu_count() or 1, "Processes that generate text.")
_LAYERS = flags.DEFINE_integer("layers", 5, "Layers.")
_HIDDEN = flags.DEFINE_integer("hidden", 256, "Hidden size, in heads of 64.")
_KV_HEADS = flags.DEFINE_integer("kv_heads", 2, "Key/value heads.")
_FFN = flags.DEFINE_integer("ffn", 512, "Feed-forward size.")
_VOCAB = flags.DEFINE_integer("vocab", 2048, "Tokens of the vocabulary.")
_LR = flags.DEFINE_float("lr", 2e-3, "Peak learning rate.")
_DECAY = flags.DEFINE_float("weight_decay", 0.1, "Of matrices; norms and biases have none.")
_TIME_LIMIT = flags.DEFINE_float(
    "time_limit_s", 1500, "Seconds of training; where the steps need more, fewer are made."
)
_DETERMINISTIC = flags.DEFINE_bool("deterministic", True, "Only reproducible GPU operations.")

HEAD_DIM = 64
STEPS_PER_CALL = 50

Batch = tuple[Int[Array, "B T"], Bool[Array, "B T"]]


def look_up(table: Float[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Rows of an embedding by a matrix product.

    A GPU adds the gradient of a gather in no fixed order, so two runs would differ.
    """
    return jax.nn.one_hot(tokens, table.shape[0], dtype=table.dtype) @ table


def initial_parameters(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Float32 parameters by canonical name.

    Biases start far from zero, so that the trained model depends on them as Qwen2.5 does and
    an engine that drops them is found out.
    """
    rng = np.random.default_rng(seed)
    d, f = config.hidden_size, config.ffn_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def normal(*shape: int, scale: float) -> np.ndarray:
        return rng.normal(0, scale, shape).astype(np.float32)

    into_residual = (2 * config.num_layers) ** -0.5
    params = {"embed": normal(config.vocab_size, d, scale=0.05)}
    for i in range(config.num_layers):
        layer = {
            "attn_norm": np.ones(d, np.float32),
            "qkv_proj.weight": normal(q + 2 * kv, d, scale=d**-0.5),
            "qkv_proj.bias": normal(q + 2 * kv, scale=0.5),
            "o_proj.weight": normal(d, q, scale=q**-0.5 * into_residual),
            "ffn_norm": np.ones(d, np.float32),
            "gate_up_proj.weight": normal(2 * f, d, scale=d**-0.5),
            "down_proj.weight": normal(d, f, scale=f**-0.5 * into_residual),
        }
        params |= {f"layers.{i}.{name}": value for name, value in layer.items()}
    return params | {"final_norm": np.ones(d, np.float32)}


def answer_loss(config: ModelConfig, params: Parameters, batch: Batch) -> Float[Array, ""]:
    """Mean cross-entropy of the answers' tokens, in nats."""
    tokens, answer = batch
    inputs, targets, weight = tokens[:, :-1], tokens[:, 1:], answer[:, 1:].astype(jnp.float32)
    rows, length = inputs.shape
    model = Qwen2(
        config,
        params,
        precision=lax.Precision.DEFAULT,
        implementation="xla",
        look_up=functools.partial(look_up, params["embed"]),
    )
    cache = Cache.create(config, rows, length, jnp.dtype(jnp.float32), page=length)
    hidden, _ = model(inputs, cache, jnp.zeros(rows, jnp.int32), jnp.full(rows, length, jnp.int32))
    logits = model.logits(hidden)
    # A comparison and a sum: the gradient of a gather would be in no fixed order.
    chosen = jnp.arange(config.vocab_size) == targets[..., None]
    picked = jnp.where(chosen, logits, 0).sum(axis=-1)
    losses = jax.nn.logsumexp(logits, axis=-1) - picked
    return (losses * weight).sum() / jnp.maximum(weight.sum(), 1)


def batches(rows: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """Row numbers of one step after another, every row once before any comes again."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(rows)
        for start in range(0, rows - size + 1, size):
            yield order[start : start + size]


def learning_rates(peak: float, done: int, count: int, steps: int, spent: float) -> np.ndarray:
    """Of the next `count` steps: a warm-up, then half a cosine down to a fiftieth.

    Args:
        spent: the part of the allowed time that is over. The cosine follows whichever is
            further, steps or time, so that a run cut short has cooled down as well.
    """
    step = done + np.arange(count)
    progress = np.minimum(1, max(done / steps, spent) + np.arange(count) / steps)
    cosine = 0.51 + 0.49 * np.cos(np.pi * progress)
    warm_up = np.minimum(1, (step + 1) / min(300, steps / 10))
    return (peak * warm_up * cosine).astype(np.float32)


def train(config: ModelConfig, data: demo_rows.Rows) -> dict[str, np.ndarray]:
    """Trained parameters, float32, by canonical name."""
    steps, size = _STEPS.value, min(_ROWS.value, len(data.tokens))
    params = {k: jnp.asarray(v) for k, v in initial_parameters(config, _SEED.value).items()}
    matrices = {name: value.ndim > 1 for name, value in params.items()}
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(_DECAY.value, mask=matrices),
    )
    tokens, answer = jnp.asarray(data.tokens), jnp.asarray(data.answer)

    def step(carry: Any, given: Any, tokens: Array, answer: Array) -> Any:
        params, state = carry
        chosen, rate = given
        batch = tokens[chosen].astype(jnp.int32), answer[chosen]
        loss, gradients = jax.value_and_grad(lambda p: answer_loss(config, p, batch))(params)
        updates, state = optimizer.update(gradients, state, params)
        params = jax.tree.map(lambda value, update: value - rate * update, params, updates)
        return (params, state), loss

    def many_steps(carry: Any, given: Any, tokens: Array, answer: Array) -> Any:
        return lax.scan(lambda c, g: step(c, g, tokens, answer), carry, given)

    run = jax.jit(many_steps, donate_argnums=0)
    order = batches(len(data.tokens), size, _SEED.value)
    carry = params, optimizer.init(params)
    started = time.monotonic()
    done, spent = 0, 0.0
    while done < steps and spent < 1:
        chosen = np.stack(list(itertools.islice(order, min(STEPS_PER_CALL, steps - done))))
        rates = learning_rates(_LR.value, done, len(chosen), steps, spent)
        carry, losses = run(carry, (chosen, rates), tokens, answer)
        done += len(chosen)
        loss = float(losses.mean())
        seconds = time.monotonic() - started
        spent = seconds / _TIME_LIMIT.value
        logging.info("step %5d of %d: loss %.4f, %.0f s", done, steps, loss, seconds)
    return {name: np.asarray(value) for name, value in carry[0].items()}


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"The argument {argv[1]!r} belongs to no flag.")
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    logging.set_stderrthreshold("info")
    if _DETERMINISTIC.value:
        given = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{given} --xla_gpu_deterministic_ops=true"
    started = time.monotonic()
    # Shard -1 is never trained on. Without the special tokens, which are no text.
    sample = (chat.render() for chat in chats(_SEED.value, -1, 6000, word_source()))
    texts = [re.sub(r"<\|\w+\|>", "", text) for text in sample]
    vocabulary = train_vocabulary(texts, _VOCAB.value)
    data = demo_rows.build(vocabulary, _SEED.value, _CHATS.value, _LENGTH.value + 1, _WORKERS.value)
    config = ModelConfig(
        num_layers=_LAYERS.value,
        hidden_size=_HIDDEN.value,
        num_heads=_HIDDEN.value // HEAD_DIM,
        num_kv_heads=_KV_HEADS.value,
        head_dim=HEAD_DIM,
        ffn_size=_FFN.value,
        vocab_size=len(vocabulary.tokens),
        context_length=_LENGTH.value,
        rope_theta=1e6,
        rms_eps=1e-6,
        tied=True,
    )
    logging.info(
        "%d rows of %d tokens in %.0f s; %d parameters on %s",
        *data.tokens.shape,
        time.monotonic() - started,
        config.num_parameters,
        jax.devices()[0].device_kind,
    )
    out = Path(_OUT.value)
    demo_gguf.write(out, config, train(config, data), vocabulary)
    logging.info("%s: %d bytes", out, out.stat().st_size)
    sys.stdout.write(eval_demo.report(out))


if __name__ == "__main__":
    app.run(main)
