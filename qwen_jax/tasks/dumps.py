"""What the tasks that judge dumps have in common."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from tqdm import tqdm

from qwen_jax.errors import UserError


def token_ids(text: str | None) -> list[int] | None:
    """Those of --tokens; raises UserError where it is no list of ids."""
    if text is None:
        return None
    try:
        ids = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"tokens is {text!r:.60}, but it must be like 2046,299,10.") from None
    if min(ids) < 0:
        raise UserError(f"tokens has {min(ids)}, but ids are 0 or more.")
    return ids


@contextlib.contextmanager
def bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """Progress on a terminal, from calls with things done and in all."""
    with tqdm(desc=name, leave=False, disable=not sys.stderr.isatty()) as shown:

        def progress(done: int, total: int) -> None:
            shown.total = total
            shown.update(done - shown.n)

        yield progress
