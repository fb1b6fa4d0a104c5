"""The Python face: `load` a checkpoint, then `generate`, `stream` or read `logits`."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Unpack, cast, get_args, overload

import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import lax
from jaxtyping import Float

import pallas_kernels
from qwen_jax.config import ModelConfig
from qwen_jax.engine.compiling import Expected
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.layout import EngineOptions
from qwen_jax.engine.memory import device
from qwen_jax.engine.sampling import Sampling, is_whole
from qwen_jax.errors import UserError
from qwen_jax.executables.per_user import use_compilation_cache
from qwen_jax.generation import Completion, Generation, Request, check_fits
from qwen_jax.in_force import DRAWS, changed, warn_of_greedy
from qwen_jax.loading import load_engine
from qwen_jax.recommended import Recommended
from qwen_jax.recommended import read as read_recommended
from qwen_jax.scoring import Pair, Score, scored
from qwen_jax.text.chat import DEFAULT_SYSTEM
from qwen_jax.text.prompt import Message, PromptOptions, prompt_ids
from qwen_jax.text.tokenizer import Tokenizer
from qwen_jax.weights.adapters import with_adapters
from qwen_jax.weights.hub import resolve
from qwen_jax.weights.loader import Checkpoint, open_checkpoint

BUNDLED = "haiku"
"""The name of the model that ships with the package."""

DTYPES = ("auto", "float32", "bfloat16", "float16")
WEIGHTS = ("auto", "packed", "expanded")
PRECISIONS = ("highest", "high", "default")
MOST_SLOTS = 4096
"""Far more than any device has room for texts."""

MOST_SAMPLES = 1_000_000
"""Of one prompt: days of a GPU's work, and a number that was mistyped."""


def locate(model: str | Path = BUNDLED) -> Path:
    """The path of a model: the bundled one, a file, a directory, or what `load` says of `hf:`."""
    if str(model) == BUNDLED:
        return Path(str(resources.files("qwen_jax") / "data" / f"{BUNDLED}.gguf"))
    return resolve(str(model))


def locate_adapter(adapter: str | Path) -> Path:
    """The path of an adapter: a PEFT directory, a LoRA GGUF file, or one of the Hub as `hf:`."""
    return resolve(str(adapter), adapter=True)


def open_model(
    model: str | Path = BUNDLED,
    adapter: str | Path | Sequence[str | Path] = (),
    *,
    sha256: str | None = None,
) -> Checkpoint:
    """The checkpoint that `load` would read, open and checked, with its adapters."""
    adapters = [adapter] if isinstance(adapter, str | Path) else adapter
    checkpoint = open_checkpoint(locate(model), sha256=sha256)
    return with_adapters(checkpoint, [locate_adapter(path) for path in adapters])


