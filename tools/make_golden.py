"""Writes tests/golden/*.npz: what transformers makes of tiny random models, in float32.

    pip install '.[test,hf]'
    python -m tools.make_golden

Each file holds, for one case of tests/golden_cases.py: the logits after every position of a
512-token prompt, the greedy continuation, a fingerprint of the drawn parameters and the versions
of torch and transformers. The tests that read them need neither library.
"""

import numpy as np
import torch
import transformers
from absl import app, logging

from tests import transformers_reference
from tests.golden_cases import CASES, CONTINUATION, GOLDEN, fingerprint

LEAST_MARGIN = 1e-2
"""A greedy choice closer than this could honestly differ on another machine."""


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"no arguments are taken, but got {' '.join(argv[1:])}")
    GOLDEN.mkdir(exist_ok=True)
    for name, case in CASES.items():
        params, prompt = case.parameters(), case.prompt()
        reference = transformers_reference.model(case.config, params)
        continuation, margins = transformers_reference.greedy(reference, prompt, CONTINUATION)
        margin = margins.min()
        if margin < LEAST_MARGIN:
            raise ValueError(f"{name}: greedy {margin=:.2g} < {LEAST_MARGIN}; change its seed")
        path = GOLDEN / f"{name}.npz"
        np.savez(
            path,
            logits=transformers_reference.logits(reference, prompt),
            continuation=np.array(continuation, np.int32),
            fingerprint=fingerprint(params),
            versions=np.array([f"{x.__name__} {x.__version__}" for x in (torch, transformers)]),
        )
        logging.info("%s: %d bytes, greedy margin %.3f", path, path.stat().st_size, margin)


if __name__ == "__main__":
    app.run(main)
