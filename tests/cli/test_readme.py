"""What README shows is what comes out."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from qwen_jax import opening
from tests.cli.conftest import HAIKU

README = (Path(__file__).parents[2] / "README.md").read_text()


def snippet(first: str) -> tuple[str, str]:
    """The example in Python that begins so, and what it prints."""
    found = re.findall(r"```python\n([^`]*)```\n\n```\n([^`]*)```", README)
    return next((code, shown) for code, shown in found if code.startswith(first))


@pytest.mark.usefixtures("loaded")
def test_the_example_in_python() -> None:
    example, shown = snippet("import qwen_jax")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(example, {})
    assert out.getvalue() == shown


def test_the_first_haiku() -> None:
    assert f"$ python run.py\n{HAIKU}\nprompt " in README


def test_sizes_of_the_bundled_model() -> None:
    config = opening.open_model().config
    assert f"{config.num_parameters:,} parameters" in README
    assert f"{config.num_layers} layers, hidden size {config.hidden_size}, feed-forward" in README
