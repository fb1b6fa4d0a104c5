"""The page at `/`: a chat in one document that asks nobody but this server."""

import base64
import hashlib
from importlib import resources

from starlette.responses import HTMLResponse


def response() -> HTMLResponse:
    """The document. Nothing runs or looks on it but its own script and style, which its policy
    knows by their digests; texts can't become markup, and no other page can frame it."""
    style, script = _file("page.css"), _file("page.js")
    text = _file("page.html").replace("{{ style }}", style).replace("{{ script }}", script)
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {_digest(script)}",
            f"style-src {_digest(style)}",
            "connect-src 'self'",
            "img-src data:",  # the icon, which is empty
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
        )
    )
    headers = {
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(text, headers=headers)


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _digest(content: str) -> str:
    """A source of a policy that allows an element of this content."""
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
