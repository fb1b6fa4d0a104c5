"""The model of a point: kept while points ask for it, with as many slots as they ask for."""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from qwen_jax import api, choices, opening
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.shapes import shapes_for
from qwen_jax.engine.split_weights import splits_of
from qwen_jax.experiments import quantize
from qwen_jax.mesh import MeshShape
from qwen_jax.prompts import Item
from qwen_jax.requests import Request

_OF_EXPERIMENTS = ("quantization", "cache_dtype")
"""Fields that only experiments have."""

_PROMPTS = 4096
"""Prompts whose ids are kept for other points."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """What decides the weights on the device."""

    model: str
    adapter: tuple[str, ...]
    quantization: str | None
    cache_dtype: str | None
    sha256: str | None
    dtype: str
    weights: str
    implementation: str
    matmul_precision: str
    mesh: str | None

    @classmethod
    def of(cls, config: ConfigDict) -> "Choice":
        return cls(
            **{
                field.name: (config.experiment if field.name in _OF_EXPERIMENTS else config)[
                    field.name
                ]
                for field in dataclasses.fields(cls)
            },
        )

    def check(self) -> None:
        """Raises UserError for a setting that there is not, or not on this device."""
        parameters = choices.dtype_of(self.dtype)
        choices.cache_dtype_of(self.cache_dtype, parameters, self.implementation)
        choices.check_implementation(self.implementation)
        choices.check_weights(self.weights)
        choices.check_precision(self.matmul_precision)
        shape = MeshShape.parse(self.mesh)
        if shape.devices > 1:
            splits_of(shape)
        if self.quantization is not None:
            quantize.check(self.quantization)


class Sizes(NamedTuple):
    """What decides the calls of a model's programs, and can be changed without its weights."""

    slots: int | None
    batch_invariant: bool

    @classmethod
    def of(cls, config: ConfigDict) -> "Sizes":
        """An experiment is batch-invariant unless its config says otherwise: when it goes on after
        a kill, other texts run side by side than would have."""
        return cls(config.slots, config.batch_invariant is not False)

    def are_of(self, engine: Engine) -> bool:
        return engine.shapes == shapes_for(engine.platform, *self)


class Models:
    """Holds one model at a time, so that a sweep over models needs no more memory than one."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._held: tuple[Choice, api.Model] | None = None
        self._last: ConfigDict | None = None
        self._tokens: dict[tuple[str, str], Sequence[int]] = {}

    def get(self, config: ConfigDict) -> api.Model:
        """A config's model: loaded, unless the last one asked for has the same weights."""
        if self._held is not None and self._last is config:  # asked for each of its prompts
            return self._held[1]
        choice, sizes = Choice.of(config), Sizes.of(config)
        held, self._held = self._held, None  # Before the next is made: two might not fit.
        if held is None or held[0] != choice:
            del held
            model = self._load(choice, sizes)
        elif sizes.are_of(held[1].engine):
            model = held[1]
        else:
            again = remaker(held[1])
            del held
            model = again(sizes)
        self._held, self._last = (choice, model), config
        return model

    def request(self, config: ConfigDict, item: Item) -> Request:
        """A prompt as the ids of a config's model, and how to answer it."""
        model, options = self.get(config), item.options
        # Other weights of the same model have the same chat template and vocabulary.
        key = config.model, json.dumps([item.prompt, api.prompt_options(options)])
        if key not in self._tokens:
            if len(self._tokens) >= _PROMPTS:
                self._tokens.clear()
            self._tokens[key] = model.request(item.prompt, **options).tokens
        return model.request_of(self._tokens[key], options)

    def _load(self, choice: Choice, sizes: Sizes) -> api.Model:
        path: str | Path = choice.model
        if choice.quantization is not None:
            path = quantize.made(opening.locate(choice.model), choice.quantization, self._directory)
        return api.load(
            path,
            adapter=choice.adapter,
            dtype=choice.dtype,
            weights=choice.weights,
            implementation=choice.implementation,
            matmul_precision=choice.matmul_precision,
            cache_dtype=choice.cache_dtype,
            mesh=choice.mesh,
            **sizes._asdict(),
            sha256=None if choice.quantization else choice.sha256,
        )


def remaker(model: api.Model) -> Callable[[Sizes], api.Model]:
    """What makes the same model of other sizes, and doesn't hold on to this one's cache."""
    engines = model.engine, *model.engine.others
    makers = [_maker(engine, len(engines)) for engine in engines]
    del engines
    tokenizer, recommended = model.tokenizer, model.recommended

    def make(sizes: Sizes) -> api.Model:
        first, *others = (maker(**sizes._asdict()) for maker in makers)
        first.others = tuple(others)
        return api.Model(first, tokenizer, recommended)

    return make


def _maker(engine: Engine, replicas: int) -> Callable[..., Engine]:
    spec = engine.spec
    return functools.partial(
        Engine,
        engine.config,
        engine.weights,
        stop_ids=spec.stop_ids,
        valid_tokens=spec.valid_tokens,
        unused_ids=spec.unused_ids,
        cache=spec.cache,
        precision=spec.precision,
        implementation=spec.implementation,
        split=spec.split,
        sharers=replicas * spec.split.size,
    )
