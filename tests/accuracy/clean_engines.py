"""Engines without fault on tiny models: transformers and llama.cpp, live and as they were once.

`python -m tools.make_clean_traces` writes what they compute to `GOLDEN`; tests/accuracy/
test_clean_engines.py judges it, and test_clean_engines_live.py what they compute now.
"""

import dataclasses
import gzip
import itertools
from collections.abc import Callable
from pathlib import Path

from qwen_jax.accuracy.exact.parameters import CheckpointSource
from qwen_jax.accuracy.tensors.diagnosis import Diagnosis, diagnose
from qwen_jax.accuracy.traces.trace import Trace, load
from qwen_jax.weights.loader import Checkpoint, open_checkpoint
from tests.golden_cases import GOLDEN as GOLDEN_FILES
from tests.golden_cases import Case
from tests.tiny_checkpoints import tiny_config, write_gguf

GOLDEN = GOLDEN_FILES / "clean"
LAST = 32768
"""Positions that released checkpoints are for."""

WITHOUT_TOKENIZER = {"tokenizer.ggml.model": "none", "qwen2.vocab_size": 61}


@dataclasses.dataclass(frozen=True)
class Clean:
    """One run of an engine.

    Attributes:
        engine: "eager" or "sdpa" of transformers, or "llamacpp".
        kind: the dtype transformers computes in, or the type of the file's matrices.
        far: only the rotations at the last positions, rather than a text from its start.
    """

    engine: str
    kind: str
    head_dim: int = 64
    theta: float = 1e6
    far: bool = False

    @property
    def name(self) -> str:
        place = "far" if self.far else "near"
        return f"{self.engine}-{self.kind}-{place}-{self.head_dim}-{self.theta:.0e}"

    @property
    def case(self) -> Case:
        # llama.cpp's heads are as wide as the stream, and k-quants have blocks of 256.
        alone = self.far or self.kind in ("F16", "BF16", "Q8_0")
        heads, ffn = (4, 256) if "K" in self.kind else (1 if alone else 2, 96)
        width = heads * self.head_dim if self.engine == "llamacpp" else 64
        config = tiny_config(
            num_layers=1,
            hidden_size=width,
            num_heads=heads,
            num_kv_heads=1,
            head_dim=self.head_dim,
            rope_dim=self.head_dim,
            ffn_size=ffn,
            vocab_size=WITHOUT_TOKENIZER["qwen2.vocab_size"],
            context_length=LAST,
            rope_theta=self.theta,
            tied=self.kind != "Q8_0",
        )
        return Case(config, seed=11)

    @property
    def calls(self) -> tuple[int, ...]:
        return (LAST - 5, 4, 1) if self.far else (4, 1)

    def checkpoint(self, folder: Path) -> Checkpoint:
        """One and the same file for the engine and for the judge."""
        types = self.kind if self.engine == "llamacpp" else "F32"
        written = write_gguf(
            folder / f"{self.name}.gguf",
            self.case.config,
            self.case.parameters(),
            types=types,
            metadata=WITHOUT_TOKENIZER,
        )
        return open_checkpoint(written.path)

    def run(self, checkpoint: Checkpoint) -> Trace:
        """What the engine computes now; it must be installed."""
        skip = sum(self.calls[:1]) if self.far else 0
        count = sum(self.calls)
        tokens = [0] * (count - 5) + self.case.prompt()[:5]
        names = "*.[qk]_proj,*_rope" if self.far else "*"
        if self.engine == "llamacpp":
            from qwen_jax.accuracy.references import llamacpp

            made = llamacpp.trace(
                checkpoint, tokens, chunks=self.calls, names=names, start=skip, skip=skip
            )
        else:
            from qwen_jax.accuracy.references import hf

            made = hf.trace(
                checkpoint, tokens, dtype=self.kind, chunks=self.calls, names=names, start=skip,
                attention=self.engine, skip=skip,
            )  # fmt: skip
        return Trace(
            dataclasses.replace(made.header, model=self.name, model_sha256=None), made.tensors
        )

    def golden(self, folder: Path) -> Trace:
        path = folder / f"{self.name}.safetensors"
        path.write_bytes(gzip.decompress((GOLDEN / f"{self.name}.gz").read_bytes()))
        return load(path)

    def judged(self, folder: Path, made: Callable[[Checkpoint], Trace]) -> Diagnosis:
        checkpoint = self.checkpoint(folder)
        trace = made(checkpoint)
        return diagnose(trace, CheckpointSource(checkpoint, trace.header.dtype))


DTYPES = ("float32", "bfloat16", "float16")
TRANSFORMERS = (
    *(Clean(engine, dtype) for engine in ("eager", "sdpa") for dtype in DTYPES),
    *(
        Clean("eager", dtype, head_dim, theta, far=True)
        for head_dim, theta, dtype in itertools.product((64, 128), (1e4, 1e6), DTYPES)
    ),
)
LLAMACPP = (
    *(Clean("llamacpp", kind) for kind in ("F32", "F16", "BF16", "Q8_0", "Q4_K")),
    *(
        Clean("llamacpp", "F32", head_dim, theta, far=True)
        for head_dim, theta in itertools.product((64, 128), (1e4, 1e6))
    ),
)
