"""A task without a model, for tests of everything around it."""

import os
import time
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from qwen_jax.errors import UserError
from qwen_jax.experiments.task import Metrics, Task, Work

ITEMS = 12
DONE = "QWEN_JAX_TEST_DONE"
"""An environment variable: a file that grows by a byte for every item, just before its record."""


class Count(Task):
    """Records ITEMS items whose values follow from the seed. `max_tokens` says what goes wrong."""

    def __init__(self, config: ConfigDict):
        super().__init__(config)
        if config.max_tokens == 1:
            raise UserError("this point makes no sense")

    def run(self, work: Work) -> Metrics:
        items: list[dict[str, Any]] = list(work.recorded())
        for index in range(len(items), ITEMS):
            if index == 5:
                self._fail()
            items.append({"index": index, "value": self.config.sampling.seed * 100 + index})
            if DONE in os.environ:
                with Path(os.environ[DONE]).open("ab") as file:
                    file.write(b".")
            # First, so that an item that is recorded has its score whenever this is killed.
            work.score("prompt", index, index, {"value": float(items[-1]["value"])})
            work.record(**items[-1])
            work.progress(index + 1, ITEMS)
            time.sleep(0.001)
        value = float(sum(item["value"] for item in items))
        return {
            "total": float("nan") if self.config.max_tokens == 5 else value,
            "count": len(items),
        }

    def _fail(self) -> None:
        if self.config.max_tokens == 2:
            raise RuntimeError("RESOURCE_EXHAUSTED: asked for too much")
        if self.config.max_tokens == 3:
            raise UserError("line 7 is no prompt.")
        if self.config.max_tokens == 4:
            raise ZeroDivisionError("by accident")
