"""Every damaged file ends in one sentence that says what is wrong with it."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from qwen_jax.errors import UserError
from qwen_jax.text import Tokenizer
from qwen_jax.text.vocabulary import BYTE_SYMBOLS

G = "tokenizer.ggml."
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 7031645\n"
Change = Callable[[dict[str, Any]], Any]


def _set(key: str, value: Any) -> Change:
    return lambda content: content.__setitem__(key, value)


def _remove(key: str) -> Change:
    return lambda content: content.pop(key)


def _edit(key: str, edit: Change) -> Change:
    return lambda content: edit(content[key])


GGUF_DAMAGE: dict[str, tuple[Change, str]] = {
    "no merges": (_remove(G + "merges"), "'tokenizer.ggml.merges' is missing"),
    "no tokens": (_remove(G + "tokens"), "'tokenizer.ggml.tokens' is missing"),
    "no types": (_remove(G + "token_type"), "'tokenizer.ggml.token_type' is missing"),
    "no pre": (_remove(G + "pre"), "'tokenizer.ggml.pre' is missing"),
    "other model": (_set(G + "model", "llama"), "tokenizer.ggml.model is 'llama'"),
    "other pre": (_set(G + "pre", "llama-bpe"), "tokenizer.ggml.pre 'llama-bpe'"),
    "model not text": (_set(G + "model", 3), "holds 3, not str"),
    "tokens not an array": (_set(G + "tokens", "abc"), "'tokenizer.ggml.tokens' is not an array"),
    "tokens not text": (_set(G + "tokens", [1, 2]), "is not an array of str only"),
    "a token not text": (_edit(G + "tokens", _set(7, None)), "is not an array of str only"),
    "types not integers": (
        _edit(G + "token_type", _set(0, 1.5)),
        "'tokenizer.ggml.token_type' is not an array of int only",
    ),
    "types as floats": (_set(G + "token_type", np.ones(392, np.float32)), "array of int only"),
    "merges not text": (_edit(G + "merges", _set(0, 5)), "is not an array of str only"),
    "types too short": (
        _edit(G + "token_type", lambda t: t.pop()),
        "tokenizer.ggml.tokens has 392 entries and tokenizer.ggml.token_type 391",
    ),
    "tokens empty": (
        lambda m: m.update({G + "tokens": [], G + "token_type": []}),
        "lacks 256 of the 256 bytes",
    ),
    "all of them added": (
        _set(G + "token_type", [3] * 392),
        "it marks every token as an added one, so no ordinary text has any",
    ),
    "a token twice": (
        _edit(G + "tokens", _set(300, BYTE_SYMBOLS[65])),
        "the token 'A' has two ids, 32 and 300",
    ),
    "a token empty": (_edit(G + "tokens", _set(300, "")), "names a token that is not there"),
    "a byte missing": (
        _edit(G + "tokens", _set(32, "other")),
        "lacks 1 of the 256 bytes, the first 0x41",
    ),
    "merge of unknown token": (
        _edit(G + "merges", _set(3, "Hello Nobody")),
        "the merge of 'Hello' and 'Nobody' names a token that is not there",
    ),
    "merge into unknown token": (
        _edit(G + "merges", _set(3, "~ ~")),
        "the merge of '~' and '~' names a token",
    ),
    "merge of one": (_edit(G + "merges", _set(3, "ab")), "the merge of 'ab' and ''"),
    "merge of three": (_edit(G + "merges", _set(3, "a b c")), "the merge of 'a' and 'b c'"),
    "merges cut short": (
        _edit(G + "merges", lambda merges: merges.__delitem__(slice(100, None))),
        "none of the 100 merges makes 28 of its tokens, the first",
    ),
    "eos not an integer": (_set(G + "eos_token_id", "386"), "holds '386', not int"),
    "eos an array": (
        _set(G + "eos_token_id", np.zeros(200, np.float32)),
        "'tokenizer.ggml.eos_token_id' holds [0.0, 0.0,",
    ),
    "a BOS that is no token": (
        lambda m: m.update({G + "add_bos_token": True, G + "bos_token_id": 10**6}),
        "add_bos_token is true, but tokenizer.ggml.bos_token_id names no token",
    ),
    "an end after every text": (_set(G + "add_eos_token", True), "add_eos_token is true"),
    "add_bos not a bool": (_set(G + "add_bos_token", 1), "holds 1, not bool"),
    "template not text": (_set("tokenizer.chat_template", ["x"]), "not str"),
    "an end that is no token": (
        lambda m: (
            m.update({G + "eos_token_id": 10**6}),
            m[G + "tokens"].__setitem__(slice(384, 387), ["<a>", "<b>", "<c>"]),
        ),
        "no end-of-text token that it has is named",
    ),
    "nothing ends a text": (
        lambda m: (
            m.pop(G + "eos_token_id"),
            m[G + "tokens"].__setitem__(slice(384, 387), ["<a>", "<b>", "<c>"]),
        ),
        "no end-of-text token that it has is named",
    ),
}


@pytest.mark.parametrize("change, message", GGUF_DAMAGE.values(), ids=GGUF_DAMAGE)
def test_damaged_gguf(change: Change, message: str, gguf_metadata: dict[str, Any]) -> None:
    metadata = copy.deepcopy(gguf_metadata)
    change(metadata)
    _assert_refused(lambda: Tokenizer.from_gguf(metadata, "bad.gguf"), "bad.gguf", message)


def _assert_refused(build: Callable[[], object], source: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        build()
    text = str(caught.value)
    assert source in text and message in text
    assert text.endswith(".") and "\n" not in text and len(text) < 700


def test_optional_keys_may_be_absent(gguf_metadata: dict[str, Any]) -> None:
    optional = ("eos_token_id", "bos_token_id", "padding_token_id", "add_bos_token")
    metadata = {k: v for k, v in gguf_metadata.items() if k.removeprefix(G) not in optional}
    del metadata["tokenizer.chat_template"]
    tokenizer = Tokenizer.from_gguf(metadata, "x.gguf")
    assert tokenizer.stop_ids == (384, 386)
    assert tokenizer.special_tokens == {}
    assert tokenizer.chat_template is None


def test_end_of_turn_stops_too(gguf_metadata: dict[str, Any]) -> None:
    metadata = gguf_metadata | {G + "eot_token_id": 385}
    assert Tokenizer.from_gguf(metadata, "x.gguf").stop_ids == (386, 385, 384)


PADDING_NAMES = ("[PAD389]", "[PAD390]", "[PAD391]")


def test_padding_named_as_user_defined_is_no_token(gguf_metadata: dict[str, Any]) -> None:
    """As older converters wrote it: the text "[PAD389]" is text."""
    metadata = copy.deepcopy(gguf_metadata)
    assert tuple(metadata[G + "tokens"][389:]) == PADDING_NAMES
    metadata[G + "token_type"][389:] = [4, 4, 4]
    tokenizer = Tokenizer.from_gguf(metadata, "x.gguf")
    assert tokenizer.vocab_size == 389
    assert len(tokenizer.encode("[PAD389]")) > 1


HF_DAMAGE: dict[str, tuple[Change, str]] = {
    "no model": (_remove("model"), "'model' holds None, not dict"),
    "other model": (_edit("model", _set("type", "Unigram")), "its model is 'Unigram'"),
    "byte fallback": (_edit("model", _set("byte_fallback", True)), "byte_fallback"),
    "no vocab": (_edit("model", _remove("vocab")), "'vocab' holds None"),
    "vocab a list": (_edit("model", _set("vocab", [1])), "'vocab' holds [1], not dict"),
    "no merges": (_edit("model", _remove("merges")), "'merges' holds None"),
    "merges of three": (
        _edit("model", _edit("merges", _set(0, ["a", "b", "c"]))),
        "merges holds entries that are not two tokens each",
    ),
    "merges of numbers": (_edit("model", _edit("merges", _set(0, [1, 2]))), "not two tokens"),
    "merges of nothing": (_edit("model", _edit("merges", _set(0, None))), "not two tokens"),
    "id missing": (_edit("model", _edit("vocab", _remove("A"))), "lacks 1 of the 256 bytes"),
    "id twice": (
        _edit("model", _edit("vocab", _set("A", 33))),
        "the tokens 'A' and 'B' have the same id, 33",
    ),
    "id not an integer": (
        _edit("model", _edit("vocab", _set("A", "x"))),
        "the id of the token 'A' is 'x', not a number",
    ),
    "id true": (_edit("model", _edit("vocab", _set('"', True))), "is True, not a number"),
    "id negative": (_edit("model", _edit("vocab", _set("A", -1))), "'A' has the id -1"),
    "id absurd": (
        _edit("added_tokens", _edit(0, _set("id", 10**12))),
        "has the id 1000000000000, and ids here are 0 to 4194303",
    ),
    "half a surrogate pair": (
        _edit("added_tokens", _edit(3, _set("content", "\ud800"))),
        "it holds \\ud800, half a character",
    ),
    "added token with two ids": (
        _edit("model", _edit("vocab", _set("<|im_end|>", 32))),
        "the tokens 'A' and '<|im_end|>' have the same id, 32",
    ),
    "added token no object": (
        _edit("added_tokens", _set(0, 5)),
        "the entry 5 of added_tokens is no object",
    ),
    "added token with another id": (
        _edit("added_tokens", _edit(0, _set("content", "A"))),
        "gives 'A' the id 32 and also the id 384",
    ),
    "added token flag": (
        _edit("added_tokens", _edit(0, _set("lstrip", "yes"))),
        "'lstrip' of the token '<|endoftext|>' is 'yes', neither true nor false",
    ),
    "added tokens no list": (_set("added_tokens", {"a": 1}), "added_tokens is {'a': 1}, not a"),
    "post-processor": (_set("post_processor", {"type": "Mine"}), "its post_processor is"),
    "post-processor of nothing": (
        _set("post_processor", {"type": "TemplateProcessing", "single": [], "special_tokens": {}}),
        "what that puts around a text is not known",
    ),
    "post-processor without its token": (
        _set(
            "post_processor",
            {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "x"}}, {"Sequence": {"id": "A"}}],
                "special_tokens": {},
            },
        ),
        "what that puts around a text is not known",
    ),
    "post-processor that ends": (
        _set(
            "post_processor",
            {
                "type": "RobertaProcessing",
                "sep": ["<|im_end|>", 386],
                "cls": ["<|im_start|>", 385],
                "trim_offsets": True,
                "add_prefix_space": False,
            },
        ),
        "puts '<|im_end|>' after every text",
    ),
    "added token no text": (
        _edit("added_tokens", _edit(0, _remove("content"))),
        "of added_tokens is no object with a text 'content'",
    ),
    "other pattern": (
        _edit("pre_tokenizer", _edit("pretokenizers", _edit(0, _set("pattern", {"Regex": "."})))),
        "its pre_tokenizer is",
    ),
    "no pre-tokenizer": (_set("pre_tokenizer", None), "its pre_tokenizer is None"),
    "pre-tokenizer text": (_set("pre_tokenizer", "x"), "its pre_tokenizer is 'x'"),
    "prefix space": (
        _edit("pre_tokenizer", _edit("pretokenizers", _edit(1, _set("add_prefix_space", True)))),
        "its pre_tokenizer is",
    ),
    "other normaliser": (_set("normalizer", {"type": "NFKC"}), "its normalizer is"),
}


@pytest.mark.parametrize("change, message", HF_DAMAGE.values(), ids=HF_DAMAGE)
def test_damaged_tokenizer_json(change: Change, message: str, hf_directory: Path) -> None:
    path = hf_directory / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    _assert_refused(lambda: Tokenizer.from_hf(hf_directory), str(path), message)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("tokenizer.json", "{", "is not JSON"),
        ("tokenizer.json", "[" * 100_000, "nested too deeply"),
        ("tokenizer.json", "[]", "must be a JSON object"),
        ("tokenizer.json", b'{"a": "\xff"}', "it is not UTF-8 at byte 7"),
        ("tokenizer.json", '{"model": {"vocab": {"a": 0, "a": 1}}}', "the key 'a' appears twice"),
        ("tokenizer_config.json", "[]", "must be a JSON object"),
        ("tokenizer_config.json", '{"eos_token": 1, "eos_token": 2}', "'eos_token' appears twice"),
        ("tokenizer_config.json", '{"split_special_tokens": true}', "split_special_tokens is true"),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}', "added_tokens_decoder is []"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": "x"}}', "the entry 'x'"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"x": {"content": "<a>"}}}',
            "the id of the token '<a>' is 'x'",
        ),
        ("tokenizer_config.json", '{"extra_special_tokens": "<a>"}', "special_tokens is '<a>'"),
        ("tokenizer_config.json", '{"additional_special_tokens": [1]}', "special_tokens is 1"),
        ("special_tokens_map.json", '{"eos_token": [1]}', "eos_token is [1]"),
        ("added_tokens.json", '{"<a>": "1"}', "the id of the token '<a>' is '1'"),
        ("tokenizer_config.json", '{"eos_token": 5}', "eos_token is 5"),
        ("tokenizer_config.json", '{"chat_template": 5}', "chat_template is 5"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "x"}]}', "chat_template is [{"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id is 'x'"),
        ("generation_config.json", '{"eos_token_id": [1, true]}', "eos_token_id is [1, True]"),
        ("chat_template.jinja", b"\xff", "is not UTF-8 at byte 0; convert it"),
        ("chat_template.jinja", POINTER, "the file is a git-lfs pointer"),
        ("tokenizer.json", POINTER, "the file is a git-lfs pointer"),
        ("tokenizer.json", "<!DOCTYPE html><html>", "the file is a web page"),
        ("tokenizer_config.json", POINTER, "the file is a git-lfs pointer"),
        ("additional_chat_templates/x.jinja", b"\xff", "is not UTF-8 at byte 0; convert it"),
    ],
)
def test_damaged_hf_files(
    name: str, content: str | bytes, message: str, hf_directory: Path
) -> None:
    path = hf_directory / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    _assert_refused(lambda: Tokenizer.from_hf(hf_directory), str(path), message)


def test_no_tokenizer_json(tmp_path: Path) -> None:
    _assert_refused(lambda: Tokenizer.from_hf(tmp_path), "tokenizer.json", "is missing")


def test_old_forms_of_hf_files(hf_directory: Path, small: Tokenizer) -> None:
    """Merges as lines, no normaliser, and several templates inside the config."""
    path = hf_directory / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    content["normalizer"] = None
    path.write_text(json.dumps(content))
    templates = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    config = {"eos_token": "<|im_end|>", "chat_template": templates}
    (hf_directory / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_hf(hf_directory)
    assert tokenizer.chat_template == "y"
    assert tokenizer.encode("Vie\u0323\u0302t Hello") == small.encode("Vi\u1ec7t Hello")


def test_byte_symbols_are_the_librarys() -> None:
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for byte in range(128):
        ((symbol, _),) = level.pre_tokenize_str(chr(byte))
        assert symbol == BYTE_SYMBOLS[byte]
    for char in map(chr, range(0x80, 0x10000, 37)):
        if not 0xD800 <= ord(char) < 0xE000:
            ((symbols, _),) = level.pre_tokenize_str(char)
            assert symbols == "".join(BYTE_SYMBOLS[byte] for byte in char.encode())
    assert sorted(BYTE_SYMBOLS) == sorted(level.alphabet())
