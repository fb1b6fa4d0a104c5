"""Certificates of clean and of wrong engines, what they leave out, and what tampering does."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16
from safetensors.numpy import save_file

from qwen_jax import opening
from qwen_jax.accuracy import Certificate, Change, certify, verify
from qwen_jax.accuracy.certificate.table import text
from qwen_jax.accuracy.exact.parameters import CheckpointSource
from qwen_jax.accuracy.exact.replay import Replay
from qwen_jax.accuracy.traces.foreign import open_trace
from qwen_jax.accuracy.traces.trace import Trace, load
from qwen_jax.accuracy.weights.checkpoint_values import CheckpointValues
from qwen_jax.engine.engine import Engine
from qwen_jax.errors import UserError
from qwen_jax.weights.loader import Checkpoint
from tests import numpy_reference
from tests.accuracy import other_engine
from tests.accuracy.clean_engines import Clean
from tests.accuracy.planted_traces import Once
from tests.engines import device_parameters
from tests.golden_cases import Case, odd_config
from tests.tiny_adapters import random_pairs, write_peft
from tests.tiny_checkpoints import gguf_name, random_parameters, write_gguf, write_hf

REPOSITORY = Path(__file__).parents[2]
CASE = Case(odd_config(num_layers=2), seed=3)
TOKENS = CASE.prompt()[:12]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and dumps of engines that computed it; no test writes here."""
    folder = tmp_path_factory.mktemp("room")
    write_gguf(folder / "model.gguf", CASE.config, CASE.parameters())
    for name, wrong in {
        "clean": {},
        "narrow": {"dtype": "bfloat16"},
        "no_bias": {"biases": False},
        "pairs": {"interleaved": True},
    }.items():
        other_engine.dump(folder / name, CASE.config, CASE.parameters(), TOKENS, **wrong)
        mapping = json.loads((folder / name / "mapping.json").read_text())
        (folder / name / "mapping.json").write_text(json.dumps(mapping | {"tokens": TOKENS}))
    return folder


@pytest.fixture(scope="module")
def issued(room: Path) -> str:
    """Of two clean engines, as JSON."""
    return of(room, "clean", "narrow").to_json()


def of(room: Path, *dumps: str, **more: Any) -> Certificate:
    return certify(*(room / dump for dump in dumps), model=room / "model.gguf", **more)


def with_tensors(folder: Path, room: Path, **changed: np.ndarray | None) -> Path:
    """The clean dump with some arrays changed, or left out of the mapping."""
    shutil.copytree(room / "clean", folder / "dump")
    fields = json.loads((folder / "dump" / "mapping.json").read_text())
    for name, array in changed.items():
        if array is None:
            fields["tensors"] = {k: v for k, v in fields["tensors"].items() if name not in k}
        else:
            np.save(folder / "dump" / f"{name.replace('__', '/')}.npy", array)
    (folder / "dump" / "mapping.json").write_text(json.dumps(fields))
    return folder / "dump"


def test_our_own_engine_in_two_dtypes(tmp_path: Path, room: Path) -> None:
    paths = [tmp_path / "float32.safetensors", tmp_path / "bfloat16.safetensors"]
    for path in paths:
        params = device_parameters(CASE.parameters(), path.stem)
        engine = Engine(CASE.config, params)
        Once(engine).record(TOKENS, prompt_length=len(TOKENS)).save(path)
    found = certify(*paths, model=room / "model.gguf")
    assert found.certified and found.verdict == "certified"
    narrow, wide = found.engines[1], found.engines[0]
    assert (wide.declared["dtype"], narrow.declared["dtype"]) == ("float32", "bfloat16")
    assert not wide.not_covered and wide.values == sum(
        x.size for x in load(paths[0]).tensors.values()
    )
    assert found.difference is not None and found.difference.positions == (0, len(TOKENS))
    # Theirs differ by far more than either's rounding in float32.
    assert found.difference.largest > 1e-4
    assert all(0 < engine.largest.fraction <= 1 for engine in found.engines)


@pytest.mark.parametrize(
    "engines",
    [("eager float32", "sdpa bfloat16"), ("sdpa float16",), ("llamacpp F32",), ("llamacpp Q4_K",)],
)
def test_other_peoples_clean_engines(tmp_path: Path, engines: tuple[str, ...]) -> None:
    runs = [Clean(*name.split()) for name in engines]
    model = runs[0].checkpoint(tmp_path).path
    for run in runs:
        run.golden(tmp_path)
    found = certify(*(tmp_path / f"{run.name}.safetensors" for run in runs), model=model)
    assert found.certified, text(found)
    assert not any(engine.not_covered.operations for engine in found.engines)


