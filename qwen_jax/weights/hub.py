"""From what the user calls a model to a path: a file, a directory, or `hf:owner/repo[:quant]`.

Downloads go through huggingface_hub: resumable, and kept in its cache. Without network the cache
alone decides.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from absl import logging

from qwen_jax.errors import UserError
from qwen_jax.weights.gguf_file import SPLIT_NAME, split_paths

_NAME = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<quant>[\w.-]+))?")
# Seconds the Hub may take to answer before the cache alone decides.
TIMEOUT = 10
# What a Hugging Face checkpoint needs, all at the top of the repository.
_CHECKPOINT_SUFFIXES = (".safetensors", ".json", ".jinja")


@dataclasses.dataclass(frozen=True)
class _Repository:
    """A repository's files; `snapshot` is where they lie if the Hub could not be asked."""

    name: str
    files: Sequence[str]
    snapshot: Path | None


def resolve(model: str) -> Path:
    """The GGUF file (first part of a split one) or Hugging Face directory that `model` names.

    Args:
        model: a path, or `hf:owner/repo` for safetensors, or `hf:owner/repo:Q4_K_M` for the GGUF
            file whose name ends in that word, in upper or lower case.

    Raises:
        UserError: there is no such file, repository or quantisation, or no network and the cache
            does not have it.
    """
    if not model.startswith("hf:"):
        try:
            path = Path(model).expanduser()
            exists = model != "" and path.exists()
        except (OSError, RuntimeError):  # a name that is too long; ~nobody
            exists = False
        if not exists:
            raise UserError(
                f"{model}: there is no such file or directory; give a GGUF file, a Hugging Face "
                "directory, or hf:owner/repo[:quant]."
            )
        return path
    name = _NAME.fullmatch(model)
    if not name:
        raise UserError(
            f"{model}: the name does not read hf:owner/repo or hf:owner/repo:quant; an example is "
            "hf:Qwen/Qwen2.5-0.5B-Instruct-GGUF:q4_k_m."
        )
    repository = _list(name["repo"])
    if name["quant"] is None and _is_checkpoint(repository.files):
        wanted = [
            file
            for file in sorted(repository.files)
            if "/" not in file and file.endswith(_CHECKPOINT_SUFFIXES)
        ]
        return _fetch(repository, wanted).parent
    return _fetch(repository, _choose_gguf(repository, name["quant"]))


def _is_checkpoint(files: Sequence[str]) -> bool:
    return "config.json" in files and any(file.endswith(".safetensors") for file in files)


def quantisation(file: str) -> str:
    """The last word of a GGUF file's name: `Q4_K_M` of `qwen2.5-q4_k_m-00001-of-00002.gguf`."""
    split = SPLIT_NAME.fullmatch(PurePosixPath(file).name)
    stem = split["stem"] if split else PurePosixPath(file).stem
    return re.split(r"[-.]", stem)[-1].upper()


def _choose_gguf(repository: _Repository, quant: str | None) -> list[str]:
    """The one GGUF checkpoint of that quantisation; all its parts, the first one first."""
    available: dict[str, list[PurePosixPath]] = {}
    for file in sorted(repository.files):
        first = PurePosixPath(split_paths(Path(file))[0])
        if file.endswith(".gguf") and first not in available.setdefault(quantisation(file), []):
            available[quantisation(file)].append(first)
    where = f"hf:{repository.name}"
    place = "the cache (the Hub cannot be asked)" if repository.snapshot else "the repository"
    if not available:
        raise UserError(
            f"{where}: {place} has neither GGUF files nor safetensors with a config.json; choose "
            "another repository."
        )
    if quant is None and len(available) == 1:
        (quant,) = available
    if quant is None or quant.upper() not in available:
        raise UserError(
            f"{where}{f':{quant}' if quant else ''}: {place} has GGUF files of these "
            f"quantisations: {', '.join(available)}; choose one, as in "
            f"{where}:{next(iter(available))}."
        )
    chosen = available[quant.upper()]
    if len(chosen) > 1:
        raise UserError(
            f"{where}:{quant}: {place} has several such files ({', '.join(map(str, chosen))}); "
            "download one and give its path."
        )
    return [part.as_posix() for part in split_paths(Path(chosen[0]))]


def _list(repo: str) -> _Repository:
    """The repository's files, from the Hub, or from the cache where the Hub does not answer."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    try:
        # list_repo_files would retry for 20 seconds before it gives up without network.
        siblings = HfApi().model_info(repo, timeout=TIMEOUT).siblings or []
        return _Repository(repo, [sibling.rfilename for sibling in siblings], None)
    except HFValidationError as error:
        raise UserError(f"hf:{repo}: this is no repository's name ({_line(error)}).") from None
    except _http_errors() as error:
        snapshot = _cached_snapshot(repo)
        if snapshot is None:
            raise UserError(_unreachable(f"hf:{repo}", error)) from None
        logging.warning("hf:%s: using the cache, the Hub did not answer (%s)", repo, _line(error))
        files = [
            file.relative_to(snapshot).as_posix()
            for file in snapshot.rglob("*")
            if file.is_file()  # follows links, so a blob that was deleted does not count
        ]
        return _Repository(repo, files, snapshot)


def _fetch(repository: _Repository, files: list[str]) -> Path:
    """The path of the first of `files` in the cache; all of them are there, or downloaded now."""
    from huggingface_hub import hf_hub_download

    where = f"hf:{repository.name}"
    if repository.snapshot is not None:
        if missing := [file for file in files if file not in repository.files]:
            raise UserError(
                f"{where}: the cache lacks {missing[0]}, and the Hub cannot be asked; connect to "
                "the network once."
            )
        return repository.snapshot / files[0]
    try:
        paths = [Path(hf_hub_download(repository.name, file)) for file in files]
    except _http_errors() as error:
        raise UserError(_unreachable(where, error)) from None
    return paths[0]


def _cached_snapshot(repo: str) -> Path | None:
    """The newest cached revision's directory, `main` before others."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        cached = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return None
    revisions = [
        revision
        for entry in cached
        if entry.repo_type == "model" and entry.repo_id == repo
        for revision in entry.revisions
    ]
    if not revisions:
        return None
    newest = max(revisions, key=lambda found: ("main" in found.refs, found.last_modified))
    return newest.snapshot_path


def _http_errors() -> tuple[type[Exception], ...]:
    """What asking the Hub can raise, with whichever HTTP library huggingface_hub stands on.

    That was requests, then httpx, and is now httpx2: the base of `HfHubHTTPError` says which.
    """
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    return (OSError, EntryNotFoundError, HfHubHTTPError.__bases__[0])


def _unreachable(what: str, error: Exception) -> str:
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return f"{what}: the repository asks for consent; accept it on its page and log in."
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{what}: the Hub has no such repository, or it is private; check the name, or log in "
            "with `hf auth login`."
        )
    if isinstance(error, EntryNotFoundError) and not isinstance(error, OSError):
        return f"{what}: the repository does not have this file; choose another."
    return (
        f"{what}: this is not in the local cache, and the Hub cannot be reached ({_line(error)}); "
        "connect to the network once, or give the path of a file."
    )


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
