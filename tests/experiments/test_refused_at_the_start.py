"""What is known to be wrong with an experiment is, before any point runs."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_jax import cli, hosts, prompt_lines
from qwen_jax.errors import UserError
from qwen_jax.experiments import inputs, plan
from qwen_jax.experiments.declaration import declare
from tests.cli.conftest import BUNDLED
from tests.experiments.conftest import lines as events

Fields = dict[str, Any]


@pytest.fixture
def declared(
    experiment: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    """The arguments for an experiment with these fields, in a directory of its own."""
    monkeypatch.chdir(tmp_path)

    def declared(sweep: Fields, fields: Fields) -> list[str]:
        axes = ", ".join(f"axis({field!r}, {values!r})" for field, values in sweep.items())
        config = "; ".join(f"config.{field} = {value!r}" for field, value in fields.items())
        return experiment(f"product({axes})", config)

    return declared


def made(template: str) -> Fields:
    return {"experiment.template": template}


WORD = {"word": "x"}
PROMPTS: list[tuple[str, list[Any] | None, Fields, str]] = [
    ("x.jsonl", None, {}, "x.jsonl can't be read: No such file or directory; check the path."),
    ("x" * 5000, None, {}, "can't be read: File name too long; check the path."),
    ("x.jsonl", [], {}, "x.jsonl holds no prompts; add some."),
    ("x.jsonl", [{"prompt": "a"}, {"promt": "b"}], {}, "line 2 has the field 'promt'; did you"),
    ("x.jsonl", [{"prompt": "a", "temperature": -1}], {}, "line 1: sampling.temperature is -1"),
    ("x.jsonl", [{"prompt": "a"}], {"prompt": "b"}, "exclude each other"),
    (
        "x.jsonl",
        [WORD],
        made("{wrd}"),
        "has no 'wrd', which the template asks for; did you mean {word}?",
    ),
    ("x.jsonl", [WORD], made("{word"), "can't be filled"),
    ("x.jsonl", [WORD], made("{word.shape}"), "can't be filled"),
    ("x.jsonl", [{"messages": []}], made("{word}"), "which a template can't fill"),
    ("x.txt", ["snow"], made("{word}"), "x.txt, line 1 is a text without fields, of which"),
    ("x.json", ["snow"], made("{word}"), "x.json, item 1 is a text without fields, of which"),
    ("x.jsonl", [{"prompt": "a"}], {"experiment.scores": ("haiku",)}, "has no field 'word', which"),
    ("x.jsonl", [{"prompt": "a"}], {"experiment.scores": ("match",)}, "has no field 'answer', wh"),
    ("-", None, {}, "An experiment can't read stdin"),
]


@pytest.mark.parametrize(("file", "lines", "fields", "words"), PROMPTS, ids=range(len(PROMPTS)))
def test_prompts(
    declared: Callable[..., list[str]],
    refuses: Callable[..., None],
    file: str,
    lines: list[Any] | None,
    fields: Fields,
    words: str,
) -> None:
    if lines is not None:
        texts = [json.dumps(lines)] if file == "x.json" else map(json.dumps, lines)
        Path(file).write_text("\n".join(texts))
    fields = {"experiment.task": "generate", "prompt_file": file, **fields}
    argv = declared({"max_tokens": [1, 2]}, fields)
    for more in ([], ["--dry_run"]):
        refuses([*argv, *more], words)
    assert not Path("w").exists()


def test_a_file_of_prompts_is_read_once_for_all_points(
    declared: Callable[..., list[str]],
    run: Callable,
    refuses: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And once more when it is another."""
    Path("x.jsonl").write_text('{"prompt": "snow"}\n')
    fields = {"experiment.task": "generate", "prompt_file": "x.jsonl"}
    argv = [*declared({"max_tokens": [1, 2, 3]}, fields), "--dry_run"]
    parsed, parse = [], prompt_lines.parse

    def counted(*args: Any, **options: Any) -> Any:
        parsed.append(args)
        return parse(*args, **options)

    monkeypatch.setattr(prompt_lines, "parse", counted)
    assert run(*argv).code == 0 and len(parsed) == 1
    Path("x.jsonl").write_text('{"prompt": ""}\n')
    refuses(argv, "line 1: The prompt is empty")


SLOTS = {"slots": [1, 2]}
EVAL = {"experiment.eval.tasks": ("x",)}
FIELDS: list[tuple[str, Fields, Fields, str]] = [
    ("bench", {"sampling.top_p": [0.5]}, {}, "The sweep sets sampling.top_p, which does nothing"),
    ("generate", {"experiment.text": ["x"]}, {}, "The sweep sets experiment.text, which does not"),
    ("bench", SLOTS, {"stop": ("x",)}, "stop does nothing for an experiment of the task bench;"),
    ("perplexity", SLOTS, {"prompt": "a"}, "prompt does nothing for an experiment of the task p"),
    ("generate", SLOTS, made("{word}"), "experiment.template does nothing without prompt_file"),
    ("eval", SLOTS, EVAL | {"experiment.eval.shots": -1}, "eval.shots is -1, but it must be at l"),
    (
        "eval",
        SLOTS,
        EVAL | {"experiment.eval.limit": 0},
        "eval.limit is 0, but it must be at least",
    ),
    ("perplexity", SLOTS, {"experiment.text": "nowhere"}, "nowhere is no file that can be read; c"),
]


