"""A GGUF file's `tokenizer.*` keys -> Vocabulary."""

from collections.abc import Mapping
from typing import Any, TypeVar

from absl import logging
from tokenizers import AddedToken

from qwen_jax.errors import UserError
from qwen_jax.text.vocabulary import Vocabulary

T = TypeVar("T", int, str, bool)

# Names under which llama.cpp's converter records exactly `vocabulary.PATTERN`.
PRE_TOKENIZERS = ("qwen2", "deepseek-r1-qwen")
# Values of tokenizer.ggml.token_type, as in gguf.TokenType, which is slow to import.
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding"}


def read(metadata: Mapping[str, Any], source: str) -> Vocabulary:
    """The vocabulary in a GGUF file's key-value pairs; `source` names the file in messages.

    Raises UserError where a key is missing, has the wrong type or contradicts another.
    """
    model, pre = (_value(metadata, f"tokenizer.ggml.{k}", str, source) for k in ("model", "pre"))
    if model != "gpt2" or pre not in PRE_TOKENIZERS:
        raise UserError(
            f"{source}: tokenizer.ggml.model is {model!r} and tokenizer.ggml.pre {pre!r}, but a "
            f"Qwen2.5 file has 'gpt2' and {' or '.join(map(repr, PRE_TOKENIZERS))}; choose a "
            "Qwen2.5 file from a current converter."
        )
    tokens = _array(metadata, "tokenizer.ggml.tokens", str, source)
    kinds = _array(metadata, "tokenizer.ggml.token_type", int, source)
    if len(tokens) != len(kinds):
        raise UserError(
            f"{source}: tokenizer.ggml.tokens has {len(tokens)} entries and "
            f"tokenizer.ggml.token_type {len(kinds)}; the file is damaged."
        )
    # Converters name the embedding's spare rows [PAD151665] and so on.
    size = len(tokens)
    while size and (kinds[size - 1] == UNUSED or tokens[size - 1] == f"[PAD{size - 1}]"):
        size -= 1
    named = {
        name: token
        for name, key in _SPECIAL.items()
        if (token := _token_id(metadata, key, size, source)) is not None
    }
    end_of_turn = _token_id(metadata, "eot", size, source)
    ends = [token for token in (named.get("eos_token"), end_of_turn) if token is not None]
    # Qwen's files name a BOS that the model was never trained with and that the reference
    # tokenizer does not have, so a template must find it undefined, as it does there.
    if not _optional(metadata, "tokenizer.ggml.add_bos_token", bool, source):
        named.pop("bos_token", None)
    elif "bos_token" in named:
        logging.warning(
            "%s asks for %r before every text; Qwen2.5 was trained without, so only a chat "
            "template can add it.",
            source,
            tokens[named["bos_token"]],
        )
    return Vocabulary(
        tokens=tokens[:size],
        merges=_merges(metadata, source),
        added={
            token: AddedToken(tokens[token], special=kind == CONTROL, normalized=False)
            for token, kind in enumerate(kinds[:size])
            if kind in (CONTROL, USER_DEFINED)
        },
        end_ids=ends,
        special_tokens={name: tokens[token] for name, token in named.items()},
        chat_template=_optional(metadata, "tokenizer.chat_template", str, source),
        source=source,
    )


def _merges(metadata: Mapping[str, Any], source: str) -> list[tuple[str, str]]:
    """Lines "left right". One that is not two tokens yields a token that no vocabulary has."""
    lines = _array(metadata, "tokenizer.ggml.merges", str, source)
    return [(left, right) for left, _, right in (line.partition(" ") for line in lines)]


def _token_id(metadata: Mapping[str, Any], name: str, size: int, source: str) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    token = _optional(metadata, key, int, source)
    if token is not None and not 0 <= token < size:
        raise UserError(
            f"{source}: {key} is {token}, but the ids in use are 0 to {size - 1}; the file is "
            "damaged."
        )
    return token


def _optional(metadata: Mapping[str, Any], key: str, kind: type[T], source: str) -> T | None:
    return _value(metadata, key, kind, source) if key in metadata else None


def _value(metadata: Mapping[str, Any], key: str, kind: type[T], source: str) -> T:
    value = _need(metadata, key, source)
    if type(value) is not kind:
        raise UserError(
            f"{source}: the key {key!r} holds {value!r:.80}, not {kind.__name__}; the file is "
            "damaged or was written by a faulty converter."
        )
    return value


def _array(metadata: Mapping[str, Any], key: str, kind: type[T], source: str) -> list[T]:
    value = _need(metadata, key, source)
    values = value.tolist() if hasattr(value, "tolist") else value  # a NumPy array of numbers
    if not isinstance(values, list | tuple) or not set(map(type, values)) <= {kind}:
        raise UserError(
            f"{source}: the key {key!r} is not an array of {kind.__name__} only; the file is "
            "damaged or was written by a faulty converter."
        )
    return list(values)


def _need(metadata: Mapping[str, Any], key: str, source: str) -> Any:
    if key not in metadata:
        raise UserError(
            f"{source}: the key {key!r} is missing, and without it text would be tokenised "
            "wrongly; convert the checkpoint again or choose another file."
        )
    return metadata[key]
