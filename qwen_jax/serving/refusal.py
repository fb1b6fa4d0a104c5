"""What a request gets in place of what it asked for, in OpenAI's form."""

from collections.abc import Mapping
from typing import Any

from qwen_jax.terminal import message

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

    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "invalid_request_error")
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}
