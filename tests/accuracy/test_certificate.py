"""Certificates of clean and of wrong engines, what they leave out, and what tampering does."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ml_dtypes import bfloat16
from safetensors.numpy import save_file

from qwen_jax import opening
from qwen_jax.accuracy import certify, verify
from qwen_jax.accuracy.certificate.table import text
from qwen_jax.accuracy.exact.parameters import CheckpointSource
from qwen_jax.accuracy.exact.replay import Replay
from qwen_jax.accuracy.traces.foreign import open_trace
from qwen_jax.accuracy.traces.trace import Trace, load
from qwen_jax.engine.engine import Engine
from qwen_jax.errors import UserError
from tests import numpy_reference
from tests.accuracy.certificate_room import CASE, TOKENS, of, room, with_tensors, written
from tests.accuracy.clean_engines import Clean
from tests.accuracy.planted_traces import Once
from tests.engines import device_parameters

__all__ = ["room"]


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
