"""A Hugging Face directory's tokenizer files -> Vocabulary."""

import itertools
import json
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import AddedToken

from qwen_jax.errors import UserError
from qwen_jax.text.vocabulary import PATTERN, Vocabulary, is_control

T = TypeVar("T", int, str, list, dict)

# The settings of Qwen2's pre-tokenizer that decide ids.
_PRE_TOKENIZERS: tuple[dict[str, object], ...] = (
    {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False},
    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
)
_TOKEN_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")
# Settings of the BPE model that would change ids and that no Qwen2 tokenizer has.
_FOREIGN = (
    "dropout",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "byte_fallback",
    "ignore_merges",
)


def read(directory: Path) -> Vocabulary:
    """The vocabulary in tokenizer.json, with what the files beside it say about special tokens.

    tokenizer_config.json, generation_config.json and chat_template.jinja may be absent.
    Like transformers' Qwen2Tokenizer this takes tokens and merges from tokenizer.json and
    nothing else, so a file that describes another pre-tokenizer is refused.

    Raises UserError where a file is missing, damaged or contradicts another.
    """
    path = directory / "tokenizer.json"
    source = str(path)
    if not path.is_file():
        raise UserError(
            f"{source} is missing, and without it text cannot be tokenised; download it from the "
            "checkpoint's repository."
        )
    content = _read_object(path)
    model = _field(content, "model", dict, source)
    _check_is_qwen2(content, model, source)
    tokens, added = _tokens(content, model, source)
    known = set(tokens)

    config_path = directory / "tokenizer_config.json"
    config = _read_object(config_path)
    special = {}
    for name in ("bos_token", "eos_token", "pad_token"):
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if text is None:
            continue
        if not isinstance(text, str) or text not in known:
            raise UserError(
                f"{config_path}: {name} is {value!r:.80}, which is no token of {path.name}; the "
                "files do not belong together, so download both again."
            )
        special[name] = text
    ends = _generation_ends(directory / "generation_config.json", len(tokens))
    if "eos_token" in special:
        ends.insert(0, tokens.index(special["eos_token"]))
    return Vocabulary(
        tokens=tokens,
        merges=_merges(model, source),
        added=added,
        end_ids=ends,
        special_tokens=special,
        chat_template=_chat_template(directory, config, str(config_path)),
        source=source,
    )


def _check_is_qwen2(content: dict[str, Any], model: dict[str, Any], source: str) -> None:
    foreign = [name for name in _FOREIGN if model.get(name)]
    if model.get("type", "BPE") != "BPE" or foreign:
        raise UserError(
            f"{source}: its model is {model.get('type')!r} with {', '.join(foreign) or 'no'} "
            "setting of another tokenizer, but a Qwen2.5 tokenizer is a plain byte-level BPE; "
            "choose a Qwen2.5 checkpoint."
        )
    if not _is_qwen2_pre_tokenizer(content.get("pre_tokenizer")):
        raise UserError(
            f"{source}: its pre_tokenizer is {content.get('pre_tokenizer')!r:.200}, not Qwen2's; "
            "choose a Qwen2.5 checkpoint."
        )
    # None is accepted: some exports forget it, and the reference class adds NFC regardless.
    normalizer = content.get("normalizer")
    if normalizer not in (None, {"type": "NFC"}):
        raise UserError(
            f"{source}: its normalizer is {normalizer!r:.80}, but Qwen2.5's is NFC; choose a "
            "Qwen2.5 checkpoint."
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


def _tokens(
    content: dict[str, Any], model: dict[str, Any], source: str
) -> tuple[list[str], dict[int, AddedToken]]:
    ids = dict(_field(model, "vocab", dict, source))
    added = {}
    for entry in _field(content, "added_tokens", list, source):
        if not isinstance(entry, dict):
            raise UserError(f"{source}: the added token {entry!r:.80} is not an object.")
        text, token = _field(entry, "content", str, source), _field(entry, "id", int, source)
        if ids.setdefault(text, token) != token:
            raise UserError(
                f"{source}: the added token {text!r} has the ids {token} and {ids[text]!r}; the "
                "file is damaged, so download it again."
            )
        flags = {k: entry.get(k) is True for k in _TOKEN_FLAGS}
        added[token] = AddedToken(text, **flags | {"special": is_control(text, flags["special"])})
    if not set(map(type, ids.values())) <= {int} or set(ids.values()) != set(range(len(ids))):
        raise UserError(
            f"{source}: the ids of its {len(ids)} tokens are not 0 to {len(ids) - 1}, each once; "
            "the file is damaged, so download it again."
        )
    return sorted(ids, key=ids.__getitem__), added


def _merges(model: dict[str, Any], source: str) -> list[tuple[str, str]]:
    """Both forms: "a b" up to tokenizers 0.19, ["a", "b"] since."""
    entries = _field(model, "merges", list, source)
    merges = []
    if set(map(type, entries)) <= {str, list}:
        merges = [tuple(e.split(" ") if type(e) is str else e) for e in entries]
    texts_only = set(map(type, itertools.chain.from_iterable(merges))) <= {str}
    if len(merges) < len(entries) or not set(map(len, merges)) <= {2} or not texts_only:
        raise UserError(
            f"{source}: merges holds entries that are not two tokens each; the file is damaged, so "
            "download it again."
        )
    return merges


def _generation_ends(path: Path, size: int) -> list[int]:
    value = _read_object(path).get("eos_token_id", [])
    ends = value if isinstance(value, list) else [value]
    for end in ends:
        if type(end) is not int or not 0 <= end < size:
            raise UserError(
                f"{path}: eos_token_id is {value!r:.80}, but the ids in use are 0 to {size - 1}; "
                "download it again."
            )
    return list(ends)


def _chat_template(directory: Path, config: dict[str, Any], source: str) -> str | None:
    """chat_template.jinja, where checkpoints keep it now, else the older entry in the config."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return _read_text(path)
    template = config.get("chat_template")
    if isinstance(template, list):  # several templates with names
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default", template)
    if not isinstance(template, str | None):
        raise UserError(
            f"{source}: chat_template is {template!r:.80}, which is neither text nor a list with "
            "a 'default'; download it again."
        )
    return template


def _field(where: dict[str, Any], key: str, kind: type[T], source: str) -> T:
    value = where.get(key)
    if type(value) is not kind:
        raise UserError(
            f"{source}: {key!r} holds {value!r:.80}, not {kind.__name__}; the file is damaged, so "
            "download it again."
        )
    return value


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); download it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; download it again.")
    return content


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); download it again.") from error
