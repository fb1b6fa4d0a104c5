"""On what an experiment runs: commit and uncommitted changes, versions, device, JAX's settings."""

import hashlib
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import jax

from qwen_jax.experiments.contents import ENVIRONMENTS
from qwen_jax.experiments.lines import write_atomically, written
from qwen_jax.reporting.origin import git, installed


def describe() -> dict[str, Any]:
    """Everything that may change a result, and is neither the config nor its inputs."""
    devices = jax.local_devices()
    return {
        "commit": git("rev-parse", "HEAD").strip() or None,
        "uncommitted": git("diff", "HEAD"),
        "untracked": git("ls-files", "--others", "--exclude-standard").splitlines(),
        "python": platform.python_version(),
        "packages": installed(),
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
