"""Records llama.cpp: whole tensors of any GGUF file of Qwen2, by its evaluation callback.

`llama-eval-callback` prints three values from each end of every axis, to four decimals, and a sum:
no operation can be computed again from that. This takes the same callback through llama-cpp-python
and keeps everything. Copy it beside llama-cpp-python, numpy and safetensors. It writes
DUMP.safetensors and DUMP.mapping.json, which `run.py compare` reads.

    pip install llama-cpp-python safetensors
    python record_llamacpp.py MODEL.gguf 2046,299,10,279,1450

A llama.cpp that you have built yourself, of about the same version (cmake -DBUILD_SHARED_LIBS=ON):

    LLAMA_CPP_LIB_PATH=llama.cpp/build/bin python record_llamacpp.py MODEL.gguf 2046,299,10

What to change: names of tensors, where your graph has others, in NAMES.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from qwen_jax.recorders.dump import Dump, RecorderError, token_ids

NAMES = {
    "attn_norm": "attn_norm",
    "kqv_out": "attn_out",
    "ffn_inp": "attn_residual",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "gate_proj",
    "ffn_up": "up_proj",
    "ffn_swiglu": "ffn_act",
    "ffn_gate_par": "ffn_act",  # before SiLU and product became one operation
    "ffn_out": "down_proj",
    "l_out": "ffn_residual",
}
"""llama.cpp's names of a layer's tensors, `ffn_inp-3` say, that say which they are."""

OUTER = {
    "embd": "embed",
    "inp_embd": "embed",
    "result_norm": "final_norm",
    "result_output": "logits",
}

FACTORS = {
    "attn_q.weight": "q_proj",
    "attn_k.weight": "k_proj",
    "attn_v.weight": "v_proj",
    "attn_q.bias": "q_proj",  # is added to that product, and takes its place
    "attn_k.bias": "k_proj",
    "attn_v.bias": "v_proj",
    "attn_output.weight": "o_proj",
}
"""Parameters whose use says it: `Qcur-3` is the name before bias, after it and after rotation."""

MATRICES = {
    "attn_q": "q_proj",
    "attn_k": "k_proj",
    "attn_v": "v_proj",
    "attn_output": "o_proj",
    "ffn_gate": "gate_proj",
    "ffn_up": "up_proj",
    "ffn_down": "down_proj",
}
"""The file's matrices, `blk.3.attn_q.weight`, and what they make."""

OPERANDS = {0: None, 1: "float16", 30: "bfloat16"}  # F32, F16, BF16
OPERANDS |= dict.fromkeys((3, 7), "q8_1")  # Q4_1, Q5_1
OPERANDS |= dict.fromkeys((2, 6, 8, 20, 39, 40, 41), "q8_0")
"""What a CPU rounds an activation to for a matrix's type (Q4_0, Q5_0, Q8_0, IQ4_NL, MXFP4, NVFP4,
Q1_0); "q8_K" for all others. Source: the table `type_traits_cpu` of ggml-cpu.c."""

FLOATS = {0: np.float32, 1: np.float16}
"""ggml's numbers of the types that a recorded tensor may have."""

AXES = {
    "attn_out": "T (N H)",
    "gate_proj": "T F",
    "up_proj": "T F",
    "ffn_act": "T F",
    "q_proj": "T (N H)",
    "k_proj": "T (K H)",
    "v_proj": "T (K H)",
    "q_rope": "T (N H)",
    "k_rope": "T (K H)",
    "attn_scores": "T N [S]+*",
    "attn_probs": "T N [S]+*",
    "logits": "T [V]+*",
}
"""How arrays lie; all others "T D"."""

SCORES = "attn_scores are kq times scale plus mask, which llama.cpp computes within softmax."

_lib = llama_cpp.llama_cpp._lib
_lib.ggml_nbytes.restype = ctypes.c_size_t
_lib.ggml_nbytes.argtypes = [ctypes.c_void_p]
_lib.ggml_backend_tensor_get.restype = None
_lib.ggml_backend_tensor_get.argtypes = [
    ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t,
]  # fmt: skip


class Tensor(ctypes.Structure):
    """struct ggml_tensor of ggml.h, as far as `name`."""


Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10),
    ("view_src", ctypes.POINTER(Tensor)),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]


