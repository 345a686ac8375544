"""cross_entropy over logits that a caller already has: each is read once forward and once backward, nothing is changed.

Who knows the loss's incoming gradient beforehand calls cross_entropy_and_gradient: up to 32k classes logits are read once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpt.ops._library import Cost, nbytes, register
from fastpt.ops.token_stats import row_statistics

REDUCTIONS = ("mean", "sum", "none")
SCHEMA = (
    "Tensor logits, Tensor targets, Tensor? class_weight, int ignore_index, float? softcap, float logit_scale, "
    "float label_smoothing, float z_loss, str reduction"
)


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _scaled(logits: Tensor, softcap: float | None, logit_scale: float) -> Tensor:
    z = logits.to(_wide(logits)) * logit_scale
    return z if softcap is None else (z / softcap).tanh_().mul_(softcap)


def _weights(logits: Tensor, targets: Tensor, class_weight: Tensor | None, ignore_index: int):
    """Targets with 0 where ignored, the weight of every row (0 where ignored), the mean class weight."""
    kept = targets != ignore_index
    targets = torch.where(kept, targets, 0)
    wrong = (targets < 0) | (targets >= logits.shape[1])
    if logits.device.type == "cpu" and wrong.any():  # elsewhere looking would cost a sync
        row = int(wrong.nonzero()[0])
        raise RuntimeError(
            f"cross_entropy: target {int(targets[row])} of row {row} is not in [0, {logits.shape[1]}), "
            f"nor the ignore_index {ignore_index}"
        )
    if class_weight is None:
        return targets, kept.to(_wide(logits)), 1.0
    return targets, torch.where(kept, class_weight.to(_wide(logits))[targets], 0), class_weight.to(_wide(logits)).mean()


def reference(logits, targets, class_weight, ignore_index, softcap, logit_scale, label_smoothing, z_loss, reduction):
    """The definition: loss [] or [T], and what the backward needs: max and log of the sum of e^(z - max) [T], share []."""
    z = _scaled(logits, softcap, logit_scale)
    kept = targets != ignore_index
    y, w, mean_weight = _weights(logits, targets, class_weight, ignore_index)
    if z.shape[1] == 0 or len(z) == 0:
        zeros = z.new_zeros(len(z))
        return zeros if reduction == "none" else zeros.sum(), zeros.clone(), zeros.clone(), z.new_zeros(())
    logprob, _, max_logit, log_sum, mean_logit, _ = row_statistics(z, y, class_weight)
    lse = max_logit + log_sum
    loss = (label_smoothing - 1) * w * logprob + torch.where(kept, z_loss * lse**2, 0)
    if label_smoothing > 0:  # only then, for a mean with -inf in it
        loss = loss + torch.where(kept, label_smoothing * (mean_weight * lse - mean_logit), 0)
    loss = torch.where(kept, loss, 0)  # 0 times an infinite logprob is NaN
    total = w.sum()
    share = torch.where(total > 0, 1 / total, 0) if reduction == "mean" else torch.ones_like(total)
    if reduction != "none":
        loss = (loss.sum(dtype=torch.float64) * share).to(loss.dtype)
    return loss, max_logit, log_sum, share


def reference_backward(
    grad, max_logit, log_sum, share, logits, targets, class_weight, ignore_index, softcap, logit_scale, label_smoothing,
    z_loss, reduction,
):  # fmt: skip
    z = _scaled(logits, softcap, logit_scale)
    kept = targets != ignore_index
    y, w, mean_weight = _weights(logits, targets, class_weight, ignore_index)
    factor = torch.where(kept, grad * share, 0)[:, None]
    of_p = (1 - label_smoothing) * w + label_smoothing * mean_weight + 2 * z_loss * (max_logit + log_sum)
    dz = (z - max_logit[:, None]).sub_(log_sum[:, None]).exp_().mul_(of_p[:, None])
    if label_smoothing > 0:
        dz -= label_smoothing / z.shape[1] * (1.0 if class_weight is None else class_weight.to(z.dtype))
    dz.scatter_add_(1, y[:, None], (label_smoothing - 1) * w[:, None])
    if softcap is not None:
        dz *= 1 - (z / softcap) ** 2
    return (dz * factor * logit_scale).to(logits.dtype)


def reference_and_gradient(
    scale,
    logits,
    targets,
    class_weight,
    ignore_index,
    softcap,
    logit_scale,
    label_smoothing,
    z_loss,
    reduction,
    gradient,
):
    options = targets, class_weight, ignore_index, softcap, logit_scale, label_smoothing, z_loss, reduction
    loss, max_logit, log_sum, share = reference(logits, *options)
    gradient.copy_(reference_backward(scale, max_logit, log_sum, share, logits, *options))
    return loss


def _fake(logits, targets, *options):
    def empty(*shape):
        return logits.new_empty(shape, dtype=_wide(logits))

    rows = len(logits)
    return empty(*([rows] if options[-1] == "none" else [])), empty(rows), empty(rows), empty()


def _fake_and_gradient(scale, logits, targets, *options):
    return _fake(logits, targets, *options[:-1])[0]


def _cost(logits, targets, *options):
    return Cost(nbytes(logits, targets), nbytes(*_fake(logits, targets, *options)), 4 * logits.numel())


def _cost_backward(grad, max_logit, log_sum, share, logits, targets, *_):
    reads = nbytes(grad, max_logit, log_sum, share, logits, targets)
    return Cost(reads, nbytes(logits), 4 * logits.numel())


def _cost_and_gradient(scale, logits, targets, *options):
    loss = _fake(logits, targets, *options[:-1])[0]
    return Cost(nbytes(scale, logits, targets), nbytes(loss, logits), 8 * logits.numel())


_forward = register(
    f"cross_entropy({SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    cost=_cost,
    triton="fastpt.kernels.cross_entropy:forward",
)
_backward = register(
    f"cross_entropy_backward(Tensor grad, Tensor max_logit, Tensor log_sum, Tensor share, {SCHEMA}) -> Tensor",
    reference=reference_backward,
    fake=lambda grad, max_logit, log_sum, share, logits, *_: logits.new_empty(logits.shape),
    cost=_cost_backward,
    triton="fastpt.kernels.cross_entropy:backward",
)
_and_gradient = register(
    f"cross_entropy_and_gradient(Tensor scale, {SCHEMA}, Tensor(a!) gradient) -> Tensor",
    reference=reference_and_gradient,
    fake=_fake_and_gradient,
    cost=_cost_and_gradient,
    triton="fastpt.kernels.cross_entropy:forward_and_gradient",
)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, class_weight, *options):
        loss, *saved = _forward(logits, targets, class_weight, *options)
        ctx.save_for_backward(*saved, logits, targets, class_weight)
        ctx.options = options
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return (_backward(grad, *ctx.saved_tensors, *ctx.options), *[None] * (2 + len(ctx.options)))


def _check(name: str, logits: Tensor, targets: Tensor, class_weight: Tensor | None, reduction: str) -> None:
    if logits.dim() != 2 or targets.shape != logits.shape[:1] or targets.dtype != torch.int64:
        raise RuntimeError(
            f"{name}: logits is {tuple(logits.shape)}, targets is {tuple(targets.shape)} {targets.dtype}; "
            "they must be [T, V] and [T] of torch.int64"
        )
    if class_weight is not None and class_weight.shape != logits.shape[1:]:
        raise RuntimeError(f"{name}: class_weight is {tuple(class_weight.shape)}; it must be [{logits.shape[1]}]")
    if reduction not in REDUCTIONS:
        raise RuntimeError(f'{name}: reduction is {reduction!r}; it must be "mean", "sum" or "none"')


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    class_weight: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of logits against targets, as F.cross_entropy, in float32 whatever the logits are.

    Shapes: logits [T, V], targets int64 [T], class_weight [V] -> [] or, for reduction="none", [T] (0 where the target is
    `ignore_index`). z_loss * logsumexp² is added per row, of logits softcap * tanh(logit_scale * logits / softcap).
    The mean is over rows with a target, or over their class weights; of none it is 0.
    Numerics: float32 loss; the gradient is formed in float32 and rounded once. Differentiable once.
    Raises: RuntimeError when shapes, dtypes or the reduction do not fit.
    """
    _check("cross_entropy", logits, targets, class_weight, reduction)
    options = ignore_index, softcap, logit_scale, label_smoothing, z_loss, reduction
    return _CrossEntropy.apply(logits, targets, class_weight, *options)


def cross_entropy_and_gradient(
    logits: Tensor,
    targets: Tensor,
    scale: Tensor,
    *,
    out: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    class_weight: Tensor | None = None,
) -> Tensor:
    """The loss of cross_entropy, and in `out` its gradient by the logits times `scale`: for `logits.backward(out)`.

    Shapes: as cross_entropy; scale float32 [] or, for reduction="none", [T]; out like logits, and may be the logits
    themselves where nothing else needs them. Not differentiable: it is the derivative.
    Numerics, Raises: as cross_entropy.
    """
    _check("cross_entropy_and_gradient", logits, targets, class_weight, reduction)
    if out.shape != logits.shape or out.dtype != logits.dtype:
        raise RuntimeError(
            f"cross_entropy_and_gradient: out is {tuple(out.shape)} {out.dtype}, logits is {tuple(logits.shape)} "
            f"{logits.dtype}; they must be equal"
        )
    options = ignore_index, softcap, logit_scale, label_smoothing, z_loss, reduction
    with torch.no_grad():
        return _and_gradient(scale, logits.detach(), targets, class_weight, *options, out)
