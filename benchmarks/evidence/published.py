"""The peers that do not install beside us: counted earlier with the same meter, on the same shapes.

Versions: Unsloth 2026.8.19, fla 0.5.2, flash-attn 2.8.4 (ops/triton), cut-cross-entropy 25.6.4, bitsandbytes 0.50.2.dev0,
Triton's tutorial 06, PEFT on eager PyTorch 2.13. "eager" is Hugging Face's own code. bf16, interpreter, no cache.
"""

from __future__ import annotations

from typing import NamedTuple


class Peer(NamedTuple):
    name: str
    forward: float  # bytes over the floor
    backward: float
    together: float
    launches: tuple[int, int]
    host_syncs: int = 0
    saved_new_mib: float = 0.0
    note: str = ""


# By the name of the case, whose traffic has this shape.
PUBLISHED: dict[str, tuple[str, list[Peer]]] = {
    "rms_norm": ("1024x2048", [
        Peer("eager", 9.00, 15.33, 12.80, (8, 16), 0, 12.00),
        Peer("fla", 1.50, 1.01, 1.21, (1, 3), note="17 KiB in flight backward"),
        Peer("flash-attn", 1.50, 1.10, 1.26, (1, 3)),
        Peer("Unsloth", 1.50, 1.33, 1.40, (1, 1), note="no weight gradient; dX over dY"),
    ]),
    "add_rms_norm": ("1024x2048", [
        Peer("eager", 5.25, 12.25, 8.75, (9, 17), 0, 12.00),
        Peer("fla", 1.25, 1.01, 1.13, (1, 3), 0, 4.00),
        Peer("flash-attn", 1.25, 1.08, 1.16, (1, 3), 0, 4.00),
    ]),
    "swiglu": ("128x2816", [
        Peer("eager", 1.67, 1.80, 1.75, (2, 3), 0, 0.69),
        Peer("fla", 1.00, 1.00, 1.00, (1, 1), note="2-byte accesses"),
        Peer("Unsloth", 1.00, 1.20, 1.12, (1, 1), note="overwrites what it saved"),
    ]),
    "rope": ("256 tokens, 8 + 2 heads of 128", [
        Peer("eager", 4.95, 4.95, 4.95, (10, 10)),
        Peer("flash-attn", 1.19, 1.19, 1.19, (2, 2)),
        Peer("Unsloth", 1.09, 2.05, 1.57, (2, 4), note="2-byte accesses"),
        Peer("Unsloth, q and k", 2.29, 1.34, 1.81, (3, 1), note="clones both"),
    ]),
    "cross_entropy": ("48x32000", [
        Peer("eager", 7.00, 11.00, 9.00, (3, 3), 0, 5.86),
        Peer("flash-attn", 1.00, 2.00, 1.50, (5, 3)),
        Peer("Unsloth", 1.00, 2.00, 1.50, (5, 2), note="over the logits"),
    ]),
    "linear_cross_entropy, trained head": ("512x512 -> 4096", [
        Peer("eager", 8.11, 13.56, 10.83, (4, 5), 0, 8.00),
        Peer("cut-cross-entropy", 6.05, 31.53, 18.79, (11, 7), 1, 0.02, "4/3 of the GEMM work; gradient error 7.1e-3"),
        Peer("fla", 58.34, 0.00, 29.17, (87, 1), 2, 4.50),
        Peer("Unsloth", 42.34, 2.00, 22.17, (62, 4), note="gradient error 3.3e-3"),
    ]),
    "lora mlp": ("512x1024 -> 2816, r 16", [
        Peer("PEFT", 3.52, 4.13, 3.83, (17, 25), 0, 11.05),
        Peer("Unsloth", 2.23, 3.31, 2.78, (10, 22), 0, 5.50, "dX over X"),
    ]),
    "lora qkv": ("512x1024, r 16", [
        Peer("PEFT", 3.50, 5.16, 4.40, (15, 23), 0, 0.05),
        Peer("Unsloth", 2.44, 3.94, 3.25, (9, 21), note="dX over X"),
    ]),
    "attention": ("512 tokens, 4 heads of 64, causal", [
        Peer("fla", 1.76, 2.91, 2.52, (1, 5), 0, 0.26, "spills; 7 products backward"),
        Peer("Triton tutorial", 2.76, 2.66, 2.69, (1, 3), 0, 0.26, "spills; 7 products backward"),
    ]),
    "attention, 4 query heads to a key head": ("512 tokens, 4 heads of 64 over 1, causal", [
        Peer("fla", 2.34, 5.71, 4.59, (1, 8), 0, 0.26, "spills; key gradients per query head"),
    ]),
}  # fmt: skip
