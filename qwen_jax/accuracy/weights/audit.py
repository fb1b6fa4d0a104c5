"""Weights audit: the bytes of a checkpoint against the parameters somebody holds.

No forward pass is needed. Each tensor is decoded by a library that is not ours (gguf.quants,
safetensors) and compared with what is held, tensor by tensor; what differs by more than rounding
to the held dtype is explained by planting the faults of loaders until one reproduces it.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import numpy as np
from jaxtyping import Shaped

from qwen_jax.accuracy.finding import Cause, Progress
from qwen_jax.accuracy.measures.residuals import Difference, is_finite, is_float, residual
from qwen_jax.accuracy.weights.checkpoint_values import CheckpointValues
from qwen_jax.accuracy.weights.faults import WHOLE_VALUES, Role, Tensor, WeightFault
from qwen_jax.accuracy.weights.misread_blocks import BLOCK_FAULTS
from qwen_jax.config import ModelConfig
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.weights import Weights, read_back
from qwen_jax.errors import UserError
from qwen_jax.weights import names
from qwen_jax.weights.checkpoint import Checkpoint, open_checkpoint

Held = Mapping[str, Shaped[np.ndarray, "..."]]

_PROBE = 16
"""Rows in which a fault is searched before the whole tensor is compared."""


@dataclasses.dataclass(frozen=True)
class WeightFinding:
    """One tensor of the checkpoint, as it is held.

    Attributes:
        tensor: its name in the checkpoint.
        parameter: where it is held.
        verdict: "exact" (rounded to nearest, bit for bit), "within rounding", "fault" or "missing".
        outside, values: how many values differ by more than rounding, of how many.
        error: ||held - right|| / ||right||.
        causes: the faults that explain it, each with the error that is left; empty: unknown.
        evidence: where the values differ, in words; empty where they don't.
    """

    tensor: str
    parameter: str
    verdict: str
    outside: int
    values: int
    error: float
    causes: tuple[Cause, ...] = ()
    evidence: str = ""


def audit_weights(
    model: Checkpoint | str | Path,
    held: Engine | Weights | Held,
    *,
    progress: Progress | None = None,
) -> list[WeightFinding]:
    """Every tensor of a checkpoint against what is held of it, in the order of a forward pass.

    Args:
        model: the checkpoint.
        held: an engine, its weights, or arrays by name, in any dtype: our names (fused), a GGUF
            file's or a Hugging Face checkpoint's.
        progress: hears of tensors done and in all.

    Raises:
        UserError: the checkpoint can't be opened, has adapters or is not finite, or `held` has none
            of its tensors, or one that holds no floating-point numbers.
    """
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    if checkpoint.adapters:
        raise UserError(
            f"{checkpoint.adapters[0]}: the part weights holds what is loaded against the "
            "checkpoint's own bytes, which an adapter changes; leave out one of the two."
        )
    return list(_Audit(checkpoint, _arrays(held)).run(progress))


def _arrays(held: Engine | Weights | Held) -> Held:
    if isinstance(held, Engine):
        held = held.weights
    return held if isinstance(held, Mapping) else cast(Held, read_back(held))


@dataclasses.dataclass(frozen=True)
class _Place:
    """A tensor of the checkpoint: its role, and the parameter it is part of."""

    name: str
    role: Role
    parameter: names.Parameter
    start: int


def _places(checkpoint: Checkpoint) -> list[_Place]:
    found = []
    for parameter in checkpoint.parameters:
        start = 0
        for index, (name, shape) in enumerate(parameter.sources.items()):
            found.append(_Place(name, _role(parameter, index), parameter, start))
            start += shape[0]
    return found


def _role(parameter: names.Parameter, index: int) -> Role:
    if parameter.keep_float32:
        return "norm"
    plain: dict[str, Role] = {"embed": "embed", "lm_head": "head"}
    if parameter.name in plain:
        return plain[parameter.name]
    if "qkv_proj" in parameter.name:
        letter = "qkv"[index]
        return cast(Role, f"bias_{letter}" if parameter.name.endswith("bias") else letter)
    return "matrix"


class _Audit:
    def __init__(self, checkpoint: Checkpoint, held: Held):
        self.held, self.checkpoint = held, checkpoint
        self.config: ModelConfig = checkpoint.config
        self.source = CheckpointValues(checkpoint)
        self.places = _places(checkpoint)
        other = names.parameters(
            self.config, "safetensors" if checkpoint.format == "gguf" else "gguf"
        )
        self.aliases = {
            name: alias
            for ours, theirs in zip(checkpoint.parameters, other, strict=True)
            for name, alias in zip(ours.sources, theirs.sources, strict=True)
        }
        if all(self.find(place) is None for place in self.places):
            raise UserError(
                f"none of the {len(held)} arrays ({', '.join(sorted(held)[:3])}, ...) has the name "
                f"of a tensor of {checkpoint.path}; name them as that file does, such as "
                f"{self.places[0].name!r}."
            )

    def run(self, progress: Progress | None) -> Iterator[WeightFinding]:
        fused: dict[str, tuple[Cause, ...]] = {}
        for done, place in enumerate(self.places, start=1):
            if place.start == 0:  # the parameter's first tensor
                fused.clear()
            yield self.check(place, fused)
            if progress:
                progress(done, len(self.places))
        if self.config.tied and (head := self.head()) is not None:
            yield self.tied_head(*head)

    def find(self, place: _Place) -> tuple[str, np.ndarray] | None:
        """Where the tensor is held, and its part of that array."""
        name = place.parameter.name
        if name in self.held:
            rows = slice(place.start, place.start + place.parameter.sources[place.name][0])
            whole = np.asarray(self.held[name])
            if len(place.parameter.sources) == 1:
                return name, whole
            if whole.shape == place.parameter.shape[::-1] != place.parameter.shape:
                return name, whole[:, rows]
            return name, whole[rows]
        for alias in (place.name, self.aliases[place.name]):
            if alias in self.held:
                return alias, np.asarray(self.held[alias])
        return None

    def check(self, place: _Place, fused: dict[str, tuple[Cause, ...]]) -> WeightFinding:
        found, tensor = self.find(place), self.tensor(place)
        count = int(np.prod(self.source.shape(place.name)))
        if found is None:
            return self.missing(place, count)
        name, held = found
        if not is_float(held.dtype):
            raise UserError(
                f"{name} is held as dtype {held.dtype}, which is no floating-point one; decode it "
                "before it is audited."
            )
        right = tensor.values()
        if not is_finite(right):
            raise UserError(
                f"{self.checkpoint.path}: {place.name} is not finite, so nothing can be told of "
                "what is held of it; get the file again."
            )
        if held.shape != right.shape:
            before = Difference(count, count, float("inf"), np.ones(len(right), np.int64), False)
            evidence = f"shape {held.shape}, not {right.shape}"
        else:
            before = residual(held, right)
            if before.fits:
                verdict = "exact" if before.exact else "within rounding"
                return WeightFinding(place.name, name, verdict, 0, count, before.error)
            evidence = self.where(place, held, right, before)
        causes = self.fused_order(place, fused) or self.causes(place, held, before)
        return WeightFinding(
            place.name, name, "fault", before.outside, count, before.error, causes, evidence
        )

    def tensor(self, place: _Place, start: int = 0, stop: int | None = None) -> Tensor:
        return Tensor(place.name, place.role, self.config, self.source, start, stop)

    def causes(self, place: _Place, held: np.ndarray, before: Difference) -> tuple[Cause, ...]:
        """All faults that reproduce what is held, the likeliest kind first."""
        found = [
            cause
            for fault in WHOLE_VALUES + BLOCK_FAULTS
            for cause in self.planted(place, fault, held, before)
        ]
        found += self.other_tensors(place, held)
        # A factor of zero is "zeroed", a shift by one "norm-plus-one": the plainer name is meant.
        plain = [c for c in found if c.name not in ("scaled", "shifted")]
        return tuple(plain or found)

    def planted(
        self, place: _Place, fault: WeightFault, held: np.ndarray, before: Difference
    ) -> Iterator[Cause]:
        tensor, part = self.tensor(place), held
        if fault.local:
            if held.shape != self.source.shape(place.name):
                return
            # Where only some rows are wrong, the fault is sought and confirmed in those.
            first, last = before.span
            if (first, last) != (0, len(held)):
                tensor, part = self.tensor(place, first, last), held[first:last]
            few = min(_PROBE if held.ndim > 1 else len(part), len(part))
            probe = self.tensor(place, first, first + few)
            if not any(_fits(part[:few], wrong) for _, wrong in fault.plant(probe, part[:few])):
                return
        for detail, wrong in fault.plant(tensor, part):
            if wrong.shape == part.shape and (after := residual(part, wrong)).fits:
                yield Cause(fault.name, fault.line, after.error, detail)
                return

    def other_tensors(self, place: _Place, held: np.ndarray) -> Iterator[Cause]:
        """Tensors of the same shape whose values are held in this one's place."""
        for other in self.places:
            shape = self.source.shape(other.name)
            if other.name == place.name or shape != held.shape:
                continue
            few = 1 if held.ndim > 1 else len(held)
            if not _fits(held[:few], self.source.rows(other.name, 0, few)):
                continue
            if not (after := residual(held, self.source.rows(other.name))).fits:
                continue
            name, line = "swapped", "another tensor is held in its place:"
            if {place.role, other.role} == {"embed", "head"}:
                name, line = "head-tied", "the head is taken to be tied to the embedding:"
            elif _kind(place) == _kind(other):
                name, line = "layer-order", "another layer's tensor is held:"
            yield Cause(name, line, after.error, other.name)

    def fused_order(self, place: _Place, known: dict[str, tuple[Cause, ...]]) -> tuple[Cause, ...]:
        """Whether the parts of a fused parameter are all there, in another order."""
        name, parts = place.parameter.name, list(place.parameter.sources)
        if len(parts) == 1 or name not in self.held:
            return ()
        if name not in known:
            held = np.asarray(self.held[name])
            rows = {part: self.source.rows(part) for part in parts}
            orders = _orders(rows, self.config)
            known[name] = tuple(
                Cause("fused-order", "the fused parts stand in the order", after.error, detail)
                for detail, wrong in orders
                if wrong.shape == held.shape and (after := residual(held, wrong)).fits
            )
        return known[name]

    def missing(self, place: _Place, count: int) -> WeightFinding:
        causes: tuple[Cause, ...] = ()
        if place.role == "head":
            line = "the head is untied, and the embedding would be used for it"
            causes = (Cause("head-tied", line, 0.0),)
        evidence = "nothing is held of it"
        return WeightFinding(
            place.name,
            place.parameter.name,
            "missing",
            count,
            count,
            float("inf"),
            causes,
            evidence,
        )

    def head(self) -> tuple[str, np.ndarray] | None:
        """A head of its own, held where the checkpoint ties it to the embedding."""
        (source,) = names.LM_HEAD.sources
        for name in (names.LM_HEAD.name, source.gguf, source.safetensors):
            if name in self.held:
                return name, np.asarray(self.held[name])
        return None

    def tied_head(self, name: str, held: np.ndarray) -> WeightFinding:
        place = self.places[0]  # the embedding, which is the head
        right = self.source.rows(place.name)
        if held.shape != right.shape:
            evidence = f"shape {held.shape}, not the embedding's {right.shape}"
            return WeightFinding(
                name, name, "fault", right.size, right.size, float("inf"), (), evidence
            )
        after = residual(held, right)
        if after.fits:
            return WeightFinding(
                name,
                name,
                "exact" if after.exact else "within rounding",
                0,
                right.size,
                after.error,
            )
        causes = tuple(
            dataclasses.replace(cause, name=f"tied-head-{cause.name}")
            for cause in self.causes(place, held, after)
        )
        evidence = f"the head is tied to {place.name}; " + self.where(place, held, right, after)
        return WeightFinding(
            name, name, "fault", after.outside, right.size, after.error, causes, evidence
        )

    def where(self, place: _Place, held: np.ndarray, right: np.ndarray, found: Difference) -> str:
        """Which values differ: how many, in which rows or heads, and the first of them."""
        first, last = found.span
        at = (first,) if held.ndim == 1 else (first, _column(held[first], right[first]))
        rows = f"rows {first} to {last - 1}" if (first, last) != (0, len(held)) else "all rows"
        wrong = np.flatnonzero(found.rows)
        if len(wrong) < last - first:
            rows = f"{len(wrong)} of the {rows if rows != 'all rows' else f'{len(held)} rows'}"
        size = self.config.head_dim
        if place.role.removeprefix("bias_") in ("q", "k", "v"):
            heads = sorted({int(row) // size for row in wrong})
            if len(heads) < len(held) // size:
                rows += f" (heads {', '.join(map(str, heads))})"
        infinite = int((~np.isfinite(held.astype(np.float32))).sum())
        not_finite = f", {infinite} not finite" if infinite else ""
        return (
            f"{found.outside} of {found.values} values{not_finite}, {rows}; the first, {list(at)}, "
            f"is {float(held[at]):.6g}, not {float(right[at]):.6g}"
        )


def _fits(held: np.ndarray, wrong: np.ndarray) -> bool:
    return held.shape == wrong.shape and residual(held, wrong).fits


def _column(held: np.ndarray, right: np.ndarray) -> int:
    """The first element of a row that differs."""
    return int(np.flatnonzero(residual(held, right).rows)[0])


def _kind(place: _Place) -> str:
    """The tensor's name without its layer's number."""
    return ".".join(part for part in place.name.split(".") if not part.isdigit())


def _orders(
    parts: Mapping[str, np.ndarray], config: ModelConfig
) -> Iterator[tuple[str, np.ndarray]]:
    """Other ways to fuse tensors by rows: any order, interleaved by key/value head or row, and what
    is left of the right order where it was taken to be interleaved so.
    """
    right = tuple(parts)
    for order in itertools.permutations(parts):
        if order != right:
            yield ", ".join(order), np.concatenate([parts[name] for name in order])
    arrays = list(parts.values())
    groups = config.num_kv_heads if len(arrays) == 3 else len(arrays[0])
    split = [x.reshape(groups, -1, *x.shape[1:]) for x in arrays]
    what = "key/value head" if len(arrays) == 3 else "row"
    if groups > 1:
        inner, each = arrays[0].shape[1:], f"{', '.join(right)} for each {what}"
        yield each, np.concatenate(split, axis=1).reshape(-1, *inner)
        ends = np.cumsum([x.shape[1] for x in split])
        fused = np.concatenate(arrays).reshape(groups, ends[-1], *inner)
        apart = np.split(fused, ends[:-1], axis=1)
        yield (
            f"as if {each} had been stored",
            np.concatenate([x.reshape(-1, *inner) for x in apart]),
        )
