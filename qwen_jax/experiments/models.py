"""The model of a point: kept while points ask for it, with as many slots as they ask for."""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from qwen_jax import api
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.shapes import shapes_for
from qwen_jax.experiments import quantize
from qwen_jax.generation import Request
from qwen_jax.prompts import Item

_PROMPTS = 4096
"""Prompts whose ids are kept for other points."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """What decides the weights on the device."""

    model: str
    adapter: tuple[str, ...]
    quantization: str | None
    sha256: str | None
    dtype: str
    weights: str
    implementation: str
    matmul_precision: str

    @classmethod
    def of(cls, config: ConfigDict) -> "Choice":
        return cls(
            quantization=config.experiment.quantization,
            **{
                field.name: config[field.name]
                for field in dataclasses.fields(cls)
                if field.name != "quantization"
            },
        )

    def check(self) -> None:
        """Raises UserError for a setting that there is not, or not on this device."""
        api.dtype_of(self.dtype)
        api.check_implementation(self.implementation)
        api.check_weights(self.weights)
        api.check_precision(self.matmul_precision)
        if self.quantization is not None:
            quantize.check(self.quantization)


class Models:
    """Holds one model at a time, so that a sweep over models needs no more memory than one."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._held: tuple[Choice, api.Model] | None = None
        self._tokens: dict[tuple[str, str], Sequence[int]] = {}

    def get(self, config: ConfigDict) -> api.Model:
        """A config's model: loaded, unless the last one asked for has the same weights."""
        choice, slots = Choice.of(config), config.slots
        held, self._held = self._held, None  # Before the next is made: two might not fit.
        if held is None or held[0] != choice:
            del held
            model = self._load(choice, slots)
        elif _has(held[1], slots):
            model = held[1]
        else:
            again = remaker(held[1])
            del held
            model = again(slots)
        self._held = choice, model
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

    def _load(self, choice: Choice, slots: int | None) -> api.Model:
        path: str | Path = choice.model
        if choice.quantization is not None:
            path = quantize.made(api.locate(choice.model), choice.quantization, self._directory)
        return api.load(
            path,
            adapter=choice.adapter,
            dtype=choice.dtype,
            weights=choice.weights,
            implementation=choice.implementation,
            matmul_precision=choice.matmul_precision,
            slots=slots,
            sha256=None if choice.quantization else choice.sha256,
        )


def _has(model: api.Model, slots: int | None) -> bool:
    engine = model.engine
    return engine.shapes == shapes_for(engine.platform, slots)


def remaker(model: api.Model) -> Callable[[int | None], api.Model]:
    """What makes the same model with so many slots, and doesn't hold on to this one's cache."""
    engine, spec = model.engine, model.engine.spec
    make = functools.partial(
        Engine,
        engine.config,
        engine.weights,
        stop_ids=spec.stop_ids,
        valid_tokens=spec.valid_tokens,
        unused_ids=spec.unused_ids,
        precision=spec.precision,
        implementation=spec.implementation,
    )
    tokenizer, recommended = model.tokenizer, model.recommended
    return lambda slots: api.Model(make(slots=slots), tokenizer, recommended)
