"""64 prompts of which 8 have long answers, in 8 slots on a CPU: does their order matter?

    python -m benchmarks.cpu_requests

The bundled model on random tokens: 56 answers of 20 tokens and 8 of 300, the long ones first, last,
or anywhere, in turns. Ends with one line of JSON.
"""

import argparse
import json
from statistics import median

import jax
import numpy as np

from benchmarks.gpu_requests import run
from qwen_jax import api
from qwen_jax.engine.texts import Text

SHORT, LONG, PROMPT = 20, 300, 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    engine, rng = api.load(slots=8).engine, np.random.default_rng()
    vocab, stops = engine.config.vocab_size, {*engine.spec.stop_ids}
    ids = [token for token in range(vocab) if token not in stops]
    orders = {
        "long first": [LONG] * 8 + [SHORT] * 56,
        "long last": [SHORT] * 56 + [LONG] * 8,
        "anywhere": [LONG] * 8 + [SHORT] * 56,
    }
    rates: dict[str, list[float]] = {name: [] for name in orders}
    for turn in range(args.rounds + 1):
        for name, answers in orders.items():
            order = rng.permutation(answers).tolist() if name == "anywhere" else answers
            texts = [Text(rng.choice(ids, PROMPT).tolist(), answer) for answer in order]
            seconds = run(engine, texts)
            if turn:  # the first compiles
                rates[name].append(sum(text.given for text in texts) / seconds)
    for name, found in rates.items():
        print(f"{name:<12}{median(found):>8,.0f} tokens/s, {min(found):,.0f} to {max(found):,.0f}")
    figures = {name: [round(rate) for rate in found] for name, found in rates.items()}
    record = {"benchmark": "cpu_requests", "tokens_per_s": figures, "jax": jax.__version__}
    print(json.dumps(record | vars(args)))


if __name__ == "__main__":
    main()
