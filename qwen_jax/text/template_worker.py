"""The process in which chat templates run, started by `template_renderer`.

A template is a program from the internet: it can loop for years or ask for all memory in one
expression, and no sandbox inside a process stops that. This one gives itself limits, reads one
JSON request per line and answers with one JSON reply per line: {"text": …}, {"error": …} of the
template or {"limit": …}. Where it fails by itself it ends with a traceback.

It runs as a file, not as a module of the package, so that it imports jinja2 and nothing else.
"""

import datetime
import functools
import importlib
import json
import signal
import sys
import time
from typing import Any, NoReturn

import jinja2.ext
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

try:
    import resource
except ImportError:  # Windows: time and output are bounded there, memory is not
    resource = None  # type: ignore[assignment]

MAX_ERROR_CHARS = 300
OUT_OF_MEMORY = "needed too much memory"
# What jinja2 imports only when a template needs it, which is too late here.
LATE_IMPORTS = (
    "encodings.unicode_escape",
    "html",
    "jinja2.constants",
    "jinja2.debug",
    "textwrap",
)


class RefusedByTemplate(jinja2.TemplateError):
    """The template called raise_exception."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here it only shows its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise RefusedByTemplate(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As in transformers: unlike jinja2's own filter it leaves <, > and & alone."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    return _environment().from_string(template)


def render(template: str, context: dict[str, Any], max_bytes: int) -> dict[str, str]:
    """The reply to one request; stops as soon as the text passes `max_bytes`."""
    pieces, size = [], 0
    try:
        for piece in _compile(template).generate(context):
            size += len(piece.encode("utf-8", "surrogatepass"))
            if size > max_bytes:
                return {"limit": f"wrote more than {max_bytes} bytes"}
            pieces.append(piece)
    except MemoryError:
        return {"limit": OUT_OF_MEMORY}
    except RefusedByTemplate as error:
        return {"error": f"refuses the conversation: {_short(error)}"}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"has a syntax error in line {error.lineno}: {_short(error.message)}"}
    except Exception as error:  # Whatever it is, the template has led to it.
        return {"error": f"failed with {type(error).__name__}: {_short(error)}"}
    return {"text": "".join(pieces)}


def _short(error: object) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return text if len(text) <= MAX_ERROR_CHARS else f"{text[:MAX_ERROR_CHARS]} …"


def _limit(memory_bytes: int) -> None:
    """Bounds memory, and forbids opening files and sockets to whatever escapes the sandbox."""
    if resource is None:
        return
    for name in LATE_IMPORTS:
        importlib.import_module(name)
    time.localtime()  # reads the time zone
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: 0}
    if sys.platform != "darwin":  # which refuses to set it, and would not enforce it
        limits[resource.RLIMIT_AS] = memory_bytes
    for kind, value in limits.items():
        value = _allowed(kind, value)
        resource.setrlimit(kind, (value, value))  # for good: a hard limit is never raised again


def _limit_cpu(seconds: float) -> None:
    """Ends a render that outlives the parent, which would otherwise have killed it in time."""
    if resource is None:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = int(used.ru_utime + used.ru_stime + seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (_allowed(resource.RLIMIT_CPU, soft), hard))


def _allowed(kind: int, value: int) -> int:
    _, hard = resource.getrlimit(kind)
    return value if hard == resource.RLIM_INFINITY else min(value, hard)


def main(seconds: float, max_bytes: int, memory_bytes: int) -> None:
    # Ctrl-C reaches the whole process group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _environment()
    _limit(memory_bytes)
    _write('{"ready": true}')
    for line in sys.stdin.buffer:
        _limit_cpu(seconds)
        try:
            request = json.loads(line)
            reply = json.dumps(render(request["template"], request["context"], max_bytes))
        except MemoryError:
            reply = json.dumps({"limit": OUT_OF_MEMORY})
        _write(reply)


def _write(reply: str) -> None:
    sys.stdout.buffer.write(reply.encode("ascii") + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
