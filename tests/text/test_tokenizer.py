"""Ids identical to the reference's, and every text comes back."""

import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from gguf import TokenType
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from qwen_jax.errors import UserError
from qwen_jax.text import Tokenizer, gguf_vocabulary
from tests.text.conftest import SPECIAL, fixture_path

SEPARATOR = "\n__ggml_vocab_test__\n"
HARD_TEXTS = (
    "",
    " ",
    "3 33 333 12345",
    "٣٤ ½ Ⅷ \u3007",
    "I'm you're HE'LL we'Ve 'd'D it's'",
    "  leading\t\ttabs \n\n \r\n  trailing   ",
    "a" * 2000,
    "👩‍👩‍👧‍👦 🇩🇪 🏳️‍🌈 ✅ 🦙.cpp",
    "Vi\u1ec7t Vie\u0323\u0302t e\u0301 \u1100\u1161\u11a8 \u212b \ufb01 \u0958",
    "\u00a0\u2003\u3000\u200b\ufeff\u2028x",
    "\x00\x01\x7f\x85",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "<|im_start|><|im_start|><|im_|im_end|>",
    " <|im_end|> <|im_end |>",
    "<tool_call>{}</tool_call>",
    "[PAD151646][PAD389]",
    "नमस्ते ที่ កាន់តែពិសេសអាច",
)
# Letters with marks and Hangul, where NFC matters, more often than chance would give them.
texts = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from("aeo\u0301\u0302\u0323\u0327\u1100\u1161\u11a8\u0bc6\u0bbe \n'1<|>"),
    )
)
# Python's Unicode tables and those of the library may be of different age.
assigned_texts = texts.filter(lambda s: all(unicodedata.category(c) != "Cn" for c in s))
few = settings(deadline=None, max_examples=200)


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_small_ids_equal_the_librarys(
    text: str, small: Tokenizer, reference: tokenizers.Tokenizer
) -> None:
    assert small.encode(text) == reference.encode(text).ids


@given(text=texts)
@few
def test_random_ids_equal_the_librarys(
    text: str, small: Tokenizer, reference: tokenizers.Tokenizer
) -> None:
    assert small.encode(text) == reference.encode(text).ids


@given(ids=st.lists(st.integers(0, 388)))
@few
def test_decoding_equals_the_librarys(
    ids: list[int], small: Tokenizer, reference: tokenizers.Tokenizer
) -> None:
    for skip in (True, False):
        assert small.decode(ids, skip_special=skip) == reference.decode(
            ids, skip_special_tokens=skip
        )


def test_hf_and_gguf_agree(hf_directory: Path, small: Tokenizer) -> None:
    (hf_directory / "chat_template.jinja").write_text(small.chat_template or "")
    (hf_directory / "generation_config.json").write_text('{"eos_token_id": [386, 384]}')
    other = Tokenizer.from_hf(hf_directory)
    assert [other.encode(text) for text in HARD_TEXTS] == [
        small.encode(text) for text in HARD_TEXTS
    ]
    assert other.vocab_size == small.vocab_size == 389
    assert other.stop_ids == small.stop_ids == (386, 384)
    assert other.chat_template == small.chat_template
    assert other.special_tokens == small.special_tokens
    assert small.special_tokens == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def test_llama_cpp_vectors(qwen: Tokenizer) -> None:
    inputs = fixture_path("ggml-vocab-qwen2.gguf.inp").read_bytes().decode().split(SEPARATOR)
    outputs = fixture_path("ggml-vocab-qwen2.gguf.out").read_text().split("\n")[:-1]
    *inputs, end = inputs
    assert end == "" and len(inputs) == len(outputs) > 40
    for text, output in zip(inputs, outputs, strict=True):
        # llama.cpp does no NFC; on composed text it and the reference agree.
        assert unicodedata.is_normalized("NFC", text)
        assert qwen.encode(text) == list(map(int, output.split())), text
        assert qwen.decode(qwen.encode(text)) == text


@pytest.fixture(scope="module")
def transformers_tokenizer(qwen_metadata: dict[str, Any]) -> Any:
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    tokens = qwen_metadata["tokenizer.ggml.tokens"][:151643]
    return transformers.Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[tuple(m.split(" ")) for m in qwen_metadata["tokenizer.ggml.merges"]],
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_qwen_ids_equal_transformers(
    text: str, qwen: Tokenizer, transformers_tokenizer: Any
) -> None:
    assert qwen.encode(text) == transformers_tokenizer.encode(text)


@given(text=texts)
@few
def test_random_qwen_ids_equal_transformers(
    text: str, qwen: Tokenizer, transformers_tokenizer: Any
) -> None:
    ids = qwen.encode(text)
    assert ids == transformers_tokenizer.encode(text)
    assert qwen.decode(ids) == transformers_tokenizer.decode(ids, skip_special_tokens=True)


def test_saved_by_transformers(
    qwen: Tokenizer, transformers_tokenizer: Any, tmp_path: Path
) -> None:
    transformers_tokenizer.save_pretrained(tmp_path)
    other = Tokenizer.from_hf(tmp_path)
    assert [other.encode(text) for text in HARD_TEXTS] == [qwen.encode(text) for text in HARD_TEXTS]
    assert other.stop_ids == qwen.stop_ids == (151643, 151645)


