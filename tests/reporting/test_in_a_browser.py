"""A page as Chromium shows it, where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from qwen_jax.reporting import page
from qwen_jax.reporting.page import Page, Section
from qwen_jax.reporting.table import Table

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(BROWSER is None, reason="there is no chromium"),
]


def shown(path: Path, script: str) -> str:
    """What is left of a page after a script of the test's, which the page's own policy must allow:
    it is added to the page's own."""
    text = path.read_text("utf-8")
    acted = path.with_name("acted.html")
    acted.write_text(text.replace("</body>", f"<script>{script}</script></body>"), "utf-8")
    assert BROWSER is not None
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"file://{acted}"],
        capture_output=True,
        timeout=120,
        check=True,
    )
    return done.stdout.decode()


def column(dom: str, index: int) -> list[str]:
    """The cells of a table's column that are not hidden."""
    head = dom.index("<thead")
    body = dom[dom.index("<tbody", head) : dom.index("</tbody>", head)]
    rows = re.findall(r"<tr(?! hidden)[^>]*>(.*?)</tr>", body)
    return [re.findall(r"<td[^>]*>(.*?)</td>", row)[index] for row in rows]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    values = ["1,000", "9 ± 1", "-", "", "2.5e-3", "-4", *map(str, range(20, 28))]
    rows = [(f"row {i}", value) for i, value in enumerate(values)]
    made = page.html(Page("t", "v", "good", [], [Section("s", [Table(("a", "b"), rows, (1,))])]))
    (tmp_path / "page.html").write_text(made, "utf-8")
    return tmp_path / "page.html"


def test_a_click_on_a_header_sorts(table: Path) -> None:
    once = "document.querySelectorAll('th button')[1].click();"
    found = column(shown(table, once), 1)
    expected = ["-4", "2.5e-3", "9 ± 1", *map(str, range(20, 28)), "1,000", "-", ""]
    assert found == expected
    # Downwards words come first, and what is empty is last either way.
    assert column(shown(table, once * 2), 1) == [*expected[-2::-1], ""]


def test_words_filter(table: Path) -> None:
    typed = (
        "const input = document.querySelector('input'); input.value = '13 ROW';"
        "input.dispatchEvent(new Event('input'));"
    )
    assert column(shown(table, typed), 0) == ["row 13"]
