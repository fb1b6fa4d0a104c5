"""From a recorder, as a user copies it, to the answer of the command that it says to type next."""

import importlib.util
import re
import shlex
import types
from pathlib import Path

from qwen_jax import opening, recorders
from qwen_jax.accuracy.exact.parameters import CheckpointSource
from qwen_jax.accuracy.tensors.diagnosis import Diagnosis, diagnose
from qwen_jax.accuracy.traces.foreign import open_trace
from qwen_jax.accuracy.traces.trace import Trace


def copied(name: str, folder: Path) -> types.ModuleType:
    """The recorder as a module of a folder, which `run.py recorder NAME > record_NAME.py` fills."""
    path = folder / f"record_{name}.py"
    path.write_text(recorders.source(name), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def said(out: str) -> dict[str, str]:
    """The flags of the command at the end of what a recorder prints."""
    (command,) = re.findall(r"^  python run\.py compare (.*)$", out, re.MULTILINE)
    return dict(word.removeprefix("--").split("=", 1) for word in shlex.split(command))


def read(out: str) -> Trace:
    """The dump that a recorder has written, by the command that it says."""
    flags = said(out)
    assert flags.keys() == {"model", "candidate"}
    return open_trace(flags["candidate"], opening.open_model(flags["model"]).config)


def judged(out: str, model: str | Path | None = None) -> Diagnosis:
    """What is found in it, against the model that the command names, or another."""
    trace = read(out)
    return diagnose(trace, CheckpointSource(model or said(out)["model"], trace.header.dtype))


def kinds(trace: Trace) -> set[str]:
    return {name.split(".")[-1] for name in trace.tensors}
