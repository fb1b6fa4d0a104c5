"""Load, prefill and decode of a random 0.5B-shaped model on the CPU, beside transformers.

Both engines run the same Hugging Face directory in the same precision in one process, turn by
turn, so that a machine that slows down slows both. Needs the 'parity' extra.

A load counts until every weight is in memory: transformers maps the files and reads them later.

    python -m benchmarks.cpu_decode [--rounds 5]
"""

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from benchmarks.random_model import SIZES
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.scheduler import Scheduler
from qwen_jax.engine.texts import Text
from qwen_jax.weights.loader import load_parameters, open_checkpoint

PROMPT, STEPS = 512, 64


def make(directory: Path) -> None:
    """A random model with biases that are not zero, as transformers saves it."""
    size = SIZES["0.5b"]
    config = transformers.Qwen2Config(
        num_hidden_layers=size.num_layers,
        hidden_size=size.hidden_size,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_kv_heads,
        intermediate_size=size.ffn_size,
        vocab_size=size.vocab_size,
        max_position_embeddings=size.context_length,
        rms_norm_eps=size.rms_eps,
        rope_parameters={"rope_type": "default", "rope_theta": size.rope_theta},
        tie_word_embeddings=size.tied,
    )
    model = transformers.Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.normal_()
    model.save_pretrained(directory)


class Ours:
    def __init__(self, directory: Path):
        checkpoint = open_checkpoint(directory)
        self.engine = Engine(checkpoint.config, load_parameters(checkpoint, jnp.float32))

    def prefill(self, tokens: list[int]) -> None:
        self.scheduler = Scheduler(self.engine)
        self.chosen: list[int] = []
        # Enough for the calls of some steps that hold so many.
        self.scheduler.add(Text(tokens, STEPS + 1 + self.engine.shapes.steps))
        while not self.chosen:
            self._turn()

    def _turn(self) -> None:
        self.chosen += [token for news in self.scheduler.turn() for token in news.tokens]

    def decode(self) -> list[int]:
        while len(self.chosen) < STEPS + 1:
            self._turn()
        self.scheduler.close()
        return self.chosen[: STEPS + 1]


class Theirs:
    def __init__(self, directory: Path):
        self.model = transformers.Qwen2ForCausalLM.from_pretrained(
            directory, dtype=torch.float32
        ).eval()
        for parameter in self.model.parameters():
            if not parameter.isfinite().all():  # We check this too.
                raise ValueError("a weight is not finite")

    @torch.no_grad()
    def prefill(self, tokens: list[int]) -> None:
        self.out = self.model(torch.tensor([tokens]), use_cache=True, logits_to_keep=1)
        self.chosen = [int(self.out.logits[0, -1].argmax())]

    @torch.no_grad()
    def decode(self) -> list[int]:
        for _ in range(STEPS):
            self.out = self.model(
                torch.tensor([self.chosen[-1:]]),
                past_key_values=self.out.past_key_values,
                use_cache=True,
            )
            self.chosen.append(int(self.out.logits[0, -1].argmax()))
        return self.chosen


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main(rounds: int) -> None:
    rng = np.random.default_rng()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        make(directory)
        loads: dict[str, list[float]] = {"Theirs": [], "Ours": []}
        for turn in range(rounds + 1):  # the first brings the file into memory
            for load in (Theirs, Ours):
                taken = timed(partial(load, directory))
                if turn:
                    loads[load.__name__].append(taken)
        ours, theirs = Ours(directory), Theirs(directory)
    seconds: dict[str, list[float]] = {}
    agreed = []
    for turn in range(rounds + 1):  # the first compiles and warms up
        tokens = rng.integers(0, SIZES["0.5b"].vocab_size, PROMPT).tolist()
        for engine in (ours, theirs):
            kind = type(engine).__name__
            prefill = timed(partial(engine.prefill, tokens))
            decode = timed(engine.decode)
            if turn:
                seconds.setdefault(f"{kind} prefill", []).append(prefill)
                seconds.setdefault(f"{kind} decode", []).append(decode)
        agreed.append(ours.chosen == theirs.chosen)

    def ratio(phase: str) -> float:
        pairs = zip(seconds[f"Theirs {phase}"], seconds[f"Ours {phase}"], strict=True)
        return median(theirs / ours for theirs, ours in pairs)

    table = {
        "load s": (median(loads["Ours"]), median(loads["Theirs"])),
        "prefill tokens/s": tuple(
            PROMPT / median(seconds[f"{k} prefill"]) for k in ("Ours", "Theirs")
        ),
        "decode tokens/s": tuple(
            STEPS / median(seconds[f"{k} decode"]) for k in ("Ours", "Theirs")
        ),
    }
    speedup = {
        "load s": median(t / o for t, o in zip(loads["Theirs"], loads["Ours"], strict=True)),
        "prefill tokens/s": ratio("prefill"),
        "decode tokens/s": ratio("decode"),
    }
    print(f"{'':<18}{'qwen_jax':>10}{'transformers':>14}{'faster by':>11}")
    for phase, (mine, other) in table.items():
        print(f"{phase:<18}{mine:>10.2f}{other:>14.2f}{speedup[phase]:>10.2f}x")
    print(f"same greedy tokens in {sum(agreed)} of {len(agreed)} rounds")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    record = {
        "benchmark": "cpu_decode",
        "ratio": speedup,
        "commit": commit.stdout.strip(),
        "jax": jax.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "agreed": agreed,
    }
    print(json.dumps(record | {"seconds": seconds, "loads": loads}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    main(parser.parse_args().rounds)
