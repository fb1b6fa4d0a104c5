"""`run.py compare`: one run from the command line to its report, and what it refuses."""

import importlib.metadata
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from qwen_jax.accuracy import machine
from qwen_jax.accuracy.exact.replay import Residual
from qwen_jax.accuracy.inside.judging import InsideFinding
from qwen_jax.accuracy.tensors.faults.catalogue import FAULTS
from qwen_jax.accuracy.tensors.planting import planted
from qwen_jax.accuracy.traces.recording import record
from qwen_jax.api import Model
from qwen_jax.experiments import quantize
from qwen_jax.tasks import compare
from tests.cli.conftest import BUNDLED, Run
from tests.engines import reshape

TOKENS = "--tokens=" + ",".join(map(str, range(300, 308)))
"""A short text, so that a run is quick."""


def test_two_planted_faults_are_named_and_fail_a_gate(run: Run, tmp_path: Path) -> None:
    result = run(
        "compare",
        TOKENS,
        "--plant=zero_qkv_bias,rope_interleaved",
        "--fail_if=faults > 0, unknown > 0",
        f"--workdir={tmp_path}",
    )
    assert result.code == 1, result.err
    assert "2 causes named, 0 operations unexplained" in result.out
    assert "First wrong tensor: layers.0.q_proj, from position 0 on" in result.out
    assert all(len(line) <= 100 for line in result.out.splitlines())
    report = json.loads((tmp_path / "report.json").read_text())
    named = {cause["fault"]["name"] for cause in report["diagnosis"]["causes"]}
    assert named == {"zero_qkv_bias", "rope_interleaved"}
    page = (tmp_path / "report.html").read_text()
    assert "zero_qkv_bias" in page
    assert "http://" not in page.replace("http://www.w3.org", "")  # self-contained


