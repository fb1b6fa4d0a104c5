"""What every test shares: the CPU, no compilation cache on disk, one seed for the live tests."""

import os
import secrets
from pathlib import Path

import hypothesis
import pytest

GPU_TESTS = Path(__file__).parent / "gpu"


def pytest_configure(config: pytest.Config) -> None:
    # Before any test module imports jax, which reads these once.
    paths = [Path(arg.split("::")[0]).resolve() for arg in config.args]
    if not any(path.is_relative_to(GPU_TESTS) for path in paths):
        os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    # Drawn here and not where it is used, since pytest-xdist's workers must all see one seed.
    os.environ.setdefault("QWEN_JAX_LIVE_SEED", str(secrets.randbits(31)))
    config.addinivalue_line(
        "markers", "live: compares with transformers or lm_eval as installed (see `make parity`)"
    )
    # The first example of a jax test compiles; its time says nothing.
    hypothesis.settings.register_profile("jax", deadline=None)
    hypothesis.settings.load_profile("jax")
