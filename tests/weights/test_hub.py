"""`hf:` names against a fake Hub that speaks HTTP on this machine, and its cache."""

import errno
import time
from pathlib import Path

import pytest
from huggingface_hub import constants, file_download

from qwen_jax.errors import UserError
from qwen_jax.weights import hub
from tests.fake_hub import FakeHub, Handler, reply

REPO = FakeHub.repo
NAME = f"hf:{REPO}"
MAIN, MOVED, TAGGED = "a" * 40, "b" * 40, "c" * 40
GGUF_FILES = [
    ".gitattributes",
    "README.md",
    "qwen2.5-0.5b-instruct-fp16.gguf",
    "qwen2.5-0.5b-instruct-q4_k_m.gguf",
    "qwen2.5-0.5b-instruct-q4_k_s.gguf",
    "qwen2.5-0.5b-instruct-q8_0-00002-of-00002.gguf",
    "qwen2.5-0.5b-instruct-q8_0-00001-of-00002.gguf",
]
HF_FILES = [
    "README.md",
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "quantize_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
]
NOT_NEEDED = [
    "LICENSE.txt",
    "consolidated-00001-of-00001.safetensors",
    "onnx/model.safetensors",
    "optimizer.pt",
    "original/params.json",
    "pytorch_model.bin",
    "trainer_state.json",
    "training_args.bin",
]


def refusal(model: str, adapter: bool = False) -> str:
    with pytest.raises(UserError) as caught:
        hub.resolve(model, adapter=adapter)
    message = str(caught.value)
    assert message.startswith(model[:4]) and message[-1] in ".?" and "\n" not in message
    return message


def snapshot(tmp_path: Path, commit: str = MAIN) -> Path:
    return tmp_path / "cache" / f"models--{REPO.replace('/', '--')}" / "snapshots" / commit


# What is downloaded


@pytest.mark.parametrize("quant", ["q4_k_m", "Q4_K_M", "q4-k-m", "Q4.K.M", "q4km"])
def test_quantisation_as_people_write_it(hub_server, tmp_path, quant):
    hub_server.names(*GGUF_FILES)
    path = hub.resolve(f"{NAME}:{quant}")
    assert path == snapshot(tmp_path) / "qwen2.5-0.5b-instruct-q4_k_m.gguf"
    assert path.read_text() == path.name
    assert hub_server.downloaded == [".gitattributes", path.name]


def test_all_parts_come_and_the_first_is_returned(hub_server):
    hub_server.names(*GGUF_FILES)
    assert hub.resolve(f"{NAME}:q8_0").name == "qwen2.5-0.5b-instruct-q8_0-00001-of-00002.gguf"
    assert hub_server.downloaded[1:] == sorted(GGUF_FILES[-2:])


def test_what_is_cached_is_not_asked_for_again(hub_server):
    hub_server.names(*GGUF_FILES)
    hub.resolve(f"{NAME}:fp16")
    hub_server.requests.clear()
    assert hub.resolve(f"{NAME}:f16").name == "qwen2.5-0.5b-instruct-fp16.gguf"
    assert hub_server.requests == [f"GET /api/models/{REPO}"]


def test_a_hugging_face_directory_is_complete_and_no_more(hub_server, tmp_path):
    hub_server.names(*HF_FILES, *NOT_NEEDED, *GGUF_FILES)
    assert hub.resolve(NAME) == snapshot(tmp_path)
    assert sorted(set(hub_server.downloaded) - {".gitattributes"}) == sorted(HF_FILES[1:])


def test_of_one_file_and_shards_the_file_is_enough(hub_server):
    hub_server.names(*HF_FILES, "model.safetensors")
    hub.resolve(NAME)
    weights = [file for file in hub_server.downloaded if file.endswith(".safetensors")]
    assert weights == ["model.safetensors"]


def test_no_quantisation_of_many(hub_server):
    hub_server.names(*GGUF_FILES)
    message = refusal(NAME)
    assert f"{NAME}: there are GGUF files of these quantisations: F16, Q4_K_M, Q4_K_S, Q8_0;" in (
        message
    )
    assert f"choose one, as in {NAME}:F16." in message


def test_part_missing_on_the_hub(hub_server):
    hub_server.names(*GGUF_FILES[:-1])
    message = refusal(f"{NAME}:q8_0")
    assert "lacks qwen2.5-0.5b-instruct-q8_0-00001-of-00002.gguf, 1 of the 2 parts" in message


def test_a_helper_is_what_its_whole_name_means(hub_server):
    hub_server.names("m-q8_0.gguf", "mmproj-f16.gguf")
    assert hub.resolve(NAME).name == "m-q8_0.gguf"
    assert hub.resolve(f"{NAME}:mmproj-f16.gguf").name == "mmproj-f16.gguf"
    assert "quantisations: Q8_0; choose one" in refusal(f"{NAME}:f16")


