"""A random Qwen2.5 checkpoint of a real size as GGUF, vocabulary included, for benchmarks.

The weights are drawn from N(0, 0.02^2), so logits look like a model's and nothing is zero.
The vocabulary is made up: every byte, then pairs and triples of bytes with their merges.
"""

import argparse
import itertools
from pathlib import Path

import gguf
import numpy as np
from tqdm import tqdm

from qwen_jax.config import ModelConfig
from qwen_jax.text.vocabulary import BYTE_SYMBOLS
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
    "7b": qwen(28, 3584, 28, 4, 128, 18944, 152064, False),
}


def write(path: Path, config: ModelConfig, seed: int, kind: gguf.GGMLQuantizationType) -> None:
    """Writes the checkpoint; matrices in `kind` (F32, F16 or BF16), vectors in F32."""
    writer = gguf.GGUFWriter(path, "qwen2", use_temp_file=False)
    add_sizes(writer, config)
    _add_vocabulary(writer, config.vocab_size)
    rng = np.random.default_rng(seed)
    tensors = [
        (name, shape)
        for parameter in parameters(config, "gguf")
        for name, shape in parameter.sources.items()
    ]
    for name, shape in tqdm(tensors, desc=f"writing {path.name}", disable=None):
        values = rng.standard_normal(shape, np.float32)
        if "norm" in name:
            values = 1 + 0.1 * values
        elif len(shape) > 1:
            values *= 0.02
        stored = kind if len(shape) > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(values, stored), raw_dtype=stored)
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
    parser.add_argument("--type", choices=("F32", "F16", "BF16"), default="F16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.path, SIZES[args.size], args.seed, gguf.GGMLQuantizationType[args.type])
