"""`likelihood`: how likely the model finds the answer that each prompt's line gives."""

import math
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from qwen_jax.errors import UserError
from qwen_jax.experiments import kinds
from qwen_jax.experiments.scores.fields import texts
from qwen_jax.experiments.task import Metrics, Work
from qwen_jax.experiments.tasks.generate import Generate, Recorded
from qwen_jax.prompts import Item
from qwen_jax.scoring import Pair
from qwen_jax.task_fields import PROMPT

_ITEM = {
    "row": kinds.NATURAL,
    "logprobs": kinds.list_of(kinds.NUMBER),
    "greedy": kinds.TRUTH,
}


class Likelihood(Generate):
    """One item a prompt: the log-probability of each token of its line's `answer`, as the text
    that comes next, and whether each is the likeliest.

    Nothing is generated: answers need not be found to be compared, and a difference shows in
    fewer prompts than in right and wrong.
    """

    reads = (*PROMPT, "prompt_file", "experiment.template")

    def _check_item(self, item: Item) -> None:
        if len(texts(item, "answer")) > 1:
            raise UserError(f"{item.where}: answer is a list, but likelihood asks for one text.")

    def known_metrics(self) -> Collection[str]:
        of_answers = ("answer_logprob", "answer_greedy", "answer_perplexity")
        return *of_answers, "prompts", "scored_tokens"

    def fault_of(self, item: dict[str, Any]) -> str:
        return kinds.fault(item, _ITEM)

    def run(self, work: Work) -> Metrics:
        items, model = list(self.items()), work.model()
        recorded = Recorded(work.recorded)
        left = [row for row in range(len(items)) if row not in recorded]

        def pairs() -> Iterator[Pair]:
            for row in left:
                request = work.request(items[row])
                (answer,) = texts(items[row], "answer")
                yield request.tokens, model.tokenizer.encode(answer)

        found = {row: recorded.answer(row) for row in range(len(items)) if row in recorded}
        for row, score in zip(left, model.score(pairs()), strict=True):
            if not np.isfinite(score.logprobs).all():
                raise UserError(f"{items[row].where}: the log-probabilities are not finite.")
            found[row] = {
                "row": row,
                "id": items[row].id,
                "logprobs": score.logprobs.tolist(),
                "greedy": bool(score.greedy.all()),
            }
            work.record(**found[row])
            work.progress(len(found), len(items))
        return self._metrics(work, items, found)

    def _metrics(self, work: Work, items: list[Item], found: dict[int, Any]) -> Metrics:
        values = []
        for row, item in enumerate(items):
            logprobs = found[row]["logprobs"]
            values.append(
                {
                    "answer_logprob": math.fsum(logprobs) / len(logprobs),
                    "answer_greedy": float(found[row]["greedy"]),
                }
            )
            work.score("prompt", row, item.id, values[-1])
        metrics: Metrics = {}
        for name in values[0]:
            column = np.array([value[name] for value in values])
            metrics[name] = float(column.mean())
            error = column.std(ddof=1) / len(column) ** 0.5 if len(column) > 1 else 0.0
            metrics[f"{name}_error"] = float(error)
        tokens = [p for row in range(len(items)) for p in found[row]["logprobs"]]
        metrics["answer_perplexity"] = math.exp(-math.fsum(tokens) / len(tokens))
        return metrics | {"prompts": len(items), "scored_tokens": len(tokens)}
