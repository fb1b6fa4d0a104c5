"""What a file that cannot be read really is, told by its first bytes and by its name.

Only what is established is claimed: each kind has a signature of its own, and a name counts only
for a file that could not be read to its end.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from qwen_jax import regular_files
from qwen_jax.errors import UserError

Expected = Literal["GGUF", "safetensors", "JSON", "text", "dump", "certificate"]
"""A dump is a safetensors file that an engine wrote, a certificate JSON."""

HEAD_BYTES = 512
"""So many first bytes tell every kind here: tar's signature ends at 262."""

_ARCHIVE = "unpack it and give what is inside"
_PYTORCH = (
    "a PyTorch checkpoint (pickle), which can run any code when it is opened; load it with "
    "transformers where you trust it, and save it with save_pretrained, which writes safetensors"
)
_SAFETENSORS_KIND = (
    "a safetensors file; give the directory in which it lies as model.safetensors beside its "
    "config.json"
)
_LEGACY = (
    "a GGML model from before GGUF (2023), hence before Qwen2; choose the GGUF file of a Qwen2.5 "
    "model"
)

_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"lmgg", _LEGACY),
    (b"fmgg", _LEGACY),
    (b"tjgg", _LEGACY),
    (b"algg", "a LoRA adapter of the GGML format from before GGUF (2023); convert it again"),
    (b"PK\x03\x04", f"a zip archive; {_ARCHIVE}"),
    (b"\x1f\x8b\x08", f"compressed by gzip; {_ARCHIVE}"),
    (b"\x28\xb5\x2f\xfd", f"compressed by zstd; {_ARCHIVE}"),
    (b"\xfd7zXZ\x00", f"compressed by xz; {_ARCHIVE}"),
    (b"BZh", f"compressed by bzip2; {_ARCHIVE}"),
    (b"\x04\x22\x4d\x18", f"compressed by lz4; {_ARCHIVE}"),
    (b"7z\xbc\xaf\x27\x1c", f"a 7-Zip archive; {_ARCHIVE}"),
    (b"Rar!\x1a\x07", f"a RAR archive; {_ARCHIVE}"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras, TensorFlow); choose the model's safetensors"),
    (b"\x93NUMPY", "a NumPy array; choose the model's safetensors"),
    (b"MZqFpD", "a llamafile, an executable archive; unzip it and give the GGUF file inside"),
    (b"\x7fELF", "a program for Linux; choose a model file"),
    (b"%PDF-", "a PDF document; choose a model file"),
    (b"# xet version", "a git-xet pointer to the file, not the file; download the file itself"),
)
_PICKLE = re.compile(rb"\x80[\x02-\x05][\x8a\x95}\](c]")
_GIT_LFS = re.compile(rb"version https://(?:git-lfs|hawser)\.github\.com/spec/")
_WEB_PAGE = re.compile(rb"\s*<(?:!doctype|html|head|body|\?xml|!--)", re.IGNORECASE)
# Field 1 is a small version, field 2 the producer's name.
_ONNX = re.compile(rb"\x08[\x01-\x20]\x12[\x01-\x40][A-Za-z]{2}")
# The header's length, far below 4 GB, and its opening brace.
_SAFETENSORS = re.compile(rb"[\s\S]{4}\0{4}\s*\{")

# Names that programs give to a piece of a file; the last two are those of `split` and of 7-Zip.
_PIECE = re.compile(
    r"(?P<stem>(?P<whole>.+?)[.-](?:part|split)[-_.]?)(?:\d+|[a-z]{1,2})(?:[-_.]?of[-_.]?\d+)?"
    r"|(?P<stem2>(?P<whole2>.+\.(?:gguf|safetensors))[._-]?)(?:a[a-z]|\d{1,3})",
    re.IGNORECASE,
)
# Names that programs give to a download that is still under way.
_UNFINISHED = re.compile(
    r".+\.(?:incomplete|partial|part|crdownload|download|opdownload|filepart|unconfirmed|tmp|!qb|!ut"
    r"|aria2|aria2__temp)",
    re.IGNORECASE,
)


