"""Text from a model file: `run.py` is a thin face over `qwen_jax.cli`."""

import sys

from qwen_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
