"""report.json: everything the report says, for programs. NaN and infinities are text."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from qwen_jax.accuracy.report.contents import Report, values
from qwen_jax.accuracy.tensors.faults.fault import Fault

VERSION = 1

# Of every token or head, which only the pictures need.
_LEFT_OUT = ("scores", "by_head")


def to_json(report: Report) -> str:
    """One object: `version`, `metrics` (as gates know them), and the report's parts by name."""
    parts = {"version": VERSION, "metrics": values(report)} | fields(report)
    return json.dumps(plain(parts), indent=1, allow_nan=False) + "\n"


def fields(x: Any) -> dict[str, Any]:
    return {f.name: getattr(x, f.name) for f in dataclasses.fields(x) if f.name not in _LEFT_OUT}


def plain(x: Any) -> Any:
    """Only what JSON has; four digits of arrays, a few properties beside the fields they sum up."""
    if isinstance(x, Fault):
        return {"name": x.name, "area": x.area, "line": x.line, "report": x.report}
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        held = fields(x)
        for name in ("verdict", "name", "first", "faulty", "within", "failed"):
            if isinstance(found := getattr(x, name, None), str | bool) or name == "first":
                held |= {} if found is None else {name: found}
        return plain(held)
    if isinstance(x, Mapping):
        return {str(name): plain(value) for name, value in x.items()}
    if isinstance(x, np.ndarray):
        return [plain(float(f"{value:.4g}")) for value in x.ravel()]
    if isinstance(x, list | tuple):
        return [plain(value) for value in x]
    if isinstance(x, np.generic):
        x = x.item()
    if isinstance(x, float) and not math.isfinite(x):
        return str(x)
    return x
