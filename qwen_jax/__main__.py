"""python -m qwen_jax: the same as run.py."""

from qwen_jax.cli import entry

if __name__ == "__main__":
    entry()
