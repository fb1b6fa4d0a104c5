"""Who holds which pages of the cache, and which full pages hold the beginning of a text."""

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np

from qwen_jax.model.cache import NOBODY, PAGE


class Pool:
    """The host's account of a pool of so many pages.

    Full pages of prompts are remembered by what they and all pages before them hold, so that texts
    that begin alike share them. One that nobody holds any more stays until its room is needed; of
    these the one that was let go longest ago goes first. One that is still to be filled is shared
    only with whom the same scheduler admits later, which puts its tokens in after.
    """

    def __init__(self, pages: int):
        self._free = [page for page in reversed(range(pages)) if page != NOBODY]
        self._holders: Counter[int] = Counter()
        self._pages: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._fillers: dict[int, object] = {}
        self.size = len(self._free)

    @property
    def available(self) -> int:
        """Pages that nobody holds."""
        return len(self._free) + len(self._idle)

    def shared(self, keys: Sequence[bytes], scheduler: object) -> list[int]:
        """The remembered pages of as many keys as there are without a gap; they are held now."""
        pages = []
        for key in keys:
            page = self._pages.get(key)
            if page is None or self._fillers.get(page, scheduler) is not scheduler:
                break
            pages.append(page)
        for page in pages:
            self._holders[page] += 1
            self._idle.pop(page, None)
        return pages

    def take(self, count: int) -> list[int]:
        """Pages for a text of its own, at most as many as are `available`."""
        while len(self._free) < count:
            page, _ = self._idle.popitem(last=False)
            del self._pages[self._keys.pop(page)]
            self._free.append(page)
        pages = [self._free.pop() for _ in range(count)]
        self._holders.update(pages)
        return pages

    def remember(self, page: int, key: bytes, scheduler: object) -> None:
        """A page that is held will be full: a scheduler is going to fill it."""
        if key not in self._pages and page not in self._keys:
            self._pages[key], self._keys[page] = page, key
            self._fillers[page] = scheduler

    def filled(self, page: int) -> None:
        """A page is full now, or will be before anything else looks at it."""
        self._fillers.pop(page, None)

    def forget(self, pages: Sequence[int]) -> None:
        """Pages that won't be filled after all."""
        for page in pages:
            self.filled(page)
            if (key := self._keys.pop(page, None)) is not None:
                del self._pages[key]

    def forget_all(self) -> None:
        """What pages held is lost; who holds which stays as it is."""
        self.forget(list(self._keys))
        self._free += self._idle
        self._idle.clear()

    def release(self, pages: Sequence[int]) -> None:
        """Lets a text's pages go, the last ones first: without those before it a page is of no
        use."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page] > 0:
                continue
            del self._holders[page]
            if page in self._keys:
                self._idle[page] = None
            else:
                self._free.append(page)


def page_keys(tokens: Sequence[int]) -> Iterator[bytes]:
    """A key for every full page of a text: 16 bytes that stand for it and all before it."""
    key = b""
    for start in range(0, len(tokens) - PAGE + 1, PAGE):
        page = np.asarray(tokens[start : start + PAGE], np.int32)
        key = hashlib.blake2b(key + page.tobytes(), digest_size=16).digest()
        yield key
