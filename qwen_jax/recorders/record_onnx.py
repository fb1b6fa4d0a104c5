"""Records ONNX: a Qwen2 graph's inner values made its outputs, and run by ONNX Runtime.

Copy this file beside onnx, onnxruntime, numpy and safetensors. It writes DUMP.safetensors and
DUMP.mapping.json, which `run.py compare` reads. The text is a list of token ids, ten to a hundred.

    python record_onnx.py model.onnx 2046,299,10,279,1450
    python record_onnx.py model.onnx 2046,299,10,279,1450 --list  # what would be recorded

Values are found by the modules that exporters leave in the names of nodes (PyTorch's two exporters,
optimum, the model builder of ONNX Runtime GenAI), and rotations and softmaxes by their shape.

What to change: modules of other names, in MODULES; a value that isn't found, in TAKE.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime

from qwen_jax.recorders.dump import Dump, RecorderError, token_ids

TAKE: dict[str, str] = {}
"""Values that win over what is found, as {"q_rope": "/layers.{i}/self_attn/Add_output_0"}."""

MODULES = {
    "embed_tokens": "embed",
    "input_layernorm": "attn_norm",
    "q_proj": "q_proj",
    "k_proj": "k_proj",
    "v_proj": "v_proj",
    "qkv_proj": "qkv_proj",
    "q_rotary": "q_rope",
    "k_rotary": "k_rope",
    "o_proj": "o_proj",
    "post_attention_layernorm": "ffn_norm",
    "gate_proj": "gate_proj",
    "up_proj": "up_proj",
    "gate_up_proj": "gate_up_proj",
    "down_proj": "down_proj",
    "norm": "final_norm",
    "final_norm_layernorm": "final_norm",
    "lm_head": "logits",
}
"""Modules, by the last of their names, and what comes out of them."""

INPUTS = {"o_proj": "attn_out", "down_proj": "ffn_act"}
"""Modules whose input is a tensor of its own; those of norms are the stream."""

AXES: dict[str, dict[str, str]] = {
    "q_proj": {"q_proj": "T (N H)"},
    "k_proj": {"k_proj": "T (K H)"},
    "v_proj": {"v_proj": "T (K H)"},
    "qkv_proj": {"q_proj": "T ([N]+K+K H)", "k_proj": "T (N+[K]+K H)", "v_proj": "T (N+K+[K] H)"},
    "q_rope": {"q_rope": "T (N H)"},
    "k_rope": {"k_rope": "T (K H)"},
    "attn_out": {"attn_out": "T (N H)"},
    "gate_proj": {"gate_proj": "T F"},
    "up_proj": {"up_proj": "T F"},
    "gate_up_proj": {"gate_proj": "T [F]+F", "up_proj": "T F+[F]"},
    "ffn_act": {"ffn_act": "T F"},
    "logits": {"logits": "T [V]+*"},
}
"""How values lie that have an axis of positions and one other, after a batch of one."""

BY_HEAD = {"q_rope": "N T H", "k_rope": "K T H", "attn_scores": "N T [S]+*"}
BY_HEAD["attn_probs"] = BY_HEAD["attn_scores"]
"""How values lie that have heads before positions."""

OUTER = ("embed", "final_norm", "logits")

QUANTISED = ("MatMulNBits", "MatMulInteger", "DynamicQuantizeMatMul", "QLinearMatMul")

KINDS = {f"tensor({name})": name for name in ("float16", "int64", "int32", "bool")}
"""ONNX Runtime's names of what a graph is given."""

NOTE = "What is recorded is a graph's output, so ONNX Runtime fuses fewer operations than usually."

LAYER = re.compile(r"(?:^|\.)layers?\.(\d+)(?:\.|$)")


class Value(NamedTuple):
    """A value of the graph: the tensor it is, of a layer or of none, and its name."""

    kind: str
    layer: int | None
    name: str


def load(path: Path) -> onnx.ModelProto:
    """The graph, without weights that lie beside it. Raises RecorderError where there is none."""
    if not path.is_file():
        raise RecorderError(f"{path} is no file; name the graph, model.onnx.")
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # of protobuf, whose versions raise different ones
        raise RecorderError(f"{path} is no ONNX graph ({error}).") from None


def scope(node: onnx.NodeProto) -> str:
    """The module that a node is of, as model.layers.0.mlp.up_proj; "" where it is not known."""
    said = {p.key: p.value for p in node.metadata_props}.get("pkg.torch.onnx.name_scopes")
    if said:
        modules: list[str] = ast.literal_eval(said)[:-1]  # the last one is the node's own
        return next((name for name in reversed(modules) if name), "")
    return node.name.strip("/").rpartition("/")[0].replace("/", ".")


