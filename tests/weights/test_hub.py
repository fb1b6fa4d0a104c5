"""`hf:` names against a fake Hub and a fake cache; nothing here touches the network."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled

from qwen_jax.errors import UserError
from qwen_jax.weights import hub

REPO = "Qwen/Qwen2.5-0.5B-Instruct-GGUF"
GGUF_FILES = [
    "README.md",
    "qwen2.5-0.5b-instruct-fp16.gguf",
    "qwen2.5-0.5b-instruct-q4_k_m.gguf",
    "qwen2.5-0.5b-instruct-q4_k_s.gguf",
    "qwen2.5-0.5b-instruct-q8_0-00002-of-00002.gguf",
    "qwen2.5-0.5b-instruct-q8_0-00001-of-00002.gguf",
]
HF_FILES = [
    "README.md",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "onnx/model.safetensors",
    "pytorch_model.bin",
]


class FakeHub:
    """Stands for the network: lists `files`, "downloads" them into a directory, or fails."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files: list[str] = []
        self.error: Exception | None = None
        self.downloaded: list[str] = []

    def model_info(self, repo: str) -> huggingface_hub.ModelInfo:
        assert repo == REPO
        if self.error:
            raise self.error
        siblings = [{"rfilename": file} for file in self.files]
        return huggingface_hub.ModelInfo(id=repo, siblings=siblings)

    def hf_hub_download(self, repo: str, file: str) -> str:
        assert repo == REPO
        if file not in self.files:
            raise EntryNotFoundError(file)
        self.downloaded.append(file)
        path = self.directory / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return str(path)


@pytest.fixture
def fake(tmp_path, monkeypatch) -> FakeHub:
    fake = FakeHub(tmp_path / "downloads")
    monkeypatch.setattr(
        huggingface_hub.HfApi, "model_info", lambda self, repo, timeout: fake.model_info(repo)
    )
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.hf_hub_download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return fake


def cache(tmp_path: Path, files: list[str], revision: str = "a" * 40, ref: str = "main") -> Path:
    """huggingface_hub's own layout: blobs, snapshots of links to them, refs."""
    root = tmp_path / "cache" / f"models--{REPO.replace('/', '--')}"
    snapshot = root / "snapshots" / revision
    for number, file in enumerate(files):
        blob = root / "blobs" / f"{revision[0]}{number}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_text(file)
        link = snapshot / file
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / ref).write_text(revision)
    return snapshot


def refusal(model: str) -> str:
    with pytest.raises(UserError) as caught:
        hub.resolve(model)
    message = str(caught.value)
    assert message.startswith(model[:4]) and message.endswith(".") and "\n" not in message
    return message


