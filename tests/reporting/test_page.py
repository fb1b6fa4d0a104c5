"""Pages: one file that asks for nothing, whose links lead somewhere and whose text is text."""

import pytest

from qwen_jax.reporting import page
from qwen_jax.reporting.page import Folded, Page, Picture, Section, Source
from qwen_jax.reporting.table import Table
from tests.reporting.opened import Opened

pytest.importorskip("matplotlib")
from qwen_jax.reporting.drawing import Drawing

HOSTILE = ("</script><script>alert(1)</script>", "\x1b[2J\x00", "‮txt.exe", "x" * 800, "\ud800")


def picture(mark: str = "a mark") -> Picture:
    drawn = Drawing(2.0)
    axes = drawn.subplots()
    axes.plot([1, 2], [3, 4])
    drawn.point(axes, 1, 3, mark)
    return Picture("A picture", "What it shows.", drawn)


def opened(*blocks: page.Block, state: str = "good") -> Opened:
    with page.drawing():
        sections = [Section("First", blocks, bad=True), Section("Second", ["Words."])]
        return Opened(page.html(Page("Title", "All is well.", state, [("a", "b")], sections)))


def test_the_contents_lead_to_every_section() -> None:
    made = opened(picture(), picture())
    assert len([link for link in made.links if link.startswith("#section-")]) == 2
    assert made.unresolved == [] and made.repeated == [] and made.addresses == []


@pytest.mark.parametrize("state", ["good", "bad", "open"])
def test_the_verdict_stands_on_top(state: str) -> None:
    made = opened(state=state)
    assert (made.banner, made.state) == ("All is well.", state)
    assert made.text.index("All is well.") < made.text.index("Words.")


@pytest.mark.parametrize("text", HOSTILE)
def test_what_users_write_is_text(text: str) -> None:
    """In a table, a source, a picture's values, titles and facts alike."""
    table = Table((text,), [(text,)], caption=text)
    shown = Picture(text, text, picture(text).figure)
    sections = [Section(text, [text, table, Source(text), shown, Folded(text, [text])])]
    with page.drawing():
        made = page.html(Page(text, text, "good", [(text, text)], sections))
    made.encode("utf-8")
    assert made.count("<script") == made.count("<script data-own>") == 1 and not set(
        "\x1b\x00‮"
    ) & set(made)
    found = Opened(made)
    assert found.pictures and found.values[0] and found.addresses == []


def test_a_table_without_rows_is_its_caption() -> None:
    made = opened(Table(("a", "b"), [], caption="Nothing differs."))
    assert "Nothing differs." in made.text and made.tags["table"] == 1  # that of the facts


def test_values_lie_on_their_marks() -> None:
    """Titles are put on the page by our own arithmetic, marks by matplotlib's."""
    drawn = Drawing(3.0, 4.0)
    axes = drawn.subplots()
    (line,) = axes.plot([10.0, 20.0, 40.0], [1.0, 100.0, 10.0])
    axes.set_yscale("log")
    line.set_gid("line")
    for x, y in ((10.0, 1.0), (20.0, 100.0), (40.0, 10.0)):
        drawn.point(axes, x, y, f"{x}")
    drawing = drawn.svg("p")
    path = drawing[drawing.index('id="p-line"') :].split(' d="')[1].split('"')[0]
    points = [tuple(map(float, step.split())) for step in path.replace("M", "L").split("L")[1:]]
    boxes = [part.split('"') for part in drawing.split("<rect ")[-3:]]
    centres = [(float(b[1]) + float(b[5]) / 2, float(b[3]) + float(b[7]) / 2) for b in boxes]
    for point, centre in zip(points, centres, strict=True):
        assert point == pytest.approx(centre, abs=0.2)  # one digit after the point