def test_positions_and_operations_that_are_not_there_are_told(tmp_path: Path) -> None:
    run = Clean("llamacpp", "F32", 64, 1e4, far=True)
    run.golden(tmp_path)
    found = certify(tmp_path / f"{run.name}.safetensors", model=run.checkpoint(tmp_path).path)
    (engine,) = found.engines
    assert found.certified and engine.not_covered.positions == ((0, 32763),)
    assert {"layers.0.attn_out", "logits"} <= set(engine.not_covered.operations)
    shown = " ".join(text(found).split())
    assert "Not covered: positions 0 to 32762; " in shown and "more operations." in shown


def test_a_mapping_file_stands_for_its_dump(tmp_path: Path, room: Path) -> None:
    """In a directory of arrays, or beside the one file of them."""
    arrays = {
        f.relative_to(room / "clean").with_suffix("").as_posix(): np.load(f)
        for f in (room / "clean").rglob("*.npy")
    }
    save_file(arrays, tmp_path / "x.safetensors")
    shutil.copy(room / "clean" / "mapping.json", tmp_path / "x.mapping.json")
    named = certify(
        room / "clean/mapping.json", tmp_path / "x.mapping.json", model=room / "model.gguf"
    )
    first, second = named.engines
    assert named.certified and first.tensors == second.tensors
    files = [one.file for one in named.inputs if one.of == "engine 2"]
    assert files == ["x.mapping.json", "x.safetensors"]
    assert verify(written(tmp_path, named.to_json())) is None


@pytest.mark.parametrize("dumps", [("clean", "no_bias"), ("no_bias", "narrow"), ("no_bias",)])
def test_a_cause_is_named_in_the_engine_that_has_it(room: Path, dumps: tuple[str, ...]) -> None:
    found = of(room, *dumps)
    assert found.verdict == "cause" and not found.certified
    for dump, engine in zip(dumps, found.engines, strict=True):
        named = [cause.name for cause in engine.causes]
        assert named == ["zero_qkv_bias"] * (dump == "no_bias")
        assert engine.verdict == ("cause" if dump == "no_bias" else "certified")
    assert "NOT CERTIFIED, for a cause: zero_qkv_bias" in text(found)


def test_two_engines_with_the_same_fault_agree_and_are_not_certified(room: Path) -> None:
    found = of(room, "pairs", "pairs")
    assert found.difference is not None and found.difference.largest == 0
    assert found.verdict == "cause" and all(engine.causes for engine in found.engines)


def test_what_nothing_explains(tmp_path: Path, room: Path) -> None:
    norm = np.load(room / "clean" / "blk1" / "norm2.npy")
    norm[5, 3] += 1
    found = certify(
        room / "no_bias", with_tensors(tmp_path, room, blk1__norm2=norm), model=room / "model.gguf"
    )
    assert found.verdict == "unexplained"
    where, *_ = found.engines[1].unexplained  # and what that engine computed from the right one
    assert (where.tensor, where.layer, where.position) == ("layers.1.ffn_norm", 1, 5)
    shown = " ".join(text(found).split())
    assert "UNEXPLAINED, first at layers.1.ffn_norm, position 5 of engine 2: " in shown
    assert "Named besides: zero_qkv_bias in engine 1." in shown


def test_tensors_between_are_computed_through_and_the_last_are_told(
    tmp_path: Path, room: Path
) -> None:
    path = with_tensors(tmp_path, room, q_proj=None, attn_scores=None, logits=None)
    found = certify(path, room / "clean", model=room / "model.gguf")
    left = found.engines[0].not_covered
    assert found.certified and left.operations == ("final_norm", "logits") and not left.tensors
    (rope,) = (j for j in found.engines[0].tensors if j.tensor == "layers.0.q_rope")
    assert rope.together == ("q_proj", "q_rope")
    assert found.difference is None
    shown = " ".join(text(found).split())
    assert "as far as is covered, the difference of both engines lies within" in shown
    assert "Not covered of engine 1: final_norm and 1 more operations." in shown


