"""What a server lets through, and who may ask."""

import dataclasses
import hashlib
import hmac
import ipaddress
from pathlib import Path

from qwen_jax import regular_files
from qwen_jax.errors import UserError

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


@dataclasses.dataclass(frozen=True)
class Limits:
    """Raises UserError where a value makes no sense.

    Attributes:
        host: where to listen.
        port: 0 takes a free one.
        queue: requests that may wait for a slot.
        timeout: seconds that an answer may take, waiting included.
        max_body: bytes of a request.
        max_prompt_tokens: of one prompt; None for the context.
        log_prompts: write what is asked to the log.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    queue: int = 256
    timeout: float = 600.0
    max_body: int = 4_000_000
    max_prompt_tokens: int | None = None
    log_prompts: bool = False

    def __post_init__(self) -> None:
        checks = {
            "port": (0 <= self.port < 2**16, "from 0 (a free one) to 65535"),
            "queue": (0 <= self.queue <= 1_000_000, "from 0 to 1000000"),
            "timeout": (0 < self.timeout <= 1e6, "above 0 and at most 1000000 seconds"),
            "max_body": (1 <= self.max_body <= 2**30, "from 1 to 1073741824 bytes"),
            "max_prompt_tokens": (
                self.max_prompt_tokens is None or self.max_prompt_tokens >= 1,
                "at least 1",
            ),
        }
        for name, (holds, allowed) in checks.items():
            if not holds:
                raise UserError(f"serve.{name} is {getattr(self, name)}, but it must be {allowed}.")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


class Key:
    """Who knows it may ask. Kept as a digest, compared in constant time."""

    def __init__(self, key: str):
        self._digest = hashlib.sha256(key.encode()).digest()

    def fits(self, authorization: str) -> bool:
        """Whether a header is `Bearer` and the key."""
        scheme, _, given = authorization.partition(" ")
        digest = hashlib.sha256(given.strip().encode("utf-8", "surrogatepass")).digest()
        return hmac.compare_digest(digest, self._digest) and scheme.lower() == "bearer"

    @classmethod
    def in_file(cls, path: str) -> "Key":
        """The key that is all of a file. Raises UserError where there is none."""
        try:
            key = regular_files.read(Path(path), 10_000).decode("ascii").strip()
        except OSError as error:
            why = regular_files.why_not(error)
            raise UserError(f"--api_key_file={path} can't be read: {why}") from error
        except UnicodeDecodeError as error:
            raise UserError(
                f"--api_key_file={path} is no ASCII; a key is letters and digits."
            ) from error
        if not key or not key.isprintable() or " " in key:
            raise UserError(f"--api_key_file={path} must hold one key, without spaces.")
        return cls(key)


def host_is_local(header: str) -> bool:
    """Whether a Host names this machine: a page of another name that its owner has pointed
    here (DNS rebinding) may not ask."""
    name = header if header.endswith("]") else header.rpartition(":")[0] or header
    return name.lower() in LOOPBACK_NAMES
