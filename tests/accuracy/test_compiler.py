"""The compiler under the laboratory: probed, kept from what it gets wrong, told of in reports."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from qwen_jax import xla_flags
from qwen_jax.accuracy import compiler
from qwen_jax.accuracy.compiler import Probe, Reduction, judged, probe
from tests.cli.conftest import Run, run

__all__ = ["run"]

FLAG = f"{xla_flags.REDUCTIONS}=-reduce"
WRONG = Probe("JAX 9.9 on a cpu", 6, ("a sum over 2 x 3 is 5 at [1], but exactly 6",))


def test_this_process_has_the_flag_and_exact_reductions() -> None:
    affected = importlib.metadata.version("jaxlib") in xla_flags.WRONG_REDUCTIONS
    assert (FLAG in os.environ.get("XLA_FLAGS", "")) == affected
    found = probe()
    assert found.wrong == () and found.reductions == len(list(compiler.reductions())) == 6
    assert str(found) == f"JAX {jax.__version__} on a cpu: 6 reductions of known results are exact"


@pytest.mark.parametrize(
    ("version", "given", "expected"),
    [
        ("0.10.2", None, FLAG),
        ("0.10.2", "--xla_dump_to=x", f"--xla_dump_to=x {FLAG}"),
        ("0.10.2", f"{xla_flags.REDUCTIONS}=dot", f"{xla_flags.REDUCTIONS}=dot"),
        ("0.11.0", None, None),
        ("0.11.0", "--xla_dump_to=x", "--xla_dump_to=x"),
    ],
)
def test_the_flag_is_set_where_it_applies(
    monkeypatch: pytest.MonkeyPatch, version: str, given: str | None, expected: str | None
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda package: version)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    if given is not None:
        monkeypatch.setenv("XLA_FLAGS", given)
    xla_flags.set_before_jax()
    assert os.environ.get("XLA_FLAGS") == expected


def test_flags_of_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What doesn't begin with - is the name of a file with flags; XLA says if there is none."""
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "0.10.2")
    (tmp_path / "flags").write_text("--xla_dump_to=x\n")
    monkeypatch.setenv("XLA_FLAGS", str(tmp_path / "flags"))
    xla_flags.set_before_jax()
    assert os.environ["XLA_FLAGS"].split() == ["--xla_dump_to=x", FLAG]
    monkeypatch.setenv("XLA_FLAGS", "nowhere")
    xla_flags.set_before_jax()
    assert os.environ["XLA_FLAGS"] == "nowhere"


def test_without_the_flag_it_is_wrong() -> None:
    """In a process of its own, for flags are read once. Which sizes are wrong depends on cores."""
    if importlib.metadata.version("jaxlib") not in xla_flags.WRONG_REDUCTIONS:
        pytest.skip("this JAX gets reductions right")
    code = "from qwen_jax.accuracy.compiler import probe; print(probe())"
    flags = {"XLA_FLAGS": f"{xla_flags.REDUCTIONS}=reduce", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | flags, capture_output=True, text=True, check=True,
    )  # fmt: skip
    if "are exact" in done.stdout:
        pytest.skip("on this machine no size of the probe is wrong")
    assert ": WRONG, a sum of squares over " in done.stdout


def test_a_wrong_reduction_is_told_with_its_values() -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    right = Reduction("a sum over 2 x 3", lambda x: x.sum(-1), x, x.sum(-1))
    assert judged(right) == ""
    wrong = Reduction("a sum over 2 x 3", lambda x: x[:, :-1].sum(-1), x, x.sum(-1))
    assert judged(wrong) == "a sum over 2 x 3 is 1 at [0], but exactly 3 (2 of 2 are wrong)"


@pytest.mark.parametrize(("found", "code"), [(WRONG, 1), (None, 0)])
def test_the_report_says_what_was_found(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    found: Probe | None,
    code: int,
) -> None:
    found = found or probe()
    monkeypatch.setattr("qwen_jax.tasks.compare.probe", lambda: found)
    result = run(
        "compare", "--parts=text", "--fail_if=compiler_faults > 0", f"--workdir={tmp_path}"
    )
    assert result.code == code
    assert " ".join(f"compiler {found}".split()) in " ".join(result.out.split())
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["compiler"]["wrong"] == list(found.wrong)
    assert report["metrics"]["compiler_faults"] == len(found.wrong)
    told = [text for text in caplog.messages if "The compiler can't be trusted here" in text]
    assert len(told) == len(found.wrong)
