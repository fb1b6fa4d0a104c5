"""Ctrl-C: an end on the spot while modules are imported, a KeyboardInterrupt afterwards."""

import _thread
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

EXIT_CODE = 130
"""What a shell reports of a program that Ctrl-C ended."""


@contextlib.contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Lets `handler` answer Ctrl-C, unless someone else does or it is ignored, as by nohup."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def exit_at_once(_signal: int, _frame: FrameType | None) -> None:
    """For imports: raised while a native module starts, an exception crashes the process."""
    os.write(2, b"interrupted\n")
    os._exit(EXIT_CODE)


def raise_interrupt(_signal: int, frame: FrameType | None) -> None:
    """For the work itself, which keeps what it has written."""
    if frame is not None and frame.f_code.co_name == "_xla_gc_callback":
        # JAX's garbage collection callback: Python would print what is raised there and go on.
        threading.Timer(0.01, _thread.interrupt_main).start()
        return
    raise KeyboardInterrupt
