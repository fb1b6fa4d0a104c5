"""On what an experiment runs: commit and uncommitted changes, versions, device, JAX's settings."""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from qwen_jax.experiments.contents import ENVIRONMENTS
from qwen_jax.experiments.lines import write_atomically, written
from qwen_jax.versions import version

PACKAGES = (
    *("qwen_jax", "jax", "jaxlib", "flax", "numpy", "gguf", "tokenizers", "ml_collections"),
    *("jax-cuda13-plugin", "jax-cuda12-plugin", "lm_eval"),
)
_ROOT = Path(__file__).parents[2]


def describe() -> dict[str, Any]:
    """Everything that may change a result, and is neither the config nor its inputs."""
    devices = jax.local_devices()
    return {
        "commit": _git("rev-parse", "HEAD").strip() or None,
        "uncommitted": _git("diff", "HEAD"),
        "untracked": _git("ls-files", "--others", "--exclude-standard").splitlines(),
        "python": platform.python_version(),
        "packages": _versions(),
        "platform": platform.platform(),
        "host": platform.node(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "device": devices[0].device_kind,
        "devices": len(devices),
        "driver": devices[0].client.platform_version,
        "process": jax.process_index(),
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("JAX_", "XLA_", "CUDA_VISIBLE", "OMP_"))
        },
    }


def save(directory: Path) -> str:
    """Writes the environment to `environments/` unless it is there; returns its name."""
    found = describe()
    text = json.dumps(found, indent=1, ensure_ascii=False)
    name = hashlib.sha256(text.encode()).hexdigest()[:8]
    folder = directory / ENVIRONMENTS
    with written(folder):
        folder.mkdir(exist_ok=True)
    if not (folder / f"{name}.json").exists():
        write_atomically(folder / f"{name}.json", text)
    return name


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git(*arguments: str) -> str:
    """What git says of the sources, or nothing where they are no working tree."""
    if not (_ROOT / ".git").exists():
        return ""
    try:
        done = subprocess.run(
            ["git", "-C", str(_ROOT), *arguments], capture_output=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf-8", "replace")
