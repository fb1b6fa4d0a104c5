"""Tokenizer files of directories as people have them: ids as AutoTokenizer gives them."""

import types
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from qwen_jax.errors import UserError
from qwen_jax.loading import read_tokenizer
from qwen_jax.text import Tokenizer
from tests.text.hf_directories import (
    CASES,
    END,
    LENIENT,
    SPECIAL,
    Edit,
    Files,
    both,
    config,
    decoder,
    in_merges,
    listed,
    older,
    other_file,
    slow,
    write,
)
from tests.text.test_tokenizer import HARD_TEXTS
from tests.text.test_vocabulary import POINTER


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
        assert read_tokenizer(checkpoint).encode("<|pad|>") == [389]
        return
    with pytest.raises(UserError) as caught:
        read_tokenizer(checkpoint)
    assert message in str(caught.value)
