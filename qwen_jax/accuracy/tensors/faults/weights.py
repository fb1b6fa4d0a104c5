"""Faults of parameters: zeroed, transposed, permuted, exchanged, misread."""

from collections.abc import Callable

import numpy as np

from qwen_jax.accuracy import transforms
from qwen_jax.accuracy.exact.operations import NORMS
from qwen_jax.accuracy.exact.parameters import BIASED, LAYER, Arrays, Weights
from qwen_jax.accuracy.exact.rounding import round_to
from qwen_jax.accuracy.tensors.faults.fault import Fault, area, turn
from qwen_jax.config import ModelConfig

MATRICES = tuple(name for name in (*LAYER, "logits") if "norm" not in name)
BLOCK = 32
"""Values of a row in one quantised block, of the simple formats."""


def zeroed(weights: Weights, name: str) -> Arrays:
    weight, *rest = weights[name]
    return (np.zeros_like(weight), *rest)


def transposed(weights: Weights, name: str) -> Arrays:
    """The bytes of an [out, in] matrix read as [in, out]."""
    weight, *rest = weights[name]
    return (weight.reshape(weight.shape[::-1]).T, *rest)


def first_block(weights: Weights, name: str) -> Arrays:
    """Past each row's first block there are zeros."""
    weight, *rest = weights[name]
    return (transforms.first_block(weight, BLOCK), *rest)


def without_bias(weights: Weights, name: str) -> Arrays:
    weight, bias = weights[name]
    return weight, np.zeros_like(bias)


def of_layer(step: int) -> Callable[[Weights, str], Arrays]:
    """The parameters of the layer so many further on; after the last comes the first."""

    def other(weights: Weights, name: str) -> Arrays:
        assert weights.layer is not None
        layer = (weights.layer + step) % weights.config.num_layers
        return Weights(weights.source, layer)[name]

    return other


def rounded(dtype: str) -> Callable[[Weights, str], Arrays]:
    return lambda weights, name: tuple(round_to(a, dtype, np) for a in weights[name])


def heads_of(config: ModelConfig, name: str) -> int:
    return config.num_heads if name == "q_proj" else config.num_kv_heads


def all_unpermuted(weights: Weights, name: str) -> Arrays:
    return tuple(transforms.unpermuted(a, heads_of(weights.config, name)) for a in weights[name])


def all_permuted(weights: Weights, name: str) -> Arrays:
    return tuple(transforms.permuted(a, heads_of(weights.config, name)) for a in weights[name])


def weight_unpermuted(weights: Weights, name: str) -> Arrays:
    weight, bias = weights[name]
    return transforms.unpermuted(weight, heads_of(weights.config, name)), bias


def k_permuted_by_query_heads(weights: Weights, name: str) -> Arrays:
    return tuple(transforms.permuted(a, weights.config.num_heads) for a in weights[name])


def grouped_rows(weights: Weights, name: str) -> Arrays:
    """The stacked rows [q; k; v] taken as one [G q heads, k, v] group after another."""
    config = weights.config
    group, kv, dim = config.group_size, config.num_kv_heads, config.head_dim
    own = {
        "q_proj": slice(0, group),
        "k_proj": slice(group, group + 1),
        "v_proj": slice(group + 1, group + 2),
    }[name]
    fused = [np.concatenate(parts) for parts in zip(*(weights[n] for n in BIASED), strict=True)]
    groups = [a.reshape(kv, group + 2, dim, *a.shape[1:]) for a in fused]
    return tuple(g[:, own].reshape(-1, *g.shape[3:]) for g in groups)


def exchanged(first: str, second: str):  # type: ignore[no-untyped-def]
    return lambda weights, name: weights[second if name == first else first]


def ones(weights: Weights, name: str) -> Arrays:
    return (np.ones_like(weights[name][0]),)


def plus_one(weights: Weights, name: str) -> Arrays:
    return (weights[name][0] + 1,)


def embedding_as_head(weights: Weights, name: str) -> Arrays:
    return weights["embed"]


