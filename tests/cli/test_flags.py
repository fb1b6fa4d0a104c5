"""Flags, values and tasks that make no sense; the order in which settings win."""

import importlib
import importlib.metadata
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwen_jax import cli, flag_fields, settings, task_fields
from qwen_jax.errors import UserError
from tests.cli.conftest import REPOSITORY, Run


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--promt=x", "no flag --promt; did you mean --prompt?"),
        ("--sampling.temperature=1", "did you mean --config.sampling.temperature?"),
        ("--foobar", "no flag --foobar; see run.py --help"),
        ("--helpxml", "no flag --helpxml"),
        ("--prompt", "Missing value for flag --prompt"),
        ("generat", "'generat' is not a task; did you mean 'generate'?"),
        ("stray", "'stray' is not a task; the tasks are generate, chat, serve, inspect,"),
        ("-- foo", "'foo' is not a task"),
        ("generate stray", "'stray' belongs to no flag; write --prompt=stray."),
        ("generate a\tb", r"'a\tb' belongs to no flag; write --prompt='a"),
        ("compare stray", "'stray' belongs to no flag; write --flag=value."),
        ("Haiku\tplease", "a prompt is given as --prompt='...'."),
        ("inspect a.gguf b.gguf", "'b.gguf' belongs to no flag"),
        ("inspect a.gguf --model=b.gguf", "'a.gguf' belongs to no flag"),
        ("inspect nowhere.gguf", "nowhere.gguf: there is no such file"),
        ("--temp=1", "no flag --temp; did you mean --temperature?"),
        ("--max-new-tokens=1", "did you mean --max_tokens?"),
        ("--top-k=1", "did you mean --top_k?"),
        ("--repeat_penalty=1", "did you mean --config.sampling.repetition_penalty?"),
        ("--kv-cache-dtype=float16", "did you mean --config.experiment.cache_dtype?"),
        ("--config.cache_dtype=x", "did you mean --config.experiment.cache_dtype?"),
        ("--fail_if=x", "--fail_if does nothing for generate; it belongs to compare."),
        ("--workdir=x", "--workdir does nothing for generate; it belongs to compare or experiment"),
        ("--config.runner.dry_run", "--config.runner.dry_run does nothing for generate; it"),
        ("inspect --n=2", "--n does nothing for inspect; it belongs to generate or experiment."),
        (
            "compare --output=x",
            "--output does nothing for compare; it belongs to generate or certify.",
        ),
        ("experiment --ordered", "--ordered does nothing for experiment; it belongs to generate."),
        ("merge a --slots=2", "--slots does nothing for merge; it belongs to generate or chat or"),
        ("report a --seed=1", "--seed does nothing for report; it belongs to generate or chat"),
        ("--n=abc", "--n is 'abc', but it must be a whole number"),
        ("--max_tokens=1.5", "--max_tokens is '1.5', but it must be a whole number"),
        ("--temperature=hot", "--temperature is 'hot', but it must be a number"),
        ("--raw=maybe", "--raw is 'maybe', but it must be true or false"),
        ("--noraw=x", "--noraw=x does not take an argument; leave the value out."),
        # absl's own would read a pipe for ever, and pass over a flag in silence.
        ("--flagfile=/dev/zero", "no flag --flagfile; see run.py --help"),
        ("--undefok=temp --temp=1", "no flag --undefok; see run.py --help"),
        # A shell's variable that is not set; an empty workdir was the working directory, and an
        # empty gate none.
        ("--prompt_file=", "--prompt_file is empty; give it a value, or leave it out."),
        ("--config.output=", "--config.output is empty"),
        ("experiment --workdir=", "--workdir is empty"),
        ("compare --fail_if=", "--fail_if is empty"),
        ("compare --plant=", "--plant is empty"),
        ("report ", "An argument of report is empty; name a file or directory, or leave it out."),
        ("merge a ", "An argument of merge is empty"),
        (
            "--config.sampling.temprature=1",
            "no flag --config.sampling.temprature; did you mean --config.sampling.temperature?",
        ),
        ("--config.max_tokens=abc", "--config.max_tokens is 'abc', but it must be a whole"),
        ("--config=haiku --config=x.py", "--config is given 2 times; keep one of them."),
        ("--raw --noraw --raw", "--raw is given 3 times; keep one of them."),
        ("--n=1 --n=1", "--n is given 2 times"),
        ("--TEMPERATURE=1", "no flag --TEMPERATURE; did you mean --temperature?"),
        ("--maxTokens=1", "no flag --maxTokens; did you mean --max_tokens?"),
        ("--config.sampling=3", "no flag --config.sampling;"),
        ("--config.=3", "no flag --config."),
    ],
)
def test_refused(refuses: Callable[..., None], argv: str, words: str) -> None:
    refuses(argv.split(" "), words)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--n=0", "n is 0"),
        ("--n=-1", "n is -1, but it must be from 1 to 1000000."),
        ("--n=99999999999", "n is 99999999999, but it must be from 1 to 1000000."),
        ("--max_tokens=0", "max_tokens is 0, but it must be at least 1"),
        ("--top_logprobs=-1", "top_logprobs is -1, but it must be at least 0"),
        ("--slots=0", "slots is 0, but it must be from 1 to 4096"),
        ("--slots=-5", "slots is -5"),
        ("--slots=1000000000", "slots is 1000000000, but it must be"),
        ("--temperature=nan", "sampling.temperature is nan"),
        ("--temperature=-0.1", "sampling.temperature is -0.1"),
        ("--temperature=inf", "sampling.temperature is inf"),
        ("--top_p=0", "sampling.top_p is 0"),
        ("--top_p=1.1", "sampling.top_p is 1.1"),
        ("--top_k=-1", "sampling.top_k is -1"),
        ("--min_p=2", "sampling.min_p is 2"),
        ("--seed=-1", "sampling.seed is -1"),
        ("--seed=4294967296", "sampling.seed is 4294967296"),
        ("--config.sampling.repetition_penalty=0", "repetition_penalty is 0"),
        ("--config.sampling.presence_penalty=nan", "presence_penalty is nan"),
        ("--config.sampling.logit_bias=foo", "holds 'foo', but it must be like 42:-1.5,7:3"),
        ("--config.sampling.logit_bias=1:nan", "logit_bias"),
        ("--config.sampling.logit_bias=1:2:3", "holds '1:2:3'"),
        ("--config.sampling.logit_bias=1:2,1:3", "names token 1 twice"),
        ("--stop=", "stop is ('',)"),
        ("--stop_ids=a", "stop_ids is 'a', but it must be like 13,198"),
        ("--stop_ids=1,,2", "stop_ids is '1,,2', but it must be like"),
        ("--generation_config=auto", "generation_config is 'auto', but it must be one of none, m"),
        ("--speculate=x", "speculate is 'x', but it must be one of none, lookup, draft."),
        ("--speculate=draft", "speculate is 'draft', which needs draft_model, a smaller model"),
        ("--draft_model=haiku", "draft_model does nothing where speculate is 'none'; choose"),
        ("--draft_tokens=3", "draft_tokens does nothing where speculate is 'none'; choose"),
        ("--speculate=lookup --draft_tokens=0", "draft_tokens is 0, but it must be from 1 to 15."),
        ("--speculate=lookup --mesh=dp=2", "drafts are for one device, and mesh has 2; leave one"),
        ("--speculate=lookup --regex=a", "--speculate does nothing beside --regex: what may come"),
        ("--prompt=", "The prompt is empty"),
        ("--model=x.gguf", "There is no prompt"),
        ("--output=x.jsonl", "--output needs --prompt_file"),
        ("--ordered", "--ordered needs --prompt_file"),
        ("--strict", "--strict needs --prompt_file: it is about one of many prompts."),
        ("--trace_names=x", "--trace_names needs --trace: it is the file that tensors are recorde"),
        ("--trace_names=*", "--trace_names needs --trace"),
        ("--trace_positions=0:4", "--trace_positions needs --trace"),
        ("--prompt=x --prompt_file=y", "exclude each other"),
        ("--prompt=x --system=y --raw", "--prompt: A raw prompt is one text"),
        ("--prompt=x --suffix=y --system=z", "--prompt: A suffix is a text that follows one other"),
        ("--prompt=x --continue_final_message", "--prompt: continue_final_message needs a chat"),
        ("--prompt_file=nowhere.txt", "nowhere.txt can't be read: No such file"),
        (f"--prompt_file={'x' * 5000}", "can't be read: File name too long"),
    ],
)
@pytest.mark.usefixtures("nothing_loads")
def test_values_that_make_no_sense(refuses: Callable[..., None], argv: str, words: str) -> None:
    refuses(argv.split(" "), words)


