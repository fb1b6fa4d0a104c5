"""The command line: flags to a config, a config to a task, a task to an exit code."""

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from logging import Formatter
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from qwen_jax import settings
from qwen_jax.errors import UserError

TASKS = {
    "generate": "answer a prompt, or every prompt of a file",
    "inspect": "show what is in a model file, and what running it would take",
}
USAGE = """\
Usage: run.py [TASK] [--config=FILE.py] [--config.FIELD=VALUE ...] [--FLAG=VALUE ...]

Tasks:
{tasks}

Without arguments the bundled model writes a haiku. Text goes to stdout, all else to stderr.

Flags:
{flags}
Every field of the config can be set as --config.FIELD=VALUE:
{config}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    flags.FLAGS.mark_as_parsed()  # absl's logging asks for its own flags, which stay as they are.
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)
    logging.get_absl_handler().setFormatter(Formatter("%(levelname)s: %(message)s"))
    try:
        return _run(["run.py", *(sys.argv[1:] if argv is None else argv)])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of stdout has gone, as `| head` does. Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(argv: list[str]) -> int:
    if {"--help", "-help", "-h", "--helpfull", "--helpshort"} & set(argv[1:]):
        print(_usage())
        return 0
    task, config = parse(argv)
    module = importlib.import_module(f"qwen_jax.tasks.{task}")
    return module.run(config)


def parse(argv: list[str]) -> tuple[str, ConfigDict]:
    """The task and its config, from a whole argv.

    Raises:
        UserError: anything is misspelt, mistyped, stray, or the config file fails.
    """
    values = flags.FlagValues()
    try:
        # ml_collections reads the overrides where the flag is defined, not where it is parsed.
        config_flags.DEFINE_config_file(
            "config", settings.__file__, flag_values=values, sys_argv=argv
        )
        _define_shortcuts(values)
        rest = values(argv)[1:]
        config: ConfigDict = values["config"].value
        settings.check(config)
    except UserError:
        raise
    except Exception as error:
        # A config file is the user's program and may fail in any way.
        raise UserError(_explain(error)) from error
    task = rest.pop(0) if rest else "generate"
    if task not in TASKS:
        near = difflib.get_close_matches(task, TASKS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the tasks are {', '.join(TASKS)}."
        raise UserError(f"{task!r} is not a task; {hint}")
    if rest:
        raise UserError(f"The argument {rest[0]!r} belongs to no flag; write --flag=value.")
    for name, (field, _) in settings.FLAGS.items():
        if values[name].present:
            config.update_from_flattened_dict({field: values[name].value})
    return task, config


def _define_shortcuts(values: flags.FlagValues) -> None:
    define: dict[type, Callable[..., Any]] = {
        str: flags.DEFINE_string,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        bool: flags.DEFINE_bool,
    }
    for name, (field, text) in settings.FLAGS.items():
        define[settings.type_of(field)](name, None, text, flag_values=values)


def _explain(error: Exception) -> str:
    """One sentence of what absl, ml_collections or a config file raised."""
    # A KeyError's text is the repr of its message.
    lines = str(error.args[0] if error.args else error).replace("\\n", "\n").splitlines()
    if any(line.startswith("Traceback ") for line in lines):
        # ml_collections wraps what a config file raised; its last line is the reason.
        return f"--config: {lines[-1]}"
    text = " ".join(" ".join(lines).split())
    if isinstance(error, flags.Error | OSError):
        return text
    at = traceback.extract_tb(error.__traceback__)[-1]
    if "ml_collections" in at.filename:
        return f"--config: {text}"
    return f"{at.filename}, line {at.lineno}: {type(error).__name__}: {text}"


def _usage() -> str:
    defaults = settings.get_config()
    return USAGE.format(
        tasks="\n".join(f"  {name:<10} {text}" for name, text in TASKS.items()),
        flags="\n".join(f"  --{name:<16} {text}" for name, (_, text) in settings.FLAGS.items()),
        config="\n".join(f"  {name}={value!r}" for name, value in settings.flatten(defaults)),
    )
