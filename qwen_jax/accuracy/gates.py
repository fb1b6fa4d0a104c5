"""Gates: conditions on a report under which a run fails, as in `mean_kld > 0.01`."""

import dataclasses
import difflib
import math
import operator
import re
from collections.abc import Mapping

from qwen_jax.errors import UserError

METRICS = {
    "compiler_faults": "reductions of known results that the compiler under all of it gets wrong",
    "faults": "operations with an error of their own past its bound",
    "unknown": "of these, the ones no fault of the catalogue explains",
    "of_bound": "the largest own error over its bound",
    "logits_rms": "RMS error of the logits over the reference's RMS",
    "nans": "NaNs in all tensors",
    "infs": "infinities in all tensors where the reference has none",
    "mean_kld": "mean KL divergence; of the distribution report where there is one",
    "max_kld": "the largest KL divergence, likewise",
    "top1": "share of positions with the same likeliest token, likewise",
    "topk": "share of the reference's likeliest tokens among the candidate's",
    "kld_99_9": "99.9th percentile of the KL divergence",
    "kld_99": "99th percentile of the KL divergence",
    "kld_median": "median KL divergence",
    "ppl": "perplexity of the candidate",
    "ppl_ratio": "perplexity of the candidate over that of the base",
    "ppl_difference": "perplexity of the candidate minus that of the base",
    "dp_rms": "RMS change of the right token's probability, 0 to 1",
    "weights_faults": "tensors that differ from the file's",
    "text_faults": "texts whose token ids differ from the reference tokenizer's",
    "cache_faults": "ways through the cache that give other results",
    "machine_faults": "checks of the machine that are less exact than what is declared",
    "inside_faults": "operations inside the decode-step kernel past their bound",
    "inside_of_bound": "the largest own error of one over its bound",
    "logprob_causes": "proven causes between two logs of log-probabilities, other token ids too",
    "logprob_unexplained": "logs of log-probabilities that nothing explains, or not judged",
    "kl_k1": "estimate k1 of the KL divergence of two logs, in nats a token",
    "kl_k3": "estimate k3 of the same",
    "ratio_max": "the largest importance ratio of a token",
    "ess": "effective sample size of the tokens' importance ratios, as a share of them",
    "quantisation_kld": "mean KL divergence of a quantised file from its base",
    "kept_float32": "operations that the precision search keeps in float32",
}
"""What a gate can be set on."""

ALWAYS = ("compiler_faults",)
"""What is measured whatever the parts are."""

_OF_LOGITS = ("mean_kld", "max_kld", "top1")
MEASURED: dict[str, tuple[str, ...]] = {
    "tensors": (
        *("faults", "unknown", "of_bound", "logits_rms", "nans", "infs", "topk"),
        *_OF_LOGITS,
    ),
    "weights": ("weights_faults",),
    "text": ("text_faults",),
    "cache": ("cache_faults",),
    "distribution": (
        *("kld_99_9", "kld_99", "kld_median", "ppl", "ppl_ratio", "ppl_difference", "dp_rms"),
        *_OF_LOGITS,
    ),
    "precision": ("kept_float32",),
    "machine": ("machine_faults",),
    "inside": ("inside_faults", "inside_of_bound"),
    "quantisation": ("quantisation_kld",),
    "logprobs": ("logprob_causes", "logprob_unexplained", "kl_k1", "kl_k3", "ratio_max", "ess"),
}
"""What each part of a comparison may measure."""

_OPERATORS = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}


@dataclasses.dataclass(frozen=True)
class Gate:
    """Fails where `metric operator limit` holds."""

    metric: str
    operator: str
    limit: float

    def __str__(self) -> str:
        return f"{self.metric} {self.operator} {self.limit:g}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A gate and the value it was held against; a value that is NaN fails."""

    gate: Gate
    value: float

    @property
    def failed(self) -> bool:
        holds = _OPERATORS[self.gate.operator](self.value, self.gate.limit)
        return holds or math.isnan(self.value)


def parse(text: str) -> tuple[Gate, ...]:
    """Gates with commas between them.

    Raises:
        UserError: one is no condition, or its metric or number is unknown.
    """
    return tuple(_parse_one(part.strip()) for part in text.split(",") if part.strip())


def _parse_one(text: str) -> Gate:
    match = re.fullmatch(r"(\w+)\s*(>=|<=|==|!=|>|<)\s*(\S+)", text)
    if match is None:
        raise UserError(f"The gate {text!r} is no condition; write one like 'mean_kld > 0.01'.")
    metric, sign, number = match.groups()
    if metric not in METRICS:
        close = difflib.get_close_matches(metric, METRICS, n=1)
        hint = f"did you mean {close[0]}? All are" if close else "they are"
        raise UserError(f"There is no metric {metric!r}; {hint} {', '.join(METRICS)}.")
    try:
        limit = float(number)
    except ValueError:
        limit = math.nan
    if math.isnan(limit):
        raise UserError(f"The gate {text!r} compares with {number!r}, which is no number.")
    return Gate(metric, sign, limit)


def check(gates: tuple[Gate, ...], values: Mapping[str, float]) -> tuple[Outcome, ...]:
    """Holds every gate against what was measured.

    Raises:
        UserError: a metric was not measured in this run.
    """
    for gate in gates:
        if gate.metric not in values:
            raise UserError(
                f"The gate '{gate}' can't be checked: {gate.metric} ({METRICS[gate.metric]}) was "
                f"not measured; this run has {', '.join(values) or 'no metric'}."
            )
    return tuple(Outcome(gate, values[gate.metric]) for gate in gates)