class Listener:
    """Takes what llama.cpp's callback shows of one call after another.

    Args:
        wants: whether a tensor is to be kept, by its name; all are by default.

    Attributes:
        heard: the tensors of the call at hand, positions first.
        operands: of products, what the activation is rounded to.
        error: what went wrong in the callback, if anything.
    """

    def __init__(self, wants: Callable[[str], bool] = lambda name: True):
        self.wants = wants
        self.length = 0
        self.heard: dict[str, np.ndarray] = {}
        self.operands: dict[str, str] = {}
        self.error: Exception | None = None
        self._kq: dict[str, np.ndarray] = {}

    def __call__(self, address: int, ask: bool, _: object) -> bool:
        """Whether the tensor is wanted; then, once it is computed, whether to go on."""
        try:
            tensor = ctypes.cast(address, ctypes.POINTER(Tensor)).contents
            name = canonical(tensor)
            if ask:
                self._note_operand(tensor)
                return name is not None
            if name is not None:
                self._keep(name, tensor)
        except Exception as error:
            # Nothing may be raised through llama.cpp; this ends its run instead.
            self.error = error
            return False
        return True

    def _note_operand(self, tensor: Tensor) -> None:
        """Of products with a matrix of the file; the head's may be that of the embedding."""
        if not tensor.src[0]:
            return
        source = tensor.src[0].contents
        matrix = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", source.name.decode())
        kind = OPERANDS.get(source.type, "q8_K")
        if kind is not None and tensor.name == b"result_output":
            self.operands["logits"] = kind
        elif kind is not None and matrix and matrix[2] in MATRICES:
            self.operands[f"layers.{matrix[1]}.{MATRICES[matrix[2]]}"] = kind

    def _keep(self, name: str, tensor: Tensor) -> None:
        layer, _, kind = name.rpartition(".")
        value = array(tensor)
        if kind in ("kq", "attn_probs"):  # [N, T, S]
            value = value.reshape(-1, self.length, value.shape[-1]).swapaxes(0, 1)
        elif re.fullmatch("[qkv]_(proj|rope)", kind):  # heads may be an axis
            value = value.reshape(self.length, -1)
        if kind == "kq":
            self._kq[layer] = value
            return
        if kind == "attn_probs" and layer in self._kq:
            # The softmax may overwrite its input, hence the copy made before.
            scale = np.array(tensor.op_params[0], np.int32).view(np.float32)
            mask = array(tensor.src[1].contents)[: self.length, None]
            self._put(f"{layer}.attn_scores", self._kq.pop(layer) * scale + mask)
        self._put(name, value)

    def _put(self, name: str, value: np.ndarray) -> None:
        if len(value) != self.length:
            raise RecorderError(
                f"llama.cpp's {name} is of {len(value)} positions, not {self.length}; this "
                "recorder does not know its graph."
            )
        if self.wants(name):
            self.heard[name] = value


def canonical(tensor: Tensor) -> str | None:
    """A tensor's name in docs/trace-format.md, `layers.i.kq` of raw scores, None of others."""
    name = tensor.name.decode()
    if name in OUTER:
        return OUTER[name]
    for source in tensor.src[:2]:
        factor = re.fullmatch(r"blk\.(\d+)\.(.*)", source.contents.name.decode() if source else "")
        if factor and factor[2] in FACTORS:
            return f"layers.{factor[1]}.{FACTORS[factor[2]]}"
    kind, _, layer = name.partition("-")
    if not layer.isdigit():
        return None
    if kind in ("Qcur", "Kcur"):
        rotated = bool(tensor.src[1]) and tensor.src[1].contents.name == b"inp_pos"
        return f"layers.{layer}.{kind[0].lower()}_rope" if rotated else None
    found = (NAMES | {"kq": "kq", "kq_soft_max": "attn_probs"}).get(kind)
    return f"layers.{layer}.{found}" if found else None


def array(tensor: Tensor) -> np.ndarray:
    """A copy of a tensor on the host, its axes outermost first, those of size one left out."""
    if tensor.type not in FLOATS:
        raise RecorderError(f"llama.cpp's {tensor.name.decode()} is of ggml type {tensor.type}.")
    dims = max([i + 1 for i in range(4) if tensor.ne[i] > 1] + [2])
    address = ctypes.addressof(tensor)
    values = np.empty(_lib.ggml_nbytes(address), np.uint8)
    _lib.ggml_backend_tensor_get(address, values.ctypes.data, 0, values.size)
    strides = tensor.nb[:dims][::-1]
    return np.ndarray(tensor.ne[:dims][::-1], FLOATS[tensor.type], values, strides=strides).copy()


