"""Quantisation under the lens against brute force: every model a whole forward pass in float64."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import scipy.special
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.accuracy.distribution.comparison import Estimate
from qwen_jax.accuracy.quantisation.costs import Cost, Quantisation
from qwen_jax.accuracy.quantisation.divergence import kl_divergence
from qwen_jax.accuracy.quantisation.lens import look
from qwen_jax.accuracy.quantisation.table import quantisation_line, quantisation_tables
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.weights.encoding import encode
from qwen_jax.weights.loader import open_checkpoint
from tests.numpy_reference import forward
from tests.tiny_checkpoints import (
    Written,
    gguf_name,
    random_parameters,
    tiny_config,
    write_gguf,
    write_hf,
)

TOKENS = np.random.default_rng(3).integers(0, 320, 18).tolist()


def kl(base: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(base || other), in nats of each position."""
    p, q = (scipy.special.log_softmax(np.asarray(x, np.float64), axis=-1) for x in (base, other))
    return (np.exp(p) * (p - q)).sum(-1)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([1.0, 5.0, 30.0]),
    apart=st.sampled_from([0.0, 1e-4, 1e-2, 0.3, 3.0, 60.0]),
)
def test_small_divergences_are_exact(seed: int, size: float, apart: float) -> None:
    """To float32, where the difference of float32 log-probabilities has no digit left."""
    rng = np.random.default_rng(seed)
    base = (size * rng.standard_normal((3, 500))).astype(np.float32)
    other = (base + apart * rng.standard_normal((3, 500))).astype(np.float32)
    other[0] = base[0] + np.float32(4)  # The same distribution.
    found, right = np.asarray(kl_divergence(other, base)), kl(base, other)
    assert (found >= 0).all()
    # The logits' own difference is exact to 2^-24 of the logits where they are rounded to float32.
    np.testing.assert_allclose(found, right, rtol=2e-5, atol=1e-12 * size)


@dataclasses.dataclass
class Case:
    """A file, its base and what both hold, by Hugging Face name."""

    config: ModelConfig
    base: Written
    file: Written
    types: Mapping[str, str]

    @property
    def looked_at(self) -> list[str]:
        """Names for brute force; where the head is not the embedding, those two make the case."""
        return [n for n in self.types if self.config.tied or "layers" not in n or "0.mlp" in n]

    @functools.cached_property
    def truth(self) -> np.ndarray:
        return self.logits(self.base.parameters)

    def kld(self, **changed: np.ndarray) -> np.ndarray:
        return kl(self.truth, self.logits(self.file.parameters | changed))

    def logits(self, parameters: Mapping[str, np.ndarray]) -> np.ndarray:
        return forward(self.config, parameters, TOKENS)["logits"]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    config = tiny_config(tied=request.param, source="tiny")
    parameters = random_parameters(config, 5)
    types = {name: "Q4_0" for name, values in parameters.items() if values.ndim > 1}
    types["model.layers.1.mlp.down_proj.weight"] = "Q8_0"
    types["model.layers.0.self_attn.k_proj.weight"] = "F16"
    folder = tmp_path_factory.mktemp("lens")
    base = write_gguf(folder / "base.gguf", config, parameters)
    file = write_gguf(folder / "file.gguf", config, parameters, types=types)
    return Case(config, base, file, types)


@pytest.fixture(scope="module")
def found(case: Case) -> Quantisation:
    return look(open_checkpoint(case.file.path), open_checkpoint(case.base.path), TOKENS)


def near(estimate: Estimate | None, right: np.ndarray, whole: np.ndarray | None = None) -> None:
    """A mean and its standard error; where `right` is a difference from the `whole`, digits of that
    cancel. Logits in float32 are some 1e-6 off, which is 1e-4 of what quantisation changes in them.
    """
    assert estimate is not None
    n, atol = len(right), 1e-4 * float(np.abs(right if whole is None else whole).max())
    np.testing.assert_allclose(estimate.value, right.mean(), rtol=1e-3, atol=atol)
    np.testing.assert_allclose(estimate.error, right.std() / (n - 1) ** 0.5, rtol=1e-3, atol=atol)


def costs(found: Quantisation) -> dict[str, Cost]:
    return {cost.name: cost for cost in found.tensors}


def test_every_tensor_is_as_by_brute_force(case: Case, found: Quantisation) -> None:
    """Quantised alone, and alone restored; those of a tied embedding are the head's, too."""
    base, file = case.base.parameters, case.file.parameters
    whole = case.kld()
    near(found.total, whole)
    by_name = costs(found)
    assert set(by_name) == {gguf_name(name) for name in case.types}
    for name in case.looked_at:
        cost = by_name[gguf_name(name)]
        assert cost.types == (case.types[name],)
        error = np.linalg.norm(file[name] - base[name]) / np.linalg.norm(base[name])
        np.testing.assert_allclose(cost.weight_error, error, rtol=1e-6)
        near(cost.alone, kl(case.truth, case.logits(base | {name: file[name]})))
        near(cost.saved, whole - case.kld(**{name: base[name]}), whole)


