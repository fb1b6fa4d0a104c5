"""What each token is for: the same in both formats, whatever the file calls it."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from gguf import TokenType
from gguf.constants import Keys

from qwen_jax.text import Fim, Tokenizer
from qwen_jax.text.vocabulary import FIM_TOKENS
from tests.text.conftest import FIM, with_tokens, write_hf

G = "tokenizer.ggml."


def test_fim_tokens_are_text_in_both_formats(
    coder: dict[str, Tokenizer], reference: tokenizers.Tokenizer
) -> None:
    text = "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>c<|fim_pad|><|file_sep|><|im_end|>"
    first = reference.get_vocab_size()
    for tokenizer in coder.values():
        ids = tokenizer.encode(text)
        assert ids[0] == first and len(ids) == 9
        # As transformers decodes them: only <|im_end|> is special.
        assert tokenizer.decode(ids) == text.removesuffix("<|im_end|>")
        fim = Fim(*range(first, first + 6))
        assert tokenizer.fim == fim
        assert tokenizer.fim_stop_ids == (fim.pad, fim.repo_name, fim.file_sep)
        assert set(tokenizer.stop_ids) == {386, 384}


def test_fim_texts_are_qwens() -> None:
    assert tuple(FIM_TOKENS.values()) == FIM


def test_models_without_fim(small: Tokenizer) -> None:
    assert small.fim is None and small.fim_stop_ids == ()


@pytest.mark.parametrize("names", [
    ("fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep"),
    ("prefix", "suffix", "middle", "fim_pad", "fim_rep", "fim_sep"),
])  # fmt: skip
def test_fim_ids_named_by_keys(names: tuple[str, ...], gguf_metadata: dict[str, Any]) -> None:
    known = {value for key, value in vars(Keys.Tokenizer).items() if key.endswith("_ID")}
    keys = {f"{name}_token_id": 389 + i for i, name in enumerate(names)}
    assert {G + key for key in keys} <= known
    extra = dict.fromkeys(("<A>", "<B>", "<C>", "<D>", "<E>", "<F>"), TokenType.CONTROL)
    metadata = with_tokens(gguf_metadata, extra, **keys)
    tokenizer = Tokenizer.from_gguf(metadata, "x.gguf")
    assert tokenizer.fim == Fim(389, 391, 390, 392, 393, 394)
    assert tokenizer.fim_stop_ids == (392, 393, 394)


def test_a_fim_id_without_a_token_is_not_used(gguf_metadata: dict[str, Any]) -> None:
    metadata = with_tokens(
        gguf_metadata, dict.fromkeys(FIM[:3], TokenType.CONTROL), fim_pre_token_id=10**6
    )
    assert Tokenizer.from_gguf(metadata, "x.gguf").fim == Fim(389, 390, 391)


@pytest.mark.parametrize("text, special, visible", [
    ("<|extra_0|>", False, False),  # the converter would make a control token of it
    ("<\uff5cx\uff5c>", False, False),
    ("<unused7>", False, False),
    ("<pad>", False, False),
    ("<|extra_0|>", True, False),
    ("<extra>", True, False),
    ("<extra>", False, True),
    ("<|extra", False, True),
])  # fmt: skip
def test_both_formats_show_the_same(
    text: str,
    special: bool,
    visible: bool,
    reference: tokenizers.Tokenizer,
    gguf_metadata: dict[str, Any],
    tmp_path: Path,
) -> None:
    library = tokenizers.Tokenizer.from_str(reference.to_str())
    library.add_tokens([tokenizers.AddedToken(text, special=special, normalized=False)])
    write_hf(tmp_path, library)
    kind = TokenType.USER_DEFINED if visible else TokenType.CONTROL
    gguf = Tokenizer.from_gguf(with_tokens(gguf_metadata, {text: kind}), "x.gguf")
    for tokenizer in (Tokenizer.from_hf(tmp_path), gguf):
        ids = tokenizer.encode(f"a{text}b")
        assert ids[1] == 389
        assert tokenizer.decode(ids) == (f"a{text}b" if visible else "ab")


@pytest.mark.parametrize("kind", [TokenType.UNUSED, TokenType.USER_DEFINED, TokenType.NORMAL])
@pytest.mark.parametrize("padding", ["[PAD{}]", "[PAD1]", ""])
def test_holes_in_a_gguf(kind: int, padding: str, gguf_metadata: dict[str, Any]) -> None:
    """[PADn] between tokens, whatever a converter types them: llama.cpp's, Ollama's, older ones.

    transformers gives the token above them its own id, and nothing else has an id there.
    """
    metadata = copy.deepcopy(gguf_metadata)
    rows = range(389, 420)
    tokens, kinds = (list(metadata[G + name])[:389] for name in ("tokens", "token_type"))
    metadata[G + "tokens"] = [*tokens, *(padding.format(i) for i in rows), "<|extra_0|>", "[PAD9]"]
    metadata[G + "token_type"] = np.asarray([*kinds, *[kind] * len(rows), 3, kind], np.int32)
    tokenizer = Tokenizer.from_gguf(metadata, "x.gguf")
    assert tokenizer.vocab_size == 421 and tokenizer.unused_ids == tuple(rows)
    assert tokenizer.encode("a<|extra_0|>b") == [64, 420, 65]
    assert not set(tokenizer.encode("[PAD400][PAD1]")) & set(rows)
    assert tokenizer.decode([64, 400, 65]) == "ab"
    assert tokenizer.token_name(400) == "[PAD400]"


def test_unknown_and_byte_tokens(gguf_metadata: dict[str, Any]) -> None:
    """llama.cpp matches a token of type UNKNOWN as a whole and does not show it."""
    metadata = with_tokens(gguf_metadata, {"<unk>": TokenType.UNKNOWN}, unknown_token_id=389)
    metadata[G + "token_type"][32] = int(TokenType.BYTE)
    tokenizer = Tokenizer.from_gguf(metadata, "x.gguf")
    assert tokenizer.encode("A<unk>A") == [32, 389, 32]
    assert tokenizer.decode([32, 389, 32]) == "AA"


@pytest.mark.parametrize("name", ["bos", "padding", "unknown", "fim_pre", "eot", "eom", "eos"])
@pytest.mark.parametrize("token", [389, 10**6, -1])
def test_ids_that_no_token_has(name: str, token: int, gguf_metadata: dict[str, Any]) -> None:
    metadata = gguf_metadata | {f"{G}{name}_token_id": token}
    tokenizer = Tokenizer.from_gguf(metadata, "x.gguf")
    assert set(tokenizer.stop_ids) == {384, 386}
    assert tokenizer.special_tokens.keys() <= {"eos_token", "pad_token"}


def test_an_end_of_message_stops_too(gguf_metadata: dict[str, Any]) -> None:
    metadata = gguf_metadata | {G + "eom_token_id": 385, G + "eot_token_id": 387}
    assert Tokenizer.from_gguf(metadata, "x.gguf").stop_ids == (386, 387, 385, 384)
