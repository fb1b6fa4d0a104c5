"""Random bits of a token, from the row's seed, its step and the token alone.

Threefry-2x32 with 20 rounds (Salmon et al., 2011), the generator of `jax.random`: seed and step
are its key, half the token's id its counter, and the id's last bit says which of the two words is
the token's. A row's draw so knows nothing of its neighbours, its slot or the size of the batch.
The same lines serve arrays and the numbers of a thread.
"""

from typing import Any

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA


def threefry(seed: Any, step: Any, counter: Any) -> tuple[Any, Any]:
    """Two words for each counter; all are 32-bit integers that wrap."""
    keys = (seed, step, seed ^ step ^ PARITY)
    x, y = counter + seed, step
    for turn in range(5):
        for bits in ROTATIONS[turn % 2]:
            x = x + y
            y = ((y << bits) | (y >> (32 - bits))) ^ x
        x = x + keys[(turn + 1) % 3]
        y = y + keys[(turn + 2) % 3] + (turn + 1)
    return x, y
