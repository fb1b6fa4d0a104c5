"""lm-evaluation-harness' words in ours, as lm_eval 0.4.13's `normalize_gen_kwargs` has them."""

from __future__ import annotations

from typing import Any

import pytest

from qwen_jax import lm_eval
from qwen_jax.engine.sampling import Sampling
from qwen_jax.errors import UserError
from qwen_jax.experiments import harness_settings
from qwen_jax.recommended import Recommended


def fails(message: str) -> None:
    pytest.fail(f"warned: {message}")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Sampling(seed=3)),
        ({"temperature": 0.7}, Sampling(0.7, seed=3)),
        ({"temperature": "0.7"}, Sampling(0.7, seed=3)),
        ({"temperature": 0.0}, Sampling(seed=3)),
        ({"do_sample": False}, Sampling(seed=3)),
        ({"do_sample": False, "temperature": 0}, Sampling(seed=3)),
        # transformers' own default, at which it samples.
        ({"do_sample": True}, Sampling(1.0, seed=3)),
        ({"do_sample": True, "temperature": 5, "top_k": 1}, Sampling(5.0, top_k=1, seed=3)),
        ({"top_k": -1, "top_p": None}, Sampling(seed=3)),
        ({"repetition_penalty": 1.3}, Sampling(repetition_penalty=1.3, seed=3)),
        (
            {"temperature": 0.7, "min_p": 0.1, "top_p": 0.9, "seed": 5},
            Sampling(0.7, min_p=0.1, top_p=0.9, seed=5),
        ),
        (
            {"presence_penalty": 1, "frequency_penalty": "0.5", "logit_bias": {"7": -2}},
            Sampling(presence_penalty=1.0, frequency_penalty=0.5, logit_bias={7: -2.0}, seed=3),
        ),
        # What says nothing new, as many tasks do.
        ({"num_beams": 1, "use_cache": True, "num_return_sequences": 1}, Sampling(seed=3)),
    ],
    ids=str,
)
def test_sampling(options: dict[str, Any], expected: Sampling) -> None:
    before = dict(options)
    assert harness_settings.generation(options, seed=3, warn=fails).sampling == expected
    assert options == before


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Sampling(top_k=20, repetition_penalty=1.05)),
        ({"do_sample": True}, Sampling(0.7, top_k=20, repetition_penalty=1.05)),
        ({"temperature": 0.2, "top_k": 5}, Sampling(0.2, top_k=5, repetition_penalty=1.05)),
    ],
    ids=str,
)
def test_what_the_model_recommends(options: dict[str, Any], expected: Sampling) -> None:
    """It fills in what a task leaves open, but whether there are draws is the task's to say."""
    usual = {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.05, "max_tokens": 2048}
    found = harness_settings.generation(options, usual=usual)
    assert found == harness_settings.Settings(256, expected, ())


def test_a_model_that_recommends_nothing() -> None:
    told: list[str] = []
    for choice in ("none", "model"):
        assert harness_settings.followed(Recommended("x.gguf"), choice, told.append) == {}
    (message,) = told
    assert message.startswith("x.gguf recommends no settings, so that generation_config=model")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 9),
        ({"max_gen_toks": 5}, 5),
        ({"max_new_tokens": "5"}, 5),
        ({"max_tokens": 5.0, "max_completion_tokens": 5}, 5),
    ],
    ids=str,
)
def test_the_most_tokens(options: dict[str, Any], expected: int) -> None:
    assert harness_settings.generation(options, max_tokens=9).max_tokens == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ()),
        ({"until": None}, ()),
        ({"until": "\n"}, ("\n",)),
        ({"until": ["\n\n", "", "<|im_end|>"]}, ("\n\n", "<|im_end|>")),
        ({"until": ["a"], "stop": ["b", "a"], "stop_strings": "c"}, ("a", "b", "c")),
    ],
    ids=str,
)
def test_stops(options: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert harness_settings.generation(options).stop == expected


def test_stop_ids() -> None:
    found = harness_settings.generation({"stop_token_ids": [7, "8"], "stop_ids": 7})
    assert found.stop_ids == (7, 8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_gen_toks": 512, "max_new_tokens": 5}, "max_gen_toks=512 and max_new_tokens=5 mean"),
        ({"max_gen_toks": 0}, "max_gen_toks is 0, but it must be at least 1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5, but it must be a whole number"),
        ({"temprature": 1}, "temprature=1 is not supported; did you mean temperature?"),
        ({"guidance": {"regex": "a"}}, "there are max_gen_toks, max_new_tokens"),
        ({"max_length": 64}, "max_length=64 is not supported"),
        ({"num_beams": 4}, "num_beams=4 is not supported, only num_beams=1"),
        ({"do_sample": "yes"}, "do_sample is 'yes', but it must be true or false"),
        ({"temperature": "hot"}, "temperature is 'hot', but it must be a number"),
        ({"temperature": -1}, "sampling.temperature is -1"),
        ({"temperature": float("nan")}, "sampling.temperature is nan"),
        ({"seed": True}, "seed is True, but it must be a whole number"),
        ({"seed": float("inf")}, "seed is inf, but it must be a whole number"),
        ({"top_p": 0.0}, "sampling.top_p is 0.0"),
        ({"until": 7}, "until is 7, but it must be a text or a list of texts"),
        ({"until": ["a", None]}, "but it must be a text or a list of texts"),
        ({"stop_token_ids": ["a"]}, "A token of stop_token_ids is 'a', but it must be a whole"),
        ({"logit_bias": [1]}, "logit_bias is [1], but it must map tokens to numbers"),
    ],
    ids=str,
)
def test_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        harness_settings.generation(options)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"do_sample": False, "temperature": 0.7}, "temperature=0.7 does nothing"),
        ({"do_sample": True, "temperature": 0.0}, "do_sample=True does nothing"),
    ],
    ids=str,
)
def test_contradictions_are_greedy(options: dict[str, Any], words: str) -> None:
    told: list[str] = []
    found = harness_settings.generation(options, warn=told.append)
    assert found.sampling.temperature == 0 and words in told[0]


