"""Benchmarks of the operators: correctness first, then interleaved times, floors and memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bench.floor import Ceilings, count
from bench.subjects import SUBJECTS, Case, Inputs, Subject
from bench.timing import INPUT_SETS, WIDE_SPREAD, interleaved, paired_ratio, peak_extra_bytes
from eamnet_kernels import backends, use_backend


@dataclass(frozen=True)
class Row:
    """One candidate in one case; the schema of the CSV and JSON files (docs/benchmarks.md)."""

    subject: str
    case: str
    mode: str
    dtype: str
    candidate: str
    ours: bool  # one of the library's backends
    chosen: bool  # what `auto` takes
    correct: bool
    error: float  # largest error against float64, over that of plain PyTorch in the same dtype
    rounds: int = 0
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    noisy: bool = False
    graph: bool = False  # timed as CUDA graphs
    floor_ms: float | None = None
    percent_of_floor: float | None = None
    bytes: float | None = None
    flop: float | None = None
    speedup: float | None = None  # of `auto` over this candidate, median of paired ratios
    speedup_low: float | None = None
    speedup_high: float | None = None
    peak_extra_mb: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def describe(case: Case) -> str:
    """A case in words, such as `4x32x256x256`."""
    shape = "x".join(map(str, case.get("shape") or case["tokens"]))
    rest = {k: v for k, v in case.items() if k not in ("shape", "tokens", "depthwise")}
    return " ".join([shape, *(f"{k}={v}" for k, v in rest.items())])


def _leaves(inputs: Inputs) -> list[Tensor]:
    return [
        t for v in inputs.values() for t in (v if isinstance(v, list) else [v]) if t is not None
    ]


def _map(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    return {
        k: [change(t) for t in v] if isinstance(v, list) else change(v) for k, v in inputs.items()
    }


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def _outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@dataclass
class Candidate:
    """Something that computes the subject: a function of inputs, and the layout it is given."""

    name: str
    function: Callable[[Inputs, Case], Any]
    channels_last: bool = False
    backend: str | None = None


def candidates(
    subject: Subject, case: Case, inputs: Inputs, compiled: str | None
) -> list[Candidate]:
    """Ours on every backend that can run (a module: as `auto` has it), and every rival."""
    found = []
    able = ["auto"]
    if subject.operator is not None:
        reasons = backends.explain(subject.operator, *subject.raw(inputs, case)).reasons
        able = [n for n, why in reasons.items() if why is None or why.startswith("can run")]
    maps = "shape" in case
    for name in able:
        for last in (False, True) if maps else (False,):
            label = f"{name}{', channels-last' if last else ''}"
            found.append(Candidate(label, subject.ours, last, name))
    found.append(Candidate("plain", subject.plain))
    if maps:
        found.append(Candidate("plain, channels-last", subject.plain, True))
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(subject.plain, dynamic=False, mode=compiled)
        found.append(Candidate("torch.compile", function))
    return found


def _run(candidate: Candidate, inputs: Inputs, case: Case, mode: str, grads: list[Tensor]) -> Any:
    """One call of a candidate: values, or values and gradients of all inputs."""
    if mode == "forward":
        with torch.no_grad():
            return _outputs(candidate.function(inputs, case)), ()
    out = _outputs(candidate.function(inputs, case))
    return tuple(o.detach() for o in out), torch.autograd.grad(out, _leaves(inputs), grads)


def _train(candidate: Candidate, inputs: Inputs, case: Case) -> tuple[Tensor, ...]:
    """Values as they are where gradients are on: batch norm has other ones in training."""
    with torch.enable_grad():
        return tuple(o.detach() for o in _outputs(candidate.function(inputs, case)))


def _error(
    candidate: tuple[Any, Any], plain: tuple[Any, Any], truth: tuple[Any, Any], pooled: bool
) -> float:
    """The largest error over what the tolerance allows: 2 times that of plain PyTorch in the same
    dtype (gradients: 3 times) plus one rounding of the largest value. At most 1 is correct.

    `pooled`, for modules: twice plain PyTorch's largest relative error of any value or gradient
    serves for all. It may hit gradients of one or two elements by chance, and its batch norm in
    channels-last, which the definition does not keep, loses up to three times as much.
    """

    def off(got: Tensor, true: Tensor) -> float:
        return float((got.double() - true).abs().max())

    worst = 0.0
    largest = max((float(t.abs().max()) for t in truth[1]), default=0.0)
    for factor, *kind in ((2, *(r[0] for r in (candidate, plain, truth))),
                          (3, *(r[1] for r in (candidate, plain, truth)))):  # fmt: skip
        rows = [(*g, float(g[2].abs().max()) or largest) for g in zip(*kind, strict=True)]
        relative = [off(reference, true) / (scale or 1.0) for _, reference, true, scale in rows]
        if pooled:
            relative = [2 * max(relative, default=0.0)] * len(rows)
        for (got, _, true, scale), share in zip(rows, relative, strict=True):
            allowed = (factor * share + torch.finfo(got.dtype).eps) * scale
            error = off(got, true)
            worst = max(worst, error / allowed if error == error else float("inf"))
    return worst


def measure(
    subject: Subject,
    case: Case,
    mode: str,
    dtype: torch.dtype,
    device: torch.device,
    ceilings: Ceilings,
    rounds: int,
    budget: float,
    compiled: str | None,
    backend: str | None = None,
    memory: bool = True,
) -> Iterator[Row]:
    """Rows of one case: the correctness gate, then times of all that pass it."""
    torch.manual_seed(0)
    gradients = mode != "forward"

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    def leaf(t: Tensor) -> Tensor:
        return t.detach().to(dtype, copy=True).requires_grad_(gradients)

    exact = _map((subject.make_exact or subject.make)(case, randn), leaf)
    timed = [_map(subject.make(case, randn), leaf) for _ in range(INPUT_SETS)]
    sets = {
        last: [
            _map(s, lambda t: _channels_last(t.detach()).requires_grad_(gradients)) if last else s
            for s in (exact, *timed)
        ]
        for last in (False, True)
    }
    wide = _map(exact, lambda t: t.detach().double().requires_grad_(gradients))
    definition = Candidate("definition", subject.truth or subject.plain)
    with torch.no_grad(), subject.scope():
        out = _outputs(subject.plain(exact, case))
        own_grads = [torch.randn(o.shape, device=device) for o in out]
        if subject.ends_in_relu and gradients:
            # No gradient where rounding decides on which side of the last ReLU a value lies.
            values, rounded = (_train(definition, i, case) for i in (wide, exact))
            own_grads = [
                g * (v > 4 * (v - r).abs().max())
                for g, v, r in zip(own_grads, values, rounded, strict=True)
            ]
    grads = {
        last: [_channels_last(g.to(o.dtype)) if last else g.to(o.dtype) for g, o in pairs]
        for last in (False, True)
        for pairs in [list(zip(own_grads, out, strict=True))]
    }

    def choice(last: bool) -> str:
        """The backend that is compared with the rivals of a layout, "auto" in what is printed."""
        if backend is not None or subject.operator is None:
            return backend or "auto"
        return backends.explain(subject.operator, *subject.raw(sets[last][1], case)).chosen or ""

    auto = {last: choice(last) for last in (False, True)}

    def once(candidate: Candidate, index: int) -> Any:
        """One call; inputs 0 are those that results are checked on, the others are timed."""
        last = candidate.channels_last
        scope = subject.scope() if candidate.backend is None else use_backend(candidate.backend)
        with scope:
            return _run(candidate, sets[last][index], case, mode, grads[last])

    with subject.scope():
        truth = _run(definition, wide, case, mode, [g.double() for g in grads[False]])
    definition = Candidate("definition", subject.plain)
    plain = {last: once(Candidate("definition", subject.plain, last), 0) for last in (False, True)}
    everyone = candidates(subject, case, exact, compiled)
    if backend is not None:
        everyone = [c for c in everyone if c.backend in (None, backend)]
    errors = {}
    endless = set()  # a backend that is not chosen and would use up the time of all
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    for candidate in everyone:
        torch.use_deterministic_algorithms(candidate.backend is not None)  # poisons torch.empty
        start = time.perf_counter()
        got = once(candidate, 0)
        left_out = candidate.backend not in (None, auto[candidate.channels_last])
        if left_out and time.perf_counter() - start > budget / 4:
            endless.add(candidate.name)
        errors[candidate.name] = _error(
            got, plain[candidate.channels_last], truth, subject.operator is None
        )
        torch.use_deterministic_algorithms(False)
        del got
    del truth, plain, wide

    sound = {
        c.name: c
        for c in everyone
        if (errors[c.name] <= 1 or c.backend is None) and c.name not in endless
    }
    times = interleaved(
        {n: lambda index, c=c: once(c, 1 + index % INPUT_SETS) for n, c in sound.items()},  # type: ignore[misc]
        rounds,
        device,
        budget,
    )
    counted = None
    if subject.operator is not None:
        counted = count(subject.operator, case, mode, torch.finfo(dtype).bits // 8)
    floor = None if counted is None else counted.floor(ceilings)
    for candidate in everyone:
        common: dict[str, Any] = {
            "subject": subject.name,
            "case": describe(case),
            "mode": mode,
            "dtype": str(dtype).removeprefix("torch."),
            "candidate": candidate.name,
            "ours": candidate.backend is not None,
            "chosen": candidate.backend == auto[candidate.channels_last],
            "correct": errors[candidate.name] <= 1,
            "error": errors[candidate.name],
        }
        if candidate.name not in sound:
            yield Row(**common)
            continue
        t = times[candidate.name]
        # A rival is compared with ours in the rival's own layout.
        last = candidate.channels_last
        own = f"{auto[last]}{', channels-last' if last else ''}"
        ratio = paired_ratio(t, times[own]) if own in times else None
        call = lambda index, c=candidate: once(c, 1 + index % INPUT_SETS)  # noqa: E731
        extra = peak_extra_bytes(call, device) if memory else None
        yield Row(
            **common,
            rounds=len(t.seconds),
            **t.milliseconds(),
            noisy=t.spread > WIDE_SPREAD,
            graph=t.graph,
            floor_ms=None if floor is None else 1e3 * floor,
            percent_of_floor=None if floor is None else 100 * floor / t.median,
            bytes=None if counted is None else counted.bytes,
            flop=None if counted is None else counted.flop,
            speedup=None if ratio is None else ratio.median,
            speedup_low=None if ratio is None else ratio.low,
            speedup_high=None if ratio is None else ratio.high,
            peak_extra_mb=None if extra is None else extra / 1e6,
        )


def run(
    names: list[str],
    modes: list[str],
    dtypes: list[torch.dtype],
    device: torch.device,
    ceilings: dict[torch.dtype, Ceilings],
    quick: bool,
    shape: tuple[int, ...] | None,
    rounds: int,
    budget: float,
    compiled: str | None,
    backend: str | None = None,
) -> Iterator[Row]:
    """Rows of all that is asked for, case by case."""
    for name in names:
        subject = SUBJECTS[name]
        cases = subject.quick if quick else subject.cases
        if shape is not None:
            key = "tokens" if "tokens" in cases[0] else "shape"
            cases = ({**cases[0], key: shape},)
        for case in cases:
            for dtype in dtypes:
                for mode in modes:
                    yield from measure(
                        subject,
                        case,
                        mode,
                        dtype,
                        device,
                        ceilings[dtype],
                        rounds,
                        budget,
                        compiled,
                        backend,
                        memory=not quick,
                    )
