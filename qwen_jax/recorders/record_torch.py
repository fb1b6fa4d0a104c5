"""Records Qwen2 in PyTorch: transformers, vLLM, SGLang, or your own engine of their modules.

Copy this file beside your engine; it needs torch and safetensors. It writes DUMP.safetensors and
DUMP.mapping.json, which `run.py compare` reads. The text is a list of token ids, ten to a hundred.

transformers, and vLLM, which is started in this process and eagerly:

    python record_torch.py MODEL 2046,299,10,279,1450
    python record_torch.py MODEL 2046,299,10,279,1450 --engine=vllm

SGLang's server loads this file, and writes the dump when it is sent these ids as `input_ids`:

    PYTHONPATH=. python -m sglang.launch_server --model-path MODEL --disable-cuda-graph \\
        --disable-radix-cache --forward-hooks '[{"name": "record", "target_modules": ["model"],
        "hook_factory": "record_torch:sglang", "config": {"tokens": [2046, 299, 10, 279, 1450]}}]'

A program of your own, whatever it does to the model before:

    from record_torch import recording

    with recording(model, "dump.safetensors"):
        model(ids)  # one text: in one call, or by model.generate(ids, max_new_tokens=8)

What to change: where modules of your engine have other names, those in MODULES and NORMS; where
their values lie otherwise, the axes there, in the letters of docs/trace-format.md.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from qwen_jax.recorders.dump import Dump, RecorderError, token_ids
from qwen_jax.recorders.torch_model import dtype_name, find, inside, library, weights_dtype

Axes = Mapping[str, str]

MODULES: dict[str, tuple[Axes, Axes]] = {
    "self_attn.q_proj": ({}, {"q_proj": "T (N H)"}),
    "self_attn.k_proj": ({}, {"k_proj": "T (K H)"}),
    "self_attn.v_proj": ({}, {"v_proj": "T (K H)"}),
    "self_attn.qkv_proj": (
        {},
        {"q_proj": "T ([N]+K+K H)", "k_proj": "T (N+[K]+K H)", "v_proj": "T (N+K+[K] H)"},
    ),
    "self_attn.o_proj": ({"attn_out": "T (N H)"}, {"o_proj": "T D"}),
    "mlp.gate_proj": ({}, {"gate_proj": "T F"}),
    "mlp.up_proj": ({}, {"up_proj": "T F"}),
    "mlp.gate_up_proj": ({}, {"gate_proj": "T [F]+F", "up_proj": "T F+[F]"}),
    "mlp.down_proj": ({"ffn_act": "T F"}, {"down_proj": "T D"}),
}
"""Modules of a layer, what goes into them, and what comes out; of those that it has."""

NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
"""Norms of a layer, and their results."""

NEEDED = ("self_attn.o_proj", "mlp.down_proj")
"""Those without which there is nothing to record."""

STREAM, LOGITS = "T D", "T [V]+*"


class Recorder:
    """Hooks in a model, which fill a dump.

    Args:
        model: it, or what wraps it; embed_tokens, layers and norm are somewhere inside.
        dump: what it is to fill.
        tokens: the text. Calls on anything else, as when a server warms up, are passed over;
            without it every call is of the text.

    Raises:
        RecorderError: the model can't be recorded.
    """

    def __init__(self, model: torch.nn.Module, dump: Dump, tokens: Sequence[int] | None = None):
        self.dump = dump
        self.decoder, self.owner = find(model, (*NORMS, *NEEDED))
        self.dtype = weights_dtype(self.decoder, self.owner, tuple(MODULES))
        self.wanted = None if tokens is None else [int(token) for token in tokens]
        self.hidden: list[torch.Tensor] = []  # what the head gets, as the engine has it
        self.projections: list[torch.dtype] = []
        self.scores: torch.dtype | None = None
        self.layer, self.listening, self.batched = 0, False, False
        self._undo: list[Callable[[], Any]] = []
        self._attach()

    @property
    def open(self) -> bool:
        """Whether the hooks are in."""
        return bool(self._undo)

    @property
    def complete(self) -> bool:
        """Whether all of the text that was asked for has been heard."""
        return bool(self.dump.calls) and self.wanted in (None, self.dump.tokens)

    def close(self) -> None:
        """Takes the hooks out."""
        while self._undo:
            self._undo.pop()()

    def _attach(self) -> None:
        decoder, rotary = self.decoder, {}
        self._before(decoder.embed_tokens, self._begin)
        self._after(decoder.embed_tokens, lambda _, out: self._put("embed", out, STREAM))
        for i, layer in enumerate(decoder.layers):
            self._before(layer, functools.partial(self._enter, i))
            for path, (into, out) in MODULES.items():
                if module := inside(layer, path):
                    self._after(module, self._of_module(path, into, out))
            for path, name in NORMS.items():
                self._after(inside(layer, path), self._of_norm(name))
            self._after(layer.self_attn, self._of_attention)
            if module := inside(layer, "self_attn.rotary_emb"):
                rotary[id(module)] = module  # all layers may share one
        for module in rotary.values():
            self._after(module, self._of_rotary)
        self._after(decoder.norm, self._of_norm("final_norm"))
        for name in ("lm_head", "logits_processor"):
            if module := inside(self.owner, name):
                self._after(module, self._of_head)
        home = sys.modules[type(decoder.layers[0].self_attn).__module__]
        if hasattr(home, "apply_rotary_pos_emb"):
            self._around(home, "apply_rotary_pos_emb", self._of_rotation)
        self._around(torch.nn.functional, "softmax", self._of_softmax)

    def _before(self, module: torch.nn.Module, hear: Callable[[tuple, dict], None]) -> None:
        def hook(_: torch.nn.Module, args: tuple, named: dict) -> None:
            hear(args, named)

        self._undo.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def _after(self, module: torch.nn.Module, hear: Callable[[tuple, Any], None]) -> None:
        def hook(_: torch.nn.Module, args: tuple, named: dict, out: Any) -> None:
            if self.listening:
                hear((*args, *named.values()), out)

        self._undo.append(module.register_forward_hook(hook, with_kwargs=True).remove)

    def _around(self, home: Any, name: str, hear: Callable[[tuple, Any], None]) -> None:
        """Puts in a function's place one that tells of its arguments and its result."""
        real = getattr(home, name)

        def heard(*args: Any, **named: Any) -> Any:
            out = real(*args, **named)
            if self.listening:
                hear(args, out)
            return out

        change = patch.object(home, name, heard)
        change.start()
        self._undo.append(change.stop)

    def _begin(self, args: tuple, named: dict) -> None:
        """A call begins where token ids are looked up."""
        ids = (*args, *named.values())[0]
        new, done = ids.flatten().tolist(), len(self.dump.tokens)
        self.listening = self.wanted is None or (
            bool(new) and self.wanted[done : done + len(new)] == new
        )
        if not self.listening:
            return
        self.batched = ids.ndim == 2
        if self.batched and len(ids) != 1:
            raise RecorderError(f"The batch holds {len(ids)} texts; record one, without padding.")
        rows = len(self.decoder.embed_tokens.weight)
        if new and not 0 <= min(new) <= max(new) < rows:
            raise RecorderError(f"Ids go from {min(new)} to {max(new)}, but the model has {rows}.")
        if torch.is_autocast_enabled(ids.device.type):
            raise RecorderError("Under autocast weights are of two dtypes; record without it.")
        self.dump.begin(new)

    def _enter(self, layer: int, args: tuple, named: dict) -> None:
        """A layer begins; the first one is told the positions."""
        self.layer = layer
        places = named.get("position_ids", named.get("positions", args[0] if args else None))
        if layer or not self.listening or not isinstance(places, torch.Tensor):
            return
        if places.is_floating_point():
            return
        places, calls = places.flatten(), self.dump.chunks
        if len(calls) > 1 and int(places[0]) == 0:
            raise RecorderError(
                f"Call {len(calls)} begins at position 0 again; record one text, in one call or "
                "with a cache."
            )
        if len(places) == calls[-1] and bool((places.diff() < 0).any()):
            raise RecorderError("The call holds several texts one after another; send one.")

    def _put(
        self, name: str, x: torch.Tensor, axes: str | Axes, layer: int | None = None, **more: Any
    ) -> None:
        """A copy, since engines write the next result over the last."""
        x = (x[0] if self.batched else x).detach().to("cpu", copy=True).contiguous()
        if x.dtype == torch.bfloat16:  # which NumPy hasn't: its bits
            more["dtype"] = "bfloat16"
            x = x.view(torch.int16)
        array = x.numpy()
        self.dump.put(
            name, array.view(np.uint16) if "dtype" in more else array, axes, layer, **more
        )

    def _of_module(self, path: str, into: Axes, out: Axes) -> Callable[[tuple, Any], None]:
        def hear(args: tuple, result: Any) -> None:
            first = result[0] if isinstance(result, tuple) else result  # beside a bias
            self.projections.append(first.dtype)
            if into:
                self._put(f"{path}.input", args[0], into, self.layer)
            self._put(path, first, out, self.layer)

        return hear

    def _of_norm(self, name: str) -> Callable[[tuple, Any], None]:
        """A norm is of the stream, or of the sum of it and what is handed beside it; the sum is
        then its second result."""

        def hear(args: tuple, result: Any) -> None:
            beside = isinstance(result, tuple)
            normed, stream = (result[0], result[1]) if beside else (result, args[0])
            last = name == "final_norm"
            self._put(name, normed, STREAM, None if last else self.layer)
            if last:
                self.hidden.append(normed.detach().clone())
            if name == "ffn_norm":
                self._put("attn_residual", stream, STREAM, self.layer)
            elif last or self.layer:
                self._put("ffn_residual", stream, STREAM, self.layer - (not last))

        return hear

    def _of_rotary(self, args: tuple, result: Any) -> None:
        """Of a module that turns queries and keys, perhaps in place. transformers' makes angles."""
        places, *others = args
        if len(others) < 2 or places.is_floating_point():
            return
        for name, heads, x in zip(("q_rope", "k_rope"), "NK", result, strict=False):
            self._put(name, x, f"T ({heads} H)" if x.ndim == 2 else f"T {heads} H", self.layer)

    def _of_rotation(self, args: tuple, result: Any) -> None:
        """Of transformers' function, which has heads before positions."""
        for name, heads, x in zip(("q_rope", "k_rope"), "NK", result, strict=True):
            self._put(name, x, f"{heads} T H", self.layer)

    def _of_softmax(self, args: tuple, result: Any) -> None:
        """Of attention in plain PyTorch."""
        scores = args[0]
        if not self.batched or scores.ndim != 4 or scores.shape[-2] != self.dump.chunks[-1]:
            return
        # What stands where a query must not see a key.
        masked = torch.finfo(scores.dtype).min / 2
        self._put("attn_scores", scores, "N T [S]+*", self.layer, masked=masked)
        self.scores = scores.dtype

    def _of_attention(self, args: tuple, result: Any) -> None:
        """transformers' has its probabilities beside its result, where it has any."""
        beside = result[1] if isinstance(result, tuple) and len(result) > 1 else None
        if self.batched and isinstance(beside, torch.Tensor) and beside.ndim == 4:
            self._put("attn_probs", beside, "N T [S]+*", self.layer)

    def _of_head(self, args: tuple, result: Any) -> None:
        """Of every position, or not at all; another may be a tuple or an object of the engine's."""
        if isinstance(result, torch.Tensor) and result.shape[-2] == self.dump.chunks[-1]:
            self._put("logits", result, LOGITS)

    def _complete_logits(self) -> None:
        """Engines have logits of the last position only: of all, by their own head once more."""
        compute = getattr(self.owner, "compute_logits", None)
        if compute is None and not inside(self.owner, "logits_processor"):
            compute = inside(self.owner, "lm_head")
        if compute is None or all("logits" in call for call in self.dump.calls):
            return
        self.dump.notes.append("logits are the model's own head on final_norm, run once more.")
        calls, self.dump.calls = self.dump.calls, []
        for call, hidden in zip(calls, self.hidden, strict=True):
            with torch.no_grad():
                try:
                    logits = compute(hidden)
                except TypeError:  # of vLLM before 0.11, which wants to know of sampling
                    logits = compute(hidden, None)
            self.dump.calls.append({n: x for n, x in call.items() if n != "logits"})
            self._put("logits", logits, LOGITS)

    def write(self, model: str, engine: str) -> None:
        """Writes the dump, and says what to type next.

        Args:
            model: what `run.py compare` takes as --model.
            engine: its name and version.

        Raises:
            RecorderError: nothing was heard, or not the whole text.
        """
        if not self.hidden:
            raise RecorderError(
                "The model was not called on the text, or not where hooks hear it: call it inside "
                "`with recording(...)`, eagerly, without torch.compile and CUDA graphs."
            )
        if not self.complete:
            raise RecorderError(
                f"Of the text's {len(self.wanted or ())} tokens {len(self.dump.tokens)} were "
                "computed; switch prefix caching off."
            )
        self._complete_logits()
        kinds, device = self.projections, self.hidden[0].device
        self.dump.write(
            model,
            implementation=engine,
            dtype=dtype_name(self.dtype),
            activation_dtype=dtype_name(max(set(kinds), key=kinds.count)),
            matmul_precision=torch.get_float32_matmul_precision(),
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            versions={"torch": torch.__version__},
            **({"scores_dtype": dtype_name(self.scores)} if self.scores else {}),
        )