@given(text=assigned_texts)
@few
def test_round_trip(text: str, small: Tokenizer) -> None:
    for parse_special in (True, False):
        ids = small.encode(text, parse_special)
        assert small.decode(ids, skip_special=False) == unicodedata.normalize("NFC", text)
        assert b"".join(map(small.token_bytes, ids)) == unicodedata.normalize("NFC", text).encode()


@given(text=assigned_texts)
@few
def test_round_trip_qwen(text: str, qwen: Tokenizer) -> None:
    assert qwen.decode(qwen.encode(text), skip_special=False) == unicodedata.normalize("NFC", text)


def test_decomposed_text_has_the_ids_of_composed_text(qwen: Tokenizer) -> None:
    assert qwen.encode("Vie\u0323\u0302t") == qwen.encode("Vi\u1ec7t")


def test_qwen_facts(qwen: Tokenizer) -> None:
    assert qwen.vocab_size == 151646  # 290 rows of padding are not tokens
    assert qwen.stop_ids == (151643, 151645)
    assert qwen.encode("<|im_start|>user\n") == [151644, 872, 198]
    assert len(qwen.encode("1234567890")) == 10
    assert qwen.encode("") == []  # no BOS


def test_untrusted_text_cannot_hold_special_tokens(small: Tokenizer) -> None:
    text = "".join(SPECIAL) + "<tool_call>"
    ids = small.encode(text, parse_special=False)
    assert max(ids) < 384
    assert small.decode(ids) == text
    assert small.encode(text) == [384, 385, 386, 387]


def test_decode_skips_control_tokens_only(small: Tokenizer) -> None:
    ids = small.encode("a<|im_end|><tool_call>b")
    assert small.decode(ids) == "a<tool_call>b"
    assert small.decode(ids, skip_special=False) == "a<|im_end|><tool_call>b"
    assert small.decode(np.asarray(ids, np.int32)) == "a<tool_call>b"


def test_token_bytes_and_names(qwen: Tokenizer) -> None:
    assert qwen.token_bytes(1879) == b" world"
    assert qwen.token_name(1879) == "' world'"
    assert qwen.token_name(151645) == "'<|im_end|>'"
    assert qwen.token_name(151700) == "[PAD151700]"
    (space, first, *rest) = qwen.encode(" \U0001f999")[-3:]
    assert qwen.token_bytes(first) == b"\xa6"
    assert qwen.token_name(first) == r"b'\xa6'"
    assert space and rest


@pytest.mark.parametrize("token", [-1, 389, 10**9])
def test_unknown_ids_are_refused(token: int, small: Tokenizer) -> None:
    with pytest.raises(UserError, match=f"small.gguf: there is no token {token}, only 0 to 388"):
        small.decode([token])


def test_lone_surrogates_are_refused(small: Tokenizer) -> None:
    with pytest.raises(UserError, match="not valid Unicode"):
        small.encode("bad \udcff byte")


def test_added_tokens_outside_ascii(gguf_metadata: dict[str, Any]) -> None:
    """DeepSeek's distilled Qwen models have such names, and do begin with a BOS in their chats."""
    token = "<\uff5cbegin▁of▁sentence\uff5c>é"
    metadata = dict(gguf_metadata)
    tokens, size = metadata["tokenizer.ggml.tokens"], 389
    metadata["tokenizer.ggml.pre"] = "deepseek-r1-qwen"
    metadata["tokenizer.ggml.tokens"] = [*tokens[:size], token]
    types = metadata["tokenizer.ggml.token_type"]
    metadata["tokenizer.ggml.token_type"] = np.asarray([*types[:size], 3], np.int32)
    metadata["tokenizer.ggml.bos_token_id"] = size
    metadata["tokenizer.ggml.add_bos_token"] = True
    tokenizer = Tokenizer.from_gguf(metadata, "distill.gguf")
    assert tokenizer.encode(f"{token}a")[0] == size
    assert tokenizer.decode([size], skip_special=False) == token
    assert tokenizer.encode("a") == tokenizer.encode(f"{token}a")[1:]  # none is added
    assert tokenizer.special_tokens["bos_token"] == token


def test_token_kinds_are_gguf_s() -> None:
    ours = (gguf_vocabulary.CONTROL, gguf_vocabulary.USER_DEFINED, gguf_vocabulary.UNUSED)
    assert ours == (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNUSED)


def test_added_token_flags_are_kept(reference: tokenizers.Tokenizer, tmp_path: Path) -> None:
    changed = tokenizers.Tokenizer.from_str(reference.to_str())
    changed.add_tokens([AddedToken("<mask>", lstrip=True, rstrip=True, single_word=True)])
    changed.add_tokens([AddedToken("\u1ec7t", normalized=True)])
    changed.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_hf(tmp_path)
    for text in ("a  <mask>  b", "a<mask>b", "Vie\u0323\u0302t", "Vi\u1ec7t"):
        assert ours.encode(text) == changed.encode(text).ids


def test_import_is_light() -> None:
    heavy = "{'jax', 'jinja2', 'torch', 'transformers', 'gguf'}"
    code = f"import sys, qwen_jax.text; print(sorted({heavy} & sys.modules.keys()))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
