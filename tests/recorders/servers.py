"""Qwen2 in the modules of vLLM and SGLang: their class and attribute names, calls and layouts.

vLLM 0.33 and SGLang 0.5: tokens flattened to one axis, q, k, v and gate, up fused, linears that
return their bias beside the result, norms that add the residual in place and hand it on, one
rotary embedding shared by all layers, turning queries and keys in place. Written for the tests, in
float32 or bfloat16 on a CPU; what is planted is by the names of the laboratory's catalogue.
"""

import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from qwen_jax.config import ModelConfig


class RMSNorm(nn.Module):
    def __init__(self, weight: torch.Tensor, eps: float):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(weight, requires_grad=False), eps

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, post: Any = None
    ) -> Any:
        wide = x.float() if residual is None else x.float() + residual.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        normed = (wide * scale).to(x.dtype) * self.weight
        if residual is None:
            return normed
        residual.copy_(wide)  # the kernels write both results over their inputs
        return x.copy_(normed), residual


class Linear(nn.Module):
    """Of both: returns its result and a bias that nobody has added, here none."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, input_: torch.Tensor, forward_batch: Any = None) -> tuple[torch.Tensor, None]:
        return nn.functional.linear(input_, self.weight, self.bias), None


class QKVParallelLinear(Linear):
    pass


class MergedColumnParallelLinear(Linear):
    pass


class RowParallelLinear(Linear):
    pass


class VocabParallelEmbedding(nn.Module):
    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(input_, self.weight)


class ParallelLMHead(VocabParallelEmbedding):
    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("LMHead's weights should be used in the sampler.")


class RotaryEmbedding(nn.Module):
    def __init__(self, head_size: int, base: float, is_neox_style: bool, dtype: torch.dtype):
        super().__init__()
        self.head_size, self.is_neox_style = head_size, is_neox_style
        inv_freq = 1.0 / (base ** (torch.arange(0, head_size, 2, dtype=torch.float) / head_size))
        angles = torch.arange(256, dtype=torch.float)[:, None] * inv_freq
        self.cos_sin_cache = torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype)

    def forward(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self.cos_sin_cache[positions][:, None].chunk(2, dim=-1)
        for x in (query, key):
            heads = x.view(len(positions), -1, self.head_size)
            if self.is_neox_style:
                a, b = (half.clone() for half in heads.chunk(2, dim=-1))
                heads.copy_(torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1))
            else:
                a, b = heads[..., ::2].clone(), heads[..., 1::2].clone()
                heads[..., ::2], heads[..., 1::2] = a * cos - b * sin, b * cos + a * sin
        return query, key


class Attention(nn.Module):
    """Keeps its own cache, as theirs finds it in a context."""

    def __init__(self, num_heads: int, head_size: int, num_kv_heads: int):
        super().__init__()
        self.num_heads, self.head_size, self.num_kv_heads = num_heads, head_size, num_kv_heads
        self.kept: list[torch.Tensor] = []

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, forward_batch: Any = None
    ) -> torch.Tensor:
        keys, values = (x.reshape(len(x), -1, self.head_size).clone() for x in (k, v))
        if self.kept:
            keys, values = (torch.cat(pair) for pair in zip(self.kept, (keys, values), strict=True))
        self.kept = [keys, values]
        steps, slots, group = len(q), len(keys), self.num_heads // self.num_kv_heads
        q, k, v = (
            x.reshape(len(x), -1, self.head_size).transpose(0, 1)
            for x in (q, keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1))
        )
        seen = torch.ones(steps, slots, dtype=torch.bool).tril(slots - steps)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return out.transpose(0, 1).reshape(steps, -1)


class RadixAttention(Attention):
    """SGLang's name of it."""


class SiluAndMul(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up


class Qwen2MLP(nn.Module):
    def __init__(self, part: Mapping[str, torch.Tensor]):
        super().__init__()
        fused = torch.cat([part[f"mlp.{name}_proj.weight"] for name in ("gate", "up")])
        self.gate_up_proj = MergedColumnParallelLinear(fused)
        self.down_proj = RowParallelLinear(part["mlp.down_proj.weight"])
        self.act_fn = SiluAndMul()

    def forward(self, x: torch.Tensor, forward_batch: Any = None) -> torch.Tensor:
        gate_up, _ = self.gate_up_proj(x)
        x, _ = self.down_proj(self.act_fn(gate_up), forward_batch=forward_batch)
        return x


class Qwen2Attention(nn.Module):
    def __init__(self, config: ModelConfig, part: Mapping[str, torch.Tensor], rotary: nn.Module):
        super().__init__()
        self.total_num_heads = self.num_heads = config.num_heads
        self.total_num_kv_heads = self.num_kv_heads = config.num_kv_heads
        self.sizes = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        self.sizes = [count * config.head_dim for count in self.sizes]
        weight, bias = (
            torch.cat([part[f"self_attn.{name}_proj.{kind}"] for name in "qkv"])
            for kind in ("weight", "bias")
        )
        self.qkv_proj = QKVParallelLinear(weight, bias)
        self.o_proj = RowParallelLinear(part["self_attn.o_proj.weight"])
        self.rotary_emb = rotary
        self.attn = RadixAttention(config.num_heads, config.head_dim, config.num_kv_heads)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: Any = None
    ) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split(self.sizes, dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        output, _ = self.o_proj(self.attn(q, k, v, forward_batch))
        return output


class Qwen2DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, part: Mapping[str, torch.Tensor], rotary: nn.Module):
        super().__init__()
        self.self_attn = Qwen2Attention(config, part, rotary)
        self.mlp = Qwen2MLP(part)
        self.input_layernorm, self.post_attention_layernorm = (
            RMSNorm(part[f"{name}_layernorm.weight"], config.rms_eps)
            for name in ("input", "post_attention")
        )

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        forward_batch: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


