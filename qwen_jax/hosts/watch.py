"""Who of a run's hosts is still there: connections to the first, on which all keep saying so.

A device that waits for one of a host that has died may wait for ever, and all that JAX does about
it is to abort, after its own heartbeats and in its own words. So each process watches on a thread
of its own, and ends with a sentence as soon as a connection does, or when nothing came for a while.
"""

import contextlib
import os
import re
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import NoReturn

HERE, ENDED, TOLD = b".", b"E", b"T"
"""What a host says: that it is there, that it has done all, that it has told of a fault and ends;
and the first one, as in `L3;`, that another is lost."""

GRACE = 3.0
"""Seconds that are left to those who are about to tell of the same fault."""

SECRET = 16
"""Bytes by which the first host knows the others' connections."""


class Watch:
    """Connections of this host to others, by their numbers.

    Args:
        lost: called from the thread, with the number of a host that is gone; it does not return.
        seconds: after which one that says nothing is held for lost.
    """

    def __init__(
        self,
        connections: Mapping[int, socket.socket],
        lost: Callable[[int], NoReturn],
        seconds: float,
    ):
        self._connections, self._tell, self._seconds = dict(connections), lost, seconds
        self._left = False
        self._gone = threading.Event()
        threading.Thread(target=self._run, name="hosts", daemon=True).start()

    def leave(self, word: bytes) -> None:
        """Tells all that this host ends, one way or the other, and watches no more."""
        self._left = True
        self._say(word)

    def wait_for_others(self, seconds: float) -> None:
        """Until all others have ended, or for so long."""
        self._gone.wait(seconds)

    def _say(self, word: bytes) -> None:
        for connection in list(self._connections.values()):
            with contextlib.suppress(OSError):  # what has become of it is read on the thread
                connection.send(word)

    def _run(self) -> None:
        selector = selectors.DefaultSelector()
        for number, connection in self._connections.items():
            connection.setblocking(False)
            selector.register(connection, selectors.EVENT_READ, number)
        heard = dict.fromkeys(self._connections, time.monotonic())
        said = 0.0
        while self._connections:
            if not self._left and time.monotonic() - said > self._seconds / 10:
                self._say(HERE)
                said = time.monotonic()
            for key, _ in selector.select(timeout=self._seconds / 20):
                heard[key.data] = time.monotonic()
                if not self._hear(key.data):
                    selector.unregister(key.fileobj)
                    del self._connections[key.data]
            for number in self._connections:
                if time.monotonic() - heard[number] > self._seconds:
                    self._lose(number)
        self._gone.set()

    def _hear(self, number: int) -> bool:
        """Whether there will be more of a host."""
        try:
            said = self._connections[number].recv(4096)
        except BlockingIOError:
            return True
        except OSError:
            said = b""
        if TOLD in said:
            time.sleep(GRACE)
        elif ENDED in said:
            return False
        elif other := re.search(rb"L(\d+);", said):
            self._lose(int(other[1]))
        elif said:
            return True
        self._lose(number)
        return False

    def _lose(self, number: int) -> None:
        if not self._left:
            self._say(b"L%d;" % number)
            self._tell(number)


def listener() -> socket.socket:
    """Where the first host hears of the others, on a port that is free."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def accepted(
    listening: socket.socket, count: int, secret: bytes, seconds: float
) -> dict[int, socket.socket]:
    """On the first host, connections of all others by their numbers, counted from 1.

    Raises OSError where they don't come in time.
    """
    found: dict[int, socket.socket] = {}
    end = time.monotonic() + seconds
    with listening:
        while len(found) < count - 1:
            listening.settimeout(max(end - time.monotonic(), 0.01))
            connection, _ = listening.accept()
            connection.settimeout(5)
            said = b""
            with contextlib.suppress(OSError):
                said = connection.recv(SECRET + 4, socket.MSG_WAITALL)
            number = int.from_bytes(said[SECRET:], "big")
            if said[:SECRET] == secret and 1 < number <= count:
                found[number] = connection
            else:
                connection.close()  # of somebody who is none of ours
    return found


def connected(
    address: str, port: int, number: int, secret: bytes, seconds: float
) -> dict[int, socket.socket]:
    """On any other, its connection to the first. Raises OSError where that is not to be reached."""
    connection = socket.create_connection((address, port), timeout=seconds)
    connection.sendall(secret + number.to_bytes(4, "big"))
    return {1: connection}


def end_with(sentence: str, code: int) -> NoReturn:
    """Ends the process from a thread, while the main one may wait for a device for ever."""
    os.write(2, f"error: {sentence}\n".encode())
    os._exit(code)
