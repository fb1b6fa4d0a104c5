"""Which tokens may come next, so that an answer keeps its form: by llguidance."""

import functools
import itertools
import json
import os
import re
import sys
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt32

from qwen_jax.errors import UserError
from qwen_jax.text import exact_json
from qwen_jax.text.constraint import Constraint, check_installed
from qwen_jax.text.json_schema import LAYOUT
from qwen_jax.text.tokenizer import Tokenizer

FEW, FEW_WORDS = 16, 1 << 14
"""Below so many rows, or words of all masks, threads cost more than they save: eight masks of 2,048
tokens take 71 µs one after the other and 129 on two threads."""

_CORES = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
THREADS = 1 if _CORES <= 2 else None
"""That find masks: the caller's alone, or as many as llguidance finds right, four fifths of the
cores that a container grants."""
AUTOMATA = 1 if _CORES <= 2 else min(_CORES, 16)
"""Of one constraint at most."""
QUICK = 0.02
"""Seconds in which another automaton is worth making."""

_PLAIN = r'[^"\\\x00-\x1F\x7F]'
SLICES = [
    r"[\x20\x0A\x0D\x09]+",
    *(f"{_PLAIN}{{1,{most}}}" for most in (2, 4, 6, 8, 10, 15, 30)),
    f"{_PLAIN}+",
]
"""Tokens that llguidance lets through without looking at each, where a form lets all of them: its
own kinds, and shorter ones, for strings that may not become much longer."""


