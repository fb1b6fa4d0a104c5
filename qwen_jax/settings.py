"""The default config of `run.py`, and what it means: ml_collections in, our types out.

Light on purpose: `--help` and a refused flag must not wait for JAX.
"""

import dataclasses
import functools
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from qwen_jax import hints
from qwen_jax.errors import UserError


def get_config() -> ConfigDict:
    """Every setting with its default: the bundled model writes a haiku, greedily."""
    return ConfigDict(
        {
            # A GGUF file, a Hugging Face directory, a name on the Hub as
            # hf:owner/repo[@revision][:quant], or the bundled model.
            "model": "haiku",
            # LoRA adapters merged into it: PEFT directories, LoRA GGUF files, or hf:owner/repo.
            "adapter": (),
            "sha256": placeholder(str),
            "dtype": "auto",
            # On a CPU: packed keeps matrices in the file's blocks, expanded makes numbers of them,
            # auto packs where numbers would take more than 3/4 of the free memory.
            "weights": "auto",
            "implementation": "auto",
            "matmul_precision": "highest",
            # One prompt, or a file of them: one a line, .jsonl with one object a line, or a .json
            # array; - is stdin.
            "prompt": placeholder(str),
            "prompt_file": placeholder(str),
            "system": placeholder(str),
            "raw": False,
            # The text after the cursor, where --prompt is the one before it (Coder models).
            "suffix": placeholder(str),
            # A file of JSON: a list of functions that the model may call, as OpenAI's API takes it.
            "tools": placeholder(str),
            # Go on with a chat's last message instead of answering it.
            "continue_final_message": False,
            "max_tokens": 256,
            # Texts and token ids, as in "13,198", that end the answer besides the model's own.
            "stop": (),
            "stop_ids": "",
            "n": 1,
            # Texts that are generated at the same time; by default what suits the device.
            "slots": placeholder(int),
            # Devices: tp=2 deals the model out to two, dp=2 has it twice; dp=2,tp=2 takes four.
            "mesh": placeholder(str),
            # Hosts that have the mesh together: auto, as Slurm, Open MPI or Kubernetes says, or
            # ADDRESS:PORT,I/N, of the first one, and which of N this is.
            "hosts": placeholder(str),
            # Whether a text is, bit for bit, the same whatever runs beside it; by default only in
            # experiments, where a run that was cut short must come out as if it hadn't been.
            "batch_invariant": placeholder(bool),
            # Several tokens a step, the same ones as without: none, lookup (in prompt and answer),
            # draft (by a smaller model of the same vocabulary); and how many of a text at most.
            "speculate": {
                "method": "none",
                "draft_model": placeholder(str),
                "tokens": placeholder(int),
            },
            # JSON lines: of a prompt file's answers, instead of stdout; as they finish, or in the
            # file's order. Of certify, the certificate.
            "output": placeholder(str),
            "ordered": False,
            # Go on with `output` where a run was cut short.
            "resume": False,
            # Whether one prompt of a file that is wrong ends the run; else its line says why.
            "strict": False,
            # Log-probabilities of the chosen token and of this many of the likeliest.
            "top_logprobs": placeholder(int),
            # none or model: whether what the model recommends (generation_config.json, or
            # general.sampling.* of a GGUF) holds where neither a flag nor a config says anything.
            "generation_config": "none",
            "sampling": {
                "temperature": 0.0,
                "top_k": 0,
                "top_p": 1.0,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                # Pairs of token id and number, as in "42:-1.5,7:3".
                "logit_bias": "",
                "seed": 0,
            },
            # What all of an answer must be, as far as max_tokens reach: one of these. Schema and
            # grammar are files.
            "constrain": {
                "json_schema": placeholder(str),
                "json_object": False,
                "regex": placeholder(str),
                "choice": (),
                "lark": placeholder(str),
            },
            # What generate records of its run: a file, globs over names, positions as a slice.
            "trace": {"file": placeholder(str), "names": "*", "positions": ":"},
            # Where records and reports go.
            "workdir": placeholder(str),
            # What compare holds against what.
            "compare": {
                # A trace, or another engine's dump; without one, this engine as set above.
                "candidate": placeholder(str),
                # Ids of the text, as in "2046,299,10"; without them, those of the prompt.
                "tokens": placeholder(str),
                # Of the text's tokens, so many enter last and one by one, as in decoding.
                "decode_tokens": 16,
                # float64, hf, llamacpp, or a trace.
                "reference": "float64",
                # Of tensors, weights, text, cache, distribution, precision, machine, inside, with
                # commas; logprobs is the one of two logs, quantisation that of a file and its base.
                "parts": placeholder(str),
                # Numbers of rows of the decode steps that inside records, and which layers.
                "inside": {"rows": "1,8,64", "layers": ":"},
                # Two logs of log-probabilities, "a.jsonl,b.jsonl" (docs/logprobs.md); with a model
                # they are held against it.
                "logprobs": placeholder(str),
                # Faults to plant in this engine first, as in "zero_qkv_bias,rope_interleaved@3".
                "plant": placeholder(str),
                "list_faults": False,
                # Exit code 1 where one holds, as in "faults > 0, mean_kld > 0.01".
                "fail_if": placeholder(str),
                # What distribution compares with: a saved base, or settings that differ.
                "base": {
                    "file": placeholder(str),
                    "model": placeholder(str),
                    "dtype": placeholder(str),
                    "weights": placeholder(str),
                    "implementation": placeholder(str),
                    "matmul_precision": placeholder(str),
                },
                "save_base": placeholder(str),
                # Text of distribution, precision and quantisation, and the tokens of one window.
                "text": placeholder(str),
                "context": 512,
                # The mean KL divergence that precision searches for, in nats, and the dtype of
                # what need not be float32.
                "precision_kld": 1e-3,
                "precision_dtype": "bfloat16",
                # Of quantisation: forward passes of the text to take at most, and the types that
                # tensors are moved up to, one at a time.
                "passes": 400,
                "upgrades": "Q6_K,Q8_0",
            },
            # A certificate to compute again, from the inputs that it names.
            "certify": {"verify": placeholder(str)},
            # What each point of an experiment does.
            "experiment": {
                # generate, likelihood (of each line's answer), perplexity, compare, bench (speed of
                # the engine), serve (of requests), eval, or module:Class of your own.
                "task": "generate",
                # The model is turned into this GGUF type first.
                # Of keys and values: float32, bfloat16 or float16; by default as the parameters.
                "cache_dtype": placeholder(str),
                "quantization": placeholder(str),
                # Makes the prompt from the fields of a line of JSON, as in "A haiku on {word}."
                "template": placeholder(str),
                # What answers are judged by: names of experiments/scores, or module:function.
                "scores": (),
                # Text of perplexity and compare, and the tokens of one window.
                "text": placeholder(str),
                "context": 512,
                # The point that compare measures against; what is not set is as in the point.
                "reference": {
                    "model": placeholder(str),
                    "quantization": placeholder(str),
                    "dtype": placeholder(str),
                    "weights": placeholder(str),
                    "implementation": placeholder(str),
                    "matmul_precision": placeholder(str),
                },
                # The model that the score judge asks; what is not set is as in the point. Its
                # prompt is made of a line's fields, {prompt} and {text}, the answer; of its words
                # the first is the better one.
                "judge": {
                    "model": placeholder(str),
                    "quantization": placeholder(str),
                    "dtype": placeholder(str),
                    "weights": placeholder(str),
                    "implementation": placeholder(str),
                    "matmul_precision": placeholder(str),
                    "template": placeholder(str),
                    "words": ("yes", "no"),
                },
                "bench": {"prompt_tokens": 128, "new_tokens": 32, "repeats": 5},
                # The load of the task serve: so many requests, the prompts in turn, that arrive at
                # `rate` a second (Poisson), or whenever one of `concurrency` (by default slots) has
                # its answer; what makes one good, in milliseconds; and how often all of it.
                "serve": {
                    "requests": 64,
                    "rate": placeholder(float),
                    "concurrency": placeholder(int),
                    "good_ttft_ms": 1000.0,
                    "good_tpot_ms": 100.0,
                    "repeats": 3,
                },
                # Tasks of lm-evaluation-harness; `include` is a directory of tasks of your own, and
                # without `shots` each task shows as many examples as it says. The
                # chat template wraps prompts, with `system` and with examples as turns of their
                # own unless fewshot_as_multiturn is False. Of sampling, max_tokens and stop, what
                # is set here or swept wins over the tasks' own, as lm_eval's --gen_kwargs does.
                "eval": {
                    "tasks": (),
                    "shots": placeholder(int),
                    "limit": placeholder(int),
                    "include": placeholder(str),
                    "apply_chat_template": False,
                    "fewshot_as_multiturn": placeholder(bool),
                },
            },
            # What an experiment's report answers: on which metric settings are ranked, what they
            # are compared with, as in "temperature=0" (else the best), and whether higher or lower
            # is better (auto knows the metrics of this program).
            "answer": {
                "metric": placeholder(str),
                "baseline": placeholder(str),
                "better": "auto",
            },
            # The server: what it lets through, and who may ask.
            "serve": {
                "host": "127.0.0.1",
                "port": 8000,
                # What callers call the model; by default its file's name.
                "model_name": placeholder(str),
                # A file with the key that callers have to send; without it none is needed.
                "api_key_file": placeholder(str),
                # Requests that may wait for a slot; more are told to come back.
                "queue": 256,
                # Seconds that an answer may take, waiting included.
                "timeout": 600.0,
                "max_body": 4_000_000,
                # Of one prompt; by default what the context holds.
                "max_prompt_tokens": placeholder(int),
                "log_prompts": False,
            },
            # How an experiment is run; its records are the same whatever stands here.
            "runner": {
                "dry_run": False,
                "shard": placeholder(str),
                "retry_failed": False,
                "profile": False,
                # Seconds after which no more is begun, and what is at work is left for the same
                # command to go on with.
                "max_time": placeholder(float),
                # Leave out further seeds of a setting that is worse than the best so far on
                # answer.metric, and record that.
                "stop_worse": False,
            },
        }
    )