_INSTEAD = {
    "dump": "name a trace or a dump",
    "certificate": "name a certificate, the JSON file that `certify --output` writes",
}
"""What to do with what is no model, whatever a model of that kind would need."""
_GGUF_FOR_DUMP = "a GGUF file, a model; let --model name it, and name a trace or a dump"
_FOR_MODELS = ("choose", "give", "load", "convert")
"""How the ways out of kinds begin that only help where a model is looked for."""


@contextmanager
def told_by_kind(path: Path, expected: Expected) -> Iterator[None]:
    """Reads `path` within: where that fails and the file is another kind, the error says which."""
    try:
        yield
    except UserError:
        kind = kind_of(path, expected)
        if kind is None:
            raise
        raise UserError(f"{path}: the file is {kind}.") from None


def kind_of(path: Path, expected: Expected) -> str | None:
    """What a file that is no readable `expected` is, to follow "the file is"; None if not known."""
    if not path.is_file():
        return None
    try:
        with regular_files.opened(path) as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return None
    kind = _kind_by_name(path) or _kind_by_bytes(head, expected)
    what, _, way = (kind or "").rpartition("; ")
    if expected in _INSTEAD and way.startswith(_FOR_MODELS):
        return f"{what}; {_INSTEAD[expected]}"
    return kind


def _kind_by_name(path: Path) -> str | None:
    partner = path.with_name(f"{path.name}.aria2")
    if _UNFINISHED.fullmatch(path.name) or partner.exists():
        said = f"{partner.name} beside it" if partner.exists() else "its name"
        return (
            f"a download under way or broken off, as {said} says; let the program that downloads "
            "it finish"
        )
    if piece := _PIECE.fullmatch(path.name):
        stem, whole = piece["stem"] or piece["stem2"], piece["whole"] or piece["whole2"]
        return (
            "one piece of a file that was cut up, as its name says; join all pieces in their "
            f"order, as `cat '{stem}'* > '{whole}'` does, and give the whole"
        )
    return None


def _kind_by_bytes(head: bytes, expected: Expected) -> str | None:
    if head.startswith(b"GGUF"):
        if expected == "dump":
            return _GGUF_FOR_DUMP
        return None if expected == "GGUF" else "a GGUF file; give it by its own path"
    if _SAFETENSORS.match(head):
        return None if expected in ("safetensors", "dump") else _SAFETENSORS_KIND
    if _GIT_LFS.match(head):
        size = re.search(rb"^size (\d+)", head, re.MULTILINE)
        whole = f" of {int(size[1])} bytes" if size else ""
        return (
            f"a git-lfs pointer to the file{whole}, not the file; run `git lfs pull` in its "
            "repository, or download the file itself"
        )
    if _PICKLE.match(head) or (head.startswith(b"PK\x03\x04") and b"data.pkl" in head):
        return _PYTORCH
    for signature, kind in _SIGNATURES:
        if head.startswith(signature):
            return kind
    if head[257:262] == b"ustar":
        return f"a tar archive; {_ARCHIVE}"
    if _ONNX.match(head):
        return "an ONNX model; choose the model's safetensors or GGUF file"
    if _WEB_PAGE.match(head):
        return (
            "a web page and not the file it was to be; on the Hub, a file's address has /resolve/ "
            "where its page has /blob/"
        )
    if len(head) == HEAD_BYTES and not any(head):
        return (
            "all zeros where it begins, as one for which a download has made room and no more; let "
            "the download finish"
        )
    return None if expected == "text" else _kind_by_text(head, expected)


def _kind_by_text(head: bytes, expected: Expected) -> str | None:
    """Text where none should be: most often what a server answered."""
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if len(head) < HEAD_BYTES or error.start < HEAD_BYTES - 3:  # else a character is cut
            return None
        text = head[: error.start].decode()
    shown = " ".join(text.split())
    # Few bytes look like text by chance, and JSON with a fault is told by its own reader.
    wanted = {"certificate": "JSON", "dump": "safetensors"}.get(expected, expected)
    if len(shown) < 8 or not shown.isprintable() or (wanted == "JSON" and set(shown) & set("{[")):
        return None
    kind = "JSON" if shown[0] in "{[" else "text"
    beginning = shown[:60].rstrip()
    return (
        f"{kind}, not {wanted}, and begins {beginning!r}; choose another file, or download this "
        "one by its own address"
    )
