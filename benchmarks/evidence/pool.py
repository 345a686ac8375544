"""Worker processes for the parts of gpu_evidence: each takes the next task when it is done with one."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Task = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]


def run(tasks: list[Task], *, jobs: int, interpreted: bool, told: Callable[[Record], None]) -> list[Record]:
    """The records of all tasks; `told` hears of each as it comes. A worker that dies is a failed task, not the end."""
    waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
    for task in tasks:
        waiting.put(task)
    found: list[Record] = []
    lock = threading.Lock()

    def note(records: list[Record]) -> None:
        with lock:
            found.extend(records)
            for record in records:
                told(record)

    with tempfile.TemporaryDirectory() as cache:
        environment = _environment(interpreted, cache)
        threads = [
            threading.Thread(target=_serve, args=(waiting, environment, note)) for _ in range(min(jobs, len(tasks)))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return found


def _environment(interpreted: bool, cache: str) -> dict[str, str]:
    """A fresh cache: what was compiled before would take no time and tell nothing about it."""
    environment = {**os.environ, "TRITON_CACHE_DIR": cache, "TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    return environment | ({"TRITON_INTERPRET": "1"} if interpreted else {})


def _serve(waiting: queue.SimpleQueue, environment: dict[str, str], note: Callable[[list[Record]], None]) -> None:
    worker = None
    while True:
        try:
            task = waiting.get_nowait()
        except queue.Empty:
            break
        if worker is None:
            worker = _start(environment)
        answer = _ask(worker, task)
        if not answer:
            worker.wait()
            note([{**task, "failed": f"the process ended with status {worker.returncode}"}])
            worker = None
        else:
            note(json.loads(answer))
    if worker is not None:
        worker.communicate()


def _start(environment: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.evidence.worker"],
        cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def _ask(worker: subprocess.Popen, task: Task) -> str:
    try:
        worker.stdin.write(json.dumps(task) + "\n")
        worker.stdin.flush()
    except BrokenPipeError:
        return ""
    return worker.stdout.readline()
