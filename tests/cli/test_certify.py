"""`run.py certify`: from dumps to a certificate, to its verification, and what it refuses."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.accuracy import other_engine
from tests.cli.conftest import REPOSITORY, Run
from tests.golden_cases import Case, odd_config
from tests.tiny_checkpoints import write_gguf

CASE = Case(odd_config(num_layers=1), seed=3)
TOKENS = CASE.prompt()[:8]
IDS = "--tokens=" + ",".join(map(str, TOKENS))


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model and two engines' dumps, a clean one and one without biases, in the directory."""
    write_gguf(tmp_path / "m.gguf", CASE.config, CASE.parameters())
    for name, biases in (("clean", True), ("wrong", False)):
        folder = tmp_path / name
        other_engine.dump(folder, CASE.config, CASE.parameters(), TOKENS, biases=biases)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_certificate_and_its_verification(run: Run, room: Path) -> None:
    done = run("certify", "clean", "clean", "--model=m.gguf", IDS, "--output=c.json")
    assert (done.code, done.err) == (0, "wrote c.json\n")
    assert done.out.startswith("CERTIFIED: none of ")
    assert "the whole difference of both engines lies within rounding" in " ".join(done.out.split())
    assert all(len(line) <= 100 for line in done.out.splitlines())
    assert json.loads((room / "c.json").read_text())["verdict"] == "certified"
    again = run("certify", "--verify=c.json")
    told = "VERIFIED: c.json is what its inputs give; its verdict is 'certified'.\n"
    assert (again.code, again.out, again.err) == (0, told, "")
    (room / "clean" / "mapping.json").write_text("{}")
    changed = run("certify", "--verify=c.json")
    assert changed.code == 1 and changed.out.startswith("DIFFERS: inputs.")
    assert "sha256 (clean/mapping.json)" in changed.out


def test_a_cause_is_exit_code_1_and_a_certificate_too(run: Run, room: Path) -> None:
    done = run("certify", "wrong", "--model=m.gguf", IDS, "--output=c.json")
    assert done.code == 1 and "NOT CERTIFIED, for a cause: zero_qkv_bias." in done.out
    assert run("certify", "--verify=c.json").code == 0
    (room / "moved").mkdir()
    for name in ("wrong", "m.gguf"):
        (room / name).rename(room / "moved" / name)
    assert (
        run("certify", "moved/wrong/mapping.json", "--model=moved/m.gguf", "--verify=c.json").code
        == 0
    )


def test_versions_may_differ_and_are_told(run: Run, room: Path) -> None:
    run("certify", "clean", "--model=m.gguf", IDS, "--output=c.json")
    fields = json.loads((room / "c.json").read_text())
    fields["versions"]["numpy"] = "0.1"
    (room / "c.json").write_text(json.dumps(fields))
    done = run("certify", "--verify=c.json")
    assert done.code == 0 and done.err == "c.json was made with numpy 0.1\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["There is nothing to certify; name a trace, a dump or a log, or two, as in cer"]),
        (["a", "b", "c"], ["'c' is one too many"]),
        (["nowhere", "--model=m.gguf"], ["nowhere: there is no such file or directory"]),
        (["clean", "--model=m.gguf"], ["the text is not known", "tokens"]),
        (["clean", "--model=m.gguf", "--tokens=1,x"], ["tokens is '1,x'"]),
        (["clean", "--model=nowhere.gguf"], ["nowhere.gguf: there is no such file"]),
        (["clean", "--output=m.gguf"], ["--output=m.gguf exists already"]),
        (["clean", "--output=x/c.json"], ["--output=x/c.json can't be written: x is no directory"]),
        (["clean", "--output=/proc/c.json"], ["--output=/proc/c.json can't be written: No such f"]),
        (["clean", "--dtype=float32"], ["dtype is 'float32', but a dump says its own"]),
        (["--verify=nowhere"], ["nowhere: the file can't be read"]),
        (["--verify=m.gguf"], ["m.gguf"]),
        (["--verify=clean/mapping.json"], ["it is damaged: the field"]),
        (["--verify=c.json", "--output=d.json"], ["--output does nothing for --verify"]),
        (["--verify=c.json", IDS], ["--tokens does nothing for --verify; leave it out."]),
    ],
)
@pytest.mark.usefixtures("room")
def test_refused(refuses: Callable[..., None], argv: list[str], words: list[str]) -> None:
    refuses(["certify", *argv], *words)


def test_verify_belongs_to_certify(refuses: Callable[..., None]) -> None:
    refuses(["compare", "--verify=c.json"], "--verify does nothing for compare; it belongs to cert")


def test_an_input_that_is_not_there(run: Run, refuses: Callable[..., None], room: Path) -> None:
    run("certify", "clean", "--model=m.gguf", IDS, "--output=c.json")
    (room / "clean" / "tok.npy").unlink()
    refuses(["certify", "--verify=c.json"], "clean/tok.npy: the file can't be read: No such file")
    refuses(["certify", "a", "b", "--verify=c.json"], "it is of 1 dumps, but 2 are named")


def test_importing_the_laboratory_stays_light() -> None:
    program = (
        "import sys, qwen_jax; qwen_jax.accuracy\n"
        "light = not {'jax', 'numpy'} & set(sys.modules)\n"
        "from qwen_jax.accuracy import certify, compare, verify\n"
        "sys.exit(not (light and callable(certify) and callable(compare) and callable(verify)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, cwd=REPOSITORY)
    assert (done.returncode, done.stderr) == (0, b"")
