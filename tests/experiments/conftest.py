"""Experiments over the fake task, run by run.py in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import loaded, model, nothing_loads, refuses, run
from tests.fake_hub import hub_server

__all__ = ["experiment", "hub_server", "loaded", "model", "nothing_loads", "refuses", "run"]

CONFIG = '''"""What this is about."""
from ml_collections import ConfigDict
from qwen_jax.experiments import axis, chain, product, zipped
from qwen_jax.settings import get_config as defaults
def get_config(variant=""):
    config = defaults()
    config.experiment.task = "tests.experiments.fake:Count"
    {config}
    return config
def get_sweep():
    return {sweep}
'''
SWEEP = 'product(axis("sampling.seed", range(4)), axis("dtype", ["float32", "bfloat16"]))'


@pytest.fixture
def experiment(tmp_path: Path) -> Callable[..., list[str]]:
    """Writes a config file; returns the arguments that run it in `tmp_path / "w"`."""

    def experiment(sweep: str = SWEEP, config: str = "", workdir: str = "w") -> list[str]:
        path = tmp_path / "config.py"
        path.write_text(CONFIG.format(config=config or "pass", sweep=sweep))
        return ["experiment", f"--config={path}", f"--workdir={tmp_path / workdir}"]

    return experiment


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
