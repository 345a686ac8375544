"""What benchmarks.train_step can time: of each objective its peers, its works (rows that exist), how it is trained by default."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.classifiers import CLASSIFIERS
from benchmarks.online_peers import ONLINE_PEERS
from benchmarks.peers import PEERS, Peer
from benchmarks.preference_peers import PAIR_PEERS
from benchmarks.translators import TRANSLATORS


class Task(NamedTuple):
    """One objective; `works` says how many rows a step has, `peers` names those that take part unasked."""

    entries: dict[str, type[Peer]]
    works: dict[str, int]
    peers: str
    modes: tuple[str, ...] = ("lora",)  # the first is the default
    length: int = 512  # tokens a row, or of an answer, at most
    lr: dict[str, float] = {"lora": 2e-4, "qlora": 2e-4, "full": 2e-5}  # noqa: RUF012 (never written to)


TASKS = {
    "sft": Task(PEERS, {"packed": 4, "gsm8k": 8}, "fastpt,trl,trl+fuse,hf,hf-compile", ("lora", "qlora", "full")),
    "classify": Task(CLASSIFIERS, {"clinc150": 32}, ",".join(CLASSIFIERS), ("full",), lr={"full": 5e-5}),
    "dpo": Task(PAIR_PEERS, {"llmbar": 4}, ",".join(PAIR_PEERS), lr={"lora": 1e-4}),
    "seq2seq": Task(TRANSLATORS, {"multi30k": 64}, ",".join(TRANSLATORS), ("full",), 64, {"full": 5e-4}),
    "grpo": Task(ONLINE_PEERS, {"sums": 4}, ",".join(ONLINE_PEERS), length=64, lr={"lora": 1e-5}),
}
WORKS = {work: objective for objective, task in TASKS.items() for work in task.works}  # work -> its objective
