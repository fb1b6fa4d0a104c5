"""Records that somebody has changed, lost or made up: who reads them refuses them in a sentence."""

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from qwen_jax.experiments import lines as lines_module
from qwen_jax.experiments import quantize, runner
from qwen_jax.experiments.lines import Lines, NotWritten, placed, write_atomically
from qwen_jax.experiments.tasks.bench import Bench
from qwen_jax.experiments.tasks.compare import Compare
from qwen_jax.experiments.tasks.evaluate import Evaluate
from qwen_jax.experiments.tasks.generate import Generate
from qwen_jax.experiments.tasks.perplexity import Perplexity
from qwen_jax.settings import get_config
from tests.experiments.conftest import lines
from tests.experiments.fake import Count

Experiment = Callable[..., list[str]]
FINISHED = '{"event": "finished", "point": "POINT", "metrics": {"total": 1.0}'
EVENTS = {
    '{"a": 1}': "it has no 'event'",
    '{"event": 1}': "'event' is 1, but it must be a text",
    '{"event": "finished", "metrics": {}}': "it has no 'point'",
    '{"event": "started", "point": "../../x"}': "'point' is '../../x', but it must be a point of",
    '{"event": "started", "point": ["x"]}': "'point' is ['x'], but it must be a point of",
    '{"event": "failed", "point": "POINT", "kind": "y"}': "it has no 'reason'",
    '{"event": "failed", "point": "POINT", "kind": "y", "reason": 1}': "'reason' is 1",
    '{"event": "finished", "point": "POINT", "metrics": [1]}': "'metrics' is [1], but it must be",
    FINISHED.replace("1.0", '"x"') + "}": "'metrics' is {'total': 'x'}",
    FINISHED.replace("1.0", "true") + "}": "'metrics' is {'total': True}",
    FINISHED.replace("1.0", "1e999") + "}": "'metrics' is {'total': inf}",
    FINISHED.replace("1.0", "9" * 400) + "}": "'metrics' is {'total': 999",
    FINISHED.replace("1.0", "NaN") + "}": "NaN is no number of JSON",
    FINISHED + ', "seconds": "x"}': "'seconds' is 'x', but it must be a finite number",
    FINISHED + ', "operations": [{"operation": "x"}]}': "'operations' is [{'operation': 'x'}]",
    '{"event": "session", "environment": "../../../etc/x"}': "'environment' is '../../../etc/x'",
    "nonsense": "it is not JSON (Expecting value at column 1)",
    "[" * 100_000: "nested too deeply",
    "7": "it is 7, but it must be a JSON object",
    '{"event": "x", "event": "y"}': "the key 'event' appears twice",
    "": "it is not JSON",
}
OUTPUTS = {
    '{"a": 1}': "it has no 'point'",
    '{"point": 7}': "'point' is 7, but it must be a point of",
    '{"point": "0123456789ab"}': "'point' is '0123456789ab', but it must be a point of",
    "nonsense": "it is not JSON",
}


