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
    assert set(found.values()) - {""} == {"first", "second"}
    entry = compiled.as_text().partition("ENTRY")[2]
    names = [line.split(" = ")[0].strip(" %") for line in entry.splitlines() if " = " in line]
    computing = [n.removeprefix("ROOT %") for n in names if "dot" in n or "fusion" in n]
    assert computing and all(found[name] for name in computing)


def test_of_programs_of_one_name_that_which_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has all that was seen, and little else."""
    line = '  %{} = f32[] add(), metadata={{op_name="jit(step)/{}/add"}}'
    programs = [
        [("a.1", "wrong"), ("b.1", "wrong")],
        [("a.1", "wrong"), ("b.1", "wrong"), ("c.1", "wrong"), ("d.1", "wrong")],
        [("a.1", "right"), ("b.1", "right"), ("c.1", "right")],
    ]
    texts = ["\n".join(line.format(*pair) for pair in program) for program in programs]
    compiled = [("jit_step", text) for text in texts] + [("jit_other", texts[0])]
    monkeypatch.setattr(model_operations, "_texts", lambda: iter(compiled))
    found = model_operations.of_programs({"jit_step": {"a.1", "b.1", "c.1", "nowhere"}})
    assert found == {("jit_step", name): "right" for name in ("a.1", "b.1", "c.1")}
