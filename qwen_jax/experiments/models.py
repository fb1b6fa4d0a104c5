"""The model of a point: kept while points ask for it, its programs kept for other weights."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from qwen_jax import api
from qwen_jax.engine.engine import Engine
from qwen_jax.experiments import quantize
from qwen_jax.generation import Request
from qwen_jax.prompts import Item

_PROMPTS = 4096
"""Prompts whose ids are kept for other points."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """What decides the weights on the device and the programs that read them."""

    model: str
    adapter: tuple[str, ...]
    quantization: str | None
    sha256: str | None
    dtype: str
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
        api.check_precision(self.matmul_precision)
        if self.quantization is not None:
            quantize.check(self.quantization)


class Models:
    """Holds one model at a time, so that a sweep over models needs no more memory than one."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._held: tuple[Choice, api.Model] | None = None
        self._tokens: dict[tuple[str, str], Sequence[int]] = {}
        self._programs: dict[tuple[Any, ...], Engine] = {}

    def get(self, choice: Choice) -> api.Model:
        """The model, loaded unless the last one asked for was the same."""
        if self._held is None or self._held[0] != choice:
            self._held = None  # Before the next is loaded: two might not fit.
            self._held = choice, self._load(choice)
        return self._held[1]

    def request(self, choice: Choice, item: Item) -> Request:
        """A prompt as the model's ids, and how to answer it."""
        model, options = self.get(choice), item.options
        # Other weights of the same model have the same chat template and vocabulary.
        key = choice.model, json.dumps([item.prompt, api.prompt_options(options)])
        if key not in self._tokens:
            if len(self._tokens) >= _PROMPTS:
                self._tokens.clear()
            self._tokens[key] = model.request(item.prompt, **options).tokens
        return model.request_of(self._tokens[key], options)

    def _load(self, choice: Choice) -> api.Model:
        path: str | Path = choice.model
        if choice.quantization is not None:
            path = quantize.made(api.locate(choice.model), choice.quantization, self._directory)
        model = api.load(
            path,
            adapter=choice.adapter,
            dtype=choice.dtype,
            implementation=choice.implementation,
            matmul_precision=choice.matmul_precision,
            sha256=None if choice.quantization else choice.sha256,
        )
        engine = model.engine
        key: tuple[Any, ...] = (
            *(choice.implementation, choice.matmul_precision, str(engine.cache_dtype)),
            *(model.config, engine.stop_ids),
            *(model.tokenizer.vocab_size, model.tokenizer.unused_ids),
        )
        if key in self._programs:
            model.engine = self._programs[key].over(engine.weights, engine.config)
        else:
            self._programs[key] = engine.over({}, engine.config)
        return model
