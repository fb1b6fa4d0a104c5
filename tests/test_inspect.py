"""run.py inspect: every line against the file as the gguf package reads it, or the loaded model."""

import re
from collections import Counter
from pathlib import Path

import gguf
import jax.numpy as jnp
import pytest

import pallas_kernels
from qwen_jax import cli, opening
from qwen_jax.config import ModelConfig, YarnScaling
from qwen_jax.engine import memory
from qwen_jax.mesh import MeshShape
from qwen_jax.reporting.model import model_lines
from qwen_jax.tasks import inspect
from qwen_jax.weights.loader import load_parameters, open_checkpoint
from tests.tiny_checkpoints import random_parameters, tiny_config, write_gguf, write_hf

BUNDLED = opening.locate()
TITLES = ["file", "model", "metadata", "tensors", "text", "implementations", "memory"]


def report(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, list[str]]:
    """The lines of each section, and a check of how it is set."""
    assert cli.main(["inspect", *argv]) == 0
    sections = {}
    for section in capsys.readouterr().out.removesuffix("\n").split("\n\n"):
        title, *lines = section.split("\n")
        assert all(line.startswith("  ") and line == line.rstrip() for line in lines), section
        sections[title] = [line[2:] for line in lines]
    assert list(sections) == TITLES
    return sections


@pytest.fixture
def bundled(capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    return report(capsys)


@pytest.fixture(scope="module")
def reader() -> gguf.GGUFReader:
    return gguf.GGUFReader(BUNDLED)


class TestBundled:
    def test_file(self, bundled: dict[str, list[str]], reader: gguf.GGUFReader) -> None:
        path, size, types = bundled["file"]
        assert path == str(BUNDLED)
        assert size == f"gguf, 1 file, {BUNDLED.stat().st_size / 1e6:.1f} MB"
        counts = Counter(tensor.tensor_type.name for tensor in reader.tensors)
        assert types == ", ".join(f"{n} {name}" for name, n in counts.most_common())

    def test_model(self, bundled: dict[str, list[str]], reader: gguf.GGUFReader) -> None:
        total = sum(int(tensor.n_elements) for tensor in reader.tensors)
        assert bundled["model"][0] == f"{total:,} parameters"
        keys = {name: field.contents() for name, field in reader.fields.items()}
        text = "\n".join(bundled["model"])
        for words in (
            f"{keys['qwen2.block_count']} layers",
            f"hidden size {keys['qwen2.embedding_length']}",
            f"feed-forward {keys['qwen2.feed_forward_length']}",
            f"vocabulary {len(keys['tokenizer.ggml.tokens'])} (tied)",
            f"{keys['qwen2.attention.head_count']} query heads",
            f"on {keys['qwen2.attention.head_count_kv']} key/value heads",
            f"context {keys['qwen2.context_length']}",
            "rope theta 1e+06, RMSNorm eps 1e-06",
        ):
            assert words in text

    def test_metadata(self, bundled: dict[str, list[str]], reader: gguf.GGUFReader) -> None:
        shown = dict(line.split(" = ", 1) for line in bundled["metadata"])
        # Names with GGUF. are the reader's own, for the header.
        names = {name for name in reader.fields if not name.startswith("GGUF.")}
        assert shown.keys() == names
        tokens = reader.fields["tokenizer.ggml.tokens"].contents()
        assert shown["tokenizer.ggml.tokens"].endswith(f", …] ({len(tokens)})")
        assert shown["general.architecture"] == "'qwen2'"
        assert all(len(value) <= inspect.MAX_VALUE for value in shown.values())

    def test_tensors(self, bundled: dict[str, list[str]], reader: gguf.GGUFReader) -> None:
        *lines, rest = bundled["tensors"]
        there = {tensor.name: tensor for tensor in reader.tensors}
        for line in lines:
            row = re.fullmatch(r"(\S+) +(\S+) +(\d+(?: x \d+)*) +(\S+ \S+)", line)
            assert row is not None, line
            name, kind, shape, size = row.groups()
            tensor = there.pop(name)
            assert kind == tensor.tensor_type.name
            assert shape == " x ".join(str(n) for n in reversed(tensor.shape.tolist()))
            assert size == memory.show_bytes(int(tensor.n_bytes))
        layers = {name.split(".")[1] for name in there}
        assert "0" not in layers
        assert rest == f"and {len(there)} more in layers 1 to {len(layers)}"

    def test_text(self, bundled: dict[str, list[str]], reader: gguf.GGUFReader) -> None:
        keys = {name: field.contents() for name, field in reader.fields.items()}
        template = keys["tokenizer.chat_template"]
        assert bundled["text"][0] == f"{len(keys['tokenizer.ggml.tokens'])} tokens in use"
        assert f"{keys['tokenizer.ggml.eos_token_id']} '<|im_end|>'" in bundled["text"][1]
        assert bundled["text"][2] == f"chat template, {len(template)} characters:"
        assert bundled["text"][3].strip() == template.splitlines()[0].strip()

    def test_implementations(self, bundled: dict[str, list[str]]) -> None:
        names = [line.split()[0] for line in bundled["implementations"]]
        assert len(names) >= 3 and names[0] == "rope"
        for line in bundled["implementations"]:
            assert re.fullmatch(r"\w+ +xla \(.*\)", line), line  # here, on a CPU

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_kernels_on_hopper(self, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
        monkeypatch.setattr(pallas_kernels.implementation, "device_refusal", lambda: None)
        pallas_kernels.choose.cache_clear()
        half_b = ModelConfig(24, 896, 14, 2, 64, 4864, 151936, 32768, 1e6, 1e-6, True)
        large = ModelConfig(80, 8192, 64, 8, 128, 29568, 152064, 32768, 1e6, 1e-6, False)

        def chosen(config: ModelConfig, tp: int) -> dict[str, str]:
            mesh, kind = MeshShape(tp=tp), jnp.dtype(dtype)
            lines = inspect.implementation_lines("auto", config, kind, mesh)
            return {name: where for name, where, *_ in map(str.split, lines)}

        found = [chosen(*each) for each in ((half_b, 1), (large, 2), (half_b, 2))]
        pallas_kernels.choose.cache_clear()
        kernels = dict.fromkeys(pallas_kernels.OPERATIONS, "mosaic_gpu") | {"rope": "xla"}
        assert found[0] == found[1] == kernels
        # Seven heads of 64 aren't whole tiles.
        assert found[2] == kernels | {"decode_step": "xla", "packed_product": "xla"}

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_memory_is_what_loading_takes(
        self, capsys: pytest.CaptureFixture[str], dtype: str
    ) -> None:
        checkpoint = open_checkpoint(BUNDLED)
        loaded = load_parameters(checkpoint, jnp.dtype(dtype))
        weights = sum(value.nbytes for value in loaded.values())
        assert memory.Budget.of(checkpoint.config, jnp.dtype(dtype)).weights == weights
        _, line, *_ = report(capsys, f"--dtype={dtype}")["memory"]
        assert line.split() == ["weights", *memory.show_bytes(weights).split()]


def test_memory_that_fits_and_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    # Qwen2.5-0.5B: 494,032,768 parameters, of which 49 norms stay float32, and at 32,768 tokens
    # 201 MB of keys and as many of values.
    weights = 494_032_768 * 2 + 49 * 896 * 2
    config = ModelConfig(24, 896, 14, 2, 64, 4864, 151936, 32768, 1e6, 1e-6, True)
    dtype = jnp.dtype(jnp.bfloat16)
    monkeypatch.setattr(memory, "free_memory", lambda: 10 * 10**9)
    assert [" ".join(line.split()) for line in inspect.memory_lines(config, dtype)] == [
        "cpu: 10.0 GB free; parameters and cache in bfloat16",
        "weights 988.2 MB",
        "cache, 1,024 tokens 12.6 MB",
        "cache, whole context 402.7 MB (32768 tokens)",
        "cache, 8 slots 402.7 MB (32768 tokens, 1 whole context)",
    ]
    *_, many = inspect.memory_lines(config, dtype, 64)
    assert " ".join(many.split()) == "cache, 64 slots 805.3 MB (65536 tokens, 2 whole contexts)"
    # Half of what the weights leave, in sixteenths of a power of two of pages.
    monkeypatch.setattr(memory, "free_memory", lambda: weights + 10**8)
    *_, fits = inspect.memory_lines(config, dtype)
    assert 5 * 10**7 // (128 * 12288) == 31 and "(3840 tokens, less than a whole" in fits
    monkeypatch.setattr(memory, "free_memory", lambda: weights + 10**6)
    *_, fits = inspect.memory_lines(config, dtype)
    assert fits == "does not fit: the weights leave no room for keys and values"
    monkeypatch.setattr(memory, "free_memory", lambda: 9 * 10**8)
    *_, fits = inspect.memory_lines(config, dtype)
    assert fits == "does not fit: the weights alone need 88.2 MB more"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1.5e9, "1.5 GB"), (2e15, "2,000.0 TB")],
)
def test_show_bytes(count: float, text: str) -> None:
    assert memory.show_bytes(count) == text


