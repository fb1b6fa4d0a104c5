"""`bench`: speed of prefill and of decoding, warmed up, as medians with their spread."""

import statistics
import time
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from qwen_jax.engine.engine import Engine, Prompt, check_fits
from qwen_jax.engine.sampling import Sampling, plan_rows
from qwen_jax.errors import UserError
from qwen_jax.experiments.task import Metrics, Task, Work
from qwen_jax.prompts import sampling_of


class Bench(Task):
    """One item a repetition: the seconds of a prefill and of the decoding steps after it.

    Rows hold random tokens; `batch_size` of them run together, greedily.
    """

    def __init__(self, config: ConfigDict):
        super().__init__(config)
        bench = config.experiment.bench
        for name, value in bench.items():
            if value < 1:
                raise UserError(f"experiment.bench.{name} is {value}, but it must be at least 1.")
        sampling_of(config)  # Checks the seed, from which the tokens are drawn.
        if config.batch_size < 1:
            raise UserError(f"batch_size is {config.batch_size}, but it must be at least 1.")

    def rows(self) -> tuple[int, int]:
        bench = self.config.experiment.bench
        return self.config.batch_size, bench.prompt_tokens + bench.new_tokens + 1

    def run(self, work: Work) -> Metrics:
        engine, bench = work.model().engine, self.config.experiment.bench
        context = engine.config.context_length
        rows, longest = self.rows()
        if longest > context:
            raise UserError(
                f"{bench.prompt_tokens} tokens of a prompt and {bench.new_tokens} new ones are "
                f"more than the context of {context}."
            )
        check_fits(engine, [Prompt([0] * bench.prompt_tokens, bench.new_tokens + 1)], rows)
        taken = [(item["prefill_seconds"], item["decode_seconds"]) for item in work.recorded()]
        if len(taken) < bench.repeats:
            self._once(engine)  # compiles
        for repeat in range(len(taken), bench.repeats):
            taken.append(self._once(engine))
            work.record(repeat=repeat, prefill_seconds=taken[-1][0], decode_seconds=taken[-1][1])
            work.progress(repeat + 1, bench.repeats)
        prefill, decode = zip(*taken, strict=True)
        return {
            **_speed("prefill", rows * bench.prompt_tokens, prefill),
            **_speed("decode", rows * bench.new_tokens, decode),
            "ms_per_step": 1e3 * statistics.median(decode) / bench.new_tokens,
        }

    def _once(self, engine: Engine) -> tuple[float, float]:
        bench, rows = self.config.experiment.bench, self.config.batch_size
        rng = np.random.default_rng(self.config.sampling.seed)
        shape = (rows, bench.prompt_tokens)
        tokens = rng.integers(0, engine.config.vocab_size, shape).tolist()
        prompts = [Prompt(row, bench.new_tokens + 1) for row in tokens]
        plan, params = plan_rows([Sampling()] * rows, engine.config.vocab_size)
        start = time.perf_counter()
        state: Any = jax.block_until_ready(engine.prefill(prompts, plan, params)[0])
        middle = time.perf_counter()
        jax.block_until_ready(engine.decode_many(state, params, plan, bench.new_tokens))
        return middle - start, time.perf_counter() - middle


def _speed(phase: str, tokens: int, seconds: tuple[float, ...]) -> Metrics:
    """Tokens a second: the median, and half the distance between the quartiles as its spread."""
    rates = sorted(tokens / s for s in seconds)
    low, high = np.percentile(rates, (25, 75))
    name = f"{phase}_tokens_per_s"
    return {name: statistics.median(rates), f"{name}_error": float(high - low) / 2}
