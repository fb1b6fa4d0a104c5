"""Runs chat templates in a child process that can be stopped (see `template_worker`)."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from qwen_jax.errors import UserError

WORKER = Path(__file__).with_name("template_worker.py")
# Importing jinja2 takes 0.1 s; a cold disk may need far longer, and that is not the template's.
START_SECONDS = 60.0
# For a child that has hung up to end, which takes a few milliseconds.
_LAST_SECONDS = 5.0
# JSON writes a control character in six bytes, and the reply has a few of its own.
_REPLY_BYTES_PER_BYTE = 6
_REPLY_OVERHEAD = 1 << 16
_ENVIRONMENT = (
    *("PYTHONHOME", "PYTHONPATH", "PYTHONUSERBASE", "PYTHONNOUSERSITE", "HOME"),  # finds jinja2
    *("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TZ"),
)
"""Variables that the child needs. Any other may be a secret, which a template that escapes its
sandbox could write into a text."""
# For each byte of a long conversation as JSON. Templates write a message once or twice; short
# messages took 14 bytes of memory and 0.4 us a byte on a busy core with Qwen2.5's template.
_TEXT_PER_BYTE = 4
_MEMORY_PER_BYTE = 20
_SECONDS_PER_BYTE = 2e-6


@dataclasses.dataclass(frozen=True)
class _Limits:
    """Of one render: in seconds by the clock, bytes of text in UTF-8, bytes of address space."""

    seconds: float
    max_bytes: int
    memory_bytes: int

    def for_request(self, size: int) -> "_Limits":
        """These, or more where a request of `size` bytes needs more."""
        return _Limits(
            max(self.seconds, _SECONDS_PER_BYTE * size),
            max(self.max_bytes, _TEXT_PER_BYTE * size),
            max(self.memory_bytes, _MEMORY_PER_BYTE * size),
        )


class TemplateRenderer:
    """Renders templates within limits of time, output and memory, which grow with the input.

    The child is started for the first render, kept for later ones, and killed when a template
    breaks a limit; the next render starts another. A conversation of megabytes has a child with
    limits of its own. Safe to use from several threads, which take turns.

    Args:
        seconds: for one short render, by the clock.
        max_bytes: of the text, in UTF-8, that a short conversation is rendered to.
        memory_bytes: address space of the child (where the system can limit it: not on
            Windows, and macOS ignores it).
    """

    def __init__(
        self,
        seconds: float = 5.0,
        max_bytes: int = 4 << 20,
        memory_bytes: int = 512 << 20,
    ) -> None:
        self._limits = self._childs_limits = _Limits(seconds, max_bytes, memory_bytes)
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def render(self, template: str, context: dict[str, Any], source: str) -> str:
        """The template's text; `source` names the model in messages.

        Raises UserError where the template is faulty, refuses, or breaks a limit, or where
        `context` is not JSON.
        """
        try:
            request = json.dumps({"template": template, "context": context}).encode("ascii")
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(
                f"the messages or tools are not JSON ({error}); give text, numbers, lists, dicts."
            ) from error
        limits = self._limits.for_request(len(request))
        with self._lock:
            if self._childs_limits != limits:
                self.close()
            if self._child is None:
                self._start(limits)
            reply, in_time = self._exchange(request + b"\n", limits.seconds)
            if "text" in reply:
                return reply["text"]
            if "error" in reply:
                raise UserError(
                    f"{source}: its chat template {reply['error']}; correct the conversation or "
                    "the template, or use the model without a chat."
                )
            code, said = self._ended() if in_time and not reply else (0, "")
            self.close()
        breach = reply.get("limit", "needed too much memory or crashed")
        if not in_time:
            breach = f"took longer than {limits.seconds:g} s"
        elif code > 0 and not said.startswith("MemoryError"):
            # What a template does to its process ends it by a signal.
            raise UserError(
                f"the process that renders chat templates ended with the code {code} ({said}), "
                f"which is no fault of {source}; try again, and report it if it happens again."
            )
        raise UserError(
            f"{source}: its chat template {breach} and was stopped; shorten the conversation, or "
            "if it is short, do not trust this file."
        )

    def close(self) -> None:
        """Ends the child, if there is one."""
        child, self._child = self._child, None
        if child is None:
            return
        assert child.stdin is not None and child.stdout is not None and child.stderr is not None
        child.kill()
        child.wait()
        child.stdout.close()
        child.stderr.close()
        with contextlib.suppress(BrokenPipeError):  # a request that it never read
            child.stdin.close()

    def _ended(self) -> tuple[int, str]:
        """The exit code of a child that has hung up, and the last line of its complaint."""
        child = self._child
        assert child is not None
        try:
            _, complaint = child.communicate(timeout=_LAST_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            _, complaint = child.communicate()
        return child.returncode, complaint.decode(errors="replace").strip().rpartition("\n")[2]

    def _start(self, limits: _Limits) -> None:
        self._childs_limits = limits
        # -P: the worker's folder is not searched, so tokenizer.py there hides no library.
        command = [sys.executable, "-P", str(WORKER), *map(str, dataclasses.astuple(limits))]
        try:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            )
            started, in_time = self._exchange(b"", START_SECONDS)
            why = f"it took longer than {START_SECONDS:g} s"
            if in_time and not started:
                code, said = self._ended()
                why = said or f"it ended with the code {code}"
        except OSError as error:
            started, why = {}, f"{error.strerror}"
        if not started:
            self.close()
            raise UserError(
                f"the process that renders chat templates did not start ({why}); see what "
                f"`{' '.join(command)}` says."
            )

    def _exchange(self, request: bytes, seconds: float) -> tuple[dict[str, Any], bool]:
        """The child's next reply, {} if it died; and whether that was before its time was up."""
        child = self._child
        assert child is not None and child.stdin is not None and child.stdout is not None
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            child.kill()

        # A timer rather than select(): it also covers a write that blocks, and works everywhere.
        timer = threading.Timer(seconds, expire)
        timer.daemon = True
        timer.start()
        line = b""
        try:
            child.stdin.write(request)
            child.stdin.flush()
            line = child.stdout.readline(
                _REPLY_BYTES_PER_BYTE * self._childs_limits.max_bytes + _REPLY_OVERHEAD
            )
        except BrokenPipeError:
            pass  # it died before it read the request
        except BaseException:
            self.close()  # Ctrl-C: a late reply must not answer the next request
            raise
        finally:
            timer.cancel()
            timer.join()
        whole = line.endswith(b"\n") and not expired.is_set()
        return (json.loads(line) if whole else {}), not expired.is_set()
