"""report.html: one file that needs nothing else, readable a year later, made from page.html."""

import contextlib
import dataclasses
import importlib.util
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from qwen_jax.reporting.table import Table
from qwen_jax.terminal import json_visible, visible

if TYPE_CHECKING:
    from qwen_jax.reporting.drawing import Drawing


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure with what to look for in it."""

    title: str
    caption: str
    figure: "Drawing"


@dataclasses.dataclass(frozen=True)
class Source:
    """A text to be read as it is, such as a config file."""

    text: str


@dataclasses.dataclass(frozen=True)
class Folded:
    """What only some readers want, behind a line to click on."""

    title: str
    blocks: Sequence["Block"]


@dataclasses.dataclass(frozen=True)
class Texts:
    """Answers beside each other, prompt by prompt, which a script of the page shows.

    Attributes:
        data: what `texts.js` reads.
        more: names and files of pages with other prompts.
    """

    caption: str
    data: Mapping[str, Any]
    more: Sequence[tuple[str, str]] = ()


Block = str | Table | Picture | Source | Folded | Texts


@dataclasses.dataclass(frozen=True)
class Section:
    """One chapter of a page.

    Attributes:
        bad: whether it is about something wrong, which the table of contents marks.
    """

    title: str
    blocks: Sequence[Block]
    bad: bool = False


@dataclasses.dataclass(frozen=True)
class Page:
    """Everything that is on it.

    Attributes:
        verdict: one sentence that says it all.
        state: "good", "bad", or "open" where nothing is judged.
        facts: about the run: model, command, versions, commit, date.
    """

    title: str
    verdict: str
    state: str
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section]


def can_be_made() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def prepare() -> None:
    """Imports what pictures need while something else runs: it takes half a second."""

    def load() -> None:
        with contextlib.suppress(Exception):  # told of by whoever draws
            importlib.import_module("qwen_jax.reporting.drawing")

    threading.Thread(target=load, name="pictures", daemon=True).start()


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Make a page and its pictures inside of it."""
    from qwen_jax.reporting.style import styled

    with styled():
        yield


def html(page: Page) -> str:
    """The page as a file's text; of what users wrote, nothing is more than text."""
    template = _file("page.html")
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_plain,
    )
    environment.tests |= {
        name: (lambda x, kind=kind: isinstance(x, kind))
        for name, kind in {
            "table": Table,
            "picture": Picture,
            "source": Source,
            "folded": Folded,
            "texts": Texts,
        }.items()
    }
    environment.tests["bad"] = _bad
    texts = any(isinstance(block, Texts) for s in page.sections for block in s.blocks)
    made = environment.from_string(template).render(
        page=page,
        svg=_Pictures().svg,
        data=_as_json,
        style=Markup("".join(map(_file, ["page.css", "texts.css"][: 1 + texts]))),
        script=Markup("".join(map(_file, ["page.js", "texts.js"][: 1 + texts]))),
    )
    return made.encode("utf-8", "backslashreplace").decode("utf-8")  # Half a pair is no Unicode.


def _as_json(texts: Texts) -> Markup:
    """As a script element holds it: nothing in it ends the element, or is a command."""
    text = json.dumps(texts.data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(json_visible(text).replace("<", "\\u003c"))


def _file(name: str) -> str:
    """One of those that a page is made from."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


class _Pictures:
    """Names pictures, whose ids would be the same in all of them."""

    def __init__(self) -> None:
        self.count = 0

    def svg(self, picture: Picture) -> Markup:
        self.count += 1
        return Markup(picture.figure.svg(f"p{self.count}"))


def _plain(x: Any) -> Any:
    """Text without commands to whoever shows it."""
    return visible(x) if isinstance(x, str) and not isinstance(x, Markup) else x


def _bad(cell: str) -> bool:
    return cell in ("fault", "failed", "FAILED", "missing") or cell.startswith("FAULT")
