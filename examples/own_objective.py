"""An objective of your own is a plain object: here, answers count for more the longer they are not yet certain (focal loss).

python examples/own_objective.py --model .cache/smollm2 --data examples/support_tickets/train.jsonl
"""

from __future__ import annotations

import argparse
from typing import Any, Literal

from torch import Tensor

import fastpt
from fastpt.data.batches import Batch
from fastpt.objectives.base import Scorer
from fastpt.objectives.sft import SFT


class Focal(SFT):
    """(1 - p)^gamma * -log p per trained token (Lin et al. 2017, https://arxiv.org/abs/1708.02002); rows as for sft."""

    name: Literal["focal"] = "focal"  # type: ignore[assignment]
    gamma: float = 2.0

    def loss(self, model: Scorer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logprob = model.stats(model.hidden(batch), batch).logprob[batch.kept]
        plain = -logprob.detach().sum()
        return (-((1 - logprob.exp()) ** self.gamma) * logprob).sum(), {"cross_entropy": plain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=".cache/smollm2")
    parser.add_argument("--data", default="examples/support_tickets/train.jsonl")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", default="runs/own_objective")
    options = parser.parse_args()
    settings: dict[str, Any] = {"max_steps": options.steps, "output": options.output, "batch_tokens": 1024}
    run = fastpt.train(model=options.model, data=options.data, objective=Focal(gamma=2.0), **settings)
    print(run.metrics)


if __name__ == "__main__":
    main()