def test_paths_are_taken_as_they_are(tmp_path, monkeypatch):
    file = tmp_path / "m.gguf"
    file.touch()
    assert hub.resolve(str(file)) == file
    assert hub.resolve(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("~/m.gguf") == file
    assert "there is no such file or directory" in refusal(str(tmp_path / "absent"))


@pytest.mark.parametrize("name", ["hf:", "hf:a", "hf:a/b/c", "hf:a/b:", "hf:a/b:c:d", "hf:a b/c"])
def test_malformed_names(name):
    assert "hf:owner/repo" in refusal(name)


def test_names_the_hub_does_not_allow():
    assert "no repository's name" in refusal("hf:a--b/c..d")


@pytest.mark.parametrize("quant", ["q4_k_m", "Q4_K_M", "q4_K_m"])
def test_quantisation_in_any_case(fake, quant):
    fake.files = GGUF_FILES
    path = hub.resolve(f"hf:{REPO}:{quant}")
    assert path == fake.directory / "qwen2.5-0.5b-instruct-q4_k_m.gguf"
    assert fake.downloaded == [path.name]


def test_all_parts_come_and_the_first_is_returned(fake):
    fake.files = GGUF_FILES
    path = hub.resolve(f"hf:{REPO}:q8_0")
    assert path.name == "qwen2.5-0.5b-instruct-q8_0-00001-of-00002.gguf"
    assert fake.downloaded == sorted(GGUF_FILES[-2:])


@pytest.mark.parametrize("quant", ["q4_k", "k_m", "q5_0", "instruct"])
def test_unknown_quantisation_lists_the_known(fake, quant):
    fake.files = GGUF_FILES
    message = refusal(f"hf:{REPO}:{quant}")
    assert "the repository has GGUF files of these quantisations: FP16, Q4_K_M, Q4_K_S, Q8_0" in (
        message
    )
    assert f"choose one, as in hf:{REPO}:FP16" in message


def test_no_quantisation_of_many(fake):
    fake.files = GGUF_FILES
    assert "of these quantisations: FP16, Q4_K_M" in refusal(f"hf:{REPO}")


def test_no_quantisation_of_one(fake):
    fake.files = GGUF_FILES[:2]
    assert hub.resolve(f"hf:{REPO}").name == "qwen2.5-0.5b-instruct-fp16.gguf"


def test_several_files_of_one_quantisation(fake):
    fake.files = ["a-Q8_0.gguf", "b/a-Q8_0.gguf"]
    assert "several such files (a-Q8_0.gguf, b/a-Q8_0.gguf)" in refusal(f"hf:{REPO}:q8_0")


def test_files_in_folders(fake):
    fake.files = ["Q8_0/m-Q8_0-00001-of-00002.gguf", "Q8_0/m-Q8_0-00002-of-00002.gguf"]
    assert hub.resolve(f"hf:{REPO}:Q8_0") == fake.directory / fake.files[0]
    assert fake.downloaded == fake.files


def test_safetensors_without_quantisation(fake):
    fake.files = HF_FILES + GGUF_FILES
    assert hub.resolve(f"hf:{REPO}") == fake.directory
    assert sorted(fake.downloaded) == sorted(HF_FILES[1:-2])


def test_no_model_at_all(fake):
    fake.files = ["README.md", "pytorch_model.bin"]
    assert "neither GGUF files nor safetensors" in refusal(f"hf:{REPO}")


def test_missing_part_on_the_hub(fake):
    fake.files = GGUF_FILES[:-1]
    assert "the repository does not have this file" in refusal(f"hf:{REPO}:q8_0")


# Without network


@pytest.fixture(params=["offline", "unreachable"])
def offline(fake, request) -> FakeHub:
    if request.param == "offline":
        fake.error = OfflineModeIsEnabled("offline mode is enabled.\nUnset HF_HUB_OFFLINE.")
    else:
        # Whichever HTTP library huggingface_hub uses: its base error.
        fake.error = HfHubHTTPError.__bases__[0]("Name or service not known")
    return fake


def test_cached_file(offline, tmp_path):
    snapshot = cache(tmp_path, GGUF_FILES[:3])
    assert hub.resolve(f"hf:{REPO}:Q4_K_M") == snapshot / GGUF_FILES[2]
    assert offline.downloaded == []


def test_cached_directory(offline, tmp_path):
    snapshot = cache(tmp_path, HF_FILES)
    assert hub.resolve(f"hf:{REPO}") == snapshot


def test_cached_quantisations_are_listed(offline, tmp_path):
    cache(tmp_path, GGUF_FILES[:3])
    message = refusal(f"hf:{REPO}:Q8_0")
    assert "the cache (the Hub cannot be asked) has GGUF files of these quantisations: " in message
    assert "FP16, Q4_K_M;" in message


def test_part_missing_in_the_cache(offline, tmp_path):
    cache(tmp_path, GGUF_FILES[:-1])
    message = refusal(f"hf:{REPO}:Q8_0")
    assert "the cache lacks qwen2.5-0.5b-instruct-q8_0-00001-of-00002.gguf" in message


def test_main_is_preferred_to_other_revisions(offline, tmp_path):
    main = cache(tmp_path, GGUF_FILES[:3], "a" * 40, "main")
    cache(tmp_path, GGUF_FILES[:3], "b" * 40, "old")
    assert hub.resolve(f"hf:{REPO}:q4_k_m").parent == main


def test_nothing_cached(offline, tmp_path):
    message = refusal(f"hf:{REPO}:Q8_0")
    assert "not in the local cache, and the Hub cannot be reached" in message
    cache(tmp_path, [])
    (tmp_path / "cache" / "models--other--repo").mkdir()
    assert "not in the local cache" in refusal(f"hf:{REPO}:Q8_0")
