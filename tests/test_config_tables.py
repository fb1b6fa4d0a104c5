"""The whole of both tables: every key is used, silent or refused as it says; none is missing."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import gguf
import pytest

from qwen_jax import config_gguf, config_hf, config_hf_rope, config_table
from qwen_jax.config import ModelConfig, YarnScaling
from qwen_jax.config_table import Neutral, Only, Rule, Used, Where
from qwen_jax.errors import UserError
from tests.test_config import from_gguf, from_hf, refusal, released_gguf, released_hf

Keys = dict[str, Any]
Use = tuple[Keys, Keys]
"""Keys of a file, and what they make of the ModelConfig without them."""


@dataclasses.dataclass(frozen=True)
class Format:
    """A table, and a file of the 0.5B with some of its keys changed.

    Attributes:
        yarn: keys of a file that has it.
        used: an example of each used key.
        holds: examples of each key with a condition, met and not met.
    """

    table: Mapping[str, Rule]
    read: Callable[[Keys], ModelConfig]
    yarn: Keys
    used: dict[str, Use]
    holds: dict[str, tuple[list[Keys], list[Keys]]]


def read_gguf(keys: Keys) -> ModelConfig:
    return from_gguf(released_gguf("0.5B") | {f"qwen2.{key}": v for key, v in keys.items()})


def read_hf(keys: Keys) -> ModelConfig:
    return from_hf(released_hf("0.5B", **keys))


def read_rope(keys: Keys) -> ModelConfig:
    return from_hf(released_hf("0.5B", rope_parameters={"rope_theta": 1e6} | keys))


def one(key: str, value: Any, **changes: Any) -> dict[str, Use]:
    return {key: ({key: value}, changes)}


def yarn(original: int = 32768, **options: float) -> Keys:
    scaling = YarnScaling.create(4.0, original, **options)
    return {"yarn": scaling, "context_length": max(32768, 4 * original)}


def alone(key: str, holds: list[Any], fails: list[Any]) -> dict[str, tuple[list[Keys], list[Keys]]]:
    return {key: ([{key: value} for value in holds], [{key: value} for value in fails])}


HEADS_OF_32 = {"head_dim": 32, "rope_dim": 32}
GGUF_YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
LINEAR = {"linear_factor": 2.0, "context_length": 65536}
GGUF = Format(
    config_gguf.TABLE,
    read_gguf,
    yarn=GGUF_YARN,
    used={
        **one("block_count", 2, num_layers=2),
        **one("context_length", 99, context_length=99),
        **one("embedding_length", 448, hidden_size=448, **HEADS_OF_32),
        **one("feed_forward_length", 99, ffn_size=99),
        **one("attention.head_count", 28, num_heads=28, **HEADS_OF_32),
        **one("attention.head_count_kv", 7, num_kv_heads=7),
        **one("attention.key_length", 32, **HEADS_OF_32),
        **one("attention.layer_norm_rms_epsilon", 1e-5, rms_eps=1e-5),
        **one("rope.freq_base", 1e4, rope_theta=1e4),
        **one("rope.dimension_count", 16, rope_dim=16),
        **one("rope.scaling.factor", 2.0, **LINEAR),
        **one("rope.scale_linear", 2.0, **LINEAR),
        "rope.scaling.type": (GGUF_YARN, yarn()),
        "rope.scaling.original_context_length": (
            GGUF_YARN | {"rope.scaling.original_context_length": 4096},
            yarn(4096),
        ),
        "rope.scaling.yarn_beta_fast": (
            GGUF_YARN | {"rope.scaling.yarn_beta_fast": 16.0},
            yarn(beta_fast=16.0),
        ),
        "rope.scaling.yarn_beta_slow": (
            GGUF_YARN | {"rope.scaling.yarn_beta_slow": 2.0},
            yarn(beta_slow=2.0),
        ),
    },
    holds={
        **alone("vocab_size", [151_936, 100], [151_937]),
        **alone("embedding_length_out", [896], [1024]),
        **alone("attention.value_length", [64], [32, 128]),
        **alone("attention.scale", [0.0, 0.125], [0.25]),
        "attention.sliding_window": (
            [
                *({"attention.sliding_window": size} for size in (0, 32768, 40000)),
                {"attention.sliding_window": 4096, "attention.sliding_window_pattern": 1},
                {
                    "attention.sliding_window": 4096,
                    "attention.sliding_window_pattern": [False] * 24,
                },
            ],
            [
                *({"attention.sliding_window": size} for size in (4096, 32767)),
                {"attention.sliding_window": 4096, "attention.sliding_window_pattern": 2},
                {"attention.sliding_window": 4096, "attention.sliding_window_pattern": []},
                GGUF_YARN | {"attention.sliding_window": 32768},
            ],
        ),
        "rope.scaling.yarn_ext_factor": (
            [
                *({"rope.scaling.yarn_ext_factor": factor} for factor in (0.0, -1.0)),
                GGUF_YARN | {"rope.scaling.yarn_ext_factor": 1.0},
            ],
            [
                {"rope.scaling.yarn_ext_factor": 1.0},
                GGUF_YARN | {"rope.scaling.yarn_ext_factor": 0.0},
            ],
        ),
    },
)

SLIDES = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 21}
FULL, SLIDING = ["full_attention"] * 24, ["full_attention", "sliding_attention"] * 12
HF_YARN = {"rope_type": "yarn", "factor": 4.0}
HF = Format(
    config_hf.TABLE,
    read_hf,
    yarn={"rope_scaling": HF_YARN},
    used={
        **one("hidden_size", 448, hidden_size=448, **HEADS_OF_32),
        **one("intermediate_size", 99, ffn_size=99),
        **one("max_position_embeddings", 99, context_length=99),
        **one("num_attention_heads", 28, num_heads=28, **HEADS_OF_32),
        **one("num_hidden_layers", 2, num_layers=2),
        **one("num_key_value_heads", 7, num_kv_heads=7),
        **one("head_dim", 32, **HEADS_OF_32),
        **one("vocab_size", 99, vocab_size=99),
        **one("rms_norm_eps", 1e-5, rms_eps=1e-5),
        **one("tie_word_embeddings", False, tied=False),
        **one("rope_theta", 1e4, rope_theta=1e4),
        **one("partial_rotary_factor", 0.25, rope_dim=16),
        **one("rope_scaling", {"type": "linear", "factor": 2.0}, **LINEAR),
        **one("rope_parameters", {"rope_type": "linear", "factor": 2.0}, **LINEAR),
        **one("dual_chunk_attention_config", {"chunk_size": 99}, context_length=99),
        "original_max_position_embeddings": (
            {"rope_scaling": HF_YARN, "original_max_position_embeddings": 4096},
            yarn(4096),
        ),
    },
    holds={
        "use_sliding_window": (
            [
                SLIDES | {"use_sliding_window": False},
                SLIDES | {"max_window_layers": 24},
                SLIDES | {"sliding_window": 32768},
                SLIDES | {"sliding_window": None},
                SLIDES | {"layer_types": FULL},
            ],
            [SLIDES, SLIDES | {"sliding_window": 32768, "rope_scaling": HF_YARN}],
        ),
        "layer_types": (
            [{"layer_types": FULL}, SLIDES | {"layer_types": SLIDING, "sliding_window": 32768}],
            [
                {"layer_types": FULL[1:]},
                {"layer_types": ["linear_attention", *FULL[1:]]},
                {"layer_types": [{}, *FULL[1:]]},
                {"layer_types": SLIDING, "sliding_window": None},
                {"layer_types": SLIDING, "sliding_window": 4096},
                SLIDES | {"layer_types": SLIDING},
                {"layer_types": SLIDING, "sliding_window": 32768}
                | {"rope_parameters": {"full_attention": {}, "sliding_attention": {}}},
            ],
        ),
        **alone("rotary_dim", [64], [32]),
        **alone("rotary_emb_base", [1e6, 1_000_000], [1e4]),
        **alone("query_pre_attn_scalar", [64], [128]),
        **alone("attention_multiplier", [0.125], [1.0]),
    },
)

HF_ROPE = Format(
    config_hf_rope.TABLE,
    read_rope,
    yarn=HF_YARN,
    used={
        "rope_type": (HF_YARN, yarn()),
        "type": ({"type": "yarn", "factor": 4.0}, yarn()),
        **one("rope_theta", 1e6),  # the only one that does not contradict the file's
        **one("partial_rotary_factor", 0.25, rope_dim=16),
        "factor": ({"type": "linear", "factor": 2.0}, LINEAR),
        "original_max_position_embeddings": (
            HF_YARN | {"original_max_position_embeddings": 4096},
            yarn(4096),
        ),
        "attention_factor": (HF_YARN | {"attention_factor": 1.5}, yarn(attention_factor=1.5)),
        "beta_fast": (HF_YARN | {"beta_fast": 16.0}, yarn(beta_fast=16.0)),
        "beta_slow": (HF_YARN | {"beta_slow": 2.0}, yarn(beta_slow=2.0)),
    },
    holds={},
)

FORMATS = {"gguf": GGUF, "config.json": HF, "config.json's rope": HF_ROPE}
FIELDS = [
    pytest.param(form, key, rule, id=f"{name}: {key}")
    for name, form in FORMATS.items()
    for key, rule in form.table.items()
]


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    heard: list[str] = []
    monkeypatch.setattr(
        config_table.logging, "warning", lambda text, *values: heard.append(text % values)
    )
    return heard


@pytest.mark.parametrize(("form", "key", "rule"), FIELDS)
def test_every_field_does_as_its_rule_says(
    form: Format, key: str, rule: Rule, warnings: list[str]
) -> None:
    plain = form.read({})
    match rule:
        case Used(by="config") if key != "model_type":
            keys, changes = form.used[key]
            assert form.read(keys) == dataclasses.replace(plain, **changes)
        case Used():
            keys = {"model_type": "qwen2"} if key == "model_type" else {key: {"bits": 4}}
            assert form.read(keys) == plain
        case Neutral():
            for value in (7, 0.5, True, "some", [1, 2], {"a": 1}, None):
                assert form.read({key: value}) == plain
        case Only():
            for value in (*rule.plain, [*rule.plain] * 24, None, [], "", {}):
                assert form.read({key: value}) == plain
            other = [
                value for value in (3, 0.5, True, False, "other", [3]) if value not in rule.plain
            ]
            for value in [*other, {"a": 1}]:
                assert f"{key} is {value!r}, which {rule.does}" in refusal(form.read, {key: value})
        case Where():
            holds, fails = form.holds[key]
            for keys in holds:
                form.read(keys)
            for keys in fails:
                says = f"{key} is {config_table.shown(keys[key])}, which {rule.does}"
                assert says in refusal(form.read, keys)
            assert f"{key}' holds {{}}, not " in refusal(form.read, {key: {}})
    assert not warnings


@pytest.mark.parametrize(("form", "key", "rule"), FIELDS)
def test_no_value_ends_in_a_traceback(form: Format, key: str, rule: Rule) -> None:
    odd = (-1, 0, 2**64, 10**400, 1e308, -0.0, math.nan, True, "", "yarn", [], [[]], {}, {"a": {}})
    for value in odd:
        for beside in ({}, form.yarn):
            with contextlib.suppress(UserError):
                form.read(beside | {key: value})


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_unknown_keys_are_named_in_one_warning(form: Format, warnings: list[str]) -> None:
    assert form.read({"some_new_key": 1, "another": [2], "nothing": None}) == form.read({})
    (warning,) = warnings
    assert "ignored '" in warning
    assert "some_new_key'" in warning and "another'" in warning and "nothing'" in warning


@pytest.mark.parametrize(
    ("form", "keys", "named"),
    [
        (GGUF, {"rope.scaling.type": "none", "rope.scaling.factor": 2.0}, ".scaling.factor'"),
        (HF_ROPE, {"rope_type": "default", "factor": 2.0}, "'rope_parameters.factor'"),
        (HF_ROPE, {"type": "linear", "factor": 1.0, "beta_fast": 2.0}, "parameters.beta_fast'"),
        (
            HF,
            {"rope_parameters": {"full_attention": {"x": 1}}},
            "rope_parameters.full_attention.x'",
        ),
        (HF, {"rope_parameters": {"full_attention": {}, "y": {}}}, "'rope_parameters.y'"),
    ],
)
def test_what_the_rope_type_does_not_read_is_warned_of(
    form: Format, keys: Keys, named: str, warnings: list[str]
) -> None:
    form.read(keys)
    (warning,) = warnings
    assert named in warning


def test_released_files_are_read_without_a_word(warnings: list[str]) -> None:
    for form in FORMATS.values():
        form.read({})
    assert not warnings


def test_keys_of_other_namespaces_are_not_looked_at(warnings: list[str]) -> None:
    other = {"general.name": "x", "tokenizer.ggml.model": "gpt2", "llama.logit_scale": 3.0}
    assert from_gguf(released_gguf("0.5B") | other) == read_gguf({}) and not warnings


def test_the_gguf_table_has_every_key_that_gguf_names() -> None:
    sections = [c for c in vars(gguf.Keys).values() if isinstance(c, type)]
    sections += [c for section in sections for c in vars(section).values() if isinstance(c, type)]
    names = {v for section in sections for v in vars(section).values() if isinstance(v, str)}
    templates = {n.removeprefix("{arch}.") for n in names if n.startswith("{arch}.")}
    known = {key.replace("dense_2", "{dense}") for key in config_gguf.TABLE}
    assert len(templates) > 100 and templates <= known


def test_sizes_may_be_given_layer_by_layer() -> None:
    same = {"attention.head_count": [14] * 24, "attention.head_count_kv": [2] * 24}
    assert read_gguf(same | {"feed_forward_length": [4864] * 24}) == read_gguf({})
    for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        assert f"{key} is [2, 2, " in refusal(read_gguf, {key: [2] * 23 + [4]})
        assert "not int" in refusal(read_gguf, {key: [2] * 23})


def test_a_flag_may_be_a_number() -> None:
    assert read_hf({"is_causal": 1, "use_mrope": 0}) == read_hf({})
    assert "is_causal is 0, which lets" in refusal(read_hf, {"is_causal": 0})
    assert "attention.causal is 0, which lets" in refusal(read_gguf, {"attention.causal": 0})
