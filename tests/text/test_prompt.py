"""A prompt's ids: gaps in a text as the reference tokenizer reads them, and refusals."""

from typing import Any, ClassVar

import jax.numpy as jnp
import pytest
import tokenizers

from qwen_jax.completions import Completion
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.texts import News, Text
from qwen_jax.errors import UserError
from qwen_jax.generation import Generation
from qwen_jax.requests import Request
from qwen_jax.text.prompt import own_stop_ids, prompt_ids
from qwen_jax.text.tokenizer import Tokenizer
from tests.text.conftest import FIM
from tests.tiny_checkpoints import tiny_config

CHAT = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]


@pytest.mark.parametrize("form", ["hf", "gguf"])
@pytest.mark.parametrize(
    ("prefix", "suffix"),
    [("def f(x):\n    ", "\n    return x"), ("", "b"), ("a", ""), ("", ""), (" é", "が\r\n")],
)
def test_a_gap_is_put_as_the_reference_tokenizer_reads_it(
    form: str,
    prefix: str,
    suffix: str,
    coder: dict[str, Tokenizer],
    reference: tokenizers.Tokenizer,
) -> None:
    library = tokenizers.Tokenizer.from_str(reference.to_str())
    library.add_tokens([tokenizers.AddedToken(t, normalized=False) for t in FIM])
    text = f"<|fim_prefix|>{prefix}<|fim_suffix|>{suffix}<|fim_middle|>"
    expected = library.encode(text, add_special_tokens=False).ids
    for raw in (False, True):
        assert prompt_ids(coder[form], prefix, suffix=suffix, raw=raw) == expected


def test_text_around_a_gap_is_no_control_token(coder: dict[str, Tokenizer]) -> None:
    tokenizer = coder["hf"]
    ids = prompt_ids(tokenizer, "<|im_end|>a", suffix="<|fim_middle|>b")
    fim = tokenizer.fim
    assert fim is not None and not {*tokenizer.stop_ids} & {*ids}
    assert [i for i in ids if i in (fim.prefix, fim.suffix, fim.middle)] == [
        *(fim.prefix, fim.suffix, fim.middle)
    ]
    assert tokenizer.decode(ids) == (
        "<|fim_prefix|><|im_end|>a<|fim_suffix|><|fim_middle|>b<|fim_middle|>"
    )


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_what_ends_a_middle(form: str, coder: dict[str, Tokenizer], small: Tokenizer) -> None:
    tokenizer = coder[form]
    ends = tuple(tokenizer.encode("<|fim_pad|><|repo_name|><|file_sep|>"))
    for prompt in ("<|fim_prefix|>a<|fim_suffix|><|fim_middle|>", "<|repo_name|>r<|file_sep|>f"):
        assert own_stop_ids(tokenizer, tokenizer.encode(prompt)) == ends
    for prompt in ("a", "<|im_start|>user\na", "fim_prefix"):
        assert own_stop_ids(tokenizer, tokenizer.encode(prompt)) == ()
    spelt = tokenizer.encode("<|fim_prefix|>a", parse_special=False)
    assert own_stop_ids(tokenizer, spelt) == own_stop_ids(small, [386, 387, 388]) == ()


class Scripted:
    """In place of the scheduler: the model chooses the tokens of a script, four at a time."""

    script: ClassVar[list[int]] = []

    def __init__(self, engine: Engine):
        self._text: Text | None = None
        self._left: list[int] = []

    @property
    def idle(self) -> bool:
        return self._text is None

    @property
    def wants_more(self) -> bool:
        return self._text is None

    def add(self, text: Text) -> None:
        self._text, self._left = text, [*self.script, *[7] * text.limit]

    def cancel(self, text: Text) -> None:
        self._text = None

    def close(self) -> None:
        pass

    def turn(self) -> list[News]:
        chosen, self._left = self._left[:4], self._left[4:]
        return [] if self._text is None else [News(self._text, chosen, None, None, False)]


@pytest.mark.parametrize("form", ["hf", "gguf"])
@pytest.mark.parametrize("end", FIM[3:])
def test_a_middle_ends_where_llama_cpp_ends_it(
    form: str, end: str, coder: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = coder[form]
    script = tokenizer.encode(f"xyz{end}w<|im_end|>")
    config = tiny_config(vocab_size=tokenizer.vocab_size)
    engine = Engine(config, {"embed": jnp.zeros(1)}, stop_ids=tokenizer.stop_ids)
    monkeypatch.setattr(Scripted, "script", script)
    monkeypatch.setattr("qwen_jax.generation.line_for", Scripted)

    def written(prompt: list[int]) -> Completion:
        pieces = list(Generation(engine, tokenizer, [Request(prompt, 20)]))
        completion = pieces[-1].completion
        assert completion is not None
        assert "".join(piece.text for piece in pieces) == completion.text
        return completion

    middle = written(prompt_ids(tokenizer, "a", suffix="b"))
    assert (middle.text, middle.finish_reason) == ("xyz", "stop")
    assert list(middle.tokens) == script[: len(tokenizer.encode(f"xyz{end}"))]
    # Elsewhere they are text, as in transformers.
    other = written(tokenizer.encode("a"))
    assert (other.text, list(other.tokens)) == (f"xyz{end}w", script)


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ("a", {"suffix": "b", "system": "s"}, "A suffix is a text that follows one other text"),
        (CHAT, {"suffix": "b"}, "A suffix is a text"),
        ("a", {"suffix": "b", "tools": [{"name": "f"}]}, "A suffix is a text"),
        ("a", {"suffix": "b", "continue_final_message": True}, "A suffix is a text"),
        ("a", {"suffix": ["b"]}, "A suffix is a text"),
        (CHAT, {"raw": True}, "A raw prompt is one text"),
        ("a", {"raw": True, "system": "s"}, "A raw prompt is one text"),
        ("a", {"raw": True, "tools": [{"name": "f"}]}, "A raw prompt is one text"),
        ("a", {"raw": True, "continue_final_message": True}, "A raw prompt is one text"),
        ("a", {"continue_final_message": True}, "needs a chat, whose last message it continues"),
    ],
)
def test_what_does_not_go_together(
    prompt: Any, options: dict[str, Any], words: str, coder: dict[str, Tokenizer]
) -> None:
    with pytest.raises(UserError, match=words):
        prompt_ids(coder["hf"], prompt, **options)


def test_a_model_without_the_tokens_takes_no_suffix(small: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"^x\.gguf: the model has no tokens for filling in the"):
        prompt_ids(small, "a", suffix="b", source="x.gguf")