def find(graph: onnx.GraphProto) -> list[Value]:
    """The values that have a name in docs/trace-format.md, each once."""
    found: dict[tuple[str, int | None], str] = {}
    for kind, layer, name in _found(graph):
        found.setdefault((kind, layer), name)
    layers = sorted({layer for _, layer in found if layer is not None})
    for kind, pattern in TAKE.items():
        for layer in layers if "{i}" in pattern else [None]:
            found[kind, layer] = pattern.replace("{i}", str(layer))
    return [Value(kind, layer, name) for (kind, layer), name in found.items()]


def _found(graph: onnx.GraphProto) -> Iterator[Value]:
    scopes: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        scopes.setdefault(scope(node), []).append(node)
    constants = {x.name for x in graph.initializer}
    constants |= {n for node in graph.node if node.op_type == "Constant" for n in node.output}
    producers = {name: node for node in graph.node for name in node.output}
    number = -1
    for path, nodes in scopes.items():
        module, within = path.rpartition(".")[2], LAYER.search(path)
        layer = int(within[1]) if within else None
        if module not in MODULES:
            yield from _of_attention(nodes, layer, producers)
            continue
        kind = MODULES[module]
        outer = kind in OUTER
        number = number if layer is None or outer else layer
        made = {name for node in nodes for name in node.output}
        inputs = [name for node in nodes for name in node.input if name]
        given = next((name for name in inputs if name not in made | constants), None)
        skip = next((node for node in nodes if node.op_type.startswith("Skip")), None)
        yield Value(kind, None if outer else layer, (skip or nodes[-1]).output[0])
        stream = _sum_of(skip) if skip else given
        if module in INPUTS and given:
            yield Value(INPUTS[module], layer, given)
        elif kind == "ffn_norm" and stream:
            yield Value("attn_residual", layer, stream)
        elif kind == "final_norm" and stream:
            yield Value("ffn_residual", number, stream)
        elif kind == "attn_norm" and stream and layer:
            yield Value("ffn_residual", layer - 1, stream)


def _sum_of(skip: onnx.NodeProto) -> str:
    """The sum that a Skip norm is of: its fourth result, which the last one doesn't ask for."""
    skip.output.extend([""] * (4 - len(skip.output)))
    skip.output[3] = skip.output[3] or f"{skip.output[0]}.sum"
    return str(skip.output[3])


def _of_attention(
    nodes: list[onnx.NodeProto], layer: int | None, producers: dict[str, onnx.NodeProto]
) -> Iterator[Value]:
    """Scores are what a softmax is of. Rotations, of queries and then of keys, are an operation, or
    a sum of two products, in one of which parts have changed their places."""
    if layer is None:
        return
    rotated = []
    for node in nodes:
        if node.op_type == "Softmax":
            scores = node.input[0]
            while scores in producers and producers[scores].op_type == "Cast":
                scores = producers[scores].input[0]  # as they were computed
            yield Value("attn_scores", layer, scores)
            yield Value("attn_probs", layer, node.output[0])
        terms = [producers[name] for name in node.input if name in producers]
        factors = [producers[name] for term in terms for name in term.input if name in producers]
        turned = any(factor.op_type in ("Concat", "Reshape") for factor in factors)
        products = [term.op_type for term in terms] == ["Mul", "Mul"]
        if node.op_type == "RotaryEmbedding" or (node.op_type == "Add" and products and turned):
            rotated.append(node.output[0])
    for kind, name in zip(("q_rope", "k_rope"), rotated, strict=False):
        yield Value(kind, layer, name)


def check(graph: onnx.GraphProto, values: list[Value], provider: str) -> None:
    """Raises RecorderError where the graph can't be recorded, or only in part by oversight."""
    dtype = weights_dtype(graph)
    if provider.startswith("CPU") and dtype != "float32":
        raise RecorderError(
            f"On a CPU ONNX Runtime computes a graph of {dtype} in float32, and rounds at some of "
            "its values only; export it in float32, or name another --provider."
        )
    for node in graph.node:
        if node.op_type in QUANTISED:
            raise RecorderError(
                f"The graph multiplies by {node.op_type}, with weights that are in no file that "
                "run.py reads; record the graph as it was before it was quantised."
            )
    there = {name for node in graph.node for name in node.output}
    for value in values:
        if value.name not in there:
            raise RecorderError(f"{value.kind} is said to be {value.name}, which the graph hasn't.")
    if not values:
        some = ", ".join(node.name for node in graph.node[:3])
        raise RecorderError(
            f"No node's name says a module of MODULES ({some}, ...); export with names, or say the "
            "values in TAKE."
        )