def test_a_file_cut_at_a_lines_end(
    experiment: Experiment,
    run: Callable,
    refuses: Callable[..., None],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It looks whole, and what was in it is gone."""
    argv, outputs = experiment('axis("n", [1, 2])'), tmp_path / "w" / "outputs.jsonl"
    assert run(*argv).code == 0
    whole = outputs.read_text().splitlines(True)
    outputs.write_text("".join(whole[:-1]))
    (*_, point) = json.loads((tmp_path / "w" / "config.json").read_text())["assigned"]
    said = f"{outputs} has 11 lines of the point {point}, which had 12 when it ended; restore the"
    refuses(argv, said)
    refuses(["merge", str(tmp_path / "w"), f"--workdir={tmp_path / 'merged'}"], said)
    assert run("report", str(tmp_path / "w")).code == 0 and said in caplog.text
    events = tmp_path / "w" / "metrics.jsonl"
    events.write_text(events.read_text().replace('"outputs": 12', '"outputs": -1'))
    refuses(argv, "'outputs' is -1, but it must be a number from 0 on")


def test_lines_that_are_no_records(
    experiment: Experiment, run: Callable, refuses: Callable, tmp_path: Path
) -> None:
    """Whoever reads a line refuses it: merge reads all, a report what happened."""
    argv, w = experiment('axis("n", [1, 2])'), tmp_path / "w"
    for shard in ("1/2", "2/2"):
        run(*argv, f"--shard={shard}")
    shard = w / "shard-1-of-2"
    (point,) = json.loads((shard / "config.json").read_text())["assigned"]
    for name, cases in (("metrics.jsonl", EVENTS), ("outputs.jsonl", OUTPUTS)):
        path = shard / name
        whole = path.read_text()
        number = whole.count("\n") + 1
        for line, words in cases.items():
            path.write_text(whole + line.replace("POINT", point) + "\n")
            said = f"{path}, line {number} is damaged: "
            refuses(["merge", str(w)], said, words)
            refuses([*argv, "--shard=1/2"], said, words)
            if cases is EVENTS:
                refuses(["report", str(shard)], said, words)
        path.write_text(whole)
    assert not (w / "config.json").exists() and not (w / "metrics.jsonl").exists()
    assert run("merge", str(w)).code == 0


CONFIGS: dict[str, tuple[Any, str]] = {
    "config_file": (7, "'config_file' is 7, but it must be a text"),
    "changed": ([], "'changed' is []"),
    "config": ({"a": {"b": 1}}, "'config' is {'a': {'b': 1}}"),
    "points": ([{"id": "x/../..", "overrides": {}}], "'points' is [{'id': 'x/../..'"),
    "assigned": (["0123"], "assigned has '0123', which is none of its points"),
    "shard": (1, "'shard' is 1"),
    "inputs": ("", "'inputs' is ''"),
}


def test_a_config_changed_by_hand(
    experiment: Experiment, run: Callable, refuses: Callable, tmp_path: Path
) -> None:
    argv, path = experiment('axis("n", [1])'), tmp_path / "w" / "config.json"
    run(*argv)
    whole = json.loads(path.read_text())
    for field, (value, words) in CONFIGS.items():
        path.write_text(json.dumps(whole | {field: value}))
        for task in (argv, ["report", str(path.parent)]):
            refuses(task, f"{path}: ", words, "; restore the file")


def test_a_file_that_is_gone(
    experiment: Experiment, run: Callable, refuses: Callable, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    argv, w = experiment('axis("n", [1, 2])'), tmp_path / "w"
    for shard in ("1/2", "2/2"):
        run(*argv, f"--shard={shard}")
    for gone, left in (("outputs", "metrics"), ("metrics", "outputs")):
        path = w / "shard-2-of-2" / f"{gone}.jsonl"
        path.rename(tmp_path / "kept")
        said = f"{path} is gone, which {left}.jsonl goes with; restore it."
        refuses(["merge", str(w)], said)
        refuses([*argv, "--shard=2/2"], said)
        assert run("report", str(path.parent)).code == 0 and said in caplog.messages
        assert not path.exists()
        (tmp_path / "kept").rename(path)
    assert run("merge", str(w)).code == 0


@pytest.mark.parametrize(
    "name", ["config.json", "metrics.jsonl", "outputs.jsonl", "lock", "log.txt", "environments/x"]
)
def test_records_that_are_pipes_or_links(
    experiment: Experiment, run: Callable, refuses: Callable, tmp_path: Path, name: str
) -> None:
    argv, w = experiment('axis("n", [1])'), tmp_path / "w"
    run(*argv)
    path, mine = w / name, tmp_path / "mine"
    if path.exists():
        path.rename(mine)
    else:
        mine.write_text("{}")
    before = mine.read_bytes()
    for make, words in (
        (os.mkfifo, f"{path} is no file; remove it"),
        (lambda path: path.symlink_to(mine), f"{path} is a link to {mine}, outside of"),
        (
            lambda path: path.symlink_to(path.name),
            "config.json" if name == "config.json" else f"{path} is a link to nothing ({path}); r",
        ),
    ):
        make(path)
        for task in (argv, ["report", str(w)], ["merge", str(w), str(tmp_path), f"--workdir={w}2"]):
            refuses(task, words)
        path.unlink()
    assert mine.read_bytes() == before


def test_a_link_within_the_directory_is_followed(
    experiment: Experiment, run: Callable, tmp_path: Path
) -> None:
    argv, w = experiment('axis("n", [1])'), tmp_path / "w"
    run(*argv)
    (w / "outputs.jsonl").rename(w / "large.jsonl")
    (w / "outputs.jsonl").symlink_to("large.jsonl")
    (tmp_path / "link").symlink_to(w)
    assert run("report", str(tmp_path / "link")).code == 0
    assert run(*argv).code == 0


ANSWER = {"row": 0, "sample": 0, "text": "a", "finish_reason": "stop", "tokens": [1]}
SCORES = {"window": 0, "nll": [0.5] * 3, "nll_base": [0.5] * 3, "kld": [0.5] * 3}
ITEMS_OF = {
    Generate: (
        ANSWER,
        {"row": -1, "sample": "0", "text": None, "finish_reason": 1, "tokens": [""]},
    ),
    Bench: ({"prefill_seconds": 0.5, "decode_seconds": 1}, {"decode_seconds": 0}),
    Perplexity: (
        {"window": 0, "nll": [0.5, 1, 2.5]},
        {"window": None, "nll": [0.5, 1], "nll ": [0.5, float("inf"), 1]},
    ),
    Compare: (SCORES | {"same_top": [True] * 3}, {"same_top": [1, 0, 1], "kld": [[0.5]] * 3}),
    Evaluate: (
        {"request": "0a", "type": "generate_until", "response": "x"},
        {"request": 1, "type": "loglikelihood", "response": [0.5, True], "type ": "other"},
    ),
}


@pytest.mark.parametrize("task", ITEMS_OF, ids=lambda task: task.__name__)
def test_every_task_knows_its_items(task: type) -> None:
    good, wrong = ITEMS_OF[task]
    one = object.__new__(task)  # What an item must be follows from the context alone.
    one.config = get_config()
    one.config.experiment.context = 8
    assert one.fault_of(good) == ""
    for name, value in wrong.items():
        name = name.strip()
        assert one.fault_of({**good, name: value}), name
        assert f"it has no {name!r}" in one.fault_of({k: v for k, v in good.items() if k != name})


def test_an_item_changed_by_hand_fails_its_point(
    experiment: Experiment, run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv, w = experiment('axis("n", [1])'), tmp_path / "w"
    run(*argv)
    events = (w / "metrics.jsonl").read_text().splitlines(True)
    (w / "metrics.jsonl").write_text("".join(e for e in events if "finished" not in e))
    wrong = "'value' is 'x', but it must be a number"
    monkeypatch.setattr(Count, "fault_of", lambda task, item: wrong * (item["index"] == 3))
    result = run(*argv)
    assert result.code == 1 and f"outputs.jsonl, line 4 is damaged: {wrong}" in result.out


@pytest.mark.usefixtures("loaded")
def test_a_window_that_is_deleted_is_computed_again(
    experiment: Experiment, run: Callable, tmp_path: Path
) -> None:
    """Not the last one in its stead."""
    text, w = tmp_path / "text.txt", tmp_path / "w"
    text.write_text("a" + "snow falls on the old pond; " * 40)
    argv = experiment(
        'axis("experiment.context", [64])',
        "config.experiment.task = 'perplexity'; config.experiment.context = 64; "
        f"config.experiment.text = {str(text)!r}",
    )
    assert run(*argv).code == 0
    outputs, events = lines(w / "outputs.jsonl"), lines(w / "metrics.jsonl")
    assert len(outputs) > 3
    write = [json.dumps(item) + "\n" for item in (outputs[0], *outputs[2:])]
    (w / "outputs.jsonl").write_text("".join(write))
    write = [json.dumps(event) + "\n" for event in events if event["event"] != "finished"]
    (w / "metrics.jsonl").write_text("".join(write))
    assert run(*argv).code == 0
    again = lines(w / "outputs.jsonl")
    assert sorted(again, key=lambda item: item["window"]) == outputs
    assert lines(w / "metrics.jsonl")[-1]["metrics"] == events[-1]["metrics"]


def full(*args: object) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_names_the_file(
    experiment: Experiment, run: Callable, refuses: Callable, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Whichever record is the first that has no room."""
    lines_ = Lines(tmp_path / "x.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        patch.setattr(os, "ftruncate", full)
        with pytest.raises(NotWritten, match=r"x\.jsonl can't be written: No space left"):
            lines_.append({"a": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for write in (lines_.sync, lambda: write_atomically(tmp_path / "x.jsonl", "")):
            with pytest.raises(NotWritten, match=r"x\.jsonl can't be written: No space left"):
                write()
    lines_.close()
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]

    argv = experiment('axis("n", [1, 2])')
    for name, patched, at in (
        ("environments", Path, "mkdir"),
        ("log.txt", runner._LogFile, "flush"),
        ("config.py", lines_module, "_put"),
    ):
        shutil.rmtree(tmp_path / "w", ignore_errors=True)
        (tmp_path / "w").mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(logging, "raiseExceptions", True)
            patch.setattr(patched, at, full if at != "mkdir" else _full_for("environments"))
            result = run(*argv)
        assert result.code == 2, (name, result)
        where = tmp_path / "w" / name
        assert f"error: {where} can't be written: No space left on device; make room." in result.err
        assert "Traceback" not in result.err

    elsewhere = [arg.replace(str(tmp_path / "w"), str(tmp_path / "v")) for arg in argv]
    for shard in ("1/2", "2/2"):
        run(*elsewhere, f"--shard={shard}")
    with monkeypatch.context() as patch:
        patch.setattr(lines_module, "_put", full)
        refuses(["merge", str(tmp_path / "v")], "v/metrics.jsonl can't be written: No space left")
    assert not list((tmp_path / "v").glob(".*"))


def _full_for(name: str) -> Callable[..., None]:
    mkdir = Path.mkdir
    return lambda path, *args, **kw: full() if path.name == name else mkdir(path, *args, **kw)


def test_a_full_disk_under_a_models_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a file would be taken for the whole by the next run."""
    monkeypatch.setattr(quantize, "write", lambda source, kind, out: (out.touch(), full()))
    with pytest.raises(NotWritten, match=r"models/x-\w+-Q8_0\.gguf can't be written: No space"):
        quantize.made(Path("x.gguf"), "Q8_0", tmp_path)
    assert not list((tmp_path / "models").iterdir())
    with placed(tmp_path / "a.safetensors") as temporary:
        assert temporary.suffix == ".safetensors"  # which decides what is written
        temporary.write_bytes(np.arange(3).tobytes())
    assert (tmp_path / "a.safetensors").stat().st_size == 24
