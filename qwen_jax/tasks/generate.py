"""`run.py generate`: one prompt streamed to stdout, or a file of prompts as JSON lines."""

import contextlib
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from ml_collections import ConfigDict
from tqdm import tqdm

from qwen_jax import api
from qwen_jax.api import Model
from qwen_jax.errors import UserError
from qwen_jax.generation import Completion, Request
from qwen_jax.tasks import prompts
from qwen_jax.tasks.summary import Summary


def run(config: ConfigDict) -> int:
    """Answers what the config asks for; returns the exit code."""
    options = prompts.options_of(config)
    if config.prompt_file is not None and config.prompt is not None:
        raise UserError("--prompt and --prompt_file exclude each other; give one of them.")
    if config.output is not None and config.prompt_file is None:
        raise UserError("--output needs --prompt_file; a single prompt's text goes to stdout.")
    prompt = None if config.prompt_file else prompts.single_prompt(config)
    if config.output is not None and Path(config.output).exists():
        raise UserError(f"--output={config.output} exists already; move it or choose another name.")
    if config.prompt_file:
        # Read once now, so that a bad line is known before anything is loaded or written.
        total = sum(1 for _ in prompts.read_items(Path(config.prompt_file), options))
        if total == 0:
            raise UserError(f"--prompt_file={config.prompt_file} holds no prompts.")
    model = load(config)
    summary = Summary(model, options["sampling"])
    try:
        if prompt is None:
            items = prompts.read_items(Path(config.prompt_file), options)
            with _writer(config.output) as out:
                _run_file(model, items, total, config, out, summary)
        else:
            _run_single(model, prompt, options, config, summary)
    finally:
        summary.show()
    return 0


def load(config: ConfigDict) -> Model:
    """The config's model, with a progress bar on a terminal."""
    with tqdm(
        desc="loading", unit="B", unit_scale=True, leave=False, disable=not sys.stderr.isatty()
    ) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return api.load(
            config.model,
            dtype=config.dtype,
            implementation=config.implementation,
            matmul_precision=config.matmul_precision,
            sha256=config.sha256,
            progress=progress,
        )


def _run_single(
    model: Model, prompt: str, options: api.Options, config: ConfigDict, summary: Summary
) -> None:
    """Streams one sample as it comes; several samples are printed one after another."""
    request = model.request(prompt, **options)
    batch = model.batch(api.reseeded([request] * config.n), config.top_logprobs)
    try:
        for pieces in batch:
            if config.n == 1:
                print(pieces[0], end="", flush=True)
    finally:
        summary.add(batch)
        for number, completion in enumerate(batch.completions, start=1):
            if config.n > 1:
                print(f"--- sample {number}\n{completion.text}", end="")
            print()
    if config.top_logprobs is not None:
        for completion in batch.completions:
            _print_logprobs(model, completion)


def _print_logprobs(model: Model, completion: Completion) -> None:
    name = model.tokenizer.token_name
    for entry in completion.logprobs or ():
        top = "  ".join(f"{name(token)} {logprob:.3f}" for token, logprob in entry.top)
        print(f"{name(entry.token):<16} {entry.logprob:8.3f}   {top}".rstrip(), file=sys.stderr)


@contextlib.contextmanager
def _writer(output: str | None) -> Iterator[IO[str]]:
    if output is None:
        yield sys.stdout
        return
    try:
        # "x": a file that appeared since the check is not overwritten either.
        file = Path(output).open("x", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"--output={output} can't be written: {error.strerror}.") from error
    with file:
        yield file


def _run_file(
    model: Model,
    items: Iterable[prompts.Item],
    total: int,
    config: ConfigDict,
    out: IO[str],
    summary: Summary,
) -> None:
    """Runs the prompts in batches and writes each answer when its batch is done.

    The last batch is padded with rows that generate nothing: a smaller one would have to be
    compiled for itself.
    """
    rows = _rows(model, items, config.n)
    size = min(config.batch_size, total * config.n)
    with tqdm(total=total * config.n, desc="prompts", disable=not sys.stderr.isatty()) as bar:
        while part := list(itertools.islice(rows, size)):
            requests = [request for _, _, request in part]
            idle = [Request(requests[0].tokens[:1], max_tokens=0)] * (size - len(part))
            batch = model.batch(requests + idle, config.top_logprobs)
            for _ in batch:
                pass
            summary.add(batch, len(part))
            for (item, sample, _), completion in zip(part, batch.completions, strict=False):
                line = {"id": item.id, "sample": sample} | _record(completion)
                print(json.dumps(line, ensure_ascii=False), file=out, flush=True)
            bar.update(len(part))


def _rows(
    model: Model, items: Iterable[prompts.Item], n: int
) -> Iterator[tuple[prompts.Item, int, Request]]:
    """Every sample of every prompt. Row i uses the config's seed + i, unless its prompt names
    a seed of its own: then sample j uses that seed + j."""
    for index, item in enumerate(items):
        request = model.request(item.prompt, **item.options)
        first = 0 if item.has_seed else index * n
        for sample, seeded in enumerate(api.reseeded([request] * n, first)):
            yield item, sample, seeded


def _record(completion: Completion) -> dict[str, Any]:
    record: dict[str, Any] = {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "tokens": completion.tokens,
    }
    if completion.logprobs is not None:
        record["logprobs"] = [
            {"token": e.token, "logprob": e.logprob, "top": e.top} for e in completion.logprobs
        ]
    return record
