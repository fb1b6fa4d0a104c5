"""Writes the bundled model's sample text: chats of its own kind that its training never saw.

python -m tools.demo_sample --out=qwen_jax/data/haiku.txt
"""

from pathlib import Path

from absl import app, flags

from tools.demo_corpus import chats, word_source
from tools.demo_tokenizer import END_OF_TEXT

SEED = 1
"""Training draws from seed 0."""

CHATS = 80


def sample() -> str:
    """About 9,000 tokens, the same at every call; a chat ends as in training."""
    parts = [chat.render() + END_OF_TEXT for chat in chats(SEED, 0, CHATS, word_source())]
    return "".join(parts)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"The argument {argv[1]!r} belongs to no flag.")
    Path(flags.FLAGS.out).write_text(sample(), encoding="utf-8")


if __name__ == "__main__":
    # Here, since a test imports this module beside others that have a flag of the same name.
    flags.DEFINE_string("out", "qwen_jax/data/haiku.txt", "The text file to write.")
    app.run(main)
