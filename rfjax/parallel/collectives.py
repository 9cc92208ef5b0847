"""What passes between devices in a compiled program, read off its HLO.

Bytes are those that each device sends in rings, the algorithms of NCCL and of a TPU's torus for large arrays.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

_KINDS = ("all-gather", "all-reduce", "all-to-all", "reduce-scatter", "collective-permute", "collective-broadcast")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(_KINDS)})(-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+)(\d+)?\w*\[([\d,]*)\]")
_GROUPS = re.compile(
    r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\]|mesh\[([^\]]*)\](?:, device_ids=[^{]*)? \{([^}]*)\})"
)
_AXIS = re.compile(r"'(\w+)'(?:=(\d+)|:\(\d+\)(\d+))?")
_CALLED = re.compile(r"\b(?:to_apply|calls|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation of a program."""

    kind: str
    """As HLO names it, such as `all-to-all`."""
    size: int
    """Bytes of its result on a device."""
    devices: int
    """That take part in one."""
    times: int
    """How often it runs in a call of the program."""

    @property
    def sent(self) -> int:
        """Bytes that a device sends in a call of the program."""
        others = self.devices - 1
        if self.kind == "reduce-scatter":
            each = self.size * others
        elif self.kind == "collective-permute":
            each = self.size
        else:
            each = self.size * others // self.devices * (2 if self.kind == "all-reduce" else 1)
        return each * self.times


def collectives(compiled: Any) -> list[Collective]:
    """Return the collective operations of a compiled program, those in loops with how often they run.

    Of the branches of a conditional all are counted; a loop whose length the compiler does not know counts once.

    Args:
        compiled: as `jax.jit(f).lower(...).compile()` returns it.
    """
    computations, entry = _computations(compiled.as_text())
    return [found for found in _of(computations, entry, 1) if found.devices > 1]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            lines = computations[start[2]] = []
            entry = start[2] if start[1] else entry
        else:
            lines.append(line)
    return computations, entry


def _of(computations: dict[str, list[str]], name: str, times: int) -> Iterator[Collective]:
    for line in computations[name]:
        if found := _COLLECTIVE.search(line):
            yield Collective(found[2], _bytes(found[1], bool(found[3])), _devices(line), times)
            continue  # what an all-reduce applies holds none
        trips = _TRIPS.search(line)
        called = _CALLED.findall(line)
        for branches in _BRANCHES.findall(line):
            called += [branch.strip().lstrip("%") for branch in branches.split(",")]
        for each in called:
            yield from _of(computations, each, times * int(trips[1]) if trips else times)


def _bytes(shapes: str, started: bool) -> int:
    """Bytes of arrays; what starts an operation also names its operands, which count half then."""
    sizes = [
        (int(bits or 8) if kind != "pred" else 8) * int(np.prod([int(n) for n in dims.split(",") if n], dtype=np.int64))
        for kind, bits, dims in _SHAPE.findall(shapes)
    ]
    return (max(sizes) if started else sum(sizes)) // 8


def _devices(line: str) -> int:
    """Return how many devices a group has, in any notation: a list, rows and columns, or axes of a mesh."""
    if "source_target_pairs" in line:
        return 2
    found = _GROUPS.search(line)
    if found is None:
        raise ValueError(f"no groups of devices in {line.strip()[:200]}")
    listed, columns, mesh, axes = found.groups()
    if listed is not None:
        return listed.count(",") + 1
    if columns is not None:
        return int(columns)
    sizes = {name: int(size) for name, size, _ in _AXIS.findall(mesh)}
    return math.prod(int(part) if part else sizes[name] for name, _, part in _AXIS.findall(axes))
