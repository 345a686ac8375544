"""Limits of the architectures, and how many programs of a kernel one streaming multiprocessor holds."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
REGISTERS = 65536  # of one streaming multiprocessor, 32 bits each


@dataclass(frozen=True)
class Architecture:
    """Per streaming multiprocessor, and how many of them the common part has."""

    warps: int
    shared_bytes: int
    shared_bytes_per_program: int
    programs: int
    processors: int
    part: str


ARCHITECTURES = {
    80: Architecture(64, 164 * KIB, 163 * KIB, 32, 108, "A100"),
    86: Architecture(48, 100 * KIB, 99 * KIB, 16, 84, "RTX 3090"),
    89: Architecture(48, 100 * KIB, 99 * KIB, 24, 128, "RTX 4090"),
    90: Architecture(64, 228 * KIB, 227 * KIB, 32, 132, "H100"),
    100: Architecture(64, 228 * KIB, 227 * KIB, 32, 148, "B200"),
    120: Architecture(48, 100 * KIB, 99 * KIB, 24, 170, "RTX 5090"),
}


def occupancy(arch: int, registers: int, warps: int, shared_bytes: int) -> tuple[int, str]:
    """Programs that one multiprocessor holds at a time, and what limits them."""
    limits = ARCHITECTURES[arch]
    per_warp = -(-max(registers, 1) * 32 // 256) * 256  # registers are given out in 256s
    per_quarter = REGISTERS // 4 // per_warp  # a multiprocessor is four quarters of one scheduler each
    shared = -(-(shared_bytes + KIB) // 128) * 128  # 1 KiB of each program's is the system's
    return min(
        (per_quarter * 4 // warps, "registers"),
        (limits.shared_bytes // shared, "shared memory"),
        (limits.warps // warps, "warps"),
        (limits.programs, "programs"),
    )
