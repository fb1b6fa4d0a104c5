"""What a line of prompts may have been meant to say is told with the way out."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    ("field", "meant"),
    [
        ("TEMPERATURE", "temperature"),
        ("Max_Tokens", "max_tokens"),
        ("maxTokens", "max_tokens"),
        ("topP", "top_p"),
        ("N", "n"),
        ("Stop", "stop"),
        ("ID", "id"),
        ("MAX_NEW_TOKENS", "max_tokens"),
    ],
)
def test_other_ways_to_write_a_field(
    refuses: Callable[..., None], tmp_path: Path, field: str, meant: str
) -> None:
    """Carried into the answer, as unknown ones are, it would do nothing."""
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a", field: 1}))
    refuses([f"--prompt_file={path}"], f"line 1 has the field {field!r}; did you mean {meant!r}?")
