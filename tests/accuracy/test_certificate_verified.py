"""Certificates computed again: tampered with, damaged, of inputs that have moved; and the page."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from safetensors.numpy import save_file

from qwen_jax import opening
from qwen_jax.accuracy import Change, certify, verify
from qwen_jax.accuracy.traces.foreign import open_trace
from qwen_jax.accuracy.weights.checkpoint_values import CheckpointValues
from qwen_jax.errors import UserError
from qwen_jax.weights.loader import Checkpoint
from tests.accuracy import other_engine
from tests.accuracy.certificate_room import CASE, of, room, written
from tests.tiny_adapters import random_pairs, write_peft
from tests.tiny_checkpoints import gguf_name, random_parameters, write_hf

__all__ = ["room"]

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def issued(room: Path) -> str:
    """Of two clean engines, as JSON."""
    return of(room, "clean", "narrow").to_json()


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


def test_a_dump_is_no_certificate(tmp_path: Path, room: Path) -> None:
    (tmp_path / "x.json").write_bytes(safetensors.numpy.save({"x": np.zeros(3, np.float32)}))
    for path, kind in ((tmp_path / "x.json", "safetensors"), (room / "model.gguf", "GGUF")):
        with pytest.raises(
            UserError, match=f"a {kind} file; name a certificate, the JSON file that"
        ):
            verify(path)


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
