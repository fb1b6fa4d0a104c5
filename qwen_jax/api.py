"""The Python face: `load` a checkpoint, then `generate`, `stream` or read `logits`."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Unpack, cast, overload

import numpy as np
from absl import logging
from jax import lax
from jaxtyping import Float

import pallas_kernels
from qwen_jax import strict_switches
from qwen_jax.arguments import checked
from qwen_jax.choices import (
    cache_dtype_of,
    check_implementation,
    check_precision,
    check_samples,
    check_slots,
    check_weights,
    dtype_of,
)
from qwen_jax.completions import Completion, Piece, StreamedText
from qwen_jax.config import ModelConfig
from qwen_jax.engine.compiling import Expected
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.layout import EngineOptions
from qwen_jax.engine.sampling import Sampling
from qwen_jax.errors import UserError
from qwen_jax.executables.per_user import use_compilation_cache
from qwen_jax.generation import Fail, Generation, NotYet
from qwen_jax.in_force import DRAWS, changed, warn_of_greedy
from qwen_jax.in_thread import in_thread
from qwen_jax.loading import Speculation, load_engine
from qwen_jax.mesh import MeshShape
from qwen_jax.opening import BUNDLED, open_model
from qwen_jax.options import PROMPT_OPTIONS, Options, prompt_options
from qwen_jax.recommended import Recommended
from qwen_jax.recommended import read as read_recommended
from qwen_jax.requests import Request, check_fits, reseeded
from qwen_jax.scoring import Pair, Score, scored
from qwen_jax.text.chat import DEFAULT_SYSTEM
from qwen_jax.text.prompt import Message, Prompt, PromptOptions, prompt_ids, prompts_in
from qwen_jax.text.tokenizer import Tokenizer

Progress = Callable[[int, int], None]
"""Called with what is done, and what there is to do."""


@checked
def load(
    model: str | Path = BUNDLED,
    *,
    adapter: str | Path | Sequence[str | Path] = (),
    dtype: str = "auto",
    weights: str = "auto",
    implementation: str = "auto",
    matmul_precision: str = "highest",
    cache_dtype: str | None = None,
    slots: int | None = None,
    batch_invariant: bool = False,
    mesh: str | None = None,
    speculate: str = "none",
    draft_model: str | Path | None = None,
    draft_tokens: int | None = None,
    expected: Expected | None = None,
    sha256: str | None = None,
    progress: Progress | None = None,
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
        weights: "packed" keeps matrices as the file has them, "expanded" makes numbers of them
            once. A CPU decodes blocks, or 16 bits, as it uses them; a Hopper GPU multiplies GGUF's
            blocks as they are, up to 16 texts at a time. "auto" packs where numbers would take more
            than three quarters of the free memory, and on a GPU for up to 8 texts that are
            expected.
        implementation: "auto", "mosaic_gpu" or "xla", for every operation.
        matmul_precision: of float32 products: "highest" never uses TF32, "high" and
            "default" may.
        cache_dtype: of keys and values; None keeps them in the parameters' own. Kernels serve no
            other, so that on a GPU it takes implementation="xla".
        slots: texts that are generated at the same time; by default 8 on a CPU, 64 elsewhere.
        batch_invariant: whether a text is, bit for bit, the same whatever runs beside it. It costs
            nothing where all slots are taken; a text alone then takes as long as all of them.
        mesh: "tp=2" deals the model out to two devices, "dp=2" has it twice, each with slots of its
            own, "dp=2,tp=2" takes four devices. See docs/scaling.md.
        speculate: several tokens a step, the same ones: "lookup" drafts what came after the last
            place where a text had its last few tokens, "draft" asks `draft_model`, "none" is the
            default. See docs/speculation.md.
        draft_model: a smaller model of the same vocabulary, named as `model` is.
        draft_tokens: drafted for a text in a step, at most: 1 to 15; by default 7.
        expected: what will be asked for: compiled while the weights load. By default each program
            is compiled when it is first needed.
        sha256: what the GGUF file's SHA-256 must be.
        progress: called with bytes read and bytes in all.

    Raises:
        UserError: the checkpoint is missing, damaged, too large or not a Qwen2.5 model, or an
            argument isn't one of the values above.
    """
    check_slots(slots)
    shape = MeshShape.parse(mesh)
    drafts = Speculation.asked(speculate, draft_model, draft_tokens, shape)
    strict_switches.check()
    use_compilation_cache()
    checkpoint = open_model(model, adapter, sha256=sha256)
    # From here on the device is asked, which `run.py` may still be waking up.
    parameter_dtype = dtype_of(dtype)
    check_precision(matmul_precision)
    check_implementation(implementation)
    check_weights(weights)
    cache = cache_dtype_of(cache_dtype, parameter_dtype, implementation)
    options = EngineOptions(
        cache=cache,
        precision=lax.Precision(matmul_precision),
        implementation=implementation,
        slots=slots,
        batch_invariant=batch_invariant,
    )
    try:
        engine, tokenizer = load_engine(
            checkpoint, parameter_dtype, weights, options, expected, progress, shape, drafts
        )
    except pallas_kernels.UnsupportedError as error:
        raise UserError(f"{error} Use implementation='auto' or 'xla'.") from error
    return Model(engine, tokenizer, read_recommended(checkpoint))


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

    @checked
    def tokens(self, prompt: Prompt, **options: Unpack[PromptOptions]) -> list[int]:
        """The ids of a prompt, a user's message, a whole chat or ids, as the model will see them.

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

    @checked
    def run(self, requests: Iterable[Request | NotYet], fail: Fail | None = None) -> Generation:
        """Requests through the engine's slots; iterate over it for the texts as they come.

        Args:
            fail: called with the number of a request that can't go on, and why; by default the
                first of them ends it all, by a UserError.
        """
        return Generation(self.engine, self.tokenizer, requests, fail)

    @checked
    def request(self, prompt: Prompt, **options: Unpack[Options]) -> Request:
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
        prompt: str | Sequence[Message] | Sequence[int],
        *,
        n: Literal[1] = 1,
        samplings: Sequence[Sampling] | None = None,
        progress: Progress | None = None,
        **options: Unpack[Options],
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompt: list[str] | Sequence[Sequence[int]] | Sequence[Sequence[Message]],
        *,
        n: int = 1,
        samplings: Sequence[Sampling] | None = None,
        progress: Progress | None = None,
        **options: Unpack[Options],
    ) -> list[Completion]: ...

    @overload
    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        n: int,
        samplings: Sequence[Sampling] | None = None,
        progress: Progress | None = None,
        **options: Unpack[Options],
    ) -> Completion | list[Completion]: ...

    @checked
    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        n: int = 1,
        samplings: Sequence[Sampling] | None = None,
        progress: Progress | None = None,
        **options: Unpack[Options],
    ) -> Completion | list[Completion]:
        """Answers one prompt, or several, as many at a time as there are slots.

        Args:
            prompt: a user's message, a chat or token ids; or a list of these.
            n: samples of each prompt. Sample i of all uses the sampling's seed + i.
            samplings: one for each prompt, in place of `sampling`; sample i of a prompt then uses
                its own seed + i.
            progress: called with answers that are complete, and answers in all.
            options: see `Options`.

        Returns:
            One completion for one prompt and sample, else a list, the samples of the first
            prompt first.

        Raises:
            UserError: a prompt is empty, malformed or longer than the context, or an argument is
                not what it must be.
        """
        requests, several = self._requests(prompt, n, samplings, options)
        ended: dict[int, Completion] = {}
        for piece in self.run(requests, _naming_the_prompt(n) if several else None):
            _take(piece, ended, len(requests), progress)
        return _completions(ended, not several and n == 1)

    @checked
    async def agenerate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        n: int = 1,
        samplings: Sequence[Sampling] | None = None,
        progress: Progress | None = None,
        **options: Unpack[Options],
    ) -> Completion | list[Completion]:
        """`generate` for asyncio, whose other tasks go on meanwhile; cancelled, it ends soon."""
        requests, several = await asyncio.to_thread(self._requests, prompt, n, samplings, options)
        ended: dict[int, Completion] = {}
        generation = self.run(requests, _naming_the_prompt(n) if several else None)
        async with contextlib.aclosing(in_thread(generation.__iter__)) as pieces:
            async for piece in pieces:
                _take(piece, ended, len(requests), progress)
        return _completions(ended, not several and n == 1)

    @checked
    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Iterator[StreamedText]:
        """Answers one prompt and yields the text as it comes, in whole characters; the last piece
        says why it ended.

        Raises:
            UserError: at the first piece: the prompt is empty, malformed or longer than the
                context.
        """
        return self._streamed(prompt, options)

    @checked
    async def astream(
        self, prompt: Prompt, **options: Unpack[Options]
    ) -> AsyncIterator[StreamedText]:
        """`stream` for asyncio: `async for piece in model.astream(...)`."""
        async with contextlib.aclosing(
            in_thread(lambda: self._streamed(prompt, options))
        ) as pieces:
            async for piece in pieces:
                yield piece

    def _streamed(self, prompt: Prompt, options: Options) -> Generator[StreamedText, None, None]:
        request = self.request(prompt, **options)
        self._warn_of_idle(request.sampling, 1)
        with contextlib.closing(iter(self.run([request]))) as pieces:
            for piece in pieces:
                yield piece.text

    def _requests(
        self,
        prompt: Prompt | Sequence[Prompt],
        n: int,
        samplings: Sequence[Sampling] | None,
        options: Options,
    ) -> tuple[list[Request], bool]:
        """The samples of each prompt; and whether these are a list."""
        check_samples(n)
        for name in ("stop", "stop_ids"):
            if isinstance(value := options.get(name), Iterator):
                options[name] = tuple(value)  # for every prompt, not the first alone
        prompts, several = prompts_in(prompt)
        if samplings is not None and (len(samplings) != len(prompts) or "sampling" in options):
            raise UserError(
                f"samplings has {len(samplings)} entries for {len(prompts)} prompts; give one for "
                "each, and no sampling."
            )
        firsts: list[Request] = []
        for index, one in enumerate(prompts):
            if samplings is not None:
                options["sampling"] = samplings[index]
            try:
                firsts.append(self.request(one, **options))
            except UserError as error:
                raise UserError(f"prompt {index}: {error}" if several else str(error)) from error
        if samplings is None:
            for first in firsts[:1]:
                self._warn_of_idle(first.sampling, n)
            samples = itertools.chain.from_iterable([first] * n for first in firsts)
            return [*reseeded(samples)], several
        requests: list[Request] = []
        for first in firsts:
            self._warn_of_idle(first.sampling, n)
            requests += reseeded([first] * n)
        return requests, several

    def _warn_of_idle(self, sampling: Sampling, n: int) -> None:
        """Tells once of what does nothing, as in `Sampling(top_p=0.9)` without a temperature."""
        idle = frozenset(DRAWS) & frozenset(changed(sampling))
        if sampling.temperature == 0 and (idle, n) not in self._warned:
            self._warned.add((idle, n))
            warn_of_greedy(idle, n)

    @checked
    def score(self, pairs: Iterable[Pair]) -> Iterator[Score]:
        """How likely continuations are after contexts, both as ids, in the order of the pairs.

        Raises:
            UserError: while iterating: a pair is empty, too long, or not of this vocabulary.
        """
        return scored(self.engine, pairs)

    @checked
    def logits(self, token_ids: Sequence[int]) -> Float[np.ndarray, "T V"]:
        """Logits after each of the tokens, float32 `[T, V]`.

        Raises:
            UserError: there are no tokens, more than the context holds, or one is not an id.
        """
        self.engine.check_ids(token_ids, "token_ids")
        return self.engine.logits(token_ids)


def _naming_the_prompt(n: int) -> Fail:
    """What ends a generation of n samples of each prompt, and says which of them can't go on."""

    def fail(number: int, error: UserError) -> None:
        raise UserError(f"prompt {number // n}: {error}") from error

    return fail


def _take(
    piece: Piece, ended: dict[int, Completion], total: int, progress: Progress | None
) -> None:
    """Notes a completion, if the piece has one, and tells of it."""
    if piece.completion is not None:
        ended[piece.number] = piece.completion
        if progress is not None:
            progress(len(ended), total)


def _completions(ended: dict[int, Completion], alone: bool) -> Completion | list[Completion]:
    return ended[0] if alone else [ended[number] for number in range(len(ended))]
