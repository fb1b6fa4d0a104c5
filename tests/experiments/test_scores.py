"""Scores, by hand; and answers judged again from records."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.errors import UserError
from qwen_jax.experiments import scores
from qwen_jax.prompts import Item
from tests.experiments.conftest import lines


def judged(name: str, texts: list[str], **fields: Any) -> dict[str, float]:
    item = Item("x", {}, "here", fields=fields)
    scores.check_fields([name], item)
    samples = [{"text": text, "tokens": [1, 2], "finish_reason": "stop"} for text in texts]
    return scores.judged([scores.score(name)], item, samples)


@pytest.mark.parametrize(
    ("name", "texts", "fields", "expected"),
    [
        ("exact", ["four", "Four", "4"], {"answer": ["four", 4]}, {"exact": 2 / 3}),
        ("match", [" FOUR\n", "five"], {"answer": "four"}, {"match": 0.5}),
        ("normalised", ["The  Cat!", "cats"], {"answer": "a cat"}, {"normalised": 0.5}),
        ("contains", ["Snow and Ice", "snow"], {"contains": ["snow", "ice"]}, {"contains": 0.5}),
        ("regex", ["a1", "b"], {"regex": r"\d$"}, {"regex": 0.5}),
        (
            "number",
            ["2 + 2 = 4.0", "it is -4", "none", "1,004 is too much, so 4."],
            {"answer": "4"},
            {"number": 0.5, "number_given": 0.75},
        ),
        ("number", ["so $1,234,567.50."], {"answer": 1234567.5}, {"number": 1, "number_given": 1}),
        (
            "choice",
            ["(B) it is", "A dog? The answer is **C**.", "B or C", "Clearly B, I think", "b"],
            {"answer": "b"},
            {"choice": 0.4, "choice_given": 0.6},
        ),
        (
            "json",
            ['{"a": 1}', "```json\n[1]\n```", "a", "NaN", '{"a": 1, "a": 2}'],
            {},
            {"json": 0.4},
        ),
        (
            "repetition",
            ["a b c d e", "a b c d a b c d", "x\nx\nx"],
            {},
            {"repetition": 0.2 / 3, "stuck": 1 / 3},
        ),
        ("length", ["ab c\n\nd"], {}, {"letters": 7, "words": 3, "lines": 2, "tokens": 2}),
    ],
)
def test_by_hand(
    name: str, texts: list[str], fields: dict[str, Any], expected: dict[str, float]
) -> None:
    assert judged(name, texts, **fields) == pytest.approx(expected)


def test_json_of_a_schema() -> None:
    pytest.importorskip("jsonschema")
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
    texts = ['{"a": 1}', '{"a": "x"}', "[]", "null"]
    assert judged("json_schema", [*texts, "no"], schema=schema) == {"json": 0.8, "json_schema": 0.2}
    with pytest.raises(UserError, match="here: schema is no JSON Schema: 'x' is not valid"):
        judged("json_schema", texts, schema={"type": "x"})


def test_edit_distance_is_levenshteins() -> None:
    pytest.importorskip("rapidfuzz")
    found = judged("edit_distance", ["kitten", "sitting"], answer=["sitting", "zzzzzzzzz"])
    assert found == {"edit_distance": 3 / 7 / 2}


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("match", {}, "here has no field 'answer', which the score asks for; add it."),
        ("match", {"answer": {"a": 1}}, "answer is {'a': 1}, but the score asks for a text"),
        ("contains", {"contains": []}, "contains is \\[\\], but"),
        ("number", {"answer": "four"}, "answer is 'four', but the score number asks for a number"),
        ("choice", {"answer": "BC"}, "answer is 'BC', but the score choice asks for a letter"),
        ("regex", {"regex": "("}, "regex is '\\(', which is no regular expression: missing"),
        ("regex", {"regex": 3}, "regex is 3, which is no regular expression"),
    ],
)
def test_lines_that_a_score_can_not_judge_by(name: str, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        judged(name, ["x"], **fields)


@given(st.text(max_size=80))
def test_any_text_has_scores_from_0_to_1(text: str) -> None:
    for name in ("exact", "match", "normalised", "contains", "regex", "json", "repetition"):
        found = judged(name, [text, text], answer="B", contains="B", regex="B")
        assert all(0 <= value <= 1 for value in found.values())
    for name, answer in (("number", "4"), ("choice", "B")):
        assert all(0 <= v <= 1 for v in judged(name, [text], answer=answer).values())


@pytest.fixture
def answered(experiment: Callable[..., list[str]], run: Callable, tmp_path: Path) -> list[str]:
    """The command of an experiment that has run: two temperatures, three prompts, two samples."""
    words = tmp_path / "words.jsonl"
    held = ({"id": w, "word": w, "contains": w[0]} for w in ("snow", "fern", "crow"))
    words.write_text("".join(json.dumps(line) + "\n" for line in held))
    argv = experiment(
        'axis("sampling.temperature", [0.7, 1.5])',
        f"config.prompt_file = {str(words)!r}; config.experiment.template = 'haiku: {{word}}'; "
        "config.experiment.task = 'generate'; config.experiment.scores = ('haiku',); "
        "config.n = 2; config.max_tokens = 24; config.batch_invariant = False",
    )
    assert run(*argv).code == 0
    return argv


@pytest.mark.usefixtures("loaded")
def test_answers_are_judged_again_from_their_records(
    answered: list[str], run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = tmp_path / "w"
    outputs, before = (w / "outputs.jsonl").read_bytes(), lines(w / "scores.jsonl")
    monkeypatch.setattr("qwen_jax.api.load", lambda *args, **kwargs: pytest.fail("it was loaded"))
    (w / "scores.jsonl").unlink()  # as of older records
    assert run("score", str(w)).code == 0
    assert lines(w / "scores.jsonl") == before
    result = run("score", str(w), "--scores=contains", "--scores=length", "--metric=contains")
    assert result.code == 0 and result.out.startswith("On contains ")
    assert (w / "outputs.jsonl").read_bytes() == outputs
    after = lines(w / "scores.jsonl")
    new = {"contains", "letters", "words", "lines", "tokens"}
    assert [line["scores"].keys() for line in after] == [{*b["scores"], *new} for b in before]
    texts: dict[tuple[str, int], list[str]] = {}
    for line in lines(w / "outputs.jsonl"):
        texts.setdefault((line["point"], line["row"] // 2 * 2), []).append(line["text"].lower())
    for line in after:
        held = [line["id"][0] in text for text in texts[line["point"], line["unit"]]]
        assert line["scores"]["contains"] == sum(held) / 2
    # The same command has nothing left to do, and the scores stay.
    assert "contains" in run(*answered).out


@pytest.mark.usefixtures("loaded")
def test_what_can_not_be_judged_again(
    answered: list[str], refuses: Callable[..., None], tmp_path: Path
) -> None:
    w = str(tmp_path / "w")
    refuses(["score"], "There is nothing to score; name a workdir")
    refuses(["score", str(tmp_path)], "holds no experiment")
    refuses(["score", w, "--scores=number"], "line 1 has no field 'answer', which the score asks")
    refuses(["score", w, "--scores=judge"], "names no scores that need no model")
    refuses(["score", w, "--scores=nothing"], "is none of choice, contains,")
    words = tmp_path / "words.jsonl"
    whole = words.read_text()
    words.write_text(whole.replace("fern", "moss"))
    refuses(["score", w], "words.jsonl is not the file that", "restore it to judge them")


@pytest.mark.usefixtures("loaded")
def test_points_without_answers(
    experiment: Callable[..., list[str]], run: Callable, refuses: Callable, tmp_path: Path
) -> None:
    run(*experiment('axis("n", [1, 2])'))
    refuses(["score", str(tmp_path / "w")], "has no finished point with answers to judge")
