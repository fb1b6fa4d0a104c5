"""In experiments no setting of a prompt is dropped, and a model's recommendation is followed."""

from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from qwen_jax import api, settings
from qwen_jax.engine.sampling import Sampling
from qwen_jax.experiments import inputs
from qwen_jax.experiments.declaration import Point
from qwen_jax.experiments.models import Models
from qwen_jax.experiments.plan import Planned
from qwen_jax.experiments.task import task_class
from qwen_jax.experiments.tasks.generate import Generate
from qwen_jax.prompts import Item
from qwen_jax.recommended import Recommended
from qwen_jax.tasks.experiment import _warn_of_idle

WARM = Recommended("x/generation_config.json", {"do_sample": True, "temperature": 0.9, "top_k": 5})


def config_of(**fields: Any) -> ConfigDict:
    config = settings.get_config()
    settings.update(config, {"prompt": "a", **fields}, "the test")
    return config


def test_requests_are_those_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: api.Model
) -> None:
    models = Models(tmp_path)
    monkeypatch.setattr(models, "get", lambda config: model)
    config = settings.get_config()
    chat = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    asked: list[tuple[Any, api.Options]] = [
        ("a", {}),
        ("a", {"raw": True}),
        ("a", {"system": "b"}),
        (chat, {}),
        (chat, {"continue_final_message": True}),
        ("a", {"max_tokens": 3, "stop": ["b"], "stop_ids": [7, 8]}),
        ("a", {"sampling": Sampling(temperature=1, seed=3)}),
    ]
    for prompt, options in asked * 2:  # The second time from what is kept.
        made = models.request(config, Item(prompt, options, "here"))
        assert made == model.request(prompt, **options)
    with pytest.raises(api.UserError, match="no tokens for filling in"):
        models.request(config, Item("a", {"suffix": "b"}, "here"))
    with pytest.raises(api.UserError, match="stop_ids holds 2048"):
        models.request(config, Item("a", {"stop_ids": [2048]}, "here"))


def test_a_recommendation_is_followed_and_told_once(capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        task = Generate(config_of(generation_config="model", **{"sampling.seed": 4}))
        task._follow(WARM, frozenset({"sampling.top_k"}))
        assert task.options["sampling"] == Sampling(temperature=0.9, seed=4)
    assert capfd.readouterr().err == (
        "x/generation_config.json recommends temperature 0.9, top_k 5; used: temperature 0.9, "
        "seed 4 (--generation_config=model)\n"
    )
    task = Generate(config_of())
    task._follow(WARM, frozenset())
    assert task.options["sampling"] == Sampling()
    assert "used: greedy (--generation_config=none)" in capfd.readouterr().err


def planned(overrides: dict[str, Any], config: ConfigDict) -> Planned:
    task = task_class(config.experiment.task)(config)
    return Planned(Point("x", overrides, frozenset(overrides), config), task, 1, None)


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ([{"sampling.seed": 0}, {"sampling.seed": 1}], ["seed does nothing"]),
        ([{"sampling.seed": 0, "n": 3}], ["seed does nothing, and all 3 samples of a prompt"]),
        # Of use in one point at least.
        ([{"sampling.seed": 0}, {"sampling.seed": 1, "sampling.temperature": 1.0}], []),
        ([{"sampling.seed": 0, "generation_config": "model"}], []),
        ([{"sampling.seed": 0, "experiment.task": "bench"}], []),
        ([{"max_tokens": 5}, {"max_tokens": 6}], []),
    ],
)
def test_a_sweep_that_changes_nothing_is_told_once(
    points: list[dict[str, Any]], words: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    _warn_of_idle([planned(p, config_of(**p)) for p in points])
    assert len(caplog.messages) == len(words)
    assert all(word in text for word, text in zip(words, caplog.messages, strict=True))


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (['{"prompt": "a", "n": 3}', '{"prompt": "b"}'], "all 3 samples of a prompt are equal"),
        (['{"prompt": "a", "seed": 3}'], "seed does nothing"),
        (['{"prompt": "a", "n": 3}', '{"prompt": "b", "temperature": 1}'], ""),
        (['{"prompt": "a \\"temperature\\"", "seed": 3}'], "seed does nothing"),
    ],
)
def test_what_lines_ask_for_and_is_of_no_use_is_told(
    lines: list[str], words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines))
    fields = {"prompt_file": str(path), "prompt": None}
    _warn_of_idle([planned({}, config_of(**fields, n=1))] * 2)
    assert words in "".join(caplog.messages) and len(caplog.messages) == bool(words)


def test_a_file_of_tools_is_an_input(tmp_path: Path) -> None:
    path = tmp_path / "tools.json"
    prints = []
    for name in ("f", "g"):
        path.write_text(f'[{{"name": "{name}"}}]')
        prints.append(inputs.of_points([config_of(tools=str(path))])[str(path)])
    assert prints[0] != prints[1]
