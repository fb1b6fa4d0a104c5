"""Certificates of engines by their logs alone: NumPy's, our own, and wrong ones."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qwen_jax.accuracy import certify, verify
from qwen_jax.accuracy.certificate.contents import LogDifference
from qwen_jax.accuracy.certificate.table import statement, text
from qwen_jax.accuracy.exact import carried
from qwen_jax.accuracy.logprobs.reading import Logged
from qwen_jax.config import ModelConfig
from qwen_jax.engine.engine import Engine
from qwen_jax.errors import UserError
from tests import numpy_reference
from tests.accuracy import logprob_logs as logs
from tests.engines import device_parameters
from tests.golden_cases import Case, odd_config
from tests.tiny_checkpoints import write_gguf

CASE = Case(odd_config(num_layers=2), seed=3)
PROMPT, LENGTH = 5, 24
RNG = np.random.default_rng(7)
TEXTS = {name: RNG.integers(0, CASE.config.vocab_size, LENGTH) for name in ("river", "snow")}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    write_gguf(path, CASE.config, CASE.parameters())
    return path


def logits_of(ids: np.ndarray, config: ModelConfig = CASE.config) -> np.ndarray:
    """NumPy's, in float64."""
    return numpy_reference.forward(config, CASE.parameters(), ids.tolist())["logits"]


Change = Callable[[np.ndarray], np.ndarray]


def log_of(change: Change = lambda z: z, config: ModelConfig = CASE.config) -> dict[str, Logged]:
    return {
        name: logs.logged(
            name, ids, PROMPT, logs.values(change(logits_of(ids, config)), ids, PROMPT)
        )
        for name, ids in TEXTS.items()
    }


def written(folder: Path, name: str, log: dict[str, Logged], **fields: object) -> Path:
    path = logs.write(folder / f"{name}.jsonl", log)
    if fields:
        lines = [json.loads(line) | fields for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_numpy_and_our_own_engine_are_certified(tmp_path: Path, model: Path) -> None:
    engine = Engine(CASE.config, device_parameters(CASE.parameters(), "float32"))
    ours = {
        name: logs.logged(name, ids, PROMPT, logs.values(engine.logits(ids.tolist()), ids, PROMPT))
        for name, ids in TEXTS.items()
    }
    one = written(tmp_path, "numpy", log_of())
    other = written(tmp_path, "ours", ours)
    found = certify(one, other, model=model, dtype="float32")
    assert found.certified and found.of == "logs"
    exact, rounded = (each.largest.fraction for each in found.engines)
    assert exact < 1e-6 < rounded < 1
    assert [each.values for each in found.engines] == [2 * (LENGTH - PROMPT)] * 2
    assert isinstance(found.difference, LogDifference) and found.difference.parted == 0
    assert 0 < found.difference.largest < 1e-4 and "CERTIFIED" in text(found)


def by(row: logs.Row, token: int = 1) -> dict[str, Logged]:
    """A log with a mistake between logits and log-probabilities."""
    return {
        name: logs.logged(name, ids, PROMPT, logs.values(logits_of(ids), ids, PROMPT, row, token))
        for name, ids in TEXTS.items()
    }


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (lambda: by(logs.hot(0.9)), "temperature 0.9"),
        (lambda: by(logs.top_p(0.9)), "top_p 0.9"),
        (lambda: by(logs.padded(128)), "padded_vocabulary 128"),
        (lambda: by(logs.logits_rounded()), "logits_bfloat16"),
        (lambda: by(logs.plain, token=0), "labels_not_shifted"),
    ],
)
def test_a_cause_that_is_proven_is_named(
    tmp_path: Path, model: Path, log: Callable[[], dict[str, Logged]], cause: str
) -> None:
    found = certify(
        written(tmp_path, "right", log_of()),
        written(tmp_path, "wrong", log()),
        model=model,
        dtype="float32",
    )
    assert found.verdict == "cause"
    assert [each.verdict for each in found.engines] == ["certified", "cause"]
    (named,) = found.engines[1].causes
    assert named.name == cause and not named.ties and named.after < 1 < named.before
    assert statement(found) == f"NOT CERTIFIED, for a cause: {cause} in engine 2."
    assert not found.engines[1].unexplained and f"2       {cause} " in text(found)


