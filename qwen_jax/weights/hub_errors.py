"""What can go wrong between here and the Hub: the cause, of which only what is known is said, and
the way out."""

import errno
import json
import re

from qwen_jax.weights.hub_names import HubName

_FULL = {errno.ENOSPC, errno.EDQUOT}
# Of the library for HTTP, or of simplejson, which requests prefers.
_BY_NAME = ("TooManyRedirects", "JSONDecodeError")
_LOGIN = "log in with hf auth login"
_BAD_TOKEN = ("the token in HF_TOKEN has letters that none has", "set it again")


class NotTheHub(Exception):
    """An answer that the Hub would not give."""


def is_definite(error: Exception) -> bool:
    """Whether the Hub has said that there is no such thing, so that the cache need not be asked."""
    from huggingface_hub.errors import HFValidationError, RevisionNotFoundError

    return isinstance(error, HFValidationError | RevisionNotFoundError)


def explain(name: HubName, error: Exception) -> tuple[str, str]:
    """Why something of a repository was not got, and what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        FileMetadataError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, HFValidationError):
        return f"this is no repository's name ({_line(error)})", "check it on the Hub"
    if isinstance(error, HfHubHTTPError):
        return _of_answer(name, error)
    if isinstance(error, OfflineModeIsEnabled):
        return (
            "HF_HUB_OFFLINE forbids asking the Hub",
            "unset it once, for the local cache does not have this",
        )
    cache = constants.HF_HUB_CACHE
    if isinstance(error, OSError) and error.errno in _FULL:
        return f"the disk of the cache {cache} is full", "free some, or set HF_HUB_CACHE to another"
    if isinstance(error, OSError) and error.filename is not None:
        if str(error.filename).startswith(cache):
            problem = f"the cache {cache} can't be used ({error.strerror})"
            return problem, "set HF_HUB_CACHE to a directory that can be written"
        # As the file that keeps the token.
        return f"{error.filename} can't be used ({error.strerror})", "see to that it can"
    wrong: tuple[type[Exception], ...] = (NotTheHub, json.JSONDecodeError, UnicodeDecodeError)
    wrong += (RecursionError, FileMetadataError, LookupError, TypeError, AttributeError)
    if isinstance(error, wrong) or type(error).__name__ in _BY_NAME:
        return (
            f"what {constants.ENDPOINT} answers is not the Hub's",
            "a network's login page or a proxy may answer in its place, or HF_ENDPOINT is wrong",
        )
    return _of_connection(constants.ENDPOINT, error)


def _of_answer(name: HubName, error: Exception) -> tuple[str, str]:
    """The Hub has answered, with an error."""
    from huggingface_hub.errors import (
        DisabledRepoError,
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    known = {
        GatedRepoError: ("the repository asks for consent", f"accept it on its page, and {_LOGIN}"),
        RevisionNotFoundError: (
            f"the repository has no revision {name.revision!r}",
            "a commit is named by its 40 digits, in small letters"
            if re.fullmatch(r"[0-9a-fA-F]{6,40}", name.revision or "")
            else "its page lists branches and commits",
        ),
        DisabledRepoError: ("the Hub has disabled this repository", "choose another"),
        RepositoryNotFoundError: (
            "the Hub has no such repository, or it is private",
            f"check the name, or {_LOGIN}",
        ),
        EntryNotFoundError: (
            "the repository no longer has a file that it listed",
            "run the command again",
        ),
    }
    for kind, explained in known.items():  # GatedRepoError is a RepositoryNotFoundError, too.
        if isinstance(error, kind):
            return explained
    status = error.response.status_code  # type: ignore[attr-defined]
    remedies = {
        401: f"{_LOGIN}, again if the token may have expired",
        403: "choose a token that may read this",
        429: f"it was asked too often from here, so wait some minutes, or {_LOGIN}",
    }
    remedy = "try again later" if status >= 500 else remedies.get(status, "check the name")
    return f"the Hub answers with HTTP status {status}", remedy


def _of_connection(host: str, error: Exception) -> tuple[str, str]:
    """The Hub could not be asked, or the answer broke off.

    The library for HTTP was requests, then httpx, and is now httpx2; the base of HfHubHTTPError
    says which, and is the base of its errors.
    """
    from huggingface_hub.errors import HfHubHTTPError

    line = _line(error)
    if isinstance(error, UnicodeEncodeError) or "header value" in line:
        return _BAD_TOKEN  # The line would show it.
    if "CERTIFICATE_VERIFY_FAILED" in line:
        return (
            f"the certificate of {host} is not trusted here",
            "if a proxy of yours signs it, set SSL_CERT_FILE to the proxy's certificate",
        )
    if "Consistency check" in line or "peer closed" in line or "IncompleteRead" in line:
        return f"the download broke off ({line})", "run the command again"
    if not isinstance(error, OSError | HfHubHTTPError.__bases__[0]):
        return f"asking {host} failed ({type(error).__name__}: {line})", "give the path of a file"
    return (
        f"{host} can't be reached ({line})",
        "connect to the network once, for the local cache does not have this, or give a path",
    )


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "").rstrip(".") or type(error).__name__
