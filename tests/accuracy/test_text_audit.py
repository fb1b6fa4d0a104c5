"""Token ids made wrongly, by hand or by another setting of the tokenizers library, are named."""

import json
import unicodedata

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from qwen_jax import api, opening
from qwen_jax.accuracy.text.audit import CASES, FAULTS, audit_text, text_table
from qwen_jax.accuracy.text.pipeline import Pipeline, Settings
from qwen_jax.errors import UserError
from qwen_jax.text import Tokenizer
from tests.text.conftest import (  # noqa: F401 (fixtures)
    fixture_path,
    gguf_metadata,
    hf_directory,
    qwen_metadata,
    reference,
)
from tests.text.test_hf_directories import CASES as DIRECTORIES
from tests.text.test_hf_directories import write

SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


def chat(messages, system=SYSTEM):
    """Qwen2.5's chat, written out."""
    turns = [] if system is None or messages[0]["role"] == "system" else [("system", system)]
    turns += [(m["role"], m["content"]) for m in messages]
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    return text + "<|im_start|>assistant\n"


def text_of(case, system=SYSTEM):
    return case if isinstance(case, str) else chat(case, system)


@pytest.fixture(scope="module")
def metadata(qwen_metadata):  # noqa: F811
    """Qwen's own vocabulary and template."""
    template = fixture_path("qwen2.5-instruct-chat-template.jinja").read_text()
    return qwen_metadata | {"tokenizer.chat_template": template}


@pytest.fixture(scope="module")
def pipeline(metadata):
    return Pipeline.from_gguf(metadata, "qwen2.gguf")


@pytest.fixture(scope="module")
def ours(metadata):
    return Tokenizer.from_gguf(metadata, "qwen2.gguf")


@pytest.fixture(scope="module")
def gpt2(metadata):
    """The same tokens and merges behind GPT-2's pattern, which the library has built in."""
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(line.split(" ")) for line in metadata["tokenizer.ggml.merges"]]
    made = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return made


def right(ours):
    return {name: ours.encode(text_of(case)) for name, case in CASES.items()}


def causes(findings):
    return {f.field: f.causes for f in findings if f.verdict == "fault"}


class TestNoAlarm:
    def test_the_bundled_model(self):
        findings = audit_text(opening.locate(), api.load())
        assert {f.verdict for f in findings} == {"same"}
        assert [f.field for f in findings] == [*CASES, "stop ids"]

    def test_qwens_vocabulary(self, pipeline, ours):
        findings = audit_text(pipeline, right(ours), stop_ids=(151645, 151643))
        assert {f.verdict for f in findings} == {"same"}
        assert text_table(findings).text() == "text: 11 checks, 11 the same"

    def test_a_hugging_face_directory(self, hf_directory, reference):  # noqa: F811
        pipeline = Pipeline.from_hf(hf_directory)
        held = {n: reference.encode(text_of(case)).ids for n, case in CASES.items()}
        ends = [reference.token_to_id(t) for t in ("<|im_end|>", "<|endoftext|>")]
        assert not causes(audit_text(pipeline, held, stop_ids=ends))
        (hf_directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 65}))
        (found,) = causes(audit_text(Pipeline.from_hf(hf_directory), held, stop_ids=ends)).values()
        assert found == ("eos-missing",)

    @pytest.mark.parametrize("name", ["slow", "slow, a BOS", "slow, older", "a BOS", "eos"])
    def test_directories_of_other_forms(self, name, reference, tmp_path):  # noqa: F811
        edit, _ = DIRECTORIES[name]
        tokenizer = Tokenizer.from_hf(write(tmp_path, reference, edit))
        held = {
            name: tokenizer.encode(text_of(case), add_special_tokens=isinstance(case, str))
            for name, case in CASES.items()
        }
        assert not causes(audit_text(Pipeline.from_hf(tmp_path), held, stop_ids=tokenizer.stop_ids))

    def test_both_formats_agree(self, hf_directory, gguf_metadata):  # noqa: F811
        (hf_directory / "chat_template.jinja").write_text("{{ messages[0].content }}")
        first = Pipeline.from_hf(hf_directory)
        second = Pipeline.from_gguf(gguf_metadata, "small.gguf")
        for case in CASES.values():
            assert first.encode(case) == second.encode(case)


