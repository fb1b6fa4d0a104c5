"""A small vocabulary of our own, and Qwen's where the shared fixtures are at hand."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from gguf import TokenType
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from qwen_jax.text import Tokenizer

FIXTURES = Path(__file__).parents[3] / "shared" / "fixtures"
# As Qwen/Qwen2.5-0.5B's tokenizer.json has it.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Of Qwen2.5-Coder's tokenizer.json: "special" is false for these.
FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>",
       "<|file_sep|>")  # fmt: skip
USER_DEFINED = ("<tool_call>", "</tool_call>")
PADDING = 3
CORPUS = (
    "Hello, y'all! How are you? I've been told he's there; I'M not sure I'll make it.",
    "Äpfel, Cửa Việt, нещо на Български, 我想在apple工作1314151天\uff5e 😁 🦙🦙 が ガ",
    "    def f(x):\n\n\t\treturn x + 1   # 3 33 333\r\n",
)


def fixture_path(name: str) -> Path:
    path = FIXTURES / name
    if not path.is_file():
        pytest.skip(f"{path} is absent, so Qwen's own vocabulary or template cannot be tested")
    return path


@pytest.fixture(scope="session")
def qwen_metadata() -> dict[str, Any]:
    """Key-value pairs of a GGUF file with the real vocabulary: 151,646 tokens and padding."""
    from qwen_jax.weights.gguf_file import open_gguf

    return open_gguf(fixture_path("ggml-vocab-qwen2.gguf")).metadata


@pytest.fixture(scope="session")
def qwen(qwen_metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_gguf(qwen_metadata, "ggml-vocab-qwen2.gguf")


@pytest.fixture(scope="session")
def reference() -> tokenizers.Tokenizer:
    """A small Qwen2 tokenizer, trained, run and saved by the tokenizers library alone."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS * 3,
        trainers.BpeTrainer(vocab_size=384, initial_alphabet=alphabet, show_progress=False),
    )
    plain = [tokenizers.AddedToken(t, special=False, normalized=False) for t in USER_DEFINED]
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.add_tokens(plain)
    return tokenizer


def write_hf(directory: Path, tokenizer: tokenizers.Tokenizer) -> None:
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "bos_token": None, "pad_token": {"content": SPECIAL[0]}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture
def hf_directory(reference: tokenizers.Tokenizer, tmp_path: Path) -> Path:
    write_hf(tmp_path, reference)
    return tmp_path


@pytest.fixture(scope="session")
def gguf_metadata(reference: tokenizers.Tokenizer) -> dict[str, Any]:
    """The reference tokenizer as llama.cpp's converter would write it. Do not change it: copy."""
    ids = reference.get_vocab(with_added_tokens=True)
    tokens = sorted(ids, key=ids.__getitem__)
    kinds = dict.fromkeys(SPECIAL, TokenType.CONTROL)
    kinds |= dict.fromkeys(USER_DEFINED, TokenType.USER_DEFINED)
    types = [int(kinds.get(token, TokenType.NORMAL)) for token in tokens]
    merges = json.loads(reference.to_str())["model"]["merges"]
    padding = range(len(tokens), len(tokens) + PADDING)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*tokens, *(f"[PAD{i}]" for i in padding)],
        "tokenizer.ggml.token_type": [*types, *[int(TokenType.UNUSED)] * len(padding)],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.eos_token_id": ids["<|im_end|>"],
        "tokenizer.ggml.bos_token_id": ids["<|endoftext|>"],
        "tokenizer.ggml.padding_token_id": ids["<|endoftext|>"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }


@pytest.fixture(scope="session")
def small(gguf_metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_gguf(gguf_metadata, "small.gguf")


def with_tokens(metadata: dict[str, Any], extra: dict[str, int], **keys: Any) -> dict[str, Any]:
    """A copy with more tokens, of these types, in place of the padding."""
    metadata = copy.deepcopy(metadata)
    for name, more in (("tokens", [*extra]), ("token_type", [*map(int, extra.values())])):
        values = list(metadata[f"tokenizer.ggml.{name}"])
        metadata[f"tokenizer.ggml.{name}"] = [*values[:-PADDING], *more, *values[-PADDING:]]
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


@pytest.fixture
def coder(
    reference: tokenizers.Tokenizer, gguf_metadata: dict[str, Any], tmp_path: Path
) -> dict[str, Tokenizer]:
    """The two formats of one model, as Qwen and llama.cpp's converter write them."""
    library = tokenizers.Tokenizer.from_str(reference.to_str())
    library.add_tokens([tokenizers.AddedToken(t, normalized=False) for t in FIM])
    write_hf(tmp_path, library)
    metadata = with_tokens(gguf_metadata, dict.fromkeys(FIM, TokenType.CONTROL))
    return {
        "hf": Tokenizer.from_hf(tmp_path),
        "gguf": Tokenizer.from_gguf(metadata, "coder.gguf"),
    }
