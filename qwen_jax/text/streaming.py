"""Text while it is being generated: whole characters only, and stop strings cut off cleanly."""

import codecs
from collections.abc import Iterable, Sequence

from qwen_jax.errors import UserError
from qwen_jax.text.tokenizer import Tokenizer


class TextStream:
    """Turns ids into text as they arrive.

    A token may end inside a character; its bytes wait for the rest. All pieces together
    equal `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete, possibly empty."""
        shown = self._tokenizer.visible(ids) if self._skip_special else ids
        return self._decoder.decode(b"".join(map(self._tokenizer.token_bytes, shown)))

    def finish(self) -> str:
        """What was still waiting: U+FFFD for a character that never became whole, or nothing."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Lets text through up to the first stop string, wherever the pieces are cut.

    The first stop string to be complete counts; of several that end on one character, the
    longest. So the result does not depend on how the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str) or not all(isinstance(s, str) and s for s in stops):
            raise UserError(
                f"stop is {stops!r:.80}, but it must be a list of texts that are not empty."
            )
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def feed(self, piece: str) -> str:
        """Text that is safe to show. Once `found` names a stop string, always empty."""
        if self.found is not None:
            return ""
        text = self._held + piece
        # (end, start) of each stop string's first occurrence.
        hits = [(at + len(s), at, s) for s in self._stops if (at := text.find(s)) >= 0]
        if hits:
            _, start, self.found = min(hits)
            self._held = ""
            return text[:start]
        safe = len(text) - self._possible_start(text)
        self._held = text[safe:]
        return text[:safe]

    def finish(self) -> str:
        """What was held back as a possible beginning of a stop string, now that no more comes."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = min(len(text), max(map(len, self._stops), default=1) - 1)
        return next(
            (n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stops)),
            0,
        )