def test_a_bound_as_large_as_the_tensor_judges_nothing(tmp_path: Path, room: Path) -> None:
    """Of bfloat16, carried through all layers at once."""
    shutil.copytree(room / "narrow", tmp_path / "dump")
    mapping = tmp_path / "dump" / "mapping.json"
    fields = json.loads(mapping.read_text())
    for kept in ({"embed": "tok", "logits": "logits"}, {"logits": "logits"}):
        mapping.write_text(json.dumps(fields | {"tensors": kept}))
        if "embed" not in kept:
            with pytest.raises(UserError, match=r"nothing in it can be judged: logits has a bound"):
                certify(tmp_path / "dump", model=room / "model.gguf")
            continue
        (engine,) = certify(tmp_path / "dump", model=room / "model.gguf").engines
        assert [one.tensor for one in engine.tensors] == ["embed"]
        assert "times as large as itself" in engine.not_covered.tensors["logits"]
        assert "logits" in engine.not_covered.operations


def test_a_bound_within_which_a_part_could_be_missing_judges_nothing(
    tmp_path: Path, room: Path
) -> None:
    """bfloat16's, carried through attention and feed-forward at once; float32's is fine enough."""
    for dump in ("narrow", "clean"):
        shutil.copytree(room / dump, tmp_path / dump)
        mapping = tmp_path / dump / "mapping.json"
        fields = json.loads(mapping.read_text())
        kept = {
            k: v for k, v in fields["tensors"].items() if k in ("embed", "layers.{i}.ffn_residual")
        }
        mapping.write_text(json.dumps(fields | {"tensors": kept}))
        found = certify(tmp_path / dump, model=room / "model.gguf")
        (engine,) = found.engines
        streams = [f"layers.{i}.ffn_residual" for i in range(CASE.config.num_layers)]
        judged = [one.tensor for one in engine.tensors]
        assert found.certified and judged == (
            ["embed"] if dump == "narrow" else ["embed", *streams]
        )
        for name, why in engine.not_covered.tensors.items():
            assert re.fullmatch(
                r"has a bound [\d.]+ times as large as what \S+_proj changes in it", why
            )
            assert name in streams and float(why.split()[3]) > 1
            assert (
                f"{name} and 1 more, which {why}" in " ".join(text(found).split())
                or name != streams[0]
            )


def test_what_a_part_changes_is_what_the_logits_lose_without_it(room: Path) -> None:
    """By NumPy with the first layer's product left out."""
    trace = open_trace(room / "narrow", CASE.config)
    alone = Trace(trace.header, {"logits": trace.tensors["logits"]})
    source = CheckpointSource(opening.open_model(str(room / "model.gguf")), "bfloat16")
    (replayed,) = Replay(alone, source)
    part = replayed.hidden_part()
    assert part is not None and part[0] == "layers.0.o_proj"
    held = {
        n: x if "norm" in n else x.astype(bfloat16).astype(np.float64)
        for n, x in CASE.parameters().items()
    }
    without = {n: 0 * x if ".0.self_attn.o_proj" in n else x for n, x in held.items()}
    whole, less = (
        numpy_reference.forward(CASE.config, params, list(TOKENS))["logits"]
        for params in (held, without)
    )
    change = np.sqrt(np.mean((whole - less) ** 2))
    assert part[1] == pytest.approx(np.sqrt(np.mean(replayed.bound**2)) / change, rel=1e-6)


def from_position(room: Path, start: int, names: Callable[[str], bool]) -> Trace:
    """Part of the clean dump, as a trace."""
    trace = open_trace(room / "clean", CASE.config)
    header = dataclasses.replace(trace.header, start=start)
    return Trace(header, {n: x[start:] for n, x in trace.tensors.items() if names(n)})


def test_nothing_to_judge_is_no_certificate(tmp_path: Path, room: Path) -> None:
    path = tmp_path / "late.safetensors"
    from_position(room, 3, lambda name: name.endswith("attn_out")).save(path)
    with pytest.raises(UserError, match=r"late.*nothing in it can be judged: layers.0.attn_out"):
        certify(path, model=room / "model.gguf")


