"""Which fields a body may have: honoured, ignored because they change no answer, or refused."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qwen_jax import hints, strict_json
from qwen_jax.arguments import check
from qwen_jax.errors import UserError
from qwen_jax.serving.refusal import RefusalError

SAMPLING: dict[str, Any] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "logit_bias": Mapping,
    "seed": int,
}
"""Those of how tokens are chosen, and their types."""

_BOTH: dict[str, Any] = {
    "model": str,
    "max_tokens": int,
    "n": int,
    "stop": str | Sequence[str],
    "stop_ids": Sequence[int],
    "stream": bool,
    "stream_options": Mapping,
    "response_format": Mapping,
    "regex": str,
    "choice": Sequence[str],
    "lark": str,
    **SAMPLING,
}
CHAT: dict[str, Any] = {
    **_BOTH,
    "messages": Sequence[Mapping],
    "max_completion_tokens": int,
    "logprobs": bool,
    "top_logprobs": int,
    "tools": Sequence[Mapping],
    "tool_choice": str | Mapping,
    "parallel_tool_calls": bool,
    "continue_final_message": bool,
}
TEXT: dict[str, Any] = {
    **_BOTH,
    "prompt": str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
    "suffix": str,
    "logprobs": int,
    "echo": bool,
}
TOKENIZE: dict[str, Any] = {
    "model": str,
    "prompt": str,
    "messages": Sequence[Mapping],
    "tools": Sequence[Mapping],
    "continue_final_message": bool,
    "add_special_tokens": bool,
}
DETOKENIZE: dict[str, Any] = {"model": str, "tokens": Sequence[int]}
RESPONSE_FORMAT: dict[str, Any] = {"type": str, "json_schema": Mapping}
JSON_SCHEMA: dict[str, Any] = {"name": str, "description": str, "schema": Mapping, "strict": bool}
STREAM_OPTIONS: dict[str, Any] = {"include_usage": bool}
TOOL: dict[str, Any] = {"type": str, "function": Mapping}
FUNCTION: dict[str, Any] = {
    "name": str,
    "description": str,
    "parameters": Mapping,
    "strict": bool,
    "return": Mapping,
}
"""`return` is what transformers' `get_json_schema` makes of a function's."""
TOOL_CHOICE = TOOL
CHOSEN: dict[str, Any] = {"name": str}

IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
"""They name callers and caches of OpenAI's, and change no answer."""


class Refused(NamedTuple):
    """A field of OpenAI's that is not served: values that ask for nothing, and what to do."""

    nothing: tuple[Any, ...]
    way: str


REFUSED = {
    "functions": Refused(([],), "give tools, which replaced it"),
    "function_call": Refused(("none",), "give tool_choice, which replaced it"),
    "audio": Refused((), "Qwen2.5 writes text alone"),
    "modalities": Refused((["text"],), "Qwen2.5 writes text alone"),
    "prediction": Refused((), "leave it out"),
    "reasoning_effort": Refused(("none",), "Qwen2.5 answers without reasoning first"),
    "verbosity": Refused((), "ask for a length in the prompt"),
    "web_search_options": Refused((), "the server reaches no network"),
    "store": Refused((False,), "the server keeps nothing"),
    "service_tier": Refused(("auto", "default"), "there is one tier"),
    "echo": Refused((False,), "only /v1/completions repeats its prompt"),
    "best_of": Refused((1,), "ask for n, and choose by logprobs"),
}


def read(body: Mapping[str, Any], known: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """The fields that are honoured, of their types; null is as if it were not there.

    Args:
        known: their names and types.
        where: of an object inside the body, its name and a dot.

    Raises:
        RefusalError: a field is unknown, refused, or of another type.
    """
    fields = {}
    for name, value in body.items():
        if value is None or (not where and name in IGNORED and name not in known):
            continue
        if name in known:
            with_param(where + name, check, where + name, value, known[name], json=True)
            fields[name] = value
        elif not where and name in REFUSED:
            if value not in REFUSED[name].nothing:
                shown = strict_json.written(value)
                text = f"{name} is {shown}, which is not served; {REFUSED[name].way}."
                raise RefusalError(400, text, param=name, code="unsupported_parameter")
        else:
            meant = hints.meant(name, known)
            way = f"did you mean {meant!r}?" if meant else f"known are {', '.join(known)}."
            text = f"There is no field {where + name!r:.80}; {way}"
            raise RefusalError(400, text, param=where + name[:60], code="unknown_parameter")
    return fields


def with_param(name: str | None, function: Any, *given: Any, **named: Any) -> Any:
    """What a function gives, which checks one field. Raises RefusalError that names the field."""
    try:
        return function(*given, **named)
    except UserError as error:
        raise RefusalError.of(error, name) from error
