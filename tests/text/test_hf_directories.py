"""Tokenizer files of directories as people have them: ids as AutoTokenizer gives them.

Each case's ids were written down from transformers 5.24.0; `make parity` asks it again.
"""

import json
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from qwen_jax import api
from qwen_jax.errors import UserError
from qwen_jax.text import Tokenizer
from tests.text.test_tokenizer import HARD_TEXTS
from tests.text.test_vocabulary import POINTER

# A file's name -> its JSON, or its text.
Files = dict[str, Any]
Edit = Callable[[Files], object]
FLAGS = dict.fromkeys(("special", "normalized", "lstrip", "rstrip", "single_word"), False)
SPECIAL = FLAGS | {"special": True}
# What the reference's own vocabulary ends with; a new token gets the next id, 389.
END = 389


def config(**fields: Any) -> Edit:
    return lambda files: files["tokenizer_config.json"].update(fields)


def decoder(token: int, content: str, **flags: bool) -> Edit:
    entry = {str(token): {"content": content, **flags}}
    return lambda files: files["tokenizer_config.json"]["added_tokens_decoder"].update(entry)


def listed(token: int, content: str, **flags: bool) -> Edit:
    entry = {"id": token, "content": content, **flags}
    return lambda files: files["tokenizer.json"]["added_tokens"].append(entry)


def set_in_json(key: str, value: Any) -> Edit:
    return lambda files: files["tokenizer.json"].update({key: value})


def both(*edits: Edit) -> Edit:
    return lambda files: [edit(files) for edit in edits]


def older(files: Files) -> None:
    """As transformers wrote directories before it had `added_tokens_decoder`."""
    del files["tokenizer_config.json"]["added_tokens_decoder"]


def other_file(name: str, content: Any) -> Edit:
    return lambda files: files.update({name: content})


def without_end_of_text(files: Files) -> None:
    """No token of this name, which is yet the reference's unk_token."""
    for name, content in files.items():
        files[name] = json.loads(json.dumps(content).replace("<|endoftext|>", "<|other|>"))


def slow(files: Files) -> None:
    """vocab.json and merges.txt in place of tokenizer.json."""
    model = files.pop("tokenizer.json")["model"]
    files["vocab.json"] = model["vocab"]
    lines = ("#version: 0.2", *(" ".join(pair) for pair in model["merges"]))
    files["merges.txt"] = "\n".join(lines) + "\n"


def in_merges(pattern: str, replacement: str) -> Edit:
    def edit(files: Files) -> None:
        files["merges.txt"] = re.sub(pattern, replacement, files["merges.txt"])

    return edit


