"""Sampling settings: what they make a compiled step contain, and which ones are refused."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from qwen_jax.engine.sampling import Plan, RowParameters, Sampling, plan_rows
from qwen_jax.errors import UserError


@pytest.mark.parametrize(
    ("settings", "needs"),
    [
        ({}, ""),
        ({"seed": 3, "top_k": 5, "top_p": 0.5, "min_p": 0.5}, ""),  # greedy looks at none of it
        ({"temperature": 0.1}, "draws"),
        ({"temperature": 1, "top_k": 1, "top_p": 0.9, "min_p": 0.1}, "draws"),  # as data
        ({"repetition_penalty": 1.1}, "penalties"),
        ({"presence_penalty": -1}, "penalties"),
        ({"frequency_penalty": 0.1}, "penalties"),
        ({"logit_bias": {0: 1.0}}, "bias"),
    ],
    ids=str,
)
def test_a_plan_has_what_some_row_needs(settings: dict[str, Any], needs: str) -> None:
    plan, _ = plan_rows([Sampling(), Sampling(**settings)], 4)
    assert {name for name in Plan._fields if getattr(plan, name)} == set(needs.split())
    assert hash(plan) == hash(plan_rows([Sampling(**settings), Sampling()], 4)[0])


def test_plan_of_logprobs() -> None:
    """One program for any number up to 20."""
    for asked in ({"logprobs": True}, {"top_logprobs": 3}, {"top_logprobs": 20}):
        assert plan_rows([Sampling()], 151_936, **asked)[0] == Plan(logprobs=20)
    assert plan_rows([Sampling()], 50, top_logprobs=30)[0] == Plan(logprobs=30)


def test_every_setting_has_its_column() -> None:
    row = Sampling(0.5, 3, 0.7, 0.1, 1.2, 0.3, 0.4, {1: 2.0}, seed=2**32 - 1)
    params: RowParameters = plan_rows([row], 4, top_logprobs=2)[1]
    columns = [np.asarray(x).item() for x in params.settings]
    floor = math.log(0.1)
    assert columns == pytest.approx(
        [0.5, 3, 1 - 0.7, floor, 1.2, 0.3, 0.4, 1, 0, 2**32 - 1, 2], rel=1e-6
    )
    np.testing.assert_array_equal(params.bias, [[0, 2, 0, 0]])


def refusal(**settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        Sampling(**settings)
    return str(caught.value)


IMPOSSIBLE: Mapping[str, Sequence[Any]] = {
    "temperature": [-0.1, math.nan, math.inf, 1e39, 1e-39],
    "top_k": [-1, 2**31],
    "top_p": [0, -1, 1.01, math.nan],
    "min_p": [-0.1, 1.1, math.nan],
    "repetition_penalty": [0, -1, math.inf, math.nan, 1e39, 1e-50],
    "presence_penalty": [math.inf, math.nan, 1e39],
    "frequency_penalty": [-math.inf, math.nan, -1e39],
    "logit_bias": [{3: math.nan}, {3: math.inf}, {3: -1e39}],
    "seed": [-1, 2**32],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in IMPOSSIBLE for value in IMPOSSIBLE[name]]
)
def test_impossible_settings_are_refused(name: str, value: Any) -> None:
    message = refusal(**{name: value})
    assert message.startswith(f"sampling.{name} is {value}, but it must be ")
    assert message.endswith(".") and "\n" not in message


def test_a_biased_token_outside_the_vocabulary_is_refused() -> None:
    for token in (-1, 4):
        with pytest.raises(UserError, match=f"names token {token}, but the vocabulary has 4"):
            plan_rows([Sampling(), Sampling(logit_bias={token: 1.0})], 4)


@pytest.mark.parametrize("top", [-1, 5])
def test_more_top_logprobs_than_tokens_are_refused(top: int) -> None:
    with pytest.raises(UserError, match=f"top_logprobs is {top}, but"):
        plan_rows([Sampling()], 4, top_logprobs=top)


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("seed", 1.5, "a whole number"),
        ("top_k", True, "a whole number"),
        ("top_p", "1", "a number"),
    ],
)
def test_values_of_another_type_are_refused(field: str, value: object, kind: str) -> None:
    with pytest.raises(UserError, match=f"sampling.{field} is .*must be {kind}"):
        Sampling(**{field: value})  # type: ignore[arg-type]
