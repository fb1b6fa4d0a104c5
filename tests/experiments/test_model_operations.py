"""Names of operations, in programs whose scopes are known."""

import jax
import jax.numpy as jnp
import pytest

from qwen_jax.experiments import model_operations


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("jit(step)/while/body/closed_call/qkv_proj/dot_general", "qkv_proj"),
        ("jit(step)/while/body/closed_call/ffn_act/jit(silu)/mul", "ffn_act"),
        ("jit(step)/rope/while/body/bkgts,bksh->bkgth/dot_general", "rope"),
        ("jit(step)/cond/branch_1_fun/o_proj/packed_product/add", "o_proj"),
        ("jit(step)/while/body/reshape;lm_head/transpose", "lm_head"),
        ("jit(step)/while/body/add", ""),
        ("add", ""),
        ("", ""),
    ],
)
def test_the_operation_of_a_path(path: str, name: str) -> None:
    assert model_operations.operation(path) == name


def test_every_instruction_of_a_program() -> None:
    """Of those that compute, none is without an operation, whatever was fused with what."""

    def program(x: jax.Array, weight: jax.Array) -> jax.Array:
        with jax.named_scope("first"):
            x = jnp.tanh(x @ weight)
        with jax.named_scope("second"):
            return x @ weight + 1

    x = jnp.ones((64, 64))
    compiled = jax.jit(program).lower(x, x).compile()
    found = model_operations.operations(compiled.as_text())
    assert set(found.values()) == {"first", "second"}
    entry = compiled.as_text().partition("ENTRY")[2]
    names = [line.split(" = ")[0].strip(" %") for line in entry.splitlines() if " = " in line]
    computing = [n.removeprefix("ROOT %") for n in names if "dot" in n or "fusion" in n]
    assert computing and all(name in found for name in computing)
