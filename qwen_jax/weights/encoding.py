"""Float32 to the blocks of a GGUF type, by `gguf.quants` or else by `kquant_encoding`."""

from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from jaxtyping import Float

from qwen_jax.weights import kquant_encoding

TYPES = (
    *("F32", "BF16", "F16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0"),
    *("IQ4_NL", "MXFP4", "Q3_K", "Q2_K", "TQ2_0", "TQ1_0"),
)
"""What can be written, from the most bits a weight to the least."""


def encode(values: Float[np.ndarray, "R C"], kind: Type) -> np.ndarray[Any, Any]:
    """A matrix as the bytes of its blocks, a row each; columns are whole blocks."""
    if kind in kquant_encoding.ENCODERS:
        return kquant_encoding.encode(values, kind)
    return gguf.quants.quantize(values, kind)


def whole(columns: int, kind: Type) -> bool:
    """Whether rows of so many columns are whole blocks."""
    return columns % gguf.GGML_QUANT_SIZES[kind][0] == 0