@pytest.mark.parametrize(
    ("files", "quant", "words"),
    [
        ([], "", "has neither GGUF files nor safetensors with a config.json"),
        (["config.json", "pytorch_model.bin"], "", "has PyTorch weights only"),
        (["unet/config.json", "unet/m.safetensors"], "", "has no checkpoint at its top"),
        (["config.json", "model.safetensors"], ":q4_k_m", "no GGUF files; leave out :q4_k_m."),
        (["mmproj-f16.gguf", "x-imatrix.gguf"], "", "are by their names no models (mmproj-f16"),
    ],
)
def test_no_such_model(hub_server, files, quant, words):
    hub_server.names(*files)
    assert words in refusal(NAME + quant)


def test_adapters(hub_server, tmp_path):
    hub_server.names("adapter_config.json", "adapter_model.safetensors", "README.md")
    assert f"this is an adapter, not a model; give its base as --model and --adapter={NAME}." in (
        refusal(NAME)
    )
    assert hub.resolve(NAME, adapter=True) == snapshot(tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(hub_server.downloaded)
    assert hub.pin(NAME, adapter=True) == f"{NAME}@{MAIN}"
    hub_server.names("x-q8_0.gguf", "x-lora-f16.gguf")
    assert hub.resolve(NAME, adapter=True).name == "x-lora-f16.gguf"
    assert hub.resolve(NAME).name == "x-q8_0.gguf"
    hub_server.names("config.json", "model.safetensors")
    assert "neither adapter_config.json nor a GGUF file" in refusal(NAME, adapter=True)


# Revisions


def test_revisions(hub_server, tmp_path):
    hub_server.names(*GGUF_FILES)
    hub_server.branches |= {"refs/pr/3": MOVED, "v1.0": TAGGED}
    for revision, commit in (
        ("refs/pr/3", MOVED),
        ("v1.0", TAGGED),
        (MOVED, MOVED),
        ("main", MAIN),
    ):
        assert hub.pin(f"{NAME}@{revision}:q4-k-m") == f"{NAME}@{commit}:q4-k-m"
        assert hub.resolve(f"{NAME}@{revision}:q4_k_m").parent == snapshot(tmp_path, commit)
    assert "has no revision 'v2'; its page lists branches and commits." in refusal(f"{NAME}@v2:f16")
    assert "named by its 40 digits, in small letters." in refusal(f"{NAME}@AAAAAAA:f16")


def test_pinning(hub_server):
    hub_server.names(*GGUF_FILES)
    pinned = hub.pin(f"{NAME}:f16")
    assert pinned == f"{NAME}@{MAIN}:f16" and hub.pin(pinned) == pinned
    assert hub.pin("haiku") == "haiku"
    hub_server.branches = {"main": MOVED, "old": MAIN}
    assert MAIN in str(hub.resolve(pinned)) and hub.pin(f"{NAME}:f16") == f"{NAME}@{MOVED}:f16"
    with pytest.raises(UserError, match="there are GGUF files of these quantisations"):
        hub.pin(f"{NAME}:q3_k")


# Without the Hub


def html(request: Handler) -> None:
    reply(request, 200, b"<html>Log in to the Wi-Fi</html>", {"Content-Type": "text/html"})


@pytest.fixture(params=["offline", "unreachable", "down", "portal"])
def offline(hub_server, request, monkeypatch, tmp_path) -> FakeHub:
    """A cache that a run with the Hub filled, and then no Hub."""
    hub_server.names(*GGUF_FILES)
    hub.resolve(f"{NAME}:q4_k_m")
    hub_server.requests.clear()
    if request.param == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif request.param == "unreachable":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    elif request.param == "down":
        hub_server.answer = lambda request: reply(request, 503, b"", {})
    else:
        hub_server.answer = html
    return hub_server


def test_the_cache_decides(offline, tmp_path):
    assert hub.pin(NAME) == f"{NAME}@{MAIN}"
    for name in (f"{NAME}:Q4_K_M", f"{NAME}@main:Q4_K_M", f"{NAME}@{MAIN}:Q4_K_M", NAME):
        assert hub.resolve(name) == snapshot(tmp_path) / "qwen2.5-0.5b-instruct-q4_k_m.gguf"
    assert "quantisations: Q4_K_M; choose one" in refusal(f"{NAME}:Q8_0")
    for name in (f"{NAME}@v1:q4_k_m", f"{NAME}@{MOVED}:q4_k_m", "hf:other/repo"):
        assert refusal(name).startswith(f"{name}: ")


def test_branches_are_where_they_were_last_seen(hub_server, tmp_path, monkeypatch):
    """Though files are downloaded by the commit, of which the cache keeps no branch."""
    hub_server.names(*GGUF_FILES)
    for commit in (MAIN, MOVED):
        hub_server.branches = {"main": commit, "old": MAIN}
        hub.resolve(f"{NAME}:q4_k_m")
    hub.resolve(f"{NAME}@old:f16")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.pin(f"{NAME}:f16") == f"{NAME}@{MOVED}:f16"
    assert hub.pin(f"{NAME}@old:f16") == f"{NAME}@{MAIN}:f16"


def test_part_missing_in_the_cache(hub_server, tmp_path, monkeypatch):
    hub_server.names(*GGUF_FILES)
    hub.resolve(f"{NAME}:q8_0").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refusal(f"{NAME}:Q8_0")
    assert "the cache (the Hub can't be asked) lacks qwen2.5-0.5b-instruct-q8_0-00001" in message


# Answers that are none


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (401, "", "HTTP status 401; log in with hf auth login, again if"),
        (403, "GatedRepo", "the repository asks for consent; accept it on its page"),
        (403, "", "HTTP status 403; choose a token that may read this."),
        (404, "RepoNotFound", "no such repository, or it is private; check the name, or log in"),
        (404, "", "HTTP status 404; check the name."),
        (429, "", "HTTP status 429; it was asked too often from here"),
        (500, "", "HTTP status 500; try again later."),
        (503, "", "HTTP status 503; try again later."),
    ],
)
def test_answers_with_an_error(hub_server, status, code, words):
    headers = {"X-Error-Code": code} if code else {}
    hub_server.answer = lambda request: reply(request, status, b"", headers)
    assert words in refusal(NAME)


