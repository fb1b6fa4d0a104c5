"""What checkpoints recommend: generation_config.json and general.sampling, followed where asked."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest

from qwen_jax import recommended, settings
from qwen_jax.engine.sampling import Sampling
from qwen_jax.errors import UserError
from qwen_jax.recommended import Recommended
from qwen_jax.weights.gguf_file import open_gguf

# Qwen/Qwen2.5-0.5B-Instruct's file, and Qwen/Qwen2.5-0.5B's.
INSTRUCT = {
    "bos_token_id": 151643,
    "pad_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "repetition_penalty": 1.1,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "transformers_version": "4.37.0",
}
BASE = {"bos_token_id": 151643, "do_sample": False, "eos_token_id": 151643, "max_new_tokens": 2048}


def of_hf(directory: Path, values: dict[str, Any]) -> Recommended:
    (directory / "generation_config.json").write_text(json.dumps(values))
    return recommended.read(SimpleNamespace(format="safetensors", path=directory))  # type: ignore[arg-type]


def of_gguf(directory: Path, **values: Any) -> Recommended:
    """Written by gguf's own methods, such as `add_sampling_temp`."""
    path = directory / "x.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    for name, value in values.items():
        getattr(writer, f"add_sampling_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    metadata = open_gguf(path).metadata
    return recommended.read(SimpleNamespace(format="gguf", path=path, metadata=metadata))  # type: ignore[arg-type]


def test_qwens_own_files(tmp_path: Path) -> None:
    instruct = of_hf(tmp_path, INSTRUCT)
    assert instruct.sampling == Sampling(0.7, top_k=20, top_p=0.8, repetition_penalty=1.1)
    assert instruct.settings.keys() == {"temperature", "top_k", "top_p", "repetition_penalty"}
    assert str(instruct) == (
        f"{tmp_path}/generation_config.json recommends repetition_penalty 1.1, temperature 0.7, "
        "top_p 0.8, top_k 20"
    )
    base = of_hf(tmp_path, BASE)
    assert base.settings == {"temperature": 0.0, "max_tokens": 2048}
    assert instruct.unknown == base.unknown == {}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # As transformers: sampling has to be asked for, and then is at 1 unless it says more.
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"temperature": 0.7, "top_p": 0.8}, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        ({"do_sample": None, "top_k": 5}, {"temperature": 0.0}),
        ({"do_sample": True, "top_k": -1}, {"temperature": 1.0, "top_k": 0}),
        ({"do_sample": True, "min_p": 0.1, "temperature": 0}, {"temperature": 0, "min_p": 0.1}),
        ({"do_sample": True, "top_p": None, "top_k": None}, {"temperature": 1.0}),
        (
            {"repetition_penalty": 1.05, "stop_strings": "###"},
            {"temperature": 0.0, "repetition_penalty": 1.05, "stop": ("###",)},
        ),
        # Nothing is recommended.
        ({}, {}),
        ({"do_sample": False}, {}),
        ({"_from_model_config": True, "eos_token_id": 5, "use_cache": True}, {}),
        ({"num_beams": 1, "typical_p": 1.0, "no_repeat_ngram_size": 0, "max_length": 20}, {}),
    ],
)
def test_of_a_directory(tmp_path: Path, values: dict[str, Any], expected: dict[str, Any]) -> None:
    found = of_hf(tmp_path, values)
    assert found.settings == expected
    assert bool(found.values) == bool(expected)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"temp": 0.7, "top_k": 20, "top_p": 0.8, "penalty_repeat": 1.05},
            {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
        ),
        ({"top_k": 20}, {"temperature": 1.0, "top_k": 20}),
        ({"temp": -1.0, "top_k": -5}, {"temperature": 0.0, "top_k": 0}),
        ({"min_p": 0.05, "temp": 1.0}, {"temperature": 1.0, "min_p": 0.05}),
        ({"mirostat": 0, "mirostat_tau": 5.0, "xtc_threshold": 0.1}, {}),
        ({"penalty_last_n": 64}, {}),
        ({}, {}),
    ],
)
def test_of_a_gguf(tmp_path: Path, values: dict[str, Any], expected: dict[str, Any]) -> None:
    found = of_gguf(tmp_path, **values)
    assert found.settings == expected
    assert not found.unknown and bool(found.values) == bool(expected)


def test_every_key_of_gguf_is_known(tmp_path: Path) -> None:
    keys = {v for k, v in vars(gguf.Keys.General).items() if k.startswith("SAMPLING_")}
    assert len(keys) == 12 and all(key.startswith("general.sampling.") for key in keys)
    everything = {
        "sequence": "kpt",
        "temp": 0.7,
        "top_k": 5,
        "top_p": 0.8,
        "min_p": 0.1,
        "xtc_probability": 0.5,
        "xtc_threshold": 0.1,
        "penalty_last_n": 64,
        "penalty_repeat": 1.1,
        "mirostat": 2,
        "mirostat_tau": 5.0,
        "mirostat_eta": 0.1,
    }
    found = of_gguf(tmp_path, **everything)
    assert {f"general.sampling.{name}" for name in everything} == keys
    assert (
        found.unknown.keys()
        | {
            f"general.sampling.{name}"
            for name in ("temp", "top_k", "top_p", "min_p", "penalty_repeat")
        }
        == keys
    )


