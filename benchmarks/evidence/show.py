"""The records as tables for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.evidence.moved import OURS
from benchmarks.evidence.published import PUBLISHED

Record = dict[str, Any]
KIB, MIB = 1024, 2**20


def show(records: list[Record], console: Console) -> None:
    good = [record for record in records if "failed" not in record]
    by_part = {part: [r for r in good if r["part"] == part] for part in ("numbers", "compilation", "traffic")}
    for part, table in (("numbers", _numbers), ("compilation", _compilation), ("traffic", _traffic)):
        if by_part[part]:
            console.print(table(by_part[part]))


def _table(title: str, *columns: str, left: int = 1) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right")
    return table


def _numbers(records: list[Record]) -> Table:
    table = _table(
        "Numbers, in the interpreter: the error over what is allowed (twice eager's in the same dtype, against float64)",
        "case", "compared", "float32", "bfloat16", "float16", "faults",
    )  # fmt: skip
    for name in dict.fromkeys(r["case"] for r in records):
        mine = [r for r in records if r["case"] == name]
        worst = []
        for dtype in ("float32", "bfloat16", "float16"):
            overs = [r["error_over_budget"] for r in mine if r["dtype"] == dtype]
            known = [over for over in overs if over is not None]
            worst.append(f"{max(known):.2f}" if known else "failed" if overs else "")
        table.add_row(name, str(len(mine)), *worst, str(sum(len(r["faults"]) for r in mine)))
    return table


def _compilation(records: list[Record]) -> Table:
    table = _table(
        "Machine code (ptxas, bf16, real sizes; occupancy and bytes in flight are estimates from it)",
        "kernel", "for", "sm", "warps", "registers", "spilled", "shared KiB", "programs", "occupancy",
        "KiB in flight", "loads by 16 B", "tensor cores", "compiled s",
        left=2,
    )  # fmt: skip
    before = None
    for r in sorted((r for r in records if "name" in r), key=lambda r: (r["case"], r["name"], r["inputs"], r["arch"])):
        told = (r["name"], r["inputs"])
        table.add_row(
            *(("", "") if told == before else told), str(r["arch"]), str(r["warps"]), str(r["registers"]),
            f"{r['spill_stored']}/{r['spill_loaded']}", f"{r['shared'] / KIB:.0f}",
            f"{r['programs']} ({r['limited_by']})", f"{r['occupancy']:.2f}",
            "by TMA" if r["in_flight"] is None else f"{r['in_flight'] / KIB:.0f}", f"{r['wide_loads']:.0%}",
            " ".join(f"{k} {v}" for k, v in r["tensor_cores"].items()),
            "" if r["compile_s"] is None else f"{r['compile_s']:.1f}",
        )  # fmt: skip
        before = told
    return table


def _traffic(records: list[Record]) -> Table:
    table = _table(
        "Traffic, in the interpreter, bf16: bytes moved over the floor (each input and output once, no cache but a GEMM's)",
        "case", "of", "forward", "backward", "together", "launches", "host syncs", "multiply-adds", "saved new MiB",
        "extra peak MiB", "gradient error", "note",
        left=2,
    )  # fmt: skip
    for name in dict.fromkeys(r["case"] for r in records):
        for r in (r for r in records if r["case"] == name):
            title = f"{name}, {r['inputs']}" if r["provider"] == OURS else ""
            if "absent" in r:
                table.add_row(title, r["provider"], *[""] * 9, r["absent"][:60])
            else:
                note = f"{r['by_tile']:.2f} with what GEMM tiles read" if r["by_tile"] > r["together"] else ""
                table.add_row(title, r["provider"], *_traffic_cells(r), note)
        for peer in PUBLISHED.get(name, ("", []))[1]:
            table.add_row(
                "", f"{peer.name} *", f"{peer.forward:.2f}", f"{peer.backward:.2f}", f"{peer.together:.2f}",
                f"{peer.launches[0]} + {peer.launches[1]}", str(peer.host_syncs), "", f"{peer.saved_new_mib:.2f}", "", "",
                peer.note,
            )  # fmt: skip
        table.add_section()
    table.caption = "* counted earlier with the same meter on the same shape: benchmarks/evidence/published.py"
    return table


def _traffic_cells(r: Record) -> list[str]:
    ratio = lambda value: "" if value is None else f"{value:.2f}"  # noqa: E731
    error = r["gradient_error"]
    return [
        ratio(r["forward"]), ratio(r["backward"]), ratio(r["together"]), f"{r['launches'][0]} + {r['launches'][1]}",
        str(r["host_syncs"]), ratio(r["flops"]), f"{r['saved_new'] / MIB:.2f}",
        " + ".join(f"{peak / MIB:.2f}" for peak in r["peak_extra"]), "" if error is None else f"{error:.1e}",
    ]  # fmt: skip
