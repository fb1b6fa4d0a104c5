"""An engine whose device writes what it is told to, under the real scheduler and `Generation`.

So what should come out can be worked out from the whole list of tokens at once.
"""

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.sample_tokens import Logprobs
from qwen_jax.completions import Completion, Piece
from qwen_jax.engine import steps
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.rows import Rows
from qwen_jax.engine.sampling import Plan
from qwen_jax.generation import Generation
from qwen_jax.requests import Request
from qwen_jax.text.tokenizer import Tokenizer
from tests.engines import reshape
from tests.tiny_checkpoints import tiny_config

CONTEXT = 64


class NoWeights:
    """What an engine asks of its weights before it runs a program."""

    dtype = jnp.dtype(jnp.float32)

    def devices(self) -> set[jax.Device]:
        return set(jax.devices())


class _Row:
    """What the device knows of a slot."""

    def __init__(self, script: list[int]) -> None:
        self.script, self.generated, self.done = script, 0, False


class Scripted:
    """Chooses the tokens of scripts: request i's is the i-th, found by its prompt's last token.

    Attributes:
        calls: for each call of `step`, which requests it had, and which of these were done before.
        code: given instead of tokens from the next call on, where not None.
    """

    def __init__(
        self,
        scripts: Sequence[Sequence[int]],
        tokenizer: Tokenizer,
        *,
        slots: int = 4,
        steps: int = 4,
        ahead: bool = False,
    ) -> None:
        config = tiny_config(vocab_size=tokenizer.vocab_size, context_length=CONTEXT)
        self.engine = Engine(
            config,
            NoWeights(),  # type: ignore[arg-type]
            stop_ids=tokenizer.stop_ids,
            slots=slots,
            cache_tokens=128 * slots,
        )
        reshape(self.engine, steps=steps, ahead=ahead)
        self.tokenizer = tokenizer
        # What is chosen after the end of a script must never be looked at.
        self._scripts = [[*script, *[7] * CONTEXT * 3] for script in scripts]
        self._rows: dict[int, _Row] = {}
        self.calls: list[dict[int, bool]] = []
        self.code: int | None = None

    def step(
        self,
        spec: Any,
        weights: Any,
        pages: Any,
        tables: Any,
        state: Any,
        extras: Any,
        packed: np.ndarray,
        plan: Plan,
        count: int,
    ) -> tuple[Any, Any, Any, steps.Emitted]:
        names = Rows._fields[:-1]
        rows = [dict(zip(names, row.tolist(), strict=False)) for row in packed]
        token = np.full((count, len(rows)), steps.NOT_LIVE)
        had = {}
        for r, row in enumerate(rows):
            if not row["live"]:
                continue
            if row["fresh"]:
                self._rows[row["slot"]] = _Row(self._scripts[row["token"]])
            mine = self._rows[row["slot"]]
            had[self._scripts.index(mine.script)] = mine.done
            for i in range(count):
                if mine.done:
                    break
                token[i, r] = mine.script[mine.generated] if self.code is None else self.code
                mine.generated += 1
                mine.done = token[i, r] in spec.stop_ids or mine.generated >= row["limit"]
        self.calls.append(had)
        logprobs = None
        if plan.sampled:
            there = np.arange(plan.top) < packed[:, -1:]  # so many as the row asks for
            ids = token[..., None] + np.arange(plan.top)
            top = np.where(there, -1.0 - ids, -np.inf)
            logprobs = Logprobs(-1.0 - token, np.where(there, ids, -1), top)
        return pages, state, extras, steps.Emitted(token, logprobs)

    def run(self, requests: Any) -> "Run":
        """A run of requests, whose prompts get their numbers as last tokens."""
        numbered = (numbered_request(i, request) for i, request in enumerate(requests))
        generation = Generation(self.engine, self.tokenizer, numbered)
        return Run(self, generation)


def numbered_request(number: int, request: Request) -> Request:
    fields = {**vars(request), "tokens": [*request.tokens[:-1], number]}
    return Request(**fields)


class Run(NamedTuple):
    """A generation that may be iterated over while its engine follows the scripts."""

    scripted: Scripted
    generation: Generation

    def pieces(self) -> Generator[Piece, None, None]:
        patched = mock.patch.multiple(
            steps, step=self.scripted.step, extend=lambda spec, weights, pages, *_: pages
        )
        pieces = iter(self.generation)
        try:
            while True:
                with patched:
                    piece = next(pieces, None)
                if piece is None:
                    return
                yield piece
        finally:
            pieces.close()

    def collect(self) -> tuple[list[str], list[Completion]]:
        """Every request's text, piece by piece, and its completion."""
        texts: dict[int, str] = {}
        ended: dict[int, Completion] = {}
        for number, text, completion in self.pieces():
            assert number not in ended, "a piece after the end"
            texts[number] = texts.get(number, "") + text
            if completion is not None:
                ended[number] = completion
        pool = self.scripted.engine.pool
        assert pool.available == pool.size, "pages are held after the end"
        assert texts.keys() == ended.keys() == set(range(len(ended)))
        return [texts[i] for i in range(len(ended))], [ended[i] for i in range(len(ended))]