@pytest.mark.live
def test_every_setting_of_transformers_is_known() -> None:
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    config = transformers.GenerationConfig()
    names = {name for name in vars(config) if not name.startswith("_")}
    silent, neutral = recommended._SILENT, recommended._NEUTRAL
    assert names <= silent | neutral.keys() | recommended._OURS
    for name, value in config._get_default_generation_params().items():
        if name in neutral and value is not None:
            assert value in neutral[name], name


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"do_sample": "yes"}, "do_sample is 'yes', but it must be true or false"),
        ({"do_sample": True, "temperature": "0.7"}, "temperature is '0.7', but it must be a numb"),
        ({"do_sample": True, "temperature": -1}, "temperature is -1, but it must be 0"),
        ({"do_sample": True, "temperature": float("nan")}, "temperature is nan, but it must be"),
        ({"top_p": 1.5}, "top_p is 1.5, but it must be above 0 and at most 1"),
        ({"top_k": 2.5}, "top_k is 2.5, but it must be a whole number"),
        ({"top_k": -2}, "top_k is -2, but it must be from 0"),
        ({"top_k": True}, "top_k is True, but it must be a whole number"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0, but it must be from"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, but it must be a whole number above 0"),
        ({"max_new_tokens": "9"}, "max_new_tokens is '9', but it must be a whole number"),
        ({"stop_strings": [""]}, "stop_strings is [''], but it must be a list of texts"),
    ],
)
def test_values_that_make_no_sense(tmp_path: Path, values: dict[str, Any], words: str) -> None:
    found = of_hf(tmp_path, values)  # Only what is used has to make sense.
    assert str(found)
    with pytest.raises(UserError) as caught:
        _ = found.sampling
    assert str(caught.value).startswith(f"{tmp_path}/generation_config.json: {words}")
    with pytest.raises(UserError, match=r"general\.sampling\.top_p is 7\.0, but it must be above"):
        _ = of_gguf(tmp_path, top_p=7.0).sampling


def resolved(found: Recommended, choice: str, **asked: Any) -> dict[str, Any]:
    config = settings.get_config()
    config.generation_config = choice
    settings.update(config, asked, "the test")
    before = dict(settings.flatten(config))
    result = recommended.resolved(config, found, settings.asked(config, asked))
    assert dict(settings.flatten(config)) == before
    return dict(settings.flatten(result))


def test_what_somebody_asked_for_wins(tmp_path: Path) -> None:
    found = of_hf(tmp_path, INSTRUCT | {"max_new_tokens": 99})
    assert resolved(found, "none") == dict(settings.flatten(settings.get_config()))
    fields = resolved(found, "model")
    assert [fields[f"sampling.{n}"] for n in ("temperature", "top_p", "top_k")] == [0.7, 0.8, 20]
    assert (fields["sampling.repetition_penalty"], fields["max_tokens"]) == (1.1, 99)
    # Also where it is the default, and where a config file has it without a flag.
    for asked in ({"sampling.temperature": 0.0, "max_tokens": 256}, {"sampling.top_p": 0.5}):
        fields = resolved(found, "model", **asked)
        assert fields.items() >= asked.items() and fields["sampling.top_k"] == 20
    config = settings.get_config()
    config.generation_config, config.sampling.top_p = "model", 0.5
    assert recommended.resolved(config, found, settings.asked(config)).sampling.top_p == 0.5


def test_what_cannot_be_followed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Sequence[object]] = []
    monkeypatch.setattr(recommended.logging, "warning", lambda *words: said.append(words))
    found = of_hf(tmp_path, INSTRUCT | {"num_beams": 4, "typical_p": 0.9, "chat_format": "x"})
    resolved(found, "none")
    assert not said
    resolved(found, "model")
    (words,) = said
    assert "num_beams 4, typical_p 0.9, chat_format 'x' can't be followed" in (
        str(words[0]) % tuple(words[1:])
    )


def test_the_line(tmp_path: Path) -> None:
    config = settings.get_config()
    assert recommended.line(of_hf(tmp_path, {}), config, Sampling()) == ""
    found = of_hf(tmp_path, {"do_sample": True, "temperature": 0.7, "max_new_tokens": 9})
    assert recommended.line(found, config, Sampling()).removeprefix(f"{tmp_path}/") == (
        "generation_config.json recommends temperature 0.7, max_new_tokens 9; used: greedy, "
        "max_tokens 256 (--generation_config=none)"
    )
    config.generation_config = "model"
    config = recommended.resolved(config, found, ())
    line = recommended.line(found, config, Sampling(temperature=0.7))
    assert line.endswith("used: temperature 0.7, seed 0, max_tokens 9 (--generation_config=model)")
