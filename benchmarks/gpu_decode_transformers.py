"""Decode speed of Hugging Face transformers on a GPU: static cache and torch.compile.

    python -m benchmarks.gpu_decode_transformers --sizes 0.5b 1.5b 7b --batches 1 8 64

Random bfloat16 weights of a real size, greedy. A figure is the difference of two generations of
different lengths, so that prompt and set-up cancel. Each case has a process: all compile at the
same time, and when the last has compiled they are measured one after the other. Needs torch with
CUDA and transformers. Ends with one line of JSON.
"""

import argparse
import itertools
import json
import multiprocessing
import time
from statistics import median
from typing import Any

import torch
import transformers
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.random_model import SIZES

SHORT, LONG = 33, 161
"""Tokens of the two generations."""


def microseconds(
    size: str, batch: int, args: argparse.Namespace, compiled: Any, alone: Any
) -> list[float]:
    """A step's time in every round, measured when all cases have come to `compiled`."""
    c = SIZES[size]
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
    prompt = torch.randint(0, c.vocab_size, (batch, args.context), device="cuda")

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
        for tokens in (SHORT, LONG, SHORT, LONG):
            seconds(tokens)
        compiled.wait()
        with alone:
            times = [seconds(LONG) - seconds(SHORT) for _ in range(args.rounds)]
    return [round(t / (LONG - SHORT) * 1e6, 1) for t in times]


def work(
    size: str, batch: int, args: argparse.Namespace, compiled: Any, alone: Any, found: Any
) -> None:
    """A process: its times go into `found`; if it fails nobody waits for it."""
    try:
        found[f"{size} {batch}"] = microseconds(size, batch, args, compiled, alone)
    except BaseException:
        compiled.abort()
        raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", choices=SIZES, nargs="+", default=["0.5b"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    cases = list(itertools.product(args.sizes, args.batches))
    spawn = multiprocessing.get_context("spawn")
    with spawn.Manager() as manager:
        found = manager.dict()
        compiled, alone = spawn.Barrier(len(cases)), spawn.Lock()
        workers = [
            spawn.Process(target=work, args=(*case, args, compiled, alone, found)) for case in cases
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if any(worker.exitcode for worker in workers):
            raise SystemExit("A case failed; its error stands above.")
        figures = dict(found)
    print(f"transformers, static cache, compiled: microseconds a step, medians of {args.rounds}")
    print(f"{'size':<6}{'batch':>6}{'us':>8}")
    for size, batch in cases:
        print(f"{size:<6}{batch:>6}{median(figures[f'{size} {batch}']):>8.0f}")
    record = vars(args) | {
        "benchmark": "gpu_decode_transformers",
        "us": figures,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
