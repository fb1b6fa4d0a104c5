"""Texts through an engine's own compiled functions, in a cache of our choosing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from pallas_kernels.sample_tokens import settings
from qwen_jax.accuracy.cache.slots import POOL, WIDTH, Part, Scenario
from qwen_jax.engine import calls
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.rows import Rows, pack_rows
from qwen_jax.engine.sampling import Plan
from qwen_jax.engine.shapes import fitting
from qwen_jax.engine.steps import NOT_LIVE, Emitted, Extras, State
from qwen_jax.model.cache import HEADS, create_pages


@dataclasses.dataclass(frozen=True)
class Shown:
    """What an engine shows of one row.

    Attributes:
        logits: log-probabilities after every so many positions, NaN where the engine shows none.
        keys, values: of each layer, what the slots of the text hold at the end.
    """

    logits: Float[np.ndarray, "P V"]
    keys: Float[np.ndarray, "L T K H"]
    values: Float[np.ndarray, "L T K H"]


def run(engine: Engine, scenario: Scenario, used: Int[np.ndarray, "V"], every: int) -> list[Shown]:
    """Every row of a scenario.

    Args:
        used: tokens in use; log-probabilities are of these,
        every: and after positions that are a multiple of this.
    """
    through = _Run(engine, scenario, used, every)
    for parts in scenario.calls:
        if parts[0].decode:
            through.step(parts)
        else:
            through.enter(parts)
    return through.shown()


class _Run:
    """A scenario under way, on a device.

    Attributes:
        extras: there for the plan's sake: nothing of it is asked for.
        fresh: rows that have not begun to decode.
    """

    def __init__(self, engine: Engine, scenario: Scenario, used: Int[np.ndarray, "V"], every: int):
        self.engine, self.scenario, self.used, self.every = engine, scenario, used, every
        spec, split = engine.spec, engine.spec.split
        pages = create_pages(spec.cached, POOL, spec.cache, sharding=split.sharding(HEADS))
        self.pages = jnp.full_like(pages, jnp.nan) if scenario.poisoned else pages
        slots = max(engine.shapes.slots, *(1 + row.slot for row in scenario.rows))
        self.state = split.placed(State.create(slots))
        extras = Extras.create(slots, engine.config.vocab_size)
        self.extras: Extras | None = split.placed(extras)
        self.fresh = set(range(len(scenario.rows)))
        self.logits = [
            np.full((len(row.tokens[::every]), len(used)), np.nan) for row in scenario.rows
        ]

    def _tables(self, numbers: list[int], rows: int) -> Int[np.ndarray, "R n"]:
        tables = np.zeros((rows, WIDTH), np.int32)
        for row, number in enumerate(numbers):
            pages = self.scenario.rows[number].pages
            tables[row, : len(pages)] = pages
        return tables

    def enter(self, parts: tuple[Part, ...]) -> None:
        """As the scheduler's calls of `extend`, or `Engine.logits`' where nothing is decoded."""
        engine, spec = self.engine, self.engine.spec
        rows = len(parts)
        if self.scenario.decodes:
            rows = max(fitting(engine.shapes.pieces, rows), rows)
        tokens = np.zeros((rows, parts[0].padded), np.int32)
        start, lengths = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        for row, part in enumerate(parts):
            start[row], lengths[row] = part.start, part.start + part.length
            text = self.scenario.rows[part.row].tokens
            tokens[row, : part.length] = text[part.start : lengths[row]]
        tables = self._tables([part.row for part in parts], rows)
        given = engine.weights, self.pages, tables, tokens, start, lengths
        if self.scenario.decodes:
            self.pages = calls.extend(spec.without_tokenizer, *given)
            return
        self.pages, found = calls.logits(spec, *given)
        for part, logits in zip(parts, np.asarray(found), strict=False):
            at = np.arange(part.start, part.start + part.length)
            kept = at % self.every == 0
            x = logits[: part.length][kept][:, self.used].astype(np.float64)
            top = x.max(axis=-1, keepdims=True)
            total = np.exp(x - top).sum(axis=-1, keepdims=True)
            self.logits[part.row][at[kept] // self.every] = x - top - np.log(total)

    def step(self, parts: tuple[Part, ...]) -> None:
        """One decode step as the scheduler calls it, but for its tokens: they are the text's own,
        whatever the engine has chosen, and do not end it."""
        engine, vocab = self.engine, self.engine.config.vocab_size
        size = max(fitting(engine.shapes.rows, len(parts)), len(parts))
        fields = np.zeros((7, size), np.int32)
        fields[0] = len(self.state.token)  # nobody's, and out of bounds
        token, done = np.array(self.state.token), np.array(self.state.done)
        for i, part in enumerate(parts):
            row = self.scenario.rows[part.row]
            fresh = part.row in self.fresh
            first, limit = row.tokens[row.prompt], len(row.tokens) - row.prompt
            fields[:, i] = (row.slot, 1, fresh, first, 0, row.prompt, limit)
            if not fresh:
                token[row.slot] = row.tokens[min(part.start, len(row.tokens) - 1)]
                done[row.slot] &= part.length == 0
            self.fresh.discard(part.row)
        # Asked for only where they are looked at: sorting a large vocabulary takes as long as the
        # rest of a step.
        looked = any(part.length > 0 and part.start % self.every == 0 for part in parts)
        asked = settings(size, logprobs=vocab if looked else -1)
        self.pages, self.state, self.extras, emitted = calls.step(
            engine.spec,
            engine.weights,
            self.pages,
            self._tables([part.row for part in parts], size),
            engine.spec.split.placed(
                self.state._replace(token=jnp.asarray(token), done=jnp.asarray(done))
            ),
            self.extras,
            pack_rows(Rows._make([*fields, asked])),
            Plan(True, vocab),
            1,
        )
        self._keep(parts, jax.device_get(emitted))

    def _keep(self, parts: tuple[Part, ...], emitted: Emitted) -> None:
        """Puts each row's log-probabilities in their place; all of them come as the likeliest V."""
        assert emitted.logprobs is not None
        ids, values = emitted.logprobs.top_ids[0], emitted.logprobs.top[0]
        for i, part in enumerate(parts):
            shown = part.length > 0 and emitted.token[0, i] != NOT_LIVE
            if not shown or part.start % self.every:
                continue
            found = np.full(self.engine.config.vocab_size, np.nan)
            there = ids[i] >= 0
            found[ids[i][there]] = values[i][there]
            self.logits[part.row][part.start // self.every] = found[self.used]

    def shown(self) -> list[Shown]:
        """Cut on the host: on a device each step of it would be a program of its own."""
        pages, layers = np.asarray(self.pages), self.engine.config.num_layers
        # Of a head that is on several devices one is shown.
        copies = self.engine.spec.cached.num_kv_heads // self.engine.config.num_kv_heads
        found = []
        for row, logits in zip(self.scenario.rows, self.logits, strict=True):
            paged = pages[:, list(row.pages), ::copies].astype(np.float64).swapaxes(2, 3)
            slots = paged.reshape(len(paged), -1, *paged.shape[3:])[:, : len(row.tokens)]
            found.append(Shown(logits, slots[:layers], slots[layers:]))
        return found
