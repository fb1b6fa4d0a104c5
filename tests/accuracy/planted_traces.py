"""One small model, and traces of it with faults in; made once, since each has to be compiled."""

import functools

from qwen_jax.accuracy.exact.parameters import EngineSource
from qwen_jax.accuracy.tensors.diagnosis import Diagnosis, diagnose
from qwen_jax.accuracy.tensors.planting import planted
from qwen_jax.accuracy.traces.recording import Recorder
from qwen_jax.accuracy.traces.trace import Trace
from qwen_jax.engine.engine import Engine
from tests.engines import random_engine, random_tokens
from tests.golden_cases import Case, odd_config

CASE = Case(odd_config(num_layers=2, tied=False), seed=6)
PROMPT, CHUNK, LENGTH = 32, 16, 40


class Once(Recorder):
    """Records without the run beside it, which would double what is compiled."""

    def __init__(self, engine: Engine):
        super().__init__(engine)
        self._plain = self._traced


def source(dtype: str = "float32") -> EngineSource:
    return EngineSource(random_engine(CASE.config, CASE.seed, dtype))


def trace(faults: str = "", dtype: str = "float32") -> Trace:
    """Two chunks of a prompt and eight decode steps."""
    return _trace(faults, dtype)


def diagnosis(faults: str = "") -> Diagnosis:
    return _diagnosis(faults)


@functools.cache
def _trace(faults: str, dtype: str) -> Trace:
    tokens = random_tokens(CASE.config, LENGTH)
    with planted(random_engine(CASE.config, CASE.seed, dtype), faults) as engine:
        return Once(engine).record(tokens, prompt_length=PROMPT, chunk=CHUNK)


@functools.cache
def _diagnosis(faults: str) -> Diagnosis:
    return diagnose(trace(faults), source())
