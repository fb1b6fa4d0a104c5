"""A Hugging Face directory's tokenizer files -> Vocabulary."""

import itertools
from pathlib import Path
from typing import Any, TypeVar

from absl import logging

from qwen_jax.errors import UserError
from qwen_jax.regular_files import MOST_BYTES, is_there
from qwen_jax.strict_json import read_object, read_object_if_there
from qwen_jax.text import hf_added_tokens, hf_templates
from qwen_jax.text.hf_added_tokens import AddedTokens
from qwen_jax.text.hf_post_processor import around
from qwen_jax.text.text_file import read_text
from qwen_jax.text.vocabulary import PATTERN, Vocabulary

T = TypeVar("T", int, str, list, dict)

# The settings of Qwen2's pre-tokenizer that decide ids.
_PRE_TOKENIZERS: tuple[dict[str, object], ...] = (
    {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False},
    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
)
_NFC = {"type": "NFC"}
# None is accepted: some exports forget it, and the reference class adds NFC regardless.
_NORMALIZERS: tuple[object, ...] = (
    None,
    _NFC,
    {"type": "Sequence", "normalizers": []},
    {"type": "Sequence", "normalizers": [_NFC]},
)
# Settings of the BPE model that would change ids and that no Qwen2 tokenizer has.
_FOREIGN = (
    "dropout",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "byte_fallback",
    "ignore_merges",
)


def read(directory: Path) -> Vocabulary:
    """The vocabulary in tokenizer.json, or in vocab.json and merges.txt where there is none.

    The files beside them say more about special tokens, and may be absent. Like transformers'
    Qwen2Tokenizer, which it takes whatever `tokenizer_class` says, this takes tokens, merges and
    the BOS put before texts from tokenizer.json; a file that describes another pre-tokenizer or
    normaliser is refused, and truncation, padding and decoder do not matter.

    Raises UserError where a file is missing, malformed or contradicts another.
    """
    path, slow = directory / "tokenizer.json", directory / "vocab.json"
    config = read_object_if_there(directory / "tokenizer_config.json")
    if is_there(path):
        content = read_object(path, most=MOST_BYTES)
        model = _field(content, "model", dict, path)
        _check_is_qwen2(content, model, path)
        listed = content.get("added_tokens") or []
        if not isinstance(listed, list):
            raise UserError(f"{path}: added_tokens is {listed!r:.80}, not a list; correct it.")
        tokens = hf_added_tokens.read(_field(model, "vocab", dict, path), listed, path, config)
        merges = _merges(model, path)
        before, after = around(content.get("post_processor"), path)
    elif is_there(slow):
        path = slow
        tokens = hf_added_tokens.read(read_object(path, most=MOST_BYTES), [], path, config)
        merges = _merge_lines(directory / "merges.txt")
        before, after = (
            [tokens.ids[tokens.roles[f"{name}_token"]]]
            if config.get(f"add_{name}_token") is True and f"{name}_token" in tokens.roles
            else []
            for name in ("bos", "eos")
        )
    else:
        raise UserError(
            f"{path} is missing, and there is no vocab.json with merges.txt either, so text cannot "
            "be tokenised; download the tokenizer's files from the checkpoint's repository."
        )
    _check_settings(config, after, tokens, directory / "tokenizer_config.json", path)
    by_id = {token: text for text, token in tokens.ids.items() if text}
    ends = _generation_ends(directory / "generation_config.json", by_id)
    if "eos_token" in tokens.roles:
        ends.insert(0, tokens.ids[tokens.roles["eos_token"]])
    return Vocabulary(
        tokens=[by_id.get(token) for token in range(max(by_id, default=-1) + 1)],
        merges=merges,
        added=tokens.tokens,
        end_ids=ends,
        special_tokens=tokens.roles,
        chat_templates=hf_templates.read(directory, config),
        source=str(path),
        prefix_ids=before,
        add_prefix_space=config.get("add_prefix_space") is True,
    )


