"""Records Qwen2 in JAX, jitted or not: around modules of Flax, and by a tap in any code.

Copy this file beside your engine; it needs jax, numpy and safetensors. It writes DUMP.safetensors
and DUMP.mapping.json, which `run.py compare` reads. The text is ten to a hundred tokens.

    from record_jax import recording, tap

    with recording("dump.safetensors", model):  # a model of Flax NNX; of Linen: no model at all
        model(ids)  # one text: in one call, or by your own loop of decode steps

Modules are known by their last names, in MODULES below. What is no module takes a line:

    q = tap("q_rope", q, "1 T N H")  # in your rotary embedding, or after it
    scores = tap("attn_scores", scores, "1 N T S")  # after scale and mask

Without Flax taps do it all. They cost nothing where nobody records. In a scan over layers, say
which: tap("q_proj", q, "T (N H)", layer=i). The first one is of the token ids, tap("tokens", ids).
In bfloat16 XLA may hand on wider values than a tap sees, and what comes of them then looks wrong:
XLA_FLAGS=--xla_allow_excess_precision=false keeps it from that.

What to change: the names in MODULES, and how values lie, in the letters of docs/trace-format.md.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import io_callback

from qwen_jax.recorders.dump import Dump, RecorderError

MODULES = {
    "embed_tokens": "embed",
    "embedder": "embed",
    "input_layernorm": "attn_norm",
    "q_proj": "q_proj",
    "k_proj": "k_proj",
    "v_proj": "v_proj",
    "o_proj": "o_proj",
    "post_attention_layernorm": "ffn_norm",
    "gate_proj": "gate_proj",
    "up_proj": "up_proj",
    "down_proj": "down_proj",
    "norm": "final_norm",
    "final_norm": "final_norm",
    "lm_head": "logits",
}
"""Modules, by the last of their names, and what comes out of them."""

INPUTS = {
    "o_proj": "attn_out",
    "post_attention_layernorm": "attn_residual",
    "down_proj": "ffn_act",
}
"""Modules whose input is a tensor of its own; those of the next norm are the layer's result."""

AXES = {
    "q_proj": ("T (N H)", "T N H"),
    "k_proj": ("T (K H)", "T K H"),
    "v_proj": ("T (K H)", "T K H"),
    "q_rope": ("T (N H)", "T N H"),
    "k_rope": ("T (K H)", "T K H"),
    "attn_out": ("T (N H)", "T N H"),
    "gate_proj": ("T F",),
    "up_proj": ("T F",),
    "ffn_act": ("T F",),
    "logits": ("T [V]+*",),
}
"""How values of two axes lie, and of three, where a tap doesn't say; all others "T D"."""

OUTER = ("embed", "final_norm", "logits")

LAYER = re.compile(r"(?:^|[._])(?:layers?|blocks?|h)[._](\d+)(?:[._]|$)")
"""The number of a layer in a module's path."""


class _Recording:
    """What is heard between the beginning and the end of `recording`."""

    def __init__(self, path: str | os.PathLike):
        self.dump = Dump(path)
        self.layer = 0  # whose modules are being traced
        self.batched = False
        self.projections: list[str] = []
        self.error: Exception | None = None

    def hear(self, name: str, axes: str | None, masked: float, layer: Any, x: Any) -> None:
        """Runs on the host, when the program comes to a tap; errors are told at the end."""
        try:
            if self.error is None:
                self._hear(name, axes, masked, int(layer), np.array(x))
        except Exception as error:
            self.error = error

    def _hear(self, name: str, axes: str | None, masked: float, layer: int, x: np.ndarray) -> None:
        if name == "tokens":
            self.batched = x.ndim == 2
            if self.batched and len(x) != 1:
                raise RecorderError(f"The batch holds {len(x)} texts; record one, without padding.")
            self.dump.begin(x.reshape(-1).tolist())
            return
        if not self.dump.calls:
            raise RecorderError(
                f'{name} came before the token ids; begin with tap("tokens", ids), or give '
                "`recording` the tokens."
            )
        if axes is None:
            x = x[0] if self.batched and len(x) == 1 else x
            known = AXES.get(name, ("T D",))
            if not 2 <= x.ndim < len(known) + 2:
                raise RecorderError(f"{name} has the shape {x.shape}; say its axes in the tap.")
            axes = known[x.ndim - 2]
        if name.endswith("_proj"):
            self.projections.append(x.dtype.name)
        more = {"masked": masked} if name == "attn_scores" else {}
        self.dump.put(name, x, {name: axes}, None if name in OUTER else layer, **more)


_open: _Recording | None = None


