"""llama.cpp as a reference: the recorder for it, with a header from the checkpoint.

Needs the extra `[llamacpp]`. It runs on the CPU with a float32 cache and without flash attention,
so that scores and probabilities exist and nothing but the weights' own type rounds.
"""

import importlib.metadata
import re
from collections.abc import Sequence

import numpy as np

from qwen_jax.accuracy.traces.collecting import Collector
from qwen_jax.accuracy.traces.recording import model_hash
from qwen_jax.accuracy.traces.trace import Header, Trace, config_to_json, select
from qwen_jax.errors import UserError
from qwen_jax.weights.loader import Checkpoint

try:
    from qwen_jax.recorders import record_llamacpp as recorder
except (ImportError, OSError, RuntimeError) as error:
    raise UserError(
        f"The reference 'llamacpp' needs llama-cpp-python ({error}); install it with "
        "pip install 'qwen_jax[llamacpp]', which compiles it and takes some minutes."
    ) from None


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
            recorder.SCORES,
        ),
    )
    wanted = select(config, names)
    collector = Collector(header, wanted)

    def hear(position: int, heard: dict[str, np.ndarray]) -> None:
        for name, value in heard.items():
            if re.search(r"\.[qkv]_(proj|rope)$", name):
                value = value.reshape(len(value), -1, config.head_dim)
            collector.add(name, position, value)

    path, listener = str(checkpoint.path), recorder.Listener(set(wanted).__contains__)
    try:
        recorder.run(path, tokens, header.chunks, listener, hear, threads=threads, skip=skip)
    except recorder.RecorderError as error:
        raise UserError(str(error)) from None
    return collector.trace()


def operands(checkpoint: Checkpoint) -> dict[str, str]:
    """By tensors' names, what llama.cpp rounds an activation to before it meets the matrix."""
    found = {}
    head = "token_embd.weight" if checkpoint.config.tied else "output.weight"
    for name, info in checkpoint.tensors.items():
        matrix = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
        kind = recorder.OPERANDS.get(info.type.value, "q8_K")
        if kind is not None and name == head:
            found["logits"] = kind
        elif kind is not None and matrix and matrix[2] in recorder.MATRICES:
            found[f"layers.{matrix[1]}.{recorder.MATRICES[matrix[2]]}"] = kind
    return found
