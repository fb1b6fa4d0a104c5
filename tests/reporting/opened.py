"""A page as a browser would know it: what it shows, and whether it asks for anything."""

import collections
import html.parser
import re


class Opened(html.parser.HTMLParser):
    """Reads a page.

    Attributes:
        text: all of it that is no markup.
        banner: the verdict,
        state: and its colour.
        tags: how many of each there are; of scripts none but the page's own.
        headers: of each table.
        links: of the table of contents.
        pictures: their titles,
        values: and what each says of its marks.
        full: what cells of tables say in full.
        repeated: ids that stand there twice.
        unresolved: links within the page that lead nowhere.
        addresses: of anything outside of the page.
    """

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.banner, self.state = "", "", ""
        self.tags: collections.Counter[str] = collections.Counter()
        self.headers: list[list[str]] = []
        self.links: list[str] = []
        self.pictures: list[str] = []
        self.values: list[list[str]] = []
        self.full: dict[str, str] = {}
        # Users' texts and changes of sources may have addresses in them.
        styles = "".join(re.findall(r"<style.*?</style>|style=\"[^\"]*\"", page, re.DOTALL))
        self.addresses = re.findall(r"(?<=url\()[^#)]+|@import[^;]*", styles)
        self._ids: collections.Counter[str] = collections.Counter()
        self._stack: list[str] = []
        self._in_banner, self._full = False, ""
        self.feed(page)
        self.repeated = [name for name, count in self._ids.items() if count > 1]
        self.unresolved = [link for link in self.links if link[1:] not in self._ids]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        held = {name: value or "" for name, value in attrs}
        self.tags[tag] += 1
        if tag not in ("meta", "br"):
            self._stack.append(tag)
        self._ids.update([held["id"]] if "id" in held else [])
        href = held.get("href", held.get("xlink:href", held.get("src", "")))
        if href and not href.startswith("data:image/"):  # which is there already
            (self.links if href.startswith("#") else self.addresses).append(href)
        if held.get("class", "").startswith("verdict"):
            self._in_banner, self.state = True, held["class"].removeprefix("verdict ")
        if held.get("role") == "img":
            self.pictures.append(held["aria-label"])
            self.values.append([])
        self._full = held.get("title", "") if tag == "td" else ""
        if tag == "thead":
            self.headers.append([])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self._stack.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._stack.pop() == tag, f"</{tag}> closes what is not open"
        self._in_banner &= tag != "p"

    def handle_data(self, data: str) -> None:
        inside = self._stack[-1] if self._stack else ""
        if inside == "script":
            return
        self.text += data
        if self._in_banner:
            self.banner += data
        elif inside == "td" and self._full:
            self.full[self._full] = data
        elif inside == "th" and "thead" in self._stack:
            self.headers[-1].append(data)
        elif inside == "title" and "svg" in self._stack:
            self.values[-1].append(data)