SHA = f'"sha": "{MAIN}"'.encode()


@pytest.mark.parametrize(
    "content",
    [
        b"<html>Log in to the Wi-Fi</html>",
        b"",
        b"\xff\xfe",
        b'{"id": "x", "sib',
        b"[]",
        b"null",
        b"{}",
        b"[" * 100_000,
        b'{"id": "x", "siblings": []}',
        b'{"id": "x", "sha": "main", "siblings": []}',
        b'{"id": "x", %s, "siblings": 3}' % SHA,
        b'{"id": "x", %s, "siblings": [{}]}' % SHA,
        b'{"id": "x", %s, "siblings": [{"rfilename": 7}]}' % SHA,
    ],
)
def test_answers_that_are_not_the_hubs(hub_server, content):
    hub_server.answer = lambda request: reply(request, 200, content, {})
    message = refusal(NAME)
    assert f"what {constants.ENDPOINT} answers is not the Hub's; a network's login page" in message


def test_redirects_in_a_circle(hub_server):
    hub_server.answer = lambda request: reply(request, 302, b"", {"Location": "/login"})
    assert "is not the Hub's" in refusal(NAME)


def test_a_portal_between_list_and_file(hub_server):
    hub_server.names(*GGUF_FILES)
    hub_server.answer = lambda r: False if "/api/" in r.path else html(r)
    assert "is not the Hub's" in refusal(f"{NAME}:f16")


def test_a_token_that_cannot_be_one_is_not_shown(hub_server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "schlüssel")
    assert "the token in HF_TOKEN has letters that none has" in (message := refusal(NAME))
    assert "schl" not in message


@pytest.mark.parametrize(
    ("endpoint", "words"),
    [
        ("http://127.0.0.1:1", "can't be reached ("),
        ("huggingface.co", "can't be reached ("),
        ("http://é.☃", "asking http://é.☃ failed (InvalidURL"),
    ],
)
def test_no_hub(hub_server, monkeypatch, endpoint, words):
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    assert words in refusal(NAME)


def test_a_slow_hub(hub_server, monkeypatch):
    monkeypatch.setattr(hub, "TIMEOUT", 0.05)
    hub_server.answer = lambda request: time.sleep(0.2) is None
    assert "can't be reached (timed out)" in refusal(NAME)


def test_certificates(hub_server, monkeypatch):
    """As the ssl module says it; a server with a wrong one is more than this needs."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    def ask(*_: object, **__: object) -> None:
        line = "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed"
        raise HfHubHTTPError.__bases__[0](line)

    monkeypatch.setattr(HfApi, "model_info", ask)
    assert "is not trusted here; if a proxy of yours signs it, set SSL_CERT_FILE" in refusal(NAME)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/f"), "the disk of the cache"),
        (OSError("Consistency check failed: 3 of 5 bytes"), "the download broke off (Consistency"),
        (RuntimeError("Data processing error: CAS"), "failed (RuntimeError: Data processing error"),
    ],
)
def test_downloads_that_fail(hub_server, monkeypatch, error, words):
    def fail(*_: object, **__: object) -> None:
        raise error

    hub_server.names(*GGUF_FILES)
    monkeypatch.setattr(file_download, "http_get", fail)
    assert words in refusal(f"{NAME}:f16")


def test_a_cache_that_cannot_be_written(hub_server, tmp_path, monkeypatch):
    hub_server.names(*GGUF_FILES)
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    assert f"the cache {tmp_path}/file/cache can't be used (Not a directory)" in (
        refusal(f"{NAME}:f16")
    )


def test_a_token_file_that_cannot_be_read(hub_server, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert f"{tmp_path} can't be used (Is a directory)" in refusal(NAME)


def test_files_that_lead_out_of_the_cache(hub_server):
    hub_server.names("../../q8_0.gguf")
    assert "cannot contain a '..'" in refusal(f"{NAME}:q8_0")
