"""Settings that are in force, and a warning for those that do nothing."""

import pytest

from qwen_jax import prompts
from qwen_jax.engine.sampling import Sampling
from qwen_jax.in_force import describe, warn_of_greedy
from qwen_jax.prompts import Item


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        (Sampling(), "greedy"),
        (Sampling(top_p=0.9, seed=3, repetition_penalty=1.1), "greedy, repetition_penalty 1.1"),
        (Sampling(temperature=0.8), "temperature 0.8, seed 0"),
        (Sampling(temperature=1, min_p=0.1, seed=3), "temperature 1, min_p 0.1, seed 3"),
    ],
)
def test_only_what_is_in_force_is_described(sampling: Sampling, words: str) -> None:
    assert describe(sampling) == words


def test_seeds_that_are_drawn_are_not_named() -> None:
    """As by a server, of whatever seed the settings are: nobody gets that one unasked."""
    assert describe(Sampling(seed=3), drawn=True) == "greedy"
    hot = Sampling(temperature=1.0, top_p=0.9)
    assert describe(hot, drawn=True) == "temperature 1.0, top_p 0.9, a new seed each time"


@pytest.mark.parametrize(
    ("idle", "n", "words"),
    [
        ({"seed"}, 1, ["seed does nothing"]),
        ({"seed", "top_p", "max_tokens"}, 1, ["top_p and seed do nothing"]),
        (set(), 3, ["all 3 samples of a prompt are equal"]),
        ({"top_k"}, 2, ["top_k does nothing, and all 2 samples of a prompt are equal"]),
        ({"temperature", "stop"}, 1, []),
    ],
)
def test_the_warning(
    idle: set[str], n: int, words: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_greedy(idle, n)
    begin, end = "The temperature is 0, so answers are greedy: ", "; set a temperature."
    assert caplog.messages == [f"{begin}{text}{end}" for text in words]


@pytest.mark.parametrize(
    ("temperatures", "own", "words"),
    [
        ([0, 0], {}, ["top_p does nothing, and all 2 samples"]),
        ([0, 0], {"seed": 5}, ["top_p and seed do nothing, and all 2 samples"]),
        # Some answers are drawn: what the config says is of use, a greedy line's own seed is not.
        ([0, 1], {}, []),
        ([0, 1], {"seed": 5}, ["seed does nothing;"]),
        ([0, 1], {"n": 3}, ["all 3 samples of a prompt are equal;"]),
        ([1, 1], {"seed": 5}, []),
    ],
)
def test_of_several_prompts(
    temperatures: list[float],
    own: dict[str, int],
    words: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    items = [Item("a", {"sampling": Sampling(temperature=t)}, "here") for t in temperatures]
    items.append(Item("b", items[0].options, "here", own=own))
    prompts.warn_of_idle(items, {"sampling.top_p", "max_tokens"}, 2)
    assert len(caplog.messages) == len(words)
    assert all(word in text for word, text in zip(words, caplog.messages, strict=True))
