"""A file of answers that was cut short is gone on with, and a prompt's seeds follow its id."""

import fcntl
import io
import json
import resource
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_jax import api
from qwen_jax.experiments import lines
from qwen_jax.tasks import answers
from tests.cli.conftest import Run, answers_in


def file_of(tmp_path: Path, count: int = 8) -> Path:
    """Prompts with names, of which one is wrong."""
    path = tmp_path / "prompts.jsonl"
    lines = [{"id": f"p{i}", "prompt": f"rain {i}", "max_tokens": 4 + i} for i in range(count)]
    lines[3] = {"id": "p3", "messages": []}
    lines[5] |= {"n": 3, "top_logprobs": 1, "label": "x"}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("cut", [0.0, 0.55, 0.99, 1.0])
def test_resumed_it_comes_out_as_if_it_had_not_been_cut(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: float
) -> None:
    path, whole, part = file_of(tmp_path), tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    argv = [f"--prompt_file={path}", "--temperature=1", "--n=2", "--slots=3"]
    assert run(*argv, f"--output={whole}").code == 3
    content = whole.read_bytes()
    part.write_bytes(content[: int(cut * len(content))])
    (tmp_path / "part.jsonl.settings.json").write_text(
        (tmp_path / "whole.jsonl.settings.json").read_text()
    )
    made: list[str] = []
    real = api.Model.request
    monkeypatch.setattr(
        api.Model, "request", lambda self, p, **o: made.append(p) or real(self, p, **o)
    )
    result = run(*argv, f"--output={part}", "--resume")
    assert (result.code, result.out) == (3, "")
    assert "1 of 8 prompts were refused" in result.err
    assert sorted(part.read_text().splitlines()) == sorted(content.decode().splitlines())
    # What was refused is tried again.
    assert (len(made) == 8) == (cut == 0) and (made == [[]]) == (cut == 1)


