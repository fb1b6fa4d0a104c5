"""Logits to token: distributions worked out by hand, formulas restated in NumPy, real draws."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given

from pallas_kernels.sample_tokens import Choice, Counts, Settings, count, pack
from pallas_kernels.sample_tokens.reference import keep as kept_by_definition
from pallas_kernels.sample_tokens.reference import penalise as penalise_by_definition
from qwen_jax.engine import sampling
from qwen_jax.engine.sampling import Plan, Sampling, settings_of
from qwen_jax.engine.spec import Spec
from qwen_jax.errors import UserError
from tests.numpy_reference import log_softmax
from tests.tiny_checkpoints import tiny_config

FOUR = np.array([0.5, 0.25, 0.15, 0.1])
"""Four tokens' probabilities, the likeliest first."""

DRAWS = 20_000

penalise = jax.jit(penalise_by_definition)
choose = jax.jit(sampling.choose, static_argnames=("plan", "spec"))


def spec_of(vocab: int) -> Spec:
    float32 = jnp.dtype(jnp.float32)
    return Spec(tiny_config(vocab_size=vocab), float32, float32, valid_tokens=vocab)


def columns(rows: Sequence[Sampling], top: int | None = None) -> Settings:
    """The settings of all rows, as a step has them."""
    each = [settings_of(row, top) for row in rows]
    return jax.tree.map(lambda *parts: jnp.asarray(np.concatenate(parts)), *each)


def biases(rows: Sequence[Sampling], vocab: int) -> jax.Array:
    """As the scheduler puts them into a row's slot."""
    bias = np.zeros((len(rows), vocab), np.float32)
    for own, row in zip(bias, rows, strict=True):
        own[list(row.logit_bias)] = list(row.logit_bias.values())
    return jnp.asarray(bias)


@jax.jit
def keep(logits: jax.Array, asked: Settings) -> jax.Array:
    """Top-k, top-p and min-p: dropped tokens become -inf."""
    ids = jnp.broadcast_to(jnp.arange(logits.shape[1]), logits.shape)
    likely = logits - logits.max(axis=1, keepdims=True) >= asked.floor[:, None]
    return jnp.where(kept_by_definition(logits, ids, asked) & likely, logits, -jnp.inf)


def counts(
    prompts: Sequence[Sequence[int]], generated: Sequence[Sequence[int]], vocab: int
) -> Counts:
    """As the engine has them: a token is counted when it is generated."""
    found = Counts(jnp.asarray(pack(prompts, vocab)), jnp.zeros((len(prompts), vocab), jnp.int32))
    for i in range(max(map(len, generated))):
        live = [i < len(tokens) for tokens in generated]
        token = [tokens[i] if alive else 0 for tokens, alive in zip(generated, live, strict=True)]
        found = count(found, jnp.asarray(token), jnp.asarray(live))
    return found


def choose_rows(
    logits: np.ndarray,
    rows: Sequence[Sampling],
    *,
    tokens: Counts | None = None,
    step: int | jax.Array = 0,
    top: int | None = None,
) -> Choice:
    """What the rows choose, by the plan that serves them all."""
    vocab = logits.shape[-1]
    plan = Plan.of([(row, top) for row in rows], vocab)
    return choose_by(plan, logits, columns(rows, top), biases(rows, vocab), tokens, step)


