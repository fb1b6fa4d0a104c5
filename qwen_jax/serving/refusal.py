"""What a request gets in place of what it asked for, in OpenAI's form."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from qwen_jax.errors import ContextFullError, UserError
from qwen_jax.terminal import message, one_line

KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}
"""OpenAI's `type` of an error by its status; of others it is invalid_request_error."""


class RefusalError(Exception):
    """Ends a request.

    Attributes:
        status: of HTTP.
        param: the field that is wrong, where it is one.
        code: a word for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        text: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message(text))
        self.status, self.param, self.code, self.headers = status, param, code, headers

    @classmethod
    def of(cls, error: UserError, param: str | None = None) -> "RefusalError":
        """What a caller is told of a mistake.

        Args:
            param: the field that it is in, where the mistake itself names none.
        """
        code = "context_length_exceeded" if isinstance(error, ContextFullError) else None
        text = str(error).removeprefix("sampling.")  # which is a name of flags and configs
        return cls(400, text, param=error.field or param, code=code)

    def body(self, hide: Callable[[str], str] = str) -> dict[str, Any]:
        """As JSON; `hide` takes out of the message what is not for callers."""
        kind = KINDS.get(self.status, "invalid_request_error")
        error = {"message": hide(str(self)), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def hiding(sources: Iterable[str]) -> Callable[[str], str]:
    """What makes "this model" of these files' names: callers need not know where they lie."""
    # A directory may be called "model", which is a word of every other message, and no secret.
    named = {one_line(source) for source in sources if not source.isalpha()}
    if not named:
        return str
    names = re.compile(
        rf"(?<![\w./-])(?:{'|'.join(map(re.escape, sorted(named, reverse=True)))})(?![\w-])"
    )
    return lambda text: names.sub("this model", text)
