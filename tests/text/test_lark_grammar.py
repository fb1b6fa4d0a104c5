"""Settings of a grammar that do nothing are refused by name; others are llguidance's."""

import re

import pytest

from qwen_jax import Constraint, UserError, api
from qwen_jax.serving.tool_calls import forced
from qwen_jax.text.matching import Matcher
from qwen_jax.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return api.load().tokenizer


def follows(tokenizer: Tokenizer, grammar: str, text: str) -> int:
    """How many bytes of a text a grammar takes, its end included."""
    matcher = Matcher(Constraint.lark(grammar), tokenizer)
    single = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    tokens = [single[bytes([byte])] for byte in text.encode()]
    return matcher.follow([*tokens, tokenizer.stop_ids[0]])


@pytest.mark.parametrize(
    "grammar, words",
    [
        (
            "start: x\nx[temperature=0.0]: /a/",
            "line 2 of the grammar gives x a temperature, which d",
        ),
        ("start: x\n\nx [lazy, temperature = 1] : /a/", "line 3 .* gives x a temperature"),
        ("start[capture]: /a/", "line 1 .* gives start a capture, which nothing reads"),
        ('start: x\nx[suffix="q", stop_capture="b"]: /a/', "gives x a stop_capture"),
        ('start: x "!"\nx[stop="q"]: /[a-z]+/', "gives x a stop, .*; give suffix or lazy"),
        ('p::_[capture="a"]: "" %if is_ones([0:3])', "gives p::_ a capture"),
        ('%llguidance {"foo": true}\nstart: "a"', "%llguidance in line 1 .* has 'foo'"),
        ('%llguidance {"no_forcin": true}\nstart: "a"', "did you mean no_forcing"),
        (
            'start: %json {"minItmes": 3}',
            "%json in line 1 .*: .* uses 'minItmes', .* mean minItems",
        ),
        ('start: a\na: %json\n{"patternProperties": {}}', "%json in line 2 .*'patternProperties'"),
        ('start: %json {"items": {"foobar": 1}}', "'foobar'.*out of #/items"),
        ('start: %json {"x-guidance": {"lenient": true}}', "x-guidance of %json .* 'lenient'"),
        ('start: %json {"items": {"x-guidance": {}}}', "'x-guidance'.*out of #/items"),
        ('start: %json {"type": 1, "type": 2}', "the key 'type' appears twice"),
        ('start: %json {"const": 1234567890123456789}', "1234567890123456789, .* rounded"),
        ('start: %json {"type": "strng"}', "#/type of the JSON schema is 'strng'"),
        ('start: "%json" %json []', r"%json in line 1 of the grammar: it is \[\]"),
    ],
)
def test_refused(grammar: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Constraint.lark(grammar)


@pytest.mark.parametrize(
    "grammar, right, wrong",
    [
        ('start: x "!"\nx[max_tokens=3]: /[a-z]+/', "abc!", "abcd!"),
        ('start: x "!"\nx[suffix="q"]: /[a-z]+/', "abq!", "abqq!"),
        ('start: x "!"\nx[lazy]: /[a-z]+q/', "abq!", "abqq!"),
        ('%llguidance {"allow_initial_skip": true}\n%ignore / /\nstart: "a"', " a", "b"),
        ('start: x ["[temperature=1]"]\nx: "a" # b[temperature=1]: c', "a[temperature=1]", "ab"),
        ('start: a | b // a[capture]: "x"\na: /[capture]:/\nb: "%json {"', "%json {", "x"),
        ('start: temperature [capture] "!"\ntemperature: "t"\ncapture: "c"', "tc!", "c!"),
        (
            'start: %json {"x-guidance": {"item_separator": "; "}, "const": [1, 2]}',
            "[1; 2]",
            "[1,2]",
        ),
        ('start: %regex {"substring_words": "the fox"}', "the ", "box"),
        (
            'start: p::0x0\np::_: "" %if is_ones([0:1]) | "a" p::set_bit(0) %if bit_clear(0)',
            "a",
            "aa",
        ),
    ],
)
def test_what_does_something(tokenizer: Tokenizer, grammar: str, right: str, wrong: str) -> None:
    assert follows(tokenizer, grammar, right) == len(right) + 1
    assert follows(tokenizer, grammar, wrong) <= len(wrong)


def test_arguments_that_would_be_rounded_are_refused() -> None:
    """Those of calls of tools are in a grammar, too."""
    wide = {"type": "object", "properties": {"id": {"const": 2**60}}, "additionalProperties": False}
    with pytest.raises(UserError, match=f"{2**60}, which would be rounded"):
        forced([{"name": "f", "parameters": wide}], None, several=False)


def test_a_grammar_that_is_none_is_llguidances_to_tell(tokenizer: Tokenizer) -> None:
    for grammar, words in (
        ("start: %json {", "EOF"),
        ("start: [", "Expected"),
        ("", "Empty grammar"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            follows(tokenizer, grammar, "")
