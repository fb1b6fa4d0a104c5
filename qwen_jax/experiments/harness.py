"""Our model as lm-evaluation-harness sees one; needs the extra `eval`.

python -m qwen_jax.lm_eval --model qwen_jax --model_args model=my.gguf --tasks arc_easy
"""

import contextlib
import dataclasses
import hashlib
import inspect
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from tqdm import tqdm

from qwen_jax import api, opening
from qwen_jax.completions import Completion
from qwen_jax.errors import UserError
from qwen_jax.experiments import harness_settings
from qwen_jax.requests import Request
from qwen_jax.scoring import Pair
from qwen_jax.text.chat import CHATML_TEMPLATE, render_chat

_QUIET = not sys.stderr.isatty()
Keep = Callable[[str, dict[str, Any]], None]


@register_model("qwen_jax")
class Harness(TemplateLM):
    """A model for `lm_eval.simple_evaluate`; its arguments are those of `--model_args`.

    A request that a task repeats is answered with as many draws. What is drawn follows from `seed`,
    the request and the number of its repeat alone: not from the order of requests nor from those
    that run together. Requests that are equal are repeats of one another.

    Args:
        model: what `qwen_jax.load` takes, or a loaded model.
        batch_size: texts that are generated at the same time, or "auto": as many as suit the
            device. A loaded model has its own number.
        pretrained: another name for `model`, which the harness' own models have.
        max_batch_size: the most that "auto" may be.
        device: JAX chooses it, and the name of another one is refused.
        max_length: tokens of the context, where it is to be shorter than the model's.
        max_gen_toks: the most tokens of an answer, where the task says nothing.
        seed: of what is drawn, where the task says nothing.
        prefix_token_id: what a text without context is conditioned on; if None, what ends a text.
        think_end_token: text or id; what an answer holds up to the last one is dropped.
        generation_config: "model" has what the checkpoint recommends where a task says nothing, as
            the harness' own `hf` always does; "none" has the defaults.
        trust_remote_code: is there for data sets; no code of a model is ever run.
        overrides: generation settings that win over every task's own.
        answers: responses of an earlier run by the request's key, which are not asked for again.
        keep: hears of each new response, with its key.
        options: further arguments of `qwen_jax.load`.

    Raises:
        UserError: an argument is unknown or makes no sense, or the model doesn't load.
    """

    def __init__(
        self,
        model: str | api.Model | None = None,
        batch_size: int | str = "auto",
        *,
        pretrained: str | api.Model | None = None,
        max_batch_size: int | str | None = None,
        device: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
        prefix_token_id: int | None = None,
        think_end_token: str | int | None = None,
        generation_config: str = "none",
        trust_remote_code: bool = False,
        overrides: Mapping[str, Any] | None = None,
        answers: dict[str, Any] | None = None,
        keep: Keep | None = None,
        **options: Any,
    ):
        super().__init__()
        self._warned: set[str] = set()
        harness_settings.check_arguments(options, inspect.signature(Harness).parameters)
        harness_settings.check_device(device, self._warn)
        slots = harness_settings.slots(batch_size, max_batch_size)
        self._max_tokens = harness_settings.positive("max_gen_toks", max_gen_toks)
        self._seed, self._overrides = harness_settings.number("seed", seed, int), overrides or {}
        if None not in (model, pretrained) and model != pretrained:
            raise UserError(f"model={model} and pretrained={pretrained} mean the same; give one.")
        model = pretrained if model is None else model
        if isinstance(model, api.Model):
            given = [*options, *(["batch_size"] if slots is not None else [])]
            if given:
                raise UserError(f"{', '.join(given)} is of a model already loaded; leave it out.")
            self._model = model
        else:
            name = opening.BUNDLED if model is None else model
            self._model = api.load(name, slots=slots, **options)
        most = self._model.config.context_length
        length = most if max_length is None else max_length
        self._context = harness_settings.positive("max_length", length, most)
        self._prefix = self._id("prefix_token_id", prefix_token_id)
        digits = isinstance(think_end_token, int) or (think_end_token or "").isdigit()
        self._think_end = (
            self._id("think_end_token", think_end_token) if digits else think_end_token
        )
        said = self._model.recommended
        self._usual = harness_settings.followed(said, generation_config, self._warn)
        self._answers = answers if answers is not None else {}
        self._keep = keep or (lambda key, line: None)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "Harness":
        """As lm_eval makes a model by its name, just after it has given `--seed` to Python."""
        lasting = random.getstate()
        seed = random.getrandbits(32)
        random.setstate(lasting)  # Tasks draw what they would draw beside another model.
        return cls(**{"seed": seed} | harness_settings.joined(arg_dict, additional_config or {}))

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> "Harness":
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        return self._model.engine.spec.stop_ids[0]

    @property
    def prefix_token_id(self) -> int:
        if self._prefix is not None:
            return self._prefix
        tokenizer = self._model.tokenizer
        begin = tokenizer.special_tokens.get("bos_token")
        return self.eot_token_id if begin is None else tokenizer.encode(begin)[0]

    @property
    def tokenizer_name(self) -> str:
        # Part of a file's name, where the harness caches prompts.
        return self._model.config.source.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """A text's ids, behind what the checkpoint puts before texts, unless it begins so."""
        tokens, prefix = self._model.tokenizer.encode(string), self._model.tokenizer.prefix_ids
        begins = add_special_tokens is None and tuple(tokens[: len(prefix)]) == prefix
        return tokens if begins or add_special_tokens is False else [*prefix, *tokens]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source, which the harness records. Raises UserError for a name."""
        if isinstance(chat_template, str) and chat_template != "default":
            raise UserError(
                f"{self._model.config.source} has no chat template of the name {chat_template!r}; "
                "give --apply_chat_template without a name."
            )
        return (self._model.tokenizer.template_for() or CHATML_TEMPLATE) if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The chat as text that the assistant's turn follows, or, where there is no generation
        prompt, that ends with the last message, an opened turn of the assistant."""
        tokenizer, source = self._model.tokenizer, self._model.config.source
        template = tokenizer.template_for()
        if template is None:
            self._warn(f"{source} has no chat template: using ChatML.")
        return render_chat(
            template,
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            special_tokens=tokenizer.special_tokens,
            source=source,
        )

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-probabilities of continuations, and whether greedy decoding would write them.

        Raises:
            UserError: a continuation has no tokens of its own, or more than the context holds.
        """
        for request in requests:
            _check_continuation(request.args[1], request.args)
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or _QUIET)

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        for texts, context, continuation in requests:
            _check_continuation(continuation, texts)
            if len(continuation) > self._context:
                raise UserError(
                    f"A continuation of {len(continuation)} tokens, {texts[1]!r:.60}, is longer "
                    f"than the context of {self._context}; leave its document out."
                )
            if (length := len(context) + len(continuation)) > self._context + 1:
                self._warn(
                    f"A context of {len(context)} tokens with a continuation of "
                    f"{len(continuation)} is longer than the model's of {self._context}: it, and "
                    f"others like it, lose their beginning, here {length - self._context - 1}."
                )
        keys = [
            _key("loglikelihood", texts or (context, continuation))
            for texts, context, continuation in requests
        ]
        left = {
            key: request
            for key, request in zip(keys, requests, strict=True)
            if key not in self._answers
        }
        scores = self._model.score(self._pair(*tokens) for _, *tokens in left.values())
        bar = tqdm(left.items(), disable=disable_tqdm or _QUIET)
        for (key, (texts, _, _)), score in zip(bar, scores, strict=True):
            line = {"type": "loglikelihood", "arguments": texts}
            whole = float(score.logprobs.sum(dtype=np.float64))
            self._answer(key, line, (whole, bool(score.greedy.all())), texts)
        return [(logprob, greedy) for logprob, greedy in map(self._answers.__getitem__, keys)]

    def _pair(self, context: Sequence[int], continuation: Sequence[int]) -> Pair:
        """What the context has room for."""
        # A context of spaces alone has none left: they begin the continuation.
        before = [*(context or [self.prefix_token_id])]
        return before[-(self._context + 1 - len(continuation)) :], continuation

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probabilities of whole texts, each token given as much before it as fits."""
        pairs: list[Any] = []
        ends = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._context,
                context_len=1,
            )
            pairs += [(None, *make_disjoint_window(window)) for window in windows]
            ends.append(len(pairs))
        scores = self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)
        found = []
        for request, start, end in zip(requests, [0, *ends], ends, strict=False):
            found.append(float(sum(logprob for logprob, _ in scores[start:end])))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers to requests of (context, generation settings), one text each.

        Raises:
            UserError: a setting is refused, see `harness_settings.generation`, or a prompt leaves
                no room for an answer.
        """
        keyed = self._keyed(requests)
        # Equal keys, as of a greedy request's repeats, are one text.
        left = {key: i for i, (key, _, _) in enumerate(keyed) if key not in self._answers}
        order = list(left.values())
        quiet = disable_tqdm or _QUIET

        def fail(number: int, error: UserError) -> None:
            raise UserError(f"{requests[order[number]].args[0]!r:.60}: {error}") from error

        pieces = iter(self._model.run((keyed[i][2] for i in order), fail))
        with (
            contextlib.closing(pieces),
            tqdm(total=len(requests), initial=len(requests) - len(order), disable=quiet) as bar,
        ):
            for number, _, completion in pieces:
                if completion is None:
                    continue
                key, repeat, request = keyed[order[number]]
                arguments = requests[order[number]].args
                line = {
                    "type": "generate_until",
                    "arguments": arguments,
                    "repeat": repeat,
                    "max_tokens": request.max_tokens,
                    "stop": request.stop,
                    "stop_ids": request.stop_ids,
                    "sampling": dataclasses.asdict(request.sampling),
                }
                self._answer(key, line, self._said(request, completion), arguments)
                bar.update()
        return [self._answers[key] for key, _, _ in keyed]

    def _keyed(self, requests: Sequence[Instance]) -> list[tuple[str, int, Request]]:
        """Each request's key, the number of its repeat, and our work for it."""
        made: dict[str, tuple[str, Request]] = {}
        seen: Counter[str] = Counter()
        found = []
        for instance in requests:
            name = json.dumps(instance.args, default=str, sort_keys=True)
            if name not in made:
                request = self._request(*instance.args)
                asked = [self._think_end, dataclasses.asdict(request)]
                made[name] = _key("generate_until", asked), request
            # Settings that mean the same are the same request, however they are written.
            asked_for, request = made[name]
            draws = request.sampling.temperature > 0
            repeat = seen[asked_for] if draws else 0
            seen[asked_for] += 1
            key = _key(asked_for, repeat)
            if draws:
                drawn = dataclasses.replace(request.sampling, seed=int(key[:8], 16))
                request = dataclasses.replace(request, sampling=drawn)
            found.append((key, repeat, request))
        return found

    def _request(self, context: str, options: Mapping[str, Any]) -> Request:
        """Our work for a request, its seed not yet that of a repeat."""
        asked = harness_settings.generation(
            harness_settings.overridden(options, self._overrides),
            usual=self._usual,
            max_tokens=self._max_tokens,
            seed=self._seed,
            warn=self._warn,
        )
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        room = self._context - len(tokens)
        if room < 1:
            raise UserError(
                f"A prompt of {len(tokens)} tokens, {context!r:.60}, leaves no room for an answer "
                f"in the context of {self._context}; give fewer examples (--num_fewshot), or leave "
                "its document out (--samples)."
            )
        if asked.max_tokens > room:
            self._warn(
                f"Answers of {asked.max_tokens} tokens don't fit the context of {self._context} "
                f"behind a prompt of {len(tokens)}: it is kept whole, and its answer, as those of "
                f"others like it, ends where the context does, here after {room}."
            )
        most = min(asked.max_tokens, room)
        return Request(tokens, most, asked.sampling, asked.stop, asked.stop_ids)

    def _said(self, request: Request, completion: Completion) -> str:
        """A completion's text, without what was thought before it."""
        end, text, tokens = self._think_end, completion.text, completion.tokens
        if end is None:
            return text
        if isinstance(end, str):
            return postprocess_generated_text(text, list(request.stop), end)
        if end in tokens:
            after = tokens[len(tokens) - tokens[::-1].index(end) :]
            text = self._model.tokenizer.decode(after).lstrip()
        return postprocess_generated_text(text, list(request.stop), None)

    def _answer(self, key: str, line: dict[str, Any], response: Any, arguments: Any) -> None:
        """Keeps a response, here and wherever else responses are kept."""
        self._answers[key] = response
        self._keep(key, {**line, "response": response})
        if arguments is not None:  # those of a window of a text, which is kept as a whole
            self.cache_hook.add_partial(line["type"], arguments, response)

    def _id(self, name: str, value: Any) -> int | None:
        """An argument that names a token."""
        if value is None:
            return None
        token, size = harness_settings.number(name, value, int), self._model.tokenizer.vocab_size
        if not 0 <= token < size:
            raise UserError(f"{name} is {token}, but the tokens are 0 to {size - 1}.")
        return token

    def _warn(self, message: str) -> None:
        """Warns of what thousands of requests may share: once for what differs in numbers only."""
        kind = "".join(c for c in message if not c.isdigit())
        if kind not in self._warned:
            self._warned.add(kind)
            logging.warning(message)


def _check_continuation(continuation: Sequence[Any], texts: Sequence[str]) -> None:
    if not continuation:
        raise UserError(
            f"The continuation {texts[1]!r:.60} has no token of its own behind "
            f"{texts[0][-40:]!r}, so there is nothing to score; give the task a target_delimiter, "
            "or leave its document out (--samples)."
        )


def _key(kind: str, arguments: Any) -> str:
    text = json.dumps([kind, arguments], default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
