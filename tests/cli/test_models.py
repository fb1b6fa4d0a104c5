"""Model files that are damaged, missing or too large, and machines without a device."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from qwen_jax import api
from qwen_jax.engine import memory, steps
from qwen_jax.weights import loader
from tests.cli.conftest import BUNDLED, REPOSITORY, Result, Run, interrupts_at
from tests.fake_hub import FakeHub
from tests.tiny_checkpoints import random_parameters, tiny_config, write_gguf, write_hf


def damaged() -> dict[str, tuple[bytes, str]]:
    whole = BUNDLED.read_bytes()
    return {
        "empty": (b"", "the file is empty"),
        "magic": (b"GGUF", "beyond the end"),
        "text": (b"hello " * 1000, "the file is text, not GGUF, and begins 'hello"),
        "header": (whole[:5000], "beyond the end"),
        "half": (whole[: len(whole) // 2], "but the file has only"),
        "tail": (whole[:-1], "but the file has only"),
        "values": (whole[:-100000] + b"\xff" * 100000, "values that are not finite"),
    }


@pytest.mark.parametrize("kind", damaged())
def test_damaged(refuses: Callable[..., None], tmp_path: Path, kind: str) -> None:
    content, words = damaged()[kind]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    refuses([f"--model={path}", "--prompt=x"], str(path), words)
    if kind != "values":  # which inspect doesn't read
        refuses(["inspect", f"--model={path}"], str(path), words)


def test_huge(refuses: Callable[..., None], tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    refuses([f"--model={path}", "--prompt=x"], "the file is all zeros where it begins")


def test_without_a_tokenizer(refuses: Callable[..., None], tmp_path: Path) -> None:
    config = tiny_config()
    path = write_gguf(tmp_path / "model.gguf", config, random_parameters(config)).path
    for argv in (["generate", "--prompt=x"], ["inspect"]):
        refuses([*argv, f"--model={path}"], "tokenizer.ggml", "missing")
    path = write_hf(tmp_path / "model", config, random_parameters(config)).path
    refuses([f"--model={path}", "--prompt=x"], "tokenizer.json is missing")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.gguf", "there is no such file"),
        ("", "--model is empty"),
        ("~nobody/x.gguf", "there is no such file"),
        ("x" * 5000, "there is no such file"),
        ("http://host/x.gguf", "an address can't be read as a model"),
        ("hf:", "does not read hf:owner/repo"),
        ("hf:a/b:c:d", "does not read hf:owner/repo"),
        ("/dev/null", "can't be read: it is a device"),
    ],
)
def test_that_are_not_there(refuses: Callable[..., None], name: str, words: str) -> None:
    refuses([f"--model={name}", "--prompt=x"], words)


def test_directories(refuses: Callable[..., None], tmp_path: Path) -> None:
    refuses([f"--model={tmp_path}", "--prompt=x"], "holds no model")
    for name in "ab":
        (tmp_path / f"{name}.gguf").write_bytes(b"")
    refuses([f"--model={tmp_path}", "--prompt=x"], "holds the GGUF files a.gguf, b.gguf")
    (tmp_path / "config.json").write_text("{")  # as repositories of GGUF files have one
    refuses([f"--model={tmp_path}", "--prompt=x"], "holds the GGUF files a.gguf, b.gguf")
    (tmp_path / "model.safetensors").touch()
    refuses([f"--model={tmp_path}", "--prompt=x"], "config.json: it is not JSON")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("0" * 64, "the SHA-256 is"),
        ("abc", "'abc' is not 64 hexadecimal digits"),
        ("", "--sha256 is empty"),  # as an unset variable leaves it
        (f"{'0' * 64},{'0' * 64}", "2 hash(es) were given"),
    ],
)
def test_sha256(refuses: Callable[..., None], given: str, words: str) -> None:
    refuses([f"--sha256={given}"], words)


def test_sha256_of_other_things(refuses: Callable[..., None], tmp_path: Path) -> None:
    part = tmp_path / "m-00001-of-00002.gguf"
    part.write_bytes(BUNDLED.read_bytes())
    flag = f"--sha256={'0' * 64}"
    refuses([f"--model={part}", "--prompt=x", flag], "the model is 2")
    config = tiny_config()
    path = write_hf(tmp_path / "hf", config, random_parameters(config)).path
    refuses([f"--model={path}", "--prompt=x", flag], "sha256 is for GGUF files")


def test_weights_that_do_not_fit(
    refuses: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 10_000_000)
    monkeypatch.setattr(loader, "decode", lambda *args: pytest.fail("it was loaded"))
    refuses(
        ["--dtype=float32", "--weights=expanded"],
        "weights take 13.9 MB in float32",
        "10.0 MB free",
        "bfloat16",
    )


@pytest.mark.usefixtures("loaded")
def test_a_cache_that_does_not_fit(
    refuses: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Read where it is known, as of an accelerator.
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    refuses(["--slots=1"], "There is no room for keys and values", "1.0 kB free")
    # Half of it is for the cache: one page, of 128 tokens.
    monkeypatch.setattr(memory, "free_memory", lambda: 1_500_000)
    refuses(["--slots=1"], "A text of ", "there is room for 128 tokens", "lower max_tokens")


@pytest.mark.usefixtures("loaded")
def test_samples_that_nobody_could_wait_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are asked for as slots come free, not made before the first, which would take minutes
    and all memory."""
    interrupts_at(monkeypatch, "step", 3)
    result = run("--n=1000000", "--temperature=1")
    assert result.code == 130 and result.out.count("--- sample") < 100


@pytest.mark.parametrize("platform", ["nonsense", "cuda"])
def test_no_device(platform: str) -> None:
    environment = os.environ | {"JAX_PLATFORMS": platform}
    command = [sys.executable, str(REPOSITORY / "run.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        pytest.skip(f"JAX has the platform {platform} here, so it can't be missing")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert f"cannot use the platform in JAX_PLATFORMS={platform}" in done.stderr


@pytest.mark.usefixtures("loaded")
def test_out_of_memory_on_the_device(
    refuses: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*args: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nwhile allocating")

    monkeypatch.setattr(steps, "extend", exhausted)
    refuses([], "ran out of memory (RESOURCE_EXHAUSTED: Out of memory); lower slots")


def test_nothing_is_written_into_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tests run without a compilation cache; `api.load` must not switch it on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    api.load()
    assert not list(tmp_path.iterdir())
    assert not jax.config.values["jax_compilation_cache_dir"]


def test_of_the_hub_at_a_commit_that_is_shown(
    run: Callable[..., Result], loaded: api.Model, hub_server: FakeHub
) -> None:
    hub_server.files["haiku-q8_0.gguf"] = BUNDLED.read_bytes()
    name = f"hf:{FakeHub.repo}"
    result = run("inspect", f"--model={name}:q8-0")
    assert result.code == 0 and f"file\n  {name}@{'a' * 40}:q8-0\n" in result.out
    line = f"{name} is {name}@{'a' * 40}\n"
    assert run(f"--model={name}", "--prompt=x", "--max_tokens=1").err.startswith(line)
    pinned = run("inspect", f"--model={name}@{'a' * 40}")
    assert pinned.code == 0 and pinned.err == ""