def test_a_cause_is_verified_again(tmp_path: Path, model: Path) -> None:
    found = certify(written(tmp_path, "hot", by(logs.hot(0.9))), model=model, dtype="float32")
    path = tmp_path / "certificate.json"
    path.write_text(found.to_json())
    assert verify(path) is None
    path.write_text(found.to_json().replace('"name": "temperature 0.9"', '"name": "top_k 3"'))
    changed = verify(path)
    assert changed is not None and changed.field == "engines.0.causes.0.name"


def test_another_model_is_no_cause(tmp_path: Path, model: Path) -> None:
    other = dataclasses.replace(CASE.config, rope_theta=9e3)
    found = certify(
        written(tmp_path, "right", log_of()),
        written(tmp_path, "theta", log_of(config=other)),
        model=model,
        dtype="float32",
    )
    assert [each.verdict for each in found.engines] == ["certified", "unexplained"]
    assert not found.engines[1].causes
    assert re.match(r"UNEXPLAINED, first at log-prob.* of engine 2: .* may tell", statement(found))


@pytest.mark.parametrize("off", [0.0, 0.5])
def test_values_of_other_tokens_have_to_be_explained_too(
    tmp_path: Path, model: Path, off: float
) -> None:
    """A temperature in all of them, or but for one that something else has moved."""
    lines = []
    for name, ids in TEXTS.items():
        z = logits_of(ids)[PROMPT - 1 : -1] / 0.9
        x = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
        top = [[[int(i), float(row[i])] for i in np.argsort(row)[-2:]] for row in x]
        top[7][1][1] -= off
        values = x[np.arange(len(x)), ids[PROMPT:]].tolist()
        start, rest = ids[:PROMPT].tolist(), ids[PROMPT:].tolist()
        lines.append({"id": name, "prompt": start, "tokens": rest, "logprobs": values, "top": top})
    path = tmp_path / "top.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (engine,) = certify(path, model=model, dtype="float32").engines
    assert engine.verdict == ("unexplained" if off else "cause")
    assert [cause.name for cause in engine.causes] == ([] if off else ["temperature 0.9"])


def test_the_first_wrong_token_is_told(tmp_path: Path, model: Path) -> None:
    def late(z: np.ndarray) -> np.ndarray:
        return np.where(np.arange(len(z))[:, None] >= 16, z * 1.1, z)

    (engine,) = certify(
        written(tmp_path, "late", log_of(late)), model=model, dtype="float32"
    ).engines
    assert {one.position for one in engine.unexplained} == {17}
    assert {one.tensor for one in engine.unexplained} == {
        f"log-probabilities of {name}" for name in TEXTS
    }


def greedy(change: Change = lambda z: z, tokens: int = 12) -> dict[str, Logged]:
    """Texts that an engine goes on with greedily, without a value."""
    made = {}
    for name, ids in TEXTS.items():
        chosen = ids[:PROMPT]
        for _ in range(tokens):
            chosen = np.append(chosen, change(logits_of(chosen))[-1].argmax())
        nothing = np.full(tokens, np.nan)
        made[name] = logs.logged(name, chosen, PROMPT, nothing)
    return made


