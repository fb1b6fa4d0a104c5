"""`compare`: next-token distributions against those of a reference point, over a text.

The reference's log-probabilities are computed once and kept in `references/`, as float32.
"""

import copy
import hashlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from qwen_jax import opening
from qwen_jax.accuracy.distribution import base_file
from qwen_jax.accuracy.distribution import comparison as distribution
from qwen_jax.accuracy.distribution.base_file import SavedBase, scored
from qwen_jax.accuracy.distribution.comparison import Scores
from qwen_jax.accuracy.exact.forward import forward
from qwen_jax.accuracy.exact.parameters import CheckpointSource
from qwen_jax.errors import UserError
from qwen_jax.experiments import kinds, lines, quantize
from qwen_jax.experiments.models import Choice
from qwen_jax.experiments.task import Metrics, Task, Work
from qwen_jax.experiments.tasks.perplexity import (
    SIZES,
    check_text,
    fault_of_window,
    sizes,
    text_tokens,
    window_name,
)

TRUTH = "float64"
"""The reference's dtype that means NumPy in float64, layer by layer, instead of the engine."""


_SCORES = {
    "nll": kinds.NUMBER,
    "nll_base": kinds.NUMBER,
    "kld": kinds.NUMBER,
    "same_top": kinds.TRUTH,
}


_OF_WINDOWS = ("kld", "same_top")
"""What points are compared by, as means of a window's tokens."""


class Compare(Task):
    """One item a window: what `distribution.Scores` keeps of its tokens."""

    reads = ("experiment.text", "experiment.context", "experiment.reference")

    def __init__(self, config: ConfigDict):
        super().__init__(config)
        check_text(config)
        given = {name: value for name, value in config.experiment.reference.items() if value}
        if not given:
            raise UserError("compare needs a reference; set a field of experiment.reference.")
        self.reference = copy.deepcopy(config)
        self.reference.experiment.cache_dtype = None  # What it costs is what is compared.
        if (quantization := given.pop("quantization", None)) is not None:
            self.reference.experiment.quantization = quantization
        elif "model" in given:
            self.reference.experiment.quantization = None
        if "model" in given:  # adapters are for one model
            self.reference.adapter = ()
        self.exact = given.get("dtype") == TRUTH
        if self.exact:
            del given["dtype"]
        self.reference.update(given)
        try:
            Choice.of(self.reference).check()
        except UserError as error:
            raise UserError(f"experiment.reference: {error}") from error

    def known_metrics(self) -> Collection[str]:
        return *_OF_WINDOWS, "kld_p99", "kld_max", "perplexity", "perplexity_ratio", *SIZES

    def fault_of(self, item: dict[str, Any]) -> str:
        return fault_of_window(item, self.config, _SCORES)

    def run(self, work: Work) -> Metrics:
        base = SavedBase(self._base(work))
        model, context = work.model(), base.windows.shape[1]
        if base.vocab != model.config.vocab_size:
            raise UserError(
                f"The reference has a vocabulary of {base.vocab} tokens, but {model.config.source} "
                f"has {model.config.vocab_size}; both must be of the same model."
            )
        parts = {
            item["window"]: Scores(*(np.array(item[name]) for name in _SCORES))
            for item in work.recorded()
        }
        for index, window in enumerate(base.windows):
            if index in parts:
                continue
            logits = model.logits(window.tolist())[scored(context)]
            if not np.isfinite(logits).all():
                raise UserError(f"The logits of window {index} are not finite.")
            part = distribution.score(logits, base.logprobs(index), window, normal=True)
            work.record(window=index, **{k: v.tolist() for k, v in vars(part).items()})
            parts[index] = part
            work.progress(len(parts), len(base.windows))
        ordered = [parts[index] for index in range(len(base.windows))]
        for index, part in enumerate(ordered):
            means = {name: float(np.mean(getattr(part, name))) for name in _OF_WINDOWS}
            work.score("window", index, window_name(self.config, index), means)
        joined = Scores(*(np.concatenate([getattr(p, name) for p in ordered]) for name in _SCORES))
        found = distribution.statistics(joined, ("point", "reference"), base.windows)
        return _metrics(found) | sizes(model)

    def _base(self, work: Work) -> Path:
        """The reference's file, made unless it is there."""
        experiment = self.config.experiment
        key = repr((Choice.of(self.reference), self.exact, experiment.text, experiment.context))
        name = hashlib.sha256(key.encode()).hexdigest()[:12]
        path = work.directory / "references" / f"{name}.safetensors"
        if not path.exists():
            with lines.written(path):
                path.parent.mkdir(exist_ok=True)
            with lines.placed(path) as temporary:
                if self.exact:
                    self._save_truth(work, temporary)
                else:
                    model = work.model(self.reference)
                    tokens = text_tokens(model, self.config)
                    distribution.save_base(temporary, model, tokens, context=experiment.context)
        return path

    def _save_truth(self, work: Work, path: Path) -> None:
        experiment = self.config.experiment
        # Only for its tokenizer: the truth reads the parameters by itself.
        tokens = text_tokens(work.model(), self.config)
        windows = distribution.cut(tokens, experiment.context)
        location = opening.locate(self.reference.model)
        if self.reference.experiment.quantization is not None:
            kind = self.reference.experiment.quantization
            location = quantize.made(location, kind, work.directory)
        source = CheckpointSource(opening.open_model(location, self.reference.adapter))

        def logits() -> Iterator[np.ndarray]:
            for window in windows:
                for name, value in forward(source, window.tolist()):
                    if name == "logits":
                        yield value[scored(experiment.context)]

        base_file.save(path, TRUTH, windows, logits(), source.config.vocab_size)


def _metrics(found: distribution.Distribution) -> Metrics:
    percentiles = dict(found.kld_percentiles)
    return {
        "kld": found.kld.value,
        "kld_error": found.kld.error,
        "kld_p99": percentiles[99.0],
        "kld_max": percentiles[100.0],
        "same_top": found.same_top.value,
        "same_top_error": found.same_top.error,
        "perplexity": found.ppl.value,
        "perplexity_error": found.ppl.error,
        "perplexity_ratio": found.ratio.value,
        "perplexity_ratio_error": found.ratio.error,
    }