def test_a_device_apart_gives_the_same_report(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NumPy's work is done in other processes then, and the device's on threads."""

    def report() -> dict[str, Any]:
        result = run("compare", TOKENS, f"--workdir={tmp_path}")
        assert result.code == 0, result.err
        found = json.loads((tmp_path / "report.json").read_text())
        shutil.rmtree(tmp_path)
        return {part: found[part] for part in ("diagnosis", "weights", "text", "cache")}

    def as_on_a_gpu(config: Any) -> Model:
        model = load(config)
        reshape(model.engine, ahead=True)
        return model

    here, load = report(), compare.load
    monkeypatch.setattr(compare, "load", as_on_a_gpu)
    apart = report()
    assert here["weights"] == apart["weights"] and here["text"] == apart["text"]
    assert nearly(here) == apart


def nearly(found: Any) -> Any:
    """With figures that may differ in their last digits, in which NumPy's sums depend on where in
    memory arrays lie."""
    if isinstance(found, dict):
        return {name: nearly(value) for name, value in found.items()}
    if isinstance(found, list):
        return [nearly(value) for value in found]
    return pytest.approx(found, rel=1e-6) if isinstance(found, float) else found


def test_a_trace_of_generate_is_within_rounding(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    names = "--trace_names=layers.1.*,logits"
    made = run("generate", "--max_tokens=4", f"--trace={path}", names, "--trace_positions=8:")
    assert made.code == 0, made.err
    result = run("compare", f"--candidate={path}", "--fail_if=faults > 0")
    assert result.code == 0, result.err
    assert "WITHIN ROUNDING" in result.out
    assert "Its logits choose the tokens of the run, every one." in " ".join(result.out.split())


def test_what_the_types_of_a_file_cost(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "small.gguf"
    quantize.write(BUNDLED, Type.Q4_0, file)
    argv = ["--base_model=haiku", "--parts=quantisation", "--context=24"]
    more = ["--config.compare.passes=45", "--fail_if=quantisation_kld > 0"]
    result = run("compare", f"--model={file}", *argv, *more, f"--workdir={tmp_path}")
    assert result.code == 1, result.err
    assert all(len(line) <= 100 for line in result.out.splitlines())
    found = json.loads((tmp_path / "report.json").read_text())["quantisation"]
    assert found["tokens"] == 24 and found["total"]["value"] > 0
    assert len(found["tensors"]) == 36 and found["upgrades"][0]["saved"]["value"] > 0
    page = (tmp_path / "report.html").read_text()
    assert "What each tensor costs" in page and "blk.*.ffn_down" in page


def part_of_the_sample(tmp_path: Path) -> Path:
    """A tenth of the text that comes with the bundled model."""
    path = tmp_path / "part.txt"
    path.write_text(BUNDLED.with_suffix(".txt").read_text()[:4000])
    return path


def test_weights_in_blocks_beside_numbers(run: Run, tmp_path: Path) -> None:
    """They are the same numbers; only their products are put together otherwise."""
    gate, text = "--fail_if=mean_kld > 1e-9, top1 < 1", part_of_the_sample(tmp_path)
    argv = ["--weights=packed", "--base_weights=expanded", f"--text={text}", "--context=128"]
    done = run("compare", *argv, gate)
    assert done.code == 0, done.err
    assert "haiku auto packed auto" in done.out and "haiku auto expanded auto" in done.out


def test_from_sources_that_are_not_installed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.distribution

    def distribution(name: str) -> importlib.metadata.Distribution:
        if name == "qwen_jax":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("qwen_jax")
    done = run("compare", "--parts=tensors", TOKENS)
    assert done.code == 0 and "same likeliest token 100.0%" in done.out


@pytest.mark.usefixtures("loaded")
def test_machine(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device whose cosine is of float16 fails the gate, with the check by name."""
    monkeypatch.setattr(machine, "companions", lambda engine: {})  # which take seconds
    done = run("compare", "--parts=machine", "--fail_if=machine_faults > 0")
    assert done.code == 0 and "19 checks: nothing less than declared" in done.out
    ours, *rest = machine.FUNCTIONS["cos"]
    monkeypatch.setitem(
        machine.FUNCTIONS, "cos", (lambda x: ours(x.astype("float16")).astype("float32"), *rest)
    )
    done = run("compare", "--parts=machine", "--fail_if=machine_faults > 0")
    assert done.code == 1 and "19 checks: 1 FAULTS" in done.out


def test_inside(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there is a Hopper GPU, with findings of an operation past its bound."""
    asked: list[Any] = []

    def audit(engine: Any, tokens: Any, rows: Any, layers: Any, progress: Any) -> Any:
        asked.append((tokens, rows, layers))
        wrong = Residual(3.0, 1e-6, (7, 0))
        return [InsideFinding(64, "many rows", "attn_out", 2, wrong, 7, ("attn_out",))]

    monkeypatch.setattr(compare, "check_device", lambda: None)
    monkeypatch.setattr(compare, "audit_inside", audit)
    flags = ["--parts=inside", "--inside_rows=64,2", "--inside_layers=2:", "--tokens=1,2,3"]
    done = run("compare", *flags, "--fail_if=inside_faults > 0")
    assert asked == [([1, 2, 3], (64, 2), "2:")]
    assert done.code == 1
    assert "1 operations: 1 FAULTS" in done.out and "layer 2, row 7" in done.out


@pytest.fixture(scope="module")
def faulty(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace in which a fault is to be found."""
    path = tmp_path_factory.mktemp("faulty") / "run.safetensors"
    with planted(model.engine, "zero_qkv_bias") as engine:
        record(engine, [1, 2, 3, 4, 5]).save(path)
    return path


@pytest.mark.parametrize(("gate", "code"), [("faults > 0", 1), ("faults > 1000", 0)])
def test_without_matplotlib_the_gate_decides(
    run: Run,
    faulty: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    gate: str,
    code: int,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("qwen_jax.reporting.page.can_be_made", lambda: False)
    argv = ["compare", f"--candidate={faulty}", "--parts=tensors"]
    done = run(*argv, f"--fail_if={gate}", f"--workdir={tmp_path}")
    assert done.code == code
    assert "report.html needs matplotlib: pip install 'qwen_jax[report]'." in caplog.messages
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.txt"}


def test_a_base_and_what_rounding_costs(run: Run, tmp_path: Path) -> None:
    base, text = tmp_path / "base.safetensors", part_of_the_sample(tmp_path)
    argv = [f"--text={text}", "--context=128", f"--save_base={base}"]
    assert run("compare", *argv).code == 0
    # The base holds ln p in float32, half a step of which is 2^-24 |ln p|; KL is then off by the
    # sum of p times that, 2^-24 of the entropy, which of 2,048 tokens is ln 2048 at most.
    bound = 2**-24 * math.log(2048)
    same = run("compare", f"--base={base}", f"--fail_if=mean_kld > {bound}, top1 < 1")
    assert same.code == 0, same.err + same.out
    rounded = run("compare", f"--base={base}", "--dtype=bfloat16", f"--fail_if=mean_kld > {bound}")
    assert rounded.code == 1, rounded.err


def test_the_ids_of_another_engine(run: Run, tmp_path: Path) -> None:
    """A dump whose text began with a token too many: the prompt's ids are audited."""
    from qwen_jax.api import load

    ids = load().tokens("haiku: snow")
    wrong = [ids[-1], *ids]
    np.save(tmp_path / "x.npy", np.zeros((len(wrong), 256), np.float32))
    mapping = {"version": 1, "dtype": "float32", "tensors": {"embed": "x"}}
    (tmp_path / "mapping.json").write_text(json.dumps(mapping))
    result = run(
        "compare",
        f"--candidate={tmp_path}",
        "--prompt=haiku: snow",
        "--parts=text",
        "--tokens=" + ",".join(map(str, wrong)),
        "--fail_if=text_faults > 0",
    )
    assert result.code == 1, result.err


def test_the_catalogue_is_printed(run: Run) -> None:
    out = run("compare", "--list_faults").out
    assert len(FAULTS) >= 30
    assert all(name in out for name in FAULTS)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--plant=rope_interleavd"], ["rope_interleavd", "rope_interleaved"]),
        (["--plant=zero_qkv_bias@9"], ["layer", "9", "0 to 4"]),
        (["--plant=zero_qkv_bias@" + "9" * 5000], ["layer '999", "0 to 4"]),
        (["--parts=tensor"], ["'tensor'", "tensors, weights"]),
        (["--tokens=1,x"], ["1,x", "2046,299,10"]),
        (["--tokens=1,-2"], ["-2"]),
        (["--tokens=1,99999"], ["99999"]),
        (["--fail_if=mean_kl > 1"], ["mean_kl", "mean_kld"]),
        (["--fail_if=mean_kld"], ["mean_kld > 0.01"]),
        (["--candidate=nowhere"], ["nowhere", "no such file"]),
        (["--candidate=nowhere", "--plant=zero_qkv_bias"], ["--plant does nothing"]),
        (["--candidate=nowhere", "--parts=cache"], ["cache", "tensors and text"]),
        (["--candidate=nowhere", "--parts=text"], ["text", "--prompt"]),
        (["--workdir=/dev/null/report"], ["/dev/null/report", "can't be written"]),
        (["--parts=precision", "--dtype=bfloat16"], ["float32"]),
    ],
)
def test_refused(refuses: Callable[..., None], argv: list[str], words: list[str]) -> None:
    refuses(["compare", *argv], *words)


KNOWN_AT_ONCE = {
    "--text=nowhere --base_dtype=bfloat16": "--text=nowhere can't be read: No such file",
    "--text=/dev/zero --base_dtype=bfloat16": "--text=/dev/zero can't be read: it is a device",
    "--context=3 --base_dtype=bfloat16": "context is 3, but it must be at least",
    "--parts=distribution": "There is no base to compare with; give --base=FILE",
    "--base=nowhere": "nowhere: the base can't be read",
    "--base_dtype=float64": "dtype is 'float64', but it must be one of",
    "--base_weights=small": "weights is 'small', but it must be one of",
    "--base=nowhere --base_dtype=float32": "The base is the file nowhere; leave out its dtype",
    "--base_model=nowhere.gguf": "nowhere.gguf: there is no such file",
    "--save_base=nowhere/x": "--save_base=nowhere/x can't be written: nowhere is no directory; ch",
    "--parts=precision --config.compare.precision_kld=nan": "compare.precision_kld is nan, but",
    "--config.compare.decode_tokens=-1": "compare.decode_tokens is -1, but it must not be neg",
    "--reference=nowhere": "The reference is 'nowhere', which is neither a file nor one of",
    "--parts=precision --config.compare.precision_dtype=x": "precision_dtype is 'x', but it must",
    "--parts=quantisation": "The part quantisation needs --base_model, the file that --model was m",
    "--parts=quantisation,text --base_model=haiku": "goes without text; run that by itself.",
    "--parts=quantisation --base_model=x.gguf": "x.gguf: there is no such file",
    "--parts=quantisation --base_model=haiku --dtype=float32": "--dtype does nothing for the",
    "--parts=quantisation --base_model=haiku --text=x": "--text=x can't be read: No such file",
    "--parts=quantisation --base_model=haiku --config.compare.passes=0": "must be at least 1",
    "--parts=quantisation --base_model=haiku --config.compare.upgrades=Q8_0,Q9": "has 'Q9', but th",
    "--parts=text --config.compare.passes=9": "compare.passes does nothing for the parts text",
    "--fail_if=ppl>1": "needs ppl, which the part distribution measures, but the parts are tensors",
    "--fail_if=top1<1 --parts=text": "needs top1, which the part tensors and distribution measures",
    "--parts=inside": "doesn't run here: it needs a Hopper GPU, and the default device is a cpu.",
    "--parts=inside --inside_rows=8,65": "inside.rows is '8,65', but must be numbers from 1 to 64",
    "--parts=inside --inside_layers=x": "The layers of inside are 'x', but must be start:stop",
    "--parts=inside --plant=zero_qkv_bias": "the part inside looks into the decode-step kernel; le",
    "--parts=tensors --inside_rows=8": "--inside_rows does nothing for the parts tensors; leave",
    "--candidate=x --parts=inside": "is a trace, which has no inside; the parts for it are tensors",
    "--parts=text --tokens=1,2": "--tokens does nothing for the parts text; leave it out.",
    "--parts=cache --prompt=x": "--prompt does nothing for the parts cache; leave it out.",
    "--parts=tensors --base_dtype=float32": "--base_dtype does nothing for the parts tensors",
    "--text=x": "--text does nothing for the parts tensors, weights, text, cache; leave it out.",
    "--candidate=x --dtype=float32": "--dtype does nothing for the parts tensors, text of a --can",
    "--save_base=x --fail_if=ppl>1": "--fail_if does nothing for --save_base; leave it out.",
    "--save_base=x --plant=zero_qkv_bias": "--plant does nothing for --save_base; leave it out.",
    "--list_faults --model=x": "--model does nothing for --list_faults; leave it out.",
}


@pytest.mark.parametrize("argv", KNOWN_AT_ONCE)
def test_what_is_known_at_once_loads_nothing(
    refuses: Callable[..., None], monkeypatch: pytest.MonkeyPatch, argv: str
) -> None:
    monkeypatch.setattr("qwen_jax.tasks.compare.load", lambda _: pytest.fail("it was loaded"))
    refuses(["compare", *argv.split(" ")], KNOWN_AT_ONCE[argv])


def test_nothing_is_overwritten(refuses: Callable[..., None], tmp_path: Path) -> None:
    path = tmp_path / "old.safetensors"
    path.write_bytes(b"old")
    refuses(["generate", f"--trace={path}"], str(path), "exists already")
    refuses(["compare", f"--save_base={path}"], str(path), "exists already")
    for flag in (["generate", "--trace=."], ["compare", "--save_base=."]):
        refuses(flag, f"{flag[1]} is a directory; name a file in it, as in ")
    assert path.read_bytes() == b"old"
    for name in ("report.json", "report.txt", "report.html"):
        (tmp_path / name).write_text("old")
        words = f"holds a {name} already; move it, or choose another directory."
        refuses(["compare", f"--workdir={tmp_path}"], words)
        (tmp_path / name).unlink()


@pytest.mark.usefixtures("nothing_loads")
def test_a_trace_that_cannot_be_is_refused_at_once(
    refuses: Callable[..., None], tmp_path: Path
) -> None:
    trace = f"--trace={tmp_path / 'run.safetensors'}"
    refuses([trace, "--trace_positions=a:b"], "The positions are 'a:b', but must be start:stop")
    refuses([f"--trace={tmp_path}/nowhere/x"], "can't be written", "nowhere is no directory")


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--reference=nowhere", "The reference is 'nowhere', which is neither a file nor one of"),
        (
            f"--reference={'x' * 5000}",
            "which is neither a file nor one of float64, hf",
        ),
        (
            f"--reference={BUNDLED}",
            "haiku.gguf: the file is a GGUF file, a model; let --model name it",
        ),
        (f"--reference={BUNDLED.parent}", "this is no trace of qwen_jax, and"),
        ("--plant=nope", "nope"),
        ("--plant=zero_qkv_bias@99", "99"),
    ],
)
def test_what_is_known_at_the_start_needs_no_model(
    refuses: Callable[..., None], flag: str, words: str
) -> None:
    refuses(["compare", flag], words)