def test_greedy_texts_without_a_value(tmp_path: Path, model: Path) -> None:
    right = greedy()
    wrong = greedy(lambda z: z + 3.0 * (np.arange(z.shape[1]) == 7))
    found = certify(
        written(tmp_path, "right", right),
        written(tmp_path, "wrong", wrong),
        model=model,
        dtype="float32",
    )
    assert [each.verdict for each in found.engines] == ["certified", "unexplained"]
    assert not found.engines[0].not_told
    first = next(i for i, t in enumerate(wrong["river"].tokens) if t != right["river"].tokens[i])
    parting = found.difference.parting if isinstance(found.difference, LogDifference) else None
    assert parting is not None and parting.text == "river"
    assert parting.position == PROMPT + first and parting.tokens[1] == 7
    z = logits_of(right["river"].whole[: PROMPT + first])[-1]
    assert parting.apart == pytest.approx(abs(z[parting.tokens[0]] - z[7]), rel=1e-9)
    assert parting.apart > parting.bound and "nats apart by the model" in text(found)
    drawn = written(tmp_path, "drawn", right, temperature=0.7)
    with pytest.raises(UserError, match="has no log-probabilities, and its tokens were drawn"):
        certify(drawn, model=model, dtype="float32")


def test_what_is_not_covered_is_told(tmp_path: Path, model: Path) -> None:
    """A prompt that one log leaves out may stand in the other."""
    log = log_of()
    bare = {name: dataclasses.replace(one, prompt=None) for name, one in log.items()}
    lines = [
        {"id": n, "prompt_tokens": PROMPT, "tokens": t.tokens.tolist(), "logprobs": [*t.logprobs]}
        for n, t in bare.items()
    ]
    alone = tmp_path / "alone.jsonl"
    alone.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"nothing in it can be judged.*'river' has no prompt"):
        certify(alone, model=model, dtype="float32")
    partly = written(tmp_path, "partly", {"river": log["river"]})
    found = certify(alone, partly, model=model, dtype="float32")
    assert found.certified and "Not covered of engine 1" in statement(found)
    assert [*found.engines[0].not_covered.tensors] == ["snow"]


def more_before(token: int) -> dict[str, Logged]:
    """A log of an engine that put a token before each text."""
    made = {}
    for name, ids in TEXTS.items():
        more = np.array([token, *ids])
        found = logs.values(logits_of(more), more, PROMPT + 1)
        made[name] = logs.logged(name, ids, PROMPT, found)
    return made


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "log",
    [
        log_of,
        lambda: by(logs.top_p(0.9)),
        lambda: by(logs.hot(0.95)),
        lambda: more_before(3),
        lambda: log_of(config=dataclasses.replace(CASE.config, rms_eps=1e-4)),
    ],
    ids=["clean", "top-p", "temperature", "token before", "eps"],
)
def test_narrow_dtypes_allow_too_much_and_nobody_is_certified(
    tmp_path: Path, model: Path, dtype: str, log: Callable[[], dict[str, Logged]]
) -> None:
    path = written(tmp_path, "narrow", log(), dtype=dtype)
    said = (
        rf"no certificate.*bounds of up to [\d.]+ nats in {dtype}, where 0.026 would show.*; dump"
    )
    with pytest.raises(UserError, match=said):
        certify(path, model=model)


def test_causes_that_fit_as_well_are_told(tmp_path: Path, model: Path) -> None:
    """Those that move no value past its bound, of the mild ones that tests can make."""
    found = certify(written(tmp_path, "right", log_of()), model=model, dtype="float32")
    (engine,) = found.engines
    mild = {
        "temperature 0.9": logs.hot(0.9),
        "top_k 50": logs.top_k(50),
        "top_p 0.95": logs.top_p(0.95),
        "repetition_penalty 1.05": logs.repetition(1.05),
        "padded_vocabulary 64": logs.padded(64),
        "logits_bfloat16": logs.logits_rounded(),
        "logprobs_bfloat16": logs.rounded(),
    }
    right = np.concatenate([one.logprobs for one in log_of().values()])
    moves = {
        name: np.nanmax(np.abs(np.concatenate([t.logprobs for t in by(row).values()]) - right))
        for name, row in mild.items()
    }
    bound = engine.coarsest.resolution
    told = {name: moves[name] for name in engine.not_told if name in moves}
    assert {name for name, most in moves.items() if most > 2 * bound} <= moves.keys() - told.keys()
    for name, most in told.items():
        assert engine.not_told[name] == pytest.approx(most, rel=1e-6, abs=1e-9)
        planted = written(tmp_path, "planted", by(mild[name]))
        assert certify(planted, model=model, dtype="float32").certified
    assert all(name in text(found) for name in engine.not_told)


