"""What a Qwen2.5 model is: its sizes and constants, validated once.

Letters, everywhere the same: L layers, D hidden size, N query heads, K key/value
heads, H head dimension, R rotated dimensions of a head, F feed-forward size, V vocabulary.
`config_gguf` and `config_hf` read it from files.
"""

import dataclasses
import math

from qwen_jax.errors import UserError

MOST_LAYERS = 10_000
"""Many times those of any model: names of all layers' tensors are made before one is looked for."""

MOST_STRETCHED = 1e6
"""How far positions may be scaled. A context of 2^31 from one of 2,048 is that far."""

LARGEST = 1e30
"""Numbers beyond overflow float32 where they are multiplied."""


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN extension of the context (Peng et al., 2023, arXiv:2309.00071).

    `attention_factor` scales cos and sin; the paper's 0.1 ln(factor) + 1 where a
    checkpoint names none.
    """

    factor: float
    original_context: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    @classmethod
    def create(
        cls, factor: float, original_context: int, **optional: float | None
    ) -> "YarnScaling":
        given = {k: v for k, v in optional.items() if v is not None}
        given.setdefault("attention_factor", 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
        return cls(factor=factor, original_context=original_context, **given)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of one Qwen2.5 checkpoint.

    Raises UserError where a value is impossible; `source` names the file in messages.

    Attributes:
        rope_dim: R, the leading dimensions of a head that rotary embedding turns; None, as it is
            given, means all of them, and H is what it then is.
        linear_factor: positions are divided by it (Chen et al., 2023, arXiv:2306.15595).
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    context_length: int
    rope_theta: float
    rms_eps: float
    tied: bool
    yarn: YarnScaling | None = None
    rope_dim: int = None  # type: ignore[assignment]
    linear_factor: float = 1.0
    source: str = dataclasses.field(default="model", compare=False)

    def __post_init__(self) -> None:
        if self.rope_dim is None:
            object.__setattr__(self, "rope_dim", self.head_dim)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                self._refuse(field.name, value, "must be at least 1")
            most = MOST_LAYERS if field.name == "num_layers" else 2**31 - 1
            if field.type is int and value > most:
                self._refuse(field.name, value, f"must be at most {most}")
        if not 1 < self.rope_theta <= LARGEST:
            self._refuse("rope_theta", self.rope_theta, "must be a finite number above 1")
        if not 0 < self.rms_eps < 1:
            self._refuse("rms_eps", self.rms_eps, "must lie between 0 and 1")
        if self.num_heads % self.num_kv_heads:
            self._refuse(
                "num_kv_heads", self.num_kv_heads, f"must divide the {self.num_heads} query heads"
            )
        if self.head_dim % 2:
            self._refuse("head_dim", self.head_dim, "must be even, since rotary embedding pairs it")
        if self.rope_dim % 2 or self.rope_dim > self.head_dim:
            why = f"must be even and at most the head dimension, {self.head_dim}"
            self._refuse("rope_dim (the rotated part of a head)", self.rope_dim, why)
        if not 1 / MOST_STRETCHED <= self.linear_factor <= MOST_STRETCHED:
            within = f"must be above 0, and from {1 / MOST_STRETCHED:g} to {MOST_STRETCHED:g}"
            self._refuse("the rope scaling's factor", self.linear_factor, within)
        yarn = self.yarn
        if yarn and not (1 <= yarn.factor <= MOST_STRETCHED and 1 <= yarn.original_context < 2**31):
            within = (
                f"needs a factor and a context of at least 1, a factor up to {MOST_STRETCHED:g}"
            )
            self._refuse("rope_scaling", yarn, f"{within} and a context up to {2**31 - 1}")
        if yarn and not (
            0 < yarn.attention_factor <= LARGEST and 0 < yarn.beta_slow <= yarn.beta_fast <= LARGEST
        ):
            self._refuse("rope_scaling", yarn, "needs a positive attention_factor and betas")
        if yarn and self.linear_factor != 1:
            self._refuse("linear_factor", self.linear_factor, "must be 1 beside YaRN")

    def _refuse(self, field: str, value: object, why: str) -> None:
        raise UserError(
            f"{self.source}: {field} is {value}, but it {why}; convert the model again."
        )

    @property
    def group_size(self) -> int:
        """G, the query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def attention_factor(self) -> float:
        """What cos and sin of the rotary embedding are multiplied with."""
        return self.yarn.attention_factor if self.yarn else 1.0

    @property
    def num_parameters(self) -> int:
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        d = self.hidden_size
        layer = d * (q + 2 * kv) + (q + 2 * kv) + q * d + 3 * d * self.ffn_size + 2 * d
        return self.num_layers * layer + d + self.vocab_size * d * (1 if self.tied else 2)


def stretched(context: int, factor: float, original: int) -> int:
    """Positions that a model has whose `original` ones are stretched; `context` is what it says.

    Where a file says no original length it is the context, which then grows, as in vLLM. No more
    than int32 counts.
    """
    return max(context, int(min(factor * original, 2**31 - 1)))
