"""One process of gpu_evidence: a task per line on stdin, a line of records per task on stdout.

Interpreted parts need TRITON_INTERPRET=1 in the environment, compilation needs its absence: gpu_evidence starts both kinds.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

import torch


def records(task: dict[str, Any]) -> list[dict[str, Any]]:
    if task["part"] == "roofline":
        from benchmarks.evidence import roofline

        return roofline.records(task)
    from benchmarks.evidence import calls, compiled, moved, numbers

    case = next(case for case in calls.cases_of(task["module"]) if case.name == task["case"])
    if task["part"] == "numbers":
        return numbers.records(case, task["quick"])
    if task["part"] == "traffic":
        return moved.records(case)
    return compiled.records(case, task["arch"], task["quick"])


def main() -> None:
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what kernels print does not mix with the records
    for line in sys.stdin:
        task = json.loads(line)
        try:
            answer = [{"part": task["part"], **record} for record in records(task)]
        except Exception as error:  # noqa: BLE001 (a kernel that fails is a finding, told with its place)
            place = traceback.extract_tb(error.__traceback__)[-1]
            message = f"{type(error).__name__}: {error} ({os.path.basename(place.filename)}:{place.lineno})"
            answer = [{**task, "failed": message[:600]}]
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
