"""Sampling settings: what they make a compiled step contain, and which ones are refused."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import pytest

from pallas_kernels.sample_tokens import settings
from pallas_kernels.sample_tokens.mosaic_gpu import MOST_TOP
from qwen_jax.engine.rows import FIELDS, FRESH, Rows, pack_rows, unpacked
from qwen_jax.engine.sampling import Plan, Sampling, check_bias, settings_of
from qwen_jax.errors import UserError


@pytest.mark.parametrize(
    ("settings", "sampled"),
    [
        ({}, False),
        # Greedy looks at none of it.
        ({"seed": 3, "top_k": 5, "top_p": 0.5, "min_p": 0.5}, False),
        ({"temperature": 0.1}, True),
        ({"temperature": 1, "top_k": 1, "top_p": 0.9, "min_p": 0.1}, True),
        ({"repetition_penalty": 1.1}, True),
        ({"presence_penalty": -1}, True),
        ({"frequency_penalty": 0.1}, True),
        ({"logit_bias": {0: 1.0}}, True),
    ],
    ids=str,
)
def test_a_plan_has_what_some_row_needs(settings: dict[str, Any], sampled: bool) -> None:
    """There are two: one row that asks for something is enough for all that any may ask for."""
    rows = [(Sampling(), None), (Sampling(**settings), None)]
    expected = Plan(True, 20) if sampled else Plan()
    assert Plan.of(rows, 100) == Plan.of(rows[::-1], 100) == expected
    assert hash(Plan.of(rows, 100)) == hash(expected)


def test_plan_of_logprobs() -> None:
    """One program for any number up to 20, one for what the kernel has room for, one for all."""
    for asked in (0, 1, 20):
        assert Plan.of([(Sampling(), None), (Sampling(), asked)], 151_936) == Plan(True, 20)
    for asked in (21, MOST_TOP):
        assert Plan.of([(Sampling(), 3), (Sampling(), asked)], 151_936) == Plan(True, MOST_TOP)
    for asked in (MOST_TOP + 1, 151_936, 10**6):
        assert Plan.of([(Sampling(), asked)], 151_936) == Plan(True, 151_936)
    # A vocabulary that ends before.
    assert Plan.of([(Sampling(), 61)], 61) == Plan(True, MOST_TOP)


def test_every_setting_has_its_number() -> None:
    row = Sampling(0.5, 3, 0.7, 0.1, 1.2, 0.3, 0.4, {1: 2.0}, seed=2**32 - 1)
    numbers = [np.asarray(x).item() for x in settings_of(row, 2)]
    assert numbers == pytest.approx(
        [0.5, 3, 1 - 0.7, math.log(0.1), 1.2, 0.3, 0.4, 1, 0, 2**32 - 1, 2], rel=1e-6
    )
    assert np.asarray(settings_of(Sampling(), None).logprobs).item() == -1
    assert np.asarray(settings_of(Sampling(), 0).logprobs).item() == 0


def test_rows_are_read_as_they_were_packed() -> None:
    """In one array of int32 with float32 and uint32 numbers among them, bit for bit."""
    own = settings(2, temperature=[0.3, 0], seed=[2**32 - 1, 7], min_p=[0, 0.5], top_p=[1, 0.1])
    rows = Rows(*(np.arange(2, dtype=np.int32) + 10 * i for i in range(7)), own)
    packed = pack_rows(rows)
    assert packed.shape == (2, FIELDS) and packed.dtype == np.int32
    assert (packed[:, FRESH] == rows.fresh).all()
    back = jax.jit(unpacked)(packed)
    for ours, theirs in zip(jax.tree.leaves(back), jax.tree.leaves(rows), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


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
            check_bias(Sampling(logit_bias={token: 1.0}), 4)


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
