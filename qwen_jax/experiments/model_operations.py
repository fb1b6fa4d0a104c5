"""Which operation of the model XLA's operations belong to, by the named scopes they were traced in.

XLA fuses and renames: `fusion.26` says nothing. Its compiled programs say of most instructions from
which scopes they come (`op_name`). Of one that doesn't, as products that a library takes over, they
are those of what it calls, of who uses it, or of what it uses.
"""

import collections
import re
from collections.abc import Iterator, Mapping, Set

import jax

ELSEWHERE = "other"
"""Of what stands in no named scope, such as sums of the residual stream."""

_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = (.*)")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_SCOPES = re.compile(r'op_name="([^"]*)"')
_SCOPE = re.compile("[a-z][a-z0-9_]*")
_STRUCTURE = {"while", "body", "cond", "closed_call", "pjit", "shard_map", "checkpoint"}
"""Names in a path that JAX's own transformations put there."""


def operation(path: str) -> str:
    """The outermost named scope of an instruction's `op_name`; "" where it stands in none."""
    for one in path.split(";"):  # of several that became one
        *scopes, _ = one.split("/")  # The last is JAX's primitive.
        for scope in scopes:
            if _SCOPE.fullmatch(scope) and scope not in _STRUCTURE and "branch_" not in scope:
                return scope
    return ""


class _Program:
    """A compiled program's instructions, from HLO as text."""

    def __init__(self, text: str) -> None:
        self.scope: dict[str, str] = {}
        self.products: set[str] = set()
        self.uses: dict[str, list[str]] = {}
        self.users: dict[str, list[str]] = collections.defaultdict(list)
        self.inside: dict[str, list[str]] = collections.defaultdict(list)
        computation = ""
        for line in text.splitlines():
            if found := _COMPUTATION.match(line):
                computation = found[1]
            elif found := _INSTRUCTION.match(line):
                self.inside[computation].append(found[1])
                self._read(*found.groups())

    def _read(self, name: str, rest: str) -> None:
        found = _SCOPES.search(rest)
        path = found[1] if found else ""
        self.scope[name] = operation(path)
        if path.endswith("dot_general"):
            self.products.add(name)
        self.uses[name] = re.findall(r"%([\w.-]+)", rest.partition(", metadata=")[0])
        for other in self.uses[name]:
            self.users[other].append(name)

    def operation(self, name: str) -> str:
        """Of a fusion that of its product, which takes the time, where it has one."""
        called = [one for other in self.uses[name] for one in self.inside.get(other, ())]
        products = [one for one in called if one in self.products]
        for around in (products, [name], called, self.users[name], self.uses[name]):
            found = collections.Counter(s for one in around if (s := self.scope.get(one, "")))
            if found:
                return found.most_common(1)[0][0]
        return ""


def operations(text: str) -> dict[str, str]:
    """Of every instruction of a compiled program (HLO as text) its operation, "" for none."""
    program = _Program(text)
    return {name: program.operation(name) for name in program.scope}


def of_programs(seen: Mapping[str, Set[str]]) -> dict[tuple[str, str], str]:
    """By a program's name and an instruction's its operation, of what is compiled in this process.

    Programs of several sizes have one name; those that ran are the fewest, and the smallest, that
    have all instructions which were seen.

    Args:
        seen: names of instructions by that of their program.
    """
    compiled: dict[str, list[dict[str, str]]] = collections.defaultdict(list)
    for program, text in _texts():
        if program in seen:
            compiled[program].append(operations(text))
    found: dict[tuple[str, str], str] = {}
    for program, held in compiled.items():
        left = set(seen[program])
        while held and left:
            best = max(held, key=lambda known: (len(left & known.keys()), -len(known)))
            if not (there := left & best.keys()):
                break
            found |= {(program, name): best[name] for name in there if best[name]}
            left -= there
    return found


def _texts() -> Iterator[tuple[str, str]]:
    for executable in jax.local_devices()[0].client.live_executables():
        for module in executable.hlo_modules():
            yield module.name, module.to_string()
