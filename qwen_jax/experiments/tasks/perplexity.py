"""`perplexity`: of a text, with llama-perplexity's conventions (`accuracy.distribution`)."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from qwen_jax.accuracy.distribution import comparison as distribution
from qwen_jax.accuracy.distribution.base_file import scored
from qwen_jax.accuracy.measures.metrics import log_softmax
from qwen_jax.api import Model
from qwen_jax.errors import UserError
from qwen_jax.experiments import kinds
from qwen_jax.experiments.kinds import Kind
from qwen_jax.experiments.task import Metrics, Task, Work
from qwen_jax.opening import BUNDLED, locate
from qwen_jax.weights.loader import open_checkpoint


def check_text(config: ConfigDict) -> None:
    """Raises UserError where the config's text is no file; None is the bundled model's sample."""
    distribution.check_context(config.experiment.context, "experiment.context")
    text = config.experiment.text
    if text is not None and not Path(text).is_file():
        raise UserError(f"experiment.text={text} is no file that can be read; check the path.")
    if text is None and Path(config.model) not in (Path(BUNDLED), locate(BUNDLED)):
        raise UserError(
            f"{config.model} has no text of its own; set experiment.text to a text file, such as "
            "WikiText-2's wiki.test.raw."
        )


def text_tokens(model: Model, config: ConfigDict) -> list[int]:
    """The config's text; the bundled model, in any type, has a sample of its own."""
    if config.experiment.text is None and config.model == BUNDLED:
        return distribution.sample_tokens(model.tokenizer)
    return distribution.read_text(model, config.experiment.text)


SIZES = ("weight_bytes", "device_bytes")
"""Metrics that `sizes` has."""


def sizes(model: Model) -> Metrics:
    """Bytes of the weights in their file and on the device; of a mesh on each of its devices."""
    tensors = open_checkpoint(model.config.source.removesuffix("/config.json")).tensors
    leaves = jax.tree.leaves(model.engine.weights)
    return {
        "weight_bytes": sum(info.nbytes for info in tensors.values()),
        "device_bytes": sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves),
    }


def fault_of_window(item: dict[str, Any], config: ConfigDict, fields: Mapping[str, Kind]) -> str:
    """What is wrong with a window's item, which has a value of each field for a scored token."""
    context = config.experiment.context
    count = len(range(context)[scored(context)])
    lists = {name: kinds.list_of(kind, count) for name, kind in fields.items()}
    return kinds.fault(item, {"window": kinds.NATURAL, **lists})


def window_name(config: ConfigDict, index: int) -> str:
    """What a window is called in every point that cuts the text alike: those of another length
    hold other tokens, and have nothing to be paired with."""
    return f"{index} of {config.experiment.context}"


class Perplexity(Task):
    """One item a window: the negative log-probabilities of its scored tokens."""

    reads = ("experiment.text", "experiment.context")

    def __init__(self, config: ConfigDict):
        super().__init__(config)
        check_text(config)

    def known_metrics(self) -> Collection[str]:
        return "perplexity", "nll", "scored_tokens", "windows", *SIZES

    def fault_of(self, item: dict[str, Any]) -> str:
        return fault_of_window(item, self.config, {"nll": kinds.NUMBER})

    def run(self, work: Work) -> Metrics:
        model, experiment = work.model(), self.config.experiment
        tokens = text_tokens(model, self.config)
        windows = distribution.cut(tokens, experiment.context)
        distribution.check(model, windows)
        found = {item["window"]: item["nll"] for item in work.recorded()}
        for index, window in enumerate(windows):
            if index in found:
                continue
            logits = model.logits(window.tolist())[scored(experiment.context)]
            came = window[experiment.context // 2 + 1 :, None]
            found[index] = (-np.take_along_axis(log_softmax(logits), came, 1)[:, 0]).tolist()
            if not np.isfinite(found[index]).all():
                raise UserError(f"The log-probabilities of window {index} are not finite.")
            work.record(window=index, nll=found[index])
            work.progress(len(found), len(windows))
        nll = [found[index] for index in range(len(windows))]
        for index, values in enumerate(nll):
            name = window_name(self.config, index)
            work.score("window", index, name, {"nll": float(np.mean(values))})
        mean = distribution.mean(np.concatenate(nll))
        perplexity = float(np.exp(mean.value))
        return {
            "perplexity": perplexity,
            "perplexity_error": perplexity * mean.error,
            "nll": mean.value,
            "nll_error": mean.error,
            "scored_tokens": sum(map(len, nll)),
            "windows": len(windows),
            **sizes(model),
        }
