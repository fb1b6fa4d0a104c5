"""What a checkpoint says about its tokens, checked once.

A byte-level BPE: every byte has a one-character symbol (GPT-2's), merges build longer
tokens out of them, and added tokens such as `<|im_end|>` stand outside the merges.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from absl import logging
from tokenizers import AddedToken

from qwen_jax.errors import UserError

# Contractions, words with one leading character, single digits, punctuation with a leading
# space, line breaks, and other white space.
PATTERN = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
# A chat turn ends on the first and a document on the second, whatever the file calls its eos.
END_TOKENS = ("<|im_end|>", "<|endoftext|>")
# Text of each of `Fim`'s fields. Qwen's tokenizer.json has them as ordinary added tokens, so the
# reference shows them; llama.cpp's converter makes control tokens of them by their looks.
FIM_TOKENS = {
    "prefix": "<|fim_prefix|>",
    "middle": "<|fim_middle|>",
    "suffix": "<|fim_suffix|>",
    "pad": "<|fim_pad|>",
    "repo_name": "<|repo_name|>",
    "file_sep": "<|file_sep|>",
}


@dataclasses.dataclass(frozen=True)
class Fim:
    """Ids of the tokens around the pieces of a fill-in-the-middle prompt."""

    prefix: int
    middle: int
    suffix: int
    pad: int | None = None
    repo_name: int | None = None
    file_sep: int | None = None

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """What ends a completed middle besides the ordinary ends, as llama.cpp counts them."""
        ends = (self.pad, self.repo_name, self.file_sep)
        return tuple(end for end in ends if end is not None)


def _byte_symbols() -> tuple[str, ...]:
    """GPT-2's symbol for each byte: itself where it prints, else the next one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in printable else next(spare)) for byte in range(256))


BYTE_SYMBOLS = _byte_symbols()


def is_control(text: str, marked: bool) -> bool:
    """Whether an added token is left out of what a user reads.

    llama.cpp's converter marks tokens by their looks, besides those a tokenizer.json marks, and a
    GGUF file does not tell which was which. The same rule for both formats lets both show the
    same text; for the tokens that Qwen2.5 has, it is the text that the reference shows.
    """
    if text in FIM_TOKENS.values():
        return False
    brackets = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
    looks_special = any(text.startswith(a) and text.endswith(b) for a, b in brackets)
    return marked or looks_special or text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The tokens in use, without an embedding's padding rows, and the roles some of them have.

    Attributes:
        tokens: text of each id, in symbols for ordinary tokens and as it stands for added ones;
            None where no token has that id. The last is a token.
        merges: pairs of tokens, the first to be merged first.
        added: id -> token that is matched as a whole, before BPE.
        end_ids: ids that the checkpoint's files name as ends of a text.
        special_tokens: `bos_token`, `eos_token`, … as chat templates know them.
        chat_templates: name -> Jinja source; "default" and, for chats with tools, "tool_use".
        source: the file's name, for messages.
        fim_ids: fields of `Fim` that the file names; the others are found by their text.
        prefix_ids: what the file puts before a text that is no chat: a BOS, or nothing.
        add_prefix_space: whether a text's first word is encoded as if a space stood before it.
        ids: text of a token -> id.
        stop_ids: ids that end a text.
        fim: None for a model that was not trained to fill in a middle.

    Raises UserError where they contradict one another.
    """

    tokens: Sequence[str | None]
    merges: Sequence[tuple[str, str]]
    added: dict[int, AddedToken]
    end_ids: Iterable[int]
    special_tokens: dict[str, str]
    chat_templates: Mapping[str, str]
    source: str
    fim_ids: Mapping[str, int] = dataclasses.field(default_factory=dict)
    prefix_ids: Sequence[int] = ()
    add_prefix_space: bool = False
    ids: dict[str, int] = dataclasses.field(init=False)
    stop_ids: tuple[int, ...] = dataclasses.field(init=False)
    fim: Fim | None = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        ids = {token: i for i, token in enumerate(self.tokens) if token is not None}
        named = {role: ids[text] for role, text in FIM_TOKENS.items() if text in ids}
        named |= self.fim_ids
        ends = [i for i, token in self.added.items() if token.content in END_TOKENS]
        object.__setattr__(self, "ids", ids)
        fim = Fim(**named) if {"prefix", "middle", "suffix"} <= named.keys() else None
        object.__setattr__(self, "fim", fim)
        object.__setattr__(self, "stop_ids", tuple(dict.fromkeys([*self.end_ids, *ends])))
        self._check_tokens()
        self._check_merges()
        if not self.stop_ids:
            self._refuse(
                f"no end-of-text token that it has is named, and it has none of {END_TOKENS}, so "
                "a text would never end"
            )

    def _check_tokens(self) -> None:
        for i, token in enumerate(self.tokens):
            if token is not None and self.ids[token] != i:
                self._refuse(f"the token {token!r:.80} has two ids, {i} and {self.ids[token]}")
        missing = [byte for byte, symbol in enumerate(BYTE_SYMBOLS) if symbol not in self.ids]
        if missing:
            self._refuse(
                f"the vocabulary lacks {len(missing)} of the 256 bytes, the first "
                f"{missing[0]:#04x}, so some text could not be encoded"
            )
        if len(self.added) == len(self.ids):
            self._refuse("it marks every token as an added one, so no ordinary text has any")

    def _check_merges(self) -> None:
        known = self.ids.__contains__
        made = set(BYTE_SYMBOLS)
        # The longest loop in reading a vocabulary: 0.1 s for Qwen's 151,387 merges.
        for left, right in self.merges:
            if not (known(left) and known(right) and known(left + right)):
                self._refuse(
                    f"the merge of {left!r:.80} and {right!r:.80} names a token that is not there"
                )
            made.add(left + right)
        never = [t for t, i in self.ids.items() if i not in self.added and t not in made]
        # Special tokens that no file names as such stand in some vocabularies: harmless.
        cut = [t for t in never if not (t.startswith(("<", "[")) and t.endswith((">", "]")))]
        if cut:
            self._refuse(
                f"none of the {len(self.merges)} merges makes {len(cut)} of its tokens, the first "
                f"{cut[0]!r:.80}, so merges are missing and text would be encoded wrongly"
            )
        if never:
            logging.warning(
                "%s: %d tokens, the first %r, are neither made by merges nor named as added "
                "tokens, so no text is encoded as them.",
                self.source,
                len(never),
                never[0],
            )

    def _refuse(self, problem: str) -> None:
        raise UserError(f"{self.source}: {problem}; convert the checkpoint again or get another.")