def test_groups_are_as_by_brute_force(case: Case, found: Quantisation) -> None:
    base, whole = case.base.parameters, case.kld()
    for layer, cost in enumerate(found.layers):
        names = [name for name in case.types if name.startswith(f"model.layers.{layer}.")]
        assert cost.name == f"layer {layer}"
        near(cost.saved, whole - case.kld(**{name: base[name] for name in names}), whole)
    (down,) = (cost for cost in found.kinds if "ffn_down" in cost.name)
    assert down.types == ("Q8_0", "Q4_0")  # The larger share of bytes first.
    names = [name for name in case.types if "down_proj" in name]
    near(down.saved, whole - case.kld(**{name: base[name] for name in names}), whole)


def test_sums_are_of_what_was_measured(found: Quantisation) -> None:
    tensors = found.sums[0]
    assert (tensors.measured, tensors.of) == (len(found.tensors), len(found.tensors))
    assert tensors.alone == pytest.approx(sum(cost.alone.value for cost in found.tensors))
    assert tensors.saved == pytest.approx(sum(cost.saved.value for cost in found.tensors))


def test_upgrades_are_measured_as_they_would_be_written(case: Case, found: Quantisation) -> None:
    base, whole = case.base.parameters, case.kld()
    expected = {
        (gguf_name(name), move)
        for name, kind in case.types.items()
        for move in ("Q6_K", "Q8_0")
        if kind == "Q4_0"
    }
    columns = {gguf_name(name): base[name].shape[-1] for name in case.types}
    expected = {(n, m) for n, m in expected if m == "Q8_0" or columns[n] % 256 == 0}
    assert {(up.tensor, up.types[1]) for up in found.upgrades} == expected
    names = {gguf_name(name): name for name in case.types}
    for up in found.upgrades:
        name, kind = names[up.tensor], Type[up.types[1]]
        if name not in case.looked_at:
            continue
        raw = encode(base[name], kind)
        near(up.saved, whole - case.kld(**{name: gguf.quants.dequantize(raw, kind)}), whole)
        assert up.bytes == raw.nbytes - encode(base[name], Type.Q4_0).nbytes
    told = [up.per_megabyte for up in found.upgrades if up.told]
    assert told == sorted(told, reverse=True)


def test_outputs_are_of_the_bases_own_activations(case: Case, found: Quantisation) -> None:
    base, file = case.base.parameters, case.file.parameters
    seen = forward(case.config, base, TOKENS)
    inputs = {
        "self_attn.v_proj": "attn_norm",
        "self_attn.o_proj": "attn_out",
        "mlp.up_proj": "ffn_norm",
        "mlp.down_proj": "ffn_act",
    }
    for name, source in inputs.items():
        weight, x = f"model.layers.1.{name}.weight", seen[f"layers.1.{source}"]
        right = x @ base[weight].T.astype(np.float64)
        error = np.linalg.norm(x @ file[weight].T - right) / np.linalg.norm(right)
        cost = costs(found)[gguf_name(weight)]
        np.testing.assert_allclose(cost.output_error, error, rtol=1e-4)
    embed = "model.embed_tokens.weight"
    x = seen["final_norm"] if case.config.tied else np.eye(case.config.vocab_size)[TOKENS]
    right = x @ (base[embed].T if case.config.tied else base[embed])
    off = x @ (file[embed].T if case.config.tied else file[embed]) - right
    error = np.linalg.norm(off) / np.linalg.norm(right)
    np.testing.assert_allclose(costs(found)["token_embd.weight"].output_error, error, rtol=1e-4)


def test_a_coarse_tensor_ranks_first(tmp_path: Path) -> None:
    config = tiny_config(source="tiny")
    parameters = random_parameters(config, 6)
    types = {name: "Q8_0" for name, values in parameters.items() if values.ndim > 1}
    coarse = "model.layers.1.self_attn.v_proj.weight"
    base = write_gguf(tmp_path / "base.gguf", config, parameters, types="BF16")
    file = write_gguf(tmp_path / "file.gguf", config, parameters, types=types | {coarse: "TQ2_0"})
    found = look(open_checkpoint(file.path), open_checkpoint(base.path), TOKENS)
    assert found.upgrades[0].tensor == gguf_name(coarse) and found.upgrades[0].told
    saved = max(found.tensors, key=lambda cost: cost.saved.value)
    assert saved.name == gguf_name(coarse)
    assert saved.saved.value > 0.9 * found.total.value
    assert f"{gguf_name(coarse)} deserves more bits first" in quantisation_line(found)