class Matcher:
    """One answer under a constraint, while it grows.

    Raises UserError where the constraint makes no sense or llguidance can't do it.

    Attributes:
        forced: the tokens that must come next, as far as they were found when the last mask was
            made: where only one text can come, it is spelt as the tokenizer spells it.
    """

    def __init__(self, constraint: Constraint, tokenizer: Tokenizer):
        known = _known_of(tokenizer)
        self._stop_ids, self._words = known.stop_ids, known.words
        self._automata = known.automata(constraint)
        self._automaton = self._automata.begin(self)
        self._matcher = self._automaton.start.deep_copy()
        self.forced: list[int] = []

    @property
    def form(self) -> Hashable:
        """One object of all answers to a constraint."""
        return self._automata

    @staticmethod
    def fill(
        matchers: Sequence["Matcher | None"], masks: UInt32[np.ndarray, "B words"]
    ) -> list[str | None]:
        """Makes each matcher's row the bits of all tokens that may come next, on several threads.
        Masks may be of more tokens than there are.

        Args:
            matchers: of one tokenizer; None leaves its row as it is.

        Returns:
            Of each, None, or why llguidance gives up.
        """
        free: list[tuple[Any, int]] = []
        for row, matcher in enumerate(matchers):
            if matcher is None:
                continue
            if matcher.forced:
                token = matcher.forced[0]
                masks[row] = 0
                masks[row, token // 32] = np.uint32(1 << token % 32)
            else:
                free.append((matcher, row))
        if free:
            # Threads take neighbours together, so that few wait for each other's automaton.
            free.sort(key=lambda one: id(one[0]._automaton))
            _put_masks([(matcher._matcher, row) for matcher, row in free], free[0][0]._words, masks)
        # Most masks have many bits, which a few words of each show.
        few = np.count_nonzero(masks[:, ::64], axis=1) <= 1
        for matcher, row in free:
            if few[row] and _is_single(masks[row]):
                matcher.forced = matcher._matcher.compute_ff_tokens()
        return [None if matcher is None else matcher._why_not() for matcher in matchers]

    @staticmethod
    def take(matchers: Sequence["Matcher"], tokens: Sequence[Sequence[int]]) -> None:
        """Each goes on behind tokens that may come next."""
        single: list[tuple[Any, int]] = []
        together = zip(matchers, tokens, strict=True)
        for matcher, chosen in sorted(together, key=lambda one: id(one[0]._automaton)):
            matcher.forced = matcher.forced[len(chosen) :]
            if len(chosen) == 1 and chosen[0] not in matcher._stop_ids:
                single.append((matcher._matcher, chosen[0]))
            else:
                taken = [token for token in chosen if token not in matcher._stop_ids]
                matcher._matcher.consume_tokens(taken)
        if THREADS == 1 or len(single) < FEW:
            for inner, token in single:
                inner.consume_token(token)
        else:
            _executor().consume_token_par(single)

    def follow(self, tokens: Sequence[int]) -> int:
        """Goes on behind as many of these as may come, one after another, those that end the text
        included; returns how many that are."""
        plain = list(itertools.takewhile(lambda token: token not in self._stop_ids, tokens))
        followed: int = self._matcher.try_consume_tokens(plain)
        known = self.forced[:followed]
        self.forced = self.forced[followed:] if known == plain[: len(known)] else []
        if followed == len(plain) < len(tokens) and self._matcher.is_accepting():
            followed += 1
        return followed

    def _why_not(self) -> str | None:
        if not self._matcher.is_error():
            return None
        self._automata.drop(self._automaton)
        why = self._matcher.get_error()
        return f"The constraint is too much: {_first_line(why)}; simplify it."


def ready(tokenizer: Tokenizer) -> None:
    """Makes what all constraints of a tokenizer need, which takes seconds for a large one."""
    _known_of(tokenizer)


def _put_masks(
    matchers: list[tuple[Any, int]], words: int, masks: UInt32[np.ndarray, "B words"]
) -> None:
    """The mask of each matcher of llguidance's, of so many words, into its row."""
    if masks.shape[1] != words or not masks.flags.c_contiguous:
        own = np.empty((len(matchers), words), np.uint32)
        _put_masks([(matcher, i) for i, (matcher, _) in enumerate(matchers)], words, own)
        rows = [row for _, row in matchers]
        masks[rows, :words], masks[rows, words:] = own, 0
        return
    at, each = masks.ctypes.data, masks.shape[1] * masks.itemsize
    if THREADS == 1 or masks.size < FEW_WORDS:
        for matcher, row in matchers:
            matcher.unsafe_compute_mask_ptr(at + row * each, each)
    else:
        _executor().unsafe_compute_mask_ptr(matchers, at, each, len(masks))


def _is_single(mask: UInt32[np.ndarray, " words"]) -> bool:
    """Whether it has one bit."""
    return np.count_nonzero(mask) == 1 and int(mask.max()).bit_count() == 1


@functools.cache
def _executor() -> Any:
    """The threads that find masks."""
    from llguidance import LLExecutor

    return LLExecutor(THREADS)


def _grammar(constraint: Constraint) -> str:
    from llguidance import LLMatcher

    kind, text = constraint.kind, constraint.text
    if kind == "regex":
        return str(LLMatcher.grammar_from_regex(text))
    if kind == "lark":
        return str(LLMatcher.grammar_from_lark(text))
    if kind == "choice":
        options = " | ".join(json.dumps(choice) for choice in json.loads(text))
        # As a terminal they are one automaton: as alternatives of a rule no more than 2,000 fit.
        return str(LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {options}"))
    if (written := exact_json.grammar(json.loads(text))) is not None:
        return str(LLMatcher.grammar_from_lark(written))
    return str(LLMatcher.grammar_from_json_schema(text, overrides=LAYOUT))


class _Vocabulary:
    """A tokenizer as llguidance asks for one."""

    def __init__(self, tokenizer: Tokenizer):
        # Weakly: llguidance keeps this, and is kept itself, as long as the tokenizer is there.
        self._tokenizer = weakref.ref(tokenizer)
        size = tokenizer.vocab_size
        self.eos_token_id, self.bos_token_id = tokenizer.stop_ids[0], None
        visible = set(tokenizer.visible(range(size)))
        unused = set(tokenizer.unused_ids)
        # What is not shown is no text, and what is no token has none.
        self.special_token_ids = [i for i in range(size) if i not in visible or i in unused]
        self.tokens = [tokenizer.token_bytes(i) or b"\xff<unused>" for i in range(size)]

    def __call__(self, text: bytes | str) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", errors="replace")
        tokenizer = self._tokenizer()
        return [] if tokenizer is None else tokenizer.encode(text, parse_special=False)


class _Automaton:
    """What recognises a constraint's tokens. It grows while answers use it, and keeps what it was.

    Attributes:
        start: a matcher of llguidance's before the first token.
        users: answers that use it.
    """

    def __init__(self, start: Any):
        self.start = start
        self.users: weakref.WeakSet[Matcher] = weakref.WeakSet()


class _Automata:
    """Those of one constraint.

    Copies of a matcher share its automaton, and llguidance holds its lock for as long as it takes
    to find a mask: 64 masks of one automaton take as long on 16 threads as on one. So answers get
    automata of their own, as far as threads could use them and unless making them takes too long.
    Later answers use them again, with the states that earlier ones have built.

    Args:
        make: the first matcher of a new one.
    """

    def __init__(self, make: Callable[[], Any]):
        self._make, self._lock = make, threading.Lock()
        self._all: list[_Automaton] = []
        self._quick = True

    def begin(self, user: Matcher) -> _Automaton:
        """The one that a new answer is to use."""
        with self._lock:
            free = min(self._all, key=lambda one: len(one.users), default=None)
            if free is None or (free.users and self._quick and len(self._all) < AUTOMATA):
                begun = time.perf_counter()
                free = _Automaton(self._make())
                self._quick = time.perf_counter() - begun < QUICK
                self._all.append(free)
            free.users.add(user)
            return free

    def drop(self, broken: _Automaton) -> None:
        """One that failed an answer, as by growing too large, is to fail no other."""
        with self._lock:
            if broken in self._all:
                self._all.remove(broken)


class _Known:
    """What is made once for a tokenizer, and of it for a constraint."""

    def __init__(self, tokenizer: Tokenizer):
        check_installed()
        from llguidance import LLTokenizer, TokenizerWrapper

        self.stop_ids = frozenset(tokenizer.stop_ids)
        self.words = -(-tokenizer.vocab_size // 32)
        wrapped = TokenizerWrapper(_Vocabulary(tokenizer))
        self._tokenizer = LLTokenizer(wrapped, eos_token=list(tokenizer.stop_ids), slices=SLICES)
        self.automata = functools.lru_cache(maxsize=64)(
            lambda constraint: _Automata(functools.partial(self._begun, constraint))
        )

    def _begun(self, constraint: Constraint) -> Any:
        """A matcher of llguidance's before the first token, which has found its mask once: some
        faults show only then, and what was found is copied along."""
        from llguidance import LLMatcher

        found = LLMatcher(self._tokenizer, _grammar(constraint), log_level=0)
        if not found.get_error():
            mask = np.zeros(self.words, np.uint32)
            found.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        said = [found.get_error(), *found.get_grammar_warnings()]
        if why := next(filter(None, said), ""):
            text = f"The {constraint.kind} can't be used: {_first_line(why)}; correct it."
            raise UserError(f"{constraint.source}: {text}" if constraint.source else text)
        return found


_all_known: "weakref.WeakKeyDictionary[Tokenizer, _Known]" = weakref.WeakKeyDictionary()
_making = threading.Lock()


def _known_of(tokenizer: Tokenizer) -> _Known:
    with _making:
        if tokenizer not in _all_known:
            _all_known[tokenizer] = _Known(tokenizer)
        return _all_known[tokenizer]


def _first_line(why: str) -> str:
    """What llguidance says, without its state and its stack."""
    said = re.split("<state>|<backtrace>", why)[0]
    if said.startswith("NoExtensionBias"):
        said = "nothing fits it"
    return f"{' '.join(said.split()).rstrip('.'):.400}"