def run(
    path: str,
    tokens: Sequence[int],
    chunks: Sequence[int],
    listener: Listener,
    hear: Callable[[int, dict[str, np.ndarray]], None],
    *,
    threads: int = 2,
    gpu_layers: int = 0,
    skip: int = 0,
) -> None:
    """Feeds a text to llama.cpp call by call, without flash attention and with a float32 cache, so
    that scores exist and nothing but the weights' own type rounds.

    Args:
        chunks: how many tokens each call takes.
        hear: takes each call's first position and what was heard of it.
        skip: calls up to this position are not run: attention sees nothing of them.

    Raises:
        RecorderError: llama.cpp can't load or run it, or its graph is not known here.
    """
    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    settings = llama_cpp.llama_model_default_params()
    settings.n_gpu_layers = gpu_layers
    model = llama_cpp.llama_model_load_from_file(path.encode(), settings)
    if not model:
        raise RecorderError(f"{path}: llama.cpp cannot load the file; try it with llama-cli.")
    callback = llama_cpp.ggml_backend_sched_eval_callback(listener)
    wanted = _context_settings(len(tokens), max(chunks), callback, threads)
    context = llama_cpp.llama_init_from_model(model, wanted)
    if not context:
        llama_cpp.llama_model_free(model)
        raise RecorderError(f"{path}: llama.cpp makes no context of {len(tokens)} tokens.")
    batch = llama_cpp.llama_batch_init(max(chunks), 0, 1)
    position = 0
    try:
        for length in chunks:
            if position + length <= skip:
                position += length
                continue
            listener.length, listener.heard = length, {}
            batch.n_tokens = length
            for i in range(length):
                batch.token[i] = tokens[position + i]
                batch.pos[i] = position + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = True
            status = llama_cpp.llama_decode(context, batch)
            if listener.error is not None:
                raise listener.error
            if status != 0:
                raise RecorderError(
                    f"{path}: llama.cpp's llama_decode fails with status {status} at tokens "
                    f"{position} to {position + length - 1}; are they ids of this model?"
                )
            hear(position, listener.heard)
            position += length
    finally:
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)
        llama_cpp.llama_log_set(llama_cpp.llama_log_callback(), ctypes.c_void_p())


def _context_settings(length: int, longest: int, callback: Any, threads: int) -> Any:
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = length
    settings.n_batch = settings.n_ubatch = longest
    settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
    settings.n_threads = settings.n_threads_batch = threads
    settings.cb_eval = callback
    return settings


def into(dump: Dump, tokens: Sequence[int]) -> Callable[[int, dict[str, np.ndarray]], None]:
    """Takes calls on a text into a dump, as `hear` of `run`."""

    def hear(position: int, heard: dict[str, np.ndarray]) -> None:
        length = len(next(iter(heard.values()), ()))
        dump.begin(tokens[position : position + length])
        for name, value in heard.items():
            layer, _, kind = name.removeprefix("layers.").rpartition(".")
            dump.put(kind, value, AXES.get(kind, "T D"), int(layer) if layer else None)

    return hear


def main() -> None:
    parser = argparse.ArgumentParser(description="Records llama.cpp.")
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("tokens", help="ids of the text, as in 2046,299,10")
    parser.add_argument("--decode", type=int, default=0, help="tokens at the end, one a call")
    parser.add_argument("--gpu_layers", type=int, default=0, help="layers on a GPU")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", default="dump.safetensors")
    given = parser.parse_args()
    try:
        dump, tokens = Dump(given.output), token_ids(given.tokens)
        if not Path(given.model).is_file():
            raise RecorderError(f"{given.model} is no file; name a GGUF file.")
        if not 0 <= given.decode < len(tokens):
            raise RecorderError(f"decode is {given.decode}, but must be 0 to {len(tokens) - 1}.")
        chunks, listener = [len(tokens) - given.decode, *[1] * given.decode], Listener()
        run(
            given.model, tokens, chunks, listener, into(dump, tokens),
            threads=given.threads, gpu_layers=given.gpu_layers,
        )  # fmt: skip
        dump.notes.append(SCORES)
        dump.write(
            given.model,
            implementation="llama.cpp",
            dtype="float32",
            operands=listener.operands,
            device=f"{given.gpu_layers} layers on a GPU" if given.gpu_layers else "cpu",
            versions={"llama-cpp-python": importlib.metadata.version("llama-cpp-python")},
        )
    except RecorderError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