def tap(
    name: str, x: Any, axes: str | None = None, *, layer: Any = None, masked: float | None = None
) -> Any:
    """Returns x, which an open recording keeps; without one this is nothing.

    Args:
        name: as in docs/trace-format.md, without "layers.{i}.": "q_rope"; or "tokens".
        axes: how it lies, as in "1 T N H".
        layer: its number, which may be traced; by default that of the module being traced.
        masked: scores at or below it are masked; what -1e9 and the least number come to is known.
    """
    heard = _open
    if heard is None:
        return x
    least = -3e4 if x.dtype == np.float16 else -1e8
    hear = functools.partial(heard.hear, name, axes, least if masked is None else masked)
    io_callback(hear, None, heard.layer if layer is None else layer, x, ordered=True)
    return x


@contextlib.contextmanager
def recording(
    path: str | os.PathLike,
    model: Any = None,
    *,
    tokens: list[int] | None = None,
    dtype: str | None = None,
    engine: str = "an engine in JAX",
    source: str = "MODEL",
) -> Iterator[None]:
    """Records what is computed inside, and writes it at the end.

    Programs that were compiled before are compiled again with taps, and afterwards without.

    Args:
        path: x.safetensors.
        model: of Flax NNX, whose modules are to be heard; those of Linen are heard without.
        tokens: the text, where the model is called once and nobody taps its ids.
        dtype: of the weights, where it isn't that of the projections' results.
        engine: its name and version.
        source: the checkpoint, as `run.py compare` takes it.

    Raises:
        RecorderError: nothing was heard, or what can't be recorded.
    """
    global _open
    if _open is not None:
        raise RecorderError("A recording is open already; end it first.")
    heard = _Recording(path)
    if tokens is not None:
        heard.dump.begin(tokens)
    jax.clear_caches()
    try:
        with _nnx_modules(model, heard), _linen_modules(heard):
            _open = heard
            yield
            jax.effects_barrier()
    finally:
        _open = None
        jax.clear_caches()
    if heard.error is not None:
        raise heard.error
    if not heard.dump.tensors:
        raise RecorderError(
            "No tap and no module was heard: call the model inside `with recording(...)`, and not "
            "a program that was compiled ahead of time."
        )
    kinds = heard.projections or ["float32"]
    usual, device = max(set(kinds), key=kinds.count), jax.devices()[0]
    precision = getattr(jax.config, "jax_default_matmul_precision", None)
    heard.dump.write(
        source,
        implementation=engine,
        dtype=dtype or usual,
        activation_dtype=usual,
        matmul_precision=precision or ("highest" if device.platform == "cpu" else "default"),
        device=device.device_kind,
        versions={"jax": jax.__version__},
    )


def _through(heard: _Recording, path: str, call: Any, args: tuple, named: dict) -> Any:
    """A module's call, with its input and its result heard where it is known."""
    last, found = path.rpartition(".")[2], LAYER.search(path)
    if last not in MODULES:
        return call(*args, **named)
    name = MODULES[last]
    if found:
        heard.layer = int(found[1])
    x = (*args, *named.values())[0]
    if name == "embed":
        tap("tokens", x)
    if last in INPUTS:
        tap(INPUTS[last], x)
    elif name == "final_norm" or (name == "attn_norm" and heard.layer):
        tap("ffn_residual", x, layer=heard.layer - (name == "attn_norm"))
    out = call(*args, **named)
    tap(name, out)
    return out


@contextlib.contextmanager
def _nnx_modules(model: Any, heard: _Recording) -> Iterator[None]:
    """Puts a listener around every known module of a model, and takes it away again."""
    if model is None:
        yield
        return
    from flax import nnx

    class Listener(nnx.Module):
        def __init__(self, inner: Any, path: str):
            self.inner, self.path = inner, path

        def __call__(self, *args: Any, **named: Any) -> Any:
            return _through(heard, self.path, self.inner, args, named)

        def __getattr__(self, name: str) -> Any:  # of what isn't there: the inner one's
            return getattr(object.__getattribute__(self, "inner"), name)

    if not isinstance(model, nnx.Module):
        raise RecorderError(f"The model is a {type(model).__name__}, but must be an nnx.Module.")
    known = [
        (path, module)
        for path, module in nnx.iter_modules(model)
        if path and str(path[-1]) in MODULES
    ]
    if not known:
        raise RecorderError(f"{type(model).__name__} has no module named in MODULES; add yours.")
    try:
        for path, module in known:
            _set(model, path, Listener(module, ".".join(map(str, path))))
        yield
    finally:
        for path, module in known:
            _set(model, path, module)


def _set(model: Any, path: tuple, module: Any) -> None:
    for name in path[:-1]:
        model = model[name] if isinstance(name, int) else getattr(model, name)
    setattr(model, path[-1], module)


@contextlib.contextmanager
def _linen_modules(heard: _Recording) -> Iterator[None]:
    """Hears every known module of Linen that is called."""
    if importlib.util.find_spec("flax") is None:
        yield
        return
    from flax import linen

    def intercept(call: Any, args: tuple, named: dict, context: Any) -> Any:
        if context.method_name != "__call__":
            return call(*args, **named)
        return _through(heard, ".".join(context.module.path), call, args, named)

    with linen.intercept_methods(intercept):
        yield