@pytest.mark.parametrize("task", ["generate", "inspect"])
@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--dtype=int8", "dtype is 'int8', but it must be one of auto, float32"),
        ("--weights=small", "weights is 'small', but it must be one of auto, packed, expanded"),
        ("--implementation=cuda", "implementation is 'cuda', but it must be one of auto"),
        ("--implementation=mosaic_gpu", "use implementation 'auto' or 'xla'"),
    ],
)
def test_unknown_names(refuses: Callable[..., None], task: str, flag: str, words: str) -> None:
    refuses([task, flag], words)


def test_packed_weights_are_float32(refuses: Callable[..., None]) -> None:
    refuses(
        ["--weights=packed", "--dtype=bfloat16"],
        "weights is 'packed', but blocks are decoded to float32, and dtype is bfloat16",
    )


def test_matmul_precision(refuses: Callable[..., None]) -> None:
    refuses(["--config.matmul_precision=low"], "matmul_precision is 'low'")


def test_a_flag_wins_over_the_config_wherever_it_stands() -> None:
    file = REPOSITORY / "configs" / "haiku.py"
    command = cli.parse(
        f"run.py --max_tokens=7 --config.max_tokens=8 --config.n=2 generate --stop=a --stop b "
        f"--config={file} --noraw --top_p=1".split()
    )
    config = command.config
    assert (command.task, command.config_file) == ("generate", str(file))
    assert (config.max_tokens, config.n, config.stop) == (7, 2, ("a", "b"))
    assert config.sampling.to_dict() == settings.get_config().sampling.to_dict() | {
        "temperature": 0.8,
        "min_p": 0.05,
    }


