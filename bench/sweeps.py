"""Cost as the work grows: time and memory against one size, with the exponent of a power law."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from bench.results import Record
from bench.subjects import SUBJECTS
from bench.timing import interleaved, peak_extra_bytes

# axis -> (values, case for a value, exponent that the operation count expects)
Axis = tuple[tuple[int, ...], Callable[[int], dict[str, Any]], float]


def _map(**changes: Any) -> Callable[[int], dict[str, Any]]:
    key = next(iter(changes))

    def case(value: int) -> dict[str, Any]:
        sizes = {"batch": 2, "channels": 32, "side": 128, key: value}
        shape = (sizes["batch"], sizes["channels"], sizes["side"], sizes["side"])
        return {"shape": shape, "depthwise": False}

    return case


_SIDES = (64, 128, 256, 512, 1024)
_AXES: dict[str, dict[str, Axis]] = {
    "gate_statistics": {"side": (_SIDES, _map(side=0), 2)},
    "cross_mix_channels": {
        "side": (_SIDES, _map(side=0), 2),
        "channels": ((16, 32, 64, 128, 256), _map(channels=0), 2),
        "batch": ((1, 2, 4, 8), _map(batch=0), 1),
    },
    "external_memory": {
        "side": (_SIDES, _map(side=0), 2),
        "slots": ((16, 32, 64, 128), lambda v: {"shape": (2, 32, 128, 128), "slots": v}, 1),
    },
    "multi_dilation_conv, dense": {"side": (_SIDES, _map(side=0), 2)},
    "cross_mix_pixels": {
        "side": ((16, 32, 64), lambda v: {"tokens": (2, 4, v * v, 32)}, 4),
    },
}


def exponent(values: list[float], costs: list[float]) -> float:
    """The slope of a straight line through the log-log points, the smaller half left out.

    Small sizes are dominated by the cost of a call, which has no exponent.
    """
    start = len(values) // 2 - (len(values) % 2 == 0)
    x, y = np.log(values[start:]), np.log(costs[start:])
    return float(np.polyfit(x, y, 1)[0])


def measure(rounds: int, budget: float) -> Iterator[Record]:
    """A row per point: time and peak memory of the backend that `auto` takes."""
    threads = torch.get_num_threads()

    def point(name: str, axis: str, value: int, case: dict[str, Any], expected: float) -> Record:
        subject = SUBJECTS[name]
        torch.manual_seed(0)
        sets = [subject.make(case, lambda *shape: torch.randn(shape)) for _ in range(2)]

        def call(index: int) -> object:
            with torch.no_grad():
                return subject.ours(sets[index % 2], case)

        device = torch.device("cpu")
        time = interleaved({"ours": call}, rounds, device, budget)["ours"]
        extra = peak_extra_bytes(call, device)
        return {
            "subject": name,
            "axis": axis,
            "value": value,
            **time.milliseconds(),
            "peak_extra_mb": None if extra is None else extra / 1e6,
            "expected_exponent": expected,
        }

    for name, axes in _AXES.items():
        for axis, (values, case_of, expected) in axes.items():
            for value in values:
                yield point(name, axis, value, case_of(value), expected)
    try:
        for name in SUBJECTS:
            case = SUBJECTS[name].cases[0]
            for count in range(1, threads + 1):
                torch.set_num_threads(count)
                yield point(name, "threads", count, case, -1)
    finally:
        torch.set_num_threads(threads)


def fits(rows: list[Record]) -> list[Record]:
    """The fitted exponent of each sweep beside the expected one."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for row in rows:
        groups.setdefault((row["subject"], row["axis"]), []).append(row)
    found = []
    for (subject, axis), group in groups.items():
        if len(group) < 2:
            continue
        values = [float(r["value"]) for r in group]
        found.append(
            {
                "subject": subject,
                "axis": axis,
                "expected": group[0]["expected_exponent"],
                "time": exponent(values, [r["median_ms"] for r in group]),
                "memory": exponent(values, [max(r["peak_extra_mb"], 1e-3) for r in group])
                if axis != "threads" and all(r["peak_extra_mb"] is not None for r in group)
                else None,
            }
        )
    return found
