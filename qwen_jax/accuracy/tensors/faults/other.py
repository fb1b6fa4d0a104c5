"""Faults of norms, feed-forward and residual stream, and of precision everywhere."""

from math import erf
from typing import Any

import jax
import numpy as np

from qwen_jax.accuracy.exact.operations import NORMS, Array
from qwen_jax.accuracy.tensors.faults.fault import Fault, area, turn
from qwen_jax.accuracy.traces.trace import LINEAR

_erf = np.vectorize(erf, otypes=[np.float64])


def gelu(xp: Any, x: Array) -> Array:
    error = _erf(x / 2**0.5) if xp is np else jax.scipy.special.erf(x / 2**0.5)
    return x * (1 + error) / 2


def gelu_tanh(xp: Any, x: Array) -> Array:
    return x * (1 + xp.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x * x * x))) / 2


def relu(xp: Any, x: Array) -> Array:
    return xp.maximum(x, 0)


def sigmoid(xp: Any, x: Array) -> Array:
    return 1 / (1 + xp.exp(-x))


NORM = area(
    "norm",
    (
        Fault(
            "norm_eps_1e-5",
            NORMS,
            "eps is 1e-5",
            "ggml-org/llama.cpp#2374",
            knobs=turn(eps=1e-5),
            possible=lambda c: abs(c.rms_eps - 1e-5) > 1e-7,
            faint=True,
        ),
        Fault("norm_eps_zero", NORMS, "eps is zero", knobs=turn(eps=0.0), faint=True),
        Fault(
            "norm_centered",
            NORMS,
            "the mean is subtracted, as LayerNorm does",
            knobs=turn(centered=True),
        ),
        Fault(
            "final_norm_missing",
            ("final_norm",),
            "the final norm does nothing",
            knobs=turn(identity=True),
        ),
    ),
)

FEED_FORWARD = area(
    "feed-forward",
    (
        Fault("gelu", ("ffn_act",), "GELU stands for SiLU", knobs=turn(activation=gelu)),
        Fault(
            "gelu_tanh",
            ("ffn_act",),
            "GELU in its tanh form stands for SiLU",
            knobs=turn(activation=gelu_tanh),
        ),
        Fault("relu", ("ffn_act",), "ReLU stands for SiLU", knobs=turn(activation=relu)),
        Fault(
            "sigmoid",
            ("ffn_act",),
            "the gate is sigmoid(x), not x sigmoid(x)",
            knobs=turn(activation=sigmoid),
        ),
        Fault(
            "silu_on_up",
            ("ffn_act",),
            "SiLU is applied to up, not to gate",
            knobs=turn(swapped=True),
        ),
        Fault(
            "attn_residual_missing",
            ("attn_residual",),
            "attention's output replaces the residual stream",
            knobs=turn(residual=0.0),
        ),
        Fault(
            "ffn_residual_missing",
            ("ffn_residual",),
            "the feed-forward's output replaces the residual stream",
            knobs=turn(residual=0.0),
        ),
    ),
)


def rounded(name: str, operations: tuple[str, ...], dtype: str, what: str, report: str) -> Fault:
    return Fault(name, operations, f"{what} rounded to {dtype}", report, knobs=turn(output=dtype))


RESIDUALS = ("attn_residual", "ffn_residual")

PRECISION = area(
    "precision",
    (
        rounded("scores_f16", ("attn_scores",), "float16", "scores are", "ggml-org/llama.cpp#8412"),
        rounded(
            "scores_bf16",
            ("attn_scores",),
            "bfloat16",
            "scores are",
            "huggingface/transformers#33317",
        ),
        *(
            Fault(
                f"scores_{short}_twice",
                ("attn_scores",),
                f"scores are rounded to {dtype} before they are scaled, and after",
                "huggingface/transformers#33317",
                knobs=turn(product=dtype, output=dtype),
            )
            for short, dtype in (("bf16", "bfloat16"), ("f16", "float16"))
        ),
        rounded("probs_bf16", ("attn_probs",), "bfloat16", "probabilities are", ""),
        rounded("down_proj_f16", ("down_proj",), "float16", "down_proj is", "intel/auto-round#457"),
        rounded(
            "stream_f16", RESIDUALS, "float16", "the residual stream is", "vllm-project/vllm#14126"
        ),
        rounded("stream_bf16", RESIDUALS, "bfloat16", "the residual stream is", ""),
        rounded("logits_bf16", ("logits",), "bfloat16", "logits are", ""),
        Fault(
            "norm_statistics_bf16",
            NORMS,
            "the norm's mean and scale are bfloat16",
            knobs=turn(statistics="bfloat16"),
        ),
        Fault(
            "compiler",
            NORMS,
            "the compiler's sum over a row leaves out the squares of its end",
            "jax-ml/jax#39103",
            knobs=turn(left_out=1 / 128),
        ),
        Fault(
            "products_tf32",
            LINEAR,
            "matrix products round their operands to TF32",
            "jax-ml/jax#9973",
            knobs=turn(operand="tf32"),
        ),
        Fault(
            "products_f16",
            LINEAR,
            "matrix products round their operands to float16",
            knobs=turn(operand="float16"),
        ),
        Fault(
            "products_bf16",
            LINEAR,
            "matrix products round their operands to bfloat16",
            "jax-ml/jax#9973",
            knobs=turn(operand="bfloat16"),
        ),
    ),
)
