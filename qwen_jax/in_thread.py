"""An iterator for asyncio: another thread goes through it, so that nothing else has to wait."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from typing import TypeVar

T = TypeVar("T")


async def in_thread(begin: Callable[[], Generator[T, None, None]]) -> AsyncGenerator[T, None]:
    """The items, as they come, and what the iterator raises. It is closed in its thread where this
    is left or cancelled, after the item that is being made.

    The thread is its own: asyncio's pool has a few, for which a hundred texts would stand in line.
    """
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[T | BaseException | None] = asyncio.Queue()
    left = threading.Event()

    def tell(news: T | BaseException | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(arrived.put_nowait, news)

    def go_through() -> None:
        try:
            with contextlib.closing(begin()) as items:
                for item in items:
                    if left.is_set():
                        break
                    tell(item)
        except BaseException as error:
            tell(error)
        else:
            tell(None)

    threading.Thread(target=go_through, name="generate", daemon=True).start()
    try:
        while (news := await arrived.get()) is not None:
            if isinstance(news, BaseException):
                raise news
            yield news
    finally:
        left.set()
