"""What is printed at the end of a run: speeds, time to first token, memory, settings used."""

import collections
import sys
from collections.abc import Iterator

import jax

from qwen_jax import startup
from qwen_jax.api import Model
from qwen_jax.completions import Piece, Timings
from qwen_jax.engine.memory import peak_memory
from qwen_jax.engine.sampling import Sampling
from qwen_jax.generation import Generation
from qwen_jax.in_force import describe
from qwen_jax.mesh import MeshShape


class Summary:
    """What a generation did.

    Args:
        sampling: the run's.
        others: prompts that have sampling settings of their own.
    """

    def __init__(self, model: Model, sampling: Sampling, others: int = 0):
        self._model, self._sampling, self._others = model, sampling, others
        self._generation: Generation | None = None
        self._reasons: collections.Counter[str] = collections.Counter()

    def follow(self, generation: Generation) -> Iterator[Piece]:
        """Its pieces, while it is looked at."""
        self._generation = generation
        for piece in generation:
            if piece.completion is not None:
                self._reasons[piece.completion.finish_reason] += 1
            yield piece

    def show(self) -> None:
        """Prints the summary to stderr, if anything was generated."""
        if self._generation is None or not self._generation.timings.generated_tokens:
            return
        begun = [c for c in self._generation.unfinished.values() if c.tokens]
        self._reasons.update(completion.finish_reason for completion in begun)
        print(self._text(self._generation.timings), file=sys.stderr)

    def _text(self, timings: Timings) -> str:
        spec = self._model.engine.spec
        shared = f", {timings.shared_tokens} of them shared" if timings.shared_tokens else ""
        where, peak = peak_memory()
        stages = ", ".join(f"{stage} {spent:.2f} s" for stage, spent in startup.seconds.items())
        reasons = ", ".join(
            reason if count == 1 == self._reasons.total() else f"{reason} {count}"
            for reason, count in self._reasons.items()
        )
        form = ", weights in blocks" if self._model.engine.weights.in_blocks else ""
        shape = MeshShape(1 + len(self._model.engine.others), spec.split.size)
        mesh = f" x {shape.devices} ({shape})" if shape.devices > 1 else ""
        drafts = ""
        if self._model.engine.layout.draft_tokens:
            drafted, accepted = timings.drafted_tokens, timings.accepted_tokens
            drafts = f"\ndrafts      {drafted} tokens, {accepted} accepted"
        own = f"; prompts with settings of their own: {self._others}" if self._others else ""
        return "\n".join(
            (
                f"prompt      {timings.prompt_tokens} tokens{shared}",
                f"generation  {timings.generated_tokens} tokens, "
                f"{timings.generation_rate:,.1f} tokens/s{drafts}",
                f"start       {stages}",
                f"first token {timings.first_token_seconds:.2f} s after the prompt, "
                f"compilation {timings.compile_seconds:.2f} s in all",
                f"memory      {peak / 1e6:,.0f} MB peak ({where})",
                f"finished    {reasons}",
                f"sampling    {describe(self._sampling)}{own}",
                f"ran on      {jax.local_devices()[0].device_kind}{mesh}, {spec.weights}{form}, "
                f"JAX {jax.__version__}",
            )
        )
