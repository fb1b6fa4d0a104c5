"""Numbers that a float can't hold come out as the schema has them, or are refused by name."""

import json
from typing import Any

import hypothesis.strategies as st
import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from qwen_jax import Constraint, UserError, api
from qwen_jax.text import exact_json, json_numbers
from qwen_jax.text.json_schema import LAYOUT
from qwen_jax.text.matching import SLICES, Matcher
from qwen_jax.text.tokenizer import Tokenizer
from tests.random_schemas import any_of, arrays

ID = 1234567890123456789
PLACE = 1 << 53


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return api.load().tokenizer


def takes(tokenizer: Tokenizer, schema: dict[str, Any], text: str) -> bool:
    """Whether an answer may be this text, byte by byte."""
    matcher = Matcher(Constraint.json_schema(schema), tokenizer)
    single = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    tokens = [single[bytes([byte])] for byte in text.encode()]
    stopped = [*tokens, tokenizer.stop_ids[0]]
    return matcher.follow(stopped) == len(stopped)


def drawn(tokenizer: Tokenizer, schema: dict[str, Any], seed: int) -> Any:
    """What tokens that are allowed make, drawn one by one."""
    rng, text, stops = np.random.default_rng(seed), b"", set(tokenizer.stop_ids)
    matcher, mask = Matcher(Constraint.json_schema(schema), tokenizer), np.zeros((1, 64), np.uint32)
    for _ in range(1000):
        assert Matcher.fill([matcher], mask) == [None]
        ids = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
        if stops & set(ids) and (len(ids) == len(stops) or rng.random() < 0.5):
            return json.loads(text)
        token = int(rng.choice([i for i in ids if i not in stops]))
        text += tokenizer.token_bytes(token)
        Matcher.take([matcher], [[token]])
    pytest.fail(f"{text!r} never ends")


