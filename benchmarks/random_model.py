"""A random Qwen2.5 checkpoint of a real size as GGUF, vocabulary included, for benchmarks.

The weights are drawn from N(0, 0.02^2), so logits look like a model's and nothing is zero; blocks
are random bytes of about that size, the same for all matrices of one shape and type, so that 8 GB
are written in seconds. The vocabulary is made up: every byte, then pairs and triples of bytes with
their merges.
"""

import argparse
import functools
import itertools
import re
from pathlib import Path

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type
from tqdm import tqdm

from qwen_jax.config import ModelConfig
from qwen_jax.text.vocabulary import BYTE_SYMBOLS
from qwen_jax.weights.blocks import decode_into
from qwen_jax.weights.names import parameters
from tools.demo_gguf import add_sizes

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def qwen(
    layers: int, d: int, heads: int, kv: int, h: int, f: int, v: int, tied: bool
) -> ModelConfig:
    return ModelConfig(layers, d, heads, kv, h, f, v, 32768, 1e6, 1e-6, tied)


SIZES = {
    "0.5b": qwen(24, 896, 14, 2, 64, 4864, 151936, True),
    "1.5b": qwen(28, 1536, 12, 2, 128, 8960, 151936, True),
    "3b": qwen(36, 2048, 16, 2, 128, 11008, 151936, True),
    "7b": qwen(28, 3584, 28, 4, 128, 18944, 152064, False),
    "14b": qwen(48, 5120, 40, 8, 128, 13824, 152064, False),
    "32b": qwen(64, 5120, 40, 8, 128, 27648, 152064, False),
    "72b": qwen(80, 8192, 64, 8, 128, 29568, 152064, False),
}


MIXED = "Q4_K_M"
PLAIN = (Type.F32, Type.F16, Type.BF16)
# Where the float16 scales of a block lie, and how large they are beside each other: random ones
# would overflow. Minima are as large as half of the largest code, so that weights are 0 on the
# average; else each layer's outputs would be many times its inputs.
SCALES = {
    Type.Q5_0: {0: 1.0},
    Type.Q8_0: {0: 1.0},
    Type.Q4_K: {0: 1.0, 2: 7.5},
    Type.Q6_K: {208: 1.0},
}
TYPES = (*(kind.name for kind in (*PLAIN, *SCALES)), MIXED)


def random_matrix(rng: np.random.Generator, shape: tuple[int, ...], kind: Type) -> np.ndarray:
    """Values of RMS 0.02 in the type, as GGUFWriter takes them: numbers, or rows of bytes."""
    if kind in PLAIN:
        return gguf.quants.quantize(0.02 * rng.standard_normal(shape, np.float32), kind)
    block, size = GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (int(np.prod(shape)) // block, size), dtype=np.uint8)

    def set_scales(value: float) -> None:
        for offset, times in SCALES[kind].items():
            half = np.float16(value * times)
            raw[:, offset : offset + 2] = np.frombuffer(half.tobytes(), np.uint8)

    set_scales(1)
    some = raw[:1024]
    values = np.empty(some.shape[0] * block, np.float32)
    decode_into(some.reshape(-1), kind, values)
    set_scales(0.02 / float(np.sqrt(np.mean(values**2))))
    return raw.reshape(shape[0], -1)


def type_of(name: str, columns: int, config: ModelConfig, kind: str) -> Type:
    """The type of a matrix; of MIXED, as llama.cpp mixes them for Q4_K_M."""
    if kind != MIXED:
        return Type[kind]
    layer = int(found[1]) if (found := re.match(r"blk\.(\d+)\.", name)) else 0
    eighth = config.num_layers // 8
    better = layer < eighth or layer >= 7 * eighth or (layer - eighth) % 3 == 2
    head = "token_embd.weight" if config.tied else "output.weight"
    if name == head or (better and re.search("attn_v|ffn_down", name)):
        return Type.Q6_K if columns % 256 == 0 else Type.Q8_0
    return Type.Q4_K if columns % 256 == 0 else Type.Q5_0


def write(path: Path, config: ModelConfig, seed: int, kind: str) -> None:
    """Writes the checkpoint; matrices in `kind`, one of TYPES, vectors in F32."""
    writer = gguf.GGUFWriter(path, "qwen2", use_temp_file=False)
    add_sizes(writer, config)
    _add_vocabulary(writer, config.vocab_size)
    rng = np.random.default_rng(seed)

    @functools.cache
    def blocks(shape: tuple[int, ...], stored: Type) -> np.ndarray:
        return random_matrix(rng, shape, stored)

    tensors = [
        (name, shape)
        for parameter in parameters(config, "gguf")
        for name, shape in parameter.sources.items()
    ]
    for name, shape in tqdm(tensors, desc=f"writing {path.name}", disable=None):
        if len(shape) == 1:
            values = rng.standard_normal(shape, np.float32)
            writer.add_tensor(name, 1 + 0.1 * values if "norm" in name else values)
            continue
        stored = type_of(name, shape[-1], config, kind)
        draw = functools.partial(random_matrix, rng) if stored in PLAIN else blocks
        writer.add_tensor(name, draw(shape, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    pairs = [a + b for a, b in itertools.product(BYTE_SYMBOLS, repeat=2)]
    merges = [f"{p[0]} {p[1]}" for p in pairs]
    tokens = [*BYTE_SYMBOLS, *pairs]
    for pair, symbol in itertools.product(pairs, BYTE_SYMBOLS):
        if len(tokens) == size - len(SPECIAL):
            break
        tokens.append(pair + symbol)
        merges.append(f"{pair} {symbol}")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*tokens, *SPECIAL])
    writer.add_token_types([1] * len(tokens) + [3] * len(SPECIAL))
    writer.add_token_merges(merges)
    writer.add_eos_token_id(size - 1)
    writer.add_add_bos_token(False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--size", choices=SIZES, default="0.5b")
    parser.add_argument("--type", choices=TYPES, default="F16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.path, SIZES[args.size], args.seed, args.type)
