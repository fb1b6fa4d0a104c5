"""The engine's programs as it calls them: `steps`' functions, kept between processes."""

from typing import Any

from qwen_jax.engine import steps
from qwen_jax.engine.spec import Spec
from qwen_jax.executables.kept import Kept
from qwen_jax.model.tap import watched


def _looked_into(spec: Spec, *_: Any) -> bool:
    """Whether something watches or intervenes, so that the program is not the model's own."""
    return spec.variant is not None or watched()


extend = Kept(steps, "extend", static=(0,), large=1, unless=_looked_into)
score = Kept(steps, "score", static=(0,), large=1, unless=_looked_into)
logits = Kept(steps, "logits", static=(0,), large=1, unless=_looked_into)
step = Kept(steps, "step", static=(0, 7, 8), large=1, unless=_looked_into)
insert = Kept(steps, "insert")
advance = Kept(steps, "advance", static=(0,), large=1, unless=_looked_into)
choose = Kept(steps, "choose", static=(0, 6))
