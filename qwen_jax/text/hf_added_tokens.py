"""The tokens that a Hugging Face directory's files name besides the BPE's own, and their roles.

They stand in tokenizer.json and in tokenizer_config.json (older checkpoints: added_tokens.json
and special_tokens_map.json), and each file may name some that the others lack.
"""

import dataclasses
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from qwen_jax.errors import UserError
from qwen_jax.strict_json import read_object_if_there
from qwen_jax.text.vocabulary import is_control

# In the order in which transformers gives ids to those that have none.
ROLES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# What the reference's Qwen2Tokenizer takes where no file says anything.
_DEFAULT_ROLES = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")
_LISTS = ("extra_special_tokens", "additional_special_tokens")
# So that one absurd id asks for no memory; Qwen2.5's largest vocabulary has 152,064 rows.
_MAX_ID = (1 << 22) - 1


@dataclasses.dataclass
class AddedTokens:
    """All tokens of a directory while its files are read, one after another.

    Attributes:
        ids: text of every token, the BPE's included -> id.
        tokens: id -> token that is matched as a whole.
        roles: `bos_token`, `eos_token`, … -> text.
    """

    ids: dict[str, int]
    source: Path
    tokens: dict[int, AddedToken] = dataclasses.field(default_factory=dict)
    roles: dict[str, str] = dataclasses.field(default_factory=dict)
    _texts: dict[int, str] = dataclasses.field(init=False)
    _files: dict[int, Path] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self._texts = {}
        for text, token in self.ids.items():
            _check_id(text, token, self.source)
            if self._texts.setdefault(token, text) != text:
                raise UserError(
                    f"{self.source}: the tokens {self._texts[token]!r:.80} and {text!r:.80} have "
                    f"the same id, {token}; get the file again from where the model is from."
                )

    def add(self, text: str, token: int, flags: dict[str, bool], source: Path) -> None:
        """One token as `source` names it; of two files' flags the later one's hold."""
        if not text:
            return  # as in the tokenizers library: nothing would be matched
        _check_id(text, token, source)
        known = self.ids.setdefault(text, token)
        if known != token:
            self._contradiction(f"{text!r:.80} the id {known}", f"the id {token}", known, source)
        other = self._texts.setdefault(token, text)
        if other != text:
            self._contradiction(f"id {token} to {other!r:.80}", f"to {text!r:.80}", token, source)
        self._files.setdefault(token, source)
        # The library's default for `normalized` follows from `special`.
        normalized = {"normalized": not flags.get("special", False)}
        control = {"special": is_control(text, flags.get("special", False))}
        self.tokens[token] = AddedToken(text, **normalized | flags | control)

    def name(self, text: str, source: Path) -> None:
        """A special token named by its text alone: a new one gets the id after the last."""
        token = self.ids[text] if text in self.ids else max(self.ids.values(), default=-1) + 1
        # Like Qwen2Tokenizer's, whatever flags a file gives this token elsewhere.
        self.add(text, token, {"special": True}, source)

    def _contradiction(self, first: str, second: str, token: int, source: Path) -> None:
        where = self._files.get(token, self.source)
        raise UserError(
            f"{where} gives {first} and {source} gives it {second}; take both files from the same "
            "checkpoint, or correct one."
            if where != source
            else f"{source} gives {first} and also {second}; correct one of them."
        )


