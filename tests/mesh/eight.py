"""How a CPU plays eight devices, and what compiled programs have devices exchange."""

import collections
import re

FLAG = "--xla_force_host_platform_device_count=8"

_COLLECTIVES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"


def collectives(text: str) -> dict[str, int]:
    """How many of each there are in a compiled program's text."""
    return collections.Counter(re.findall(rf" ({_COLLECTIVES})(?:-start)?\(", text))
