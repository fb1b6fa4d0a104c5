"""What a user asks -> the ids that the model goes on from: a chat, plain text, or a gap in one."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, TypeGuard, Unpack, cast

from qwen_jax.errors import UserError
from qwen_jax.text.chat import render_chat
from qwen_jax.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
"""One chat message: {"role": "user", "content": "..."}."""


Prompt = str | Sequence[Message] | Sequence[int]
"""A user's message, a whole chat, or token ids, which are put to the model as they are."""


def prompts_in(given: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """The prompts that somebody gave, and whether they are a list of them. A list of messages is a
    chat, and one of whole numbers a prompt's ids."""
    if isinstance(given, str) or not all(map(_is_prompt, given)):
        return [cast(Prompt, given)], False
    return [*cast(Sequence[Prompt], given)], True


def _is_prompt(part: Any) -> bool:
    """And no message, and no id, which an array gives as one of no axis."""
    return isinstance(part, Sequence) or getattr(part, "ndim", 0) == 1


class PromptOptions(TypedDict, total=False):
    """How a prompt is put to the model.

    Attributes:
        system: the system prompt; without one the chat template decides.
        raw: continue the text, without a chat around it.
        suffix: write what stands between the prompt and this text (fill in the middle).
        tools: JSON schemas of functions that the model may call, as OpenAI's API takes them.
        continue_final_message: go on with the chat's last message instead of answering it; the
            completion is what is added to it.
    """

    system: str | None
    raw: bool
    suffix: str | None
    tools: Sequence[Mapping[str, Any]] | None
    continue_final_message: bool


def prompt_ids(
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    system: str | None = None,
    raw: bool = False,
    suffix: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    continue_final_message: bool = False,
    source: str = "the model",
) -> list[int]:
    """The ids of a prompt as the model will see them.

    Args:
        prompt: the others are those of `PromptOptions`.
        source: the model's name, for messages.

    Raises:
        UserError: the chat is malformed, or arguments don't fit one another or the model.
    """
    check(
        prompt,
        system=system,
        raw=raw,
        suffix=suffix,
        tools=tools,
        continue_final_message=continue_final_message,
    )
    if _are_ids(prompt):
        return [int(token) for token in prompt]
    if suffix is not None:
        return _infill(tokenizer, str(prompt), suffix, source)
    if raw:
        return tokenizer.encode(str(prompt), add_special_tokens=True)
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if system is not None:
        chat = [{"role": "system", "content": system}, *chat]
    text = render_chat(
        tokenizer.template_for(tools),
        cast(Sequence[Message], chat),
        continue_final_message=continue_final_message,
        tools=tools,
        special_tokens=tokenizer.special_tokens,
        source=source,
    )
    return tokenizer.encode(text)


def _are_ids(prompt: Prompt) -> TypeGuard[Sequence[int]]:
    several = not isinstance(prompt, str) and len(prompt) > 0
    return several and not isinstance(prompt[0], str | Mapping)


def check(prompt: Prompt, **options: Unpack[PromptOptions]) -> None:
    """Raises UserError for an empty text, and for options that don't fit one another or the prompt,
    whatever the model."""
    if _are_ids(prompt):
        if given := [name for name, value in options.items() if value not in (None, False)]:
            raise UserError(
                f"Token ids are put to the model as they are; leave out {' and '.join(given)}, or "
                "give a text or messages."
            )
        return
    if isinstance(prompt, str) and not prompt and options.get("suffix") is None:
        raise UserError("The prompt is empty; ask something.")
    continued = options.get("continue_final_message")
    of_chat = (
        not isinstance(prompt, str)
        or options.get("system") is not None
        or bool(options.get("tools"))
        or continued
    )
    suffix = options.get("suffix")
    if suffix is not None and (of_chat or not isinstance(suffix, str)):
        raise UserError(
            "A suffix is a text that follows one other text, without messages, a system prompt or "
            "tools.",
            field="suffix",
        )
    if suffix is None and options.get("raw") and of_chat:
        raise UserError("A raw prompt is one text, without messages, a system prompt or tools.")
    if isinstance(prompt, str):
        if continued:
            raise UserError(
                "continue_final_message needs a chat, whose last message it continues; give "
                "messages, or continue a text with raw."
            )
    elif options.get("system") is not None and any(
        isinstance(message, Mapping) and message.get("role") == "system" for message in prompt
    ):
        raise UserError("The chat has a system message of its own; leave out the other.")


def own_stop_ids(tokenizer: Tokenizer, prompt: Sequence[int]) -> tuple[int, ...]:
    """Ids that end what follows this prompt besides the model's: those of a gap in a text, where
    the prompt has one of its tokens. So llama.cpp ends one; transformers knows none of this."""
    fim = tokenizer.fim
    if fim is None or set(dataclasses.astuple(fim)).isdisjoint(prompt):
        return ()
    return tokenizer.fim_stop_ids


def _infill(tokenizer: Tokenizer, prefix: str, suffix: str, source: str) -> list[int]:
    """Qwen2.5-Coder's order. The pieces are text: what looks like a control token is spelt out."""
    fim = tokenizer.fim
    if fim is None:
        raise UserError(
            f"{source}: the model has no tokens for filling in the middle, so it can't take a "
            "suffix; choose a Coder model, or leave the suffix out.",
            field="suffix",
        )
    before, after = (tokenizer.encode(text, parse_special=False) for text in (prefix, suffix))
    begin = tokenizer.encode("", add_special_tokens=True)
    return [*begin, fim.prefix, *before, fim.suffix, *after, fim.middle]
