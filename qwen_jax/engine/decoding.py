"""How texts that are whole are decoded: some steps a call, with drafts or without."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from pallas_kernels.sample_tokens import pack, words
from qwen_jax.engine import calls, speculate, steps
from qwen_jax.engine.constrained import Halves
from qwen_jax.engine.draft_model import catch_up, share_of
from qwen_jax.engine.drafts import TRIAL, Drafts, Grant
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.reading import logprobs_of, why_not
from qwen_jax.engine.rows import FRESH, MASKED, Rows, goes_on, nobodys, pack_rows
from qwen_jax.engine.sampling import Plan, changes_scores, has_penalties, settings_of
from qwen_jax.engine.shapes import fitting
from qwen_jax.engine.speculate import Drafting, Lanes
from qwen_jax.engine.texts import News, Text
from qwen_jax.engine.unmasked import Agreement, Trust, may_be


class Steps(NamedTuple):
    """A call of some decode steps under way.

    Attributes:
        texts: in their order in its rows.
        widths: of each so many rows.
        returns: how often each had gone back when the call began.
        cost: of steps with drafts, in steps without.
    """

    texts: list[Text]
    widths: list[int]
    returns: list[int]
    emitted: steps.Emitted
    cost: float | None = None


class Decoding:
    """The texts of one scheduler that run.

    Args:
        let_go: takes a text's slot and pages.

    Attributes:
        running: texts that have a slot and are whole.
    """

    def __init__(self, engine: Engine, let_go: Callable[[Text], None]):
        self._engine, self._let_go = engine, let_go
        self.running: list[Text] = []
        self._state = engine.spec.split.placed(steps.State.create(engine.shapes.slots))
        self._extras: steps.Extras | None = None
        self._halves = Halves(engine, self.leave)
        self._history: speculate.History | None = None
        self._drafts: Drafts | None = None
        if most := engine.layout.draft_tokens:
            share = None if engine.draft is None else share_of(engine.draft, engine)
            self._drafts = Drafts(engine.shapes, most, share)

    def begin(self, text: Text) -> None:
        """A text whose prompt is in the cache, but for its last token, is decoded from now on."""
        vocab, sampling = self._engine.config.vocab_size, text.sampling
        self.running.append(text)
        masked = text.constraint is not None
        own = (text.slot, 1, 1, text.tokens[-1], 0, text.entering, text.limit)
        numbers = [np.array([number], np.int32) for number in own]
        row = Rows._make([*numbers, settings_of(sampling, text.top, masked)])
        text.row = pack_rows(row)[0]
        if text.constraint is not None and self._engine.layout.unmasked and may_be(sampling):
            form = text.constraint.form
            text.trust = Trust(self._engine.agreements.setdefault(form, Agreement()))
        slot = np.int32(text.slot)
        if changes_scores(sampling):
            bias = np.zeros(vocab, np.float32)
            bias[list(sampling.logit_bias)] = list(sampling.logit_bias.values())
            seen = pack([text.tokens], vocab)[0]
            allowed = np.zeros(words(vocab), np.uint32)
            self._extras = calls.insert(self._all_extras(), slot, seen, allowed, bias)
        if self._drafts is not None and text.constraint is None:
            text.record = self._drafts.record(text.tokens)
            history = self._all_history()
            tokens = np.zeros(history.shape[1], np.int32)
            tokens[: len(text.tokens)] = text.tokens
            self._history = calls.begin(history, slot, tokens)

    def _all_extras(self) -> steps.Extras:
        """Those of all slots, made when the first text asks for any."""
        if self._extras is not None:
            return self._extras
        slots, vocab = self._engine.shapes.slots, self._engine.config.vocab_size
        return self._engine.spec.split.placed(steps.Extras.create(slots, vocab))

    def _all_history(self) -> speculate.History:
        """That of all slots, made when the first text begins that may be drafted for."""
        if self._history is not None:
            return self._history
        return self._engine.spec.split.placed(speculate.create_history(self._engine.layout))

    def leave(self, text: Text) -> None:
        """A text that has ended, or is to end wherever it is, lets go of what it holds."""
        if text in self.running:
            self.running.remove(text)
        self._let_go(text)

    def step(self) -> list[Steps]:
        """Some decode steps of everyone who runs without masks; who has then had all its tokens,
        leaves."""
        texts = [text for text in self.running if not text.masked]
        if not texts:
            return []
        asked = ((text.sampling, text.top) for text in texts)
        plan = Plan.of(asked, self._engine.config.vocab_size)
        grant = None
        if self._drafts is not None:
            grant = self._drafts.grant([text.record for text in texts if text.record is not None])
        times = TRIAL if grant is not None and grant.trial else self._engine.shapes.steps
        for text in texts:
            text.expected = min(text.expected + times, text.limit)
        if grant is None:
            made = self._plainly(texts, plan)
        else:
            made = self._with(grant, texts, plan, times)
        for text in texts:
            if text.expected >= text.limit and text.constraint is None:
                self.leave(text)
        return [made]

    def _plainly(self, texts: list[Text], plan: Plan) -> Steps:
        engine, widths = self._engine, [1] * len(texts)
        rows = self._rows(texts, widths, engine.rows_for(len(texts), plan))
        engine.pages, self._state, extras, emitted = calls.step(
            engine.spec,
            engine.weights,
            engine.pages,
            engine.tables([text.pages for text in texts], len(rows)),
            self._state,
            self._all_extras() if plan.sampled else None,
            rows,
            plan,
            engine.shapes.steps,
        )
        if extras is not None:
            self._extras = extras
        if self._drafts is not None:
            given = self._all_history(), self._state, rows, emitted.token
            self._history = calls.remember(*given)
            self._drafts.ledger.plain(engine.shapes.steps)
        return Steps(texts, widths, _returns(texts), emitted)

    def _with(self, grant: Grant, texts: list[Text], plan: Plan, times: int) -> Steps:
        """The same with drafts."""
        engine, widths, draft = self._engine, grant.widths, self._engine.draft
        drafted = [text for text, width in zip(texts, widths, strict=True) if width > 1]
        if draft is not None:
            catch_up(draft, drafted)
        rows = self._rows(texts, widths, grant.size)
        held = [text.pages for text, width in zip(texts, widths, strict=True) for _ in range(width)]
        penalised = any(has_penalties(text.sampling) for text in texts)
        # A draft model's steps have a row for each text that it drafts for.
        room = grant.size if draft is None else fitting(engine.shapes.rows, len(drafted))
        found = calls.speculate(
            engine.spec,
            engine.weights,
            engine.pages,
            engine.tables(held, len(rows)),
            self._state,
            self._all_extras() if plan.sampled else None,
            self._all_history(),
            None if draft is None else draft.weights,
            None if draft is None else draft.pages,
            (rows, _lanes(widths, grant.size, room)),
            plan,
            Drafting(
                grant.most,
                penalised,
                None if draft is None else draft.spec.without_tokenizer,
            ),
            times,
        )
        engine.pages, self._state, extras, self._history, pages, emitted = found
        if draft is not None:
            draft.pages = pages
        if extras is not None:
            self._extras = extras
        return Steps(texts, widths, _returns(texts), emitted, grant.cost)

    def _rows(self, texts: Sequence[Text], widths: Sequence[int], size: int) -> np.ndarray:
        """What a step is told of these texts, a row for each of their positions; after the first
        one a device knows their tokens."""
        rows = nobodys(size, self._engine.shapes.slots)
        first = 0
        for text, width in zip(texts, widths, strict=True):
            rows[first : first + width] = text.row
            text.row[FRESH] = 0
            first += width
        return rows

    def step_constrained(self) -> Iterator[News]:
        """Some decode steps of those held by masks. They have calls of their own, since others
        need not wait for the host at each of their tokens."""
        if any(text.masked for text in self.running):
            given = self.running, self._state, self._all_extras
            self._state, extras = yield from self._halves.step(*given)
            if extras is not None:
                self._extras = extras

    def _failed(self, text: Text, why: str) -> News:
        text.over = True
        self.leave(text)
        return News(text, [], None, None, True, why)

    def read(self, call: Steps) -> Iterator[News]:
        """Waits for a call of steps, and tells what it chose."""
        if any(text.top is not None for text in call.texts):
            tokens, logprobs = jax.device_get(call.emitted)
        else:  # To fetch what nobody reads would take longest.
            tokens, logprobs = np.asarray(call.emitted.token), None
        first, grown = 0, np.zeros((len(tokens), len(call.texts)), int)
        each_of = zip(call.texts, call.widths, call.returns, strict=True)
        for number, (text, width, returns) in enumerate(each_of):
            own = tokens[:, first : first + width]
            first += width
            told = (own != steps.NOT_LIVE) & (own != speculate.REJECTED)
            grown[:, number] = told.sum(axis=1)
            if text.over or (text.trust is not None and text.trust.returns != returns):
                continue
            chosen: list[int] = own[told].tolist()
            if text.constraint is not None:
                chosen = self._allowed(text, chosen)
            if why := why_not(chosen, self._engine):
                yield self._failed(text, why)
                continue
            if not chosen:
                continue
            text.last = chosen[-1]
            if text.record is not None and call.cost is not None and width > 1:
                drafted = int((own[:, 1:] != steps.NOT_LIVE).sum())
                each = grown[:, number].tolist()
                text.record.read_drafted(chosen, drafted, each, call.cost)
            elif text.record is not None:
                text.record.read(chosen)
            stopped = chosen[-1] in self._engine.spec.stop_ids
            text.given += len(chosen)
            text.over = stopped or text.given >= text.limit
            if text.over:
                self.leave(text)
            shown = None
            if text.top is not None:
                places = np.argwhere(told)[: len(chosen)] + np.array([0, first - width])
                shown = logprobs_of(logprobs, places)
            yield News(text, chosen, shown, None, text.over)
        if call.cost is not None and self._drafts is not None:
            for each in grown:
                self._drafts.ledger.step(call.cost, each.tolist())

    def _allowed(self, text: Text, chosen: list[int]) -> list[int]:
        """Of what was chosen without masks, what its constraint allows. If not all, the text goes
        on behind that, held by masks; what calls under way choose is not its own."""
        assert text.constraint is not None and text.trust is not None
        tokens = list(itertools.takewhile(lambda code: code >= 0, chosen))
        allowed = text.constraint.follow(tokens)
        if allowed == len(tokens):
            text.trust.kept(allowed)
            return chosen
        text.trust.went_back(allowed)
        text.row[MASKED] = 1
        goes_on(text.row, [text.last, *tokens][allowed], text.given + allowed)
        return tokens[:allowed]


def _returns(texts: Sequence[Text]) -> list[int]:
    return [0 if text.trust is None else text.trust.returns for text in texts]


def _lanes(widths: Sequence[int], size: int, drafts: int) -> Lanes:
    """Which rows of so many are whose positions, with room for so many drafts."""
    ahead, draft = (np.zeros(size, np.int32) for _ in range(2))
    firsts = np.full(drafts, -1, np.int32)
    row, number = 0, 0
    for width in widths:
        ahead[row : row + width] = np.arange(width)
        if width > 1:
            firsts[number], draft[row : row + width] = row, number
            number += 1
        row += width
    return Lanes._make([ahead, draft, firsts])