def test_nan_that_inherits_nan_is_no_certificate(tmp_path: Path, room: Path) -> None:
    trace = from_position(room, 3, lambda name: "attn_out" in name or "ffn_norm" in name)
    for name in ("layers.1.attn_out", "layers.1.ffn_norm"):
        trace.tensors[name][2] = np.nan
    trace.save(tmp_path / "lost.safetensors")
    with pytest.raises(UserError, match=r"lost.*layers.1.attn_out is nan at \(2, 0\)"):
        certify(tmp_path / "lost.safetensors", model=room / "model.gguf")


def test_engines_of_other_texts_or_positions(tmp_path: Path, room: Path) -> None:
    trace = from_position(room, 0, lambda name: True)
    other = dataclasses.replace(trace.header, tokens=(1, *TOKENS[1:]))
    Trace(other, trace.tensors).save(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="of different texts: token 0 is 1 in"):
        certify(tmp_path / "other.safetensors", room / "clean", model=room / "model.gguf")
    with pytest.raises(UserError, match=r"vocab_size|num_layers"):
        certify(tmp_path / "other.safetensors")


# --- Verification -------------------------------------------------------------------------------


def written(folder: Path, text: str) -> Path:
    path = folder / "certificate.json"
    path.write_text(text)
    return path


def test_a_certificate_is_verified(tmp_path: Path, issued: str) -> None:
    assert verify(written(tmp_path, issued)) is None