def closed(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


_WIDE = st.integers(-(2**64), 2**64) | st.integers(PLACE - 9, PLACE + 9) | st.integers(-99, 99)
_VALUES = _WIDE | st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from(["a", None])
_LITERAL = _VALUES | st.lists(_VALUES, max_size=2) | st.dictionaries(st.text(max_size=2), _VALUES)


def _range(low: int, width: int, exclusive: bool) -> dict[str, Any]:
    if exclusive:
        return {"type": "integer", "exclusiveMinimum": low - 1, "exclusiveMaximum": low + width + 1}
    return {"type": "integer", "minimum": low, "maximum": low + width}


_LEAF = st.one_of(
    st.builds(lambda value: {"const": value}, _LITERAL),
    st.builds(lambda values: {"enum": values, "title": "x"}, st.lists(_LITERAL, min_size=1)),
    st.builds(_range, _WIDE, st.integers(0, 10**6) | st.integers(0, 2**64), st.booleans()),
    st.builds(lambda low: {"type": "integer", "minimum": low}, _WIDE),
    st.builds(lambda high: {"type": "integer", "maximum": high}, _WIDE),
    st.just({"type": "string", "maxLength": 3}),
    st.just({"$ref": "#/$defs/id"}),
)


def _within(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    properties = st.dictionaries(st.text('ab/~"é$', min_size=1, max_size=3), inner, max_size=3)
    objects = st.builds(
        lambda held, count: closed(tuple(held)[:count], **held), properties, st.integers(0, 3)
    )
    return objects | arrays(inner) | any_of(inner)


@given(st.recursive(_LEAF, _within, max_leaves=5), st.integers(0, 2**32))
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_is_allowed_fits(tokenizer: Tokenizer, schema: dict[str, Any], seed: int) -> None:
    """Against jsonschema, whose integers are Python's."""
    whole = schema | {"$defs": {"id": {"enum": [ID, ID + 1, "none"]}}}
    jsonschema.validate(drawn(tokenizer, whole, seed), whole)


@given(_WIDE | st.none(), _WIDE | st.none(), st.lists(_WIDE, max_size=6))
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
def test_bounds_let_through_what_is_within(
    tokenizer: Tokenizer, low: int | None, high: int | None, others: list[int]
) -> None:
    """And nothing beside; by Python's own comparison."""
    if low is not None and high is not None and low > high:
        low, high = high, low
    schema: dict[str, Any] = {"type": "integer", "minimum": low, "maximum": high}
    schema = {name: value for name, value in schema.items() if value is not None}
    ends = [end + near for end in (low, high) if end is not None for near in (-1, 0, 1)]
    for number in [*ends, *others, 0]:
        within = (low is None or low <= number) and (high is None or number <= high)
        assert takes(tokenizer, schema, str(number)) == within, (schema, number)


class Words:
    """A vocabulary of bytes and of tokens that reach from one value of JSON into the next."""

    eos_token_id, bos_token_id, special_token_ids = 256, None, (256,)
    tokens = (
        *(bytes([byte]) for byte in range(256)),
        b"<end>",
        *(b'", "', b'": ', b'"}', b', "b', b'5, "', b'"], "', b'x", "b": 1', b'{"', b'{"a": "x'),
        *(b'["', b'", ', b", 1", b"12345}", b"12345, ", b"], ", b"}]", b'"]', b'": 12', b"1}"),
    )

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


@pytest.mark.parametrize(
    "schema",
    [
        closed(("b",), a={"type": "string", "maxLength": 4}, b={"const": 12345}, c={"enum": ["x"]}),
        {
            "type": "array",
            "maxItems": 4,
            "items": {"anyOf": [{"const": 12345}, {"type": "string"}]},
        },
        closed(
            ("a",),
            k={"type": "array", "items": {"type": "number"}},
            a=closed(
                ("b",), b={"const": 1}, c={"type": "integer", "minimum": -50, "maximum": 2000}
            ),
            b={"type": "string", "pattern": "^[a-f]{2,9}$"},
        ),
    ],
)
def test_masks_are_those_of_llguidances_own(
    schema: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of numbers that it keeps, of which we say that it doesn't, token by token."""
    monkeypatch.setattr(json_numbers, "_WHOLE", -1)
    written = exact_json.grammar(schema)
    assert written is not None
    words = LLTokenizer(TokenizerWrapper(Words()), eos_token=[256], slices=SLICES)
    grammars = (
        LLMatcher.grammar_from_json_schema(schema, overrides=LAYOUT),
        LLMatcher.grammar_from_lark(written),
    )
    wide = 0
    for seed in range(25):
        rng = np.random.default_rng(seed)
        matchers = [LLMatcher(words, grammar, log_level=0) for grammar in grammars]
        for _ in range(60):
            masks = np.zeros((2, -(-len(Words.tokens) // 32)), np.uint32)
            for matcher, mask in zip(matchers, masks, strict=True):
                matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
                assert not matcher.get_error()
            assert (masks[0] == masks[1]).all()
            bits = np.unpackbits(masks[0].view(np.uint8), bitorder="little")[: len(Words.tokens)]
            end, bits[256] = bits[256], 0
            if not bits.any() or (end and rng.random() < 0.5):
                break
            likely = np.flatnonzero(bits[257:]) + 257
            near = [i for i in np.flatnonzero(bits[:128]) if chr(i) in '"{}[],: abcx12345-']
            some = likely if len(likely) and rng.random() < 0.5 else near
            token = int(rng.choice(some if len(some) else np.flatnonzero(bits)))
            wide += token > 256
            for matcher in matchers:
                matcher.consume_token(token)
    assert wide > 20


@pytest.mark.parametrize(
    "schema, right, wrong",
    [
        (closed(("id",), id={"enum": [ID]}), f'{{"id": {ID}}}', f'{{"id": {ID - 21}}}'),
        ({"const": 2**64 - 1, "type": "integer"}, f"{2**64 - 1}", f"{2**63 - 1}"),
        (
            {"minimum": PLACE + 1, "maximum": PLACE + 1, "type": "integer"},
            f"{PLACE + 1}",
            f"{PLACE}",
        ),
        ({"type": "integer", "exclusiveMinimum": PLACE + 2}, f"{PLACE + 3}", f"{PLACE + 2}"),
        ({"type": "integer", "minimum": -(2**63)}, f"{-(2**63)}", f"{-(2**63) - 1}"),
        ({"type": "integer", "maximum": 2**64 - 1}, f"{2**64 - 1}", f"{2**64}"),
        ({"const": 123456789.12345679}, "123456789.12345679", "123456789.1234568"),
        ({"const": 5.36653349168237e16}, "5.36653349168237e+16", "53665334916823700"),
        ({"const": 1e300}, "1e+300", f"1{'0' * 300}"),
        ({"type": ["integer", "null"], "enum": [ID, None, "x", 2.5]}, f"{ID}", '"x"'),
        ({"enum": [ID, 7], "const": ID}, f"{ID}", "7"),
        ({"type": "array", "items": {"const": ID}, "maxItems": 1}, "[]", f"[{ID}, {ID}]"),
    ],
)
def test_exactly(tokenizer: Tokenizer, schema: dict[str, Any], right: str, wrong: str) -> None:
    assert takes(tokenizer, schema, right) and not takes(tokenizer, schema, wrong)


def test_definitions_may_hold_themselves(tokenizer: Tokenizer) -> None:
    node = closed(("id",), id={"$ref": "#/$defs/id"}, next={"$ref": "#/$defs/node"})
    schema = {"$defs": {"id": {"const": ID}, "node": node}, "$ref": "#/$defs/node"}
    assert takes(tokenizer, schema, f'{{"id": {ID}, "next": {{"id": {ID}}}}}')
    assert not takes(tokenizer, schema, f'{{"next": {{"id": {ID}}}}}')


def test_references_are_found_as_llguidance_finds_them(tokenizer: Tokenizer) -> None:
    """Escaped or not; what there is not is told by it."""
    definitions = {"a/b": {"const": ID}, "c d": {"const": 7}}
    for reference, right in (("a~1b", ID), ("c%20d", 7)):
        for name in ("$defs", "%24defs"):
            schema = {"$ref": f"#/{name}/{reference}", "$defs": definitions}
            assert takes(tokenizer, schema, str(right)), reference
    for reference in ("#/$defs/x", "#x", "#/anyOf/9"):
        asked = Constraint.json_schema({"anyOf": [{"const": 5}, {"$ref": reference}]})
        with pytest.raises(UserError, match=r"The json_schema can't be used: .* does not exist"):
            Matcher(asked, tokenizer)


def test_what_llguidance_keeps_is_left_to_it() -> None:
    """An unused definition changes nothing, nor does a bound that it knows."""
    for schema in (
        {"type": "object", "properties": {"a": {"const": PLACE - 1}, "b": {"const": 0.1}}},
        {"type": "string", "$defs": {"id": {"const": ID}}},
        {"type": "object", "properties": {"a": {"type": "integer", "maximum": 2**63 - 1}}},
    ):
        assert exact_json.grammar(schema) is None


@pytest.mark.parametrize(
    "schema, words",
    [
        (
            {"type": "object", "properties": {"a": {"const": ID}}},
            "set additionalProperties of # to",
        ),
        (
            {"allOf": [{"const": ID}]},
            f"the number {ID}, .* leave allOf out of #, or make it a text",
        ),
        ({"type": "array", "prefixItems": [{"const": ID}]}, "leave prefixItems out of #"),
        ({"const": ID, "minLength": 3}, "leave minLength out of #"),
        ({"type": "integer", "minimum": ID, "multipleOf": 3}, "leave multipleOf out of #"),
        (closed(("b",), a={"const": ID}), "make 'b', which # requires, a property"),
        ({"anyOf": [{"const": ID}, False]}, "leave #/anyOf/1, which is false, out"),
        ({"type": "string", "const": ID}, "# of the JSON schema lets no value through"),
        ({"type": "integer", "minimum": ID, "maximum": 3}, "# of the .* no integer between its"),
        (
            {"anyOf": [{"const": ID}, {"$ref": "#/anyOf/1"}]},
            "let each \\$ref of #/anyOf/1 be to som",
        ),
        (
            {"type": "number", "minimum": ID},
            "#/minimum of the JSON schema is 1234.* would be rounded",
        ),
        ({"items": {"maximum": 123456789.12345679}}, "#/items/maximum .* would be rounded"),
        ({"exclusiveMaximum": True}, "#/exclusiveMaximum .* says nothing without maximum; give a"),
        ({"multipleOf": 0}, "#/multipleOf of the JSON schema is 0; give"),
        ({"multipleOf": 429496730}, "#/multipleOf .* is 429496730, of more digits"),
        ({"multipleOf": 0.07}, "#/multipleOf .* is 0.07, of more digits"),
        ({"allOf": [{"multipleOf": 65536}, {"multipleOf": 65537}]}, "too many digits together"),
    ],
)
def test_refused(schema: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Constraint.json_schema(schema)


def test_multiples_that_are_held_to(tokenizer: Tokenizer) -> None:
    for multiple, right, wrong in (
        (0.01, "0.07", "0.075"),
        (-3, "6", "7"),
        (65537, "655370", "655371"),
    ):
        schema = {"type": "number", "multipleOf": multiple}
        assert takes(tokenizer, schema, right) and not takes(tokenizer, schema, wrong)
    schema = {"allOf": [{"type": "integer", "multipleOf": 99}, {"multipleOf": 101}]}
    assert takes(tokenizer, schema, "99990") and not takes(tokenizer, schema, "9900")


@pytest.mark.parametrize("number", [0, -0.0, 2.5, 1e15, -(2**53) + 1, 1e-22, 9007199254740.5])
def test_kept(number: float, tokenizer: Tokenizer) -> None:
    assert json_numbers.is_kept(number)
    assert drawn(tokenizer, {"const": number}, 0) == number
