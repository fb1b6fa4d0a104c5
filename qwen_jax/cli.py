"""The command line: flags to a config, a config to a task, a task to an exit code."""

import atexit
import contextlib
import difflib
import gc
import importlib
import itertools
import os
import re
import shlex
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Sequence
from logging import Formatter, LogRecord
from pathlib import Path
from typing import Any, NoReturn

from absl import flags, logging

from qwen_jax import (
    config_program,
    flag_fields,
    hints,
    hosts,
    interrupts,
    ready_made,
    regular_files,
    settings,
    startup,
    task_fields,
    terminal,
)
from qwen_jax.errors import UserError
from qwen_jax.versions import version

TASKS = {
    "generate": "answer a prompt, or every prompt of a file",
    "chat": "talk to the model, turn by turn",
    "serve": "answer over HTTP, as OpenAI's API does",
    "inspect": "show what is in a model file, and what running it would take",
    "compare": "find what is wrong in an engine, and why; or compare two settings",
    "certify": "say whether one dump, or two engines' difference, is rounding: certify A [B]",
    "experiment": "run a sweep of settings, or go on with it; --config and --workdir say which",
    "configs": "list the ready-made configs",
    "recorder": "print a script that records another engine for compare: recorder [NAME]",
    "merge": "put the shards of an experiment together: merge WORKDIR [WORKDIR ...]",
    "score": "judge an experiment's answers again, without a model: score WORKDIR",
    "report": "show an experiment, or several, or comparisons, side by side: report WORKDIR ...",
}
WITH_ARGUMENTS = ("certify", "merge", "recorder", "report", "score")
USAGE = """\
Usage: {program} [TASK] [--config=FILE.py or NAME] [--config.FIELD=VALUE ...] [--FLAG=VALUE ...]

Tasks:
{tasks}

Without arguments the bundled model writes a haiku. Text goes to stdout, all else to stderr.
{program} TASK --help shows a task's own flags, --version the versions.

Flags of {task}, and their defaults:
{flags}
Every field of the config that it reads can be set as --config.FIELD=VALUE:
{config}
"""
HELP = {"--help", "-help", "-h", "--helpfull", "--helpshort"}


def entry() -> NoReturn:
    """run.py, and the command qwen-jax: `main` as a process."""
    codes: list[int] = []
    atexit.register(_end_at_once, codes)  # The first to be registered runs last.
    code = main(alone=True)
    if hosts.joined is not None:
        hosts.joined.end(code)
    if code == interrupts.EXIT_CODE:
        # XLA may be in the middle of something, on which Python's own way to end would crash.
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)
    # All is written: Ctrl-C while Python ends is not worth a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    codes.append(code)
    sys.exit(code)


def _end_at_once(codes: list[int]) -> None:
    """Ends the process: Python would free all of JAX piece by piece, which takes 0.4 s."""
    if codes:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(codes[0])


def main(argv: Sequence[str] | None = None, *, alone: bool = False) -> int:
    """Runs one command; returns its exit code: 0, 2 for bad input, 3 where a file was answered
    but for some of its prompts, 130 after Ctrl-C.

    Args:
        alone: the process is this command's, and what it imports stays to the end.
    """
    _open_streams()
    flags.FLAGS.mark_as_parsed()  # absl's logging asks for its own flags, which stay as they are.
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)
    logging.get_absl_handler().setFormatter(_Formatter("%(levelname)s: %(message)s"))
    try:
        code = _run(["run.py", *(sys.argv[1:] if argv is None else argv)], alone)
        sys.stdout.flush()  # Here a failure is still ours to report.
        return code
    except (UserError, NotImplementedError) as error:
        # NotImplementedError: an implementation asked for by name can't serve a shape.
        _tell(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        _tell("interrupted")
        return interrupts.EXIT_CODE
    except OSError as error:
        if error.filename is not None:  # No stream, but a file that nobody was ready to fail.
            _tell(f"error: {error.filename} can't be used: {regular_files.why_not(error)}")
            return 2
        # stdout has failed. What is still buffered for it would fail once more at exit.
        with contextlib.suppress(OSError):  # as of one that is no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 0  # Its reader has seen enough, as `| head` does.
        _tell(f"error: stdout can't be written: {regular_files.why_not_written(error)}")
        return 2


def _tell(text: str) -> None:
    """Prints to stderr, which may be what has failed: the exit code says it all the same."""
    with contextlib.suppress(OSError):
        print(terminal.message(text), file=hosts.joined.errors if hosts.joined else sys.stderr)


class _Formatter(Formatter):
    """Messages that quote files."""

    def formatMessage(self, record: LogRecord) -> str:
        return terminal.message(super().formatMessage(record).rstrip("\n"))

    def formatException(self, ei: Any) -> str:
        # Indented: what an error quotes can't pretend to be a line of the log.
        return textwrap.indent(terminal.visible(super().formatException(ei)), "  ")


def _open_streams() -> None:
    """Gives the process all three streams, and UTF-8 whatever the locale."""
    for name, mode in {"stdin": "r", "stdout": "w", "stderr": "w"}.items():
        if getattr(sys, name) is None:  # closed by the caller, as with `>&-`
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # Half of a surrogate pair is no Unicode; as \ud800 it is valid inside JSON.
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]


