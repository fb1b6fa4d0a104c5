"""Text from a model file: `run.py` is a thin face over `qwen_jax.cli`."""

from qwen_jax.cli import entry

if __name__ == "__main__":
    entry()