def test_a_base_that_is_the_file_has_nothing_to_gain(case: Case) -> None:
    file = open_checkpoint(case.file.path)
    found = look(file, file, TOKENS)
    assert found.total.value == 0 and found.same_top == 1
    assert not (found.tensors or found.kinds or found.layers or found.upgrades)
    assert "nothing to gain" in quantisation_line(found)
    (table,) = quantisation_tables(found)
    assert "nothing to gain" in table.text()


def test_passes_end_with_kinds_and_layers(case: Case) -> None:
    """And with single tensors of which those promise most."""
    files = open_checkpoint(case.file.path), open_checkpoint(case.base.path)
    groups = look(*files, TOKENS, passes=1)
    alone = {cost.name for cost in groups.kinds if "*" not in cost.name}  # a kind of one tensor
    assert not groups.upgrades and {c.name for c in groups.tensors if c.saved} == alone
    assert all(cost.saved and cost.alone for cost in (*groups.kinds, *groups.layers))
    some = look(*files, TOKENS, passes=int(groups.passes) + 8)
    assert some.passes <= int(groups.passes) + 8
    measured = {cost.name for cost in some.tensors if cost.saved}
    assert alone < measured and len(measured) < len(some.tensors)
    said = "\n".join(table.text() for table in quantisation_tables(some))
    assert f"{len(some.tensors) - len(measured)} of {len(some.tensors)} were left out" in said
    assert max(map(len, said.splitlines())) <= 100


def test_a_directory_may_be_the_base(case: Case, tmp_path: Path) -> None:
    base = write_hf(tmp_path / "hf", case.config, case.base.parameters)
    found = look(open_checkpoint(case.file.path), open_checkpoint(base.path), TOKENS, passes=1)
    near(found.total, case.kld())


@functools.cache
def _parameters(seed: int) -> dict[str, np.ndarray]:
    return random_parameters(tiny_config(), seed)


def refused(
    tmp_path: Path, file: str, base: str, words: str, *, seed: int = 0, **sizes: int
) -> None:
    config, other = tiny_config(), tiny_config(**sizes)
    write_gguf(tmp_path / "file.gguf", config, _parameters(0), types=file)
    parameters = random_parameters(other, seed) if sizes else _parameters(seed)
    write_gguf(tmp_path / "base.gguf", other, parameters, types=base)
    with pytest.raises(UserError, match=words):
        look(*(open_checkpoint(tmp_path / f"{n}.gguf") for n in ("file", "base")), TOKENS)


def test_what_can_be_no_base_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "F16", "F32", "file.gguf is not quantised, its tensors are F16, F32; give")
    refused(tmp_path, "Q8_0", "Q4_0", "base.gguf holds token_embd.weight as Q4_0, with fewer bits")
    sizes = {"num_layers": 3, "vocab_size": 321, "rope_theta": 1e4}
    for field, value in sizes.items():
        words = f"base.gguf: the base's {field} is {value}, but .*file.gguf has"
        refused(tmp_path, "Q8_0", "F16", words, **{field: value})
    refused(tmp_path, "Q8_0", "F16", "is no base of .*attn_norm.weight, which the file", seed=1)


def test_matrices_of_another_model_are_refused(tmp_path: Path) -> None:
    """Though vectors are the same."""
    mixed = {
        n: (_parameters(1) if v.ndim > 1 else _parameters(0))[n] for n, v in _parameters(0).items()
    }
    file = write_gguf(tmp_path / "file.gguf", tiny_config(), _parameters(0), types="Q8_0")
    base = write_gguf(tmp_path / "base.gguf", tiny_config(), mixed, types="F16")
    with pytest.raises(UserError, match=r"the weights differ by 14[0-9]% on the median"):
        look(open_checkpoint(file.path), open_checkpoint(base.path), TOKENS)


def test_texts_types_and_passes_are_refused(case: Case) -> None:
    files = open_checkpoint(case.file.path), open_checkpoint(case.base.path)
    with pytest.raises(UserError, match="text has 15 tokens, but the part quantisation takes 16"):
        look(*files, TOKENS[:15])
    with pytest.raises(UserError, match=r"upgrades has 'Q9', but the types are F32, "):
        look(*files, TOKENS, upgrades=["Q9"])
    with pytest.raises(UserError, match=r"compare\.passes is 0, but it must be at least 1"):
        look(*files, TOKENS, passes=0)
