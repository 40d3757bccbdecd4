"""Timing that survives a noisy machine: interleaved rounds, paired ratios, bootstrap intervals.

All candidates of a comparison run in turn in every round, in an order drawn anew, on inputs that
change from round to round. What is compared is the ratio of two candidates within a round, so a
machine whose speed drifts changes both; the median over rounds and its bootstrap interval are kept.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

MIN_SECONDS = 0.02  # of one measurement: short calls are repeated until they take that long
INPUT_SETS = 3  # of one candidate: the rounds rotate through them, so no cache stays warm for one
LONG = 1.0  # seconds of a call from which on one is enough to warm up
WIDE_SPREAD = 0.3  # (p80 - p20) / median from which a row is marked as saying little

Call = Callable[[int], object]
"""`call(index)` runs the candidate once on inputs `index % INPUT_SETS`."""


@dataclass(frozen=True)
class Times:
    """Seconds per call, one per round."""

    seconds: np.ndarray
    graph: bool = False  # replayed as CUDA graphs

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    def percentile(self, q: float) -> float:
        return float(np.percentile(self.seconds, q))

    def milliseconds(self) -> dict[str, Any]:
        """What a row of a result file says of them."""
        return {
            "median_ms": 1e3 * self.median,
            "p20_ms": 1e3 * self.percentile(20),
            "p80_ms": 1e3 * self.percentile(80),
        }

    @property
    def spread(self) -> float:
        return (self.percentile(80) - self.percentile(20)) / self.median


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios `other / ours` (above 1: ours is faster) with a 95 % interval."""

    median: float
    low: float
    high: float


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Seconds per call of one candidate: by the wall on a CPU, by events on a GPU.

    On a GPU every call finds a cold L2: a buffer of twice its size is written before it, outside
    the events. `capture` lets it be replayed as a CUDA graph, one for each of its `INPUT_SETS`, so
    that what is timed is the kernels and not how fast Python queues them.
    """

    def __init__(self, call: Call, device: torch.device) -> None:
        self.call = call
        self.device = device
        self.graphs: list[torch.cuda.CUDAGraph] = []
        for index in range(2):
            start = time.perf_counter()
            call(index)
            synchronize(device)
            once = time.perf_counter() - start
            if once > LONG:
                break
        self.repetitions = max(1, round(MIN_SECONDS / max(once, 1e-7)))
        if device.type == "cuda":
            size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
            self.flush = torch.empty(size, dtype=torch.int8, device=device)
            self.repetitions = min(self.repetitions, 20)

    def capture(self) -> bool:
        """Make the graphs; False where a call cannot be captured."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for index in range(INPUT_SETS):
                self.call(index)
        torch.cuda.current_stream(self.device).wait_stream(side)
        graphs: list[torch.cuda.CUDAGraph] = []
        try:
            for index in range(INPUT_SETS):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    self.call(index)
                graphs.append(graph)
        except RuntimeError:  # it synchronizes, or allocates in a way that cannot be replayed
            torch.cuda.synchronize(self.device)
            return False
        self.graphs = graphs
        return True

    def seconds(self, first: int) -> float:
        """Mean over this clock's repetitions, on the inputs from `first` on."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            for index in range(first, first + self.repetitions):
                self.call(index)
            return (time.perf_counter() - start) / self.repetitions
        pairs = []
        for index in range(first, first + self.repetitions):
            self.flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            if self.graphs:
                self.graphs[index % INPUT_SETS].replay()
            else:
                self.call(index)
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize(self.device)
        return sum(b.elapsed_time(e) for b, e in pairs) / 1e3 / self.repetitions


def interleaved(
    candidates: Mapping[str, Call],
    rounds: int,
    device: torch.device,
    budget: float,
    graphs: bool = True,
) -> dict[str, Times]:
    """Time every candidate once per round; stop early when `budget` seconds are used up.

    Each is run twice before (compilation, allocation, choice of algorithms), once if that takes
    `LONG`. At least three rounds are made whatever the budget. The order within a round is drawn
    anew: what runs before leaves a cache and a memory behind, and must not be the same every time.

    On a GPU calls are replayed as graphs if `graphs`, where all candidates can be captured: to let
    one wait for Python and the other not would be no comparison.
    """
    clocks = {name: Clock(call, device) for name, call in candidates.items()}
    graphs = graphs and device.type == "cuda" and all(c.capture() for c in clocks.values())
    if not graphs:
        for clock in clocks.values():
            clock.graphs = []
    order = list(clocks)
    seconds: dict[str, list[float]] = {name: [] for name in order}
    draw = np.random.default_rng(0)
    deadline = time.perf_counter() + budget
    gc.collect()
    gc.disable()
    try:
        for index in range(rounds):
            for name in draw.permutation(order).tolist():
                seconds[name].append(clocks[name].seconds(index))
            if index >= 2 and time.perf_counter() > deadline:
                break
    finally:
        gc.enable()
    return {name: Times(np.array(values), graphs) for name, values in seconds.items()}


def paired_ratio(other: Times, ours: Times, resamples: int = 2000) -> Ratio:
    ratios = other.seconds / ours.seconds
    picks = np.random.default_rng(0).integers(0, len(ratios), (resamples, len(ratios)))
    medians = np.median(ratios[picks], axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def geometric_mean(values: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def peak_extra_bytes(call: Call, device: torch.device) -> int | None:
    """Memory that one call needs beyond what is allocated before it, results included.

    GPU: the allocator's peak. CPU: the growth of the process's high-water mark, after returning
    free memory to the system; None where the system cannot reset the mark. What a first call keeps
    for later ones counts, unless it was made before.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call(0)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        import ctypes

        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
        call(0)
        return max(0, _status_bytes("VmHWM") - before)
    except OSError:
        return None


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
