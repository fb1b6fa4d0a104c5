"""What a checkpoint recommends for generation: generation_config.json, or a GGUF's own keys.

It is followed where `generation_config` is "model". It is not by default: transformers and vLLM
sample as the file says where nobody says anything, and so two runs give two answers; here a run
without settings is greedy, and can be checked against any other engine.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from qwen_jax.engine.sampling import Sampling
from qwen_jax.errors import UserError
from qwen_jax.in_force import describe
from qwen_jax.strict_json import read_object_if_there
from qwen_jax.weights.checkpoint import Checkpoint

CHOICES = ("none", "model")

# Words of generation_config.json that are fields of `Sampling`.
_SAMPLING = (
    *("temperature", "top_k", "top_p", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)
_FILTERS = {"top_k", "top_p", "min_p"}
_OURS = {*_SAMPLING, "do_sample", "max_new_tokens", "stop_strings"}
_GGUF = "general.sampling."
_GGUF_WORDS = {"temp": "temperature", "penalty_repeat": "repetition_penalty"}
# Settings that we don't have, at the values that leave a text as it is: transformers' defaults.
# None is neutral everywhere.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "max_length": (20,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "max_time": (),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "diversity_penalty": (0,),
    "penalty_alpha": (0,),
    "typical_p": (1,),
    "top_h": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": ([],),
    "force_words_ids": ([],),
    "constraints": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({}, []),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1,),
    "watermarking_config": (),
    "token_healing": (False,),
    "dola_layers": (),
    "use_mtp": (False,),
    # llama.cpp's. Its penalties look at the last tokens only, and -1 is all of them.
    "sequence": ("",),
    "xtc_probability": (0,),
    "penalty_last_n": (-1,),
    "mirostat": (0,),
}
# Without these, the settings that stand beside them change nothing.
_NEEDS = {
    "xtc_threshold": "xtc_probability",
    "mirostat_tau": "mirostat",
    "mirostat_eta": "mirostat",
    "penalty_last_n": "repetition_penalty",
}
# Fields that say nothing of which tokens are chosen: ids that the tokenizer has read, what a beam
# search does with its beams, outputs, caches, speculation, and notes of where the file is from.
_SILENT = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("early_stopping", "length_penalty", "remove_invalid_values", "renormalize_logits"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
    *("return_dict_in_generate", "use_cache", "cache_implementation", "cache_config"),
    *("max_cache_len", "low_memory", "prefill_chunk_size", "compile_config", "disable_compile"),
    *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule"),
    *("assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind"),
    *("assistant_ensemble_weight", "target_lookbehind", "prompt_lookup_num_tokens"),
    *("max_matching_ngram_size", "speculation_type", "continuous_batching_config"),
    *("transformers_version", "_from_model_config", "_commit_hash", "generation_kwargs"),
}


@dataclasses.dataclass(frozen=True)
class Recommended:
    """A checkpoint's recommendation, as it stands there; its values are checked where it is used.

    Attributes:
        source: the file that says it.
        values: settings in transformers' words, without those that change nothing.
        names: what the file calls them, where that is something else.
    """

    source: str = ""
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """Recommended fields of `Sampling`, and perhaps `max_tokens` and `stop`.

        As in transformers a file that doesn't ask for sampling is greedy, whatever filters stand
        in it, and one that does has temperature 1 unless it says more. A top_k that it leaves out
        is off, as in vLLM: transformers' 50 is the library's own default and no model's.

        Raises:
            UserError: a value makes no sense.
        """
        if not self.values:
            return {}
        found = {name: self._checked(name) for name in _SAMPLING if name in self.values}
        if not self._samples():
            found = {k: v for k, v in found.items() if k not in _FILTERS} | {"temperature": 0.0}
        found.setdefault("temperature", 1.0)
        return found | self._ends()

    @property
    def sampling(self) -> Sampling:
        """How to choose tokens; greedy where the file says nothing. Raises UserError as above."""
        return Sampling(**{k: v for k, v in self.settings.items() if k in _SAMPLING})

    @property
    def unknown(self) -> dict[str, Any]:
        """Settings, in the file's words, that we don't have and that would change the text."""
        others = {word: value for word, value in self.values.items() if word not in _OURS}
        return {self.names.get(word, word): value for word, value in others.items()}

    def __str__(self) -> str:
        """As in "generation_config.json recommends temperature 0.7, top_k 20"."""
        shown = {k: v for k, v in self.values.items() if k != "do_sample" or v is not True}
        words = [f"{self.names.get(word, word)} {value!r:.40}" for word, value in shown.items()]
        return f"{self.source} recommends {', '.join(words or ['sampling'])}"

    def _samples(self) -> bool:
        value = self.values.get("do_sample", False)
        if not isinstance(value, bool):
            self._refuse("do_sample", "true or false")
        return value

    def _checked(self, word: str) -> Any:
        value = self.values[word]
        # vLLM's word for all.
        field: dict[str, Any] = {word: 0 if (word, value) == ("top_k", -1) else value}
        try:
            checked = Sampling(**field)
        except UserError as error:
            self._refuse(word, str(error).partition("it must be ")[2].rstrip("."))
        return getattr(checked, word)

    def _ends(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if (most := self.values.get("max_new_tokens")) is not None:
            if type(most) is not int or most < 1:
                self._refuse("max_new_tokens", "a whole number above 0")
            found["max_tokens"] = most
        if (stop := self.values.get("stop_strings")) is not None:
            texts = [stop] if isinstance(stop, str) else stop
            if not isinstance(texts, list) or not all(isinstance(t, str) and t for t in texts):
                self._refuse("stop_strings", "a list of texts that are not empty")
            found["stop"] = tuple(texts)
        return found

    def _refuse(self, word: str, allowed: str) -> NoReturn:
        raise UserError(
            f"{self.source}: {self.names.get(word, word)} is {self.values[word]!r:.60}, but it "
            f"must be {allowed}; correct the file, or leave its recommendation with "
            "generation_config=none."
        )


def check_choice(name: Any) -> None:
    """Raises UserError where `generation_config` is neither of the choices."""
    if name not in CHOICES:
        raise UserError(
            f"generation_config is {name!r:.40}, but it must be one of {', '.join(CHOICES)}."
        )


@functools.cache
def _warn_once(text: str) -> None:
    """Since points of an experiment share models and settings."""
    logging.warning("%s", text)


def nothing(recommended: Recommended) -> str:
    """What to tell somebody who wants to follow a model that recommends nothing."""
    return (
        f"{recommended.source or 'The model'} recommends no settings, so that "
        "generation_config=model changes nothing; leave it out."
    )


def resolved(config: ConfigDict, recommended: Recommended, asked: Collection[str]) -> ConfigDict:
    """The config with what the model recommends, where it is to be followed, in all fields that
    nobody asked for. Warns of settings that can't be followed, and where there are none.

    Raises:
        UserError: a recommended value makes no sense.
    """
    if config.generation_config == "none":
        return config
    if not recommended.values:
        _warn_once(nothing(recommended))
    if recommended.unknown:
        named = ", ".join(f"{word} {value!r:.40}" for word, value in recommended.unknown.items())
        logging.warning("%s: %s can't be followed and is left out.", recommended.source, named)
    found = {
        f"sampling.{name}" if name in _SAMPLING else name: value
        for name, value in recommended.settings.items()
    }
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict({k: v for k, v in found.items() if k not in asked})
    return changed


def line(recommended: Recommended, config: ConfigDict, used: Sampling) -> str:
    """What the model recommends and what is used, in one line; nothing where it recommends nothing.

    Args:
        config: the resolved one.
        used: its sampling.
    """
    if not recommended.values:
        return ""
    ends = [f"max_tokens {config.max_tokens}"] * ("max_new_tokens" in recommended.values)
    ends += [f"stop {list(config.stop)}"] * ("stop_strings" in recommended.values)
    said = f"{recommended}; used: {', '.join([describe(used), *ends])}"
    return f"{said} (--generation_config={config.generation_config})"


def read(checkpoint: Checkpoint) -> Recommended:
    """What the checkpoint recommends. Raises UserError where the file is no JSON object."""
    if checkpoint.format == "gguf":
        return _of_gguf(checkpoint.metadata, str(checkpoint.path))
    path = checkpoint.path / "generation_config.json"
    values = read_object_if_there(path, allow_nan=True)
    return Recommended(str(path), _telling(values))


def _of_gguf(metadata: Mapping[str, Any], source: str) -> Recommended:
    """llama.cpp's words: it always samples, greedily at temperatures up to 0, and a top_k up to 0
    keeps all."""
    names, values = {}, {}
    for key, value in metadata.items():
        if key.startswith(_GGUF):
            word = _GGUF_WORDS.get(key.removeprefix(_GGUF), key.removeprefix(_GGUF))
            names[word] = key
            values[word] = _shortest(value) if isinstance(value, float) else value
    for word, kind in (("temperature", float), ("top_k", int)):
        if type(values.get(word)) is kind:
            values[word] = max(values[word], kind(0))
    if values.keys() & {"temperature", *_FILTERS}:
        values["do_sample"] = True
    return Recommended(source, _telling(values), names)


def _shortest(value: float) -> float:
    """The shortest number of the same float32, which is what the converter was given."""
    with np.errstate(over="ignore"):
        single = np.float32(value)
    return float(str(single)) if single == value else value


def _telling(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that may change a text."""
    told = {
        word: value
        for word, value in values.items()
        if value is not None and word not in _SILENT and value not in _NEUTRAL.get(word, ())
    }
    told = {w: v for w, v in told.items() if w not in _NEEDS or _NEEDS[w] in told}
    return {} if told == {"do_sample": False} else told
