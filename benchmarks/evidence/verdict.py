"""Which bars the records miss, one sentence each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.evidence.case import Bars, Case
from benchmarks.evidence.moved import OURS

Record = dict[str, Any]
KIB = 1024
WIDE_LOADS = 0.9
IN_FLIGHT_KIB = {90: 32, 100: 64}  # about twice what latency times bandwidth asks for
ROUNDING = 0.005  # ratios are held against their bars as they are printed, with two decimals


def faults(records: list[Record], cases: list[Case]) -> list[str]:
    bars = {case.name: case.bars for case in cases}
    found = []
    for record in records:
        if "failed" in record:
            where = f" on sm_{record['arch']}" if "arch" in record else ""
            found.append(f"{record['case']}, {record['part']}{where}: {record['failed']}")
        elif record["part"] != "roofline":  # computed: nothing to hold it against
            missed = {"numbers": of_numbers, "compilation": of_compilation, "traffic": of_traffic}[record["part"]]
            found += missed(record, bars[record["case"]])
    return found


def of_numbers(record: Record, bars: Bars) -> Iterator[str]:
    for fault in record["faults"]:
        yield f"{record['case']}, {record['inputs']}, {record['dtype']}: {fault}"


def of_compilation(record: Record, bars: Bars) -> Iterator[str]:
    if "chosen" in record:
        return
    name, arch = record["name"], record["arch"]
    where = f"{name} on sm_{arch} ({record['inputs']})"
    if record["spill_stored"] or record["spill_loaded"]:
        yield f"{where}: spills {record['spill_stored']} bytes, reads {record['spill_loaded']} back"
    if record["programs"] == 0:
        yield f"{where}: does not fit ({record['limited_by']})"
    if record["double_precision"]:
        yield f"{where}: {record['double_precision']} instructions in double precision"
    if record["calls_in_loops"]:
        yield f"{where}: {record['calls_in_loops']} calls in loops"
    tensor_cores = record["tensor_cores"]
    if name in bars.tensor_cores + bars.small_dots and not tensor_cores:
        yield f"{where}: no tensor-core instruction"
    if name in bars.tensor_cores:
        if arch == 90 and tensor_cores and "HGMMA" not in tensor_cores:
            yield f"{where}: no HGMMA, only {tensor_cores}"
        return
    if name in bars.not_streaming or record["not_streaming"]:
        return
    if record["wide_loads"] < WIDE_LOADS:
        yield f"{where}: {record['wide_loads']:.0%} of loaded bytes by 16-byte accesses ({record['load_widths']})"
    least = max(IN_FLIGHT_KIB[arch], bars.in_flight_kib.get(name, 0)) if arch in IN_FLIGHT_KIB else 0
    if record["in_flight"] is not None and record["in_flight"] < least * KIB:
        yield f"{where}: {record['in_flight'] / KIB:.0f} KiB of loads in flight per processor, must be {least}"


def of_traffic(record: Record, bars: Bars) -> Iterator[str]:
    if record["provider"] != OURS:
        return
    name = record["case"]
    for what in ("forward", "backward", "together"):
        bar = getattr(bars, what)
        if bar is not None and record[what] is not None and record[what] > bar + ROUNDING:
            yield f"{name}: {what} moves {record[what]:.2f} of the floor, must be {bar:.2f}"
    for what, got, most in zip(("forward", "backward"), record["launches"], bars.launches or (), strict=False):
        if got > most:
            yield f"{name}: {got} launches {what}, must be {most}"
    if sum(record["triton_launches"]) == 0:
        yield f"{name}: no Triton kernel ran"
    if record["host_syncs"]:
        yield f"{name}: the host waits {record['host_syncs']} times"
    for kind, count in record["hazards"].items():
        yield f"{name}: {count} elements of kind {kind} in a race"
    for what, got, most in (
        ("multiply-adds over one forward product", record["flops"], bars.flops),
        ("new bytes saved for backward", record["saved_beyond"], bars.new_saved_bytes),
        ("error of the worst gradient", record["gradient_error"], bars.gradient_error),
    ):
        if most is not None and (got is None or got > most * (1 + 1e-9)):
            yield f"{name}: {what}: {got}, must be {most}"


def of_table(records: list[Record], entries: set[tuple[str, int, int]]) -> Iterator[str]:
    """Every entry of the launch table is chosen by a case, so that its kernel was compiled."""
    chosen = {tuple(entry) for record in records for entry in record.get("chosen", ())}
    for kernel, arch, limit in sorted(entries - chosen):
        yield f"launch table: no case reaches {kernel}, sm_{arch}, up to {limit}"