def _run(argv: list[str], alone: bool) -> int:
    if HELP & set(argv[1:]):
        print(_usage(next((word for word in argv[1:] if word in TASKS), "generate")))
        return 0
    if "--version" in argv[1:]:
        print(_versions())
        return 0
    command = parse(argv)
    with interrupts.handled_by(interrupts.exit_at_once), startup.timed("imports"):
        gc.disable()  # Nothing of what is imported is garbage; looking for it takes 0.2 s.
        try:
            if command.config.hosts is not None:
                command = _join(command)
            if command.task in ("generate", "chat", "serve"):
                _wake_device()
            module = importlib.import_module(f"qwen_jax.tasks.{command.task}")
        except ValueError as error:  # JAX reads its variables of the environment when it starts.
            why = " ".join(str(error).split()).rstrip(".")
            raise UserError(f"JAX can't start: {why}; correct the variable or unset it.") from error
        finally:
            if alone:
                # Nor will it be, and to look again, as after each 700 new objects, takes 0.1 s.
                gc.freeze()
                gc.set_threshold(20_000, 20, 20)
            gc.enable()
    with interrupts.handled_by(interrupts.raise_interrupt), hosts.waiting_for_loss():
        return module.run(command)


def _join(command: settings.Command) -> settings.Command:
    hosts.parse(command.config.hosts)
    from qwen_jax.hosts.join import join  # which wakes JAX

    return join(command)


def _wake_device() -> None:
    """Has JAX find its devices while Python imports the rest: CUDA takes about a second."""
    import jax

    def find() -> None:
        with contextlib.suppress(Exception):  # told of by whoever asks for a device
            jax.local_devices()

    threading.Thread(target=find, name="wake", daemon=True).start()


def parse(argv: list[str]) -> settings.Command:
    """The task and its config, from a whole argv.

    Raises:
        UserError: anything is misspelt, mistyped, stray, or the config file fails.
    """
    fields = [name for name, _ in settings.flatten(settings.get_config())]
    # In order of precedence, the last wins: --config.max_tokens, then --max_tokens.
    meaning = {f"config.{field}": field for field in fields}
    meaning |= {name: field for name, (field, _) in flag_fields.FLAGS.items()}
    values = _define(meaning)
    try:
        rest = values(argv)[1:]
    except (flags.Error, ValueError) as error:
        raise UserError(_explain(error, meaning)) from error
    for name in values:
        # The last would win, and the others do nothing.
        if values[name].present > 1 and not isinstance(values[name], flags.MultiFlag):
            raise UserError(f"--{name} is given {values[name].present} times; keep one of them.")
    task = rest.pop(0) if rest else "generate"
    if task not in TASKS:
        near = difflib.get_close_matches(task, TASKS, n=1)
        hint = f"the tasks are {', '.join(TASKS)}; a prompt is given as --prompt='...'."
        if near:
            hint = f"did you mean {near[0]!r}?"
        raise UserError(f"{task!r} is not a task; {hint}")
    given = [(name, field) for name, field in meaning.items() if values[name].present]
    task_fields.check(task, ((f"--{name}", field) for name, field in given))
    overrides = {}
    for name, field in given:
        value = values[name].value
        overrides[field] = tuple(value) if isinstance(value, list) else value
        settings.check_filled(f"--{name}", field, value)
    if task == "inspect" and rest and "model" not in overrides:
        overrides["model"] = rest.pop(0)
    if "" in rest:
        raise UserError(
            f"An argument of {task} is empty; name a file or directory, or leave it out."
        )
    if rest and task not in WITH_ARGUMENTS:
        way = f"--prompt={shlex.quote(rest[0])}" if task == "generate" else "--flag=value"
        raise UserError(f"The argument {rest[0]!r} belongs to no flag; write {way}.")
    where = values["config"].value
    config = settings.get_config()
    if where is not None:
        where = ready_made.program(where)
        config = config_program.load(where)
        changed = sorted(settings.asked(config))
        task_fields.check(task, ((f"{field}, which {where} sets,", field) for field in changed))
    for one, other in (("prompt", "prompt_file"), ("prompt_file", "prompt")):
        if one in overrides and other not in overrides:
            config[other] = None  # what a config names goes where a flag names what excludes it
    config.update_from_flattened_dict(overrides)
    typed = (*settings.program().split(), *argv[1:])
    return settings.Command(task, config, where, overrides, tuple(rest), typed)


