"""A checkpoint written again in another GGUF type, to see what the type costs.

Matrices get the type where their rows are whole blocks of it, else Q8_0 or F16; vectors keep
theirs. Types that round each block by itself are written by `gguf.quants`; llama.cpp's K-quants
are rounded to the nearest (`weights.kquant_encoding`) without llama.cpp's search for better scales,
so their numbers are an upper bound of the error of llama.cpp's files.
"""

import hashlib
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from qwen_jax.errors import UserError
from qwen_jax.experiments import lines
from qwen_jax.weights.blocks import decode_into
from qwen_jax.weights.encoding import TYPES, encode, whole
from qwen_jax.weights.loader import open_checkpoint


def check(kind: str) -> None:
    """Raises UserError where no such type can be written."""
    if kind not in TYPES:
        raise UserError(
            f"experiment.quantization is {kind!r}, but it must be one of {', '.join(TYPES)}."
        )


def made(source: Path, kind: str, directory: Path) -> Path:
    """The checkpoint in another type, written into `directory/models` unless it is there."""
    check(kind)
    source = source.absolute()  # A link of the Hub's cache leads to a file without a name.
    name = hashlib.sha256(str(source).encode()).hexdigest()[:6]
    path = directory / "models" / f"{source.stem}-{name}-{kind}.gguf"
    if not path.exists():
        with lines.written(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with lines.placed(path) as temporary:
            write(source, Type[kind], temporary)
    return path


def write(source: Path, kind: Type, out: Path) -> None:
    """Writes the GGUF file `source` to `out`, its matrices in another type."""
    checkpoint = open_checkpoint(source)
    if checkpoint.format != "gguf":
        raise UserError(f"{source}: only GGUF files can be quantised; convert the directory first.")
    # `source` may be a directory or a later part, and the first has the metadata.
    reader = gguf.GGUFReader(checkpoint.files.paths[0])
    writer = gguf.GGUFWriter(out, checkpoint.metadata["general.architecture"])
    for field in reader.fields.values():
        left_out = field.name.startswith(("GGUF.", "split."))  # The new file is whole.
        if left_out or field.name == "general.architecture":
            continue
        element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], element)
    for name, info in checkpoint.tensors.items():
        values = np.empty(info.shape, np.float32)
        decode_into(checkpoint.files.raw(name), info.type, values)
        stored = fitting(kind, info.shape)
        writer.add_tensor(name, encode(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def fitting(kind: Type, shape: tuple[int, ...]) -> Type:
    """The type a tensor gets: vectors stay float32, rows that are no whole blocks get more bits."""
    if len(shape) < 2:
        return Type.F32
    for candidate in (kind, Type.Q8_0, Type.F16):
        if whole(shape[-1], candidate):
            return candidate
    raise AssertionError("F16 has blocks of one")