def test_a_short_log_tells_less(tmp_path: Path, model: Path) -> None:
    """One value, of which any top-k is right that its token is in."""
    name, ids = next(iter(TEXTS.items()))
    at = int(np.nanargmax(log_of()[name].logprobs))
    kept = np.full(LENGTH - PROMPT, np.nan)
    kept[at] = log_of()[name].logprobs[at]
    path = written(tmp_path, "one", {name: logs.logged(name, ids, PROMPT, kept)})
    (engine,) = certify(path, model=model, dtype="float32").engines
    (whole,) = certify(written(tmp_path, "all", log_of()), model=model, dtype="float32").engines
    assert engine.not_told.keys() > whole.not_told.keys()


def test_a_log_softmax_is_off_by_no_more_than_its_logits_allow() -> None:
    """Nowhere by more, and by as much where every other logit is too large."""
    rng = np.random.default_rng(4)
    for sharpness in (1, 30):
        z, error = sharpness * rng.normal(size=(1, 40)), rng.exponential(0.3, (1, 40))
        value, bound = carried.log_softmax(z, error, unit=0.0)
        np.testing.assert_allclose(value, numpy_reference.log_softmax(z), atol=1e-12)
        for _ in range(200):
            off = numpy_reference.log_softmax(z + error * rng.uniform(-1, 1, z.shape))
            assert (np.abs(off - value) <= bound).all()
        own = carried.of_sum(np.exp(z - z.max()), np.exp(z - z.max()).sum(-1, keepdims=True))
        for token in range(40):
            signs = np.where(np.arange(40) == token, -1, 1)
            worst = numpy_reference.log_softmax(z + signs * error)[0, token]
            np.testing.assert_allclose(bound[0, token], value[0, token] - worst + own[0, 0])


@pytest.mark.parametrize(
    ("fields", "dtype", "said"),
    [
        ({}, None, "doesn't say in what its engine computed; add --dtype="),
        ({"dtype": "int4"}, None, "'dtype' is 'int4', but must be float32"),
        ({"prompt": [1, 2, 9999]}, "float32", "has the id 9999, but the model's last one is"),
        ({"prompt": [1] * 9000}, "float32", "tokens, but the model's context"),
    ],
)
def test_logs_that_cannot_be(
    tmp_path: Path, model: Path, fields: dict[str, object], dtype: str | None, said: str
) -> None:
    path = written(tmp_path, "log", log_of(), **fields)
    with pytest.raises(UserError, match=said) as error:
        certify(path, model=model, dtype=dtype)
    assert str(path) in str(error.value)


def test_what_does_not_go_together(tmp_path: Path, model: Path) -> None:
    log = written(tmp_path, "log", log_of())
    with pytest.raises(UserError, match="a log can't be certified beside a dump"):
        certify(log, tmp_path / "a.safetensors", model=model, dtype="float32")
    with pytest.raises(UserError, match="a log names its own"):
        certify(log, model=model, dtype="float32", tokens=[1, 2])
    with pytest.raises(UserError, match=r"gone\.jsonl"):
        certify(tmp_path / "gone.jsonl", model=model, dtype="float32")


def test_verified_again(tmp_path: Path, model: Path) -> None:
    log = written(tmp_path, "log", log_of())
    path = tmp_path / "certificate.json"
    path.write_text(certify(log, model=model, dtype="float32").to_json())
    assert verify(path) is None
    path.write_text(re.sub(r'"largest": \{', '"largest": {"x": 1, ', path.read_text(), count=1))
    with pytest.raises(UserError, match="damaged"):
        verify(path)
    path.write_text(certify(log, model=model, dtype="float32").to_json())
    log.write_text(log.read_text().replace('"tokens": [', '"tokens": [1, '))
    changed = verify(path)
    assert changed is not None and "sha256" in changed.field