@contextlib.contextmanager
def recording(
    model: torch.nn.Module,
    path: str | os.PathLike,
    *,
    tokens: Sequence[int] | None = None,
    source: str = "",
) -> Iterator[Recorder]:
    """Records what the model computes inside, and writes it at the end.

    Args:
        tokens: the text, where the model is called on others besides.
        source: the checkpoint, for what is said at the end.

    Raises:
        RecorderError: the model, or a call, can't be recorded.
    """
    recorder = Recorder(model, Dump(path), tokens)
    try:
        yield recorder
    finally:
        recorder.close()
    known = getattr(getattr(recorder.owner, "config", None), "_name_or_path", "")
    recorder.write(source or known or "MODEL", library(recorder.decoder))


def transformers(model: str, tokens: list[int], path: str, dtype: str) -> None:
    from transformers import AutoModelForCausalLM

    file = Path(model)
    where, more = (file.parent, {"gguf_file": file.name}) if file.suffix == ".gguf" else (model, {})
    loaded = AutoModelForCausalLM.from_pretrained(
        where, dtype=dtype, attn_implementation="eager", **more
    )
    ids = torch.tensor([tokens], device=loaded.device)
    with torch.no_grad(), recording(loaded.eval(), path, source=model):
        loaded(ids)


def vllm(model: str, tokens: list[int], path: str, dtype: str) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the model has to be in this process
    from vllm import LLM, SamplingParams

    engine = LLM(model, dtype=dtype, enforce_eager=True, enable_prefix_caching=False)
    (loaded,) = engine.apply_model(lambda module: module)
    with recording(loaded, path, tokens=tokens, source=model):
        engine.generate({"prompt_token_ids": tokens}, SamplingParams(max_tokens=1))


