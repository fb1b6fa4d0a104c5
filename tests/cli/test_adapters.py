"""--adapter from the command line, and as part of an experiment's points."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_jax import api, cli, opening, settings
from qwen_jax.experiments import declaration
from qwen_jax.experiments.models import Choice, Models
from qwen_jax.experiments.plan import plan
from tests.experiments.conftest import experiment
from tests.tiny_adapters import write_gguf_lora, write_peft

__all__ = ["experiment"]

SIZES = opening.open_model().config
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def pair(seed: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(rows, 2)).astype(np.float32),
        rng.normal(size=(2, SIZES.hidden_size)).astype(np.float32),
    )


@pytest.fixture
def adapters(tmp_path: Path) -> tuple[str, str]:
    """A PEFT adapter of a projection, and a GGUF one of the head, which is tied."""
    rows = SIZES.num_heads * SIZES.head_dim
    peft = write_peft(tmp_path / "peft", {Q_PROJ: pair(0, rows)})
    lora = write_gguf_lora(tmp_path / "a.gguf", {"lm_head.weight": pair(1, SIZES.vocab_size)})
    return str(peft), str(lora)


def test_inspect_shows_them(run: Callable, adapters: tuple[str, str]) -> None:
    result = run("inspect", *(f"--adapter={adapter}" for adapter in adapters))
    assert result.code == 0, result.err
    assert "\n  adapter " + "\n  adapter ".join(adapters) + "\n" in result.out
    assert "2 Q8_0+LoRA" in result.out and "(untied)" in result.out


def test_generate_passes_them_on(
    run: Callable, loaded: api.Model, monkeypatch: pytest.MonkeyPatch, adapters: tuple[str, str]
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(api, "load", lambda *args, **kwargs: asked.append(kwargs) or loaded)
    assert run("--prompt=x", *(f"--adapter={a}" for a in adapters), "--max_tokens=1").code == 0
    assert asked[0]["adapter"] == adapters


def test_one_that_is_not_there(refuses: Callable) -> None:
    refuses(["--adapter=missing", "--prompt=x"], "missing")


def test_points_know_their_adapters(
    experiment: Callable[..., list[str]], adapters: tuple[str, str], tmp_path: Path
) -> None:
    argv = ["run.py", *experiment(f'axis("adapter", [(), ("{adapters[0]}",), {adapters}])')]

    def declared() -> declaration.Declaration:
        return declaration.declare(cli.parse(argv))

    first = declared()
    assert set(adapters) <= first.inputs.keys()
    planned = plan(first.points)
    assert [Choice.of(item.point.config).adapter for item in planned] == [
        (),
        adapters[:1],
        adapters,
    ]
    assert len({item.group for item in planned}) == 2  # an untied model has other programs
    write_peft(tmp_path / "peft", {Q_PROJ: pair(2, SIZES.num_heads * SIZES.head_dim)})
    second = declared()
    same = [a.id == b.id for a, b in zip(first.points, second.points, strict=True)]
    assert same == [True, False, False]


def test_a_finished_experiment_is_not_gone_on_with_another_adapter(
    run: Callable, experiment: Callable[..., list[str]], adapters: tuple[str, str], tmp_path: Path
) -> None:
    argv = experiment('axis("n", [1])', f'config.adapter = ("{adapters[0]}",)')
    assert run(*argv).code == 0
    write_peft(tmp_path / "peft", {Q_PROJ: pair(2, SIZES.num_heads * SIZES.head_dim)})
    result = run(*argv)
    assert result.code == 2 and "peft" in result.err


def test_an_experiments_model_has_them(
    loaded: api.Model, monkeypatch: pytest.MonkeyPatch, adapters: tuple[str, str], tmp_path: Path
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(api, "load", lambda *args, **kwargs: asked.append(kwargs) or loaded)
    config = settings.get_config()
    config.adapter = adapters
    Models(tmp_path).get(config)
    assert asked[0]["adapter"] == adapters
