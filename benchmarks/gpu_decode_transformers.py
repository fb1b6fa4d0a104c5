"""Decode speed of Hugging Face transformers on a GPU: static cache and torch.compile.

    python -m benchmarks.gpu_decode_transformers --size=0.5b --batch=8

Random bfloat16 weights of a real size, greedy. The figure is the difference of two generations
of different lengths, so that prompt and set-up cancel. Needs torch with CUDA and transformers.
"""

import argparse
import json
import time
from statistics import median

import torch
import transformers
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.random_model import SIZES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="0.5b")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    c = SIZES[args.size]
    config = Qwen2Config(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.ffn_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        tie_word_embeddings=c.tied,
        max_position_embeddings=c.context_length,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = Qwen2ForCausalLM(config).eval()
    prompt = torch.randint(0, c.vocab_size, (args.batch, args.context), device="cuda")

    def seconds(tokens: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        # The cache is as long for both, so that both run the same compiled step.
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            cache_implementation="static",
        )
        torch.cuda.synchronize()
        return time.perf_counter() - start

    with torch.inference_mode():
        for tokens in (33, 161, 33, 161):  # compiles
            seconds(tokens)
        steps = [(seconds(161) - seconds(33)) / 128 for _ in range(args.rounds)]
    print(
        f"{args.size}, batch {args.batch}: transformers, static cache, compiled: "
        f"{median(steps) * 1e6:.0f} us a step"
    )
    record = vars(args) | {
        "benchmark": "gpu_decode_transformers",
        "us": [round(s * 1e6, 1) for s in steps],
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