ADDED = {"<|endoftext|>": 384, "<|im_start|>": 385, "<|im_end|>": 386, "<tool_call>": 387}
BOS = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {
        "<|endoftext|>": {"id": "<|endoftext|>", "ids": [384], "tokens": ["<|endoftext|>"]}
    },
}
X = "a<|x|>b"
CASES: dict[str, tuple[Edit, dict[str, list[int]]]] = {
    "as released": (
        lambda files: None,
        {
            X: [64, 27, 91, 87, 91, 29, 65],
            "a <tool_call> b<|im_end|>": [64, 220, 387, 220, 65, 386],
        },
    ),
    "decoder": (decoder(END, "<|x|>", **SPECIAL), {X: [64, 389, 65]}),
    "decoder without flags": (decoder(END, "e\u0301x"), {"ae\u0301x \xe9x": [64, 389, 220, 389]}),
    "decoder not normalized": (
        decoder(END, "e\u0301x", **FLAGS),
        {"ae\u0301x \xe9x": [64, 389, 220, 127, 102, 87]},
    ),
    "decoder and list": (
        both(decoder(END, "<|x|>", **SPECIAL), listed(END, "<|x|>", **SPECIAL)),
        {X: [64, 389, 65]},
    ),
    "flags are the decoder's": (
        both(
            decoder(END, "<|x|>", **SPECIAL | {"lstrip": True}),
            listed(END, "<|x|>", **SPECIAL | {"rstrip": True}),
        ),
        {"a  <|x|>  b": [64, 389, 220, 220, 65]},
    ),
    "the list's flags": (
        both(older, listed(END, "<|x|>", **SPECIAL | {"lstrip": True})),
        {"a  <|x|>  b": [64, 389, 220, 220, 65]},
    ),
    "additional": (config(additional_special_tokens=["<|x|>", "<|im_end|>"]), {X: [64, 389, 65]}),
    "extra": (config(extra_special_tokens=["<|x|>"]), {X: [64, 389, 65]}),
    "extra by name": (config(extra_special_tokens={"x_token": "<|x|>"}), {X: [64, 389, 65]}),
    "extra with an empty one": (
        config(extra_special_tokens=["", "<|x|>", "<|x|>"]),
        {X: [64, 389, 65]},
    ),
    "a role of one's own": (config(x_token="<|x|>"), {X: [64, 389, 65]}),
    "eos": (config(eos_token="<|x|>"), {X: [64, 389, 65]}),
    "bos": (config(bos_token="<|x|>"), {X: [64, 389, 65]}),
    "pad": (config(pad_token="<|x|>"), {X: [64, 389, 65]}),
    "unk": (config(unk_token="<|x|>"), {X: [64, 389, 65]}),
    "mask": (config(mask_token="<|x|>"), {X: [64, 389, 65]}),
    "nothing named": (
        config(eos_token=None, pad_token=None, unk_token=None),
        {X: [64, 27, 91, 87, 91, 29, 65]},
    ),
    "pad is text": (config(pad_token="!"), {"a!! b!": [64, 0, 0, 220, 65, 0]}),
    "several, in their order": (
        config(
            zoo_token="<|z|>",
            extra_special_tokens=["<|x|>"],
            unk_token="<|u|>",
            pad_token="<|p|>",
            eos_token="<|e|>",
            bos_token="<|b|>",
        ),
        {"<|b|><|e|><|u|><|p|><|z|><|x|>": [389, 390, 391, 392, 393, 394]},
    ),
    "unk that no file names": (without_end_of_text, {"a<|endoftext|>b": [64, 389, 65]}),
    "a plain token named special": (
        config(extra_special_tokens=["<tool_call>"]),
        {"a <tool_call> b": [64, 220, 387, 220, 65]},
    ),
    "a named one's flags": (
        decoder(386, "<|im_end|>", **FLAGS | {"lstrip": True}),
        {"a  <|im_end|> b": [64, 261, 386, 220, 65]},
    ),
    "special_tokens_map": (
        both(
            older,
            other_file(
                "special_tokens_map.json",
                {"eos_token": SPECIAL | {"content": "<|x|>"}, "extra_special_tokens": ["<|y|>"]},
            ),
        ),
        {X: [64, 389, 65], "<|y|>": [390]},
    ),
    "special_tokens_map, not read": (
        other_file("special_tokens_map.json", {"eos_token": "<|x|>"}),
        {X: [64, 27, 91, 87, 91, 29, 65]},
    ),
    "added_tokens.json": (
        both(older, other_file("added_tokens.json", {"<x>": END})),
        {"a<x>b": [64, 389, 65]},
    ),
    "added_tokens.json, not read": (
        other_file("added_tokens.json", {"<x>": END}),
        {"a<x>b": [64, 27, 87, 29, 65]},
    ),
    "class of another": (
        config(tokenizer_class="LlamaTokenizerFast"),
        {"Hello, y'all": [373, 11, 267, 370]},
    ),
    "no class": (config(tokenizer_class=None), {"Hello, y'all": [373, 11, 267, 370]}),
    "no tokenizer_config": (
        lambda files: files.pop("tokenizer_config.json"),
        {"<tool_call><|im_end|>": [387, 386]},
    ),
    "a BOS": (set_in_json("post_processor", BOS), {"a": [384, 64]}),
    "a BOS among others": (
        set_in_json(
            "post_processor",
            {
                "type": "Sequence",
                "processors": [
                    {
                        "type": "ByteLevel",
                        "add_prefix_space": True,
                        "trim_offsets": True,
                        "use_regex": True,
                    },
                    BOS,
                ],
            },
        ),
        {"a": [384, 64]},
    ),
    "a BOS that only the config asks for": (
        config(add_bos_token=True, bos_token="<|endoftext|>"),
        {"a": [64]},
    ),
    "no normaliser": (set_in_json("normalizer", None), {"Vie\u0323\u0302t": [281, 360]}),
    "one of one normaliser": (
        set_in_json("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFC"}]}),
        {"Vie\u0323\u0302t": [281, 360]},
    ),
    "truncation and padding": (
        both(
            set_in_json(
                "truncation",
                {"direction": "Right", "max_length": 4, "stride": 0, "strategy": "LongestFirst"},
            ),
            set_in_json(
                "padding",
                {
                    "strategy": {"Fixed": 20},
                    "direction": "Left",
                    "pad_id": 384,
                    "pad_to_multiple_of": None,
                    "pad_type_id": 0,
                    "pad_token": "<|endoftext|>",
                },
            ),
        ),
        {"Hello, y'all": [373, 11, 267, 370]},
    ),
    "other decoder": (
        set_in_json("decoder", {"type": "Fuse"}),
        {"Hello, y'all": [373, 11, 267, 370]},
    ),
    "prefix space": (
        config(add_prefix_space=True),
        {"Hello, y'all": [220, 373, 220, 11, 267, 220, 370], "<|im_end|>a": [386, 220, 64]},
    ),
    "neutral settings": (
        config(clean_up_tokenization_spaces=True, model_max_length=4, errors="strict", legacy=True),
        {"I 'm here .": [40, 220, 6, 76, 332, 256, 220, 13]},
    ),
    "slow": (
        slow,
        {
            X: [64, 27, 91, 87, 91, 29, 65],
            "a <tool_call> b<|im_end|>": [64, 220, 387, 220, 65, 386],
            "Hello, y'all": [373, 11, 267, 370],
        },
    ),
    "slow, CR LF": (both(slow, in_merges("\n", "\r\n")), {"Hello, y'all": [373, 11, 267, 370]}),
    "slow, no version": (
        both(slow, in_merges("^#version.*\n", "")),
        {"Hello, y'all": [373, 11, 267, 370]},
    ),
    "slow, no tokenizer_config": (
        both(slow, lambda files: files.pop("tokenizer_config.json")),
        {"a<|endoftext|>b": [64, 384, 65], "<|im_end|>": [27, 91, 72, 76, 62, 288, 67, 91, 29]},
    ),
    "slow, older": (
        both(
            slow,
            older,
            other_file("added_tokens.json", ADDED),
            other_file("special_tokens_map.json", {"additional_special_tokens": ["<|im_start|>"]}),
        ),
        {"a <tool_call> b<|im_end|><|im_start|>": [64, 220, 387, 220, 65, 386, 385]},
    ),
    "slow, named special tokens": (
        both(slow, config(extra_special_tokens=["<|x|>"], pad_token="<|p|>")),
        {"<|p|><|x|>": [389, 390]},
    ),
    "slow, a BOS": (both(slow, config(add_bos_token=True, bos_token="<|x|>")), {"a": [389, 64]}),
}  # fmt: skip
# Ours alone: transformers refuses these, or forgets what a file says.
LENIENT: dict[str, tuple[Edit, dict[str, list[int]]]] = {
    "a list has what the decoder lacks": (listed(END, "<|x|>", **SPECIAL), {X: [64, END, 65]}),
    "an id above a hole": (decoder(400, "<|x|>", **SPECIAL), {X: [64, 400, 65]}),
    "a hole, then a name": (
        both(decoder(400, "<|x|>", **SPECIAL), config(pad_token="<|p|>")),
        {"<|x|><|p|>": [400, 401]},
    ),
    "both lists": (
        config(extra_special_tokens=["<|y|>"], additional_special_tokens=["<|x|>"]),
        {"<|y|><|x|>": [END, END + 1]},
    ),
    "a role as an object": (config(pad_token={"content": "<|x|>"}), {X: [64, END, 65]}),
    "slow, blank lines": (both(slow, in_merges("\n", "\n\n")), {"Hello": [373]}),
}


