"""Machine code as nvdisasm prints it: instruction mix, loops, widths of accesses, loads in flight."""

from __future__ import annotations

import collections
import re
from dataclasses import dataclass
from typing import NamedTuple

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;?\s*$")
_LABEL = re.compile(r"^(\.L_x_\d+|\.L_\d+):")
_TARGET = re.compile(r"(\.L_x_\d+|\.L_\d+)")
_REGISTER = re.compile(r"\bR(\d+)(\.64)?\b")

WIDTHS = ((".256", 32), (".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".U8", 1), (".S8", 1))
MEMORY = {"LDG", "STG", "LDL", "STL", "LDS", "STS", "LDGSTS"}
TENSOR_CORES = {
    "HMMA", "HGMMA", "QGMMA", "IMMA", "IGMMA", "QMMA", "OMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA",
}  # fmt: skip
DOUBLE = {"DADD", "DMUL", "DFMA", "DSETP", "DMNMX"}


class Instruction(NamedTuple):
    address: int
    opcode: str  # with its modifiers: LDG.E.128
    operands: str
    is_predicated: bool = False

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def bytes(self) -> int:
        return next((width for mark, width in WIDTHS if mark in self.opcode), 4)


@dataclass(frozen=True)
class Code:
    """One kernel."""

    instructions: list[Instruction]
    loops: list[tuple[int, int]]  # addresses of the first and last instruction of each innermost loop

    def count(self, *bases: str) -> int:
        return sum(i.base in bases for i in self.instructions)

    def widths(self, *bases: str) -> dict[int, int]:
        """How many accesses of each width in bytes."""
        return dict(sorted(collections.Counter(i.bytes for i in self.instructions if i.base in bases).items()))

    @property
    def spilled_bytes(self) -> tuple[int, int]:
        """Stored to and loaded from local memory."""
        stored, loaded = (sum(i.bytes for i in self.instructions if i.base == base) for base in ("STL", "LDL"))
        return stored, loaded

    @property
    def double_precision(self) -> int:
        return sum(i.base in DOUBLE or "F64" in i.opcode for i in self.instructions)

    @property
    def tensor_cores(self) -> dict[str, int]:
        return dict(collections.Counter(i.base for i in self.instructions if i.base in TENSOR_CORES))

    @property
    def calls_in_loops(self) -> int:
        """Of functions. A predicated CALL is ptxas's own way into a slow path (a division's, a barrier's), seldom taken."""
        calls = [i for i in self.instructions if i.base == "CALL" and not i.is_predicated]
        return sum(any(first <= i.address <= last for first, last in self.loops) for i in calls)

    @property
    def in_flight_bytes(self) -> int:
        """Of one thread: the most bytes of loads whose result no instruction has read yet, in program order, and what the
        prologue of a software-pipelined loop has under way through the loop. Loads by TMA are not modelled."""
        return _most_pending(self.instructions) + self._prefetched_bytes()

    def _prefetched_bytes(self) -> int:
        async_copies = [i for i in self.instructions if i.base == "LDGSTS"]
        in_loop = [[i for i in async_copies if first <= i.address <= last] for first, last in self.loops]
        before = sum(i.bytes for i in async_copies) - sum(i.bytes for loop in in_loop for i in loop)
        return before // max(1, sum(map(bool, in_loop)))  # two pipelined loops do not run at once


def parse(text: str) -> Code:
    """Of `nvdisasm -c`."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            waiting.append(label.group(1))
        elif found := _LINE.match(line):
            address = int(found.group(1), 16)
            labels.update(dict.fromkeys(waiting, address))
            waiting = []
            instructions.append(Instruction(address, found.group(3), found.group(4), bool(found.group(2))))
    loops = []
    for i in instructions:
        target = _TARGET.search(i.operands) if i.base == "BRA" else None
        if target and labels.get(target.group(1), i.address) < i.address:
            loops.append((labels[target.group(1)], i.address))
    inner = [a for a in loops if not any(a[0] <= b[0] and b[1] <= a[1] and a != b for b in loops)]
    return Code(instructions, sorted(set(inner)))


def _most_pending(instructions: list[Instruction]) -> int:
    pending: dict[int, tuple[range, int]] = {}  # by first register of the result
    most = 0
    for i in instructions:
        used = {
            n for r in _REGISTER.finditer(i.operands) for n in (int(r.group(1)), int(r.group(1)) + bool(r.group(2)))
        }
        result = None
        if i.base == "LDG":
            found = _REGISTER.search(i.operands)
            result = int(found.group(1)) if found else None
            used.discard(result)
        for first in [first for first, (registers, _) in pending.items() if any(r in registers for r in used)]:
            del pending[first]
        if result is not None:
            pending[result] = range(result, result + max(1, i.bytes // 4)), i.bytes
            most = max(most, sum(size for _, size in pending.values()))
    return most
