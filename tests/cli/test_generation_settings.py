"""What a model recommends and what is used; settings that do nothing; stops, gaps and tools."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_jax import api, recommended
from qwen_jax.recommended import Recommended
from tests.cli.conftest import HAIKU, Run

WARM = Recommended("x/generation_config.json", {"do_sample": True, "temperature": 0.9})


@pytest.fixture
def warm(loaded: api.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled model, as if it came with a recommendation."""
    monkeypatch.setattr(loaded, "recommended", WARM)


@pytest.mark.usefixtures("warm")
def test_a_recommendation_is_told_and_followed_where_asked(run: Run) -> None:
    said = "x/generation_config.json recommends temperature 0.9; used: "
    plain = run()
    assert plain.out == f"{HAIKU}\n"
    assert plain.err.splitlines()[0] == f"{said}greedy (--generation_config=none)"
    followed = run("--generation_config=model", "--seed=5")
    assert followed.err.splitlines()[0] == (
        f"{said}temperature 0.9, seed 5 (--generation_config=model)"
    )
    asked = run("--temperature=0.9", "--seed=5")
    assert followed.out == asked.out != plain.out
    assert "sampling    temperature 0.9, seed 5\n" in followed.err
    cold = run("--generation_config=model", "--temperature=0")
    assert (cold.out, "used: greedy (--gen" in cold.err) == (plain.out, True)


@pytest.mark.usefixtures("loaded")
def test_a_model_that_recommends_nothing(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """It is told only to who would follow it."""
    assert "recommend" not in run("--max_tokens=1").err and not caplog.messages
    recommended._warn_once.cache_clear()
    for _ in range(2):
        run("--max_tokens=1", "--generation_config=model")
    (message,) = caplog.messages
    assert "haiku.gguf recommends no settings, so that generation_config=model changes" in message


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([{}, {"n": 3}], ["all 3 samples of a prompt are equal"]),
        ([{"temperature": 1}, {"n": 2, "seed": 5}], ["seed does nothing, and all 2 samples of a"]),
        ([{"temperature": 1, "n": 2}, {}], []),
    ],
)
def test_prompts_own_samples_that_are_equal_are_told_once(
    run: Run,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    lines: list[dict[str, float]],
    words: list[str],
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"prompt": "a"} | line) + "\n" for line in lines))
    assert run(f"--prompt_file={path}", "--max_tokens=1").code == 0
    assert len(caplog.messages) == len(words)
    assert all(word in text for word, text in zip(words, caplog.messages, strict=True))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--seed=3"], "answers are greedy: seed does nothing; set a temperature."),
        (["--top_p=0.9", "--seed=0"], "greedy: top_p and seed do nothing; set"),
        (["--config.sampling.top_k=5", "--min_p=0.1"], "greedy: top_k and min_p do nothing; set"),
    ],
)
@pytest.mark.usefixtures("loaded")
def test_settings_that_do_nothing_are_told_once(
    run: Run, argv: list[str], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(*argv).out == f"{HAIKU}\n"
    (message,) = caplog.messages
    assert words in message


@pytest.mark.usefixtures("loaded")
def test_stop_ids(run: Run, loaded: api.Model, refuses: Callable[..., None]) -> None:
    (line_break,) = loaded.tokenizer.encode("\n")
    result = run(f"--stop_ids=5,{line_break}")
    assert result.out == HAIKU.partition("\n")[0] + "\n"
    assert "finished    stop" in result.err
    refuses(["--stop_ids=1,2048"], "stop_ids holds 2048, but token ids are 0 to 2047")


@pytest.mark.usefixtures("loaded")
def test_what_the_bundled_model_cannot_do(refuses: Callable[..., None]) -> None:
    refuses(["--prompt=a", "--suffix=b"], "haiku.gguf: the model has no tokens for filling in")
    refuses(["--prompt=a", "--continue_final_message"], "needs a chat, whose last message")