def test_overrides_win_whatever_the_name() -> None:
    task = {"max_new_tokens": 512, "until": ["\n"], "stop": "x", "do_sample": False, "top_k": 4}
    by = {"max_gen_toks": 5, "temperature": 0.7, "do_sample": True, "until": ["q"]}
    found = harness_settings.generation(harness_settings.overridden(task, by))
    expected = harness_settings.Settings(5, Sampling(0.7, top_k=4), ("q",))
    assert found == expected


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((4, None), 4),
        (("4", None), 4),
        (("auto", None), None),
        (("auto:4", 5), 5),
        (("auto", "5"), 5),
        # A CPU makes good use of 8.
        (("auto", 16), 8),
    ],
    ids=str,
)
def test_slots(sizes: tuple[Any, Any], expected: int | None) -> None:
    assert harness_settings.slots(*sizes) == expected


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (("many", None), "batch_size is 'many', but it must be a whole number"),
        ((0, None), "batch_size is 0"),
        ((-1, None), "batch_size is -1"),
        ((8, 64), "max_batch_size=64 needs batch_size=auto, but it is 8"),
        (("auto", 0), "max_batch_size is 0"),
    ],
    ids=str,
)
def test_slots_refused(sizes: tuple[Any, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        harness_settings.slots(*sizes)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dtyp", "no argument dtyp; did you mean dtype?"),
        ("load_in_4bit", "no argument load_in_4bit; there are "),
        ("apply_chat_template", "give lm_eval --apply_chat_template"),
        ("progress", "no argument progress"),
    ],
)
def test_arguments_refused(name: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        harness_settings.check_arguments([name], ["batch_size", "max_length"])
    assert words in str(error.value)
    harness_settings.check_arguments(["dtype", "matmul_precision", "sha256"], [])


def test_arguments_and_flags() -> None:
    flags = {"batch_size": "auto", "max_batch_size": None, "device": "cuda:0"}
    found = harness_settings.joined({"dtype": "float32"}, flags)
    assert found == {"dtype": "float32", "batch_size": "auto", "device": "cuda:0"}
    with pytest.raises(UserError, match="give lm_eval --batch_size=16"):
        harness_settings.joined({"batch_size": 16}, {"batch_size": 1})


def test_without_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert lm_eval.main() == 2
    said = "error: lm-evaluation-harness is not installed; install qwen_jax[eval].\n"
    assert capsys.readouterr() == ("", said)


def test_devices() -> None:
    told: list[str] = []
    for name in (None, "cpu", "cuda:0"):  # The last is what lm_eval says where nobody does.
        harness_settings.check_device(name, told.append)
    assert told == ["JAX runs on the cpu, not on lm_eval's cuda:0."]
    with pytest.raises(UserError, match="device is 'cuda:1', but JAX runs on the cpu"):
        harness_settings.check_device("cuda:1", fails)
