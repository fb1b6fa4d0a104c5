"""What two columns of log-probabilities prove without a model, their figures, and what is read."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.special import log_softmax

from qwen_jax.accuracy.logprobs.audit import compare_logs
from qwen_jax.accuracy.logprobs.figures import clustered, figures, paired, weights
from qwen_jax.accuracy.logprobs.reading import Logged, read
from qwen_jax.errors import UserError
from tests.accuracy import logprob_logs as logs

TEXTS, LENGTH, VOCAB = 4, 12, 50
RNG = np.random.default_rng(5)
LOGITS = RNG.normal(scale=3, size=(TEXTS, LENGTH, VOCAB))
IDS = RNG.integers(0, VOCAB, (TEXTS, LENGTH))


def log(distributions: np.ndarray, top: int = 0) -> dict[str, Logged]:
    """Of the ids under these log-probabilities, with some of the likeliest."""
    found = {}
    for i, (rows, ids) in enumerate(zip(distributions, IDS, strict=True)):
        text = logs.logged(str(i), ids, 0, rows[np.arange(LENGTH), ids].astype(np.float32))
        likeliest = np.argsort(-LOGITS[i], axis=1)[:, :top]
        tops = [
            {int(t): float(np.float32(row[t])) for t in some}
            for row, some in zip(rows, likeliest, strict=True)
        ]
        found[str(i)] = text.__class__(**{**vars(text), "top": tuple(tops)})
    return found


PLAIN = log_softmax(LOGITS, axis=-1)


def test_equal_logs_are_within_rounding() -> None:
    found = compare_logs(log(PLAIN), log(PLAIN))
    assert (found.columns.verdict, found.causes, found.unexplained) == ("rounding", (), 0)


def test_a_shift_by_one() -> None:
    b = {
        name: text.__class__(**{**vars(text), "logprobs": np.roll(text.logprobs, 1)})
        for name, text in log(PLAIN).items()
    }
    assert compare_logs(log(PLAIN), b).columns.causes == ("written_late",)


def test_a_grid() -> None:
    found = compare_logs(log(PLAIN), log(logs.to_bfloat16(PLAIN))).columns
    assert found.causes == ("logprobs_bfloat16",)
    assert "every value of the second log is a number of bfloat16" in found.notes


def test_a_temperature_needs_several_tokens_a_position() -> None:
    b = log_softmax(LOGITS / 0.7, axis=-1)
    assert compare_logs(log(PLAIN, 3), log(b, 3)).columns.causes == ("temperature 0.7",)
    alone = compare_logs(log(PLAIN), log(b)).columns
    assert alone.verdict == "unexplained" and "nor without 'top'" in alone.line


def test_another_normaliser() -> None:
    more = np.concatenate([LOGITS, np.zeros((TEXTS, LENGTH, 30))], -1)
    found = compare_logs(log(PLAIN, 3), log(log_softmax(more, axis=-1), 3)).columns
    assert found.causes == ("normaliser",) and "more rows in the softmax" in found.line


def test_bfloat16_noise_is_neither_rounding_nor_a_cause() -> None:
    noisy = log_softmax(logs.to_bfloat16(LOGITS), axis=-1)
    found = compare_logs(log(PLAIN, 3), log(noisy, 3))
    assert (found.columns.verdict, found.causes, found.unexplained) == ("unexplained", (), 1)


def test_a_token_before_the_text() -> None:
    b = log(PLAIN)
    first = b["0"]
    longer = logs.logged("0", np.append(7, first.tokens), 0, np.append(np.nan, first.logprobs))
    found = compare_logs(log(PLAIN), b | {"0": longer})
    assert found.causes == ("token_ids",)
    assert found.tokens[0].evidence == "the second has the token 7 before the text (as a BOS)"


def test_figures_by_hand() -> None:
    a, b = log(PLAIN), log(log_softmax(LOGITS / 0.9, axis=-1))
    found = figures(paired(a, b, ("a", "b"))[0])
    assert found is not None
    d = [b[name].logprobs - a[name].logprobs for name in a]
    every = np.concatenate(d)
    assert found.k1.value == pytest.approx(-every.mean())
    assert found.k3.value == pytest.approx(np.mean(np.exp(every) - 1 - every))
    assert found.by_token.max == pytest.approx(np.exp(every).max())
    w = np.exp([x.sum() for x in d])
    assert found.by_text.ess == pytest.approx(w.sum() ** 2 / (w**2).sum() / TEXTS)
    # Texts of one length: the clustered error is that of the texts' means.
    means = [-x.mean() for x in d]
    assert found.k1.error == pytest.approx(np.std(means, ddof=1) / TEXTS**0.5)
    assert found.worst[0].a - found.worst[0].b == pytest.approx(max(-every, key=abs), rel=1e-12)


def test_extremes_stay_numbers() -> None:
    assert math.isnan(clustered([np.ones(3)]).error)
    far = weights(np.array([0.0, 5000.0]))
    assert far.max == math.inf and far.ess == pytest.approx(0.5)


BAD = {
    '{"tokens": [1]}': "line 1: it has no 'logprobs'; correct it.",
    '{"logprobs": [-1]}': "line 1: it has no 'tokens'; correct it.",
    '{"tokens": [1], "logprobs": [-1, -2]}': "'logprobs' has 2 values for 1 tokens",
    '{"tokens": [1], "logprobs": [0.5]}': "'logprobs' at 0 is 0.5, but it must be a natural log",
    '{"tokens": [1], "logprobs": [NaN]}': "line 1: NaN is no number of JSON",
    '{"tokens": [1], "logprobs": ["x"]}': "'logprobs' at 0 is 'x'",
    '{"tokens": [1.5], "logprobs": [-1]}': "'tokens' at 0 is 1.5, but it must be a token id",
    '{"tokens": [true], "logprobs": [-1]}': "'tokens' at 0 is True",
    '{"tokens": 3, "logprobs": [-1]}': "'tokens' is 3, but it must be a list",
    '{"tokens": [1], "logprobs": 3}': "'logprobs' is 3, but it must be a list",
    '{"tokens": [1], "logprobs": [-1], "prompt": "x"}': "'prompt' is 'x'",
    '{"tokens": [1], "logprobs": [-1], "top": [[[1]]]}': "'top' at token 0 is [[1]]",
    '{"tokens": [1], "logprobs": [-1], "top": 1}': "'top' is 1, but it must be a list of 1 lists",
    '{"tokens": [1], "logprobs": [-1], "temperature": -1}': "sampling.temperature is -1",
    '{"tokens": [1], "logprobs": [-1], "temprature": 1}': "did you mean 'temperature'?",
    '{"tokens": [1], "logprobs": [{"token": 1}]}': "'logprobs' at 0 is {'token': 1}",
    '{"tokens": [1], "logprobs": [{"token": "x", "logprob": -1}]}': "'tokens' at 0 is 'x'",
    '{"id": [], "tokens": [1], "logprobs": [-1]}': "'id' is [], but it must be a text or a whole",
    "[1]": "line 1: it is [1], but it must be a JSON object",
    "{": "line 1: it is not JSON",
    "": "holds no text",
}


@pytest.mark.parametrize("line", BAD)
def test_what_is_no_log_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError) as error:
        read(path)
    assert BAD[line] in str(error.value) and str(path) in str(error.value)


def test_equal_ids_are_refused_and_samples_are_not(tmp_path: Path) -> None:
    path, line = tmp_path / "a.jsonl", {"id": 1, "tokens": [1], "logprobs": [None]}
    path.write_text(f"{json.dumps(line)}\n{json.dumps(line)}")
    with pytest.raises(UserError, match=r"line 2 has the id '1' of .*line 1 again"):
        read(path)
    path.write_text(f"{json.dumps(line)}\n{json.dumps(line | {'sample': 1})}")
    assert list(read(path)) == ["1", "1 (sample 1)"]


def test_logs_without_a_text_in_common_are_refused() -> None:
    a = log(PLAIN)
    with pytest.raises(UserError, match="have no text in common"):
        compare_logs(a, {f"other {name}": text for name, text in a.items()})
