"""Our model as lm-evaluation-harness sees one; needs the extra `eval`.

lm_eval --model qwen_jax --model_args model=my.gguf,dtype=bfloat16 --tasks arc_easy
"""

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from qwen_jax import api
from qwen_jax.accuracy.metrics import log_softmax
from qwen_jax.generation import Request
from qwen_jax.sampling import Sampling

_QUIET = not sys.stderr.isatty()
Keep = Callable[[str, dict[str, Any]], None]


@register_model("qwen_jax")
class Harness(TemplateLM):
    """A model for `lm_eval.simple_evaluate`.

    Args:
        model: what `qwen_jax.load` takes, or a loaded model.
        batch_size: rows that generate together.
        answers: responses of an earlier run by the request's key, which are not asked for again.
        keep: hears of each new response, with its key.
        options: further arguments of `qwen_jax.load`.
    """

    def __init__(
        self,
        model: str | api.Model = api.BUNDLED,
        batch_size: int | str = 8,
        *,
        answers: dict[str, Any] | None = None,
        keep: Keep | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ):
        super().__init__()
        self._model = model if isinstance(model, api.Model) else api.load(model, **options)
        self._batch_size = 8 if batch_size == "auto" else int(batch_size)
        self._answers = answers if answers is not None else {}
        self._keep = keep or (lambda key, line: None)

    @property
    def eot_token_id(self) -> int:
        return self._model.engine.stop_ids[0]

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return self._model.config.source

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        return self._model.tokenizer.encode(string)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._model.tokenizer.chat_template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        tokenizer = self._model.tokenizer
        return api.render_chat(
            tokenizer.chat_template,
            chat_history,
            special_tokens=tokenizer.special_tokens,
            source=self._model.config.source,
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """The continuation's log-probability, and whether greedy decoding would write it."""
        found = []
        for texts, context, continuation in tqdm(requests, disable=disable_tqdm or _QUIET):
            key = _key("loglikelihood", texts or (context, continuation))
            if key not in self._answers:
                self._answers[key] = self._score(context, continuation)
                line = {"type": "loglikelihood", "arguments": texts, "response": self._answers[key]}
                self._keep(key, line)
            logprob, greedy = self._answers[key]
            found.append((logprob, greedy))
        return found

    def _score(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        # What doesn't fit is cut off the front, as the harness does everywhere.
        tokens = [*context, *continuation][-(self._model.config.context_length + 1) :]
        ends = tokens[-len(continuation) :]
        logprobs = log_softmax(self._model.logits(tokens[:-1])[-len(ends) :])
        chosen = np.take_along_axis(logprobs, np.array(ends)[:, None], 1)
        return float(chosen.sum()), bool((logprobs.argmax(-1) == ends).all())

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        found = []
        for (text,) in tqdm([r.args for r in requests], disable=disable_tqdm or _QUIET):
            windows = get_rolling_token_windows(
                self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._model.config.context_length,
                context_len=1,
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            scores = self._loglikelihood_tokens(pairs, disable_tqdm=True)
            found.append(sum(logprob for logprob, _ in scores))
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        keys = [_key("generate_until", request.args) for request in requests]
        left = [i for i, key in enumerate(keys) if key not in self._answers]
        quiet = disable_tqdm or _QUIET
        with tqdm(total=len(requests), initial=len(requests) - len(left), disable=quiet) as bar:
            for start in range(0, len(left), self._batch_size):
                part = left[start : start + self._batch_size]
                batch = self._model.batch([self._request(*requests[i].args) for i in part])
                for _ in batch:
                    pass
                for i, completion in zip(part, batch.completions, strict=True):
                    self._answers[keys[i]] = completion.text
                    line = {"arguments": requests[i].args, "response": completion.text}
                    self._keep(keys[i], {"type": "generate_until", **line})
                bar.update(len(part))
        return [self._answers[key] for key in keys]

    def _request(self, context: str, options: dict[str, Any]) -> Request:
        until = options.get("until") or []
        longest = options.get("max_gen_toks", 256)
        room = self._model.config.context_length - longest
        temperature = float(options.get("temperature") or 0) if options.get("do_sample") else 0.0
        return Request(
            self.tok_encode(context)[-max(room, 1) :],
            longest,
            Sampling(temperature=temperature, top_p=float(options.get("top_p", 1.0))),
            [until] if isinstance(until, str) else [text for text in until if text],
        )


def _key(kind: str, arguments: Any) -> str:
    text = json.dumps([kind, arguments], default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