CHANGES: dict[str, Callable[[dict], Any]] = {
    "verdict": lambda c: c.update(verdict="cause"),
    "engines.0.tokens.3": lambda c: c["engines"][0]["tokens"].__setitem__(3, 1),
    "engines.0.values": lambda c: c["engines"][0].update(values=7),
    "engines.1.largest.fraction": lambda c: c["engines"][1]["largest"].update(fraction=0.1),
    "engines.1.largest.position": lambda c: c["engines"][1]["largest"].update(position=99),
    "engines.0.declared.dtype": lambda c: c["engines"][0]["declared"].update(dtype="bfloat16"),
    "engines.0.tensors": lambda c: c["engines"][0]["tensors"].pop(),
    "difference.mean_kld": lambda c: c["difference"].update(mean_kld=0.0),
    "assumptions.same_text": lambda c: c["assumptions"].update(same_text="no matter"),
    "inputs": lambda c: c["inputs"].pop(),
    "inputs.0.sha256": lambda c: c["inputs"][0].update(sha256="0" * 64),
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_changed_field_is_found(tmp_path: Path, issued: str, field: str) -> None:
    fields = json.loads(issued)
    CHANGES[field](fields)
    found = verify(written(tmp_path, json.dumps(fields)))
    assert isinstance(found, Change) and found.field.split(" ")[0] == field


@pytest.mark.parametrize("file", ["model.gguf", "clean/blk1/q.npy", "narrow/mapping.json"])
def test_a_changed_byte_of_an_input_is_found_where_it_has_moved(
    tmp_path: Path, room: Path, issued: str, file: str
) -> None:
    moved = shutil.copytree(room, tmp_path / "moved")
    dumps, model = [moved / "clean", moved / "narrow"], moved / "model.gguf"
    certificate = written(tmp_path, issued)
    data = bytearray((moved / file).read_bytes())
    data[-1] ^= 1
    (moved / file).write_bytes(data)
    found = verify(certificate, dumps, model=model)
    assert found is not None and "sha256" in found.field and str(moved / file) in found.field
    data[-1] ^= 1
    (moved / file).write_bytes(data)
    if file == "model.gguf":
        assert verify(certificate, dumps, model=model) is None
    (moved / file).unlink()
    with pytest.raises(UserError, match=file):
        verify(certificate, dumps, model=model)


def test_inputs_may_have_other_names_where_they_are_named(tmp_path: Path, room: Path) -> None:
    """And nothing else is read: files of the old names beside them are others."""
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
    for name in ("a", "b"):
        dump = room / ("clean" if name == "a" else "narrow")
        files = list(dump.rglob("*.npy"))
        arrays = {f.relative_to(dump).with_suffix("").as_posix(): np.load(f) for f in files}
        save_file(arrays, old / f"{name}.safetensors")
        shutil.copy(dump / "mapping.json", old / f"{name}.mapping.json")
    shutil.copy(room / "model.gguf", old / "model.gguf")
    certificate = written(
        tmp_path,
        certify(old / "a.safetensors", old / "b.safetensors", model=old / "model.gguf").to_json(),
    )
    for name, now in (("a", "first"), ("b", "second")):
        for kind in ("safetensors", "mapping.json"):
            (old / f"{name}.{kind}").rename(new / f"{now}.{kind}")
    (old / "model.gguf").rename(new / "renamed.gguf")
    (new / "a.safetensors").write_text("another file, that nobody has named")
    dumps = [new / "first.safetensors", new / "second.mapping.json"]
    assert verify(certificate, dumps, model=new / "renamed.gguf") is None
    changed = verify(certificate, dumps[::-1], model=new / "renamed.gguf")
    assert changed is not None and str(new / "second.") in changed.field
    with pytest.raises(UserError, match=r"new/third\.mapping\.json"):
        verify(certificate, [new / "third.safetensors", dumps[1]], model=new / "renamed.gguf")


DAMAGED: dict[str, Callable[[dict], Any]] = {
    "its version is 1": lambda c: c.update(version=1),
    "field versions is missing": lambda c: c.pop("versions"),
    "field numbers is unknown": lambda c: c.update(numbers=1),
    "field engines is": lambda c: c.update(engines=[]),
    "field tokens is": lambda c: c.update(tokens=["1"]),
    "field inputs is": lambda c: c["inputs"][0].pop("of"),
    "field inputs.0.of is 'engine 3'": lambda c: c["inputs"][0].update(of="engine 3"),
    "field engines.0.values is missing": lambda c: c["engines"][0].pop("values"),
}


@pytest.mark.parametrize("words", DAMAGED)
def test_a_damaged_certificate_is_refused(tmp_path: Path, issued: str, words: str) -> None:
    fields = json.loads(issued)
    DAMAGED[words](fields)
    with pytest.raises(UserError, match=f"certificate.json: .*{words}"):
        verify(written(tmp_path, json.dumps(fields)))


def test_a_directory_with_an_adapter(tmp_path: Path, room: Path) -> None:
    """Their configs belong to the inputs; and an engine without the adapter is wrong."""
    write_hf(tmp_path / "model", CASE.config, CASE.parameters())
    first = {name: x for name, x in CASE.parameters().items() if "layers.0." in name}
    write_peft(tmp_path / "lora", random_pairs(first, rank=2, targets=("up_proj",)))
    found = certify(room / "clean", model=tmp_path / "model", adapter=tmp_path / "lora")
    files = {(one.of, one.file) for one in found.inputs}
    assert {("checkpoint", "config.json"), ("adapter 1", "adapter_config.json")} <= files
    assert ("adapter 1", "adapter_model.safetensors") in files
    assert found.verdict != "certified" and found.engines[0].first is not None
    assert found.engines[0].first.tensor == "layers.0.up_proj"
    assert verify(written(tmp_path, found.to_json())) is None
    assert certify(room / "clean", model=tmp_path / "model").certified


# --- The page ----------------------------------------------------------------------------------


def test_what_the_page_shows_in_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With another engine's dumps of the bundled model, so that the places may be others."""
    page = (REPOSITORY / "docs" / "certificate.md").read_text(encoding="utf-8")
    found = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", page, re.DOTALL)
    assert found is not None
    checkpoint = opening.open_model()
    params = bundled_parameters(checkpoint)
    tokens = list(range(300, 308))
    monkeypatch.chdir(tmp_path)
    for name, wrong in {"a": {}, "b": {"dtype": "bfloat16"}, "dump": {"biases": False}}.items():
        other_engine.dump(Path(name), checkpoint.config, params, tokens, **wrong)
        mapping = json.loads(Path(name, "mapping.json").read_text())
        Path(name, "mapping.json").write_text(json.dumps(mapping | {"tokens": tokens}))
    for name in ("a", "b"):
        open_trace(name, checkpoint.config).save(f"{name}.safetensors")
    exec(found[1], {})
    shown, said = capsys.readouterr().out.splitlines(), found[2].splitlines()
    for ours, theirs, words in zip(shown, said, (1, 1, 6), strict=True):
        assert ours.split()[:words] == theirs.split()[:words]


def bundled_parameters(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """By Hugging Face's names, as the other engine takes them."""
    drawn = random_parameters(dataclasses.replace(checkpoint.config, vocab_size=1))
    values = CheckpointValues(checkpoint)
    return {name: np.asarray(values.rows(gguf_name(name))[:], np.float32) for name in drawn}
