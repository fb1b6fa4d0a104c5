"""Text from a model file: `run.py` is a thin face over `qwen_jax.cli`."""

import os
import sys
from pathlib import Path

try:
    from qwen_jax.cli import entry
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    # Where nobody has activated the environment that `make run` makes, `python` is another.
    python = Path(__file__).resolve().parent / ".venv" / "bin" / "python"
    if python.exists() and sys.executable != str(python):
        os.execv(python, [str(python), *sys.argv])
    why = f"{sys.executable} has no {error.name}; `make run` sets up an environment with it"
    print(f"error: {why}, and `pip install .` this one.", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    entry()