class _Flags(flags.FlagValues):
    """Without absl's own flags: --flagfile reads pipes and devices without end, and what --undefok
    names is ignored in silence."""

    def read_flags_from_files(self, argv: Sequence[str], force_gnu: bool = True) -> list[str]:
        for word in itertools.takewhile(lambda word: word != "--", argv):
            name = word.lstrip("-").partition("=")[0]
            if word.startswith("-") and name in ("flagfile", "undefok"):
                raise flags.UnrecognizedFlagError(name)
        return list(argv)


def _define(meaning: dict[str, str]) -> flags.FlagValues:
    """Flags of their own, so that no imported module's can be given; none has a default."""
    define: dict[type, Callable[..., Any]] = {
        str: flags.DEFINE_string,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        bool: flags.DEFINE_bool,
        tuple: flags.DEFINE_multi_string,
    }
    values = _Flags()
    flags.DEFINE_string("config", None, "", flag_values=values)
    for name, field in meaning.items():
        define[settings.type_of(field)](name, None, "", flag_values=values)
    return values


def _explain(error: flags.Error | ValueError, meaning: dict[str, str]) -> str:
    """One sentence of what absl raised."""
    if isinstance(error, ValueError):  # of --noflag=value alone
        return f"{error}; leave the value out."
    if isinstance(error, flags.UnrecognizedFlagError):
        name = error.flagname
        meant = hints.meant(name, meaning)
        hint = f"did you mean --{meant}?" if meant else f"see {settings.program()} --help."
        return f"There is no flag --{name}; {hint}"
    wrong = re.match(r"flag --([\w.]+)=(.*?): ", str(error), re.DOTALL)
    if isinstance(error, flags.IllegalFlagValueError) and wrong:
        name, value = wrong.groups()
        kind = settings.KINDS[settings.type_of(meaning[name])]
        return f"--{name} is {value!r:.80}, but it must be {kind}."
    return " ".join(f"{error}.".split())


def _usage(task: str) -> str:
    defaults = dict(settings.flatten(settings.get_config()))
    read = {field: value for field, value in defaults.items() if task_fields.reads(task, field)}

    def flag(name: str, field: str, text: str) -> str:
        default = read[field]
        return f"  --{name:<22} {text}" + ("" if default in (None, "", ()) else f" [{default}]")

    return USAGE.format(
        program=settings.program(),
        task=task,
        tasks="\n".join(f"  {name:<10} {text}" for name, text in TASKS.items()),
        flags="\n".join(
            flag(name, field, text)
            for name, (field, text) in flag_fields.FLAGS.items()
            if field in read
        ),
        config="\n".join(f"  {name}={value!r}" for name, value in read.items()),
    )


def _versions() -> str:
    python = ".".join(map(str, sys.version_info[:3]))
    # JAX itself takes half a second to import.
    return f"qwen_jax {version('qwen_jax')}, JAX {version('jax')}, Python {python}"
