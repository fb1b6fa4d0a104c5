"""Text while it is being generated: whole characters only, and stop strings cut off cleanly."""

import codecs
import itertools
from collections.abc import Collection, Iterable, Sequence

from qwen_jax.errors import UserError
from qwen_jax.text.tokenizer import Tokenizer


class TextStream:
    """Turns ids into the text to be shown, as they arrive, up to the first stop string.

    A token may end inside a character; its bytes wait for the rest. Without stop strings all
    pieces together equal `tokenizer.decode` of all ids but the hidden ones.

    Stop strings are looked for in the text with its control tokens, so that they may be or hold
    some; what is shown is without them.

    Args:
        tokenizer: whose ids they are.
        stops: strings that end the text.
        hidden: ids that are not shown either, as those that end the text.
        skip_special: hide control tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        hidden: Collection[int] = (),
        skip_special: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._hidden = hidden
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops = StopStrings(stops) if stops else None
        self._shown = bytearray()  # 1 for each byte in `_stops` that is to be shown, else 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found; no more text comes then."""
        return self._stops is not None and self._stops.found is not None

    def feed(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete, possibly empty."""
        if self._stops is None:
            return self._decoder.decode(b"".join(map(self._tokenizer.token_bytes, self._seen(ids))))
        text = b""
        for token in ids:
            content = self._tokenizer.token_bytes(token)
            text += content
            self._shown += bytes([token in self._seen([token])]) * len(content)
        return self._show(self._stops.feed(text))

    def finish(self) -> str:
        """What was still waiting: the possible start of a stop string, and U+FFFD for a character
        that never became whole."""
        rest = self._show(self._stops.finish()) if self._stops is not None else ""
        return rest + self._decoder.decode(b"", final=True)

    def _seen(self, ids: Iterable[int]) -> Iterable[int]:
        ids = self._tokenizer.visible(ids) if self._skip_special else ids
        return (i for i in ids if i not in self._hidden)

    def _show(self, text: bytes) -> str:
        """The visible bytes of what the stop strings let through."""
        visible = bytes(itertools.compress(text, self._shown))
        del self._shown[: len(text)]
        return self._decoder.decode(visible)


def stops_of(given: str | Iterable[str]) -> tuple[str, ...]:
    """The stop strings that somebody gives, one or several.

    Raises UserError for an empty one, and for what is no text.
    """
    stops = (given,) if isinstance(given, str) else given
    listed = tuple(stops) if isinstance(stops, Iterable) else (None,)
    if not all(isinstance(stop, str) and stop for stop in listed):
        raise UserError(
            f"stop is {given!r:.80}, but it must be a text that is not empty, or a list of such."
        )
    try:
        "".join(listed).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"stop is {given!r:.80}, which is not valid Unicode.") from error
    return listed


class StopStrings:
    """Lets UTF-8 through up to the first stop string, wherever the pieces are cut.

    The first stop string to be complete counts; of several that end on one byte, the longest.
    So the result does not depend on how the text is cut into pieces. A stop string's U+FFFD is that
    character; bytes that are no UTF-8, which are shown as one, are not.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop.encode() for stop in stops_of(stops))
        self._held = b""
        self.found: str | None = None

    def feed(self, piece: bytes) -> bytes:
        """Text that is safe to show. Once `found` names a stop string, always empty."""
        if self.found is not None:
            return b""
        text = self._held + piece
        # (end, start) of each stop string's first occurrence.
        hits = [(at + len(s), at, s) for s in self._stops if (at := text.find(s)) >= 0]
        if hits:
            _, start, stop = min(hits)
            self.found, self._held = stop.decode(), b""
            return text[:start]
        safe = len(text) - self._possible_start(text)
        self._held = text[safe:]
        return text[:safe]

    def finish(self) -> bytes:
        """What was held back as a possible beginning of a stop string, now that no more comes."""
        held, self._held = self._held, b""
        return held

    def _possible_start(self, text: bytes) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = min(len(text), max(map(len, self._stops), default=1) - 1)
        return next(
            (n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stops)),
            0,
        )
