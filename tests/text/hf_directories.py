"""Forms of a directory's tokenizer files as people have them, and the ids AutoTokenizer gives.

The ids were written down from transformers 5.24.0; `make parity` asks it again.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers

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
