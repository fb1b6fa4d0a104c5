"""From a source tree that nobody has installed everything runs."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What importlib.metadata finds of qwen_jax is hidden, as it is where only the sources are.
PROGRAM = """
import importlib.metadata, sys
real = importlib.metadata.distribution
def distribution(name):
    if name == "qwen_jax":
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.distribution = distribution
from qwen_jax.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_compare_from_sources_alone(tmp_path: Path) -> None:
    argv = ["compare", "--parts=tensors", "--tokens=1,2,3,4,5", f"--workdir={tmp_path / 'report'}"]
    command = [sys.executable, "-c", PROGRAM, *argv]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "same likeliest token 100.0%" in done.stdout
