"""Completions and pieces of text -> objects of OpenAI's API."""

import dataclasses
import math
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from qwen_jax.completions import Completion, Piece, TokenLogprob
from qwen_jax.scoring import Score
from qwen_jax.serving.asked import Asked
from qwen_jax.serving.tool_calls import Call, ToolCalls
from qwen_jax.text.streaming import TextStream
from qwen_jax.text.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0
"""In place of minus infinity, which JSON has not; as OpenAI has it."""


class Reply:
    """The answer to a body, whole or in pieces.

    Args:
        asked: the body.
        tokenizer: names tokens where log-probabilities are asked for.
        model: its name.
    """

    prefix = kind = chunk_kind = ""

    def __init__(self, asked: Asked, tokenizer: Tokenizer, model: str):
        self._asked, self._tokenizer = asked, tokenizer
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }
        self._ended: dict[int, Completion] = {}

    @property
    def counts(self) -> bool:
        """Whether a stream ends with the usage."""
        return self._asked.usage

    def usage(self) -> dict[str, Any]:
        """Tokens of the prompts, each counted once, and of all answers."""
        prompt = sum(c.prompt_tokens for i, c in self._ended.items() if i % self._asked.n == 0)
        answers = sum(len(completion.tokens) for completion in self._ended.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answers,
            "total_tokens": prompt + answers,
        }

    def repeat(self, prompt: Sequence[int]) -> None:
        """The next prompt, which comes before its answers."""
        raise NotImplementedError

    def score(self, prompt: int, score: Score) -> None:
        """Notes the log-probabilities of one of the prompts that are repeated."""
        raise NotImplementedError

    def end(self, index: int, completion: Completion) -> None:
        """Notes an answer that is whole."""
        self._ended[index] = completion

    def whole(self) -> dict[str, Any]:
        """The object of all answers, once each has ended."""
        choices = [self.choice(i, self._ended[i]) for i in range(len(self._ended))]
        return {**self._head, "object": self.kind, "choices": choices, "usage": self.usage()}

    def begin(self) -> Iterator[dict[str, Any]]:
        """Choices that come before any text."""
        yield from ()

    def chunk(self, *choices: dict[str, Any], usage: bool = False) -> dict[str, Any]:
        """One object of a stream."""
        found = {**self._head, "object": self.chunk_kind, "choices": list(choices)}
        if self._asked.usage:
            found["usage"] = self.usage() if usage else None
        return found

    def choice(self, index: int, completion: Completion) -> dict[str, Any]:
        """One answer."""
        raise NotImplementedError

    def delta(self, index: int, piece: Piece) -> Iterator[dict[str, Any]]:
        """What a piece adds to one answer."""
        raise NotImplementedError

    def _name(self, token: int) -> str:
        return self._tokenizer.token_bytes(token).decode("utf-8", errors="replace")

    def _shown(
        self, logprobs: Sequence[TokenLogprob] | None, over: str | None
    ) -> Sequence[TokenLogprob] | None:
        """Without the token that ends the text and is not in it."""
        stops = self._tokenizer.stop_ids
        if logprobs and over == "stop" and logprobs[-1].token in stops:
            return logprobs[:-1]
        return logprobs


class Offsets:
    """Where tokens begin in their text, in its characters: one that goes on with a character's
    bytes begins where that does, and one that is not shown where the next does.

    Args:
        at: where the text begins.
        skip_special: control tokens are not shown.
    """

    def __init__(self, tokenizer: Tokenizer, at: int = 0, *, skip_special: bool = True):
        self._stream, self._at = TextStream(tokenizer, skip_special=skip_special), at

    def of(self, tokens: Iterable[int]) -> list[int]:
        """Those of the next tokens."""
        found = []
        for token in tokens:
            found.append(self._at)
            self._at += len(self._stream.feed([token]))
        return found


