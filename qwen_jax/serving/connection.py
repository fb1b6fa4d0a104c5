"""A connection whose requests have to begin in time, which uvicorn leaves to a proxy."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 30.0
"""In which a request's headers have to arrive: from the connection on, or from the first byte after
an answer on. Where nothing follows an answer, uvicorn's keep-alive ends the connection earlier."""


class Connection(H11Protocol):
    """Ends where no whole headers come: it would be held for ever, and a descriptor with it."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget()  # A request is being answered, whose body has its own time.
        elif self._late is None:  # What trickles in later gives no more time.
            self._late = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def _forget(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