def read(
    ids: dict[str, int], listed: list[Any], source: Path, config: dict[str, Any]
) -> AddedTokens:
    """The union of what the files in a directory name, with ids as transformers gives them.

    Args:
        ids: the BPE's own tokens.
        listed: `added_tokens` of tokenizer.json.
        source: the file that both are from.
        config: tokenizer_config.json.

    Raises UserError where an entry is malformed, or files contradict each other: one text with
    two ids, one id with two texts.
    """
    found = AddedTokens(dict(ids), source)
    for entry in listed:
        text, flags = _token(entry, "added_tokens", source)
        found.add(text, _id(entry.get("id"), text, source), flags, source)
    config_path = source.with_name("tokenizer_config.json")
    decoder = config.get("added_tokens_decoder")
    roles, lists = _roles(config, config_path), _lists(config, config_path)
    if decoder is None:
        # Only where the newer entry is absent does transformers read the older files.
        path = source.with_name("special_tokens_map.json")
        older = read_object_if_there(path)
        roles |= _roles(older, path)
        lists |= _lists(older, path)
        named = {*roles.values(), *lists}
        path = source.with_name("added_tokens.json")
        for text, token in read_object_if_there(path).items():
            found.add(text, _id(token, text, path), {"special": text in named}, path)
    elif not isinstance(decoder, dict):
        raise UserError(
            f"{config_path}: added_tokens_decoder is {decoder!r:.80}, not an object; correct it."
        )
    else:
        for key, entry in decoder.items():
            text, flags = _token(entry, "added_tokens_decoder", config_path)
            token = int(key) if key.isascii() and key.isdigit() and len(key) < 20 else key
            found.add(text, _id(token, text, config_path), flags, config_path)
    order = {name: i for i, name in enumerate(ROLES)}
    for name, text in sorted(
        (_DEFAULT_ROLES | roles).items(), key=lambda role: order.get(role[0], len(order))
    ):
        found.name(text, config_path)
        # No byte is unknown, and a GGUF file of the same model does not name this default.
        if text and (name in roles or name != "unk_token"):
            found.roles[name] = text
    for text, path in lists.items():
        found.name(text, path)
    return found


def _roles(content: dict[str, Any], path: Path) -> dict[str, str]:
    """Every `*_token` of an object that names a token by its text, and "" where it names none."""
    roles = {}
    extra = content.get("extra_special_tokens")
    named = extra if isinstance(extra, dict) else {}
    for name, value in (content | named).items():
        if name in ROLES or name in named or (name.endswith("_token") and isinstance(value, str)):
            roles[name] = "" if value is None else _text(value, name, path)
    return roles


def _lists(content: dict[str, Any], path: Path) -> dict[str, Path]:
    """The texts in the lists of special tokens, and the file that they are from."""
    texts: dict[str, Path] = {}
    for name in _LISTS:
        value = content.get(name) or []
        if isinstance(value, dict) and name == _LISTS[0]:
            continue  # names and texts: see _roles
        if not isinstance(value, list):
            raise UserError(f"{path}: {name} is {value!r:.80}, not a list of tokens; correct it.")
        texts |= {_text(entry, name, path): path for entry in value}
    return texts


def _text(value: object, name: str, path: Path) -> str:
    """A token given by its text, or by an object with its `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise UserError(f"{path}: {name} is {value!r:.80}, which names no token; correct it.")
    return text


def _token(entry: Any, name: str, path: Path) -> tuple[str, dict[str, bool]]:
    """Text and flags of an entry. Flags that are left out are the library's defaults."""
    if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
        raise UserError(
            f"{path}: the entry {entry!r:.80} of {name} is no object with a text 'content'; "
            "correct it."
        )
    flags = {flag: entry[flag] for flag in _FLAGS if entry.get(flag) is not None}
    for flag, value in flags.items():
        if not isinstance(value, bool):
            raise UserError(
                f"{path}: {flag!r} of the token {entry['content']!r:.80} is {value!r:.80}, neither "
                "true nor false; correct it."
            )
    return entry["content"], flags


def _id(value: object, text: str, path: Path) -> int:
    if type(value) is not int:
        raise UserError(
            f"{path}: the id of the token {text!r:.80} is {value!r:.80}, not a number; correct it."
        )
    return value


def _check_id(text: str, token: object, path: Path) -> None:
    if not 0 <= _id(token, text, path) <= _MAX_ID:
        raise UserError(
            f"{path}: the token {text!r:.80} has the id {token}, and ids here are 0 to {_MAX_ID}; "
            "correct it or choose another checkpoint."
        )
