"""What a checkpoint says about its tokens, checked once.

A byte-level BPE: every byte has a one-character symbol (GPT-2's), merges build longer
tokens out of them, and added tokens such as `<|im_end|>` stand outside the merges.
"""

import dataclasses
from collections.abc import Iterable, Sequence

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


def _byte_symbols() -> tuple[str, ...]:
    """GPT-2's symbol for each byte: itself where it prints, else the next one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in printable else next(spare)) for byte in range(256))


BYTE_SYMBOLS = _byte_symbols()


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The tokens in use, without an embedding's padding rows, and the roles some of them have.

    Attributes:
        tokens: text of each id, in symbols for ordinary tokens and as it stands for added ones.
        merges: pairs of tokens, the first to be merged first.
        added: id -> token that is matched as a whole, before BPE.
        end_ids: ids that the checkpoint's files name as ends of a text.
        special_tokens: `bos_token`, `eos_token`, … as chat templates know them.
        chat_template: Jinja source, or None where the checkpoint has none.
        source: the file's name, for messages.

    Raises UserError where they contradict one another.
    """

    tokens: Sequence[str]
    merges: Sequence[tuple[str, str]]
    added: dict[int, AddedToken]
    end_ids: Iterable[int]
    special_tokens: dict[str, str]
    chat_template: str | None
    source: str
    ids: dict[str, int] = dataclasses.field(init=False)
    stop_ids: tuple[int, ...] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        ids = dict(zip(self.tokens, range(len(self.tokens)), strict=True))
        ends = [i for i, token in self.added.items() if token.content in END_TOKENS]
        object.__setattr__(self, "ids", ids)
        object.__setattr__(self, "stop_ids", tuple(dict.fromkeys([*self.end_ids, *ends])))
        self._check_tokens()
        self._check_merges()
        if not self.stop_ids:
            self._refuse(
                f"no end-of-text token is named and the vocabulary has none of {END_TOKENS}, so a "
                "text would never end"
            )

    def _check_tokens(self) -> None:
        if len(self.ids) < len(self.tokens):
            twice = next(i for i, token in enumerate(self.tokens) if self.ids[token] != i)
            self._refuse(
                f"the token {self.tokens[twice]!r} has two ids, {twice} and "
                f"{self.ids[self.tokens[twice]]}"
            )
        if "" in self.ids:
            self._refuse(f"the token with id {self.ids['']} is empty")
        missing = [byte for byte, symbol in enumerate(BYTE_SYMBOLS) if symbol not in self.ids]
        if missing:
            self._refuse(
                f"the vocabulary lacks {len(missing)} of the 256 bytes, the first "
                f"{missing[0]:#04x}, so some text could not be encoded"
            )

    def _check_merges(self) -> None:
        known = self.ids.__contains__
        # The longest loop in reading a vocabulary: 0.1 s for Qwen's 151,387 merges.
        for left, right in self.merges:
            if not (known(left) and known(right) and known(left + right)):
                self._refuse(f"the merge of {left!r} and {right!r} names a token that is not there")
        # A merge makes one token, so fewer merges than tokens to be made mean a list cut short.
        made = len(self.tokens) - len(self.added) - len(BYTE_SYMBOLS)
        if made > len(self.merges):
            self._refuse(f"{made} tokens are made by merges but there are only {len(self.merges)}")

    def _refuse(self, problem: str) -> None:
        raise UserError(f"{self.source}: {problem}; convert or download the checkpoint again.")
