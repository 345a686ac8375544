"""GELU and its slope for kernels: x * s(x) with a sigmoid-like s; each form costs one exponential, which the slope shares.

csrc/cpu/gelu.h has the same formulas; where it is exact, s comes without cancellation however far out x lies.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gelu(x, IS_TANH: tl.constexpr):
    """gelu(x) / x and gelu'(x), for float32 x."""
    if IS_TANH:  # (1 + tanh(u)) / 2 = sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x³)
        square = x * x
        e = tl.exp(-tl.abs(1.5957691216057308 * x * (1.0 + 0.044715 * square)))
        larger = 1.0 / (1.0 + e)
        smaller = e * larger
        s = tl.where(x < 0.0, smaller, larger)
        slope = s + x * larger * smaller * (1.5957691216057308 * (1.0 + 3 * 0.044715 * square))
    else:  # the normal distribution function: a fit of its tail, weighted to a relative error of 6e-8
        a = tl.abs(x)
        bell = tl.exp(-0.5 * a * a)
        t = 1.0 / (1.0 + 0.3 * a)
        p = 0.03842540085315704 * t - 0.16939479112625122
        p = p * t + 0.22913166880607605
        p = p * t - 0.07704470306634903
        p = p * t + 0.1429063081741333
        p = p * t + 0.09452608972787857
        p = p * t + 0.12196046113967896
        p = p * t + 0.11948209255933762
        tail = bell * (p * t + 7.495441423088778e-06)
        s = tl.where(x < 0.0, tail, 1.0 - tail)
        slope = s + x * (bell * 0.3989422804014327)
    return s, slope


def is_tanh(op: str, approximate: str) -> bool:
    if approximate not in ("tanh", "none"):
        raise RuntimeError(f"{op}: approximate is '{approximate}'; use 'tanh' or 'none'")
    return approximate == "tanh"
