"""What --mesh may say, what a device reads of a checkpoint; and tests/mesh, on eight devices."""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax import api, opening
from qwen_jax.engine.form import form_of
from qwen_jax.engine.sampling import Sampling
from qwen_jax.engine.split_weights import splits_of
from qwen_jax.errors import UserError
from qwen_jax.mesh import MeshShape, part
from qwen_jax.scaling import BFLOAT16, Machine, Step, Times, step
from qwen_jax.tasks.inspect import mesh_lines
from qwen_jax.weights.checkpoint import open_checkpoint
from qwen_jax.weights.loader import load_parameters
from qwen_jax.weights.shards import PlainPart, part_of
from tests.cli.conftest import Run, refuses, run
from tests.mesh.eight import FLAG
from tests.tiny_checkpoints import random_parameters, tiny_config, write_gguf

__all__ = ["refuses", "run"]

REPOSITORY = Path(__file__).parents[1]
FLOAT32 = jnp.dtype(jnp.float32)
QWEN_7B = tiny_config(
    num_layers=28, hidden_size=3584, num_heads=28, num_kv_heads=4, head_dim=128, ffn_size=18944,
    vocab_size=152064, tied=False, source="7b",
)  # fmt: skip


def on_eight_devices(marks: str) -> None:
    """JAX makes its devices once, so that these have a process of their own."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks, "tests/mesh"],
        cwd=REPOSITORY,
        env=os.environ | {"XLA_FLAGS": FLAG},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


def test_on_eight_devices() -> None:
    on_eight_devices("not hosts and not long")


@pytest.mark.hosts
def test_more_on_eight_devices() -> None:
    on_eight_devices("hosts")


@pytest.mark.long
def test_what_takes_long_on_eight_devices() -> None:
    on_eight_devices("long")


@pytest.mark.hosts
def test_two_processes() -> None:
    """As two hosts would, over gloo: each has half of the model, and both say what one says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.mesh.one_of_two", str(port), str(number)],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        # Gloo says on stdout whom it has found.
        said = [each.communicate(timeout=240)[0].splitlines()[-1] for each in both]
        first, second = map(json.loads, said)
    finally:
        for each in both:
            each.kill()
    one = api.load(slots=2)
    made = one.generate(["haiku: snow", "haiku: moss"], sampling=Sampling(temperature=1))
    assert first == second and first["texts"] == [completion.text for completion in made]
    assert 1 < first["pages"] < one.engine.layout.pages
    assert first["shards"] == [[10, first["pages"], 1, 128, 64]]


@given(dp=st.integers(1, 65_536), tp=st.integers(1, 65_536), swapped=st.booleans())
def test_what_is_written_is_read(dp: int, tp: int, swapped: bool) -> None:
    texts = [f"dp={dp}", f" tp = {tp} "]
    assert MeshShape.parse(",".join(texts[::-1] if swapped else texts)) == (dp, tp)
    assert MeshShape.parse(str(MeshShape(dp, tp))) == (dp, tp)


def test_one_axis_or_none() -> None:
    assert MeshShape.parse("dp=2") == (2, 1) and MeshShape.parse(None) == (1, 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tp=0", "tp must be a whole number of devices from 1 on"),
        ("tp=-1", "tp must be a whole number"),
        ("dp=two", "dp must be a whole number"),
        ("tp=99999999999999999999", "tp must be a whole number"),
        ("pp=2", "mesh is 'pp=2', but its axes are dp (models that share the texts) and tp"),
        ("tp", "write it as in dp=2,tp=4."),
        ("tp=2,", "each once"),
        ("tp=2,tp=2", "each once"),
        ("", "mesh is ''"),
    ],
)
def test_what_makes_no_sense(text: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        MeshShape.parse(text)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("changes", "tp", "words"),
    [
        ({}, 3, "mesh is tp=3, but of 7b the 4 key/value heads neither divide by 3 nor divide it"),
        ({}, 8, "its 28 query heads don't divide by 8; choose tp from 1, 2, 4."),
        ({"num_kv_heads": 28, "ffn_size": 18946}, 4, "18946 feed-forward units don't divide by 4"),
        ({"vocab_size": 152063}, 2, "its 152063 rows of the vocabulary don't divide by 2"),
    ],
)
def test_what_does_not_divide(changes: dict[str, int], tp: int, words: str) -> None:
    with pytest.raises(UserError) as error:
        MeshShape(tp=tp).check(dataclasses.replace(QWEN_7B, **changes))
    assert words in str(error.value)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_parts_are_the_model(tp: int) -> None:
    MeshShape(tp=tp).check(QWEN_7B)
    norms = (2 * QWEN_7B.num_layers + 1) * QWEN_7B.hidden_size
    each = part(QWEN_7B, tp).num_parameters
    assert tp * (each - norms) + norms == QWEN_7B.num_parameters


