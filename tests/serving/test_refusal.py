"""What callers are told of mistakes: which field, and not where the model's files lie."""

import pytest

from qwen_jax.errors import ContextFullError, UserError
from qwen_jax.serving.refusal import RefusalError, hiding


@pytest.mark.parametrize(
    ("sources", "text", "told"),
    [
        (("/m/a.gguf",), "/m/a.gguf: no, /m/a.gguf has 5.", "this model: no, this model has 5."),
        (("a.gguf",), "a.gguf is not aa.gguf", "this model is not aa.gguf"),
        (("/m/config.json", "/m/tokenizer.json"), "/m/tokenizer.json: no", "this model: no"),
        (("/m\n/a.gguf",), "/m\n/a.gguf: no", "this model: no"),
        (("/m/a", "/m/a.gguf"), "/m/a.gguf: no, /m/a: no", "this model: no, this model: no"),
        # A word of other messages, and no path.
        (("model",), "There is no model 'x'.", "There is no model 'x'."),
        ((".",), "1.5 is not 2.", "1.5 is not 2."),
    ],
)
def test_names_are_hidden(sources: tuple[str, ...], text: str, told: str) -> None:
    assert RefusalError(400, text).body(hiding(sources))["error"]["message"] == told


def test_of_mistakes() -> None:
    error = RefusalError.of(UserError("sampling.top_p is 2.", field="top_p"), "prompt")
    assert (str(error), error.param, error.code) == ("top_p is 2.", "top_p", None)
    full = RefusalError.of(ContextFullError("full", tokens=9, context=8), "messages")
    assert (full.status, full.param, full.code) == (400, "messages", "context_length_exceeded")