def write(directory: Path, library: tokenizers.Tokenizer, edit: Edit = lambda files: None) -> Path:
    """A directory as transformers saves it, changed by `edit`."""
    entries = {str(i): token for i, token in library.get_added_tokens_decoder().items()}
    files: Files = {
        "tokenizer.json": json.loads(library.to_str()),
        "tokenizer_config.json": {
            "added_tokens_decoder": {
                token: {"content": entry.content, **{f: getattr(entry, f) for f in FLAGS}}
                for token, entry in entries.items()
            },
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "Qwen2Tokenizer",
        },
        "config.json": {"model_type": "qwen2"},
    }
    edit(files)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (directory / name).write_text(text, encoding="utf-8", newline="")
    return directory


@pytest.mark.parametrize("name", [*CASES, *LENIENT])
def test_ids_are_the_references(name: str, reference: tokenizers.Tokenizer, tmp_path: Path) -> None:
    edit, golden = (CASES | LENIENT)[name]
    tokenizer = Tokenizer.from_hf(write(tmp_path, reference, edit))
    for text, ids in golden.items():
        assert tokenizer.encode(text, add_special_tokens=True) == ids


@pytest.mark.live
@pytest.mark.parametrize("name", CASES)
def test_ids_are_those_of_transformers(
    name: str, reference: tokenizers.Tokenizer, tmp_path: Path
) -> None:
    """Ids of every text here, visible text, and what chat templates see."""
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    edit, golden = CASES[name]
    write(tmp_path, reference, edit)
    ours, theirs = Tokenizer.from_hf(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (*golden, *HARD_TEXTS):
        ids = theirs.encode(text)
        assert ours.encode(text, add_special_tokens=True) == ids
        if text.isascii():  # transformers garbles added tokens outside ASCII
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    roles = {name: text for name, text in theirs.special_tokens_map.items() if name != "unk_token"}
    assert {**ours.special_tokens, "unk_token": ""} == {**roles, "unk_token": ""}
    assert theirs.eos_token_id is None or theirs.eos_token_id in ours.stop_ids


CONTRADICTIONS = {
    "a text with two ids": (
        both(listed(END, "<|x|>", **SPECIAL), decoder(END + 1, "<|x|>", **SPECIAL)),
        "tokenizer.json gives '<|x|>' the id 389 and DIR/tokenizer_config.json gives it the id 390",
    ),
    "an id with two texts": (
        both(listed(END, "<|x|>", **SPECIAL), decoder(END, "<|y|>", **SPECIAL)),
        "tokenizer.json gives id 389 to '<|x|>' and DIR/tokenizer_config.json gives it to '<|y|>'",
    ),
    "the BPE's own id": (
        decoder(32, "<|y|>", **SPECIAL),
        "tokenizer.json gives id 32 to 'A' and DIR/tokenizer_config.json gives it to '<|y|>'",
    ),
    "an older file": (
        both(older, other_file("added_tokens.json", {"<|im_end|>": 400})),
        "tokenizer.json gives '<|im_end|>' the id 386 and DIR/added_tokens.json gives it the id 40",
    ),
    "slow, no merges": (
        both(slow, lambda files: files.pop("merges.txt")),
        "merges.txt is missing, and vocab.json beside it is no tokenizer without its merges",
    ),
    "slow, merges are a pointer": (
        both(slow, other_file("merges.txt", POINTER)),
        "merges.txt: the file is a git-lfs pointer to the file of 7031645 bytes",
    ),
    "slow, three tokens": (
        both(slow, in_merges("\nH e\n", "\nH e l\n")),
        "is 'H e l', not two tokens",
    ),
    "slow, merges cut": (
        both(slow, in_merges(r"(?s)\nH e\n.*", "\n")),
        "none of the 23 merges makes 105 of its tokens, the first 'He'",
    ),
    "slow, an end after every text": (
        both(slow, config(add_eos_token=True)),
        "vocab.json: it puts '<|im_end|>' after every text",
    ),
}


@pytest.mark.parametrize("edit, message", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_contradictions_name_files_and_values(
    edit: Edit, message: str, reference: tokenizers.Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        Tokenizer.from_hf(write(tmp_path, reference, edit))
    text = str(caught.value).replace(str(tmp_path), "DIR")
    assert text.startswith("DIR/") and message in text and text.endswith(".")


def test_ids_that_no_token_has(reference: tokenizers.Tokenizer, tmp_path: Path) -> None:
    """They encode nothing, decode to nothing and end nothing."""
    edit = both(
        decoder(400, "<|x|>", **SPECIAL),
        other_file("generation_config.json", {"eos_token_id": [386, 395, 10**6, -1]}),
    )
    tokenizer = Tokenizer.from_hf(write(tmp_path, reference, edit))
    assert tokenizer.unused_ids == tuple(range(389, 400)) and tokenizer.vocab_size == 401
    assert tokenizer.text_size == 384
    assert tokenizer.decode([64, 395, 65]) == "ab"
    assert set(tokenizer.stop_ids) == {384, 386}


def test_a_token_that_nothing_reaches(reference: tokenizers.Tokenizer, tmp_path: Path) -> None:
    """Special tokens in vocab.json that no file adds: transformers spells them out."""

    def edit(files: Files) -> None:
        slow(files)
        files["vocab.json"] |= {"<|nobody|>": END}

    tokenizer = Tokenizer.from_hf(write(tmp_path, reference, edit))
    assert END not in tokenizer.encode("<|nobody|>")


TEMPLATES: dict[str, tuple[Edit, str | None, str | None]] = {
    "in the config": (config(chat_template="c"), "c", "c"),
    "a list": (
        config(chat_template=[{"name": "default", "template": "d"},
                              {"name": "tool_use", "template": "t"}]), "d", "t"),
    "a file": (both(config(chat_template="c"), other_file("chat_template.jinja", "f")), "f", "f"),
    "files": (
        both(other_file("additional_chat_templates/tool_use.jinja", "t"),
             other_file("chat_template.jinja", "f")), "f", "t"),
    "no text": (config(chat_template=None), None, None),
    "a processor's": (other_file("chat_template.json", {"chat_template": "p"}), None, None),
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_chosen_as_by_transformers(
    name: str, reference: tokenizers.Tokenizer, tmp_path: Path
) -> None:
    edit, plain, tools = TEMPLATES[name]
    (tmp_path / "additional_chat_templates").mkdir()
    tokenizer = Tokenizer.from_hf(write(tmp_path, reference, edit))
    assert tokenizer.chat_template == tokenizer.template_for() == plain
    assert tokenizer.template_for([]) == tools


@pytest.mark.live
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_transformers_own(
    name: str, reference: tokenizers.Tokenizer, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    edit, *expected = TEMPLATES[name]
    (tmp_path / "additional_chat_templates").mkdir()
    write(tmp_path, reference, edit)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    if theirs.chat_template is None:
        assert expected == [None, None]
    else:
        assert [theirs.get_chat_template(), theirs.get_chat_template(tools=[])] == expected


def test_templates_without_a_default(reference: tokenizers.Tokenizer, tmp_path: Path) -> None:
    edit = config(chat_template=[{"name": "tool_use", "template": "t"}])
    tokenizer = Tokenizer.from_hf(write(tmp_path, reference, edit))
    assert tokenizer.template_for([]) == "t"
    with pytest.raises(UserError, match="are named tool_use, and none is the default"):
        tokenizer.template_for()


@pytest.mark.parametrize("rows, message", [
    (389, None),  # the padding token that a trainer named has no row, and needs none
    (384, "the tokens that end a text have the ids (386, 384), but the embedding has only 384"),
    (383, "the tokenizer has 390 tokens, but the embedding only 383 rows"),
])  # fmt: skip
def test_tokens_without_a_row(
    rows: int, message: str | None, reference: tokenizers.Tokenizer, tmp_path: Path
) -> None:
    write(tmp_path, reference, config(pad_token="<|pad|>"))
    checkpoint: Any = types.SimpleNamespace(
        format="safetensors", path=tmp_path, config=types.SimpleNamespace(vocab_size=rows)
    )
    if message is None:
        assert api.read_tokenizer(checkpoint).encode("<|pad|>") == [389]
        return
    with pytest.raises(UserError) as caught:
        api.read_tokenizer(checkpoint)
    assert message in str(caught.value)