def choose_by(
    plan: Plan,
    logits: np.ndarray,
    asked: Settings,
    bias: jax.Array,
    tokens: Counts | None = None,
    step: int | jax.Array = 0,
) -> Choice:
    rows, vocab = logits.shape
    return choose(
        jnp.asarray(logits, jnp.float32),
        asked,
        jnp.broadcast_to(jnp.asarray(step, jnp.int32), rows),
        plan=plan,
        spec=spec_of(vocab),
        counts=tokens or counts([[]] * rows, [[]] * rows, vocab),
        bias=bias,
        allowed=jnp.zeros((rows, -(-vocab // 32)), jnp.uint32),
    )


def drawn(
    logits: np.ndarray,
    row: Sampling,
    seeds: np.ndarray,
    tokens: Counts | None = None,
    step: int | jax.Array = 0,
) -> np.ndarray:
    """What `DRAWS` rows choose that differ in nothing but the seed: settings are made of one, since
    20,000 times the same would take a second."""
    vocab = len(logits)
    asked, bias, all_logits = (
        jax.tree.map(lambda x: jnp.broadcast_to(x, (DRAWS, *x.shape[1:])), one)
        for one in (columns([row]), biases([row], vocab), logits[None])
    )
    asked = asked._replace(seed=jnp.asarray(seeds, asked.seed.dtype))
    plan = Plan.of([(row, None)], vocab)
    return np.asarray(choose_by(plan, all_logits, asked, bias, tokens, step).token)


def frequencies(logits: np.ndarray, tokens: Counts | None = None, **settings: Any) -> np.ndarray:
    """How often each token is drawn by `DRAWS` rows that differ in nothing but the seed."""
    row = Sampling(**{"temperature": 1.0} | settings)
    if tokens is not None:
        tokens = jax.tree.map(lambda x: jnp.broadcast_to(x, (DRAWS, x.shape[-1])), tokens)
    chosen = drawn(logits, row, np.arange(DRAWS), tokens)
    return np.bincount(chosen, minlength=logits.shape[-1])


def assert_drawn_from(observed: np.ndarray, probabilities: Sequence[float]) -> None:
    """A chi-square test that one honest seed in a thousand fails; the seeds are fixed."""
    expected = np.array(probabilities) / np.sum(probabilities)
    assert (observed[expected == 0] == 0).all()
    possible = expected > 0
    if possible.sum() > 1:
        result = scipy.stats.chisquare(observed[possible], DRAWS * expected[possible])
        assert result.pvalue > 1e-3


# ---- Four tokens by hand

# settings -> what stays of FOUR, as weights
BY_HAND: list[tuple[dict[str, Any], list[float]]] = [
    ({}, [50, 25, 15, 10]),
    ({"temperature": 0.5}, [2500, 625, 225, 100]),
    ({"temperature": 2.0}, [50**0.5, 25**0.5, 15**0.5, 10**0.5]),
    ({"top_k": 1}, [1, 0, 0, 0]),
    ({"top_k": 2}, [50, 25, 0, 0]),
    ({"top_k": 4}, [50, 25, 15, 10]),
    ({"top_k": 1000}, [50, 25, 15, 10]),
    # The token that crosses p stays.
    ({"top_p": 0.49}, [1, 0, 0, 0]),
    ({"top_p": 0.51}, [50, 25, 0, 0]),
    ({"top_p": 0.74}, [50, 25, 0, 0]),
    ({"top_p": 0.76}, [50, 25, 15, 0]),
    ({"top_p": 0.91}, [50, 25, 15, 10]),
    ({"top_p": 1e-50}, [1, 0, 0, 0]),
    # Below min_p * 0.5 a token goes.
    ({"min_p": 0.19}, [50, 25, 15, 10]),
    ({"min_p": 0.21}, [50, 25, 15, 0]),
    ({"min_p": 0.31}, [50, 25, 0, 0]),
    ({"min_p": 0.51}, [1, 0, 0, 0]),
    ({"min_p": 1.0}, [1, 0, 0, 0]),
    # Order. Heat comes first: squared, the first token has 0.72 of the whole.
    ({"temperature": 0.5, "top_p": 0.7}, [1, 0, 0, 0]),
    ({"temperature": 0.5, "min_p": 0.3}, [1, 0, 0, 0]),
    # Top-p sees what top-k left: 2/3 and 1/3.
    ({"top_k": 2, "top_p": 0.65}, [1, 0, 0, 0]),
    ({"top_k": 3, "top_p": 0.82}, [50, 25, 0, 0]),
    # Each filter alone would leave more.
    ({"top_k": 3, "top_p": 0.95, "min_p": 0.4}, [50, 25, 0, 0]),
    ({"logit_bias": {3: math.log(5)}}, [50, 25, 15, 50]),
    ({"logit_bias": {0: -math.inf}}, [0, 25, 15, 10]),
    ({"logit_bias": {0: -math.inf}, "top_k": 1}, [0, 1, 0, 0]),
    ({"logit_bias": {3: math.log(6)}, "top_k": 2}, [50, 0, 0, 60]),
]


@pytest.mark.parametrize(("settings", "weights"), BY_HAND, ids=str)
def test_four_tokens_by_hand(settings: dict[str, Any], weights: list[float]) -> None:
    assert_drawn_from(frequencies(np.log(FOUR), **settings), weights)


@pytest.mark.parametrize(("settings", "weights"), BY_HAND, ids=str)
def test_token_order_does_not_matter(settings: dict[str, Any], weights: list[float]) -> None:
    """The same four in another order, by what is kept."""
    order = [2, 0, 3, 1]
    moved = settings | {
        "logit_bias": {order.index(t): b for t, b in settings.get("logit_bias", {}).items()}
    }
    row = Sampling(**{"temperature": 1.0} | moved)
    logits = np.log(FOUR)[order][None] + np.asarray(biases([row], 4))
    kept = keep(jnp.asarray(logits / row.temperature, jnp.float32), columns([row]))
    assert (np.isfinite(kept[0]) == (np.array(weights)[order] > 0)).all()


def test_repetition_penalty_by_hand() -> None:
    """Positive logits are divided and negative ones multiplied, once, in prompt and text alike."""
    logits = jnp.array([[2.0, -2.0, 1.0, 0.0], [2.0, -2.0, 1.0, -1.0]])
    asked = columns([Sampling(repetition_penalty=2.0), Sampling(repetition_penalty=0.5)])
    out = penalise(logits, asked, counts([[0, 1, 1], [3]], [[], [0, 0, 0]], 4))
    np.testing.assert_array_equal(out, [[1, -4, 1, 0], [4, -2, 1, -0.5]])


def test_presence_and_frequency_by_hand() -> None:
    """They count what was generated; the prompt, token 1 here, does not count."""
    logits = jnp.array([[3.0, 3.0, 3.0, 3.0]])
    asked = columns([Sampling(presence_penalty=0.5, frequency_penalty=0.25)])
    out = penalise(logits, asked, counts([[1]], [[2, 3, 3]], 4))
    np.testing.assert_array_equal(out, [[3, 3, 2.25, 2]])


def test_bias_comes_before_the_penalty_and_the_penalty_before_heat() -> None:
    """Token 0: 1 - 3 = -2, times 2 is -4, over 0.5 is -8. Token 1: 2 / 2 = 1, over 0.5 is 2."""
    settings = {"logit_bias": {0: -3.0}, "repetition_penalty": 2.0, "temperature": 0.5}
    tokens = counts([[0, 1]], [[]], 3)
    observed = frequencies(np.array([1.0, 2.0, 1.0]), tokens, **settings)
    assert_drawn_from(observed, np.exp([-8.0, 2.0, 2.0]).tolist())


def test_greedy_takes_bias_and_penalties_but_no_filter() -> None:
    logits = np.log(FOUR)[None]
    assert choose_rows(logits, [Sampling()]).token[0] == 0
    assert choose_rows(logits, [Sampling(logit_bias={2: 5.0})]).token[0] == 2
    tokens = counts([[]], [[0]], 4)
    assert choose_rows(logits, [Sampling(presence_penalty=2.0)], tokens=tokens).token[0] == 1


_EXTREMES = {
    "temperature": [0.0, 1e-9, 1e9],
    "repetition_penalty": [1e-9, 1.0, 1e9],
    "presence_penalty": [-1e9, 0.0, 1e9],
    "frequency_penalty": [-1e9, 0.0, 1e9],
}


@pytest.mark.parametrize("bias", [-1e9, 0.0, 1e9])
def test_whatever_is_asked_together_a_mask_holds(bias: float) -> None:
    """All extremes that are accepted, of a token that is far from likely, and that a long text is
    full of: no score overflows, or a token would win that is not allowed."""
    rows = [
        Sampling(**dict(zip(_EXTREMES, values, strict=True)), logit_bias={3: bias})
        for values in itertools.product(*_EXTREMES.values())
    ]
    logits = jnp.asarray(np.tile([30.0, 20.0, 10.0, -1e5], (len(rows), 1)), jnp.float32)
    full = Counts(
        jnp.full((len(rows), 1), 0b1000, jnp.uint32), jnp.full((len(rows), 4), 131_072, jnp.int32)
    )
    allowed = jnp.full((len(rows), 1), 0b1000, jnp.uint32)
    asked = columns(rows)._replace(masked=jnp.ones(len(rows), jnp.int32))
    given = logits, asked, jnp.zeros(len(rows), jnp.int32), full, biases(rows, 4), allowed
    choice = choose(*given, plan=Plan(True, 4), spec=spec_of(4))
    np.testing.assert_array_equal(choice.token, 3)
    assert not choice.banned.any()


# ---- Formulas

# XLA on a CPU takes subnormal numbers for zero.
floats = st.floats(-8, 8, width=32, allow_subnormal=False)


@given(
    logits=hnp.arrays(np.float32, (3, 7), elements=floats),
    prompt=hnp.arrays(bool, (3, 7)),
    generated=hnp.arrays(np.int32, (3, 7), elements=st.integers(0, 5)),
    repetition=st.floats(0.25, 4),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
)
def test_penalties_are_their_formulas(
    logits: np.ndarray, prompt: np.ndarray, generated: np.ndarray,
    repetition: float, presence: float, frequency: float,
) -> None:  # fmt: skip
    """OpenAI: mu[j] - c[j] * frequency - (c[j] > 0) * presence, after CTRL's repetition penalty."""
    row = Sampling(
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency
    )
    seen = prompt | (generated > 0)
    mask = pack([np.flatnonzero(row) for row in seen], 7)
    seen_and_counted = Counts(jnp.asarray(mask), jnp.asarray(generated))
    got = penalise(jnp.asarray(logits), columns([row] * 3), seen_and_counted)
    mu = logits.astype(np.float64)
    mu = np.where(seen, np.where(mu < 0, mu * repetition, mu / repetition), mu)
    mu = mu - generated * frequency - (generated > 0) * presence
    np.testing.assert_allclose(got, mu, rtol=0, atol=64 * np.finfo(np.float32).eps)


@given(
    logits=hnp.arrays(np.float32, (4, 9), elements=floats),
    top_k=st.integers(0, 12),
    top_p=st.floats(1e-3, 1),
    min_p=st.floats(0, 1),
)
def test_filters_keep_what_they_promise(
    logits: np.ndarray, top_k: int, top_p: float, min_p: float
) -> None:
    """Also with ties, of which top-p keeps as few as reach p."""
    asked = columns([Sampling(temperature=1, top_k=top_k, top_p=top_p, min_p=min_p)] * 4)
    kept = np.asarray(keep(jnp.asarray(logits), asked))
    stays = kept > -np.inf
    np.testing.assert_array_equal(kept[stays], logits[stays])
    slack = 1e-5
    for row, mask in zip(logits.astype(np.float64), stays, strict=True):
        assert mask[row == row.max()].any(), "the likeliest token always stays"
        least = row[mask].min()
        assert mask[row > least].all(), "no token goes that is likelier than one that stays"
        weights = np.exp(row - row.max())
        among_k = row >= np.sort(row)[::-1][min(top_k or 9, 9) - 1]
        probability = np.where(among_k, weights, 0) / weights[among_k].sum()
        for token in np.flatnonzero(mask):
            assert among_k[token]
            assert weights[token] >= min_p - slack
        before = probability[mask].sum() - probability[mask].min()
        assert top_p == 1 or before < top_p + slack, "one token fewer would not reach p"
        if (~mask & among_k & (weights >= min_p + slack)).any():
            assert probability[mask].sum() >= top_p - slack


def test_top_k_keeps_ties() -> None:
    kept = keep(jnp.array([[1.0, 3.0, 1.0, 0.0]]), columns([Sampling(temperature=1, top_k=2)]))
    np.testing.assert_array_equal(kept, [[1, 3, 1, -np.inf]])


# ---- Draws


def test_draws_follow_a_large_distribution() -> None:
    logits = np.random.default_rng(0).normal(size=100)
    assert_drawn_from(frequencies(logits), np.exp(logits).tolist())


def test_one_seed_draws_independently_at_every_step() -> None:
    row, seeds = Sampling(temperature=1.0), np.full(DRAWS, 7)
    chosen = drawn(np.log(FOUR), row, seeds, step=jnp.arange(DRAWS))
    assert_drawn_from(np.bincount(chosen, minlength=4), FOUR.tolist())
    pairs = np.bincount(chosen[:-1] * 4 + chosen[1:], minlength=16)
    result = scipy.stats.chisquare(pairs, (DRAWS - 1) * np.outer(FOUR, FOUR).ravel())
    assert result.pvalue > 1e-3


def test_a_seed_decides_the_draw_wherever_its_row_stands() -> None:
    logits = np.random.default_rng(1).normal(size=50)
    rows = [Sampling(temperature=1.5, top_k=40, seed=seed) for seed in range(64)]
    together = choose_rows(np.tile(logits, (64, 1)), rows, step=3).token
    backwards = choose_rows(np.tile(logits, (64, 1)), rows[::-1], step=3).token[::-1]
    alone = [choose_rows(logits[None], [row], step=3).token[0] for row in rows[:8]]
    np.testing.assert_array_equal(together, backwards)
    np.testing.assert_array_equal(together[:8], alone)
    assert len(set(np.asarray(together).tolist())) > 10


def test_rows_keep_their_own_settings() -> None:
    """Greedy, filtered and plain rows in one batch, whose plan has everything."""
    rows = [
        Sampling(),
        Sampling(temperature=5.0, top_k=1, seed=1),
        Sampling(temperature=1.0, logit_bias={3: 100.0}, seed=2),
        Sampling(repetition_penalty=9.0),
        Sampling(frequency_penalty=1.0),
    ]
    tokens = counts([[0]] * 5, [[1]] * 5, 4)
    logits = np.tile(np.log(FOUR) + 3, (5, 1))
    chosen = choose_rows(logits, rows, tokens=tokens).token
    np.testing.assert_array_equal(chosen, [0, 0, 3, 2, 0])


@given(hnp.arrays(np.float32, (3, 11), elements=floats), st.integers(0, 11), st.booleans())
def test_padding_is_never_drawn(logits: np.ndarray, used: int, greedy: bool) -> None:
    used = max(used, 1)
    masked = np.where(np.arange(11) < used, logits, -np.inf)
    rows = [
        Sampling(temperature=0.0 if greedy else 100.0, logit_bias={10: 50.0}, seed=seed)
        for seed in range(3)
    ]
    assert (np.asarray(choose_rows(masked, rows).token) < used).all()


# ---- Log-probabilities


def test_logprobs_are_the_models_own() -> None:
    """Before every processor, against float64; -inf where there is no token."""
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 10, (3, 300)).astype(np.float32)
    logits[:, 290:] = -np.inf
    rows = [Sampling(temperature=2.0, top_k=50, logit_bias={5: 3.0}, seed=s) for s in range(3)]
    token, _, _, (chosen, top_ids, top) = choose_rows(logits, rows, top=20)
    exact = log_softmax(logits)
    assert top_ids.shape == top.shape == (3, 20)
    np.testing.assert_allclose(chosen, exact[np.arange(3), token], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(top_ids, np.argsort(-exact, kind="stable")[:, :20])
    np.testing.assert_allclose(top, -np.sort(-exact)[:, :20], rtol=1e-6, atol=1e-6)


def test_no_logprobs_unless_asked_for() -> None:
    assert choose_rows(np.log(FOUR)[None], [Sampling()]).logprobs is None
    logprobs = choose_rows(np.log(FOUR)[None], [Sampling()], top=0).logprobs
    assert (logprobs.top_ids == -1).all() and (logprobs.top == -np.inf).all()
    assert logprobs.chosen[0] == pytest.approx(math.log(0.5), rel=1e-6)


@pytest.mark.parametrize("bias", [None, [1, 2], {"5": 1.0}, {5: "x"}, {5: None}, {True: 1.0}])
def test_a_bias_is_of_token_ids_and_numbers(bias: Any) -> None:
    with pytest.raises(UserError, match=r"logit_bias is .*, but it must map token ids to numbers"):
        Sampling(logit_bias=bias)
