"""What an answer may look like, and which tokens may come next so that it does: by llguidance."""

import dataclasses
import functools
import importlib.util
import json
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt32

from qwen_jax import strict_json
from qwen_jax.errors import UserError
from qwen_jax.text import json_schema
from qwen_jax.text.tokenizer import Tokenizer

Kind = Literal["json_schema", "json_object", "regex", "choice", "lark"]

LAYOUT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as Python writes it: a model that may put white space anywhere may write nothing else."""
_ROOT = "the JSON schema"


@dataclasses.dataclass(frozen=True)
class Constraint:
    """What all of an answer must be. Build one by its class methods.

    Attributes:
        kind: which of them.
        text: the schema, expression, grammar or choices, as JSON where they are objects.
    """

    kind: Kind
    text: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> "Constraint":
        """JSON of a schema. Raises UserError where the schema is none, or uses what is not
        supported, which is named."""
        found = strict_json.parse_object(schema, _ROOT) if isinstance(schema, str) else schema
        if not isinstance(found, Mapping):
            raise UserError(f"{_ROOT} is {found!r:.60}, but it must be an object.")
        json_schema.check(found)
        return cls("json_schema", _as_json(dict(found), _ROOT))

    @classmethod
    def json_object(cls) -> "Constraint":
        """Any object of JSON."""
        return cls("json_object", '{"type": "object"}')

    @classmethod
    def regex(cls, expression: str) -> "Constraint":
        """What a regular expression of Rust's matches, as a whole."""
        return cls("regex", expression)

    @classmethod
    def choice(cls, texts: Sequence[str]) -> "Constraint":
        """One of some texts. Raises UserError where there is none, or one is empty."""
        listed = None if isinstance(texts, str) else list(texts)
        if not listed or not all(isinstance(text, str) and text for text in listed):
            raise UserError(f"choice is {texts!r:.60}, but it must be a list of texts.")
        return cls("choice", _as_json(listed, "choice"))

    @classmethod
    def lark(cls, grammar: str) -> "Constraint":
        """What a grammar in llguidance's variant of Lark derives from `start`."""
        return cls("lark", grammar)


FIELDS: dict[str, tuple[type, ...]] = {
    "json_schema": (dict,),
    "json_object": (bool,),
    "regex": (str,),
    "choice": (list,),
    "lark": (str,),
}
"""How somebody asks for a constraint by name, and the types."""


def constraint_of(given: Mapping[str, Any]) -> Constraint | None:
    """The one that some fields ask for; None, False and () ask for none. Raises UserError where
    several do, or it makes no sense."""
    asked = {k: v for k, v in given.items() if k in FIELDS and v not in (None, False, ())}
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)} exclude each other; give one of them.")
    for name, value in asked.items():
        if name == "json_object":
            return Constraint.json_object()
        made: Constraint = getattr(Constraint, name)(value)
        return made
    return None


class Matcher:
    """One answer under a constraint, while it grows.

    Raises UserError where the constraint makes no sense or llguidance can't do it.
    """

    def __init__(self, constraint: Constraint, tokenizer: Tokenizer):
        from llguidance import LLMatcher

        self._stop_ids = frozenset(tokenizer.stop_ids)
        self._words = -(-tokenizer.vocab_size // 32)
        self._matcher = LLMatcher(_tokenizer(tokenizer), _grammar(constraint), log_level=0)
        said = [self._matcher.get_error(), *self._matcher.get_grammar_warnings()]
        if why := next(filter(None, said), ""):
            first = " ".join(why.split("<state>")[0].split()).rstrip(".")
            raise UserError(f"The {constraint.kind} can't be used: {first:.400}; correct it.")

    @staticmethod
    def fill(
        matchers: Sequence["Matcher"], masks: UInt32[np.ndarray, "B words"]
    ) -> list[str | None]:
        """Sets in each matcher's row of zeros the bits of all tokens that may come next, on several
        threads. Masks may be of more tokens than there are.

        Args:
            matchers: of one tokenizer.

        Returns:
            Of each, None, or why llguidance gives up.
        """
        if not matchers:
            return []
        found = np.zeros((len(matchers), matchers[0]._words), np.uint32)
        asked = [(matcher._matcher, row) for row, matcher in enumerate(matchers)]
        each = found.shape[1] * found.itemsize
        _executor().unsafe_compute_mask_ptr(asked, found.ctypes.data, each, len(found))
        masks[:, : found.shape[1]] = found
        return [matcher._why_not() for matcher in matchers]

    def take(self, token: int) -> None:
        """Goes on behind a token that may come next."""
        if token not in self._stop_ids:
            self._matcher.consume_token(token)

    def _why_not(self) -> str | None:
        if not (why := self._matcher.get_error()):
            return None
        first = " ".join(why.split("<state>")[0].split()).rstrip(".")
        return f"The constraint is too much: {first:.400}; simplify it."


@functools.cache
def _executor() -> Any:
    """The threads that find masks."""
    from llguidance import LLExecutor

    return LLExecutor()


def check_installed() -> None:
    """Raises UserError where there is no llguidance."""
    if importlib.util.find_spec("llguidance") is None:
        raise UserError("llguidance is not installed; install qwen_jax[constrain].")


@functools.lru_cache(maxsize=64)
def _grammar(constraint: Constraint) -> str:
    from llguidance import LLMatcher

    kind, text = constraint.kind, constraint.text
    if kind == "regex":
        return str(LLMatcher.grammar_from_regex(text))
    if kind == "lark":
        return str(LLMatcher.grammar_from_lark(text))
    if kind == "choice":
        options = " | ".join(json.dumps(choice) for choice in json.loads(text))
        return str(LLMatcher.grammar_from_lark(f"start: {options}"))
    return str(LLMatcher.grammar_from_json_schema(text, overrides=LAYOUT))


class _Vocabulary:
    """A tokenizer as llguidance asks for one."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
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
        return self._tokenizer.encode(text, parse_special=False)


_known: "weakref.WeakKeyDictionary[Tokenizer, Any]" = weakref.WeakKeyDictionary()


def _tokenizer(tokenizer: Tokenizer) -> Any:
    """llguidance's of the same tokens, made once."""
    if tokenizer not in _known:
        check_installed()
        from llguidance import LLTokenizer, TokenizerWrapper

        wrapped = TokenizerWrapper(_Vocabulary(tokenizer))
        _known[tokenizer] = LLTokenizer(wrapped, eos_token=list(tokenizer.stop_ids))
    return _known[tokenizer]


def _as_json(value: Any, said: str) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{said} is {value!r:.60}, which is no JSON: {error}.") from error