def test_the_command_line_refuses(refuses: Callable[..., None]) -> None:
    refuses(["--mesh=tp=0"], "mesh is 'tp=0'")
    refuses(["--mesh=tp=3"], "but of", "haiku.gguf", "choose tp from 1, 2, 4.")
    refuses(["--mesh=dp=3,tp=2"], "takes 6 devices, but JAX has 1 of the platform cpu", FLAG[:-1])
    refuses(["compare", "--mesh=dp=2"], "compare looks at one model")
    refuses(["compare", "--mesh=tp=2", "--parts=inside"], "decode-step kernel of one device")
    refuses(["merge", "--mesh=tp=2"], "--mesh does nothing for merge")


@pytest.mark.parametrize(
    ("mesh", "dtype", "why"),
    [
        (MeshShape(tp=2), "float32", "the weights are float32, not one of"),
        (MeshShape(dp=2, tp=2), "bfloat16", "its devices have to be JAX's first ones, and dp=2 "),
    ],
)
def test_the_step_kernel_says_why_not(mesh: MeshShape, dtype: str, why: str) -> None:
    checkpoint = open_checkpoint(opening.locate())
    asked = {"implementation": "mosaic_gpu", "mesh": mesh}
    with pytest.raises(
        UserError, match=f"can't run this model on the devices of mesh {mesh}: {why}"
    ):
        form_of("auto", checkpoint, np.dtype(jnp.dtype(dtype)), **asked)


def test_devices_that_are_not_there() -> None:
    with pytest.raises(UserError, match="takes 2 devices, but JAX has 1 of the platform cpu"):
        splits_of(MeshShape(dp=2))


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_K"])
def test_a_device_reads_its_part_alone(tmp_path: Path, kind: str) -> None:
    """The parts put together are the checkpoint; columns are cut between blocks where that goes:
    half of 512 inputs are whole blocks of 256, half of 192 are not."""
    config = tiny_config(num_layers=1, tied=False)
    written = write_gguf(tmp_path / "m.gguf", config, random_parameters(config), types=kind)
    checkpoint = open_checkpoint(written.path)
    whole = load_parameters(checkpoint, "float32")
    parts = [part_of(checkpoint, 2, index) for index in range(2)]
    loaded = [load_parameters(part, "float32") for part in parts]
    q, kv = 96, 32
    for name, axis in (
        ("lm_head", 0),
        ("layers.0.o_proj.weight", 1),
        ("layers.0.down_proj.weight", 1),
    ):
        joined = np.concatenate([part[name] for part in loaded], axis)
        np.testing.assert_array_equal(joined, whole[name])
    for number, made in enumerate(loaded):
        ours = np.split(np.asarray(made["layers.0.qkv_proj.weight"]), [q, q + kv])
        theirs = np.split(np.asarray(whole["layers.0.qkv_proj.weight"]), [2 * q, 2 * (q + kv)])
        for own, all_rows in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(own, np.split(all_rows, 2)[number])
    down = parts[1].stored["blk.0.ffn_down.weight"]
    assert isinstance(down, PlainPart)
    assert len(down.raw(0, 256)) * 2 == checkpoint.files.tensors["blk.0.ffn_down.weight"].nbytes