class TestFaults:
    """Rows 29 to 33 of the catalogue of known faults, and their neighbours."""

    @pytest.mark.parametrize(
        ("token", "name"), [(151643, "bos-prepended"), (151644, "im-start-prepended")]
    )
    def test_bos(self, pipeline, ours, token, name):
        held = {case: [token, *ids] for case, ids in right(ours).items()}
        assert causes(audit_text(pipeline, held)) == dict.fromkeys(CASES, (name,))

    def test_special_tokens_split(self, pipeline, ours):
        held = {n: ours.encode(text_of(c), parse_special=False) for n, c in CASES.items()}
        shown = [name for name, case in CASES.items() if "<|im_start|>" in text_of(case)]
        assert causes(audit_text(pipeline, held)) == dict.fromkeys(shown, ("special-tokens-split",))

    def test_template_ignored(self, pipeline, ours):
        held = {"chat": ours.encode(CASES["chat"][0]["content"])}
        assert causes(audit_text(pipeline, held)) == {"chat": ("template-ignored",)}

    def test_gpt2_pre_tokenizer(self, pipeline, gpt2):
        held = {n: gpt2.encode(text_of(c)).ids for n, c in CASES.items()}
        found = causes(audit_text(pipeline, held))
        assert {"letters", "code", "chat of three turns"} <= found.keys()
        assert set(found.values()) == {("gpt2-pre-tokenizer",)}

    def test_system_prompt_dropped(self, pipeline, ours):
        held = {n: ours.encode(text_of(c, None)) for n, c in CASES.items()}
        assert causes(audit_text(pipeline, held)) == dict.fromkeys(
            ["chat", "chat of three turns"], ("system-prompt-dropped",)
        )

    def test_no_nfc(self, pipeline, metadata, ours):
        bare = Tokenizer.from_gguf(metadata, "qwen2.gguf")
        bare._chat.normalizer = None
        held = {n: bare.encode(text_of(c)) for n, c in CASES.items()}
        assert not unicodedata.is_normalized("NFC", CASES["decomposed letters"])
        assert causes(audit_text(pipeline, held)) == {"decomposed letters": ("not-normalised",)}

    def test_generation_prompt_missing(self, pipeline, ours):
        text = chat(CASES["chat"]).removesuffix("<|im_start|>assistant\n")
        held = {"chat": ours.encode(text)}
        assert causes(audit_text(pipeline, held)) == {"chat": ("generation-prompt-missing",)}

    @pytest.mark.parametrize(
        ("stop_ids", "name", "text"),
        [
            ([151645], ("eos-missing",), "missing: 151643 <|endoftext|>"),
            ([151643], ("eos-missing",), "missing: 151645 <|im_end|>"),
            ([151645, 151643, 13], ("eos-extra",), "no end of a text: 13 ."),
        ],
    )
    def test_stop_ids(self, pipeline, stop_ids, name, text):
        (finding,) = audit_text(pipeline, {}, stop_ids=stop_ids)
        assert (finding.causes, finding.evidence) == (name, text)

    def test_two_at_once(self, pipeline, gpt2):
        held = {n: [151643, *gpt2.encode(text_of(c, None)).ids] for n, c in CASES.items()}
        found = causes(audit_text(pipeline, held))
        expected = {"bos-prepended", "gpt2-pre-tokenizer", "system-prompt-dropped"}
        assert set(found["chat of three turns"]) == expected
        assert found["special tokens"] == ("bos-prepended",)

    def test_unknown(self, pipeline, ours):
        held = right(ours)
        held["digits"] = [*held["digits"][:3], 151700, *held["digits"][3:]]
        (finding,) = (f for f in audit_text(pipeline, held) if f.verdict == "fault")
        assert (finding.field, finding.causes, finding.position) == ("digits", (), 3)
        assert "151700 is no token, only 0 to 151645" in finding.evidence

    def test_every_fault_changes_some_case(self, pipeline):
        for fault in FAULTS:
            settings = Settings(**fault.change)
            assert any(pipeline.encode(c, settings) != pipeline.encode(c) for c in CASES.values())


def test_refusals(pipeline):
    with pytest.raises(UserError, match="no text 'nobody'"):
        audit_text(pipeline, {"nobody": [1]})
    with pytest.raises(UserError, match="no token ids"):
        audit_text(pipeline, {})


def test_the_table_fits(pipeline, ours):
    held = {case: [151643, *ids] for case, ids in right(ours).items()}
    text = text_table(audit_text(pipeline, held, stop_ids=[151645])).text()
    assert max(map(len, text.splitlines())) <= 100
    assert text.startswith("text: 11 checks, 0 the same, 11 fault\n") and "eos-missing" in text
