"""From what the user calls a model to a path: a file, a directory, or a name of the Hub's.

A branch may move, so a name is first pinned to the commit that it means now; everything after that
is of the commit. Downloads go through huggingface_hub and are kept in its cache, which alone
decides where the Hub can't be asked.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from absl import logging

from qwen_jax.errors import UserError
from qwen_jax.weights import hub_files, hub_names
from qwen_jax.weights.hub_errors import NotTheHub, explain, is_definite
from qwen_jax.weights.hub_files import ADAPTER, ADAPTER_CONFIG
from qwen_jax.weights.hub_names import HubName

# Seconds the Hub may take to answer before the cache alone decides.
TIMEOUT = 10
_MAIN = "main"
# Small, and in nearly all repositories: each is enough for the cache to know where a branch is.
_NOTES = (".gitattributes", "config.json", "README.md")


@dataclasses.dataclass(frozen=True)
class _Repository:
    """A repository at one commit.

    Attributes:
        asked: the name as the user gave it.
        name: with the commit as its revision.
        snapshot: where the files lie, if the Hub could not be asked.
    """

    asked: HubName
    name: HubName
    files: Sequence[str]
    snapshot: Path | None

    @property
    def place(self) -> str:
        return "the cache (the Hub can't be asked)" if self.snapshot else "the repository"


def pin(model: str, *, adapter: bool = False) -> str:
    """The name with the commit that its branch or tag means now; a path as it is.

    Args:
        adapter: as `resolve` has it.

    Raises:
        UserError: the name is malformed, nobody knows what it means, or the Hub does, but has no
            such model at that commit. A name with a commit is not looked up.
    """
    if not hub_names.is_hub_name(model):
        return model
    name = hub_names.parse(model)
    if name.is_commit:
        return model
    repository = _open(name)
    if repository.snapshot is None:  # What a cache lacks need not be wanted: all may be done.
        _wanted(repository, adapter)
    return str(repository.name)


def resolve(model: str, *, adapter: bool = False) -> Path:
    """The GGUF file (first part of a split one) or Hugging Face directory that `model` names.

    Args:
        model: a path, or `hf:owner/repo[@revision][:quant]`. The revision is a branch, a tag, a
            commit or `refs/pr/N`. Without a quant a directory of safetensors is preferred; a
            quant is a GGUF quantisation in any spelling, a file's name, or its path.
        adapter: a LoRA is asked for, as a directory (adapter_config.json) or a GGUF file.

    Raises:
        UserError: there is no such file, repository, revision or quantisation, or no network and
            the cache does not have it.
    """
    if hub_names.is_hub_name(model):
        repository = _open(hub_names.parse(model))
        return _fetch(repository, _wanted(repository, adapter))
    try:
        path = Path(model).expanduser()
        exists = model != "" and path.exists()
    except (OSError, RuntimeError, ValueError):  # too long a name; ~nobody; a null character
        exists = False
    if not exists:
        raise UserError(hub_names.no_such_path(model))
    return path


def _wanted(repository: _Repository, adapter: bool) -> Sequence[str]:
    """The files to fetch. The path of the first, or its directory's, is the checkpoint's."""
    where, files, quant = str(repository.asked), repository.files, repository.asked.quant
    found = hub_files.candidates(files)
    checkpoint = hub_files.checkpoint_files(files)
    if quant is None and adapter and ADAPTER_CONFIG in files:
        if ADAPTER not in files:
            raise UserError(f"{where}: {repository.place} has {ADAPTER_CONFIG} but no {ADAPTER}.")
        return [ADAPTER_CONFIG, ADAPTER]
    if quant is None and checkpoint and not adapter:
        return checkpoint
    if not found:
        raise UserError(f"{where}: {_nothing(repository, bool(checkpoint), adapter)}")
    of_a_kind = hub_files.adapters if adapter else hub_files.models
    usable = hub_files.named(found, quant) or of_a_kind(found)
    if not usable:
        raise UserError(
            f"{where}: the GGUF files of {repository.place} are by their names no models "
            f"({', '.join(c.first for c in found)}); give a file's name after a colon if one is."
        )
    chosen = hub_files.chosen(where, usable, quant)
    if missing := chosen.missing:
        raise UserError(
            f"{where}: {repository.place} lacks {', '.join(missing[:3])}"
            f"{', ...' if missing[3:] else ''}, {len(missing)} of the {len(chosen.files)} parts; "
            + ("connect to the network once." if repository.snapshot else "choose another file.")
        )
    return chosen.files


def _nothing(repository: _Repository, checkpoint: bool, adapter: bool) -> str:
    """What a repository has instead of what is asked for."""
    name, files, place = repository.asked, repository.files, repository.place
    if name.quant is not None and (checkpoint or ADAPTER_CONFIG in files):
        return f"{place} has safetensors and no GGUF files; leave out :{name.quant}."
    if adapter:
        return f"{place} has neither {ADAPTER_CONFIG} nor a GGUF file; choose a LoRA."
    if ADAPTER_CONFIG in files:
        plain = name.of(None)
        return f"this is an adapter, not a model; give its base as --model and --adapter={plain}."
    if any(file.endswith((".bin", ".pt", ".pth")) for file in files):
        return f"{place} has PyTorch weights only, which are not read; convert them to safetensors."
    if any(file.endswith(".safetensors") and "/" in file for file in files):
        return (
            f"{place} has no checkpoint at its top; download the folder you mean and give its path."
        )
    return (
        f"{place} has neither GGUF files nor safetensors with a config.json; choose another "
        "repository."
    )


def _open(name: HubName) -> _Repository:
    """The repository's files, from the Hub, or from the cache where the Hub does not answer."""
    from huggingface_hub import HfApi

    try:
        # list_repo_files would retry for 20 seconds before it gives up without network.
        info = HfApi().model_info(name.repo, revision=name.revision, timeout=TIMEOUT)
        commit, files = info.sha, [sibling.rfilename for sibling in info.siblings or []]
        if not isinstance(commit, str) or not hub_names.COMMIT.fullmatch(commit):
            raise NotTheHub("no commit")
        if not all(isinstance(file, str) for file in files):
            raise NotTheHub("no names of files")
    except Exception as error:  # The library takes answers apart unchecked: a wrong one raises any.
        cause, remedy = explain(name, error)
        snapshot = None if is_definite(error) else _cached_snapshot(name)
        if snapshot is None:
            raise UserError(f"{name}: {cause}; {remedy}.") from None
        logging.warning("%s: using commit %s of the cache, since %s", name, snapshot.name, cause)
        cached = [
            file.relative_to(snapshot).as_posix()
            for file in snapshot.rglob("*")
            if file.is_file()  # follows links, so a blob that was deleted does not count
        ]
        return _Repository(name, name.at(snapshot.name), cached, snapshot)
    repository = _Repository(name, name.at(commit), files, None)
    if not name.is_commit:
        _note(repository, name.revision or _MAIN)
    return repository


