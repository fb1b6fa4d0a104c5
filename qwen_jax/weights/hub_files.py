"""Which files of a repository make a checkpoint, a quantisation or an adapter.

Only names are known here: nothing has been downloaded yet.
"""

import dataclasses
import fnmatch
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from qwen_jax.errors import UserError
from qwen_jax.weights.gguf_file import SPLIT_NAME, split_paths

ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"

# Beside the weights: config, tokenizer (merges.txt is the only text of it), chat templates.
_SETTINGS = (".json", ".jinja", "merges.txt")
_NAMED_TEMPLATES = "additional_chat_templates/*.jinja"
# Weights in other layouts, and what a training run leaves.
_NOT_NEEDED = ("consolidated", "adapter_", "trainer_state", "optimizer")

# Words of names of files that hold no model: a vision encoder, what a quantiser measured, a LoRA,
# the small partner of speculative decoding, a vocabulary alone.
_HELPERS = {"mmproj", "imatrix", "lora", "adapter", "draft", "vocab"}

# "q4", "iq4", "q4km", "bf16", "mxfp4", and what may follow as words of their own.
_HEAD = re.compile(r"(?:i|t)?q[1-8][01k]?(?:xxs|xs|s|m|l|xl|xxl|nl)?|b?f16|f32|(?:mx|nv)fp4")
_TAIL = {
    *("0", "1", "4", "8", "k", "xxs", "xs", "s", "m", "l", "xl", "xxl", "nl", "moe"),
    *("kl", "ks", "kss", "kt", "r4", "r8"),  # ik_llama.cpp's
}
# Who made it: Unsloth's dynamic types, an importance matrix of the first kind.
_PREFIXES = {"ud": "UD", "i1": "i1"}
_ALIASES = {"fp16": "f16", "fp32": "f32"}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A GGUF checkpoint of a repository, whole or split.

    Attributes:
        first: its file, or the first of its parts.
        files: all of it.
        missing: those of them that the repository lacks.
        quant: as in "UD-Q4_K_XL", from the file's name or its folder's; "" where neither has one.
    """

    first: str
    files: tuple[str, ...]
    missing: tuple[str, ...]
    quant: str

    @property
    def name(self) -> str:
        """By which the lists of an error call it."""
        return self.quant or self.first


def checkpoint_files(files: Iterable[str]) -> list[str]:
    """The files of a Hugging Face directory, or none where the repository is not one.

    Of model.safetensors and shards, the first is enough, and what is read.
    """
    files = sorted(files)
    top = [file for file in files if "/" not in file and not file.startswith(_NOT_NEEDED)]
    named = [file for file in files if fnmatch.fnmatchcase(file, _NAMED_TEMPLATES)]
    weights = [file for file in top if file.endswith(".safetensors")]
    if "config.json" not in top or not weights:
        return []
    if "model.safetensors" in weights:
        weights = ["model.safetensors"]
    return [file for file in top if file.endswith(_SETTINGS)] + named + weights


def candidates(files: Iterable[str]) -> list[Candidate]:
    """All GGUF files, the parts of a split one together, also where some are missing."""
    there = set(files)
    wholes = {tuple(split_paths(Path(f))) for f in there if f.lower().endswith(".gguf")}
    found = []
    for parts in sorted(tuple(path.as_posix() for path in paths) for paths in wholes):
        missing = tuple(part for part in parts if part not in there)
        found.append(Candidate(parts[0], parts, missing, quantisation(parts[0])))
    return found


def models(found: Sequence[Candidate]) -> list[Candidate]:
    """Those that are no helpers by their name. A word that all have is part of the model's."""
    common = set.intersection(*map(_helps, found)) if found else set()
    return [candidate for candidate in found if not _helps(candidate) - common]


def named(found: Sequence[Candidate], file: str | None) -> list[Candidate]:
    """Those of which a file has this name or path, helpers among them."""
    return [
        candidate
        for candidate in found
        if file in candidate.files or file in {PurePosixPath(f).name for f in candidate.files}
    ]


