"""The ready-made configs, `configs/` of the repository, which ship with the package.

They and the files beside them go by their path in the repository, from any directory, so that an
experiment's records name them alike on every machine: `configs/experiments/words.jsonl` is a file
of the working directory where there is one, and the package's otherwise.

`os.path` answers for names that are too long for a file, too, where `Path` raises.
"""

import ast
import os
from collections.abc import Iterator
from pathlib import Path

_ROOM = "configs"
_HERE = Path(__file__).parent
HOME = next(
    # An installation has them inside the package, a source tree beside it.
    (path for path in (_HERE / _ROOM, _HERE.parent / _ROOM) if path.is_dir()),
    _HERE / _ROOM,
)


def path(name: str) -> Path:
    """The path of a file that a config or a flag names."""
    first, *others = Path(name).parts or ("",)
    if first == _ROOM and ".." not in others and not os.path.exists(name):  # noqa: PTH110
        shipped = HOME.joinpath(*others)
        return shipped if os.path.exists(shipped) else Path(name)  # noqa: PTH110
    return Path(name)


def program(name: str) -> str:
    """The file of a config that goes by its path, or, as in `names`, without its directory and its
    ending; with a variant, as in `haiku:greedy`, the file's and the variant."""
    file, colon, variant = name.partition(":")
    found = path(file)
    if not os.path.isfile(found) and file in names():  # noqa: PTH113
        found = HOME / f"{file}.py"
    return f"{found}{colon}{variant}" if found != Path(file) else name


def names() -> list[str]:
    """All of them, those that one may want first."""
    files = sorted(HOME.rglob("*.py"), key=lambda file: (len(file.parts), file))
    found = (file for file in files if "def get_config(" in file.read_text("utf-8"))
    return [file.relative_to(HOME).with_suffix("").as_posix() for file in found]


def listed() -> Iterator[str]:
    """A line for each: its name, and the first of its docstring."""
    shown = names()
    width = max(map(len, shown), default=0)
    for name in shown:
        yield f"{name:<{width}}  {title((HOME / f'{name}.py').read_text('utf-8'), name)}"


def title(source: str, name: str) -> str:
    """The first line of a config file's docstring, or its name."""
    try:
        text = ast.get_docstring(ast.parse(source))
    except SyntaxError:  # written for a newer Python, or changed by hand
        return name
    return text.splitlines()[0] if text else name
