"""The distribution report against llama-perplexity's sums written out token by token."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import scipy.special
from safetensors import safe_open
from safetensors.numpy import save_file

import qwen_jax
from qwen_jax.accuracy.distribution.base_file import SavedBase
from qwen_jax.accuracy.distribution.comparison import (
    DP_PERCENTILES,
    KLD_PERCENTILES,
    Distribution,
    compare_distributions,
    cut,
    read_text,
    save_base,
)
from qwen_jax.api import Model
from qwen_jax.errors import UserError

CONTEXT = 64
WINDOWS = 5
SCORED = CONTEXT - 1 - CONTEXT // 2


class Remembering(Model):
    """Logits of a window are computed once for all tests, which look at the same five."""

    @functools.cached_property
    def known(self) -> dict[tuple[int, ...], np.ndarray]:
        return {}

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        if (key := tuple(token_ids)) not in self.known:
            self.known[key] = super().logits(token_ids)
        return self.known[key].copy()


def remembering(dtype: str) -> Model:
    loaded = qwen_jax.load(dtype=dtype)
    return Remembering(loaded.engine, loaded.tokenizer, loaded.recommended)


@pytest.fixture(scope="module")
def model() -> Model:
    return remembering("float32")


@pytest.fixture(scope="module")
def rounded() -> Model:
    return remembering("bfloat16")


@pytest.fixture(scope="module")
def tokens(model: Model) -> list[int]:
    """Five windows and a rest, which must not matter."""
    return read_text(model)[: WINDOWS * CONTEXT + 17]


@pytest.fixture(scope="module")
def report(model: Model, rounded: Model, tokens: list[int]) -> Distribution:
    return compare_distributions(rounded, model, tokens, context=CONTEXT, names=("bf16", "f32"))


@pytest.fixture(scope="module")
def by_hand(model: Model, rounded: Model, tokens: list[int]) -> dict[str, float]:
    """Every figure from running sums over the scored tokens, as perplexity.cpp keeps them."""
    names = ("nll", "nll2", "base", "base2", "cross", "kld", "kld2", "dp", "dp2", "dp4", "same")
    sums = dict.fromkeys(names, 0.0)
    klds, dps = [], []
    for start in range(0, WINDOWS * CONTEXT, CONTEXT):
        window = tokens[start : start + CONTEXT]
        ours, theirs = (
            scipy.special.log_softmax(m.logits(window).astype(np.float64), axis=-1)
            for m in (rounded, model)
        )
        for j in range(CONTEXT // 2, CONTEXT - 1):
            x, y = -ours[j, window[j + 1]], -theirs[j, window[j + 1]]
            seen = theirs[j] > -16
            kld = float((np.exp(theirs[j]) * (theirs[j] - ours[j]))[seen].sum())
            dp = math.exp(-x) - math.exp(-y)
            same = ours[j].argmax() == theirs[j].argmax()
            added = (x, x * x, y, y * y, x * y, kld, kld**2, dp, dp**2, dp**4, same)
            for name, value in zip(names, added, strict=True):
                sums[name] += value
            klds.append(kld)
            dps.append(dp)
    n = len(klds)
    assert n == WINDOWS * SCORED

    def mean(first: str, second: str) -> tuple[float, float]:
        f = sums[first] / n
        return f, math.sqrt((sums[second] / n - f * f) / (n - 1))

    (log_ppl, log_ppl_error), (log_base, log_base_error) = (
        mean("nll", "nll2"),
        mean("base", "base2"),
    )
    cov = (sums["cross"] / n - log_ppl * log_base) / (n - 1)
    ppl, base = math.exp(log_ppl), math.exp(log_base)
    ln_ratio_error = math.sqrt(log_ppl_error**2 + log_base_error**2 - 2 * cov)
    mse, mse_error = mean("dp2", "dp4")
    top = sums["same"] / n
    found = {
        "ppl": ppl,
        "ppl_error": ppl * log_ppl_error,
        "ppl_base": base,
        "ppl_base_error": base * log_base_error,
        "correlation": cov / (log_ppl_error * log_base_error),
        "ln_ratio": log_ppl - log_base,
        "ln_ratio_error": ln_ratio_error,
        "ratio": math.exp(log_ppl - log_base),
        "ratio_error": math.exp(log_ppl - log_base) * ln_ratio_error,
        "difference": ppl - base,
        "difference_error": math.sqrt(
            (ppl * log_ppl_error) ** 2 + (base * log_base_error) ** 2 - 2 * ppl * base * cov
        ),
        "dp_rms": math.sqrt(mse),
        "dp_rms_error": 0.5 / math.sqrt(mse) * mse_error,
        "same_top": top,
        "same_top_error": math.sqrt(top * (1 - top) / (n - 1)),
    }
    found["kld"], found["kld_error"] = mean("kld", "kld2")
    found["dp"], found["dp_error"] = mean("dp", "dp2")
    for kind, values, percents in (("kld", klds, KLD_PERCENTILES), ("dp", dps, DP_PERCENTILES)):
        ordered = sorted(values)
        for percent in percents:
            at = percent / 100 * (n - 1)
            low = int(at)
            high = min(low + 1, n - 1)
            value = (1 - (at - low)) * ordered[low] + (at - low) * ordered[high]
            found[f"{kind} {percent}"] = value
    return found


@pytest.mark.parametrize(
    "name",
    ["ppl", "ppl_base", "ln_ratio", "ratio", "difference", "kld", "dp", "dp_rms", "same_top"],
)
def test_estimates_are_those_of_the_sums(
    report: Distribution, by_hand: dict[str, float], name: str
) -> None:
    found = getattr(report, name)
    assert found.value == pytest.approx(by_hand[name], rel=1e-9, abs=1e-12)
    # The sums cancel in their uncertainties; ours do not.
    assert found.error == pytest.approx(by_hand[f"{name}_error"], rel=1e-5, abs=1e-9)


def test_correlation_and_percentiles(report: Distribution, by_hand: dict[str, float]) -> None:
    assert report.correlation == pytest.approx(by_hand["correlation"], rel=1e-9)
    for kind, pairs in (("kld", report.kld_percentiles), ("dp", report.dp_percentiles)):
        for percent, value in pairs:
            assert value == pytest.approx(by_hand[f"{kind} {percent}"], rel=1e-9, abs=1e-13)
    assert (report.contexts, report.context) == (WINDOWS, CONTEXT)


def test_median_of_an_even_count_is_the_middle_ones_mean(report: Distribution) -> None:
    ordered = np.sort(report.scores.kld)
    assert len(ordered) % 2 == 1
    assert dict(report.kld_percentiles)[50.0] == ordered[len(ordered) // 2]


def test_a_model_against_itself_has_no_divergence(model: Model, tokens: list[int]) -> None:
    report = compare_distributions(model, model, tokens, context=CONTEXT)
    assert (report.kld.value, report.dp_rms.value, report.ln_ratio.value) == (0, 0, 0)
    assert report.same_top.value == 1 and report.ln_ratio.error == 0
    assert report.correlation == pytest.approx(1)


def test_a_saved_base_stands_for_the_model(
    model: Model, rounded: Model, tokens: list[int], report: Distribution, tmp_path: Path
) -> None:
    path = tmp_path / "base.safetensors"
    save_base(path, model, tokens, context=CONTEXT)
    found = compare_distributions(rounded, SavedBase(path), tokens)
    for name in ("ppl_base", "kld", "dp_rms", "ratio"):
        value = getattr(report, name).value
        assert getattr(found, name).value == pytest.approx(value, rel=1e-4), name
    assert found.base == model.config.source
    with pytest.raises(UserError, match="saved for another text"):
        compare_distributions(rounded, SavedBase(path), tokens[1:])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["base.safetensors", "base.kld"])
def test_a_base_that_is_not_finite_is_refused(
    model: Model, tokens: list[int], tmp_path: Path, name: str, bad: float
) -> None:
    """A divergence from it would be 0, which no gate fails."""
    path = tmp_path / name
    save_base(path, model, tokens, context=CONTEXT)
    raw = bytearray(path.read_bytes())
    at = (
        len(raw) - 4
        if name.endswith("safetensors")
        else len(raw) - 2 * (model.config.vocab_size + 4)
    )
    raw[at : at + 4] = np.float32(bad).tobytes()  # the last log-probability, or the last scale
    path.write_bytes(raw)
    with pytest.raises(UserError, match=f"{name}: window {WINDOWS - 1} has (nan|-?inf) for token"):
        compare_distributions(model, SavedBase(path), tokens)


def test_a_base_that_is_no_distribution_is_refused(
    model: Model, tokens: list[int], tmp_path: Path
) -> None:
    path = tmp_path / "base.safetensors"
    save_base(path, model, tokens, context=CONTEXT)
    raw = bytearray(path.read_bytes())
    raw[-4:] = np.float32(1).tobytes()
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"add up to 3\.7\d?, not to 1; save the base again"):
        compare_distributions(model, SavedBase(path), tokens)
    with safe_open(path, "np") as file:
        found = {name: file.get_tensor(name) for name in ("windows", "logprobs")}
        metadata = file.metadata()
    save_file(found | {"logprobs": found["logprobs"].astype(np.float16)}, path, metadata)
    with pytest.raises(UserError, match="its logprobs F16, but a base has int32 and F32"):
        SavedBase(path)


def test_a_model_whose_logits_are_not_finite_is_no_base(
    model: Model, rounded: Model, tokens: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        config = model.config

        @staticmethod
        def logits(ids: list[int]) -> np.ndarray:
            return np.full((len(ids), model.config.vocab_size), np.nan, np.float32)

    with pytest.raises(UserError, match="the base's logit of token 0 is nan, at scored position 0"):
        compare_distributions(rounded, Broken(), tokens, context=CONTEXT)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the base's logit of token 0 is nan"):
        save_base(tmp_path / "base.kld", Broken(), tokens, context=CONTEXT)  # type: ignore[arg-type]
    assert not (tmp_path / "base.kld").exists()
    # A candidate may be wrong in any way: its divergence is NaN, on which every gate fails.
    assert np.isnan(compare_distributions(Broken(), model, tokens, context=CONTEXT).kld.value)  # type: ignore[arg-type]


def test_llama_cpps_format_rounds_to_16_bits(
    model: Model, rounded: Model, tokens: list[int], report: Distribution, tmp_path: Path
) -> None:
    path = tmp_path / "base.kld"
    save_base(path, model, tokens, context=CONTEXT)
    found = compare_distributions(rounded, SavedBase(path))
    # A step of 16 / 65,535 moves each log-probability by half of it at most.
    assert found.kld.value == pytest.approx(report.kld.value, abs=16 / 65535 / 2)
    assert found.contexts == WINDOWS


def test_texts_that_give_no_statistics_are_refused(model: Model, tokens: list[int]) -> None:
    with pytest.raises(UserError, match=r"has 100 tokens, but windows of 64 need at least 128"):
        cut(tokens[:100], CONTEXT)
    with pytest.raises(UserError, match="Only 62 tokens would be scored"):
        compare_distributions(model, model, tokens[:128], context=CONTEXT)
    with pytest.raises(UserError, match="longer than the context"):
        compare_distributions(model, model, tokens * 8, context=600)
    with pytest.raises(UserError, match="There is no text"):
        compare_distributions(model, model)


def test_text_files_are_read_as_plain_text(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("a<|im_end|>", encoding="utf-8")
    assert read_text(model, path) == model.tokenizer.encode("a<|im_end|>", parse_special=False)
    for mark in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(mark + b"ab\xff")
        with pytest.raises(UserError, match=f"not UTF-8 at byte {len(mark) + 2}; convert it"):
            read_text(model, path)
    with pytest.raises(UserError, match="can't be read"):
        read_text(model, tmp_path / "absent")


def test_line_breaks_of_text_files_stay(model: Model, tmp_path: Path) -> None:
    """The ids are those of the text itself, 320, and not the 280 of a text without "\\r"."""
    text = "An old pond\r\na frog\rjumps in\r\n" * 20
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    found = read_text(model, tmp_path / "text.txt")
    assert len(found) == 320 and found == model.tokenizer.encode(text, parse_special=False)
    assert model.tokenizer.decode(found) == text


def test_the_sample_text_is_what_its_tool_makes() -> None:
    from tools.demo_sample import sample

    path = Path(qwen_jax.__file__).parent / "data" / "haiku.txt"
    assert path.read_text(encoding="utf-8") == sample()