def test_a_step_by_hand() -> None:
    """7B on two devices, for a machine of round numbers."""
    xla = Times(1e12, 1e-5, 0, 2e-5, 1e-6, whole=False)
    kernel = Times(2e12, 1e-6, 1e-9, 3e-6, 1e-6, whole=True)
    machine = Machine("", 1e12, 1e15, 1e11, kernel, xla)
    asked = {"rows": 8, "context": 1000, "machine": machine}

    def on(tp: int, kernel: bool) -> Step:
        return step(QWEN_7B, jnp.dtype(jnp.bfloat16), tp, kernel=kernel, **asked)  # type: ignore[arg-type]

    found = on(2, kernel=False)
    d, ffn, vocab = 3584, 18944, 152064
    layer = 28 * (d * 14 * 128 + 2 * d * 2 * 128 + 18 * 128 + d * 14 * 128 + 3 * d * ffn // 2)
    norms = 57 * d * 4
    assert found.weights == 2 * (layer + 2 * d * vocab // 2) + norms
    assert found.cache == 8 * 1000 * 28 * 2 * 2 * 128 * 2
    assert found.reading == pytest.approx((found.weights - d * vocab + found.cache) / 1e12)
    reduced = 2e-5 + 8 * d * 2 / 1e11
    gathered = 8 * vocab * 4 / 2 / 1e11
    assert found.meeting == pytest.approx(57 * reduced + 2e-5 + gathered)
    assert found.seconds == pytest.approx(found.reading + 28e-5 + found.meeting)
    ours = on(2, kernel=True)
    assert ours.reading == pytest.approx(found.reading / 2)
    assert ours.layers == pytest.approx(28 * (1e-6 + 1e-9 * d * 4))  # 8 to the power of 2/3
    assert ours.meeting == pytest.approx(57 * (3e-6 + 8 * d * 4 / 1e11) + 3e-6 + gathered)
    assert on(1, kernel=False).meeting == on(1, kernel=True).meeting == 0


def test_inspect(run: Run) -> None:
    """What a device would have, though there is but one."""
    result = run("inspect", "--mesh=tp=4", "--implementation=xla")
    assert result.code == 0
    memory, mesh = result.out.split("\n\n")[-2:]
    assert "of each of 4 devices (tp=4):" in memory
    each = part(open_checkpoint(opening.locate()).config, 4).num_parameters * 4
    assert re.search(rf"weights +{each / 1e6:.1f} MB", memory)
    assert "key/value heads                 1 (each on 2 devices)" in mesh
    assert "takes 4 devices; here is 1" in mesh and "64 texts of 512:" in mesh
    assert "the decode step's kernel doesn't run: implementation is xla" in mesh
    config = open_checkpoint(opening.locate()).config
    # A head of 64 is half a tile, and a half of the feed-forward one and a half.
    (line,) = [x for x in mesh_lines(config, MeshShape(tp=4)) if "kernel" in x]
    assert line.endswith("can't run on these: a matrix of 256 x 64 is not made of 16 x 128 tiles")
    uneven = tiny_config(
        num_layers=1, hidden_size=256, num_heads=4, num_kv_heads=2, head_dim=64, ffn_size=384
    )
    (line,) = [x for x in mesh_lines(uneven, MeshShape(tp=2)) if "kernel" in x]
    assert line == "on H200s the decode step's kernel runs on each"


@pytest.mark.parametrize(("mesh", "of"), [(MeshShape(tp=2), ""), (MeshShape(2, 2), " a model")])
def test_what_steps_would_take(mesh: MeshShape, of: str) -> None:
    """As a path by XLA, where that is asked for; of several models' texts the rate is of all."""
    asked, auto = (
        [x for x in mesh_lines(QWEN_7B, mesh, how) if " ms a step" in x] for how in ("xla", "auto")
    )
    assert auto[0].startswith(f"   1 text of 1,024{of}: ")
    assert auto[1].startswith(f"   8 texts of 1,024{of}: ")
    expected = step(QWEN_7B, BFLOAT16, 2, 8, 1024, kernel=False).seconds
    assert f"{expected * 1e3:.2f} ms" in asked[1]
    assert f"{mesh.dp * 8 / expected:,.0f} tokens/s" in asked[1]
    assert (auto == asked) == (mesh.dp > 1)
