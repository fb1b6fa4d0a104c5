"""The words of the demo model's training text, and those kept out of it."""

import functools
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

TEXT_DIR = Path(__file__).parent / "demo_text"

ONSETS = (
    "b c d f g h j k l m n p qu r s t v w y z bl br ch cl cr dr fl fr gl gr kn ph pl pr sc sh sl "
    "sm sn sp st str sw th tr wh"
)
NUCLEI = "a a e e i i o o u u ai au ea ee ei ie io oa oo ou y"
CODAS = (
    "b ck d ff g l ll m n nd ng nk nt p r rd rk rm rn rt s sh ss st t th x ze ve ce le er on "
    "a e i o u y"
)
ALPHABETS = (  # first and last code point of some beyond a-z, and their words' longest length
    (0xE0, 0xF6, 8),  # accented Latin
    (0x3B1, 0x3C9, 8),  # Greek
    (0x430, 0x44F, 8),  # Cyrillic
    (0x3041, 0x3093, 5),  # Hiragana
    (0x30A1, 0x30F6, 5),  # Katakana
    (0x4E00, 0x9FFF, 3),  # Han
)


def read_lines(name: str) -> list[str]:
    """Lines of a file in `demo_text` without comments and blank ones."""
    lines = (TEXT_DIR / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@functools.cache
def heldout_words() -> tuple[str, ...]:
    """The 200 words of the evaluation."""
    return tuple(word for line in read_lines("heldout.txt") for word in line.split())


def syllables(word: str) -> int:
    """A fair guess by vowel groups: "apple" 2, "home" 1, "silence" 2."""
    word = word.lower()
    count = len(re.findall(r"[aeiouyà-ö]+", word))
    if count > 1 and re.search(r"[^aeiouyl]e$|[aeiouy]le$", word):
        count -= 1
    return max(count, 1)


class WordSource:
    """Words to ask for: real ones, and mostly made-up ones of many shapes.

    Args:
        real: the real words.
        pieces: letter tokens of the tokenizer; strung together they see to it that every one
            of them is copied at some time.

    No word contains a held-out one.
    """

    def __init__(self, real: Sequence[str], pieces: Sequence[str]) -> None:
        self._real = sorted(set(real))
        self._pieces = list(pieces)
        self._known = frozenset(real)
        self._heldout = re.compile("|".join(heldout_words()), re.IGNORECASE)
        self._next: dict[str, list[str]] = defaultdict(list)
        for word in self._real:
            padded = f"^^{word}$"
            for i in range(2, len(padded)):
                self._next[padded[i - 2 : i]].append(padded[i])

    def draw(self, rng: random.Random) -> str:
        while True:
            word = self._cased(rng, self._plain(rng))
            if not self._heldout.search(word):
                return word

    def _plain(self, rng: random.Random) -> str:
        kind = rng.random()
        if kind < 0.25:
            return rng.choice(self._real)
        if kind < 0.50:
            return self._english_like(rng)
        if kind < 0.62:  # a blend: "mountain" and "candle" make "mountdle"
            head, tail = rng.choice(self._real), rng.choice(self._real)
            return head[: rng.randint(2, len(head))] + tail[-rng.randint(2, len(tail)) :]
        if kind < 0.75:
            parts = (ONSETS.split(), NUCLEI.split(), CODAS.split())
            count = rng.choice((1, 2, 2, 3, 3, 4))
            return "".join(rng.choice(part) for _ in range(count) for part in parts)
        if kind < 0.93:
            return "".join(rng.choices(self._pieces, k=rng.choice((1, 2, 2, 3, 3, 4, 5))))
        if kind < 0.97:
            return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9)))
        first, last, longest = rng.choice(ALPHABETS)
        return "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, longest)))

    def _english_like(self, rng: random.Random) -> str:
        """Each letter is drawn by the two before it, as often as real words have it there."""
        while True:
            word = "^^"
            while not word.endswith("$") and len(word) < 16:
                word += rng.choice(self._next[word[-2:]])
            word = word[2:].rstrip("$")
            if len(word) > 2 and word not in self._known:
                return word

    def _cased(self, rng: random.Random, word: str) -> str:
        kind = rng.random()
        if kind < 0.10:
            return word.capitalize()
        if kind < 0.12:
            return word.upper()
        if kind < 0.14:
            return f"{word}-{rng.choice(self._real)}"
        if kind < 0.18:
            return f"{rng.choice(self._real)} {word}"
        return word
