"""llama.cpp as a reference: its evaluation callback through llama-cpp-python, GGUF files.

Needs the extra `[llamacpp]`. It runs on the CPU with a float32 cache and without flash attention,
so that scores and probabilities exist and nothing but the weights' own type rounds.
"""

import ctypes
import importlib.metadata
import re
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from qwen_jax.accuracy.traces.collecting import Collector
from qwen_jax.accuracy.traces.recording import model_hash
from qwen_jax.accuracy.traces.trace import Header, Trace, config_to_json, select
from qwen_jax.errors import UserError
from qwen_jax.weights.loader import Checkpoint

try:
    import llama_cpp
except (ImportError, OSError, RuntimeError) as error:
    raise UserError(
        f"The reference 'llamacpp' needs llama-cpp-python ({error}); install it with "
        "pip install 'qwen_jax[llamacpp]', which compiles it and takes some minutes."
    ) from None

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
    "attn_q.bias": "q_proj",
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

OPERANDS = {"F32": None, "F16": "float16", "BF16": "bfloat16"}
OPERANDS |= dict.fromkeys(("Q4_1", "Q5_1"), "q8_1")
OPERANDS |= dict.fromkeys(("Q1_0", "Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "MXFP4", "NVFP4"), "q8_0")
"""What an activation is rounded to for a matrix's type; "q8_K" for all others. Source: the table
`type_traits_cpu` of ggml-cpu.c."""

FLOATS = {0: np.float32, 1: np.float16, 30: ml_dtypes.bfloat16}
"""ggml's numbers of the types that a traced tensor may have."""


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


def trace(
    checkpoint: Checkpoint,
    tokens: Sequence[int],
    *,
    chunks: Sequence[int] | None = None,
    names: str | Sequence[str] = "*",
    start: int = 0,
    stop: int | None = None,
    threads: int = 2,
    skip: int = 0,
) -> Trace:
    """One text through llama.cpp.

    Args:
        chunks: how many tokens each call takes; one call by default.
        names: globs over canonical names.
        start: the first position to keep.
        stop: the one after the last; the text's end by default.
        skip: calls up to this position are not run: attention sees nothing of them.

    Raises:
        UserError: the checkpoint is no GGUF file or llama.cpp cannot run it, a glob matches
            nothing, or the positions are none of the text's.
    """
    if checkpoint.format != "gguf":
        raise UserError(f"{checkpoint.path}: llama.cpp reads GGUF files only; convert it.")
    if checkpoint.adapters:
        raise UserError(
            f"{checkpoint.adapters[0]}: llama.cpp is run here without adapters; take the reference "
            "float64 or hf."
        )
    config = checkpoint.config
    if config.rope_dim != config.head_dim:  # llama.cpp asserts, and ends the process
        raise UserError(
            f"{checkpoint.path}: {config.rope_dim} of a head's {config.head_dim} dimensions are "
            "rotated, and llama.cpp's Qwen2 rotates all or stops; choose another reference."
        )
    header = Header(
        model=str(checkpoint.path),
        model_sha256=model_hash(str(checkpoint.path)),
        config=config_to_json(config),
        implementation="llama.cpp",
        dtype="float32",
        activation_dtype="float32",
        cache_dtype="float32",
        matmul_precision="highest",
        device="cpu",
        versions={"llama-cpp-python": importlib.metadata.version("llama-cpp-python")},
        tokens=tuple(tokens),
        start=start,
        stop=len(tokens) if stop is None else stop,
        chunks=tuple(chunks or [len(tokens)]),
        operands=operands(checkpoint),
        notes=(
            f"The weights are {', '.join(checkpoint.quantization)}. llama.cpp rounds what a matrix "
            "is multiplied with to the matrix's own type, to blocks of 8 bits where that is "
            "quantised: no fault, and as much as that hides one.",
            "attn_scores are kq times scale plus mask, which llama.cpp computes within softmax.",
        ),
    )
    listener = Listener(Collector(header, select(config, names)))
    _run(str(checkpoint.path), header, listener, threads, skip)
    return listener.collector.trace()


def operands(checkpoint: Checkpoint) -> dict[str, str]:
    """By tensors' names, what llama.cpp rounds an activation to before it meets the matrix."""
    found = {}
    head = "token_embd.weight" if checkpoint.config.tied else "output.weight"
    for name, info in checkpoint.tensors.items():
        matrix = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
        kind = OPERANDS.get(info.type.name, "q8_K")
        if kind is not None and name == head:
            found["logits"] = kind
        elif kind is not None and matrix and matrix[2] in MATRICES:
            found[f"layers.{matrix[1]}.{MATRICES[matrix[2]]}"] = kind
    return found


class Listener:
    """Takes what llama.cpp's callback shows; `error` is what went wrong in there, if anything."""

    def __init__(self, collector: Collector):
        self.collector = collector
        self.position = self.length = 0
        self.error: Exception | None = None
        self._kq: dict[str, np.ndarray] = {}

    def __call__(self, address: int, ask: bool, _: object) -> bool:
        """Whether the tensor is wanted; then, once it is computed, whether to go on."""
        try:
            tensor = ctypes.cast(address, ctypes.POINTER(Tensor)).contents
            name = canonical(tensor)
            if ask:
                return name is not None
            if name is not None:
                self._keep(name, tensor)
        except Exception as error:
            # Nothing may be raised through llama.cpp; this ends its run instead.
            self.error = error
            return False
        return True

    def _keep(self, name: str, tensor: Tensor) -> None:
        layer, _, kind = name.rpartition(".")
        value = array(tensor)
        if kind in ("kq", "attn_probs"):  # [N, T, S]
            value = value.reshape(-1, self.length, value.shape[-1]).swapaxes(0, 1)
        elif re.fullmatch("[qkv]_(proj|rope)", kind):
            value = value.reshape(self.length, -1, self.collector.header.model_config.head_dim)
        if kind == "kq":
            self._kq[layer] = value
            return
        if kind == "attn_probs":
            # The softmax may overwrite its input, hence the copy made before.
            scale = np.array(tensor.op_params[0], np.int32).view(np.float32)
            mask = array(tensor.src[1].contents)[: self.length, None]
            self._add(f"{layer}.attn_scores", self._kq.pop(layer) * scale + mask)
        self._add(name, value)

    def _add(self, name: str, value: np.ndarray) -> None:
        if len(value) != self.length:
            raise UserError(
                f"llama.cpp's {name} is of {len(value)} positions, not {self.length}; this version "
                "of llama-cpp-python is not known to qwen_jax."
            )
        self.collector.add(name, self.position, value)


def canonical(tensor: Tensor) -> str | None:
    """Our name of a tensor of llama.cpp's graph, `layers.i.kq` of raw scores, None of others."""
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
        raise UserError(f"llama.cpp's {tensor.name.decode()} is of ggml type {tensor.type}.")
    dims = max([i + 1 for i in range(4) if tensor.ne[i] > 1] + [2])
    shape, strides = tensor.ne[:dims][::-1], tensor.nb[:dims][::-1]
    size = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    dtype = np.dtype(FLOATS[tensor.type])
    buffer = (ctypes.c_char * (size - 1 + dtype.itemsize)).from_address(tensor.data)
    return np.ndarray(shape, dtype, buffer, strides=strides).copy()


def _run(path: str, header: Header, listener: Listener, threads: int, skip: int) -> None:
    """Feeds the text to llama.cpp call by call."""
    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    settings = llama_cpp.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(path.encode(), settings)
    if not model:
        raise UserError(f"{path}: llama.cpp cannot load the file; try it with llama-cli.")
    callback = llama_cpp.ggml_backend_sched_eval_callback(listener)
    context = llama_cpp.llama_init_from_model(model, _context_settings(header, callback, threads))
    if not context:
        llama_cpp.llama_model_free(model)
        raise UserError(f"{path}: llama.cpp makes no context of {len(header.tokens)} tokens.")
    batch = llama_cpp.llama_batch_init(max(header.chunks), 0, 1)
    try:
        for length in header.chunks:
            if listener.position + length <= skip:
                listener.position += length
                continue
            listener.length = batch.n_tokens = length
            for i in range(length):
                batch.token[i] = header.tokens[listener.position + i]
                batch.pos[i] = listener.position + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = True
            status = llama_cpp.llama_decode(context, batch)
            if listener.error is not None:
                raise listener.error
            if status != 0:
                raise UserError(f"{path}: llama.cpp's llama_decode fails with status {status}.")
            listener.position += length
    finally:
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)
        llama_cpp.llama_log_set(llama_cpp.llama_log_callback(), ctypes.c_void_p())


def _context_settings(header: Header, callback: Callable[..., Any], threads: int) -> Any:
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = len(header.tokens)
    settings.n_batch = settings.n_ubatch = max(header.chunks)
    settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
    settings.n_threads = settings.n_threads_batch = threads
    settings.cb_eval = callback
    return settings
