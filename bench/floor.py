"""The physical limit: fewest bytes over the copy bandwidth, fewest operations over the GEMM peak.

Both ceilings are measured in the same run as what is compared with them. A tensor counts once for
each pass that the algebra cannot avoid; operations are those of the folded algebra
(docs/algebra.md), a multiply-add counting two.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Ceilings:
    """What the machine does in one dtype: bytes per second (read plus written), flop per second."""

    copy: float
    gemm: float


@dataclass(frozen=True)
class Count:
    """The fewest bytes and floating-point operations of one call."""

    bytes: float
    flop: float

    def floor(self, ceilings: Ceilings) -> float:
        """Seconds: whichever of the two takes longer."""
        return max(self.bytes / ceilings.copy, self.flop / ceilings.gemm)


def measure(dtype: torch.dtype, device: torch.device, repetitions: int = 7) -> Ceilings:
    """Best of a few: a copy of 256 MB (GPU: 2 GB), and a 2048 (GPU: 8192) cubed matrix product.

    512 cubed where that takes 0.1 s already: without bfloat16 in the processor 2048 cubed takes
    minutes.
    """

    def best(function: Callable[[], object], amount: float) -> float:
        times = []
        for _ in range(repetitions):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
        return amount / min(times[2:])

    # A GPU's clock is that of the CPU here: what starts and ends the copy is not to count.
    source = torch.ones((512 if device.type == "cuda" else 64) << 20, device=device)
    target = torch.empty_like(source)
    copy = best(lambda: target.copy_(source), 2.0 * source.nbytes)

    def product(size: int) -> float:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        return best(lambda: a @ b, 2.0 * size**3)

    if device.type == "cuda":
        return Ceilings(copy, product(8192))
    small = product(512)
    return Ceilings(copy, small if small < 2.0 * 512**3 / 0.1 else product(2048))


def count(operator: str, case: dict[str, Any], mode: str, itemsize: int) -> Count:
    """The count of one operator call. `mode`: "forward", or "both" for forward and backward."""
    forward, backward = _COUNTS[operator](case)
    bytes_, flop = (
        forward
        if mode == "forward"
        else tuple(f + b for f, b in zip(forward, backward, strict=True))
    )
    return Count(bytes_ * itemsize, flop)


Pair = tuple[tuple[float, float], tuple[float, float]]
"""((elements, flop) of the forward, (elements, flop) of the backward)."""


def _map(case: dict[str, Any]) -> tuple[int, int, int]:
    batch, channels, height, width = case["shape"]
    return batch, channels, height * width


def _gate_statistics(case: dict[str, Any]) -> Pair:
    b, c, n = _map(case)
    # Forward: two sums and two comparisons per element. Backward: x is not read.
    return (b * c * n + 2 * b * n, 4.0 * b * c * n), (b * c * n + 2 * b * n, 2.0 * b * c * n)


def _cross_mix_pixels(case: dict[str, Any]) -> Pair:
    b, h, n, d = case["tokens"]
    tokens = b * h * n * d
    product = 2.0 * b * h * n * n * d
    # Two attentions of two products; backward: the scores again and four products each.
    return (7 * tokens, 4 * product), (6 * tokens + 3 * tokens + 6 * tokens, 10 * product)


def _cross_mix_channels(case: dict[str, Any]) -> Pair:
    b, c, n = _map(case)
    # Forward: three symmetric Gram matrices, two products to apply. X is read once more to apply,
    # since the matrices depend on all of it.
    forward = (3.0 * b * c * n, b * n * (3.0 * c * (c + 1) + 4.0 * c * c))
    # Backward: two products for dA, then dX from dY (two) and X (three). X and dY are read twice.
    return forward, (5.0 * b * c * n, b * n * (4.0 * c * c + 10.0 * c * c))


def _external_memory(case: dict[str, Any]) -> Pair:
    b, c, n = _map(case)
    s = case.get("slots", 64)
    product = 2.0 * b * c * s * n
    # Forward: logits, features, output (from attention, or from the kept half of the features where
    # that is less).
    forward = (2.0 * b * c * n, 2 * product + product * min(1.0, c / (2.0 * s)))
    # Backward: logits, dA, its outer product for dW, dK, dX; dX depends on sums over all pixels.
    return forward, (5.0 * b * c * n, 5 * product)


def _multi_dilation_conv(case: dict[str, Any]) -> Pair:
    b, c, n = _map(case)
    height, width = case["shape"][2:]
    dilations = case.get("dilations", (3, 5, 7))
    branches = len(dilations)
    group = c // (branches + 1)
    inner = 1 if case.get("depthwise") else group

    def taps(size: int, dilation: int) -> int:  # of three, those that are not padding, over a row
        return size + 2 * max(0, size - dilation)

    inside = sum(taps(height, d) * taps(width, d) for d in dilations)
    flop = 2.0 * b * (n * c * c + inside * group * inner)
    kept = branches * b * group * n
    return (2.0 * b * c * n, flop), (3.0 * b * c * n + kept, 2 * flop)


_COUNTS = {
    "gate_statistics": _gate_statistics,
    "cross_mix_pixels": _cross_mix_pixels,
    "cross_mix_channels": _cross_mix_channels,
    "external_memory": _external_memory,
    "multi_dilation_conv": _multi_dilation_conv,
}