def _note(repository: _Repository, revision: str) -> None:
    """Lets the cache know which commit a branch means, as it does not where files are fetched by
    the commit. Without this note, only a run without network has a harder time."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    repo = repository.name.repo
    for file in _NOTES:
        if file in repository.files:
            known = try_to_load_from_cache(repo, file, revision=revision)
            if isinstance(known, str) and repository.name.revision in Path(known).parts:
                return
            try:
                hf_hub_download(repo, file, revision=revision)
            except Exception:
                logging.debug("%s: %s is not kept", repository.name, revision)
            return


def _fetch(repository: _Repository, files: Sequence[str]) -> Path:
    """The path of the first of `files` in the cache, or its directory where they are a Hugging
    Face directory's; all of them are there, or downloaded now."""
    from huggingface_hub import hf_hub_download

    name = repository.name
    if repository.snapshot is not None:
        paths = [repository.snapshot / file for file in files]
    else:
        try:
            paths = [
                Path(hf_hub_download(name.repo, file, revision=name.revision)) for file in files
            ]
        except Exception as error:  # as above
            cause, remedy = explain(repository.asked, error)
            raise UserError(f"{repository.asked}: {cause}; {remedy}.") from None
    return paths[0] if paths[0].suffix.lower() == ".gguf" else paths[0].parent


def _cached_snapshot(name: HubName) -> Path | None:
    """The directory of a cached revision: a branch or tag as it was, or a commit; without a
    revision `main`, or the newest if the cache does not know where that was."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        cached = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except (CacheNotFound, OSError, ValueError):
        return None
    revisions = [
        revision
        for entry in cached
        if entry.repo_type == "model" and entry.repo_id == name.repo
        for revision in entry.revisions
    ]
    wanted = name.revision or _MAIN
    for revision in revisions:
        if wanted in revision.refs or revision.commit_hash == wanted:
            return revision.snapshot_path
    if name.revision is None and revisions:
        return max(revisions, key=lambda found: found.last_modified).snapshot_path
    return None
