"""The engine's programs as it calls them: `steps`' functions, kept between processes."""

from typing import Any

import jax

from qwen_jax.engine import speculate as speculation
from qwen_jax.engine import steps
from qwen_jax.engine.spec import Spec
from qwen_jax.executables.kept import Kept
from qwen_jax.model.split import WHOLE
from qwen_jax.model.tap import watched


def _not_kept(spec: Spec, *_: Any) -> bool:
    """Whether something watches or intervenes, so that the program is not the model's own; or it
    is for other devices, which JAX's own cache keeps."""
    return spec.variant is not None or spec.split is not WHOLE or watched()


def _elsewhere(extras: steps.Extras, *_: Any) -> bool:
    """Whether they are anywhere but on the default device."""
    there = extras.bias.sharding
    return there is not None and there.device_set != {jax.local_devices()[0]}


def _history_on_mesh(history: speculation.History, *_: Any) -> bool:
    return isinstance(history.sharding, jax.sharding.NamedSharding)


extend = Kept(steps, "extend", static=(0,), large=1, unless=_not_kept)
score = Kept(steps, "score", static=(0,), large=1, unless=_not_kept)
logits = Kept(steps, "logits", static=(0,), large=1, unless=_not_kept)
step = Kept(steps, "step", static=(0, 7, 8), large=1, unless=_not_kept)
insert = Kept(steps, "insert", unless=_elsewhere)
advance = Kept(steps, "advance", static=(0,), large=1, unless=_not_kept)
speculate = Kept(speculation, "speculate", static=(0, 10, 11, 12), large=1, unless=_not_kept)
remember = Kept(speculation, "remember", unless=_history_on_mesh)
begin = Kept(speculation, "begin", unless=_history_on_mesh)
choose = Kept(steps, "choose", static=(0, 6, 7), unless=_not_kept)