def program() -> str:
    """What the user types to get here, for messages."""
    typed = {"qwen_jax/__main__.py": "python -m qwen_jax", "qwen-jax": "qwen-jax"}
    return next((name for end, name in typed.items() if Path(sys.argv[0]).match(end)), "run.py")


KINDS = {
    bool: "true or false",
    dict: "an object",
    float: "a number",
    int: "a whole number",
    list: "a list",
    str: "text",
    tuple: "a tuple of texts",
}
"""Types of what users give, in words."""


@dataclasses.dataclass(frozen=True)
class Command:
    """What the command line asks for.

    Attributes:
        task: one of `cli.TASKS`.
        config: everything resolved.
        config_file: what `--config` named, `file.py` or `file.py:variant`.
        overrides: fields set by other flags, and their values.
        arguments: what stands after the task.
        typed: the whole line, as it was typed.
    """

    task: str
    config: ConfigDict
    config_file: str | None
    overrides: Mapping[str, Any]
    arguments: tuple[str, ...] = ()
    typed: tuple[str, ...] = ()


def asked(config: ConfigDict, overrides: Collection[str] = ()) -> frozenset[str]:
    """The fields that somebody set: by a flag or a sweep, or to what is not the default."""
    default = _defaults()
    return frozenset(overrides) | {f for f, value in flatten(config) if value != default[f]}


