"""How models of the Hub are named, and what people write instead."""

import pytest

from qwen_jax.errors import UserError
from qwen_jax.weights import hub
from qwen_jax.weights.hub_names import HubName, abbreviated, parse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_paths_are_taken_as_they_are(tmp_path, monkeypatch):
    file = tmp_path / "m.gguf"
    file.touch()
    assert hub.resolve(str(file)) == file
    assert hub.resolve(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("~/m.gguf") == file


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("hf:a/b", ("a/b", None, None)),
        ("hf:a/b:q4_k_m", ("a/b", None, "q4_k_m")),
        ("hf:a/b@main", ("a/b", "main", None)),
        ("hf:a/b@refs/pr/3:Q8_0", ("a/b", "refs/pr/3", "Q8_0")),
        (f"hf:a/b@{COMMIT}:gguf/my model.gguf", ("a/b", COMMIT, "gguf/my model.gguf")),
        ("hf:a/b@v1.0+x", ("a/b", "v1.0+x", None)),
    ],
)
def test_names(name, parts):
    assert parse(name) == HubName(*parts) and str(parse(name)) == name


def test_commits_in_tables():
    assert abbreviated(f"hf:a/b@{COMMIT}:q8_0") == "hf:a/b@0123456:q8_0"
    for text in ("hf:a/b@main", f"hf: {COMMIT}", "a prompt"):
        assert abbreviated(text) == text


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("hf:", ", as hf:Qwen/Qwen2.5-0.5B-Instruct-GGUF:q4_k_m does."),
        ("hf:a", ", as hf:Qwen/"),
        ("hf:a/b/c", ", as hf:Qwen/"),
        ("hf:a/b:", ", as hf:Qwen/"),
        ("hf:a/b@", ", as hf:Qwen/"),
        ("hf:a/b:c:d", ", as hf:Qwen/"),
        ("hf:a b/c", ", as hf:Qwen/"),
        ("hf:a\\b", ", as hf:Qwen/"),
        ("hf:é/b", ", as hf:Qwen/"),
        ("hf:a/b@v1@v2", ", as hf:Qwen/"),
        ("hf:a/b:x\ny", "'hf:a/b:x\\ny': the name does not read hf:owner/repo"),
        ("hf:a/b:q4_0@v1", "; the revision comes first: hf:a/b@v1:q4_0."),
        ("hf:a/b/c/m.gguf", "; a file stands after a colon: hf:a/b:c/m.gguf."),
        ("hf://a/b", "; did you mean hf:a/b."),
        ("hf:https://huggingface.co/a/b", "; did you mean hf:a/b."),
        ("hf:a--b/c..d", "this is no repository's name"),
        ("HF:a/b", "did you mean hf:a/b?"),
        ("https://huggingface.co/a/b", "did you mean hf:a/b?"),
        ("hf.co/a/b:Q4_K_M", "did you mean hf:a/b:Q4_K_M?"),
        ("huggingface.co/a/b/tree/main", "did you mean hf:a/b?"),
        ("https://huggingface.co/a/b/tree/v2/q", "did you mean hf:a/b@v2?"),
        ("https://huggingface.co/a/b/tree/refs%2Fpr%2F3", "did you mean hf:a/b@refs/pr/3?"),
        ("https://hf.co/a/b/resolve/main/d/m.gguf?download=true", "did you mean hf:a/b:d/m.gguf?"),
        ("https://example.com/m.gguf", "download the file and give its path."),
        ("http://[bad", "download the file and give its path."),
        ("Qwen/Qwen2.5-0.5B", "did you mean hf:Qwen/Qwen2.5-0.5B?"),
        ("Qwen/Qwen2.5-0.5B@v1:q4_0", "did you mean hf:Qwen/Qwen2.5-0.5B@v1:q4_0?"),
        ("nowhere/m.gguf", "there is no such file or directory; give a GGUF file"),
        ("tests/nothing", "there is no such file or directory; give a GGUF file"),
        ("C:\\models\\m.gguf", "C:\\models\\m.gguf: there is no such file or directory"),
        ("", "'': there is no such file or directory"),
        (" ", "' ': there is no such file or directory"),
        ("a\0b", "'a\\x00b': there is no such file or directory"),
        ("~nobody-of-this-name/m", "there is no such file or directory"),
        ("x" * 5000, "there is no such file or directory"),
    ],
)
def test_what_people_write_instead(model, words):
    with pytest.raises(UserError) as caught:
        hub.resolve(model)
    message = str(caught.value)
    assert words in message and "\n" not in message and len(message) < 400
