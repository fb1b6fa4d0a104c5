"""Speculation as users ask for it: a checkpoint that drafts for another, and what is told of it."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from qwen_jax import api, cli
from qwen_jax.engine import decoding
from qwen_jax.errors import UserError
from qwen_jax.opening import open_model
from tests.drafting import AtRandom
from tests.tiny_checkpoints import random_parameters, tiny_config, write_gguf


def write(path: Path, rows: int, **changed: Any) -> Path:
    """A model of the bundled one's vocabulary, but for what is changed."""
    tokens = {k: v for k, v in open_model().metadata.items() if "tokenizer" in k}
    tokens["tokenizer.ggml.token_type"] = tokens["tokenizer.ggml.token_type"].tolist()
    config = tiny_config(num_layers=1, head_dim=32, num_heads=2, num_kv_heads=1, vocab_size=rows)
    params = random_parameters(config, rows)
    return write_gguf(path, config, params, metadata=tokens | changed).path


def test_a_checkpoint_drafts_for_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its embedding has other rows past the vocabulary."""
    monkeypatch.setattr(decoding, "Drafts", AtRandom)
    model, draft = write(tmp_path / "a.gguf", 2048), write(tmp_path / "b.gguf", 2080)
    flags = [f"--model={model}", "--prompt=a b a b a b", "--raw", "--max_tokens=24"]
    flags += ["--slots=4", "--batch_invariant", "--generation_config=none"]
    assert cli.main(flags) == 0
    plain = capsys.readouterr()
    assert "drafts" not in plain.err
    assert cli.main([*flags, "--speculate=draft", f"--draft_model={draft}"]) == 0
    drafted = capsys.readouterr()
    assert drafted.out == plain.out
    found = re.search(r"^drafts {6}(\d+) tokens, (\d+) accepted$", drafted.err, re.M)
    assert found is not None and int(found[1]) > int(found[2])


def test_a_draft_model_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    model = write(tmp_path / "a.gguf", 2048)
    tokens = list(open_model().metadata["tokenizer.ggml.tokens"])
    tokens[2000], tokens[2001] = tokens[2001], tokens[2000]
    other = write(tmp_path / "b.gguf", 2048, **{"tokenizer.ggml.tokens": tokens})
    with pytest.raises(UserError, match=r"b\.gguf has .* for token 2000, which is .* in .*a\.gguf"):
        api.load(model, speculate="draft", draft_model=other)


def test_a_slot_alone_has_no_room_for_drafts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="speculate needs room for drafts, the rows of other texts"):
        api.load(write(tmp_path / "a.gguf", 2048), speculate="lookup", slots=1)


@pytest.mark.long
def test_the_example_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    """As many drafts as it shows, where it pays and where it doesn't."""
    page = (Path(__file__).parents[1] / "docs" / "speculation.md").read_text()
    shown = re.search(r"^\$ python run\.py (.*)$", page, re.M)
    (drafts,) = re.findall(r"^drafts  .*$", page, re.M)
    unpaid = re.search(
        r"With `(.*?)` .*?: (\d+) tokens are\s+drafted .*?, (\d+) are acc", page, re.S
    )
    assert shown is not None and unpaid is not None
    flags = shlex.split(shown[1])
    assert cli.main(flags) == 0
    paid = capsys.readouterr()
    assert drafts in paid.err.splitlines()
    flags[0] = f"--prompt={unpaid[1]}"
    assert cli.main(flags) == 0
    assert f"drafts      {unpaid[2]} tokens, {unpaid[3]} accepted" in capsys.readouterr().err
