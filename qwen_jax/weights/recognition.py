"""Checkpoints that are well-formed and no plain Qwen2.5 model: what each is, and what to do.

Tables of signs, read before anything is found missing: what tensors are called, what a GGUF file
says it is, which files a directory holds. A sign counts only if no plain checkpoint has it.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qwen_jax.errors import UserError
from qwen_jax.file_kinds import kind_of

_PLAIN = "choose the unquantised checkpoint, a GPTQ, AWQ or FP8 one, or a GGUF file"
_ADAPTER = "give the model it was trained on, and this with --adapter"
_NO_TEXT = "choose a model that writes text, such as Qwen2.5-0.5B-Instruct"
_MERGE = (
    "merge it with peft's merge_and_unload() and save the model, or give the base model and the "
    "adapter with --adapter"
)

FAMILIES = {
    "qwen": "the first Qwen",
    "qwen2_moe": "Qwen2-MoE, a mixture of experts",
    "qwen2moe": "Qwen2-MoE, a mixture of experts",
    "qwen2_vl": "Qwen2-VL, which sees images",
    "qwen2vl": "Qwen2-VL or Qwen2.5-VL, which see images",
    "qwen2_5_vl": "Qwen2.5-VL, which sees images",
    "qwen2_audio": "Qwen2-Audio, which hears",
    "qwen2_5_omni": "Qwen2.5-Omni, which sees and hears",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3-MoE, a mixture of experts",
    "qwen3moe": "Qwen3-MoE, a mixture of experts",
    "clip": "an encoder of images (mmproj)",
}
"""Architectures near Qwen2.5, as config.json or a GGUF file names them."""

_HF_TENSORS = (
    (r"\.lora_|\.base_layer\.|\.modules_to_save\.", f"a PEFT adapter in its model; {_MERGE}"),
    (
        r"\.(absmax|quant_map|nested_absmax|SCB)$|quant_state",
        f"a quantisation by bitsandbytes; {_PLAIN}",
    ),
    (r"\.biases$", f"a quantisation by MLX; {_PLAIN}"),
    (r"\.(weight_packed|weight_global_scale)$", f"a quantisation by compressed-tensors; {_PLAIN}"),
    (r"\.weight_scale_2$", f"a quantisation by NVIDIA ModelOpt; {_PLAIN}"),
    (r"\.W_q$", f"a quantisation by HQQ; {_PLAIN}"),
    (r"\.weight_scales$", f"a quantisation by EETQ; {_PLAIN}"),
    (r"\.weight\._(data|scale|shift)$", f"a quantisation by quanto; {_PLAIN}"),
    (r"[._]weight_q?data$|\.weight:_data$", f"a quantisation by torchao; {_PLAIN}"),
    (r"\.(codebooks|codes)$", f"a quantisation by AQLM; {_PLAIN}"),
    (r"\.centroids\.", f"a quantisation by VPTQ; {_PLAIN}"),
    (r"\.(q_invperm|q_scale_max)$", f"a quantisation by EXL2 (ExLlamaV2); {_PLAIN}"),
    (r"\.(trellis|suh|svh)$", f"a quantisation by EXL3 (ExLlamaV3); {_PLAIN}"),
    (r"\.Qidxs", f"a quantisation by QuIP#; {_PLAIN}"),
    (r"(^|\.)(visual|vision_tower|vision_model|mm_projector)\.", f"a model of images; {_NO_TEXT}"),
    (r"(^|\.)(audio_tower|multi_modal_projector)\.", f"a model of images or sound; {_NO_TEXT}"),
    (r"\.mlp\.(experts|shared_expert)", "a mixture of experts; choose a dense Qwen2.5 model"),
    (r"\.self_attn\.[qk]_norm\.", "of another family (Qwen3 normalises so); choose a Qwen2.5"),
    (
        r"(^|\.)(score|classifier|qa_outputs|v_head|value_head|reward_head|regression_head)\.",
        f"a model with a head for rewards or classes, not for text; {_NO_TEXT}",
    ),
    (r"(^|\.)medusa_head\.", "Medusa's heads of speculative decoding; choose the model itself"),
)
_GGUF_TENSORS = (
    (r"\.lora_[ab]$", f"a LoRA adapter; {_ADAPTER}"),
    (r"^direction\.\d+$", "a control vector; choose the model itself"),
    (r"\.(in_sum2|counts)$", "an importance matrix (imatrix); choose the model itself"),
    (r"^(v|a|mm|clip)\.", "an encoder of images or sound (mmproj); choose the model itself"),
    (r"\.ffn_(gate|up|down)(_exps|_shexp)\.", "a mixture of experts; choose a dense Qwen2.5 model"),
    (r"\.attn_[qk]_norm\.", "of another family (Qwen3 normalises so); choose a Qwen2.5 model"),
    (r"^cls\b", f"a model with a head for ranks or classes, not for text; {_NO_TEXT}"),
)
_GGUF_TYPES = {
    "adapter": f"a LoRA adapter; {_ADAPTER}",
    "mmproj": "an encoder of images or sound (mmproj); choose the model itself",
    "imatrix": "an importance matrix; choose the model itself",
    "controlvector": "a control vector; choose the model itself",
}

_CONVERT = (
    "convert it where you trust it, and copy the tokenizer's files: python -c \"from transformers "
    'import AutoModelForCausalLM as M; M.from_pretrained({0!r}).save_pretrained({1!r})"'
)
_OTHERWISE = "choose the model's safetensors, or a GGUF file"
# Files of other formats, each with what to do; the first that is there is told.
_OTHER_FILES = (
    ("pytorch_model*.bin", "a checkpoint of PyTorch (pickle)", _CONVERT),
    ("global_step*", "a checkpoint of DeepSpeed", "gather it with the zero_to_fp32.py beside it"),
    (
        "*/*.distcp",
        "a distributed checkpoint of PyTorch",
        "gather it with accelerate merge-weights",
    ),
    ("*.pth", "a checkpoint of PyTorch (pickle)", _OTHERWISE),
    ("*.pt", "a checkpoint of PyTorch (pickle)", _OTHERWISE),
    ("*.ckpt", "a checkpoint of PyTorch or TensorFlow", _OTHERWISE),
    ("tf_model*.h5", "a checkpoint of TensorFlow", _OTHERWISE),
    ("flax_model*.msgpack", "a checkpoint of Flax", _OTHERWISE),
    ("*.onnx", "an ONNX model", _OTHERWISE),
    ("openvino_model.xml", "an OpenVINO model", _OTHERWISE),
    ("mlc-chat-config.json", "a model of MLC", _OTHERWISE),
    ("weights.npz", "a checkpoint of MLX", _OTHERWISE),
    ("model.bin", "a checkpoint of CTranslate2 or PyTorch", _OTHERWISE),
    ("*.engine", "an engine of TensorRT", _OTHERWISE),
)


def check_gguf(path: Path, metadata: Mapping[str, Any], tensors: Iterable[str]) -> None:
    """Raises UserError where a GGUF file is no model that writes text, or of another family."""
    architecture = metadata.get("general.architecture")
    for kind in (metadata.get("general.type"), architecture):
        if isinstance(kind, str) and kind in _GGUF_TYPES:
            raise UserError(f"{path}: the file is {_GGUF_TYPES[kind]}.")
    _check_family(path, "general.architecture", architecture)
    # llama.cpp's converter writes it for models of sentence-transformers alone; 0 is none.
    pooling = metadata.get("qwen2.pooling_type")
    if isinstance(pooling, int) and pooling != 0:
        raise UserError(
            f"{path}: qwen2.pooling_type is {pooling}, so that this is a model for embeddings; "
            f"{_NO_TEXT}."
        )
    if found := _sign(_GGUF_TENSORS, tensors):
        raise UserError(f"{path}: the tensor {found[0]!r} is of {found[1]}.")


def check_directory(directory: Path, config: Mapping[str, Any], tensors: Iterable[str]) -> None:
    """Raises UserError where a Hugging Face checkpoint is another model, or a foreign quantisation.

    GPTQ, AWQ and FP8 are left to `quantization`.
    """
    source = directory / "config.json"
    _check_family(source, "model_type", config.get("model_type"))
    if (directory / "config_sentence_transformers.json").is_file():
        raise UserError(
            f"{directory}: it has a config_sentence_transformers.json, so that this is a model for "
            f"embeddings; {_NO_TEXT}."
        )
    mlx = config.get("quantization")
    if isinstance(mlx, dict) and {"group_size", "bits"} <= mlx.keys():
        raise UserError(f"{source}: quantization is {mlx!r:.60}, which is MLX's; {_PLAIN}.")
    if found := _sign(_HF_TENSORS, tensors):
        raise UserError(f"{directory}: the tensor {found[0]!r} is of {found[1]}.")


def missing_head(directory: Path, head: str, config: Mapping[str, Any]) -> str:
    """What a directory is that has every tensor but an untied head."""
    architectures = config.get("architectures") or ["Qwen2Model"]
    return (
        f"{directory}: {head} is missing, and tie_word_embeddings is false: this is the model "
        f"without the head that writes text (architectures is {architectures!r:.80}); choose the "
        "Qwen2ForCausalLM checkpoint, or set tie_word_embeddings to true if the head is shared."
    )


def without_config(directory: Path) -> str | None:
    """What a directory without config.json and GGUF files is; None if that is not known."""
    if (directory / "adapter_config.json").is_file():
        return f"{directory}: the directory is a LoRA adapter of PEFT; {_ADAPTER}."
    if any(directory.glob("*.safetensors")):
        return (
            f"{directory}: config.json is missing, which says what the safetensors mean; get it "
            "from the checkpoint's repository."
        )
    below = sorted(file.parent for file in directory.glob("*/config.json"))
    below += sorted(file.parent for file in directory.glob("snapshots/*/config.json"))
    below += sorted(file.parent for file in directory.glob("*/*.gguf"))
    if below:
        return f"{directory}: the directory has no model, but {below[0]} has; give that."
    return without_safetensors(directory)


def without_safetensors(directory: Path) -> str | None:
    """Which other weights, or pieces of some, a directory without safetensors holds; or None."""
    for pattern, kind, way_out in _OTHER_FILES:
        if file := next(directory.glob(pattern), None):
            advice = way_out.format(str(directory), f"{directory}-safetensors")
            return f"{directory}: {file.name} is {kind}, which is not read; {advice}."
    for file in sorted(directory.glob("*")):  # pieces, archives, downloads that are not done
        weights = re.search(r"\.(gguf|safetensors)\b(?!.*\.json$)", file.name)
        if weights and (told := kind_of(file, "GGUF")):
            return f"{file}: the file is {told}."
    return None


def _check_family(source: Path, field: str, value: Any) -> None:
    if isinstance(value, str) and value in FAMILIES:
        raise UserError(
            f"{source}: {field} is {value!r}, that is {FAMILIES[value]}; choose a Qwen2.5 model."
        )


def _sign(table: tuple[tuple[str, str], ...], tensors: Iterable[str]) -> tuple[str, str] | None:
    """The first tensor that bears a sign, and what it is a sign of."""
    names = list(tensors)
    for pattern, kind in table:
        if name := next(filter(re.compile(pattern).search, names), None):
            return name, kind
    return None