@pytest.mark.parametrize(("task", "sweep", "fields", "words"), FIELDS, ids=range(len(FIELDS)))
def test_fields_that_a_task_does_not_read(
    declared: Callable[..., list[str]],
    refuses: Callable[..., None],
    task: str,
    sweep: Fields,
    fields: Fields,
    words: str,
) -> None:
    refuses(declared(sweep, {"experiment.task": task, **fields}), words)


@pytest.mark.parametrize("field", ["experiment.text", "prompt_file", "model", "adapter"])
def test_a_directory_is_not_read_to_its_end(
    declared: Callable[..., list[str]],
    refuses: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    field: str,
) -> None:
    """What lies deep in it, as all of a disk does in /, and has any name, is not looked at."""
    Path("d/e").mkdir(parents=True)
    for path in (b"d/e/\xff", b"d/\xff"):
        Path(os.fsdecode(path)).touch()
    read: list[Path] = []
    opened = Path.open

    def noted(path: Path, *args: Any, **options: Any) -> Any:
        read.append(path)
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", noted)
    task = "perplexity" if field == "experiment.text" else "generate"
    value = ("d",) if field == "adapter" else "d"
    refuses(declared(SLOTS, {"experiment.task": task, field: value}), "d")
    assert not [path for path in read if "e" in path.parts]


def test_a_directory_of_tasks_that_has_no_end(
    declared: Callable[..., list[str]],
    refuses: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inputs, "_MOST_FILES", 1)
    Path("d/e").mkdir(parents=True)
    Path("d/e/x.yaml").touch()
    fields = {"experiment.task": "eval", "experiment.eval.include": "d"}
    refuses(declared(SLOTS, fields), "d holds more than 1 files, and all of them would have to be")


def test_a_model_without_a_text_of_its_own(
    declared: Callable[..., list[str]], refuses: Callable[..., None]
) -> None:
    Path("other.gguf").symlink_to(BUNDLED)
    argv = declared(SLOTS, {"experiment.task": "perplexity", "model": "other.gguf"})
    refuses(argv, "has no text of its own; set experiment.text to a text file")


def test_what_one_of_several_tasks_reads(
    declared: Callable[..., list[str]], run: Callable, refuses: Callable[..., None]
) -> None:
    """What points share is of use where one of their tasks reads it; what is swept, to all."""
    sweep = {"experiment.task": ["perplexity", "bench"]}
    assert run(*declared(sweep, {"experiment.context": 64}), "--dry_run").code == 0
    argv = declared(sweep | {"experiment.context": [64, 128]}, {})
    refuses(argv, "The sweep sets experiment.context, which does nothing for the task bench")
    refuses([*declared(sweep, {}), "--temperature=1"], "sampling.temperature does nothing for an")


WORDS = {"prompt_file": "x.jsonl", **made("{word}"), "experiment.scores": ("haiku",)}


@pytest.mark.parametrize(
    ("task", "fields", "flag", "words"),
    [
        (
            "generate",
            WORDS,
            "--metric=haku",
            "haku is no metric of these points; did you mean ",
        ),
        ("generate", WORDS, "--metric=x", "there are haiku, has_word, three_lines, tokens_per_ans"),
        ("bench", {}, "--metric=decode_tokens", "did you mean decode_tokens_per_s? There are pref"),
        ("perplexity", {}, "--metric=kld", "there are perplexity, nll, scored_tokens"),
        ("bench", {}, "--baseline=slots=3", "'slots=3' is none of the settings. There are slots="),
        ("bench", {}, "--baseline=slots", "must say what it sets, as in temperature=0"),
    ],
)
@pytest.mark.usefixtures("nothing_loads")
def test_an_answer_that_no_point_can_give(
    declared: Callable[..., list[str]],
    run: Callable,
    refuses: Callable[..., None],
    task: str,
    fields: Fields,
    flag: str,
    words: str,
) -> None:
    Path("x.jsonl").write_text('{"word": "snow"}\n')
    argv = declared(SLOTS, {"experiment.task": task, **fields})
    refuses([*argv, flag], words)
    refuses([*argv, flag, "--dry_run"], words)
    assert not Path("w").exists()
    assert run(*argv, "--dry_run", "--baseline=slots=2").code == 0


def test_a_metric_that_a_task_of_ones_own_does_not_know_before(
    experiment: Callable[..., list[str]], run: Callable, tmp_path: Path
) -> None:
    """The first point shows that it isn't there, and the others go on with another one."""
    argv = experiment('axis("sampling.seed", range(3))')
    result = run(*argv, "--metric=totl")
    assert result.code == 2 and result.err.endswith(
        "error: --metric=totl is no metric of these points; did you mean total? There are total, "
        "count.\n"
    )
    assert [e["event"] for e in events(tmp_path / "w" / "metrics.jsonl")].count("finished") == 1
    assert run(*argv, "--metric=total").code == 0


def test_an_experiment_that_hosts_would_each_run(monkeypatch: pytest.MonkeyPatch) -> None:
    points = declare(
        cli.parse(["run.py", "experiment", "--config=experiments/haiku_temperature"])
    ).points
    assert plan.plan(points)
    monkeypatch.setattr(hosts, "joined", object())
    with pytest.raises(UserError, match="hosts needs mesh"):
        plan.plan(points)