def adapters(found: Sequence[Candidate]) -> list[Candidate]:
    """Those that say that they are LoRAs; all where none does."""
    return [candidate for candidate in found if _helps(candidate) & {"lora", "adapter"}] or [*found]


def _helps(candidate: Candidate) -> set[str]:
    return set(_words(PurePosixPath(candidate.first).name)) & _HELPERS


def quantisation(file: str) -> str:
    """`UD-Q4_K_XL` of `m-ud-q4_k_xl-00001-of-00002.gguf`, or of its folder, or ""."""
    path = PurePosixPath(file)
    split = SPLIT_NAME.fullmatch(path.name)
    for part in (split["stem"] if split else path.stem, *reversed(path.parts[:-1])):
        words = _words(part)
        for start in reversed(range(len(words))):
            if _HEAD.fullmatch(words[start]):
                return _spelt(words, start)
    return ""


def _spelt(words: Sequence[str], start: int) -> str:
    stop = start + 1
    while stop < len(words) and words[stop] in _TAIL:
        stop += 1
    quant = "_".join(words[start:stop]).upper()
    prefix = _PREFIXES.get(words[start - 1]) if start else None
    return f"{prefix}-{quant}" if prefix else quant


def _words(text: str) -> list[str]:
    words = re.split(r"[-_.\s]+", text.lower())
    return [_ALIASES.get(word, word) for word in words if word]


def _key(text: str) -> str:
    """Equal for spellings of one name: case, `-`, `_` and `.` don't count, fp16 is f16."""
    return "".join(_words(text))


def chosen(where: str, found: Sequence[Candidate], quant: str | None) -> Candidate:
    """The one checkpoint that `quant` names among `found`, which are not empty.

    A name is a file's, a path, or a quantisation's, of one folder where it begins with that.
    Without a name there must be one checkpoint only: types differ in size and in what they
    compute, so that none is taken unasked.

    Raises UserError, listing what there is, where it names none or several.
    """
    matching = list(found) if quant is None else _matching(found, quant)
    if quant is not None:  # What is whole is meant, and not what somebody left beside it.
        matching = [candidate for candidate in matching if not candidate.missing] or matching
    if len(matching) == 1:
        return matching[0]
    repo = where if quant is None else where.removesuffix(f":{quant}")
    names = list(dict.fromkeys(c.name for c in found))
    if len(matching) > 1 and (quant is not None or len(names) == 1):
        firsts = [c.first for c in matching]
        raise UserError(
            f"{where}: several files are of this name ({_listed(firsts)}); give one's path, as in "
            f"{repo}:{firsts[0]}."
        )
    raise UserError(
        f"{where}: there are GGUF files of these quantisations: {_listed(names)}; choose one, as "
        f"in {repo}:{names[0]}."
    )


def _listed(names: Sequence[str]) -> str:
    more = len(names) - 40
    return ", ".join(names[:40]) + (f", and {more} more" if more > 0 else "")


def _matching(found: Sequence[Candidate], quant: str) -> list[Candidate]:
    """By the first of the rules that finds any."""
    folder, _, last = quant.strip("/").rpartition("/")
    inside = [c for c in found if not folder or c.first.startswith(f"{folder}/")]
    key = _key(last.lower().removesuffix(".gguf"))
    rules = (
        lambda c: quant in c.files,
        lambda c: bool(named([c], last)),
        lambda c: last.lower().removesuffix(".gguf") == _stem(c).lower(),
        lambda c: key == _key(c.quant),
        # Without who made it, where nobody else did: `Q4_K_M` finds `i1-Q4_K_M`.
        lambda c: key == _key(c.quant.partition("-")[2]),
    )
    for rule in rules:
        if matching := [c for c in inside if key and rule(c)]:
            return matching
    return []


def _stem(candidate: Candidate) -> str:
    name = PurePosixPath(candidate.first)
    split = SPLIT_NAME.fullmatch(name.name)
    return split["stem"] if split else name.stem
