"""A GGUF file's `tokenizer.*` keys -> Vocabulary."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from absl import logging
from tokenizers import AddedToken

from qwen_jax.errors import UserError
from qwen_jax.text.vocabulary import Vocabulary, is_control

T = TypeVar("T", int, str, bool)

# Names under which llama.cpp's converter records exactly `vocabulary.PATTERN`.
PRE_TOKENIZERS = ("qwen2", "deepseek-r1-qwen")
# Values of tokenizer.ggml.token_type, as in gguf.TokenType, which is slow to import. A type not
# named here is that of ordinary tokens.
UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5
# The default's key; others' have a dot and their name behind it.
_TEMPLATE = "tokenizer.chat_template"
# Converters name a row without a token [PAD151665], whatever type they give it; Ollama's counts
# from the first such row.
_PADDING = re.compile(r"\[PAD\d+\]")
_SPECIAL = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "sep_token": "seperator",  # as llama.cpp spells it
    "pad_token": "padding",
    "mask_token": "mask",
}
_ENDS = ("eos", "eot", "eom")
# Two names each: today's and the one before.
_FIM_KEYS = {
    "prefix": ("fim_pre", "prefix"),
    "middle": ("fim_mid", "middle"),
    "suffix": ("fim_suf", "suffix"),
    "pad": ("fim_pad",),
    "repo_name": ("fim_rep",),
    "file_sep": ("fim_sep",),
}


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
    tokens, kinds = _tokens(metadata, source)
    named = _named_ids(metadata, tokens, source)
    # Qwen's files name a BOS that the model was never trained with and that the reference
    # tokenizer does not have, so a template must find it undefined, as it does there.
    if not _optional(metadata, "tokenizer.ggml.add_bos_token", bool, source):
        named.pop("bos", None)
    elif "bos" not in named:
        raise UserError(
            f"{source}: tokenizer.ggml.add_bos_token is true, but tokenizer.ggml.bos_token_id "
            "names no token; convert the checkpoint again or choose another file."
        )
    if _optional(metadata, "tokenizer.ggml.add_eos_token", bool, source):
        raise UserError(
            f"{source}: tokenizer.ggml.add_eos_token is true, so every text would end before the "
            "model writes; choose a file of a model that generates text."
        )
    return Vocabulary(
        tokens=tokens,
        merges=_merges(metadata, source),
        added={
            i: AddedToken(token, special=is_control(token, kind != USER_DEFINED), normalized=False)
            for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if token is not None and kind in (UNKNOWN, CONTROL, USER_DEFINED)
        },
        end_ids=[named[end] for end in _ENDS if end in named],
        special_tokens={
            name: token
            for name, key in _SPECIAL.items()
            if key in named and (token := tokens[named[key]])
        },
        chat_templates={
            key.removeprefix(_TEMPLATE).removeprefix(".") or "default": _value(
                metadata, key, str, source
            )
            for key in metadata
            if key == _TEMPLATE or key.startswith(_TEMPLATE + ".")
        },
        source=source,
        fim_ids={
            role: next(named[key] for key in keys if key in named)
            for role, keys in _FIM_KEYS.items()
            if not named.keys().isdisjoint(keys)
        },
        prefix_ids=[named["bos"]] if "bos" in named else (),
    )


def _tokens(metadata: Mapping[str, Any], source: str) -> tuple[list[str | None], list[int]]:
    """Text, None where a row has no token, and type of each id up to the last token."""
    texts = _array(metadata, "tokenizer.ggml.tokens", str, source)
    kinds = _array(metadata, "tokenizer.ggml.token_type", int, source)
    if len(texts) != len(kinds):
        raise UserError(
            f"{source}: tokenizer.ggml.tokens has {len(texts)} entries and "
            f"tokenizer.ggml.token_type {len(kinds)}; convert or download the file again."
        )
    # An empty text is no token either: nothing could be encoded as it.
    tokens = [
        text if text and kind != UNUSED and not _PADDING.fullmatch(text) else None
        for text, kind in zip(texts, kinds, strict=True)
    ]
    while tokens and tokens[-1] is None:
        tokens.pop()
    return tokens, kinds[: len(tokens)]


def _named_ids(
    metadata: Mapping[str, Any], tokens: Sequence[str | None], source: str
) -> dict[str, int]:
    """The ids that `tokenizer.ggml.*_token_id` name, without those that are no token's.

    Files name a padding, unknown or BOS id outside the vocabulary where nothing uses it.
    """
    named = {}
    for name in {*_SPECIAL.values(), *_ENDS, *itertools.chain(*_FIM_KEYS.values())}:
        key = f"tokenizer.ggml.{name}_token_id"
        token = _optional(metadata, key, int, source)
        if token is None:
            continue
        if 0 <= token < len(tokens) and tokens[token] is not None:
            named[name] = token
        elif name in _ENDS:
            logging.warning("%s: %s is %d, but no token has that id.", source, key, token)
    return named


def _merges(metadata: Mapping[str, Any], source: str) -> list[tuple[str, str]]:
    """Lines "left right". One that is not two tokens yields a token that no vocabulary has."""
    lines = _array(metadata, "tokenizer.ggml.merges", str, source)
    return [line.partition(" ")[::2] for line in lines]


def _optional(metadata: Mapping[str, Any], key: str, kind: type[T], source: str) -> T | None:
    return _value(metadata, key, kind, source) if key in metadata else None


def _value(metadata: Mapping[str, Any], key: str, kind: type[T], source: str) -> T:
    value = _need(metadata, key, source)
    if type(value) is not kind:
        shown = value.tolist() if hasattr(value, "tolist") else value
        raise UserError(
            f"{source}: the key {key!r} holds {shown!r:.80}, not {kind.__name__}; convert the "
            "checkpoint again or choose another file."
        )
    return value


def _array(metadata: Mapping[str, Any], key: str, kind: type[T], source: str) -> list[T]:
    value = _need(metadata, key, source)
    values = value.tolist() if hasattr(value, "tolist") else value  # a NumPy array of numbers
    if not isinstance(values, list | tuple) or not set(map(type, values)) <= {kind}:
        raise UserError(
            f"{source}: the key {key!r} is not an array of {kind.__name__} only; convert the "
            "checkpoint again or choose another file."
        )
    return list(values)


def _need(metadata: Mapping[str, Any], key: str, source: str) -> Any:
    if key not in metadata:
        raise UserError(
            f"{source}: the key {key!r} is missing, and without it text would be tokenised "
            "wrongly; convert the checkpoint again or choose another file."
        )
    return metadata[key]
