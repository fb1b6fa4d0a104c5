"""Config files that fail, and what their fields may be."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_jax import cli, settings
from tests.cli.conftest import REPOSITORY

DEFAULTS = "from qwen_jax import settings\ndef get_config():\n  config = settings.get_config()\n"
CONFIGS = {
    "def get_config(:\n  pass\n": "config.py, line 1: SyntaxError: invalid syntax",
    "x = 1\n\n  y = 2\n": "config.py, line 3: IndentationError",
    "x = 1\n": "config.py defines no get_config()",
    "get_config = 3\n": "config.py defines no get_config()",
    "import nowhere\n": "line 1: ModuleNotFoundError: No module named 'nowhere'",
    "def get_config():\n  raise ValueError('one\\ntwo')\n": "line 2: ValueError: one two",
    "def get_config():\n  return {}['key']\n": "line 2: KeyError: 'key'",
    "import json\ndef get_config():\n  return json.loads('{')\n": "config.py, line 3: JSONDecode",
    "def get_config():\n  return get_config()\n": "line 2: RecursionError",
    "import sys\nsys.exit(3)\n": "line 2: SystemExit: 3",
    "open('nowhere')\n": "line 1: FileNotFoundError",
    "def get_config():\n  pass\n": "must return a ConfigDict, but returned NoneType",
    "def get_config():\n  return {}\n": "must return a ConfigDict, but returned dict",
    "def get_config(a, b): pass\n": "TypeError: get_config() missing 2 required",
    f"{DEFAULTS}  config.max_tokens = 'x'\n": "config.py, line 4 sets max_tokens to x, but it must "
    "be a whole number.",
    f"{DEFAULTS}  config.sampling.top_p = 'x'\n": "line 4 sets top_p to x, but it must be a num",
    f"{DEFAULTS}  config.update({{'stop': 'x\\ny'}})\n": "line 4 sets stop to x y, but it must",
    f"{DEFAULTS}  config.sampling = 3\n": "line 4 sets sampling to 3, but it must be a group of",
}
FIELDS = {
    "{'promt': 'x'}": "sets promt, which is no field; did you mean prompt?",
    "{'sampling': {'temprature': 1}}": "did you mean sampling.temperature?",
    "{'sampling': 3}": "sets sampling, which is no field",
    "{'max_tokens': 'abc'}": "sets max_tokens to 'abc', but it must be a whole number",
    "{'n': True}": "sets n to True, but it must be a whole number",
    "{'model': None}": "sets model to None, but it must be text",
    "{'stop': 'abc'}": "sets stop to 'abc', but it must be a tuple of texts",
    "{'sampling': {'temperature': '1'}}": "sets sampling.temperature to '1', but it must be",
    "{'output': ''}": "output, which",
    "{'output': 'a\\0b'}": "is 'a\\x00b', but it can't hold a NUL character",
}


@pytest.mark.parametrize("program", CONFIGS)
def test_that_fail(refuses: Callable[..., None], tmp_path: Path, program: str) -> None:
    path = tmp_path / "config.py"
    path.write_text(program)
    refuses([f"--config={path}"], CONFIGS[program])


@pytest.mark.parametrize("content", [b"x = '\xff'\n", b"x = 1\0\n", b"\x7fELF\x02"])
def test_that_are_no_text(refuses: Callable[..., None], tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.py"
    path.write_bytes(content)
    refuses([f"--config={path}"], "config.py", "SyntaxError")


@pytest.mark.parametrize("fields", FIELDS)
def test_fields(refuses: Callable[..., None], tmp_path: Path, fields: str) -> None:
    path = tmp_path / "config.py"
    path.write_text(
        f"from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict({fields})"
    )
    refuses([f"--config={path}"], FIELDS[fields])


def test_that_are_not_there(refuses: Callable[..., None], tmp_path: Path) -> None:
    refuses(["--config=nowhere.py"], "--config=nowhere.py can't be read: No such file")
    refuses([f"--config={tmp_path}"], "can't be read: Is a directory")
    refuses(["--config="], "can't be read")
    refuses([f"--config={'x' * 5000}"], "can't be read: File name too long")


def test_fields_left_out_keep_their_defaults(tmp_path: Path) -> None:
    path = tmp_path / "config.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(variant=''):\n"
        "  return ConfigDict({'prompt': variant, 'sampling': {'temperature': 1}})"
    )
    config = cli.parse(["run.py", f"--config={path}:a:b"]).config
    expected = dict(settings.flatten(settings.get_config()))
    expected |= {"prompt": "a:b", "sampling.temperature": 1.0}
    assert dict(settings.flatten(config)) == expected


OF_OTHER_TASKS = {
    ("", "{'experiment': {'task': 'bench'}}"): "experiment.task, which {} sets, does nothing for "
    "generate; it belongs to experiment.",
    ("inspect", "{'max_tokens': 3}"): "max_tokens, which {} sets, does nothing for inspect; it bel",
    ("experiment", "{'output': 'x'}"): "output, which {} sets, does nothing for experiment; it bel",
    ("compare", "{'n': 2}"): "n, which {} sets, does nothing for compare; it belongs to generate",
}


@pytest.mark.parametrize("task_and_fields", OF_OTHER_TASKS)
def test_fields_of_other_tasks(
    refuses: Callable[..., None], tmp_path: Path, task_and_fields: tuple[str, str]
) -> None:
    task, fields = task_and_fields
    path = tmp_path / "config.py"
    path.write_text(
        f"from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict({fields})"
    )
    words = OF_OTHER_TASKS[task_and_fields].format(path)
    refuses([*[task] * bool(task), f"--config={path}"], words)


def test_neighbours_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of each config are its own, even where they have one name, from any directory."""
    program = (
        "from ml_collections import ConfigDict\n"
        "def get_config():\n  from neighbour import PROMPT\n"
        "  return ConfigDict({'prompt': PROMPT})"
    )
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "neighbour.py").write_text(f"PROMPT = {name!r}")
        (tmp_path / name / "config.py").write_text(program)
    before = [*sys.path]
    for directory in (tmp_path, tmp_path / "b", REPOSITORY):
        monkeypatch.chdir(directory)
        for name in ("a", "b"):
            where = os.path.relpath(tmp_path / name / "config.py")
            assert cli.parse(["run.py", f"--config={where}"]).config.prompt == name
    assert sys.path == before
