"""Quantisations by the names that repositories give them."""

import pytest

from qwen_jax.errors import UserError
from qwen_jax.weights.hub_files import candidates, checkpoint_files, chosen, models, quantisation

# Names as the publishers have them: Qwen, bartowski, mradermacher, unsloth, ik_llama.cpp, others.
QUANTISATIONS = {
    "qwen2.5-7b-instruct-q4_k_m-00001-of-00002.gguf": "Q4_K_M",
    "qwen2.5-0.5b-instruct-fp16.gguf": "F16",
    "Qwen2.5-7B-Instruct-Q4_K_M.gguf": "Q4_K_M",
    "Qwen2.5-7B-Instruct-Q6_K_L.gguf": "Q6_K_L",
    "Qwen2.5-7B-Instruct-Q4_0_4_8.gguf": "Q4_0_4_8",
    "Qwen2.5-7B-Instruct.Q5_K_S.gguf": "Q5_K_S",
    "Qwen2.5-7B-Instruct.i1-Q4_K_M.gguf": "i1-Q4_K_M",
    "Qwen2.5-7B-Instruct.i1-IQ4_XS.gguf": "i1-IQ4_XS",
    "Qwen2.5-7B-Instruct-UD-Q4_K_XL.gguf": "UD-Q4_K_XL",
    "Qwen2.5-7B-Instruct-UD-IQ2_XXS.gguf": "UD-IQ2_XXS",
    "Qwen2.5-7B-Instruct-IQ5_K_R4.gguf": "IQ5_K_R4",
    "Qwen2.5-7B-Instruct-IQ4_KS.gguf": "IQ4_KS",
    "Model-Q4_K_M-imat.gguf": "Q4_K_M",
    "model.q4km.gguf": "Q4KM",
    "model-MXFP4.gguf": "MXFP4",
    "model-TQ1_0.gguf": "TQ1_0",
    "model-BF16.gguf": "BF16",
    "model-fp32.gguf": "F32",
    "Q4_K_M/model-00001-of-00003.gguf": "Q4_K_M",
    "gguf/Q8_0/model.gguf": "Q8_0",
    "BF16/model-Q8_0.gguf": "Q8_0",
    "model.gguf": "",
}


@pytest.mark.parametrize("file", QUANTISATIONS)
def test_quantisations(file):
    assert quantisation(file) == QUANTISATIONS[file]


FILES = [
    "README.md",
    "imatrix.dat",
    "m-mmproj-f16.gguf",
    "m.imatrix.gguf",
    "m-lora-f16.gguf",
    "m-draft-q4_0.gguf",
    "m-fp16.gguf",
    "m.i1-Q4_K_M.gguf",
    "m.i1-Q5_K_M.gguf",
    "m-Q5_K_M.gguf",
    "m-UD-Q4_K_XL.gguf",
    "IQ4_XS/model-00002-of-00002.gguf",
    "IQ4_XS/model-00001-of-00002.gguf",
    "a/m-Q2_K.gguf",
    "b/m-Q2_K.gguf",
    "MXFP4.gguf",
]


def choose(quant: str | None, files: list[str] = FILES) -> str:
    return chosen(f"hf:o/r:{quant}" if quant else "hf:o/r", models(candidates(files)), quant).first


@pytest.mark.parametrize(
    ("quant", "file"),
    [
        *((q, "m-fp16.gguf") for q in ("f16", "fp16", "F16", "FP16", "m-fp16.gguf", "m-fp16")),
        *((q, "m.i1-Q4_K_M.gguf") for q in ("q4_k_m", "Q4-K-M", "q4.k.m", "q4km", "i1-Q4_K_M")),
        *((q, "m-UD-Q4_K_XL.gguf") for q in ("UD-Q4_K_XL", "ud_q4_k_xl", "Q4_K_XL")),
        *((q, "IQ4_XS/model-00001-of-00002.gguf") for q in ("IQ4_XS", "iq4xs", "iq4-xs")),
        ("IQ4_XS/model-00001-of-00002.gguf", "IQ4_XS/model-00001-of-00002.gguf"),
        ("model-00002-of-00002.gguf", "IQ4_XS/model-00001-of-00002.gguf"),
        ("Q5_K_M", "m-Q5_K_M.gguf"),
        ("i1-q5_k_m", "m.i1-Q5_K_M.gguf"),
        ("b/q2_k", "b/m-Q2_K.gguf"),
        ("a/m-Q2_K.gguf", "a/m-Q2_K.gguf"),
        ("mxfp4", "MXFP4.gguf"),
        ("Q4_K_M.gguf", "m.i1-Q4_K_M.gguf"),
        ("F16.gguf", "m-fp16.gguf"),
    ],
)
def test_names_that_mean_one_file(quant, file):
    assert choose(quant) == file


@pytest.mark.parametrize("quant", ["q4", "q4_k", "k_m", "q8_0", "instruct", "m", "lora", "-", "a"])
def test_unknown_quantisation_lists_the_known(quant):
    with pytest.raises(UserError) as caught:
        choose(quant)
    assert str(caught.value) == (
        f"hf:o/r:{quant}: there are GGUF files of these quantisations: IQ4_XS, MXFP4, Q2_K, "
        "Q5_K_M, UD-Q4_K_XL, F16, i1-Q4_K_M, i1-Q5_K_M; choose one, as in hf:o/r:IQ4_XS."
    )


def test_several_files_of_one_quantisation():
    with pytest.raises(UserError) as caught:
        choose("q2-k")
    assert str(caught.value) == (
        "hf:o/r:q2-k: several files are of this name (a/m-Q2_K.gguf, b/m-Q2_K.gguf); give one's "
        "path, as in hf:o/r:a/m-Q2_K.gguf."
    )


def test_a_whole_file_beside_parts_of_one():
    files = ["m-q4_0-00001-of-00002.gguf", "m-q4_0.gguf"]
    assert choose("q4_0", files) == "m-q4_0.gguf"
    assert choose("q4_0", files[:1]) == files[0]  # which is then said to lack a part


def test_one_checkpoint_needs_no_name():
    assert choose(None, ["mmproj-f16.gguf", "q/m-00002-of-00002.gguf", "q/m-00001-of-00002.gguf"])
    assert choose(None, ["model.gguf"]) == "model.gguf"
    with pytest.raises(UserError, match=r"of these quantisations: model\.gguf, Q4_0; choose one"):
        choose(None, ["model.gguf", "z-q4_0.gguf"])


def test_a_word_that_all_files_have_is_the_models_name():
    files = ["my-lora-merged-Q4_0.gguf", "my-lora-merged-Q8_0.gguf"]
    assert choose("q8_0", files) == files[1]


def test_a_tokenizer_of_many_files():
    tokenizer = [
        "added_tokens.json",
        "additional_chat_templates/tool_use.jinja",
        "chat_template.jinja",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    others = ["README.md", "images/a.jinja", "adapter_config.json"]
    files = [*tokenizer, *others, "config.json", "model.safetensors"]
    assert set(checkpoint_files(files)) == {*tokenizer, "config.json", "model.safetensors"}