def test_every_flag_stands_for_a_field_of_its_type() -> None:
    samples = {str: "x", int: 3, float: 0.5, bool: True, tuple: ("x",)}
    for flag, (field, _) in flag_fields.FLAGS.items():
        value = samples[settings.type_of(field)]
        given = value[0] if isinstance(value, tuple) else value
        task = next(task for task in task_fields.FIELDS if task_fields.reads(task, field))
        config = cli.parse(["run.py", task, f"--{flag}={given}"]).config
        assert dict(settings.flatten(config))[field] == value


@example(["--config=", "\0é"])
@given(st.lists(st.sampled_from(["-", "--", "config", ".", "=", "n", "1", "max_tokens", "\0é"])))
def test_any_arguments(parts: list[str]) -> None:
    argument = "".join(parts)
    try:
        command = cli.parse(["run.py", argument])
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert command.task in cli.TASKS and len(command.config) == len(settings.get_config())


@pytest.mark.parametrize("task", cli.TASKS)
def test_help_lists_a_tasks_flags_and_fields(run: Run, task: str) -> None:
    shown = run(task, "--help").out
    assert f"Flags of {task}, and their defaults:" in shown
    for name, (field, _) in flag_fields.FLAGS.items():
        assert (f"  --{name} " in shown) == task_fields.reads(task, field)
    for name, value in settings.flatten(settings.get_config()):
        assert (f"\n  {name}={value!r}\n" in shown) == task_fields.reads(task, name)


def test_every_field_is_some_tasks() -> None:
    for name, _ in settings.flatten(settings.get_config()):
        assert any(task_fields.reads(task, name) for task in cli.TASKS), name
    assert task_fields.FIELDS.keys() == cli.TASKS.keys()


def test_defaults_are_shown(run: Run) -> None:
    lines = run("--help").out.splitlines()
    (line,) = (line for line in lines if line.startswith("  --max_tokens"))
    assert line.endswith("The most tokens to generate. [256]")


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_need_no_jax(flag: str) -> None:
    program = (
        f"import sys; from qwen_jax.cli import main; code = main(['inspect', {flag!r}])\n"
        "sys.exit(code or 10 * bool({'jax', 'numpy', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_version_and_module() -> None:
    command = [sys.executable, "-m", "qwen_jax", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout.startswith(f"qwen_jax {importlib.metadata.version('qwen_jax')}, JAX ")
    command[-1] = "--foobar"
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: There is no flag --foobar; see python -m qwen_jax --help.\n"


def test_the_console_command_is_run_py() -> None:
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="qwen-jax")
    assert entry.load() is runpy.run_path(str(REPOSITORY / "run.py"))["entry"] is cli.entry


def test_run_py_where_no_environment_is_activated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a newcomer types it after `make run`, and before it."""
    script = Path(shutil.copy(REPOSITORY / "run.py", tmp_path))
    monkeypatch.setitem(sys.modules, "qwen_jax.cli", None)
    monkeypatch.setattr(sys, "argv", ["run.py", "--n=2"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 2
    assert "has no qwen_jax.cli; `make run` sets up an environment" in capsys.readouterr().err
    own = tmp_path / ".venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.touch()

    def execv(path: Path, argv: list[str]) -> None:
        assert (path, argv) == (own, [str(own), str(script), "--n=2"])
        raise SystemExit(7)

    monkeypatch.setattr("os.execv", execv)
    with pytest.raises(SystemExit, match="7"):
        runpy.run_path(str(script), run_name="__main__")


def test_a_variable_that_jax_refuses(
    refuses: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(name: str) -> None:
        raise ValueError("invalid truth value 'maybe' for environment 'JAX_ENABLE_X64'")

    monkeypatch.setattr(importlib, "import_module", refused)
    said = "JAX can't start: invalid truth value 'maybe' for environment 'JAX_ENABLE_X64'; correct"
    refuses(["inspect"], said)