def feeds(session: onnxruntime.InferenceSession, tokens: list[int]) -> dict[str, np.ndarray]:
    """Everything that exporters want besides the ids; a cache is empty."""
    fed = {}
    for wanted in session.get_inputs():
        kind = KINDS.get(wanted.type, "float32")
        shape = [size if isinstance(size, int) else 0 for size in wanted.shape]
        if wanted.name == "input_ids":
            fed[wanted.name] = np.array([tokens], kind)
        elif wanted.name == "attention_mask":
            fed[wanted.name] = np.ones((1, len(tokens)), kind)
        elif wanted.name == "position_ids":
            fed[wanted.name] = np.arange(len(tokens), dtype=kind)[None]
        elif wanted.name.startswith("past_key_values"):
            fed[wanted.name] = np.zeros([1, *shape[1:]], kind)
        elif wanted.name == "use_cache_branch":
            fed[wanted.name] = np.zeros(1, np.bool_)
        else:
            raise RecorderError(
                f"The graph has an input {wanted.name}, which is not known; say in `feeds` what it "
                "gets."
            )
        for given, size in zip(fed[wanted.name].shape, wanted.shape, strict=False):
            if isinstance(size, int) and size != given and wanted.name == "input_ids":
                raise RecorderError(
                    f"The graph takes {size} tokens and no other number, but got {given}."
                )
    return fed


def weights_dtype(graph: onnx.GraphProto) -> str:
    """Of most matrices."""
    kinds = [onnx.helper.tensor_dtype_to_np_dtype(x.data_type).name for x in graph.initializer
             if len(x.dims) == 2]  # fmt: skip
    floats = [kind for kind in kinds if "float" in kind] or ["float32"]
    return max(set(floats), key=floats.count)


def record(path: Path, tokens: list[int], dump: Dump, model: str, provider: str) -> None:
    """Runs a graph on a text with all that is found in it as outputs, and writes the dump.

    Raises:
        RecorderError: it can't be recorded, or ONNX Runtime can't run it.
    """
    whole = load(path)
    values = find(whole.graph)
    check(whole.graph, values, provider)
    known = {value.name for value in whole.graph.output}
    for name in dict.fromkeys(value.name for value in values):
        if name not in known:
            whole.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.parent.resolve())
    )
    names = [value.name for value in values]
    try:
        session = onnxruntime.InferenceSession(
            whole.SerializeToString(), settings, providers=[provider]
        )
        results: list[Any] = list(session.run(names, feeds(session, tokens)))
    except RecorderError:
        raise
    except Exception as error:  # of many types of its own
        why = " ".join(str(error).split())
        raise RecorderError(f"{path}: ONNX Runtime says {why:.300}") from None
    dump.begin(tokens)
    dump.notes.append(NOTE)
    for value, x in zip(values, results, strict=True):
        if value.kind == "logits" and x.shape[-2] != len(tokens):
            dump.notes.append(f"logits are left out: the graph has {x.shape[-2]} rows of them.")
            continue
        batched = x.ndim > 2 and len(x) == 1
        wide = x.ndim - batched == 3
        axes = {value.kind: BY_HEAD[value.kind]} if wide and value.kind in BY_HEAD else None
        axes = axes or AXES.get(value.kind, {value.kind: "T D"})
        more: dict[str, Any] = {}
        if value.kind == "attn_scores":  # what stands where a query must not see a key
            more["masked"] = -3e4 if x.dtype == np.float16 else -1e8
        batch = "1 " if batched else ""
        dump.put(value.kind, x, {k: batch + lie for k, lie in axes.items()}, value.layer, **more)
    scores = {x.dtype.name for value, x in zip(values, results, strict=True)
              if value.kind == "attn_scores"}  # fmt: skip
    dump.write(
        model,
        implementation=f"ONNX Runtime {onnxruntime.__version__}",
        dtype=weights_dtype(whole.graph),
        device=provider.removesuffix("ExecutionProvider").lower(),
        versions={"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__},
        **({"scores_dtype": scores.pop()} if scores else {}),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Records an ONNX graph of Qwen2.")
    parser.add_argument("graph", help="a file, model.onnx")
    parser.add_argument("tokens", help="ids of the text, as in 2046,299,10")
    parser.add_argument("--list", action="store_true", help="print the values found, and stop")
    parser.add_argument("--model", default="MODEL", help="the checkpoint that it was exported from")
    parser.add_argument("--provider", default="CPUExecutionProvider")
    parser.add_argument("--output", default="dump.safetensors")
    given = parser.parse_args()
    path = Path(given.graph)
    try:
        dump, tokens = Dump(given.output), token_ids(given.tokens)
        if given.provider not in onnxruntime.get_available_providers():
            there = ", ".join(onnxruntime.get_available_providers())
            raise RecorderError(f"The provider is {given.provider}, but there are {there}.")
        if given.list:
            for kind, layer, name in find(load(path).graph):
                print(kind if layer is None else f"layers.{layer}.{kind}", name)
            return
        record(path, tokens, dump, given.model, given.provider)
    except RecorderError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
