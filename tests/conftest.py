"""What every test shares: the CPU, compiled programs, one seed for the live tests."""

import importlib.metadata
import importlib.util
import os
import secrets
import sys
from pathlib import Path

import hypothesis
import pytest

GPU_TESTS = Path(__file__).parent / "gpu"

# Before anything imports NumPy: threads of several workers wait for each other, and the products
# here are small.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def fast_flags() -> list[str]:
    """Most of the tests' time is XLA's, which compiles programs of hundreds of tiny models: without
    LLVM's optimisation, and by 0.10's older emitter, it takes half as long."""
    older = importlib.metadata.version("jaxlib").startswith("0.10.")
    return ["--xla_backend_optimization_level=0"] + older * ["--xla_cpu_use_fusion_emitters=false"]


def pytest_configure(config: pytest.Config) -> None:
    # Before any test module imports jax, which reads these once.
    paths = [Path(arg.split("::")[0]).resolve() for arg in config.args]
    if not any(path.is_relative_to(GPU_TESTS) for path in paths):
        os.environ["JAX_PLATFORMS"] = "cpu"
        if config.option.markexpr != "live":  # which compiles as users do
            # Of two equal flags the last one counts: the environment's.
            os.environ["XLA_FLAGS"] = " ".join((*fast_flags(), os.environ.get("XLA_FLAGS", "")))
    # Ours, which goes by sources on disk and not by what a test has put in their place.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    # Drawn here and not where it is used, since pytest-xdist's workers must all see one seed.
    os.environ.setdefault("QWEN_JAX_LIVE_SEED", str(secrets.randbits(31)))
    config.addinivalue_line(
        "markers", "live: compares with transformers or lm_eval as installed (see `make parity`)"
    )
    # The first example of a jax test compiles; its time says nothing.
    hypothesis.settings.register_profile("jax", deadline=None)
    hypothesis.settings.load_profile("jax")


def pytest_collection_finish(session: pytest.Session) -> None:
    # After the imports, so that a run of tests without JAX needn't wait for it. `make compile` is
    # to compile, and on a GPU programs hold more than what JAX's key names.
    cache = getattr(session.config, "cache", None)
    if (
        "jax" in sys.modules
        and cache is not None
        and os.environ.get("JAX_PLATFORMS") == "cpu"
        and importlib.util.find_spec("jax_cuda13_plugin") is None
    ):
        from tests import programs

        programs.share(cache.mkdir("programs"))