def _check_is_qwen2(content: dict[str, Any], model: dict[str, Any], path: Path) -> None:
    foreign = [name for name in _FOREIGN if model.get(name)]
    if model.get("type", "BPE") != "BPE" or foreign:
        raise UserError(
            f"{path}: its model is {model.get('type')!r} with {', '.join(foreign) or 'no'} "
            "setting of another tokenizer, but a Qwen2.5 tokenizer is a plain byte-level BPE; "
            "choose a Qwen2.5 checkpoint."
        )
    if not _is_qwen2_pre_tokenizer(content.get("pre_tokenizer")):
        raise UserError(
            f"{path}: its pre_tokenizer is {content.get('pre_tokenizer')!r:.200}, not Qwen2's; "
            "choose a Qwen2.5 checkpoint."
        )
    if content.get("normalizer") not in _NORMALIZERS:
        raise UserError(
            f"{path}: its normalizer is {content['normalizer']!r:.80}, but Qwen2.5's is NFC; "
            "choose a Qwen2.5 checkpoint."
        )


def _is_qwen2_pre_tokenizer(value: object) -> bool:
    steps = value.get("pretokenizers") if isinstance(value, dict) else None
    return (
        isinstance(steps, list)
        and len(steps) == len(_PRE_TOKENIZERS)
        and all(
            isinstance(step, dict) and all(step.get(k) == v for k, v in expected.items())
            for step, expected in zip(steps, _PRE_TOKENIZERS, strict=True)
        )
    )


def _check_settings(
    config: dict[str, Any], after: list[int], tokens: AddedTokens, config_path: Path, path: Path
) -> None:
    """Refuses what the reference would do but what leaves nothing to generate from."""
    if config.get("split_special_tokens") is True:
        raise UserError(
            f"{config_path}: split_special_tokens is true, so <|im_start|> and the other special "
            "tokens would be spelt out and no chat could be told from its text; set it to false."
        )
    if after:
        names = {token: text for text, token in tokens.ids.items()}
        raise UserError(
            f"{path}: it puts {names.get(after[0])!r:.80} after every text, which would end before "
            "the model writes; remove that from its post_processor or add_eos_token."
        )


def _merges(model: dict[str, Any], path: Path) -> list[tuple[str, str]]:
    """Both forms: "a b" up to tokenizers 0.19, ["a", "b"] since."""
    entries = _field(model, "merges", list, path)
    merges = []
    if set(map(type, entries)) <= {str, list}:
        merges = [tuple(e.split(" ") if type(e) is str else e) for e in entries]
    texts_only = set(map(type, itertools.chain.from_iterable(merges))) <= {str}
    if len(merges) < len(entries) or not set(map(len, merges)) <= {2} or not texts_only:
        raise UserError(
            f"{path}: merges holds entries that are not two tokens each; get the file again from "
            "where the model is from."
        )
    return merges


def _merge_lines(path: Path) -> list[tuple[str, str]]:
    """merges.txt: "left right" a line, after a first line with the format's version."""
    if not is_there(path):
        raise UserError(
            f"{path} is missing, and vocab.json beside it is no tokenizer without its merges; "
            "download it from the checkpoint's repository."
        )
    merges = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        words = line.split()
        if not words or line.startswith("#version"):
            continue
        if len(words) != 2:
            raise UserError(
                f"{path}: line {number} is {line!r:.80}, not two tokens; get the file again from "
                "where the model is from."
            )
        merges.append((words[0], words[1]))
    return merges


def _generation_ends(path: Path, tokens: dict[int, str]) -> list[int]:
    """Ends of generation_config.json, without those that no token has."""
    value = read_object_if_there(path).get("eos_token_id")
    ends = value if isinstance(value, list) else [] if value is None else [value]
    for end in ends:
        if type(end) is not int:
            raise UserError(
                f"{path}: eos_token_id is {value!r:.80}, not a token's id or a list of them; "
                "correct it."
            )
        if end not in tokens:
            logging.warning("%s: eos_token_id names %d, but no token has that id.", path, end)
    return [end for end in ends if end in tokens]


def _field(where: dict[str, Any], key: str, kind: type[T], path: Path) -> T:
    value = where.get(key)
    if type(value) is not kind:
        raise UserError(
            f"{path}: {key!r} holds {value!r:.80}, not {kind.__name__}; get the file again from "
            "where the model is from."
        )
    return value
