"""A body of JSON -> what is asked of the engine."""

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, cast

from qwen_jax.api import Model
from qwen_jax.choices import check_max_tokens
from qwen_jax.engine.sampling import Sampling
from qwen_jax.options import Options, prompt_options
from qwen_jax.prompt_lines import bias_of
from qwen_jax.requests import Request, reseeded
from qwen_jax.serving import fields
from qwen_jax.serving.fields import with_param
from qwen_jax.serving.refusal import RefusalError
from qwen_jax.serving.tool_calls import forced
from qwen_jax.strict_json import written
from qwen_jax.text.constraint import Constraint, check_installed, constraint_of
from qwen_jax.text.prompt import Prompt, prompts_in
from qwen_jax.text.streaming import stops_of

MOST_SAMPLES = 128
"""Of a prompt, as OpenAI has it."""
MOST_STOPS = 16
"""Each is looked for in all of the text."""
MOST_TOP = 20
"""Of the likeliest tokens, as OpenAI has it."""
MOST_BIAS = 100.0
"""As OpenAI has it; from there on a token is as good as banned, or forced."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """A body, checked as far as that is possible without the model.

    Attributes:
        prompts: one of a chat; of a completion one or several.
        options: how they are put and answered.
        where: the field that has them.
        held: the field that says what answers are held to, if any.
        n: samples of each.
        stream: pieces as they come.
        usage: a last piece that counts tokens.
        tools: calls of tools are looked for in the answer.
        parallel: several calls of tools may be in one answer.
        echo: prompts are repeated before their answers, with log-probabilities where these have
            some.
        silent: there are no answers, only prompts repeated.
    """

    prompts: list[Prompt]
    options: Options
    where: str
    held: str | None = None
    n: int = 1
    stream: bool = False
    usage: bool = False
    tools: bool = False
    parallel: bool = True
    echo: bool = False
    silent: bool = False

    @property
    def answers(self) -> int:
        return len(self.prompts) * self.n

    @property
    def scores(self) -> bool:
        """Whether prompts have log-probabilities."""
        return self.echo and self.options.get("top_logprobs") is not None

    def requests(self, model: Model, most: int | None) -> list[Request]:
        """The samples of each prompt, as ids.

        Args:
            most: tokens that a prompt may have.

        Raises:
            RefusalError: the model can't take it, or a prompt is too long.
        """
        found: list[Request] = []
        for prompt in self.prompts:
            put = prompt_options(self.options)
            tokens = with_param(self.where, model.tokens, prompt, **put)
            request = with_param(self.held, model.request_of, tokens, self.options)
            new = 0 if self.silent else request.max_tokens
            with_param(self.where, model.engine.room, tokens, new)
            if most is not None and len(tokens) > most:
                raise RefusalError(
                    400,
                    f"The prompt has {len(tokens)} tokens, but this server takes {most} at most; "
                    "shorten it.",
                    param=self.where,
                    code="context_length_exceeded",
                )
            found += reseeded([request] * self.n)
        return found


def chat(body: Mapping[str, Any], defaults: Options, *, draw: bool = True) -> Asked:
    """What a body of /v1/chat/completions asks for.

    Args:
        defaults: how it is answered where it doesn't say.
        draw: a seed that it doesn't name; else it is that of the defaults.

    Raises:
        RefusalError, UserError: it is not what it must be.
    """
    given = fields.read(body, fields.CHAT)
    if "messages" not in given:
        raise RefusalError(400, "messages is missing; give a list of messages.", param="messages")
    if "max_completion_tokens" in given:
        if "max_tokens" in given:
            text = "max_tokens and max_completion_tokens mean the same; give one of them."
            raise RefusalError(400, text, param="max_tokens")
        given["max_tokens"] = given["max_completion_tokens"]
    top = given.get("top_logprobs")
    if top is not None and not given.get("logprobs"):
        text = "top_logprobs needs logprobs; set it to true."
        raise RefusalError(400, text, param="top_logprobs")
    if given.get("logprobs"):
        given["top"] = _from_to("top_logprobs", 0 if top is None else top, 0, MOST_TOP)
    options, held = _options(given, defaults, draw)
    tools = _tools(given)
    if tools:
        options["tools"] = tools
        if (calls := _forced(given, tools)) is not None:
            if held is not None:
                text = f"tool_choice forces a call, which is no {held}; give one of them."
                raise RefusalError(400, text, param="tool_choice")
            options["constraint"], held = calls, "tool_choice"
    if given.get("continue_final_message"):
        options["continue_final_message"] = True
    return Asked(
        [cast(Prompt, given["messages"])],
        options,
        "messages",
        held,
        **_delivery(given),
        tools=bool(tools),
        parallel=given.get("parallel_tool_calls", True),
    )


def text(body: Mapping[str, Any], defaults: Options, *, draw: bool = True) -> Asked:
    """What a body of /v1/completions asks for; as `chat`."""
    given = fields.read(body, fields.TEXT)
    if "prompt" not in given:
        raise RefusalError(400, "prompt is missing; give a text, or token ids.", param="prompt")
    prompts, _ = prompts_in(given["prompt"])
    if not prompts or any(len(cast(Any, prompt)) == 0 for prompt in prompts):
        raise RefusalError(400, "prompt is empty; give a text, or token ids.", param="prompt")
    echo, silent = given.get("echo", False), given.get("max_tokens") == 0
    if "logprobs" in given:
        given["top"] = _from_to("logprobs", given["logprobs"], 0, 1 if echo else MOST_TOP)
    if silent and echo:
        del given["max_tokens"]
    if echo and given.get("stream"):
        raise RefusalError(400, "echo is for whole answers; leave stream out.", param="echo")
    options, held = _options(given, defaults, draw)
    if "suffix" in given:
        if echo:
            raise RefusalError(400, "echo and suffix exclude each other.", param="echo")
        options["suffix"] = given["suffix"]
    elif isinstance(prompts[0], str):
        options["raw"] = True
    delivery = _delivery(given)
    return Asked(prompts, options, "prompt", held, **delivery, echo=echo, silent=silent and echo)


def tokens(body: Mapping[str, Any], model: Model) -> list[int]:
    """The ids that a body of /tokenize asks for: of a text as it is, or of a chat.

    Raises RefusalError, UserError."""
    given = fields.read(body, fields.TOKENIZE)
    if ("prompt" in given) == ("messages" in given):
        raise RefusalError(400, "Give either prompt, a text, or messages, a chat.", param="prompt")
    if "messages" in given:
        if "add_special_tokens" in given:
            text = "A chat's template has its special tokens; leave add_special_tokens out."
            raise RefusalError(400, text, param="add_special_tokens")
        put = {k: given[k] for k in ("tools", "continue_final_message") if k in given}
        _check_tools(given)
        found: list[int] = with_param("messages", model.tokens, given["messages"], **put)
        return found
    for name in ("tools", "continue_final_message"):
        if name in given:
            raise RefusalError(400, f"{name} belongs to messages; leave it out.", param=name)
    special = given.get("add_special_tokens", True)
    return model.tokenizer.encode(given["prompt"], add_special_tokens=special)


def text_of(body: Mapping[str, Any], model: Model) -> str:
    """What a body of /detokenize asks for, control tokens included. Raises RefusalError, UserError
    where it names no tokens."""
    given = fields.read(body, fields.DETOKENIZE)
    if "tokens" not in given:
        raise RefusalError(400, "tokens is missing; give token ids.", param="tokens")
    found: str = with_param("tokens", model.tokenizer.decode, given["tokens"], False)
    return found


def _options(given: Mapping[str, Any], defaults: Options, draw: bool) -> tuple[Options, str | None]:
    """How to answer, and the field that says what answers are held to, if any."""
    options = Options(**defaults)
    if "max_tokens" in given:
        with_param("max_tokens", check_max_tokens, given["max_tokens"])
        options["max_tokens"] = given["max_tokens"]
    options["sampling"] = _sampling(given, defaults["sampling"], draw)
    if "stop" in given:
        stop = given["stop"]
        if not isinstance(stop, str) and len(stop) > MOST_STOPS:
            text = f"stop has {len(stop)} texts; give {MOST_STOPS} at most."
            raise RefusalError(400, text, param="stop")
        options["stop"] = with_param("stop", stops_of, stop)
    if "stop_ids" in given:
        options["stop_ids"] = given["stop_ids"]
    constraint, held = _constraint(given)
    if constraint is not None:
        options["constraint"] = constraint
    if "top" in given:
        options["top_logprobs"] = given["top"]
    return options, held


def _sampling(given: Mapping[str, Any], defaults: Sampling, draw: bool) -> Sampling:
    """The body's, over the defaults. Who asks a server twice, with a temperature and without a
    seed, wants two answers."""
    own = {name: given[name] for name in fields.SAMPLING if name in given}
    if "logit_bias" in own:
        bias = own["logit_bias"] = with_param("logit_bias", bias_of, own["logit_bias"])
        for token, value in bias.items():
            if not abs(value) <= MOST_BIAS:
                text = f"logit_bias of {token} is {value}, but it must be from -100 to 100."
                raise RefusalError(400, text, param="logit_bias")
    if "seed" in own:
        own["seed"] %= 2**32
    elif draw:
        own["seed"] = secrets.randbits(32)
    replaced: Sampling = with_param(None, dataclasses.replace, defaults, **own)
    return replaced


def _constraint(given: Mapping[str, Any]) -> tuple[Constraint | None, str | None]:
    """What the answer is held to, by response_format or a field of its own; and that field."""
    asked = {name: given[name] for name in ("regex", "choice", "lark") if name in given}
    names = list(asked)
    if form := _response_format(given):
        asked |= form
        names.append("response_format")
    if not names:
        return None, None
    found: Constraint | None = with_param(names[-1], constraint_of, asked)
    with_param(names[-1], check_installed)
    return found, names[-1]


def _response_format(given: Mapping[str, Any]) -> dict[str, Any]:
    """What `constraint_of` calls it; nothing where it is text."""
    where = "response_format"
    if where not in given:
        return {}
    form = fields.read(given[where], fields.RESPONSE_FORMAT, f"{where}.")
    kind = form.get("type")
    if kind not in ("text", "json_object", "json_schema"):
        has = "has no type" if kind is None else f"has the type {kind!r:.60}"
        text = f"response_format {has}; give text, json_object or json_schema."
        raise RefusalError(400, text, param=f"{where}.type")
    inner = f"{where}.json_schema"
    if kind != "json_schema":
        if "json_schema" in form:
            text = f"{inner} does nothing with the type {kind!r}; set the type to 'json_schema'."
            raise RefusalError(400, text, param=inner)
        return {"json_object": True} if kind == "json_object" else {}
    found = fields.read(form.get("json_schema", {}), fields.JSON_SCHEMA, f"{inner}.")
    if "schema" not in found:
        raise RefusalError(400, f"{inner} has no schema; give one.", param=inner)
    return {"json_schema": found["schema"]}


def _delivery(given: Mapping[str, Any]) -> dict[str, Any]:
    wanted: dict[str, Any] = {"n": _from_to("n", given.get("n", 1), 1, MOST_SAMPLES)}
    wanted["stream"] = given.get("stream", False)
    if "stream_options" in given:
        if not wanted["stream"]:
            text = "stream_options needs stream; set it to true."
            raise RefusalError(400, text, param="stream_options")
        options = fields.read(given["stream_options"], fields.STREAM_OPTIONS, "stream_options.")
        wanted["usage"] = options.get("include_usage", False)
    return wanted


def _tools(given: Mapping[str, Any]) -> Sequence[Mapping[str, Any]] | None:
    """The tools that the model is to be shown."""
    choice, tools = given.get("tool_choice", "auto"), given.get("tools")
    _check_tools(given)
    if choice == "none" or (choice == "auto" and not tools):
        return None
    if not tools:
        raise RefusalError(400, "tool_choice needs tools; give some.", param="tool_choice")
    return tools


def _check_tools(given: Mapping[str, Any]) -> None:
    """Raises RefusalError where one is no function, or has a field that there is not. Both forms
    are taken, the function apart and its fields beside the type."""
    for index, tool in enumerate(given.get("tools", ())):
        where = f"tools[{index}]."
        apart = "function" in tool
        read = fields.read(tool, fields.TOOL if apart else fields.TOOL | fields.FUNCTION, where)
        if apart and "function" in read:
            fields.read(read["function"], fields.FUNCTION, f"{where}function.")
        if read.get("type", "function") != "function":
            text = f"{where}type is {read['type']!r:.60}, but Qwen2.5 calls functions alone."
            raise RefusalError(400, text, param=f"{where}type")


def _forced(given: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> Constraint | None:
    """What makes of the answer calls of tools, where tool_choice asks for that."""
    choice = given.get("tool_choice", "auto")
    if choice == "auto":
        return None
    name = None
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        read = fields.read(choice, fields.TOOL_CHOICE, "tool_choice.")
        function = read.get("function", {})
        name = fields.read(function, fields.CHOSEN, "tool_choice.function.").get("name")
    if choice != "required" and not isinstance(name, str):
        text = (
            f"tool_choice is {written(choice)}; give 'none', 'auto', 'required', or "
            '{"type": "function", "function": {"name": …}}.'
        )
        raise RefusalError(400, text, param="tool_choice")
    several = name is None and given.get("parallel_tool_calls", True)
    with_param("tool_choice", check_installed)
    found: Constraint = with_param("tool_choice", forced, tools, name, several)
    return found


def _from_to(name: str, value: int, least: int, most: int) -> int:
    if not least <= value <= most:
        text = f"{name} is {value}, but it must be from {least} to {most}."
        raise RefusalError(400, text, param=name)
    return value
