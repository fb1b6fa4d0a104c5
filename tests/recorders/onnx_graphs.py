"""Qwen2 as ONNX, in the names and fused operations of ONNX Runtime GenAI's model builder.

Written for the tests; what is planted goes by the names of the laboratory's catalogue.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qwen_jax.config import ModelConfig

MS = "com.microsoft"


class Builder:
    """Collects nodes and initializers; values are named as theirs, after their node."""

    def __init__(self, config: ModelConfig, params: Mapping[str, np.ndarray], fault: str):
        self.config, self.params, self.fault = config, params, fault
        self.nodes: list[onnx.NodeProto] = []
        self.held: list[onnx.TensorProto] = []

    def constant(self, name: str, value: np.ndarray) -> str:
        if name not in {x.name for x in self.held}:
            self.held.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(self, name: str, op: str, inputs: list[str], outputs: int = 1, **attributes: object):  # type: ignore[no-untyped-def]
        made = [f"{name}/output_{i}" for i in range(outputs)]
        domain = MS if op in FUSED else ""
        self.nodes.append(helper.make_node(op, inputs, made, name, domain=domain, **attributes))
        return made[0] if outputs == 1 else made

    def linear(self, name: str, x: str, key: str) -> str:
        weight = self.constant(f"{key}.weight", self.params[f"{key}.weight"].T)
        out = self.node(f"{name}/MatMul", "MatMul", [x, weight])
        bias = self.params.get(f"{key}.bias")
        if bias is None or self.fault == "zero_qkv_bias":
            return out
        return self.node(f"{name}/Add", "Add", [out, self.constant(f"{key}.bias", bias)])

    def rotary(self, name: str, x: str) -> str:
        half = self.config.head_dim // 2
        theta = 1e4 if self.fault == "rope_theta_1e4" else self.config.rope_theta
        angles = np.outer(np.arange(256), theta ** (-np.arange(half) / half))
        caches = [
            self.constant(f"{kind}_cache", f(angles).astype(np.float32))
            for kind, f in {"cos": np.cos, "sin": np.sin}.items()
        ]
        interleaved = int(self.fault == "rope_interleaved")
        return self.node(
            f"{name}/RotaryEmbedding", "RotaryEmbedding", [x, "position_ids", *caches],
            interleaved=interleaved, rotary_embedding_dim=0, num_heads=0,
        )  # fmt: skip

    def layer(self, i: int, x: str, beside: str) -> tuple[str, str]:
        """What a layer adds to the stream, and the stream, which the next norm adds up."""
        at, key = f"/model/layers.{i}", f"model.layers.{i}"
        x, stream = self.norm(f"{at}/input_layernorm", f"{key}.input_layernorm", x, beside)
        q, k, v = (
            self.linear(f"{at}/attn/{n}_proj", x, f"{key}.self_attn.{n}_proj") for n in "qkv"
        )
        q, k = self.rotary(f"{at}/attn/q_rotary", q), self.rotary(f"{at}/attn/k_rotary", k)
        attended, *_ = self.node(
            f"{at}/attn/GroupQueryAttention", "GroupQueryAttention",
            [q, k, v, *(f"past_key_values.{i}.{n}" for n in ("key", "value")), "last", "total"],
            outputs=3, num_heads=self.config.num_heads, kv_num_heads=self.config.num_kv_heads,
        )  # fmt: skip
        x = self.linear(f"{at}/attn/o_proj", attended, f"{key}.self_attn.o_proj")
        name = "post_attention_layernorm"
        x, stream = self.norm(f"{at}/{name}", f"{key}.{name}", x, stream)
        gate, up = (self.linear(f"{at}/mlp/{n}_proj", x, f"{key}.mlp.{n}_proj") for n in GATED)
        sigmoid = self.node(f"{at}/mlp/act_fn/Sigmoid", "Sigmoid", [gate])
        act = self.node(f"{at}/mlp/act_fn/Mul", "Mul", [gate, sigmoid])
        act = self.node(f"{at}/mlp/Mul", "Mul", [act, up])
        return self.linear(f"{at}/mlp/down_proj", act, f"{key}.mlp.down_proj"), stream

    def norm(self, name: str, key: str, x: str, beside: str) -> tuple[str, str]:
        weight = self.constant(f"{key}.weight", self.params[f"{key}.weight"])
        eps = self.config.rms_eps
        if not beside:
            op = "SimplifiedLayerNormalization"
            return self.node(f"{name}/LayerNorm", op, [x, weight], epsilon=eps, axis=-1), x
        op = "SkipSimplifiedLayerNormalization"
        normed, _, _, stream = self.node(
            f"{name}/SkipLayerNorm", op, [beside, x, weight], outputs=4, epsilon=eps
        )
        self.nodes[-1].output[1] = self.nodes[-1].output[2] = ""
        return normed, stream


FUSED = ("RotaryEmbedding", "GroupQueryAttention", "SkipSimplifiedLayerNormalization")
GATED = ("gate", "up")


def write(
    path: Path, config: ModelConfig, params: Mapping[str, np.ndarray], fault: str = ""
) -> Path:
    made = Builder(config, params, fault)
    table = made.constant("embed", params["model.embed_tokens.weight"])
    x = made.node("/model/embed_tokens/Gather", "Gather", [table, "input_ids"])
    one = made.constant("one", np.array([1], np.int64))
    count = made.node("/model/attn_mask/ReduceSum", "ReduceSum", ["attention_mask", one])
    less = made.node("/model/attn_mask/Sub", "Sub", [count, one])
    shape = made.node("/model/attn_mask/Shape", "Shape", ["attention_mask"])
    total = made.node(
        "/model/attn_mask/Gather", "Gather", [shape, made.constant("at", np.array(1))]
    )
    for name, source in {"last": less, "total": total}.items():
        cast = helper.make_node("Cast", [source], [name], f"/model/attn_mask/{name}", to=6)
        made.nodes.append(cast)
    stream = ""
    for i in range(config.num_layers):
        x, stream = made.layer(i, x, stream)
    last = f"/model/layers.{config.num_layers}/final_norm_layernorm"
    x, _ = made.norm(last, "model.norm", x, stream)
    made.nodes[-1].output.pop()
    made.linear("/lm_head", x, "lm_head")
    made.nodes[-1].output[0] = "logits"
    cache = ["batch_size", config.num_kv_heads, "past_sequence_length", config.head_dim]
    inputs = {"input_ids": TensorProto.INT64, "attention_mask": TensorProto.INT64}
    inputs |= {"position_ids": TensorProto.INT64}
    pasts = [f"past_key_values.{i}.{n}" for i in range(config.num_layers) for n in ("key", "value")]
    values = [helper.make_tensor_value_info(n, t, ["batch_size", "t"]) for n, t in inputs.items()]
    values += [helper.make_tensor_value_info(n, TensorProto.FLOAT, cache) for n in pasts]
    logits = ["batch_size", "t", config.vocab_size]
    out = helper.make_tensor_value_info("logits", TensorProto.FLOAT, logits)
    graph = helper.make_graph(made.nodes, "main_graph", values, [out], made.held)
    sets = [helper.make_opsetid("", 18), helper.make_opsetid(MS, 1)]
    onnx.save(helper.make_model(graph, opset_imports=sets, ir_version=9), path)
    return path