def _for_matrix(name: str) -> tuple[Fault, ...]:
    short = "lm_head" if name == "logits" else name
    return (
        Fault(
            f"zeroed_{short}",
            (name,),
            f"the matrix of {short} is zero",
            "GradientHQ/parallax#444" if name == "logits" else "",
            parameters=zeroed,
        ),
        Fault(
            f"transposed_{short}",
            (name,),
            f"the matrix of {short} is read as [in, out]",
            "ggml-org/llama.cpp#6040",
            parameters=transposed,
        ),
        Fault(
            f"first_block_{short}",
            (name,),
            f"of {short} only the first block of every row is decoded",
            "1bit-MONSTER/1bit-MONSTER#450",
            parameters=first_block,
        ),
    )


QK = ("q_proj", "k_proj")

WEIGHTS = area(
    "weights",
    (
        *(fault for name in MATRICES for fault in _for_matrix(name)),
        Fault(
            "zero_qkv_bias",
            BIASED,
            "biases are zero",
            "sbryngelson/ANEForge#253",
            parameters=without_bias,
        ),
        Fault("double_qkv_bias", BIASED, "the biases are added twice", knobs=turn(bias=2.0)),
        Fault("negative_qkv_bias", BIASED, "the biases are subtracted", knobs=turn(bias=-1.0)),
        Fault(
            "qk_unpermuted",
            QK,
            "rows, biases too, are un-permuted as if llama's",
            "onnxruntime/mobius#396",
            parameters=all_unpermuted,
        ),
        Fault(
            "qk_unpermuted_weight",
            QK,
            "rows are un-permuted as if llama's, biases not",
            "onnxruntime/mobius#396",
            parameters=weight_unpermuted,
        ),
        Fault(
            "qk_permuted",
            QK,
            "rows are permuted as llama's converter does",
            "ggml-org/llama.cpp#22611",
            parameters=all_permuted,
        ),
        Fault(
            "k_permuted_by_query_heads",
            ("k_proj",),
            "rows of k are permuted by the number of query heads",
            "ggml-org/llama.cpp#3364",
            parameters=k_permuted_by_query_heads,
            possible=lambda c: (
                c.group_size > 1 and not c.num_kv_heads * c.head_dim % (2 * c.num_heads)
            ),
        ),
        Fault(
            "kv_exchanged",
            ("k_proj", "v_proj"),
            "k has the parameters of v, and v those of k",
            parameters=exchanged("k_proj", "v_proj"),
        ),
        Fault(
            "qk_exchanged",
            QK,
            "q has the parameters of k, and k those of q",
            parameters=exchanged("q_proj", "k_proj"),
            possible=lambda c: c.group_size == 1,
        ),
        Fault(
            "qkv_rows_grouped",
            BIASED,
            "the fused rows are taken as groups of q, k, v",
            parameters=grouped_rows,
            possible=lambda c: c.num_kv_heads > 1,
        ),
        Fault(
            "gate_up_exchanged",
            ("gate_proj", "up_proj"),
            "gate has the matrix of up, and up that of gate",
            parameters=exchanged("gate_proj", "up_proj"),
        ),
        Fault(
            "next_layer_weights",
            LAYER,
            "a layer has the parameters of the next",
            parameters=of_layer(1),
            possible=lambda c: c.num_layers > 1,
        ),
        Fault(
            "previous_layer_weights",
            LAYER,
            "a layer has the parameters of the one before",
            parameters=of_layer(-1),
            possible=lambda c: c.num_layers > 2,  # of two layers it is also the next
        ),
        *(
            Fault(
                f"weights_{short}",
                ("embed", *MATRICES),
                f"matrices and biases are rounded to {dtype}",
                parameters=rounded(dtype),
            )
            for short, dtype in (("bf16", "bfloat16"), ("f16", "float16"))
        ),
        Fault("norms_of_ones", NORMS, "the norms' weights are one", parameters=ones),
        Fault("norms_plus_one", NORMS, "one is added to the norms' weights", parameters=plus_one),
        Fault(
            "head_tied",
            ("logits",),
            "the head is the embedding, though not tied to it",
            "pegainfer-project/pegainfer#544",
            parameters=embedding_as_head,
            possible=lambda c: not c.tied,
        ),
        Fault(
            "embedding_scaled",
            ("embed",),
            "the embedding is multiplied by sqrt(D)",
            knobs=lambda c: ({"embed_scale": c.hidden_size**0.5},),
        ),
        Fault(
            "embedding_next_row",
            ("embed",),
            "a token has the embedding of the next id",
            parameters=lambda weights, name: (np.roll(weights[name][0], -1, axis=0),),
        ),
    ),
)