def sglang(config: Mapping[str, Any]) -> Callable[[torch.nn.Module, Any, Any], None]:
    """A hook for --forward-hooks, on the module "model" of a Qwen2ForCausalLM: attaches a recorder
    after its first call, the server's warm-up, and writes the dump once it has heard the text.

    Args:
        config: `tokens`; `path` of the dump, and `model`, for what is said at the end.
    """
    dump = Dump(config.get("path", "dump.safetensors"))
    recorders: list[Recorder] = []

    def hook(module: torch.nn.Module, args: Any, out: Any) -> None:
        if not recorders:
            recorders.append(Recorder(module, dump, config["tokens"]))
        elif recorders[0].complete and recorders[0].open:
            recorders[0].close()
            recorders[0].write(config.get("model", "MODEL"), library(module))

    return hook


def main() -> None:
    parser = argparse.ArgumentParser(description="Records Qwen2 of transformers or vLLM.")
    parser.add_argument("model", help="a directory, a GGUF file, or a name on the Hub")
    parser.add_argument("tokens", help="ids of the text, as in 2046,299,10")
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="auto")
    parser.add_argument("--output", default="dump.safetensors")
    given = parser.parse_args()
    run = {"transformers": transformers, "vllm": vllm}[given.engine]
    try:
        Dump(given.output)  # before a model is loaded in vain
        run(given.model, token_ids(given.tokens), given.output, given.dtype)
    except (RecorderError, OSError, ImportError) as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
