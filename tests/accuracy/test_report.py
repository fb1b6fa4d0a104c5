"""Reports of real runs, clean and with planted faults: text, JSON, page and pictures."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from qwen_jax.accuracy import gates, report
from qwen_jax.accuracy.compiler import Probe
from qwen_jax.accuracy.distribution.comparison import Estimate, Scores, statistics
from qwen_jax.accuracy.exact.parameters import EngineSource
from qwen_jax.accuracy.exact.replay import Residual
from qwen_jax.accuracy.gates import METRICS
from qwen_jax.accuracy.inside.judging import InsideFinding
from qwen_jax.accuracy.logprobs.audit import LogprobsReport, compare_logs
from qwen_jax.accuracy.machine import MachineFinding
from qwen_jax.accuracy.quantisation.costs import Cost, Quantisation, Upgrade, sums
from qwen_jax.accuracy.references import float64
from qwen_jax.accuracy.report import Report, heat_maps
from qwen_jax.accuracy.report.as_text import kept
from qwen_jax.accuracy.report.page import contents
from qwen_jax.accuracy.report.verdict import headline
from qwen_jax.accuracy.tensors.comparison import compare
from qwen_jax.accuracy.tensors.diagnosis import diagnose
from qwen_jax.accuracy.tensors.planting import planted
from qwen_jax.accuracy.tensors.precision_search import search_greedily
from qwen_jax.accuracy.text.audit import TextFinding
from qwen_jax.accuracy.traces.recording import Recorder
from qwen_jax.accuracy.weights.audit import WeightFinding
from qwen_jax.errors import UserError
from qwen_jax.reporting import page
from qwen_jax.reporting.origin import Origin
from qwen_jax.reporting.page import Picture
from qwen_jax.reporting.table import number
from tests.accuracy.logprob_logs import logged
from tests.engines import random_engine, random_tokens
from tests.golden_cases import odd_config
from tests.reporting.opened import Opened

CONFIG = odd_config(num_layers=2)
TOKENS = random_tokens(CONFIG, 24)
FAULTS = "zero_qkv_bias,rope_interleaved"


@functools.cache
def traced(faults: str = "") -> Report:
    """A candidate against float64, replayed and diagnosed."""
    engine = random_engine(CONFIG)
    source = EngineSource(engine)
    with planted(engine, faults) as candidate:
        trace = Recorder(candidate).record(TOKENS, prompt_length=20)
    diagnosis = diagnose(trace, source)
    reference = float64(source, TOKENS, chunks=trace.header.chunks)
    comparison = compare(trace, reference, diagnosis.findings)
    names = tuple(name for name in faults.split(",") if name)
    return Report(trace.header, comparison, diagnosis, planted=names)


@functools.cache
def full() -> Report:
    """The faulty run with every other part beside it."""
    rng = np.random.default_rng(0)
    nll = rng.exponential(2, 300)
    scores = Scores(nll, nll + rng.normal(0, 0.1, 300), rng.exponential(0.01, 300), nll < 4)
    klds = {frozenset(): 3.0, frozenset({"embed"}): 2.0, frozenset({"logits"}): 0.5}
    found = dataclasses.replace(
        traced(FAULTS),
        compiler=Probe("JAX 9 on a cpu", 6, ("a sum is 5, but exactly 6",)),
        distribution=statistics(scores, ("bf16", "f32"), np.zeros((3, 202), np.int32)),
        precision=search_greedily(("embed", "logits"), klds.__getitem__, 1.0),
        weights=[WeightFinding("output.weight", "lm_head", "missing", 1, 1, float("inf"))],
        text=[TextFinding("chat", "same")],
        cache=[],
        quantisation=quantised(),
        machine=[MachineFinding("products of 1 row", "fault", "10 of 23 after the first")],
        inside=[inside(0.5, None, "logits"), inside(2.0, 1, "q_proj"), inside(0.1, 0, "q_proj")],
        logprobs=two_logs(),
        notes=("A note.",),
    )
    outcomes = gates.check(gates.parse("mean_kld > 0.001, dp_rms < 0"), report.values(found))
    return dataclasses.replace(found, gates=outcomes)


def inside(ratio: float, layer: int | None, operation: str) -> InsideFinding:
    return InsideFinding(8, "few rows", operation, layer, Residual(ratio, 1e-6, (3, 0)), 3, ())


def quantised() -> Quantisation:
    """A file of one tensor that matters."""
    mine = Cost("blk.0.ffn_up.weight", ("Q4_0",), 900, 4.5, 0.08, 0.07, Estimate(2e-3, 1e-4), None)
    up = Upgrade("blk.0.ffn_up.weight", ("Q4_0", "Q8_0"), 800, Estimate(3e-3, 1e-4))
    kinds = (dataclasses.replace(mine, name="blk.*.ffn_up.weight"),)
    layers = (dataclasses.replace(mine, name="layer 0"),)
    total = Estimate(4e-3, 2e-4)
    whole = ("small.gguf", "large.gguf", 128, total, 0.97, 1900, 7600, 3)
    return Quantisation(*whole, (mine,), kinds, layers, (sums("tensors", (mine,)),), (up,), 9.0)


def two_logs() -> LogprobsReport:
    ids = np.arange(20)
    first, second = (logged("a", ids, 0, np.linspace(-1, at, 20)) for at in (-0.5, -0.4))
    return compare_logs({"a": first}, {"a": second})


def test_a_clean_run_reads_as_one() -> None:
    text = report.text(traced())
    assert "WITHIN ROUNDING: all 37 operations stay inside their bounds" in text
    assert "FAULT" not in text and "causes" not in text
    rows = re.findall(r"^(\w+) .* ok$", text, re.MULTILINE)
    assert rows[:2] == ["embed", "attn_norm"] and len(rows) == 20


def test_planted_faults_come_first_with_their_causes() -> None:
    text = report.text(traced(FAULTS))
    assert re.search(r"FAULT: \d+ of 37 operations; 2 causes named, 0 operations unexpl", text)
    assert "First wrong tensor: layers.0.q_proj, from position 0 on." in text
    for name in FAULTS.split(","):
        assert re.search(rf"^{name} +all +\S+ +0\.\d+ +", text, re.MULTILINE), name
    assert re.search(r"^q_rope .* FAULT in 2 of 2$", text, re.MULTILINE)
    assert re.search(r"^attn_out .* ok$", text, re.MULTILINE)


def test_text_fits_100_columns_and_holds_every_part() -> None:
    text = report.text(full())
    assert max(map(len, text.splitlines())) <= 100
    for part in (
        "A note.",
        "JAX 9 on a cpu: WRONG, a sum is 5",
        "1 missing",
        "1 the same",
        "PPL / PPL base",
        "machine, 1 checks: 1 FAULTS",
        "inside the decode step, 3 operations: 1 FAULTS",
        "layer 1, row 3  FAULT in 1 layers, first 1",
        "stay in float32",
        "UNEXPLAINED without a model.",
        "deserves more bits first",
    ):
        assert part in text, part
    assert re.search(r"^mean_kld > 0.001 .* FAILED$", text, re.MULTILINE)
    assert re.search(r"^dp_rms < 0 .* passed$", text, re.MULTILINE)


def test_what_explains_a_tensor_as_well_stands_in_the_headline() -> None:
    """Two names of one tensor, and neither is more right than the other."""
    found = traced(FAULTS)
    assert found.diagnosis is not None
    first, *others = found.diagnosis.causes
    tied = dataclasses.replace(first, ties=(("double_qkv_bias",), ("a", "b")))
    causes = (tied, *others)
    either = dataclasses.replace(
        found, diagnosis=dataclasses.replace(found.diagnosis, causes=causes)
    )
    said = f"({first.fault.name} or double_qkv_bias or a + b, {others[0].fault.name})"
    assert said in headline(either).sentence
    assert "as well explained by double_qkv_bias or a + b" in " ".join(report.text(either).split())


def test_figures_of_the_distribution_are_in_the_text() -> None:
    d = full().distribution
    assert d is not None
    text = report.text(full())
    assert f"{d.ppl.value:.6f} ± {d.ppl.error:.6f}" in text
    assert re.search(rf"^median +{dict(d.kld_percentiles)[50.0]:.6f} ", text, re.MULTILINE)
    assert f"{100 * d.dp_rms.value:.3f} ± {100 * d.dp_rms.error:.3f} %" in text


def test_findings_without_a_reference_are_enough() -> None:
    alone = dataclasses.replace(traced(FAULTS), comparison=None)
    text = report.text(alone)
    assert "2 causes named" in text
    assert re.search(r"^operation +layer +own error +of bound +verdict$", text, re.MULTILINE)
    with page.drawing():
        blocks = [block for section in contents(alone).sections for block in section.blocks]
    assert [block.title for block in blocks if isinstance(block, Picture)] == [
        "Calibration: own error against its bound"
    ]
    assert report.text(Report()) == "\n"


def test_values_are_known_metrics_and_all_of_them() -> None:
    found = report.values(full())
    assert found.keys() == METRICS.keys()
    faulty = traced(FAULTS)
    assert faulty.diagnosis is not None and faulty.comparison is not None
    assert found["faults"] == len(faulty.diagnosis.faulty) > 2
    assert found["mean_kld"] == full().distribution.kld.value  # type: ignore[union-attr]
    assert report.values(faulty)["mean_kld"] == faulty.comparison.logits.mean_kld  # type: ignore[union-attr]
    assert (found["weights_faults"], found["text_faults"], found["kept_float32"]) == (1, 0, 1)
    assert (found["inside_faults"], found["inside_of_bound"]) == (1, 2.0)


def test_json_is_strict_and_complete() -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    held = json.loads(report.to_json(full()), parse_constant=refuse)
    assert held["metrics"] == {k: pytest.approx(v) for k, v in report.values(full()).items()}
    assert [cause["fault"]["name"] for cause in held["diagnosis"]["causes"]] == FAULTS.split(",")
    assert held["comparison"]["first"] == {"name": "layers.0.q_proj", "layer": 0, "position": 0}
    rows = {row["name"]: row for row in held["comparison"]["rows"]}
    assert rows["layers.1.k_rope"]["verdict"] == "fault"
    assert len(held["comparison"]["by_position"]["logits"]) == len(TOKENS)
    assert held["weights"][0]["error"] == "inf"
    assert [gate["failed"] for gate in held["gates"]] == [True, False]


def test_the_page_is_one_file_with_its_pictures(tmp_path: Path) -> None:
    paths = report.write(tmp_path / "new" / "report", full())
    assert [path.name for path in paths] == ["report.json", "report.txt", "report.html"]
    made = Opened(paths[2].read_text(encoding="utf-8"))
    assert made.pictures == [
        "Calibration: own error against its bound",
        "Error by operation",
        "Error by layer",
        "Error by head",
        "Error by position",
        "KL divergence, token by token",
        "Precision search",
        "What each tensor costs",
    ]
    assert made.unresolved == [] and made.addresses == []
    assert all(values for values in made.values), "a picture says no values"
    assert any(value.startswith("q_rope, layer 1: ") for value in made.values[0])
    worst = max(f.residual.ratio for f in full().findings)
    assert made.full[repr(float(worst))] == number(worst)
    assert made.tags["pre"] == 0  # Tables are tables.
    for header in (["tensor", "cause", "error", "planted", "what"], ["step", "mean KL"]):
        assert header in made.headers
    assert "layers.1.down_proj" in made.text and "rope_interleaved" in made.text
    assert paths[1].read_text(encoding="utf-8") == report.text(full())


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written"):
        report.write(tmp_path / "file", Report())


def test_every_part_has_a_banner_the_model_and_where_it_comes_from() -> None:
    origin = Origin("run.py compare", {"jax": "9.9"}, "c0ffee", True, "2031-01-01 00:00 +0000")
    weights = [WeightFinding("output.weight", "lm_head", "missing", 1, 1, float("inf"))]
    right = [WeightFinding("output.weight", "lm_head", "exact", 0, 1, 0.0)]
    for part, sentence, state in (
        ({"weights": weights}, "FAULT: 1 of 1 weights are wrong.", "bad"),
        ({"weights": right}, "NO FAULT FOUND: all 1 weights are right.", "good"),
        ({"text": [TextFinding("chat", "same")]}, "NO FAULT FOUND: all 1 texts are right.", "good"),
        ({"distribution": full().distribution}, "MEASURED, NOT JUDGED: bf16 has a mean", "open"),
        ({"quantisation": quantised()}, "MEASURED, NOT JUDGED: the types of small.gguf", "open"),
        ({"precision": full().precision}, "MEASURED, NOT JUDGED: 1 of 2 operations", "open"),
        ({"gates": full().gates}, "FAILED: 1 of 2 gates failed (mean_kld > 0.001).", "bad"),
        ({"gates": full().gates[1:]}, "PASSED: all 1 gates passed.", "good"),
    ):
        held = Report(model={"model": "odd.gguf"}, origin=origin, **part)
        made = Opened(report.to_html(held))
        assert made.banner.startswith(sentence) and made.state == state
        words = ("odd.gguf", "run.py compare", "jax 9.9", "c0ffee", "in no commit", "2031-01-01")
        assert all(word in made.text and word in kept(held) for word in words)
        assert kept(held).startswith(report.text(held)) and "c0ffee" not in report.text(held)
    assert headline(full()).sentence.startswith("FAULT: the compiler computes wrong sums; 10 of 37")


def test_colours_differ_where_everything_fails() -> None:
    """On a scale from rounding to the largest error all of it would be the darkest blue."""
    comparison = traced(FAULTS).comparison
    assert comparison is not None
    for make in (heat_maps.by_head, heat_maps.by_position):
        found = make(comparison)
        assert found is not None and "all of it far above rounding" in found.scale
        images = [image for axes in found.drawing.axes for image in axes.get_images()]
        shown = np.concatenate([im.to_rgba(im.get_array()).reshape(-1, 4) for im in images])
        assert np.ptp(shown[:, 1]) > 0.3  # of green, from pale to dark
    clean = heat_maps.by_head(traced().comparison)  # type: ignore[arg-type]
    assert clean is not None and "rounding once is" in clean.scale


def test_hostile_names_are_text() -> None:
    names = ("</script><script>alert(1)</script>", "\x1b[2J", "\u202etxt.exe", "x" * 5000, "\ud800")
    text = report.to_html(Report(notes=names, weights=[]))
    assert text.count("<script") == text.count("<script data-own>") == 1 and not set(
        "\x1b\u202e"
    ) & set(text)
    text.encode("utf-8")
    assert r"\x1b[2J" in text and r"\u202etxt.exe" in text and "x" * 5000 in text
