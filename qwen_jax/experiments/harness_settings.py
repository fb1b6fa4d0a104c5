"""lm-evaluation-harness' words in ours: a task's generation settings, a model's arguments.

Every one is honoured, known to change nothing, or refused by its name. Needs no lm_eval.
"""

import dataclasses
import difflib
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from qwen_jax import api, choices, recommended
from qwen_jax.engine import memory
from qwen_jax.engine.sampling import Sampling
from qwen_jax.engine.shapes import shapes_for
from qwen_jax.errors import UserError
from qwen_jax.recommended import Recommended

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names that the harness, transformers and OpenAI have for the most tokens of an answer."""

STOPS = ("until", "stop", "stop_strings", "stop_sequences")
"""Names for the texts that end an answer."""

STOP_IDS = ("stop_token_ids", "stop_ids")
"""Names, vLLM's and ours, for the tokens that end an answer besides the model's own."""

_NUMBERS = {
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "seed": int,
}
_NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "n": 1,
    "best_of": 1,
    "use_cache": True,
    "early_stopping": False,
    "typical_p": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "ignore_eos": False,
}
"""Settings of other engines at the values that leave ours as it is."""

_KNOWN = (*LENGTHS, *STOPS, *STOP_IDS, "do_sample", "temperature", *_NUMBERS, "logit_bias")
_FLAGS = ("apply_chat_template", "system_instruction", "fewshot_as_multiturn", "gen_kwargs")
"""What people take for arguments of the model, and are flags of lm_eval."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a request is to be answered."""

    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...] = ()


def check_installed() -> None:
    """Raises UserError where there is no lm_eval."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-evaluation-harness is not installed; install qwen_jax[eval].")


def overridden(options: Mapping[str, Any], by: Mapping[str, Any]) -> dict[str, Any]:
    """Generation settings in which `by` wins, whatever name the others have for the same."""
    hidden = {
        name for names in (LENGTHS, STOPS, STOP_IDS) if set(names) & set(by) for name in names
    }
    return {name: value for name, value in options.items() if name not in hidden} | dict(by)


def generation(
    options: Mapping[str, Any],
    *,
    usual: Mapping[str, Any] | None = None,
    max_tokens: int = 256,
    seed: int = 0,
    warn: Callable[[str], None] = lambda message: None,
) -> Settings:
    """A task's `generation_kwargs`, as the harness' `normalize_gen_kwargs` understands them.

    Args:
        options: a temperature without `do_sample` samples; `do_sample` without a temperature
            samples at 1, as in transformers; `do_sample=False` is greedy. None is not given.
        usual: fields of `Sampling` that hold where a task says nothing. Whether it samples is
            the task's to say, so the temperature is for those that do and name none.
        max_tokens: of a task that says nothing.
        seed: of a task that says nothing.
        warn: hears of settings that contradict each other.

    Raises:
        UserError: a setting is unknown, has a value that is not supported or makes no sense, or
            has two names with different values.
    """
    given = {name: value for name, value in options.items() if value is not None}
    usual = usual or {}
    fills = {name for name in _NUMBERS if name in usual}
    if given.get("do_sample") and usual.get("temperature"):
        fills.add("temperature")
    given = {name: usual[name] for name in fills} | given
    for name in given.keys() - set(_KNOWN):
        if name not in _NEUTRAL:
            raise UserError(
                f"The generation setting {name}={given[name]!r:.60} is not supported; "
                f"{_near(name, _KNOWN)}"
            )
        if given[name] != _NEUTRAL[name]:
            raise UserError(
                f"The generation setting {name}={given[name]!r:.60} is not supported, only "
                f"{name}={_NEUTRAL[name]}."
            )
    numbers: dict[str, Any] = {
        name: number(name, given[name], kind) for name, kind in _NUMBERS.items() if name in given
    }
    if numbers.get("top_k") == -1:  # vLLM's word for all
        numbers["top_k"] = 0
    numbers |= {"temperature": _temperature(given, warn), "logit_bias": _bias(given)}
    sampling = Sampling(**{"seed": seed, **numbers})
    return Settings(_length(given, max_tokens), sampling, _stop(given), _stop_ids(given))


def _temperature(given: Mapping[str, Any], warn: Callable[[str], None]) -> float:
    do_sample = given.get("do_sample")
    if not isinstance(do_sample, bool | None):
        raise UserError(f"do_sample is {do_sample!r:.60}, but it must be true or false.")
    at = number("temperature", given["temperature"], float) if "temperature" in given else None
    if do_sample is False and at:
        warn(f"do_sample=False: answers are greedy, and temperature={at:g} does nothing.")
    if do_sample and at == 0:
        warn("temperature=0: answers are greedy, and do_sample=True does nothing.")
    if do_sample is None:
        return at or 0.0
    return (1.0 if at is None else at) if do_sample else 0.0


def _length(given: Mapping[str, Any], default: int) -> int:
    found = {name: positive(name, given[name]) for name in LENGTHS if name in given}
    if len(set(found.values())) > 1:
        pairs = " and ".join(f"{name}={value}" for name, value in found.items())
        raise UserError(f"{pairs} mean the same and differ; give the one that the task has.")
    return next(iter(found.values()), default)


def _stop(given: Mapping[str, Any]) -> tuple[str, ...]:
    found: list[str] = []
    for name in STOPS:
        texts = given.get(name, ())
        texts = [texts] if isinstance(texts, str) else texts
        if not (isinstance(texts, list | tuple) and all(isinstance(t, str) for t in texts)):
            raise UserError(f"{name} is {texts!r:.60}, but it must be a text or a list of texts.")
        found += texts
    # An empty one stands for the end of the text in the harness' tasks.
    return tuple(dict.fromkeys(text for text in found if text))


def _stop_ids(given: Mapping[str, Any]) -> tuple[int, ...]:
    found: list[int] = []
    for name in STOP_IDS:
        ids = given.get(name, ())
        ids = ids if isinstance(ids, list | tuple) else [ids]
        found += [number(f"A token of {name}", token, int) for token in ids]
    return tuple(dict.fromkeys(found))


def _bias(given: Mapping[str, Any]) -> dict[int, float]:
    pairs = given.get("logit_bias", {})
    if not isinstance(pairs, Mapping):
        raise UserError(f"logit_bias is {pairs!r:.60}, but it must map tokens to numbers.")
    return {
        number("A token of logit_bias", token, int): number("logit_bias", value, float)
        for token, value in pairs.items()
    }


def number(name: str, value: Any, kind: type) -> Any:
    """A number that may have come as text. Raises UserError where it is none."""
    try:
        found = float(value)
        if isinstance(value, bool) or (kind is int and found != int(found)):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"{name} is {value!r:.60}, but it must be {what}.") from None
    return kind(found)


def positive(name: str, value: Any, most: int | None = None) -> int:
    """A whole number from 1 to `most`. Raises UserError where it is none."""
    found = number(name, value, int)
    if found < 1 or (most is not None and found > most):
        allowed = "at least 1" if most is None else f"from 1 to {most}"
        raise UserError(f"{name} is {found}, but it must be {allowed}.")
    return found


_NOT_LOADS = {"progress", "slots", "expected", "speculate", "draft_model", "draft_tokens"}
"""Of `qwen_jax.load`'s arguments those that a harness's model hasn't."""


