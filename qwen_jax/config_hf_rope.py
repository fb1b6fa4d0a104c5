"""What a `config.json` says of rotary embedding, in transformers 4's words or 5's."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from qwen_jax.config import YarnScaling, stretched
from qwen_jax.config_table import Fields, Neutral, Only, Rule, Used, agreed, shown

ROPES = ("rope_scaling", "rope_parameters")
"""Where transformers 4 and 5 have what they know of rotary embedding."""

OTHER_SCALING = Only("belongs to a rope type that is not supported")

TABLE: Mapping[str, Rule] = {
    "rope_type": Used(),
    "type": Used(),
    "rope_theta": Used(),
    "partial_rotary_factor": Used(),
    "factor": Used(),
    "original_max_position_embeddings": Used(),
    "attention_factor": Used(),
    "beta_fast": Used(),
    "beta_slow": Used(),
    "mscale": Only("changes the attention factor", (1.0,)),
    "mscale_all_dim": Only("changes the attention factor", (0.0,)),
    "truncate": Only("changes the frequencies", (True,)),
    "mrope_section": Only("gives a token several positions (Qwen2-VL)"),
    "mrope_interleaved": Only("gives a token several positions", (False,)),
    "short_factor": OTHER_SCALING,
    "long_factor": OTHER_SCALING,
    "low_freq_factor": OTHER_SCALING,
    "high_freq_factor": OTHER_SCALING,
    "alpha": OTHER_SCALING,
    "finetuned": Neutral("says how the model was trained"),
}
"""The fields of `rope_parameters` and `rope_scaling`."""

YARN_OPTIONS = ("attention_factor", "beta_fast", "beta_slow")
UNREAD = {
    "default": ("factor", "original_max_position_embeddings", *YARN_OPTIONS),
    "linear": YARN_OPTIONS,
    "yarn": (),
}
"""Rope types, and what of the above each does not read: transformers warns of it, and so do we."""


class Scaling(NamedTuple):
    """How positions are stretched, by a factor or by YaRN, and the context that this makes."""

    context: int
    linear_factor: float = 1.0
    yarn: YarnScaling | None = None


def mapping(fields: Fields, name: str) -> Fields:
    """The fields of `name`; of the layers that attend in full where it has them by layer type."""
    value, label = fields.values[name], f"{name}."
    if isinstance(value, Mapping) and "full_attention" in value:
        others = value.keys() - {"full_attention", "sliding_attention"}
        fields.ignored += [label + key for key in sorted(others)]
        label, value = f"{label}full_attention.", value["full_attention"]
    if not isinstance(value, Mapping):
        fields.refuse(f"{label[:-1]} is {shown(value)}, and no mapping; correct or remove it")
    return Fields(value, TABLE, fields.source, label)


def rotated(fields: Fields, ropes: Sequence[Fields], head_dim: int) -> int:
    """R; transformers rounds it down."""
    part = agreed(float, *((at, "partial_rotary_factor") for at in (fields, *ropes)))
    if part is None:
        return head_dim
    if not (0 < part <= 1 and int(head_dim * part) % 2 == 0 and int(head_dim * part)):
        fields.refuse(
            f"partial_rotary_factor is {part}, and of a head's {head_dim} dimensions it must make "
            "an even number between 2 and all; correct it"
        )
    return int(head_dim * part)


def stretching(fields: Fields, ropes: Sequence[Fields]) -> Scaling:
    """What both spellings say, where there are two."""
    found = {rope.label[:-1]: said for rope in ropes if (said := scaling_of(rope, fields))}
    if len(set(found.values())) > 1:
        first, second = found
        fields.refuse(
            f"{first} is {shown(fields.values['rope_scaling'])}, but {second} is "
            f"{shown(fields.values['rope_parameters'])}; keep the one the model was trained with"
        )
    return next(iter(found.values()), Scaling(fields.need("max_position_embeddings", int)))


def scaling_of(rope: Fields, fields: Fields) -> Scaling | None:
    """None where it says nothing of scaling."""
    name, original = rope.label[:-1], "original_max_position_embeddings"
    kind = agreed(str, (rope, "rope_type"), (rope, "type")) or None
    if kind is None and rope.maybe("factor", float, 1.0) != 1:
        fields.refuse(
            f"{name} has the factor {rope.values['factor']} and no rope_type, so transformers "
            'ignores it; add "rope_type": "linear" or "yarn", or drop the factor'
        )
    if (kind or "default") not in UNREAD:
        fields.refuse(
            f"the rope type of {name} is {kind!r}, and only {', '.join(map(repr, UNREAD))} are "
            "supported; choose a plain Qwen2.5 checkpoint"
        )
    fields.ignored += rope.ignored
    fields.ignored += [rope.label + key for key in UNREAD[kind or "default"] if rope.given(key)]
    context = fields.need("max_position_embeddings", int)
    if kind is None:
        return None
    if kind == "default":
        return Scaling(context)
    factor, length = rope.need("factor", float), agreed(int, (fields, original), (rope, original))
    if length is None:
        length = context
    if kind == "linear":
        return Scaling(stretched(context, factor, length), factor)
    options = {key: rope.maybe(key, float) for key in YARN_OPTIONS}
    yarn = YarnScaling.create(factor, length, **options)
    return Scaling(stretched(context, factor, length), yarn=yarn)
