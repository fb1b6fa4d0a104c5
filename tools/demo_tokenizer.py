"""The demo model's byte-level BPE, trained on the generated text."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Sequence

import tokenizers
from tokenizers import AddedToken, Regex, models, pre_tokenizers, trainers

from qwen_jax.text.chat import CHATML_TEMPLATE
from qwen_jax.text.tokenizer import Tokenizer
from qwen_jax.text.vocabulary import BYTE_SYMBOLS, Vocabulary

END_OF_TEXT, TURN_START, TURN_END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SPACE = BYTE_SYMBOLS[ord(" ")]


def train_vocabulary(texts: Sequence[str], size: int) -> Vocabulary:
    """A vocabulary of `size` tokens, the special ones last, with ChatML as its template.

    Merges are learnt inside runs of letters alone; those that put a space before a frequent
    token come after all of them. So a word is cut the same way whatever stands before it, and
    to copy it is to copy its tokens: all but the first are the very same.
    """
    merges_left = size - len(BYTE_SYMBOLS) - len(SPECIAL_TOKENS)
    letters = _letter_merges(texts, merges_left * 2 // 3)
    plain = Tokenizer(_vocabulary(letters))
    after_space: Counter[str] = Counter()
    space = BYTE_SYMBOLS.index(SPACE)
    for text in texts:
        for before, token in itertools.pairwise(plain.encode(text)):
            if before == space:
                after_space[plain.decode([token])] += 1
    words = [word for word, _ in after_space.most_common() if re.fullmatch("[A-Za-z]+", word)]
    made = len(_vocabulary(letters).tokens) - len(BYTE_SYMBOLS) - len(SPECIAL_TOKENS)
    return _vocabulary(letters + [(SPACE, word) for word in words[: merges_left - made]])


def _letter_merges(texts: Sequence[str], count: int) -> list[tuple[str, str]]:
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[A-Za-z]+|[^A-Za-z]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=len(BYTE_SYMBOLS) + count,
        initial_alphabet=list(BYTE_SYMBOLS),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return [(left, right) for left, right in json.loads(bpe.to_str())["model"]["merges"]]


def _vocabulary(merges: list[tuple[str, str]]) -> Vocabulary:
    # Two merges may make the same token.
    tokens = list(dict.fromkeys([*BYTE_SYMBOLS, *(a + b for a, b in merges), *SPECIAL_TOKENS]))
    ids = {token: i for i, token in enumerate(tokens)}
    return Vocabulary(
        tokens=tokens,
        merges=merges,
        added={
            ids[token]: AddedToken(token, special=True, normalized=False)
            for token in SPECIAL_TOKENS
        },
        end_ids=[ids[TURN_END]],
        special_tokens={"eos_token": TURN_END, "pad_token": END_OF_TEXT},
        chat_templates={"default": CHATML_TEMPLATE},
        source="the demo model",
    )


def letter_pieces(vocabulary: Vocabulary) -> list[str]:
    """The tokens that are lower-case letters and nothing else."""
    return [token for token in vocabulary.ids if re.fullmatch("[a-z]+", token)]
