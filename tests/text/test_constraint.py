"""What an answer can't be held to is refused by name, where it is asked for."""

from typing import Any

import pytest

import qwen_jax
from qwen_jax import Constraint, UserError


@pytest.fixture(scope="module")
def model() -> qwen_jax.Model:
    return qwen_jax.load()


@pytest.mark.parametrize(
    "schema, words",
    [
        ({"type": "object", "patternProperties": {"^a": {}}}, "'patternProperties'.*out of #"),
        ({"properties": {"a": {"not": {}}}}, "'not'.*out of #/properties/a"),
        ({"items": {"uniqueItems": True}}, "'uniqueItems'"),
        ({"oneOf": [{"type": "string"}]}, "'oneOf'"),
        ({"if": {}}, "'if'"),
        ({"$defs": {"x": {"dependentRequired": {}}}}, "'dependentRequired'.*#/\\$defs/x"),
        ({"requierd": []}, "did you mean required"),
        ({"type": "string", "format": "regex"}, "#/format is 'regex'"),
        ({"$ref": "https://example.com/a"}, "only '#/"),
        ({"anyOf": {}}, "#/anyOf is {}"),
        ({"properties": []}, "#/properties is"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum \\(5\\) is greater"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
        (
            {"items": {"type": "strng"}},
            "^#/items/type of the JSON schema is 'strng', but it must be",
        ),
        (
            {"enum": []},
            "^#/enum of the JSON schema is \\[\\], but it must be a list of at least one",
        ),
        (
            {"required": "a"},
            "^#/required of the JSON schema is 'a', but it must be a list of texts",
        ),
        ({"minLength": -1}, "^#/minLength of the JSON schema is -1, .* whole number from 0 on"),
        ({"minimum": "3"}, "^#/minimum of the JSON schema is '3', but it must be a number"),
        ({"pattern": 5}, "^#/pattern of the JSON schema is 5, but it must be a text"),
        ({"$ref": "#"}, "nothing fits it"),
    ],
)
def test_refused_schemas(model: qwen_jax.Model, schema: dict[str, Any], words: str) -> None:
    """By name, and before anything is generated."""
    with pytest.raises(UserError, match=words):
        model.request("x", constraint=Constraint.json_schema(schema))


def test_a_property_may_be_called_like_a_keyword(model: qwen_jax.Model) -> None:
    schema = {"type": "object", "properties": {"not": {"type": "null"}}, "required": ["not"]}
    answer = model.generate("x", constraint=Constraint.json_schema(schema), max_tokens=8)
    assert answer.text.startswith('{"not": null')


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Constraint.choice([]), "choice is an empty list; give at least one text"),
        (lambda: Constraint.choice("ab"), "choice is 'ab', but it must be a list of texts"),
        (lambda: Constraint.choice(None), "choice is None, but it must be a list of texts"),
        (lambda: Constraint.choice(5), "choice is 5, but it must be a list of texts"),
        (lambda: Constraint.choice(["a", 5]), "must be a list of texts"),
        (lambda: Constraint.choice(["a", ""]), "choice has an empty text, number 2; leave it out"),
        (lambda: Constraint.choice(["\ud800"]), r"choice: it holds \\ud800, half a character"),
        (lambda: Constraint.regex(5), "^regex is 5, but it must be a text"),
        (lambda: Constraint.regex("\ud800"), r"^regex holds \\ud800, half a character"),
        (lambda: Constraint.lark(b"start: 'a'"), "^lark is b.*, but it must be a text"),
        (
            lambda: Constraint("foo", "x"),
            "^kind is 'foo', but it must be one of json_schema, json_o",
        ),
        (lambda: Constraint("choice", "["), "^choice: it is not JSON"),
        (lambda: Constraint("json_schema", '{"not": {}}'), "^The JSON schema uses 'not'"),
        (lambda: Constraint("json_object", "x"), "^json_object is 'x'; give a json_schema"),
        (lambda: Constraint.json_schema({"const": {1, 2}}), "which is no JSON"),
        (lambda: Constraint.json_schema({"const": "\ud800"}), "half a character"),
        (lambda: Constraint.json_schema("[]"), "must be a JSON object"),
        (lambda: Constraint.json_schema("{"), "not JSON"),
        (lambda: Constraint.regex("[a"), "unclosed character class"),
        (lambda: Constraint.lark("start: foo"), 'unknown name: "foo"'),
    ],
)
def test_refused_constraints(model: qwen_jax.Model, make: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        model.request("x", constraint=make())


def test_a_choice_may_be_any_list() -> None:
    assert Constraint.choice(("a", "b")) == Constraint.choice(iter(["a", "b"]))