@pytest.mark.usefixtures("loaded")
def test_a_full_disk_names_the_file_and_is_gone_on_from(run: Run, tmp_path: Path) -> None:
    path, output = file_of(tmp_path), tmp_path / "out.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))  # more than the settings beside it
    try:
        result = run(f"--prompt_file={path}", f"--output={output}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = f"error: --output={output} can't be written: File too large; allow larger files"
    assert result.code == 2 and said in result.err and "Traceback" not in result.err
    assert run(f"--prompt_file={path}", f"--output={output}", "--resume").code == 3
    assert len(answers_in(output.read_text())) == 10


@pytest.mark.usefixtures("loaded")
def test_resuming_what_is_not_there_begins_it(run: Run, tmp_path: Path) -> None:
    path, output = file_of(tmp_path), tmp_path / "out.jsonl"
    assert run(f"--prompt_file={path}", f"--output={output}", "--resume").code == 3
    assert len(answers_in(output.read_text())) == 10
    noted = json.loads((tmp_path / "out.jsonl.settings.json").read_text())
    assert (noted["model"], noted["dtype"], noted["sampling.temperature"]) == (
        "haiku",
        "float32",
        0,
    )
    assert noted["sampling.seed"] == 0 and noted["contents"].keys() == {"haiku"}
    # What lies beside a file that is gone says nothing of the next one.
    output.unlink()
    assert run(f"--prompt_file={path}", f"--output={output}", "--temperature=1").code == 3


@pytest.mark.usefixtures("loaded")
def test_killed_before_its_first_answer(run: Run, tmp_path: Path) -> None:
    """What is left is a file without a line, and perhaps none of settings."""
    path, output = file_of(tmp_path), tmp_path / "out.jsonl"
    output.touch()
    assert run(f"--prompt_file={path}", f"--output={output}", "--resume").code == 3
    assert len(answers_in(output.read_text())) == 10


@pytest.mark.usefixtures("loaded")
def test_an_array_and_stdin_are_gone_on_with(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = file_of(tmp_path).read_text()
    array, output = tmp_path / "prompts.json", tmp_path / "out.jsonl"
    array.write_text(f"[{','.join(lines.splitlines())}]")
    run(f"--prompt_file={array}", f"--output={output}")
    whole = output.read_text()
    output.write_text(whole[: len(whole) // 2])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert run("--prompt_file=-", f"--output={output}", "--resume").code == 3
    without = [
        [a for a in answers_in(content) if "error" not in a]
        for content in (whole, output.read_text())
    ]
    assert sorted(map(str, without[0])) == sorted(map(str, without[1]))


@pytest.mark.usefixtures("nothing_loads")
def test_two_runs_do_not_share_an_output(refuses: Callable[..., None], tmp_path: Path) -> None:
    path, output = file_of(tmp_path), tmp_path / "out.jsonl"
    with output.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        refuses([f"--prompt_file={path}", f"--output={output}", "--resume"], "no other run writes")
    assert output.exists()  # It was removed, since it was empty: the other run's answers were lost.


@pytest.mark.usefixtures("loaded")
def test_what_cannot_be_resumed(
    run: Run, refuses: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, output = file_of(tmp_path), tmp_path / "out.jsonl"
    argv = [f"--prompt_file={path}", f"--output={output}"]
    run(*argv)
    kept = output.read_text()
    refuses([f"--prompt_file={path}", "--resume"], "--resume needs --output")
    monkeypatch.setattr("qwen_jax.api.load", lambda *args, **kwargs: pytest.fail("it was loaded"))
    said = "was begun with sampling.temperature 0.0, which is 0.5 now"
    changed = run(*argv, "--resume", "--temperature=0.5")
    assert changed.code == 2 and said in changed.err
    output.write_text(kept + '{"id": 1, "sample": "0", "text": "a"}\n')
    said = "line 11 is no answer of a run, so that --resume can't go on with it: 'sample' is '0'"
    refuses([*argv, "--resume"], said)
    output.write_text(kept)
    path.write_text('{"id": 1, "prompt": "a"}\n{"prompt": "b"}\n{"id": 2, "prompt": "c"}\n')
    refuses([*argv, "--resume"], "prompts.jsonl has two prompts with the id 2, by which")
    output.write_text(kept + "[]\n")
    refuses([*argv, "--resume"], "out.jsonl, line 11 is no answer of a run")
    beside = tmp_path / "out.jsonl.settings.json"
    noted = json.loads(beside.read_text())
    output.write_text(kept)
    file_of(tmp_path)
    for other, words in (
        ({}, "settings.json doesn't say with which adapter --output="),
        (noted.keys() - {"prompts"}, "settings.json doesn't say with which prompts --output="),
        (noted.keys() - {"sampling.seed"}, "doesn't say with which sampling.seed --output="),
        (noted | {"prompts": []}, "settings.json: prompts is [], but it must be an object, {...};"),
    ):
        left = other if isinstance(other, dict) else {name: noted[name] for name in other}
        beside.write_text(json.dumps(left))
        told = run(*argv, "--resume")
        assert told.code == 2 and words in told.err.splitlines()[-1]
    output.write_text(kept + "[]\n")
    beside.unlink()
    refuses([*argv, "--resume"], "has no out.jsonl.settings.json beside it")
    assert output.read_text() == kept + "[]\n"


@pytest.mark.usefixtures("loaded")
def test_a_seed_follows_the_id(run: Run, tmp_path: Path) -> None:
    """Whatever stands before it in the file."""
    path, argv = file_of(tmp_path), ["--temperature=1", "--n=2"]
    first = run(f"--prompt_file={path}", *argv)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[5], '{"id": "new", "prompt": "fog"}', lines[6], lines[1]]))
    second = run(f"--prompt_file={path}", *argv)
    found = [
        {(a["id"], a["sample"]): a["text"] for a in answers_in(result.out) if "error" not in a}
        for result in (first, second)
    ]
    assert all(found[0][key] == text for key, text in found[1].items() if key[0] != "new")
    assert len(set(found[1].values())) == 9


@pytest.mark.usefixtures("loaded")
def test_a_prompt_that_was_wrong_is_answered_once_it_is_right(run: Run, tmp_path: Path) -> None:
    path, output = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    argv = [f"--prompt_file={path}", f"--output={output}", "--max_tokens=2"]
    right = json.dumps({"id": "a", "prompt": "rain"})
    path.write_text(f"{right}\n{json.dumps({'id': 'b', 'prompt': 3})}\n")
    assert run(*argv).code == 3
    (answered,) = [line for line in answers_in(output.read_text()) if "error" not in line]
    path.write_text(f"{right}\n{json.dumps({'id': 'b', 'prompt': 'snow'})}\n")
    result = run(*argv, "--resume")
    assert result.code == 0 and "1 of 2 prompts are answered already." in result.err
    first, second = answers_in(output.read_text())
    assert first == answered
    assert second["id"] == "b" and len(second["tokens"]) == 2
    assert "2 of 2 prompts are answered already." in run(*argv, "--resume").err


@pytest.mark.usefixtures("loaded")
def test_answers_are_of_the_prompts_that_are_asked(
    run: Run, refuses: Callable[..., None], tmp_path: Path
) -> None:
    """Lines moved, another prompt under an id, other settings of its own; new ones are welcome."""
    text, output = tmp_path / "p.txt", tmp_path / "out.jsonl"
    argv = [f"--prompt_file={text}", f"--output={output}", "--max_tokens=2"]
    text.write_text("rain\nsnow\n")
    assert run(*argv).code == 0
    before = output.read_bytes()
    text.write_text("wind\nrain\nsnow\n")
    refuses([*argv, "--resume"], "has an answer to the prompt with the id ")
    assert output.read_bytes() == before
    text.write_text("rain\nsnow\nwind\n")
    assert run(*argv, "--resume").code == 0
    assert len(answers_in(output.read_text())) == 3

    lines = tmp_path / "p.ndjson"
    argv = [f"--prompt_file={lines}", f"--output={tmp_path / 'own.jsonl'}", "--max_tokens=2"]
    lines.write_text(json.dumps({"id": "a", "prompt": "rain"}) + "\n")
    assert run(*argv).code == 0
    lines.write_text(json.dumps({"id": "a", "prompt": "rain", "temperature": 1}) + "\n")
    refuses([*argv, "--resume"], "which is another prompt now, or asks for it otherwise")


def test_ids_that_clash_are_refused_at_the_start(
    refuses: Callable[..., None], tmp_path: Path
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "rain"}\n{"id": 1, "prompt": "snow"}\n')
    argv = [f"--prompt_file={path}", f"--output={tmp_path / 'out.jsonl'}"]
    refuses(argv, "has two prompts with the id 1, by which --output and --resume tell")
    refuses([f"--prompt_file={path}", "--output=-"], "--output=- is no file")


@pytest.mark.usefixtures("loaded")
def test_answers_are_not_read_into_memory(run: Run, tmp_path: Path) -> None:
    """Neither to see what is there nor to cut it."""
    path, output = tmp_path / "p.txt", tmp_path / "out.jsonl"
    path.write_text("rain\n")
    argv = [f"--prompt_file={path}", f"--output={output}", "--max_tokens=1"]
    assert run(*argv).code == 0
    line = output.read_text()
    pads = ({"id": f"x{i}", "sample": 0, "text": "x" * 100_000} for i in range(99))
    with output.open("w") as file:
        file.writelines(json.dumps(pad) + "\n" for pad in pads)
        file.write(line + line[:20])
    tracemalloc.start()
    done, cut = answers._written(output, answers.PLAIN)
    assert cut and len(done) == 100
    lines.write_pieces(output, (line for line, key in answers._lines(output, answers.PLAIN) if key))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000 < output.stat().st_size
    assert output.read_text().endswith(f"\n{line}")
