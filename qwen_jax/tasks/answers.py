"""The file of a run's answers: begun, or gone on with where a run was cut short.

Beside it lies a file of the settings it was made with, so that nobody goes on with others.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ml_collections import ConfigDict

from qwen_jax import choices, regular_files, settings, strict_json, task_fields
from qwen_jax.errors import UserError
from qwen_jax.experiments import inputs, kinds, lines
from qwen_jax.prompt_lines import Item, Wrong

Key = tuple[str | int, int]
"""A prompt's id and the sample."""
Digests = Mapping[str, str]
"""Of what prompts ask, by their ids, as JSON writes them."""


@dataclasses.dataclass(frozen=True)
class Form:
    """How a file's lines of answers are told apart.

    Attributes:
        id: the field that has a prompt's id.
        way: what to do about an id that is another prompt's now.
        fault: what is wrong with a line, in words, or nothing.
        key: what a line answers; None where it says why a prompt was refused.
    """

    id: str
    way: str
    fault: Callable[[Mapping[str, Any]], str]
    key: Callable[[Mapping[str, Any]], Key | None]


_ID = kinds.Kind("a text or a whole number", lambda value: type(value) in (str, int))
_ERROR = {"id": _ID, "error": kinds.TEXT}
_ANSWER = {"id": _ID, "sample": kinds.NATURAL, "text": kinds.TEXT}
"""What the lines of a file of answers have for sure."""
PLAIN = Form(
    "id",
    "give what is new an id of its own (a line's number is its id where it has none)",
    lambda line: kinds.fault(line, _ERROR if "error" in line else _ANSWER),
    lambda line: None if "error" in line else (line["id"], line["sample"]),
)

_NO_MATTER = (
    *("prompt", "prompt_file", "output", "ordered", "strict", "resume", "slots", "trace", "hosts"),
)
"""Fields that decide which prompts are answered and where answers go, but no answer."""


SOME_REFUSED = 3
"""Exit code of a run that answered a file, but for some of its prompts."""


def code_of(refused: int, prompts: int, where: str) -> int:
    """The exit code of a run of a file, which says how many of its prompts were refused."""
    if not refused:
        return 0
    print(
        f"{refused} of {prompts} prompts were refused; their lines say why {where}.",
        file=sys.stderr,
    )
    return SOME_REFUSED


@dataclasses.dataclass
class Answers:
    """Where answers go.

    Attributes:
        out: the open file.
        path: its name; None where it is stdout.
        resumed: whether it was there before.
        done: what has an answer already.
    """

    out: IO[str]
    path: Path | None = None
    resumed: bool = False
    done: frozenset[Key] = frozenset()
    form: Form = PLAIN

    def left(self, items: Sequence[Item | Wrong], n: int) -> list[Item | Wrong]:
        """Those of which a sample has no answer yet, where n are asked for."""
        return [
            item
            for item in items
            if isinstance(item, Wrong)
            or any((item.id, sample) not in self.done for sample in range(item.samples(n)))
        ]

    def check(self, config: ConfigDict, prompts: Digests, *, loaded: bool = False) -> None:
        """Holds what the answers are made with and of against what was noted.

        Args:
            prompts: all of the file's that are right, as far as they were read.
            loaded: what the model recommends is known, and in the config.

        Raises UserError where they differ: half of the answers would be others.
        """
        if self.path is None or not self.resumed:
            return
        beside = _settings_file(self.path)
        if not beside.exists():  # of a run that was killed before its first answer
            return
        noted = strict_json.read_object(beside, most=regular_files.MOST_BYTES)
        wanted = json.loads(json.dumps(_made_with(config, loaded=loaded)))
        if lacking := [name for name in (*wanted, "prompts") if name not in noted]:
            raise UserError(
                f"{beside} doesn't say with which {lacking[0]} --output={self.path} was begun, so "
                "that --resume can't go on with it; restore the file, or choose another name."
            )
        if not isinstance(noted["prompts"], dict):
            raise UserError(
                f"{beside}: prompts is {noted['prompts']!r:.60}, but it must be an object, {{...}};"
                " restore the file, or choose another name."
            )
        for field, value in wanted.items():
            if noted[field] != value:
                raise UserError(
                    f"--output={self.path} was begun with {field} {noted[field]!r:.60}, which is "
                    f"{value!r:.60} now; go on with the same settings, or choose another name."
                )
        self._check_prompts(noted["prompts"], prompts)

    def settle(self, config: ConfigDict, prompts: Digests) -> None:
        """Checks the same once the model is loaded, and notes it."""
        self.check(config, prompts, loaded=True)
        if self.path is not None:
            content = _made_with(config, loaded=True) | {"prompts": prompts}
            lines.write_atomically(_settings_file(self.path), json.dumps(content, indent=1) + "\n")

    def _check_prompts(self, noted: Digests, prompts: Digests) -> None:
        for name in dict.fromkeys(json.dumps(name) for name, _ in self.done):
            if prompts.get(name, noted.get(name)) != noted.get(name):
                raise UserError(
                    f"--output={self.path} has an answer to the prompt with the {self.form.id} "
                    f"{name:.60}, which is another prompt now, or asks for it otherwise; "
                    f"{self.form.way}, or choose another name."
                )