def test_other_rotations_are_shown() -> None:
    config = tiny_config(rope_dim=12, linear_factor=2.5)
    assert list(model_lines(config))[-2:] == [
        "rotary embedding of the first 12 dimensions of a head",
        "linear rope scaling, positions divided by 2.5",
    ]
    config = tiny_config(head_dim=64, rope_dim=48)
    lines = inspect.implementation_lines("auto", config, jnp.dtype(jnp.bfloat16))
    assert len(list(lines)) == len(pallas_kernels.OPERATIONS)


def test_a_split_file_with_yarn_and_no_template(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tokens = {k: v for k, v in open_checkpoint(BUNDLED).metadata.items() if "tokenizer" in k}
    tokens["tokenizer.ggml.token_type"] = tokens["tokenizer.ggml.token_type"].tolist()
    config = tiny_config(
        vocab_size=2080, tied=False, yarn=YarnScaling.create(factor=4.0, original_context=256)
    )
    written = write_gguf(
        tmp_path / "model.gguf",
        config,
        random_parameters(config),
        metadata=tokens | {"tokenizer.chat_template": None, "general.sampling.temp": 0.7},
        split_max_tensors=9,
    )
    sections = report(capsys, f"--model={written.path}")
    assert sections["file"][1].startswith("gguf, 3 files, ")
    assert "vocabulary 2080 (untied)" in sections["model"][1]
    assert sections["model"][-1].startswith("YaRN factor 4 over 256, attention factor 1.1386")
    assert sections["text"][0] == "2048 tokens in use"
    assert sections["text"][2] == f"{written.path} recommends general.sampling.temp 0.7"
    assert sections["text"][-1].startswith("no chat template: ChatML")
    assert sections["tensors"][-1] == "and 12 more in layers 1 to 1"


def test_a_hugging_face_directory(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tiny_config()
    write_hf(tmp_path / "hf", config, random_parameters(config), shards=2)
    assert cli.main(["inspect", f"--model={tmp_path / 'hf'}"]) == 2
    assert "tokenizer.json is missing" in capsys.readouterr().err
    lines = list(inspect.file_lines(open_checkpoint(tmp_path / "hf")))
    assert lines[1].startswith("safetensors, 2 files, ")
