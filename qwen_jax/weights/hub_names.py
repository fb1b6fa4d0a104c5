"""How a model on the Hub is named: `hf:owner/repo[@revision][:quant]`."""

import dataclasses
import re
from pathlib import Path
from urllib.parse import unquote

from qwen_jax.errors import UserError

FORM = "hf:owner/repo[@revision][:quant]"
EXAMPLE = "hf:Qwen/Qwen2.5-0.5B-Instruct-GGUF:q4_k_m"
COMMIT = re.compile(r"[0-9a-f]{40}")

_REPO = r"[A-Za-z0-9][\w.-]*/[\w.-]+"
_NAME = re.compile(
    # What git allows in a branch's or tag's name, or a commit; a file's name may have spaces.
    rf"hf:(?P<repo>{_REPO})(?:@(?P<revision>[^\s:@~^?*\[\\]+))?(?::(?P<quant>[^\s:@][^:@\r\n]*))?",
    re.ASCII,
)
_HOST = r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/"
_PAGE = re.compile(
    rf"{_HOST}(?P<repo>{_REPO})"
    r"(?:/(?:tree|blob|resolve|raw|commit)/(?P<revision>refs/pr/\d+|[^/]+)(?:/(?P<file>.+))?"
    r"|:(?P<quant>[\w.-]+))?/?",  # as the Hub writes it for ollama
    re.ASCII,
)
_FILE_ENDINGS = (".gguf", ".safetensors", ".bin", ".json")


@dataclasses.dataclass(frozen=True)
class HubName:
    """A repository, perhaps its state, and perhaps which of its GGUF files.

    Attributes:
        repo: `owner/repo`.
        revision: a branch, tag or commit; None is the branch `main`.
        quant: a quantisation, or a file's name or path in the repository.
    """

    repo: str
    revision: str | None = None
    quant: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf:{self.repo}{revision}" + (f":{self.quant}" if self.quant else "")

    def at(self, revision: str | None) -> "HubName":
        return dataclasses.replace(self, revision=revision)

    def of(self, quant: str | None) -> "HubName":
        return dataclasses.replace(self, quant=quant)

    @property
    def is_commit(self) -> bool:
        """Whether it means one state for ever."""
        return self.revision is not None and COMMIT.fullmatch(self.revision) is not None


def is_hub_name(model: str) -> bool:
    """Whether this is meant as a name of the Hub's, well formed or not."""
    return model.startswith("hf:")


def parse(model: str) -> HubName:
    """Raises UserError where the name is not of the form."""
    found = _NAME.fullmatch(model)
    if not found:
        meant = _meant(model)
        hint = f"; {meant}." if meant else f", as {EXAMPLE} does."
        raise UserError(f"{_shown(model)}: the name does not read {FORM}{hint}")
    return HubName(found["repo"], found["revision"], found["quant"])


def _shown(model: str) -> str:
    return f"{model:.200}" if model.isprintable() and model.strip() else f"{model!r:.200}"


def abbreviated(text: str) -> str:
    """A name of the Hub's with its commit cut to 7 digits, as git does; other text as it is."""
    found = _NAME.fullmatch(text)
    if not found or not found["revision"] or not COMMIT.fullmatch(found["revision"]):
        return text
    return str(HubName(found["repo"], found["revision"][:7], found["quant"]))


def _meant(model: str) -> str | None:
    """What a malformed name may have meant."""
    rest = model.removeprefix("hf:").removeprefix("//")
    if found := re.fullmatch(rf"({_REPO}):([^:@]+)@(\S+)", rest, re.ASCII):
        return f"the revision comes first: hf:{found[1]}@{found[3]}:{found[2]}"
    if re.match(_HOST, rest):
        return _of_page(rest)
    if found := re.fullmatch(rf"({_REPO})((?:@[^\s:@]+)?)/(.+\.gguf)", rest, re.ASCII):
        return f"a file stands after a colon: hf:{found[1]}{found[2]}:{found[3]}"
    if re.fullmatch(_REPO, rest, re.ASCII):  # after hf://
        return f"did you mean hf:{rest}"
    return None


def _of_page(url: str) -> str | None:
    """The name of what a page of the Hub shows."""
    found = _PAGE.fullmatch(unquote(re.split(r"[?#]", url)[0]))
    if not found:
        return None
    revision = None if found["revision"] in (None, "main") else found["revision"]
    file = found["file"] if (found["file"] or "").endswith(".gguf") else None
    return f"did you mean {HubName(found['repo'], revision, file or found['quant'])}"


def no_such_path(model: str) -> str:
    """The sentence for a model that is neither a path nor a name of the Hub's."""
    shown = _shown(model)
    if re.match(rf"https?://|{_HOST}", model):
        meant = _of_page(model)
        hint = f"{meant}?" if meant else "download the file and give its path."
        return f"{shown}: an address can't be read as a model; {hint}"
    if model[:3] == "HF:":
        return f"{shown}: the prefix is written in small letters; did you mean hf:{model[3:]}?"
    hint = f"give a GGUF file, a Hugging Face directory, or {FORM}."
    looks_so = _NAME.fullmatch(f"hf:{model}") and not model.lower().endswith(_FILE_ENDINGS)
    if looks_so and not Path(model.partition("/")[0]).exists():
        hint = f"did you mean hf:{model}?"
    return f"{shown}: there is no such file or directory; {hint}"
