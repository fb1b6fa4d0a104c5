"""What is printed at the end of a run: speeds, time to first token, memory, settings used."""

import collections
import dataclasses
import sys

import jax

from qwen_jax.api import Model
from qwen_jax.engine.memory import peak_memory
from qwen_jax.engine.sampling import Sampling
from qwen_jax.generation import Batch, Timings
from qwen_jax.in_force import describe


class Summary:
    """Adds batches up and shows the sum.

    Args:
        sampling: the run's.
        others: prompts that have sampling settings of their own.
    """

    def __init__(self, model: Model, sampling: Sampling, others: int = 0):
        self._model, self._sampling, self._others = model, sampling, others
        self._timings: list[Timings] = []
        self._reasons: collections.Counter[str] = collections.Counter()

    def add(self, batch: Batch, rows: int | None = None) -> None:
        """Counts a batch, of which the first `rows` (all by default) are the user's."""
        self._timings.append(batch.timings)
        self._reasons.update(c.finish_reason for c in batch.completions[:rows])

    def show(self) -> None:
        """Prints the summary to stderr, if anything was generated."""
        if any(t.prompt_seconds > 0 for t in self._timings):
            print(self._text(), file=sys.stderr)

    def _text(self) -> str:
        sums = {
            field.name: sum(getattr(t, field.name) for t in self._timings)
            for field in dataclasses.fields(Timings)
        }
        total = Timings(**sums)
        where, peak = peak_memory()
        engine = self._model.engine
        reasons = ", ".join(
            reason if count == 1 == self._reasons.total() else f"{reason} {count}"
            for reason, count in self._reasons.items()
        )
        own = f"; prompts with settings of their own: {self._others}" if self._others else ""
        return "\n".join(
            (
                f"prompt      {total.prompt_tokens} tokens, {total.prompt_rate:,.1f} tokens/s",
                f"generation  {total.generated_tokens} tokens, "
                f"{total.generation_rate:,.1f} tokens/s",
                f"first token {self._timings[0].first_token_seconds:.2f} s after the prompt, "
                f"compilation {total.compile_seconds:.2f} s in all",
                f"memory      {peak / 1e6:,.0f} MB peak ({where})",
                f"finished    {reasons}",
                f"sampling    {describe(self._sampling)}{own}",
                f"ran on      {jax.local_devices()[0].device_kind}, {engine.cache_dtype}, "
                f"JAX {jax.__version__}",
            )
        )
