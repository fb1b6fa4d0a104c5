"""Tables as text."""

from qwen_jax.reporting.table import WIDTH, Table


def test_numbers_end_at_one_edge_and_long_cells_wrap() -> None:
    table = Table(("name", "n", "what"), [("a", "1", "word " * 60), ("bb", "100", "")], (1,), "C.")
    lines = table.text().splitlines()
    assert lines[:4] == ["C.", "", "name    n  what", "a       1  " + "word " * 17 + "word"]
    assert lines[-1] == "bb    100" and max(map(len, lines)) <= WIDTH


def test_without_a_header_and_without_rows() -> None:
    assert Table((), [("a", "b")]).text() == "a  b"
    assert Table(("a",), [], caption="None.").text() == "None."
