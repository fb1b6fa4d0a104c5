"""`run.py certify`: a certificate of one engine's dump or of two, and its verification."""

import sys
import tempfile
from pathlib import Path

from qwen_jax import flag_fields, pins, regular_files, settings
from qwen_jax.accuracy.api import certify
from qwen_jax.accuracy.certificate.table import text
from qwen_jax.accuracy.certificate.verifying import other_versions, read, verify
from qwen_jax.errors import UserError
from qwen_jax.experiments.lines import write_atomically
from qwen_jax.settings import Command
from qwen_jax.tasks.dumps import bar, token_ids
from qwen_jax.terminal import visible

_UNREAD = ("sha256", "output", "compare.tokens", "dtype")
"""What a verification takes from the certificate."""


def run(command: Command) -> int:
    """Prints the verdict and writes the certificate; 1 where it is not "certified", or where a
    certificate to verify differs from what comes out."""
    dumps, config = command.arguments, command.config
    if len(dumps) > 2:
        raise UserError(f"{dumps[2]!r} is one too many; a certificate is of one dump or of two.")
    if config.certify.verify is not None:
        return _verify(command)
    if not dumps:
        raise UserError(
            "There is nothing to certify; name a trace, a dump or a log, or two, as in "
            "certify a.safetensors b.safetensors."
        )
    output = None if config.output is None else _to_be_written(Path(config.output))
    tokens = token_ids(config.compare.tokens)
    pins.pin_and_tell(config, pins.OF_RUN)
    with bar("replay") as progress:
        found = certify(
            *dumps,
            model=config.model,
            adapter=config.adapter,
            sha256=config.sha256,
            tokens=tokens,
            dtype=None if config.dtype == "auto" else config.dtype,
            progress=progress,
        )
    print(visible(text(found)), end="")
    if output:
        write_atomically(output, found.to_json())
        print(f"wrote {output}", file=sys.stderr)
    return int(not found.certified)


def _to_be_written(path: Path) -> Path:
    """A new file's path; raises UserError now where there can be none, and not after minutes."""
    if why := regular_files.why_taken(path, "certificate.json"):
        raise UserError(f"--output={path} {why}")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as error:
        why = regular_files.why_not_written(error)
        raise UserError(f"--output={path} can't be written: {why}") from None


def _verify(command: Command) -> int:
    config, path = command.config, command.config.certify.verify
    asked = settings.asked(config, command.overrides)
    for field in _UNREAD:
        if field in asked:
            raise UserError(
                f"--{flag_fields.FLAG_OF[field]} does nothing for --verify; leave it out."
            )
    pins.pin_and_tell(config, pins.OF_RUN)
    with bar("replay") as progress:
        changed = verify(
            path,
            command.arguments,
            model=config.model if "model" in asked else None,
            adapter=config.adapter if "adapter" in asked else None,
            progress=progress,
        )
    recorded = read(path)
    if others := other_versions(recorded):
        print(f"{path} was made with {others}", file=sys.stderr)
    if changed:
        print(visible(f"DIFFERS: {changed}."))
        return 1
    print(
        visible(
            f"VERIFIED: {path} is what its inputs give; its verdict is {recorded['verdict']!r}."
        )
    )
    return 0