def load(
    model: str | Path = BUNDLED,
    *,
    adapter: str | Path | Sequence[str | Path] = (),
    dtype: str = "auto",
    weights: str = "auto",
    implementation: str = "auto",
    matmul_precision: str = "highest",
    slots: int | None = None,
    batch_invariant: bool = False,
    expected: Expected | None = None,
    sha256: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> "Model":
    """Reads a checkpoint and puts it on the device.

    Args:
        model: a GGUF file (of a split one, any part), a Hugging Face directory,
            `hf:owner/repo[@revision][:quant]`, or nothing for the bundled model. The revision
            is a branch, tag or commit; the quant a type, as Q4_K_M, or a file of the repository.
        adapter: a LoRA to merge into the weights, in float32 and before they are rounded, or
            several, which add up: directories that peft saved, LoRA GGUF files, or `hf:`.
        dtype: of the parameters: "float32", "bfloat16", "float16", or "auto": float32 on a
            CPU, where it is fastest, bfloat16 elsewhere.
        weights: on a CPU: "packed" keeps matrices as the file has them, in blocks or 16 bits, and
            decodes them as they are used; "expanded" makes numbers of them once. "auto" packs
            where these would take more than three quarters of the free memory.
        implementation: "auto", "mosaic_gpu" or "xla", for every operation.
        matmul_precision: of float32 products: "highest" never uses TF32, "high" and
            "default" may.
        slots: texts that are generated at the same time; by default 8 on a CPU, 64 elsewhere.
        batch_invariant: whether a text is, bit for bit, the same whatever runs beside it. It costs
            nothing where all slots are taken; a text alone then takes as long as all of them.
        expected: what will be asked for: compiled while the weights load. By default each program
            is compiled when it is first needed.
        sha256: what the GGUF file's SHA-256 must be.
        progress: called with bytes read and bytes in all.

    Raises:
        UserError: the checkpoint is missing, damaged, too large or not a Qwen2.5 model, or an
            argument isn't one of the values above.
    """
    check_slots(slots)
    use_compilation_cache()
    checkpoint = open_model(model, adapter, sha256=sha256)
    # From here on the device is asked, which `run.py` may still be waking up.
    parameter_dtype = dtype_of(dtype)
    check_precision(matmul_precision)
    check_implementation(implementation)
    check_weights(weights)
    options = EngineOptions(
        precision=lax.Precision(matmul_precision),
        implementation=implementation,
        slots=slots,
        batch_invariant=batch_invariant,
    )
    try:
        engine, tokenizer = load_engine(
            checkpoint, parameter_dtype, weights, options, expected, progress
        )
    except pallas_kernels.UnsupportedError as error:
        raise UserError(f"{error} Use implementation='auto' or 'xla'.") from error
    return Model(engine, tokenizer, read_recommended(checkpoint))


def dtype_of(name: str) -> jnp.dtype:
    """The parameters' dtype; "auto" is float32 on a CPU and bfloat16 elsewhere."""
    _one_of("dtype", name, DTYPES)
    if name == "auto":
        name = "float32" if device().platform == "cpu" else "bfloat16"
    return jnp.dtype(name)


def check_implementation(name: str) -> None:
    """Raises UserError where no such implementation serves every operation."""
    _one_of("implementation", name, get_args(pallas_kernels.Implementation))
    for operation in pallas_kernels.OPERATIONS:
        try:
            pallas_kernels.choose(operation, name)
        except pallas_kernels.UnsupportedError as error:
            reason = str(error).rstrip(".")
            raise UserError(f"{reason}; use implementation 'auto' or 'xla'.") from error


def check_precision(name: str) -> None:
    """Raises UserError for a matmul precision that there is not."""
    _one_of("matmul_precision", name, PRECISIONS)


def check_weights(name: str) -> None:
    """Raises UserError for a form of weights that there is not."""
    _one_of("weights", name, WEIGHTS)


def check_slots(slots: int | None) -> None:
    """Raises UserError for a number of slots that there can't be."""
    if slots is not None and not (is_whole(slots) and 1 <= slots <= MOST_SLOTS):
        raise UserError(f"slots is {slots!r:.60}, but it must be from 1 to {MOST_SLOTS}.")


def check_samples(n: int) -> None:
    """Raises UserError for a number of samples of a prompt that nobody can want."""
    if not (is_whole(n) and 1 <= n <= MOST_SAMPLES):
        raise UserError(f"n is {n!r:.60}, but it must be from 1 to {MOST_SAMPLES}.")


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise UserError(f"{name} is {value!r}, but it must be one of {', '.join(allowed)}.")


class Options(PromptOptions, total=False):
    """How to answer a prompt, besides how it is put.

    Attributes:
        max_tokens: the most tokens to generate (256); the context may end the text earlier.
        sampling: how tokens are chosen; greedy by default.
        stop: strings that end the text, control tokens included; they are cut off.
        stop_ids: ids of tokens that end the text, besides the model's own; they are not shown.
        top_logprobs: None for no log-probabilities, else how many of the likeliest to report.
    """

    max_tokens: int
    sampling: Sampling
    stop: Sequence[str]
    stop_ids: Sequence[int]
    top_logprobs: int | None


PROMPT_OPTIONS = tuple(PromptOptions.__annotations__)
"""Names of those options that decide the prompt's ids."""


def prompt_options(options: Options) -> PromptOptions:
    """Those of the options that decide the prompt's ids."""
    return cast(PromptOptions, {k: v for k, v in options.items() if k in PROMPT_OPTIONS})


class Model:
    """A loaded model: an engine and the tokenizer that belongs to it.

    `recommended.sampling` is how the checkpoint's authors would have it sampled; it is used where
    it is given to `generate`, and nowhere else.
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, recommended: Recommended | None = None
    ):
        self.engine, self.tokenizer = engine, tokenizer
        self.recommended = recommended or Recommended()
        self._warned: set[object] = set()

    @property
    def config(self) -> ModelConfig:
        return self.engine.config

    def tokens(
        self, prompt: str | Sequence[Message], **options: Unpack[PromptOptions]
    ) -> list[int]:
        """The ids of a prompt, a user's message or a whole chat, as the model will see them.

        Raises:
            UserError: the chat is malformed, or options don't fit one another or the model.
        """
        source = self.config.source
        in_chat = not options.get("raw") and options.get("suffix") is None
        without = in_chat and self.tokenizer.template_for(options.get("tools")) is None
        if without and "template" not in self._warned:
            self._warned.add("template")
            logging.warning(
                "%s has no chat template: using ChatML, with the system prompt %r unless the "
                "chat has one.",
                source,
                DEFAULT_SYSTEM,
            )
        return prompt_ids(self.tokenizer, prompt, source=source, **options)

    def run(self, requests: Iterable[Request]) -> Generation:
        """Requests through the engine's slots; iterate over it for the texts as they come."""
        return Generation(self.engine, self.tokenizer, requests)

    def request(self, prompt: str | Sequence[Message], **options: Unpack[Options]) -> Request:
        """A prompt's work, for `run`.

        Raises:
            UserError: the prompt is empty, malformed or longer than the context.
        """
        request = self.request_of(self.tokens(prompt, **prompt_options(options)), options)
        self.engine.room(request.tokens, request.max_tokens)
        return request

    def request_of(self, tokens: Sequence[int], options: Options) -> Request:
        """The same where the prompt's ids are known, and the options about it are not looked at.

        Raises:
            UserError: a stop id or a biased one is no token, or a setting makes no sense.
        """
        given = {name: value for name, value in options.items() if value is not None}
        answer = {name: value for name, value in given.items() if name not in PROMPT_OPTIONS}
        request = Request(tokens, **cast(Any, answer))
        check_fits(request, self.engine, self.tokenizer)
        return request

    @overload
    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        n: Literal[1] = 1,
        **options: Unpack[Options],
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompt: list[str],
        *,
        n: int = 1,
        **options: Unpack[Options],
    ) -> list[Completion]: ...

    @overload
    def generate(
        self,
        prompt: str | Sequence[Message] | Sequence[str],
        *,
        n: int,
        **options: Unpack[Options],
    ) -> Completion | list[Completion]: ...

    def generate(
        self,
        prompt: str | Sequence[Message] | Sequence[str],
        *,
        n: int = 1,
        **options: Unpack[Options],
    ) -> Completion | list[Completion]:
        """Answers a message, a chat, or several messages, as many at a time as there are slots.

        Args:
            prompt: a user's message, chat messages, or a list of users' messages.
            n: samples of each prompt. Sample i of all uses the sampling's seed + i.
            options: see `Options`.

        Returns:
            One completion for one prompt and sample, else a list, the samples of the first
            prompt first.

        Raises:
            UserError: a prompt is empty, malformed or longer than the context, or `n` is not
                positive.
        """
        check_samples(n)
        if isinstance(prompt, Mapping) or not isinstance(prompt, Sequence):
            raise UserError(
                f"prompt is a {type(prompt).__name__}, but it must be a text, a list of texts or a "
                "list of messages."
            )
        for name in ("stop", "stop_ids"):
            if isinstance(value := options.get(name), Iterator):
                options[name] = tuple(value)  # for every prompt, not the first alone
        several = not isinstance(prompt, str) and all(isinstance(p, str) for p in prompt)
        prompts = cast(list[str | Sequence[Message]], prompt if several else [prompt])
        firsts = [self.request(p, **options) for p in prompts]
        requests = [request for request in firsts for _ in range(n)]
        if not requests:
            return []
        self._warn_of_idle(firsts[0].sampling, n)
        pieces = self.run(reseeded(requests))
        ended = {piece.number: piece.completion for piece in pieces if piece.completion}
        completions = [ended[index] for index in range(len(requests))]
        return completions if several or n > 1 else completions[0]

    def stream(self, prompt: str | Sequence[Message], **options: Unpack[Options]) -> Iterator[str]:
        """Answers one prompt and yields the text as it comes, in whole characters.

        Raises:
            UserError: the prompt is empty, malformed or longer than the context.
        """
        request = self.request(prompt, **options)
        self._warn_of_idle(request.sampling, 1)
        for piece in self.run([request]):
            if piece.text:
                yield piece.text

    def _warn_of_idle(self, sampling: Sampling, n: int) -> None:
        """Tells once of what does nothing, as in `Sampling(top_p=0.9)` without a temperature."""
        idle = frozenset(DRAWS) & frozenset(changed(sampling))
        if sampling.temperature == 0 and (idle, n) not in self._warned:
            self._warned.add((idle, n))
            warn_of_greedy(idle, n)

    def score(self, pairs: Iterable[Pair]) -> Iterator[Score]:
        """How likely continuations are after contexts, both as ids, in the order of the pairs.

        Raises:
            UserError: while iterating: a pair is empty, too long, or not of this vocabulary.
        """
        return scored(self.engine, pairs)

    def logits(self, token_ids: Sequence[int]) -> Float[np.ndarray, "T V"]:
        """Logits after each of the tokens, float32 `[T, V]`.

        Raises:
            UserError: there are no tokens, more than the context holds, or one is not an id.
        """
        vocab = self.config.vocab_size
        for token in token_ids:
            if not 0 <= token < vocab:
                raise UserError(f"Token {token} is not in the vocabulary of {vocab} tokens.")
        return self.engine.logits(token_ids)


def reseeded(requests: Iterable[Request], first: int = 0) -> Iterator[Request]:
    """The requests with row i's seed raised by first + i, so that no two rows draw alike."""
    for i, request in enumerate(requests, start=first):
        seed = (request.sampling.seed + i) % 2**32
        sampling = dataclasses.replace(request.sampling, seed=seed)
        yield dataclasses.replace(request, sampling=sampling)
