"""Tests of a mesh need devices: `tests/test_mesh.py` starts them with eight that a CPU plays."""

import os

from tests.mesh.eight import FLAG

collect_ignore_glob = [] if FLAG in os.environ.get("XLA_FLAGS", "") else ["test_*.py"]
