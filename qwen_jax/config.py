"""What a Qwen2.5 model is: its sizes and constants, validated once.

Letters, everywhere the same: L layers, D hidden size, N query heads, K key/value
heads, H head dimension, F feed-forward size, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from qwen_jax.errors import UserError

GGUF_YARN_PLAIN = {
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}
HF_YARN_PLAIN = {"mscale": 1.0, "mscale_all_dim": 0.0, "truncate": True}
"""Keys that change YaRN in other families, and the values that leave it as the paper has it."""

T = TypeVar("T", bool, int, float, str)


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
    source: str = dataclasses.field(default="model", compare=False)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                self._refuse(field.name, value, "must be at least 1")
        if not (self.rope_theta > 1 and math.isfinite(self.rope_theta)):
            self._refuse("rope_theta", self.rope_theta, "must be a finite number above 1")
        if not 0 < self.rms_eps < 1:
            self._refuse("rms_eps", self.rms_eps, "must lie between 0 and 1")
        if self.num_heads % self.num_kv_heads:
            self._refuse(
                "num_kv_heads", self.num_kv_heads, f"must divide the {self.num_heads} query heads"
            )
        if self.head_dim % 2:
            self._refuse("head_dim", self.head_dim, "must be even, since rotary embedding pairs it")
        yarn = self.yarn
        if yarn and not (yarn.factor >= 1 and yarn.original_context >= 1):
            self._refuse("rope_scaling", yarn, "needs a factor and a context of at least 1")
        if yarn and not (yarn.attention_factor > 0 and 0 < yarn.beta_slow <= yarn.beta_fast):
            self._refuse("rope_scaling", yarn, "needs a positive attention_factor and betas")

    def _refuse(self, field: str, value: object, why: str) -> None:
        raise UserError(f"{self.source}: {field} is {value}, but it {why}; the file is damaged.")

    @property
    def group_size(self) -> int:
        """G, the query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_parameters(self) -> int:
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        d = self.hidden_size
        layer = d * (q + 2 * kv) + (q + 2 * kv) + q * d + 3 * d * self.ffn_size + 2 * d
        return self.num_layers * layer + d + self.vocab_size * d * (1 if self.tied else 2)

    @classmethod
    def from_gguf(
        cls, metadata: Mapping[str, Any], *, vocab_size: int, tied: bool, source: str
    ) -> "ModelConfig":
        """From a GGUF file's `qwen2.*` keys; the file has no key for V or for tying.

        Args:
            metadata: the file's key-value pairs.
            vocab_size: rows of `token_embd.weight`.
            tied: whether `output.weight` is absent.
            source: the file's name, for messages.
        """
        architecture = metadata.get("general.architecture")
        if architecture != "qwen2":
            raise UserError(
                f"{source}: general.architecture is {architecture!r}, and only 'qwen2' "
                "(Qwen2, Qwen2.5) is supported; choose a Qwen2.5 file."
            )

        def need(key: str, kind: type[T]) -> T:
            return _typed(metadata, f"qwen2.{key}", kind, source)

        def maybe(key: str, kind: type[T], default: Any = None) -> Any:
            return need(key, kind) if f"qwen2.{key}" in metadata else default

        hidden, heads = need("embedding_length", int), need("attention.head_count", int)
        context = need("context_length", int)
        yarn = None
        scaling = maybe("rope.scaling.type", str, "none")
        if scaling == "yarn":
            for key, plain in GGUF_YARN_PLAIN.items():
                if maybe(key, float, plain) != plain:
                    raise UserError(
                        f"{source}: qwen2.{key} is {need(key, float)}, and only {plain} is "
                        "supported; no released Qwen2.5 needs another."
                    )
            yarn = YarnScaling.create(
                need("rope.scaling.factor", float),
                need("rope.scaling.original_context_length", int),
                beta_fast=maybe("rope.scaling.yarn_beta_fast", float),
                beta_slow=maybe("rope.scaling.yarn_beta_slow", float),
            )
            context = max(context, int(yarn.factor * yarn.original_context))
        elif scaling != "none":
            raise UserError(
                f"{source}: qwen2.rope.scaling.type is {scaling!r}, and only 'none' and 'yarn' "
                "are supported; convert the checkpoint again with one of them."
            )
        return cls(
            num_layers=need("block_count", int),
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=maybe("attention.head_count_kv", int, heads),
            head_dim=maybe("attention.key_length", int, hidden // max(heads, 1)),
            ffn_size=need("feed_forward_length", int),
            vocab_size=vocab_size,
            context_length=context,
            rope_theta=need("rope.freq_base", float),
            rms_eps=need("attention.layer_norm_rms_epsilon", float),
            tied=tied,
            yarn=yarn,
            source=source,
        )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, source: str) -> "ModelConfig":
        """From a Hugging Face `config.json` of model_type qwen2 (transformers 4 or 5 keys)."""
        if config.get("model_type") != "qwen2":
            raise UserError(
                f"{source}: model_type is {config.get('model_type')!r}, and only 'qwen2' "
                "(Qwen2, Qwen2.5) is supported; choose a Qwen2.5 checkpoint."
            )
        if config.get("use_sliding_window"):
            raise UserError(
                f"{source}: use_sliding_window is true, which no released Qwen2.5 uses and this "
                "engine does not do; set it to false if the checkpoint was trained without."
            )

        def need(key: str, kind: type[T], where: Mapping[str, Any] = config) -> T:
            return _typed(where, key, kind, source)

        activation = config.get("hidden_act", "silu")
        if activation != "silu":
            raise UserError(
                f"{source}: hidden_act is {activation!r}, and only 'silu' is supported; choose a "
                "Qwen2.5 checkpoint."
            )

        # transformers 5 gathers theta and scaling in `rope_parameters`.
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(rope, Mapping):
            raise UserError(
                f"{source}: rope_scaling holds {rope!r}, which is no mapping; download it again."
            )
        theta = need("rope_theta", float, rope if "rope_theta" in rope else config)
        context = need("max_position_embeddings", int)
        scaling, yarn = rope.get("rope_type", rope.get("type", "default")), None
        if scaling == "yarn":
            original = need("original_max_position_embeddings", int, rope)
            for key, plain in HF_YARN_PLAIN.items():
                if rope.get(key) not in (None, plain):
                    raise UserError(
                        f"{source}: {key} of the rope scaling is {rope[key]!r}, and only {plain} "
                        "is supported; no released Qwen2.5 needs another."
                    )
            yarn = YarnScaling.create(
                need("factor", float, rope),
                original,
                **{
                    key: need(key, float, rope)
                    for key in ("attention_factor", "beta_fast", "beta_slow")
                    if rope.get(key) is not None
                },
            )
            context = max(context, int(yarn.factor * original))
        elif scaling != "default":
            raise UserError(
                f"{source}: rope scaling type is {scaling!r}, and only 'default' and 'yarn' "
                "are supported."
            )
        hidden, heads = need("hidden_size", int), need("num_attention_heads", int)
        return cls(
            num_layers=need("num_hidden_layers", int),
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=need("num_key_value_heads", int),
            head_dim=need("head_dim", int)
            if config.get("head_dim") is not None
            else hidden // max(heads, 1),
            ffn_size=need("intermediate_size", int),
            vocab_size=need("vocab_size", int),
            context_length=context,
            rope_theta=theta,
            rms_eps=need("rms_norm_eps", float),
            tied="tie_word_embeddings" in config and need("tie_word_embeddings", bool),
            yarn=yarn,
            source=source,
        )


def _typed(where: Mapping[str, Any], key: str, kind: type[T], source: str) -> T:
    """`where[key]` as `kind`; an integer may stand for a float, nothing else converts."""
    if key not in where:
        raise UserError(
            f"{source}: the key {key!r} is missing; without it the model's output would be wrong, "
            "so convert the checkpoint again."
        )
    value = where[key]
    accepted: tuple[type, ...] = (int, float) if kind is float else (kind,)
    # bool is an int to Python, and JSON as Python reads it has NaN and Infinity.
    boolean = isinstance(value, bool)
    if boolean is not (kind is bool) or not isinstance(value, accepted):
        what = kind.__name__
    elif kind is float and not math.isfinite(where[key]):
        what = "a finite number"
    else:
        return kind(where[key])
    raise UserError(
        f"{source}: the key {key!r} holds {value!r}, not {what}; the file is damaged "
        "or was written by a faulty converter."
    )