class Qwen2Model(nn.Module):
    def __init__(self, config: ModelConfig, params: Mapping[str, torch.Tensor], **rope: Any):
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(params["model.embed_tokens.weight"])
        rotary = RotaryEmbedding(config.head_dim, **rope)
        parts = (
            {name.removeprefix(at): x for name, x in params.items() if name.startswith(at)}
            for at in (f"model.layers.{i}." for i in range(config.num_layers))
        )
        self.layers = nn.ModuleList(Qwen2DecoderLayer(config, part, rotary) for part in parts)
        self.norm = RMSNorm(params["model.norm.weight"], config.rms_eps)

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: Any = None
    ) -> torch.Tensor:
        hidden_states, residual = self.embed_tokens(input_ids), None
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual, forward_batch)
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states


class VllmLogitsProcessor(nn.Module):
    """Of the rows that it is given, and without the rows that pad the vocabulary."""

    def forward(self, lm_head: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden_states, lm_head.weight)


class SglangLogitsProcessor(nn.Module):
    """Of the last position only, in an object."""

    def forward(self, ids: Any, hidden: torch.Tensor, lm_head: nn.Module, batch: Any) -> Any:
        logits = nn.functional.linear(hidden[-1:], lm_head.weight)
        return types.SimpleNamespace(next_token_logits=logits)


class Qwen2ForCausalLM(nn.Module):
    """Of either server: they differ in how they come to logits, and in who calls them.

    Args:
        fault: what is wrong, by its name in the catalogue.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Mapping[str, np.ndarray],
        *,
        dtype: torch.dtype = torch.float32,
        fault: str = "",
        server: str = "vllm",
    ):
        super().__init__()
        held = {name: torch.from_numpy(x).to(dtype) for name, x in params.items()}
        if fault == "zero_qkv_bias":
            held |= {name: 0 * x for name, x in held.items() if name.endswith(".bias")}
        base = 1e4 if fault == "rope_theta_1e4" else config.rope_theta
        neox = fault != "rope_interleaved"
        self.model = Qwen2Model(config, held, base=base, is_neox_style=neox, dtype=dtype)
        head = held["model.embed_tokens.weight" if config.tied else "lm_head.weight"]
        self.lm_head = self.model.embed_tokens if config.tied else ParallelLMHead(head)
        self.server = server
        self.logits_processor = (
            VllmLogitsProcessor() if server == "vllm" else SglangLogitsProcessor()
        )
        if server == "vllm":
            self.compute_logits = lambda hidden: self.logits_processor(self.lm_head, hidden)

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: Any = None
    ) -> Any:
        hidden = self.model(input_ids, positions, forward_batch)
        if self.server == "vllm":
            return hidden
        return self.logits_processor(input_ids, hidden, self.lm_head, forward_batch)

    @torch.no_grad()
    def serve(self, tokens: list[int], chunks: list[int] | None = None) -> None:
        """A request, as both servers' runners put it to the model."""
        for layer in self.model.layers:
            layer.self_attn.attn.kept = []
        start = 0
        for length in chunks or [len(tokens)]:
            ids = torch.tensor(tokens[start : start + length])
            places = torch.arange(start, start + length)
            if self.server == "vllm":
                self.compute_logits(self(input_ids=ids, positions=places)[-1:])
            else:
                self.forward(ids, places, None)
            start += length


def fake_vllm(model: Qwen2ForCausalLM) -> types.ModuleType:
    """A package `vllm` whose engine has this model; a warm-up comes before each request."""

    class LLM:
        def __init__(self, name: str, **settings: Any):
            assert settings["enforce_eager"] and not settings["enable_prefix_caching"]

        def apply_model(self, func: Any) -> list[Any]:
            return [func(model)]

        def generate(self, prompts: Mapping[str, list[int]], sampling_params: Any) -> None:
            assert sampling_params.max_tokens == 1
            model.serve([0] * 7)
            model.serve(prompts["prompt_token_ids"])

    package = types.ModuleType("vllm")
    package.LLM, package.SamplingParams = LLM, types.SimpleNamespace  # type: ignore[attr-defined]
    return package
