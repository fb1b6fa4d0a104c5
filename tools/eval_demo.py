r"""How often the bundled model writes the haiku it is asked for, over 200 held-out words.

    python -m tools.eval_demo --record=benchmarks/results/demo_eval.md

Greedy decoding. A table goes to stdout and ends with one line of JSON.
"""

import dataclasses
import datetime
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import app, flags

from qwen_jax import api, opening
from tools.demo_corpus import DEFAULT_PROMPT
from tools.demo_words import heldout_words

_MODEL = flags.DEFINE_string("model", opening.BUNDLED, "The model to evaluate.")
_DTYPE = flags.DEFINE_string("dtype", "auto", "Of its parameters.")
_RECORD = flags.DEFINE_string("record", None, "A Markdown file to write the result to.")

PROMPTS = (
    DEFAULT_PROMPT,
    "Write a haiku about {w}.",
    'Please compose a short poem with the word "{w}" in it!',
    "haiku: {w}",
)
"""The first is the one the target is about; the others show that its wording doesn't matter."""
MAX_TOKENS = 96


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What is right about one answer."""

    has_word: bool
    three_lines: bool
    stopped: bool

    @property
    def good(self) -> bool:
        return self.has_word and self.three_lines and self.stopped


@dataclasses.dataclass(frozen=True)
class Answer:
    word: str
    text: str
    verdict: Verdict


def score(word: str, text: str, stopped: bool = True) -> Verdict:
    """Whether `text` is a haiku with the word.

    Args:
        word: has to stand in the text as a whole word, in any letter case.
        text: an answer, without special tokens; exactly three of its lines must not be blank.
        stopped: whether the model ended it by itself.
    """
    found = re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE)
    lines = [line for line in text.splitlines() if line.strip()]
    return Verdict(found is not None, len(lines) == 3, stopped)


def evaluate(model: api.Model, words: Sequence[str], prompt: str = DEFAULT_PROMPT) -> list[Answer]:
    """Greedy answers to the prompt for each word, as one batch."""
    prompts = [prompt.replace("{w}", word) for word in words]
    completions = model.generate(prompts, max_tokens=MAX_TOKENS)
    assert isinstance(completions, list)
    return [
        Answer(word, done.text, score(word, done.text, done.finish_reason == "stop"))
        for word, done in zip(words, completions, strict=True)
    ]


def report(path: Path | str, dtype: str = "auto") -> str:
    """Evaluates a model with every prompt; the text ends with one line of JSON."""
    model = api.load(path, dtype=dtype)
    words = heldout_words()
    lines = [
        "| prompt | good | has the word | three lines | stopped | different haiku |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    failures: list[str] = []
    samples: list[str] = []
    rates = {}
    for prompt in PROMPTS:
        answers = evaluate(model, words, prompt)
        verdicts = [answer.verdict for answer in answers]
        rates[prompt] = sum(v.good for v in verdicts) / len(verdicts)
        # Without the word, or else all would differ.
        plain = {a.text.lower().replace(a.word, "_") for a in answers}
        lines.append(
            f"| {prompt} | {rates[prompt]:.1%} | {sum(v.has_word for v in verdicts)} | "
            f"{sum(v.three_lines for v in verdicts)} | {sum(v.stopped for v in verdicts)} | "
            f"{len(plain)} |"
        )
        failures += [
            f"- {prompt.replace('{w}', a.word)} → {' / '.join(a.text.splitlines())}"
            for a in answers
            if not a.verdict.good
        ]
        samples += [f"> {'<br>'.join(a.text.splitlines())}\n" for a in answers[::50]]
    summary = {"words": len(words), "success": rates[DEFAULT_PROMPT], "by_prompt": rates}
    return "\n".join(
        [
            *lines,
            f"\nOf {len(words)} words each. Failures:\n",
            *(failures or ["- none"]),
            "\nSome of the answers:\n",
            *samples,
            json.dumps(summary),
            "",
        ]
    )


def heading(command: str) -> str:
    """Date, device, versions, commit and command of a recorded result."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=True,
    ).stdout.strip()
    python = ".".join(map(str, sys.version_info[:3]))
    return (
        "# The bundled model on 200 held-out words, greedy\n\n"
        f"{datetime.date.today()}, {jax.devices()[0].device_kind}, Python {python}, "
        f"JAX {jax.__version__}, commit {commit}\n\n    {command}\n\n"
    )


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"The argument {argv[1]!r} belongs to no flag.")
    text = report(_MODEL.value, _DTYPE.value)
    sys.stdout.write(text)
    if _RECORD.value:
        command = " ".join(["python -m tools.eval_demo", *sys.argv[1:]])
        Path(_RECORD.value).write_text(heading(command) + text, encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
