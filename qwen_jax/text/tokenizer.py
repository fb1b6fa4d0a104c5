"""Text <-> token ids, identical to the reference Qwen2 tokenizer."""

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers

from qwen_jax.errors import UserError
from qwen_jax.text import gguf_vocabulary, hf_vocabulary
from qwen_jax.text.vocabulary import BYTE_SYMBOLS, PATTERN, Fim, Vocabulary

_BYTE_OF_SYMBOL = {symbol: byte for byte, symbol in enumerate(BYTE_SYMBOLS)}


class Tokenizer:
    """Byte-level BPE with NFC normalisation. Qwen2.5 has no BOS, so none is added unasked.

    Build one with `from_gguf` or `from_hf`.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._bytes: dict[int, bytes] = {}
        bpe = models.BPE(vocabulary.ids, vocabulary.merges)
        # Two front ends share the one model; only the first knows the added tokens.
        space = vocabulary.add_prefix_space
        self._chat, self._plain = _front_end(bpe, space), _front_end(bpe, space)
        self._chat.add_tokens(list(vocabulary.added.values()))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], source: str) -> "Tokenizer":
        """From a GGUF file's key-value pairs; `source` names the file in messages."""
        return cls(gguf_vocabulary.read(metadata, source))

    @classmethod
    def from_hf(cls, directory: Path) -> "Tokenizer":
        """From the tokenizer's files in a Hugging Face checkpoint's directory."""
        return cls(hf_vocabulary.read(directory))

    @property
    def source(self) -> str:
        """The file that it was read from, as messages name it."""
        return self._vocabulary.source

    @property
    def vocab_size(self) -> int:
        """The last token's id plus one; the embedding may have more rows, which are padding."""
        return len(self._vocabulary.tokens)

    @property
    def text_size(self) -> int:
        """Rows an embedding needs for text without added tokens, some of which may be unused."""
        ordinary = self._vocabulary.ids.values() - self._vocabulary.added.keys()
        return max(ordinary) + 1

    @property
    def unused_ids(self) -> tuple[int, ...]:
        """Ids below `vocab_size` that no token has."""
        tokens = self._vocabulary.tokens
        return tuple(i for i, token in enumerate(tokens) if token is None)

    @property
    def fim(self) -> Fim | None:
        """Tokens of a fill-in-the-middle prompt; None for a model that has none."""
        return self._vocabulary.fim

    @property
    def fim_stop_ids(self) -> tuple[int, ...]:
        """Ids that end a filled-in middle besides `stop_ids`, as llama.cpp counts them."""
        return self._vocabulary.fim.stop_ids if self._vocabulary.fim else ()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a generation: the files' end of text, `<|im_end|>`, `<|endoftext|>`."""
        return self._vocabulary.stop_ids

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """What the checkpoint puts before a text that is no chat; Qwen2.5's puts nothing."""
        return tuple(self._vocabulary.prefix_ids)

    @property
    def chat_template(self) -> str | None:
        """The Jinja source for chats without tools."""
        return self._vocabulary.chat_templates.get("default")

    def template_for(self, tools: object = None) -> str | None:
        """The Jinja source for a chat, as transformers chooses it; None where there is none.

        Args:
            tools: what the chat offers; anything but None prefers the template "tool_use".

        Raises UserError where there are templates but none for such a chat.
        """
        templates = self._vocabulary.chat_templates
        names = ("tool_use", "default") if tools is not None else ("default",)
        for name in names:
            if name in templates:
                return templates[name]
        if templates:
            raise UserError(
                f"{self._vocabulary.source}: its chat templates are named "
                f"{', '.join(sorted(templates))}, and none is the default; name one so."
            )
        return None

    @property
    def special_tokens(self) -> dict[str, str]:
        """Text of `eos_token`, `pad_token`, `unk_token` and others, for chat templates."""
        return dict(self._vocabulary.special_tokens)

    def encode(
        self, text: str, parse_special: bool = True, add_special_tokens: bool = False
    ) -> list[int]:
        """Ids of `text`.

        Args:
            text: any Unicode text.
            parse_special: whether `<|im_end|>` and the other added tokens become one id each,
                as a rendered chat needs. With False they are spelt out like any other text, so
                that text from elsewhere cannot close a turn or call a tool.
            add_special_tokens: begin with `prefix_ids`, as transformers and llama.cpp do for a
                text that is no chat; a chat template writes its own.

        Raises:
            UserError: it is no text, or holds half of a surrogate pair, so that it is not Unicode.
        """
        if not isinstance(text, str):
            raise UserError(f"encode takes a text, but got {text!r:.60}; give it as str.")
        front_end = self._chat if parse_special else self._plain
        prefix = self._vocabulary.prefix_ids if add_special_tokens else ()
        try:
            return [*prefix, *front_end.encode(text, add_special_tokens=False).ids]
        except TypeError as error:
            half = next((c for c in text if "\ud800" <= c <= "\udfff"), "")
            raise UserError(
                f"the text holds {half!r}, which is not valid Unicode; give it as UTF-8."
            ) from error

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of `ids`, with U+FFFD for bytes that are not UTF-8.

        Args:
            ids: token ids, each below `vocab_size`.
            skip_special: leave out control tokens such as `<|im_end|>`.

        Raises UserError for what is no list of ids, or an id from `vocab_size` on.
        """
        if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
            raise UserError(f"decode takes token ids, but got {ids!r:.60}; give a list of them.")
        text = b"".join(map(self.token_bytes, self.visible(ids) if skip_special else ids))
        return text.decode("utf-8", errors="replace")

    def visible(self, ids: Iterable[int]) -> Iterable[int]:
        """The ids that are not control tokens."""
        added = self._vocabulary.added
        return (i for i in ids if i not in added or not added[i].special)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one id stands for: part of a character, or none for an unused id.

        Raises UserError for what is no id, or one from `vocab_size` on.
        """
        if type(token) is int and token in self._bytes:
            return self._bytes[token]
        if not hasattr(token, "__index__") or not 0 <= token < self.vocab_size:
            raise UserError(
                f"{self._vocabulary.source}: there is no token {token!r:.60}, only 0 to "
                f"{self.vocab_size - 1}."
            )
        text = self._vocabulary.tokens[token] or ""
        if token in self._vocabulary.added or not _BYTE_OF_SYMBOL.keys() >= set(text):
            found = text.encode("utf-8")
        else:
            found = bytes(map(_BYTE_OF_SYMBOL.__getitem__, text))
        return self._bytes.setdefault(int(token), found)

    def first_difference(self, other: "Tokenizer") -> int | None:
        """The lowest id that stands for something else in another vocabulary, if there is one. One
        that no token has is the same as one past the end."""
        pairs = itertools.zip_longest(self._vocabulary.tokens, other._vocabulary.tokens)
        return next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)

    def token_name(self, token: int) -> str:
        """How to show one id to a person: quoted text, bytes where it is part of a character."""
        tokens = self._vocabulary.tokens
        if hasattr(token, "__index__") and (token >= len(tokens) or tokens[token] is None):
            return f"[PAD{token}]"
        content = self.token_bytes(token)
        try:
            return repr(content.decode("utf-8"))
        except UnicodeDecodeError:
            return repr(content)


def _front_end(bpe: models.BPE, add_prefix_space: bool) -> tokenizers.Tokenizer:
    front_end = tokenizers.Tokenizer(bpe)
    # Not optional: ids of decomposed text differ without it, as llama.cpp's do.
    front_end.normalizer = normalizers.NFC()
    front_end.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False),
        ]
    )
    return front_end