def _made_with(config: ConfigDict, *, loaded: bool) -> dict[str, Any]:
    """What decides the answers, by field: what it was, where the config leaves it open, and of
    files their contents.

    Args:
        loaded: what the model recommends is known, and in the config where that is to be followed;
            else such fields are left out.
    """
    unknown = () if loaded or config.generation_config == "none" else ("sampling",)
    return {
        field: value
        for field, value in settings.flatten(config)
        if task_fields.reads("generate", field)
        and field.partition(".")[0] not in (*_NO_MATTER, *unknown)
    } | {
        "dtype": choices.dtype_of(config.dtype).name,
        "contents": inputs.of_answers(config),
    }


@contextlib.contextmanager
def opened(config: ConfigDict, form: Form = PLAIN) -> Iterator[Answers]:
    """stdout, a new file, or with `resume` one that is there; kept if anything is in it.

    Raises:
        UserError: it is there already, can't be written or is not what a run wrote.
    """
    if config.output is None:
        yield Answers(sys.stdout)
        return
    if config.output == "-":
        raise UserError("--output=- is no file; leave --output out, and answers go to stdout.")
    path, then = Path(config.output), ""
    try:
        resumed = _goes_on(path, config.resume)
        file = _opened(path, "a" if resumed else "x")
        then = ", and --resume goes on"
        with contextlib.ExitStack() as files:
            _hold(files.enter_context(file), path)
            files.callback(_remove_if_empty, path)  # Only now: it may have been another run's.
            done, cut = _written(path, form) if resumed else (frozenset[Key](), False)
            if cut:
                lines.write_pieces(path, (line for line, key in _lines(path, form) if key))
                file = files.enter_context(_opened(path, "a"))
                _hold(file, path)
            yield Answers(file, path, resumed, done, form)
    except BrokenPipeError:  # stderr's
        raise
    except OSError as error:  # A full disk's doesn't know the file, and closing it tries again.
        why = regular_files.why_not_written(error, then)
        raise UserError(f"--output={path} can't be written: {why}") from error


def _goes_on(path: Path, resume: bool) -> bool:
    """Whether the file is there, to be gone on with. Raises UserError where it can't be one."""
    if path.is_dir():
        raise UserError(
            f"--output={path} is a directory; name a file in it, as in "
            f"--output={path / 'answers.jsonl'}."
        )
    if path.exists() and not path.is_file():
        raise UserError(
            f"--output={path} is no file; name one, or leave it out, and answers go to stdout."
        )
    if path.is_symlink() and not path.exists():
        raise UserError(f"--output={path} is a link to nothing; choose another name.")
    if path.exists() and not resume:
        raise UserError(
            f"--output={path} exists already; go on with it by --resume, or choose another name."
        )
    return path.exists()


def _remove_if_empty(path: Path) -> None:
    with contextlib.suppress(OSError):  # of which the run's own end says more
        if path.stat().st_size == 0:
            path.unlink()
            _settings_file(path).unlink(missing_ok=True)


def _opened(path: Path, mode: str) -> IO[str]:
    # As in stdout, half of a surrogate pair in a prompt's id becomes its JSON escape.
    return path.open(mode, -1, "utf-8", errors="backslashreplace", newline="\n")


def digests(asked: Iterable[tuple[str | int, Any]]) -> dict[str, str]:
    """Of prompts' ids, and what each asks."""
    return {json.dumps(name): _digest(what) for name, what in asked}


def _digest(what: Any) -> str:
    written = json.dumps(what, sort_keys=True, default=repr)
    return hashlib.sha256(written.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def digests_of(items: Iterable[Item | Wrong]) -> dict[str, str]:
    """Those of the prompts that are right."""
    right = (item for item in items if isinstance(item, Item))
    return digests((item.id, [item.prompt, dict(item.own)]) for item in right)


def check_ids(items: Sequence[Item | Wrong], prompt_file: str) -> None:
    """Raises UserError where two prompts have one id, by which a file of answers goes."""
    seen: set[str | int] = set()
    for item in items:
        if item.id in seen:
            raise UserError(
                f"--prompt_file={prompt_file} has two prompts with the id {item.id!r:.60}, by "
                "which --output and --resume tell them apart; give each one of its own (a line's "
                "number is its id where it has none)."
            )
        seen.add(item.id)


def _hold(file: IO[str], path: Path) -> None:
    """Keeps other runs out for as long as the file is open: two would answer each prompt twice."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(
            f"--output={path} can't be held for this run ({error.strerror}); wait until no other "
            "run writes it, or choose another name."
        ) from error


def _settings_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.settings.json")


def _written(path: Path, form: Form) -> tuple[frozenset[Key], bool]:
    """What a file has answers of, and whether it has something else as well, that is to be cut: a
    last line that was cut off, or why a prompt was refused, which may be right now.
    """
    if path.stat().st_size and not _settings_file(path).exists():
        raise UserError(
            f"--output={path} has no {_settings_file(path).name} beside it, which says what it was "
            "made with, so that --resume can't go on with it; choose another name."
        )
    done: set[Key] = set()
    cut = False
    for _, key in _lines(path, form):
        if key is None:
            cut = True
        else:
            done.add(key)
    return frozenset(done), cut


def _lines(path: Path, form: Form) -> Iterator[tuple[bytes, Key | None]]:
    """The file's lines one by one, and what they answer, if anything.

    Raises UserError for a line that no run has written.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                yield line, None
                return
            where = f"--output={path}, line {number} is no answer of a run"
            record = strict_json.parse_object(line, where, allow_halves=True)
            if wrong := form.fault(record):
                raise UserError(
                    f"{where}, so that --resume can't go on with it: {wrong}; choose another name."
                )
            yield line, form.key(record)
