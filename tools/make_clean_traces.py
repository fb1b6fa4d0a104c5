"""Writes tests/golden/clean/*.gz: what transformers and llama.cpp compute of tiny random models.

    pip install '.[test,hf,llamacpp]'
    python -m tools.make_clean_traces

The tests that read them (tests/accuracy/test_clean_engines.py) need neither library.
"""

import gzip
import tempfile
from pathlib import Path

from absl import app, logging

from tests.accuracy.clean_engines import GOLDEN, LLAMACPP, TRANSFORMERS


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"no arguments are taken, but got {' '.join(argv[1:])}")
    GOLDEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for clean in (*TRANSFORMERS, *LLAMACPP):
            trace, file = clean.run(clean.checkpoint(folder)), folder / "trace"
            trace.save(file)
            path = GOLDEN / f"{clean.name}.gz"
            path.write_bytes(gzip.compress(file.read_bytes(), mtime=0))
            logging.info("%s: %d bytes", path, path.stat().st_size)


if __name__ == "__main__":
    app.run(main)