class TextReply(Reply):
    """Of /v1/completions."""

    prefix = "cmpl"
    kind = chunk_kind = "text_completion"

    def __init__(self, asked: Asked, tokenizer: Tokenizer, model: str):
        super().__init__(asked, tokenizer, model)
        self._offsets: dict[int, Offsets] = {}
        self._lengths: dict[int, int] = {}  # of texts that have been streamed so far
        self._prompts: list[Sequence[int]] = []
        self._scores: dict[int, Score] = {}

    def repeat(self, prompt: Sequence[int]) -> None:
        if self._asked.silent:
            logprobs = () if self._asked.scores else None
            for _ in range(self._asked.n):
                index = len(self._ended)
                self.end(index, Completion("", (), "length", len(prompt), logprobs))
        self._prompts.append(prompt)

    def score(self, prompt: int, score: Score) -> None:
        self._scores[prompt] = score

    def choice(self, index: int, completion: Completion) -> dict[str, Any]:
        text, reason = completion.text, completion.finish_reason
        shown: Sequence[TokenLogprob] | None = completion.logprobs
        offsets: Sequence[int] = ()
        if self._asked.echo:
            place = index // self._asked.n
            prompt = self._prompts[place]
            before = self._tokenizer.decode(prompt, skip_special=False)
            text = before + text
            # Of all tokens: who counts them would miss the one that ends the text.
            if shown is not None:
                offsets = [
                    *Offsets(self._tokenizer, skip_special=False).of(prompt),
                    *Offsets(self._tokenizer, len(before)).of(entry.token for entry in shown),
                ]
                shown = (*self._echoed(prompt, self._scores.get(place)), *shown)
        else:
            shown = self._shown(shown, reason)
            offsets = Offsets(self._tokenizer).of(entry.token for entry in shown or ())
        return {
            "index": index,
            "text": text,
            # What a stop string cuts off begins where the text ends.
            "logprobs": self._logprobs(shown, [min(at, len(text)) for at in offsets]),
            "finish_reason": reason,
        }

    def _echoed(self, prompt: Sequence[int], score: Score | None) -> Iterator[TokenLogprob]:
        """A prompt's tokens; nothing comes before the first one, which has no probability."""
        yield TokenLogprob(prompt[0], math.nan)
        if score is None:  # There is no other.
            return
        wanted = self._asked.options["top_logprobs"]
        for token, own, best, first in zip(prompt[1:], *score[:3], strict=True):
            # Where two tokens have one name, that of the likeliest counts.
            entries = ((token, float(own)), (int(first), float(best)))
            yield TokenLogprob(token, float(own), entries if wanted else ())

    def delta(self, index: int, piece: Piece) -> Iterator[dict[str, Any]]:
        text = piece.text
        shown = self._shown(text.logprobs, text.finish_reason)
        counted = self._offsets.setdefault(index, Offsets(self._tokenizer))
        offsets = counted.of(entry.token for entry in shown or ())
        self._lengths[index] = length = self._lengths.get(index, 0) + len(text)
        if text.finish_reason is not None:
            offsets = [min(at, length) for at in offsets]
        yield {
            "index": index,
            "text": str(text),
            "logprobs": self._logprobs(shown, offsets),
            "finish_reason": text.finish_reason,
        }

    def _logprobs(
        self, entries: Sequence[TokenLogprob] | None, offsets: Sequence[int]
    ) -> dict[str, Any] | None:
        if entries is None:
            return None
        return {
            "tokens": [self._name(entry.token) for entry in entries],
            "token_logprobs": [
                None if math.isnan(entry.logprob) else _finite(entry.logprob) for entry in entries
            ],
            "top_logprobs": [
                None
                if math.isnan(entry.logprob)
                else {self._name(token): _finite(logprob) for token, logprob in entry.top}
                for entry in entries
            ],
            "text_offset": offsets,
        }


class ChatReply(Reply):
    """Of /v1/chat/completions."""

    prefix, kind = "chatcmpl", "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, asked: Asked, tokenizer: Tokenizer, model: str):
        super().__init__(asked, tokenizer, model)
        self._calls: dict[int, ToolCalls] = {}

    def begin(self) -> Iterator[dict[str, Any]]:
        for index in range(self._asked.answers):
            yield _delta(index, {"role": "assistant", "content": ""})

    def choice(self, index: int, completion: Completion) -> dict[str, Any]:
        reason, text, calls = completion.finish_reason, completion.text, list[Call]()
        if self._asked.tools:
            parser = self._parser()
            (shown, _), (rest, _) = parser.feed(text), parser.finish()
            text, calls = shown + rest, parser.calls
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": [call.as_json() for call in calls]}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(self._shown(completion.logprobs, reason)),
            "finish_reason": "tool_calls" if calls and reason == "stop" else reason,
        }

    def delta(self, index: int, piece: Piece) -> Iterator[dict[str, Any]]:
        text, reason = str(piece.text), piece.text.finish_reason
        logprobs = self._logprobs(self._shown(piece.text.logprobs, reason))
        calls: list[Call] = []
        first = 0
        if self._asked.tools:
            parser = self._calls.setdefault(index, self._parser())
            first = len(parser.calls)
            text, calls = parser.feed(text)
            if reason is not None:
                rest, more = parser.finish()
                text, calls = text + rest, calls + more
        if text or logprobs:
            yield _delta(index, {"content": text}, logprobs)
        for number, call in enumerate(calls, start=first):
            yield _delta(index, {"tool_calls": [{"index": number, **call.as_json()}]})
        if reason is not None:
            called = self._asked.tools and self._calls[index].calls and reason == "stop"
            yield _delta(index, {}, None, "tool_calls" if called else reason)

    def _parser(self) -> ToolCalls:
        return ToolCalls(None if self._asked.parallel else 1)

    def _logprobs(self, entries: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        if entries is None:
            return None
        content = [
            {
                **self._entry(entry.token, entry.logprob),
                "top_logprobs": [self._entry(token, logprob) for token, logprob in entry.top],
            }
            for entry in entries
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        content = list(self._tokenizer.token_bytes(token))
        return {"token": self._name(token), "logprob": _finite(logprob), "bytes": content}


def _delta(
    index: int,
    delta: dict[str, Any],
    logprobs: dict[str, Any] | None = None,
    reason: str | None = None,
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


@dataclasses.dataclass(frozen=True)
class Models:
    """The one model that there is, as /v1/models lists it."""

    name: str
    created: int
    context: int

    def entry(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "qwen_jax",
            "max_model_len": self.context,
        }
