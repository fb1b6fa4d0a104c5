"""What `mesh` says, as in "dp=2,tp=4": how many models there are, and the devices of each.

Light on purpose: a mistake is told before JAX wakes.
"""

import dataclasses
from typing import NamedTuple

from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError

AXES = {
    "dp": "models that share the texts",
    "tp": "devices that have one model together",
}


class MeshShape(NamedTuple):
    """Numbers of devices: `dp` times `tp` in all."""

    dp: int = 1
    tp: int = 1

    def __str__(self) -> str:
        return ",".join(f"{name}={n}" for name, n in self._asdict().items() if n > 1) or "tp=1"

    @property
    def devices(self) -> int:
        return self.dp * self.tp

    @classmethod
    def parse(cls, text: str | None) -> "MeshShape":
        """What a text says; None is one device.

        Raises:
            UserError: it is not of that form, or names another axis.
        """
        sizes: dict[str, int] = {}
        for part in () if text is None else text.split(","):
            name, given, size = (x.strip() for x in part.partition("="))
            if not given or name not in AXES or name in sizes:
                axes = " and ".join(f"{axis} ({means})" for axis, means in AXES.items())
                raise UserError(
                    f"mesh is {text!r:.60}, but its axes are {axes}, each once; write it as in "
                    "dp=2,tp=4."
                )
            if not (size.isascii() and size.isdecimal() and 1 <= int(size[:9]) <= 65_536):
                raise UserError(
                    f"mesh is {text!r:.60}, but {name} must be a whole number of devices from 1 "
                    "on; write it as in dp=2,tp=4."
                )
            sizes[name] = int(size)
        return cls(**sizes)

    def check(self, config: ModelConfig) -> None:
        """Raises UserError where a model can't be dealt out to so many devices."""
        tp, kv = self.tp, config.num_kv_heads
        wrong = None
        if kv % tp and tp % kv:
            wrong = f"the {kv} key/value heads neither divide by {tp} nor divide it"
        for said, size in (
            ("query heads", config.num_heads),
            ("feed-forward units", config.ffn_size),
            ("rows of the vocabulary", config.vocab_size),
        ):
            if wrong is None and size % tp:
                wrong = f"its {size} {said} don't divide by {tp}"
        if wrong is not None:
            fitting = ", ".join(map(str, self.fitting(config)))
            raise UserError(
                f"mesh is {self}, but of {config.source} {wrong}; choose tp from {fitting}."
            )

    @staticmethod
    def fitting(config: ModelConfig) -> list[int]:
        """The numbers of devices that a model can be dealt out to."""
        sizes = config.num_heads, config.ffn_size, config.vocab_size
        kv = config.num_kv_heads
        return [
            tp
            for tp in range(1, config.num_heads + 1)
            if not any(size % tp for size in sizes) and (kv % tp == 0 or tp % kv == 0)
        ]


ONE = MeshShape()


def cached(config: ModelConfig, tp: int) -> ModelConfig:
    """The config with as many key/value heads as so many devices hold: where there are more devices
    than heads, each head is on several."""
    return dataclasses.replace(config, num_kv_heads=max(config.num_kv_heads, tp))


def part(config: ModelConfig, tp: int) -> ModelConfig:
    """The config of what one of so many devices has."""
    held = cached(config, tp)
    dealt = ("num_heads", "num_kv_heads", "ffn_size", "vocab_size")
    return dataclasses.replace(held, **{name: getattr(held, name) // tp for name in dealt})
