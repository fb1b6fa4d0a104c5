"""All that decides a compiled program, as a text: equal texts, equal programs."""

import dataclasses
import functools
import hashlib
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jaxlib

import pallas_kernels
import qwen_jax

_NOT_ABOUT_PROGRAMS = ("jax_compilation_cache_", "jax_persistent_cache_")


class Unnamed(Exception):
    """A value whose text differs from process to process."""


def described(value: Any) -> str:
    """A static argument's text. Of a dataclass only what its equality looks at.

    Raises:
        Unnamed: it has none.
    """
    if dataclasses.is_dataclass(value):
        fields = (field.name for field in dataclasses.fields(value) if field.compare)
        inner = ", ".join(f"{name}={described(getattr(value, name))}" for name in fields)
        return f"{type(value).__qualname__}({inner})"
    if isinstance(value, tuple):
        return f"{type(value).__qualname__}({', '.join(map(described, value))})"
    if " at 0x" in (text := repr(value)):
        raise Unnamed(text)
    return text


def tree(structure: Any) -> str:
    """A pytree's structure, with the static parts of its nodes.

    Raises:
        Unnamed: one of these has no text.
    """
    if (data := structure.node_data()) is None:
        return "*"
    kind, static = data
    inner = ", ".join(map(tree, structure.children()))
    return f"{kind.__qualname__}[{described(static)}]({inner})"


def shapes(leaves: Iterable[Any]) -> str:
    """Shapes and dtypes of arrays."""
    return ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves)


def surroundings(device: jax.Device) -> str:
    """Versions, settings, the machine and our own sources."""
    settings = {
        name: value
        for name, value in jax.config.values.items()
        if not name.startswith(_NOT_ABOUT_PROGRAMS)
    }
    return "\n".join(
        [
            f"jax {jax.__version__}, jaxlib {jaxlib.__version__}, {device.client.platform_version}",
            f"{_machine(device)}, XLA_FLAGS={os.environ.get('XLA_FLAGS', '')}",
            repr(sorted(settings.items())),
            _sources(),
        ]
    )


def _machine(device: jax.Device) -> str:
    capability, cores = (getattr(device, x, None) for x in ("compute_capability", "core_count"))
    kind = f"{device.platform}, {device.device_kind}, {capability}, {cores}"
    if device.platform != "cpu":
        return kind
    # Machine code for one CPU ends a process on another, and a home may be shared.
    features = [platform.machine(), str(os.cpu_count())]
    if (info := Path("/proc/cpuinfo")).exists():
        first, _, _ = info.read_text().partition("\n\n")
        wanted = ("model name", "flags", "Features")
        features += [line for line in first.splitlines() if line.startswith(wanted)]
    return f"{kind}, {features}"


@functools.cache
def _sources() -> str:
    """Of their contents, not their times, which installers set as they like; it takes 10 ms."""
    digest = hashlib.sha256()
    for package in (qwen_jax, pallas_kernels):
        root = Path(next(iter(package.__path__)))
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