@functools.cache
def type_of(field: str) -> type:
    """The type of a config field, placeholders included."""
    *parents, name = field.split(".")
    config = get_config()
    for parent in parents:
        config = config[parent]
    return config.get_type(name)


def flatten(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field with its dotted name."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


@functools.cache
def _defaults() -> Mapping[str, Any]:
    return dict(flatten(get_config()))


def default_of(field: str) -> Any:
    """Of a field by its dotted name; None for what is none."""
    return _defaults().get(field)


_TEXTS = ("prompt", "system", "suffix")
"""Fields in which nothing is a text, too; whoever takes one says what it must hold."""


def check_filled(said: str, field: str, value: Any) -> None:
    """Raises UserError for an empty value, as of a shell's variable that is not set, where it would
    be the working directory, or no gate; and for a NUL, which is in no file's name.

    Args:
        said: what has set the field, for the message.
    """
    if not isinstance(value, str) or field in _TEXTS:
        return
    if not value and _defaults()[field] != "":
        raise UserError(f"{said} is empty; give it a value, or leave it out.")
    if "\0" in value:
        raise UserError(f"{said} is {value!r:.80}, but it can't hold a NUL character.")


def update(config: ConfigDict, fields: Mapping[str, Any], where: str) -> None:
    """Sets fields by their dotted names. Raises UserError for an unknown name or a wrong type."""
    defaults = _defaults()
    for name, value in fields.items():
        if name not in defaults:
            raise UserError(f"{where} sets {name}, which is no field; {near(str(name))}")
        kind = type_of(name)
        fits = type(value) is kind or (kind is float and type(value) is int)
        if kind is tuple:
            fits = fits and all(isinstance(text, str) for text in value)
        if not (fits or value is None is defaults[name]):
            raise UserError(f"{where} sets {name} to {value!r:.80}, but it must be {KINDS[kind]}.")
        check_filled(f"{name}, which {where} sets,", name, value)
    config.update_from_flattened_dict(dict(fields))


def near(name: str) -> str:
    """What a misspelt field may have meant."""
    found = hints.meant(name, [field for field, _ in flatten(get_config())])
    return f"did you mean {found}?" if found else f"see {program()} --help for the fields."