def check_arguments(given: Iterable[str], own: Iterable[str]) -> None:
    """Raises UserError for a name that is neither `qwen_jax.load`'s nor among the model's own."""
    # The harness has its own name for slots.
    loads = set(inspect.signature(api.load).parameters) - _NOT_LOADS
    known = sorted({*own, *loads})
    for name in given:
        if name in _FLAGS:
            raise UserError(f"{name} is no argument of the model; give lm_eval --{name}.")
        if name not in loads:
            raise UserError(f"The model has no argument {name}; {_near(name, known)}")


def followed(said: Recommended, choice: str, warn: Callable[[str], None]) -> Mapping[str, Any]:
    """What a checkpoint recommends, if that is to be followed, and a word about it.

    Raises:
        UserError: there is no such choice, or a recommended value makes no sense.
    """
    recommended.check_choice(choice)
    if said.values:
        what = "is followed where tasks say nothing" if choice == "model" else "is not followed"
        warn(f"{said}, which {what} (generation_config={choice}).")
    if choice != "model":
        return {}
    if not said.values:
        warn(recommended.nothing(said))
    if said.unknown:
        warn(f"{said.source}: {', '.join(said.unknown)} can't be followed and is left out.")
    return said.settings


def joined(arguments: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """What `--model_args` and lm_eval's own flags say. Raises UserError where they differ."""
    given = {name: value for name, value in flags.items() if value is not None}
    for name in given.keys() & arguments.keys():
        if given[name] != arguments[name]:
            raise UserError(
                f"--model_args has {name}={arguments[name]}, but lm_eval has --{name}="
                f"{given[name]}, perhaps by default; give lm_eval --{name}={arguments[name]}."
            )
    return {**arguments, **given}


def check_device(name: str | None, warn: Callable[[str], None]) -> None:
    """Raises UserError where the harness asks for another device than JAX has chosen."""
    platform = memory.device().platform
    names = {"cpu": ("cpu",), "gpu": ("gpu", "cuda", "cuda:0")}.get(platform, (platform,))
    if name is None or name in names:
        return
    if name != "cuda:0":  # what lm_eval says where nobody says anything
        raise UserError(
            f"device is {name!r}, but JAX runs on the {platform}; JAX_PLATFORMS and "
            "CUDA_VISIBLE_DEVICES choose another."
        )
    warn(f"JAX runs on the {platform}, not on lm_eval's {name}.")


def slots(batch_size: int | str, max_batch_size: int | str | None) -> int | None:
    """Texts that are generated at the same time; None for as many as suit the device.

    Raises:
        UserError: a size is no positive number or `auto`, or a maximum stands beside a number.
    """
    automatic = str(batch_size).partition(":")[0] == "auto"  # auto:4 measures more often
    if not automatic:
        if max_batch_size is not None:
            raise UserError(
                f"max_batch_size={max_batch_size} needs batch_size=auto, but it is {batch_size}."
            )
        return positive("batch_size", batch_size, choices.MOST_SLOTS)
    if max_batch_size is None:
        return None
    usual = shapes_for(memory.device().platform).slots
    return min(usual, positive("max_batch_size", max_batch_size))


def _near(name: str, known: Iterable[str]) -> str:
    names = list(known)
    found = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {found[0]}?" if found else f"there are {', '.join(names)}."
