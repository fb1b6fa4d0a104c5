"""One prompt: its text, stdin, stops, samples and log-probabilities."""

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import numpy as np
import pytest

from qwen_jax import api, prompts, settings
from tests.cli.conftest import HAIKU, Run

pytestmark = pytest.mark.usefixtures("loaded")


def test_the_default_is_a_haiku(run: Run) -> None:
    result = run()
    assert (result.code, result.out) == (0, HAIKU + "\n")
    for word in ("prompt ", "generation ", "imports ", "load ", "first token ", "compilation "):
        assert word in result.err
    assert "finished    stop\nsampling    greedy\n" in result.err
    assert "\nran on      cpu, float32, JAX " in result.err


def test_the_summary_tells_of_weights_in_blocks(
    run: Run, monkeypatch: pytest.MonkeyPatch, loaded: api.Model
) -> None:
    monkeypatch.setattr(type(loaded.engine.weights), "in_blocks", True)
    assert "\nran on      cpu, float32, weights in blocks, JAX " in run("--max_tokens=1").err


def test_too_long_or_out_of_range(refuses: Callable[..., None]) -> None:
    refuses(["--prompt=" + "word " * 3000], "The prompt has 3029 tokens", "context of 512")
    refuses(["--prompt=x", "--system=y", "--raw"], "A raw prompt is one text")
    refuses(["--prompt=a\udcffb"], "not valid Unicode")
    refuses(["--top_logprobs=2049"], "top_logprobs is 2049", "2048 tokens")
    for token in ("-1", "2048"):
        refuses([f"--config.sampling.logit_bias={token}:1"], f"token {token}")


@pytest.mark.parametrize("most", ["1000000000", "99999999999999999999"])
def test_the_context_ends_what_max_tokens_does_not(run: Run, loaded: api.Model, most: str) -> None:
    bans = ",".join(f"{i}:-inf" for i in loaded.tokenizer.stop_ids)
    flags = [f"--max_tokens={most}", f"--config.sampling.logit_bias={bans}"]
    long = "An old silent pond\n" * 70
    result = run("--raw", f"--prompt={long}", *flags)
    assert result.code == 0
    assert "finished    length" in result.err
    given = len(loaded.tokenizer.encode(long))
    assert 450 < given < 500
    assert f"prompt      {given} tokens" in result.err
    assert f"generation  {512 - given} tokens" in result.err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (b"", "stdin: The prompt is empty"),
        (b"\n", "stdin: The prompt is empty"),
        (b"a\xffb", "stdin is not UTF-8 at byte 1"),
    ],
)
def test_bad_stdin(
    refuses: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    given: bytes,
    words: str,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    refuses(["--prompt=-"], words)


def test_stdin(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    given = f"{prompts.HAIKU}\n".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    assert run("--prompt=-").out == HAIKU + "\n"


@pytest.mark.parametrize("flags", [[], ["--prompt=-"]])
@pytest.mark.usefixtures("loaded")
def test_what_is_piped_in_is_the_prompt(
    run: Run, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    with pipe_of(b"haiku: river\n") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        asked = run(*flags).out
    assert "river" in asked and asked != HAIKU + "\n"


def pipe_of(given: bytes) -> TextIO:
    reading, writing = os.pipe()
    os.write(writing, given)
    os.close(writing)
    return os.fdopen(reading)


def test_nothing_is_piped_in(
    run: Run, refuses: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An empty pipe or file is a prompt that failed to be made; no input at all asks for none."""
    (tmp_path / "empty").touch()
    for opened in (pipe_of(b""), pipe_of(b"\n"), (tmp_path / "empty").open()):
        with opened as stdin, monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", stdin)
            refuses([], "What is piped in is the prompt, but it is empty; pipe in a text, or give")
    with Path(os.devnull).open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert run().out == HAIKU + "\n"


@pytest.mark.parametrize(
    ("given", "prompt"),
    [("a\r\nb\r\n", "a\r\nb"), ("\ufeffa\n\n", "a\n"), ("a\r", "a\r"), ("a\u2028", "a\u2028")],
)
def test_of_stdin_one_line_break_at_the_end_goes(
    monkeypatch: pytest.MonkeyPatch, given: str, prompt: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
    config = settings.get_config()
    config.prompt = "-"
    assert prompts.single(config, prompts.options_of(config)).prompt == prompt


def test_stop_strings(run: Run) -> None:
    result = run("--stop=nowhere", "--stop=like a")
    assert result.out == HAIKU[: HAIKU.index("like a")] + "\n"
    assert "finished    stop" in result.err


def test_several_samples(run: Run) -> None:
    result = run("--n=3", "--temperature=1")
    parts = result.out.split("--- sample ")
    assert [part[:2] for part in parts] == ["", "1\n", "2\n", "3\n"]
    assert len({part[2:] for part in parts}) == 4
    assert "sampling    temperature 1.0, seed 0" in result.err
    assert run("--n=3", "--temperature=1").out == result.out


def test_logprobs(run: Run, loaded: api.Model) -> None:
    result = run("--top_logprobs=2", "--max_tokens=3")
    tokens = loaded.tokens(prompts.HAIKU)
    chosen = loaded.generate(prompts.HAIKU, max_tokens=3, top_logprobs=2)
    assert isinstance(chosen, api.Completion)
    lines = result.err.splitlines()[:3]
    for line, token in zip(lines, chosen.tokens, strict=True):
        row = loaded.logits(tokens)[-1].astype(np.float64)
        logprob = row[token] - np.log(np.exp(row).sum())
        assert line.startswith(f"{loaded.tokenizer.token_name(token):<16} {logprob:8.3f}   ")
        tokens.append(token)
