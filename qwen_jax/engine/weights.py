"""Weights packed for the decode-step kernel, and back: the only copy a GPU holds.

Packing is made once, while loading, parameter by parameter. Prefill reads the same tape: each
matrix is put together again inside the compiled program, which costs it two more passes over
the weights a chunk and no lasting memory. So do decode steps that the kernel doesn't serve
(too many rows), once for every chunk of steps.
"""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import pallas_kernels
from pallas_kernels.decode_step import (
    HEAD,
    MOST_ROWS,
    Packed,
    Plan,
    Shape,
    empty_tape,
    places,
    put,
    unpacked,
)
from pallas_kernels.decode_step import refusal as kernel_refusal
from qwen_jax.config import ModelConfig
from qwen_jax.model.decoder import Parameters
from qwen_jax.model.rotary import inverse_frequencies

MATRICES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
"""A layer's matrices, in the order of the kernel's phases."""

HOPPER_BLOCKS = 132
"""Multiprocessors of an H100 or H200: the plan where no GPU is there to ask."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedWeights:
    """A model's parameters as the decode-step kernel reads them.

    Attributes:
        packed: the tape of weight tiles, biases and norms.
        embed: the embedding where the head is not tied to it; else it is the tape's head.
        implementation: of the step, as asked for; "xla" runs the kernel's reference.
    """

    packed: Packed
    embed: Float[Array, "V D"] | None
    config: ModelConfig = dataclasses.field(metadata={"static": True})
    plan: Plan = dataclasses.field(metadata={"static": True})
    implementation: str = dataclasses.field(metadata={"static": True})

    def serves(self, rows: int) -> bool:
        """Whether a step of so many rows runs on the packed weights; else on `parameters`.

        Raises:
            UnsupportedError: the kernel was asked for by name and can't serve the case.
        """
        if self.implementation == "xla":
            return rows <= MOST_ROWS
        why_not = kernel_refusal(self.plan, rows, self.packed.tape.dtype, self.config.rope_dim // 2)
        return pallas_kernels.choose("decode_step", self.implementation, why_not) == "mosaic_gpu"

    def parameters(self) -> dict[str, jax.Array]:
        """Every parameter by its canonical name, as `qwen_jax.model.decoder.Qwen2` takes them."""
        packed, norms = self.packed, self.packed.norms
        params = {"final_norm": norms[-1]}
        for i in range(self.config.num_layers):
            params[f"layers.{i}.attn_norm"] = norms[2 * i]
            params[f"layers.{i}.ffn_norm"] = norms[2 * i + 1]
            params[f"layers.{i}.qkv_proj.bias"] = packed.bias[i].astype(packed.tape.dtype)
            for phase, name in enumerate(MATRICES):
                params[f"layers.{i}.{name}.weight"] = self._matrix(phase, i)
        head = self._matrix(HEAD)
        if self.embed is None:
            return params | {"embed": head}
        return params | {"embed": self.embed, "lm_head": head}

    def look_up(self, tokens: Int[Array, "*T"]) -> Float[Array, "*T D"]:
        """Rows of the embedding, without all of it where it is the head."""
        if self.embed is not None:
            return self.embed[tokens]
        rows = self.packed.head_rows(self.plan, tokens.reshape(-1))
        return rows.reshape(*tokens.shape, -1)

    def _matrix(self, phase: int, layer: int = 0) -> Float[Array, "rows columns"]:
        return unpacked(self.packed, self.plan, phase, layer, implementation=self.implementation)

    def decode(
        self,
        token: Int[Array, "B"],
        cache: Float[Array, "2L B K S H"],
        position: Int[Array, "B"],
    ) -> tuple[Float[Array, "B V"], Float[Array, "2L B K H"]]:
        """One step of every row: logits, and the tokens' keys, then values, of every layer."""
        return pallas_kernels.decode_step(
            self.packed,
            self.plan,
            self.look_up(token),
            cache,
            position,
            jnp.asarray(inverse_frequencies(self.config)),
            attention_factor=self.config.attention_factor,
            implementation=self.implementation,
        )


def plan_for(config: ModelConfig) -> Plan:
    """How the model is dealt out to the multiprocessors of the default device."""
    blocks = getattr(jax.local_devices()[0], "core_count", None) or HOPPER_BLOCKS
    shape = Shape(
        layers=config.num_layers,
        hidden=config.hidden_size,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        ffn=config.ffn_size,
        vocab=config.vocab_size,
        eps=config.rms_eps,
    )
    return Plan(shape, blocks)


def refusal(config: ModelConfig, dtype: jnp.dtype) -> str | None:
    """Why the decode-step kernel can't run this model, were it for one row; or None."""
    return kernel_refusal(plan_for(config), 1, dtype, config.rope_dim // 2)


def prepare(
    config: ModelConfig,
    parameters: Iterable[tuple[str, jax.Array]],
    dtype: jnp.dtype,
    implementation: str,
) -> Parameters | PackedWeights:
    """The parameters as the engine runs them: packed where the kernel serves, else by name.

    Raises:
        UnsupportedError: the kernel was asked for by name and can't run this model.
    """
    chosen = pallas_kernels.choose("decode_step", implementation, refusal(config, dtype))
    if chosen == "xla":
        return dict(parameters)
    return pack(config, parameters, dtype, implementation)


def pack(
    config: ModelConfig,
    parameters: Iterable[tuple[str, jax.Array]],
    dtype: jnp.dtype,
    implementation: str,
) -> PackedWeights:
    """Packs each parameter as it comes and lets it go.

    So the device never holds more than the packed weights and two parameters.
    """
    plan = plan_for(config)
    tape, where = empty_tape(plan, dtype), places(plan)
    small: dict[str, jax.Array] = {}
    head = "embed" if config.tied else "lm_head"
    for name, value in parameters:
        parts = name.split(".")
        if name == head:
            tape = put(tape, where[HEAD], value, 0, HEAD)
        elif parts[0] == "layers" and parts[2] in MATRICES and parts[3] == "weight":
            phase = MATRICES.index(parts[2])
            tape = put(tape, where[phase], value, int(parts[1]), phase)
        else:
            small[name] = value
    layers = range(config.num_layers)
    bias = [small[f"layers.{i}.qkv_proj.bias"] for i in layers]
    norms = [small[f"layers.{i}.{n}"] for i in layers for n in ("attn_norm", "ffn_norm")]
    packed = Packed(
        tape,
        jnp.stack(bias).astype(jnp.float32),
        jnp.stack([*norms, small["final_norm"]]).astype(jnp.float32),
        where,
    )
    return PackedWeights(packed, small.get("embed"), config, plan, implementation)
