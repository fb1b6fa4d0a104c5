"""Training rows: generated chats as token ids, packed to one length."""

import dataclasses
import functools
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from qwen_jax.text.tokenizer import Tokenizer
from qwen_jax.text.vocabulary import Vocabulary
from tools.demo_corpus import chats, word_source
from tools.demo_tokenizer import END_OF_TEXT, TURN_END, letter_pieces

SHARD = 4096
"""Chats one task makes."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """`tokens` uint16 `[R, T]`; `answer` bool `[R, T]`, true where a token belongs to an answer
    (its `<|im_end|>` included), which is what is trained."""

    tokens: np.ndarray
    answer: np.ndarray


def build(vocabulary: Vocabulary, seed: int, count: int, length: int, workers: int) -> Rows:
    """Rows of about `count` chats. The number of workers does not change them."""
    shards = range(-(-count // SHARD))
    make = functools.partial(build_shard, vocabulary, seed, length)
    # Forking a process that runs JAX's threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        parts = list(pool.map(make, shards))
    return Rows(
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.answer for part in parts]),
    )


def build_shard(vocabulary: Vocabulary, seed: int, length: int, shard: int) -> Rows:
    """Chats one after another, each ended by `<|endoftext|>`, as many as a row of `length` holds.

    A row starts with a chat, as every prompt does, and is filled up with `<|endoftext|>`. A chat
    longer than a row is left out.
    """
    tokenizer = Tokenizer(vocabulary)
    end = tokenizer.encode(END_OF_TEXT)
    words = word_source(letter_pieces(vocabulary))
    rows: list[tuple[list[int], list[bool]]] = [([], [])]
    for chat in chats(seed, shard, SHARD, words):
        ids = tokenizer.encode(chat.render()) + end
        if len(ids) > length:
            continue
        if len(rows[-1][0]) + len(ids) > length:
            rows.append(([], []))
        rows[-1][0].extend(ids)
        rows[-1][1].extend(answer_mask(tokenizer, ids))
    tokens = np.full((len(rows), length), end[0], np.uint16)
    answer = np.zeros((len(rows), length), bool)
    for i, (ids, mask) in enumerate(rows):
        tokens[i, : len(ids)] = ids
        answer[i, : len(ids)] = mask
    return Rows(tokens, answer)


def answer_mask(tokenizer: Tokenizer, ids: list[int]) -> Iterator[bool]:
    """For each token, whether the assistant said it; the end of its turn counts."""
    header = tokenizer.encode("<|im_start|>assistant\n")
    (turn_end,) = tokenizer.encode(TURN_END)
    inside = False
    for i, token in enumerate(ids):
        yield inside
        if token == turn_end:
            inside = False
        elif ids[i - len(header) + 1 : i + 1] == header:
            inside = True
