"""What every test shares: the CPU, no compilation cache on disk, one seed for the live tests."""

import gc
import importlib.metadata
import os
import secrets
import signal
from pathlib import Path

import hypothesis
import pytest

# Tracing makes millions of objects that live on, which Python would look through again and again:
# a twelfth of the tests' time.
gc.set_threshold(200_000, 20, 100)

GPU_TESTS = Path(__file__).parent / "gpu"

# Before anything imports NumPy: threads of several workers wait for each other, and the products
# here are small.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Before a conftest further down imports jax, which reads these once.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
# Where in Python an operation stands is written down for each of them, and read by nobody here.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")


def fast_flags() -> list[str]:
    """Most of the tests' time is XLA's, which compiles programs of hundreds of tiny models: without
    LLVM's optimisation, and by 0.10's older emitter, it takes half as long; an eighth less again
    where a program's code isn't cut in parts for threads."""
    flags = ["--xla_backend_optimization_level=0"]
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # an unknown flag ends the process
        flags += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
    return flags


def pytest_configure(config: pytest.Config) -> None:
    # Before any test module imports jax, which reads these once.
    paths = [Path(arg.split("::")[0]).resolve() for arg in config.args]
    if not any(path.is_relative_to(GPU_TESTS) for path in paths):
        os.environ["JAX_PLATFORMS"] = "cpu"
        if config.option.markexpr != "live":  # which compiles as users do
            # Of two equal flags the last one counts: the environment's.
            os.environ["XLA_FLAGS"] = " ".join((*fast_flags(), os.environ.get("XLA_FLAGS", "")))
    # In the background of a script Ctrl-C is ignored, also by what is started from there.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Drawn here and not where it is used, since pytest-xdist's workers must all see one seed.
    os.environ.setdefault("QWEN_JAX_LIVE_SEED", str(secrets.randbits(31)))
    config.addinivalue_line(
        "markers", "emulated: runs the decode step's kernels on NumPy (see `make emulate`)"
    )
    config.addinivalue_line(
        "markers", "hosts: several processes or devices, for some time (see `make long`)"
    )
    config.addinivalue_line("markers", "long: takes long for what it shows (see `make long`)")
    config.addinivalue_line("markers", "lower: lowers a kernel for CUDA (see `make lower`)")
    config.addinivalue_line(
        "markers", "live: compares with transformers or lm_eval as installed (see `make parity`)"
    )
    # The first example of a jax test compiles; its time says nothing.
    hypothesis.settings.register_profile("jax", deadline=None)
    hypothesis.settings.load_profile("jax")
