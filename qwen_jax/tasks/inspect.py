"""`run.py inspect`: what is in a model file and what running it would take, no weights read."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from pallas_kernels.gqa_decode_attention import mosaic_gpu as gqa_decode_attention
from pallas_kernels.gqa_prefill_attention import mosaic_gpu as gqa_prefill_attention
from pallas_kernels.rope import mosaic_gpu as rope
from pallas_kernels.sample_tokens import MOST_LOGPROBS
from pallas_kernels.sample_tokens import mosaic_gpu as sample_tokens
from qwen_jax import choices, opening, pins, recommended, scaling
from qwen_jax.config import ModelConfig
from qwen_jax.engine.form import Form, expanded_in, form_of, no_kernel
from qwen_jax.engine.layout import Layout
from qwen_jax.engine.memory import Budget, TooLarge, device, show_bytes
from qwen_jax.loading import read_tokenizer
from qwen_jax.mesh import ONE, MeshShape, cached, part
from qwen_jax.model.cache import PAGE
from qwen_jax.model.products import activation_dtype
from qwen_jax.recommended import Recommended
from qwen_jax.reporting.model import model_lines
from qwen_jax.settings import Command
from qwen_jax.terminal import visible
from qwen_jax.text.tokenizer import Tokenizer
from qwen_jax.weights.hub_names import is_hub_name
from qwen_jax.weights.loader import Checkpoint

MAX_VALUE = 100
"""Characters of a metadata value that are shown."""


def run(command: Command) -> int:
    """Prints the report; returns the exit code."""
    config = command.config
    dtype = choices.dtype_of(config.dtype)
    choices.check_implementation(config.implementation)
    choices.check_weights(config.weights)
    choices.check_slots(config.slots)
    mesh = MeshShape.parse(config.mesh)
    pins.pin_and_tell(config, pins.OF_RUN)
    checkpoint = opening.open_model(config.model, config.adapter, sha256=config.sha256)
    form = form_of(
        config.weights,
        checkpoint,
        dtype,
        implementation=config.implementation,
        slots=config.slots,
        texts=1,
        mesh=mesh,
    )
    tokenizer, own = read_tokenizer(checkpoint), part(checkpoint.config, mesh.tp)
    sections = (
        ("file", file_lines(checkpoint, config.model)),
        ("model", model_lines(checkpoint.config)),
        ("metadata", metadata_lines(checkpoint.metadata)),
        ("tensors", tensor_lines(checkpoint)),
        ("text", text_lines(tokenizer, recommended.read(checkpoint))),
        (
            "implementations",
            implementation_lines(config.implementation, checkpoint.config, dtype, mesh),
        ),
        ("memory", memory_lines(own, dtype, config.slots, form, mesh)),
        *(
            [("mesh", mesh_lines(checkpoint.config, mesh, config.implementation))]
            if mesh.devices > 1
            else []
        ),
    )
    print(visible("\n\n".join("\n  ".join([title, *lines]) for title, lines in sections)))
    return 0


def file_lines(checkpoint: Checkpoint, name: str = "") -> Iterator[str]:
    """Where it lies, and its name on the Hub if `name` is one."""
    if is_hub_name(name):
        yield name
    size = sum(path.stat().st_size for path in checkpoint.files.paths)
    yield f"{checkpoint.path}"
    count = len(checkpoint.files.paths)
    yield f"{checkpoint.format}, {count} file{'s' * (count > 1)}, {show_bytes(size)}"
    yield ", ".join(f"{count} {name}" for name, count in checkpoint.quantization.items())
    for adapter in checkpoint.adapters:
        yield f"adapter {adapter}"
    if checkpoint.ignored:
        yield f"ignored: {', '.join(checkpoint.ignored)}"


def metadata_lines(metadata: dict[str, Any]) -> Iterator[str]:
    for key, value in metadata.items():
        if isinstance(value, list | np.ndarray):
            head = value[:3].tolist() if isinstance(value, np.ndarray) else value[:3]
            first = ", ".join(map(repr, head))
            text = f"[{first}, …] ({len(value)})" if len(value) > 3 else f"[{first}]"
        else:
            text = repr(value)
        yield f"{key} = {text if len(text) <= MAX_VALUE else text[: MAX_VALUE - 1] + '…'}"


def tensor_lines(checkpoint: Checkpoint) -> Iterator[str]:
    """One line a tensor of the first layer and outside the layers, then one for the others."""
    others: Counter[str] = Counter()
    shown = []
    for info in checkpoint.tensors.values():
        layer = next((part for part in info.name.split(".") if part.isdigit()), "0")
        if layer == "0":
            shown.append(info)
        else:
            others[layer] += 1
    width = max([44, *(len(info.name) for info in shown)])
    for info in shown:
        shape = " x ".join(map(str, info.shape))
        yield f"{info.name:<{width}} {info.type.name:<8} {shape:>16}  {show_bytes(info.nbytes):>9}"
    if others:
        yield f"and {others.total()} more in layers 1 to {len(others)}"


def text_lines(tokenizer: Tokenizer, said: Recommended) -> Iterator[str]:
    yield f"{tokenizer.vocab_size - len(tokenizer.unused_ids)} tokens in use"
    stops = ", ".join(f"{i} {tokenizer.token_name(i)}" for i in tokenizer.stop_ids)
    yield f"stops on {stops}"
    if said.values:
        yield str(said)
    template = tokenizer.chat_template
    if template is None:
        yield "no chat template: ChatML with Qwen's default system prompt is used"
        return
    yield f"chat template, {len(template)} characters:"
    for line in template.splitlines()[:12]:
        yield f"  {line[:MAX_VALUE]}"
    if len(template.splitlines()) > 12:
        yield f"  … {len(template.splitlines()) - 12} more lines"


def implementation_lines(
    implementation: str, config: ModelConfig, dtype: jnp.dtype, mesh: MeshShape = ONE
) -> Iterator[str]:
    """What each operation would run on; a call of many rows may still take another."""
    own = part(config, mesh.tp)
    heads, kv_heads, dim = own.num_heads, own.num_kv_heads, own.head_dim
    pages = (2, kv_heads, PAGE, dim)
    # Where the step's kernel serves no row, its weight stream isn't made either.
    unpacked = no_kernel(config, dtype, mesh)
    reasons = {
        "rope": rope.refusal(PAGE, (dim, dim), config.rope_dim // 2, activation_dtype(dtype)),
        "gqa_prefill_attention": gqa_prefill_attention.refusal(
            (1, PAGE, heads, dim), pages, dtype, dtype
        ),
        "gqa_decode_attention": gqa_decode_attention.refusal(
            heads, kv_heads, PAGE, dim, dtype, dtype
        ),
        "decode_step": unpacked,
        "packed_product": unpacked,
        "sample_tokens": sample_tokens.refusal(
            config.vocab_size, jnp.dtype(jnp.float32), MOST_LOGPROBS
        ),
    }
    for operation in pallas_kernels.OPERATIONS:
        why = reasons[operation]
        chosen = pallas_kernels.choose(operation, implementation, why)
        why = pallas_kernels.refusal(operation) or why
        yield f"{operation:<24} {chosen}" + (f" ({why})" if why and chosen == "xla" else "")


def memory_lines(
    config: ModelConfig,
    dtype: jnp.dtype,
    slots: int | None = None,
    form: Form | None = None,
    mesh: MeshShape = ONE,
) -> Iterator[str]:
    """The budget: weights, cache per 1k tokens, and the cache that the slots would share.

    Args:
        config: of what one device of the mesh has, as are all numbers.
        form: of the weights; of none, all are numbers.
    """
    form = form or Form(Budget.of(config, dtype).weights)
    held, slots = form.held, slots or form.rows
    budget = Budget.of(config, dtype, held, mesh.devices)
    if mesh.devices > 1:
        yield f"of each of {mesh.devices} devices ({mesh}):"
    weights, each, free = budget.weights, budget.cache_per_token, budget.free
    yield f"{device().device_kind}: {show_bytes(free)} free; parameters and cache in {dtype.name}"
    all_numbers = show_bytes(Budget.of(config, dtype).weights)
    how = "multiplied as they are" if form.plan else "decoded as they are used"
    expanded = f"  (in blocks, {how}; expanded {all_numbers})" if form.blocks else ""
    yield f"weights                 {show_bytes(weights):>9}{expanded}"
    if form.plan and (numbers := expanded_in(form.plan)):
        yield f"  all but {', '.join(numbers)}, which are expanded to {dtype.name}"
    if form.cut:
        yield f"  but where a device's part ends within one: {', '.join(form.cut)}, expanded"
    yield f"cache, 1,024 tokens     {show_bytes(1024 * each):>9}"
    context = config.context_length
    yield f"cache, whole context    {show_bytes(context * each):>9}  ({context} tokens)"
    if free <= weights:
        yield f"does not fit: the weights alone need {show_bytes(weights - free)} more"
        return
    try:
        layout = Layout.of(
            *(config, dtype, device().platform),
            loaded=False,
            held=held,
            slots=slots,
            sharers=mesh.devices,
        )
    except TooLarge:
        yield "does not fit: the weights leave no room for keys and values"
        return
    tokens, slots = layout.cache_tokens, layout.shapes.slots
    whole = tokens // context
    holds = f"{whole} whole context{'s' * (whole > 1)}" if whole else "less than a whole context"
    size = show_bytes(tokens * each)
    yield f"cache, {f'{slots} slots':<16} {size:>9}  ({tokens} tokens, {holds})"


def mesh_lines(config: ModelConfig, mesh: MeshShape, implementation: str = "auto") -> Iterator[str]:
    """How the model would be dealt out, and what steps would take."""
    own, there = part(config, mesh.tp), len(jax.devices())
    copies = cached(config, mesh.tp).num_kv_heads // config.num_kv_heads
    several = f" (each on {copies} devices)" * (copies > 1)
    yield "a device's part:"
    yield f"  query heads             {own.num_heads:>9}"
    yield f"  key/value heads         {own.num_kv_heads:>9}{several}"
    yield f"  feed-forward            {own.ffn_size:>9}"
    yield f"  vocabulary              {own.vocab_size:>9}"
    why = no_kernel(config, scaling.BFLOAT16, mesh)
    runs = f"can't run on these: {why}" if why else "runs on each"
    if implementation == "xla":
        runs = "doesn't run: implementation is xla"
    yield f"on H200s the decode step's kernel {runs}"
    if mesh.devices > there:
        yield f"takes {mesh.devices} devices; here {'is' if there == 1 else 'are'} {there}"
    kernel = why is None and implementation != "xla"
    yield from scaling.step_lines(config, mesh, kernel)
