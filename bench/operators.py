"""Benchmarks of the operators: correctness first, then interleaved times, floors and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bench.floor import Ceilings, count
from bench.subjects import SUBJECTS, Case, Inputs, Subject
from bench.timing import WIDE_SPREAD, interleaved, paired_ratio, peak_extra_bytes
from eamnet_kernels import backends, use_backend

INPUT_SETS = 3  # sets of inputs that the rounds rotate through, so that no cache stays warm for one


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


def candidates(subject: Subject, case: Case, inputs: Inputs, compiled: bool) -> list[Candidate]:
    """Ours on every backend that can run, and every rival."""
    found = []
    reasons = backends.explain(subject.operator, *subject.raw(inputs, case)).reasons
    maps = "shape" in case
    for name, reason in reasons.items():
        if reason is None or reason.startswith("can run"):
            for last in (False, True) if maps else (False,):
                label = f"{name}{', channels-last' if last else ''}"
                found.append(Candidate(label, subject.ours, last, name))
    found.append(Candidate("plain", subject.plain))
    if maps:
        found.append(Candidate("plain, channels-last", subject.plain, True))
    if compiled:
        torch._dynamo.reset()
        found.append(Candidate("torch.compile", torch.compile(subject.plain, dynamic=False)))
    return found


def _run(candidate: Candidate, inputs: Inputs, case: Case, mode: str, grads: list[Tensor]) -> Any:
    """One call of a candidate: values, or values and gradients of all inputs."""
    if mode == "forward":
        with torch.no_grad():
            return _outputs(candidate.function(inputs, case)), ()
    out = _outputs(candidate.function(inputs, case))
    return tuple(o.detach() for o in out), torch.autograd.grad(out, _leaves(inputs), grads)


def _error(candidate: tuple[Any, Any], plain: tuple[Any, Any], truth: tuple[Any, Any]) -> float:
    """The largest error over what the tolerance allows: 2 times that of plain PyTorch in the same
    dtype (gradients: 3 times) plus one rounding of the largest value. At most 1 is correct."""
    worst = 0.0
    largest = max((float(t.abs().max()) for t in truth[1]), default=0.0)
    for factor, got, reference, true in (
        *((2, *group) for group in zip(candidate[0], plain[0], truth[0], strict=True)),
        *((3, *group) for group in zip(candidate[1], plain[1], truth[1], strict=True)),
    ):
        scale = float(true.abs().max()) or largest
        allowed = factor * float((reference.double() - true).abs().max())
        allowed += torch.finfo(got.dtype).eps * scale
        error = float((got.double() - true).abs().max())
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
    compiled: bool,
    backend: str | None = None,
    memory: bool = True,
) -> Iterator[Row]:
    """Rows of one case: the correctness gate, then times of all that pass it."""
    torch.manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    sets = [
        _map(subject.make(case, randn), lambda t: t.to(dtype).requires_grad_(mode != "forward"))
        for _ in range(INPUT_SETS)
    ]
    sets = [_map(s, lambda t: t.detach().requires_grad_(mode != "forward")) for s in sets]
    last_sets = [
        _map(s, lambda t: _channels_last(t.detach()).requires_grad_(mode != "forward"))
        for s in sets
    ]
    with torch.no_grad():
        out = _outputs(subject.ours(sets[0], case))
    grads = [torch.randn(o.shape, device=device).to(o.dtype) for o in out]
    last_grads = [_channels_last(g) for g in grads]
    # The backend that is compared with the rivals, "auto" in what is printed.
    auto = backend or backends.explain(subject.operator, *subject.raw(sets[0], case)).chosen

    def once(candidate: Candidate, index: int) -> Any:
        own = (last_sets if candidate.channels_last else sets)[index % INPUT_SETS]
        own_grads = last_grads if candidate.channels_last else grads
        if candidate.backend is None:
            return _run(candidate, own, case, mode, own_grads)
        with use_backend(candidate.backend):
            return _run(candidate, own, case, mode, own_grads)

    wide = _map(sets[0], lambda t: t.detach().double().requires_grad_(mode != "forward"))
    definition = Candidate("definition", subject.plain)
    truth = _run(definition, wide, case, mode, [g.double() for g in grads])
    plain = {
        False: _run(definition, sets[0], case, mode, grads),
        True: _run(definition, last_sets[0], case, mode, last_grads),
    }
    everyone = candidates(subject, case, sets[0], compiled)
    if backend is not None:
        everyone = [c for c in everyone if c.backend in (None, backend)]
    errors = {}
    torch.utils.deterministic.fill_uninitialized_memory = True
    for candidate in everyone:
        torch.use_deterministic_algorithms(candidate.backend is not None)  # poisons torch.empty
        got = once(candidate, 0)
        errors[candidate.name] = _error(got, plain[candidate.channels_last], truth)
        torch.use_deterministic_algorithms(False)
    del truth, plain, wide

    sound = {c.name: c for c in everyone if errors[c.name] <= 1 or c.backend is None}
    times = interleaved(
        {name: lambda index, c=c: once(c, index) for name, c in sound.items()},  # type: ignore[misc]
        rounds,
        device,
        budget,
    )
    counted = count(subject.operator, case, mode, torch.finfo(dtype).bits // 8)
    floor = counted.floor(ceilings)
    for candidate in everyone:
        common: dict[str, Any] = {
            "subject": subject.name,
            "case": describe(case),
            "mode": mode,
            "dtype": str(dtype).removeprefix("torch."),
            "candidate": candidate.name,
            "ours": candidate.backend is not None,
            "chosen": candidate.backend == auto,
            "correct": errors[candidate.name] <= 1,
            "error": errors[candidate.name],
        }
        if candidate.name not in sound:
            yield Row(**common)
            continue
        t = times[candidate.name]
        # A rival is compared with ours in the rival's own layout.
        own = f"{auto}{', channels-last' if candidate.channels_last else ''}"
        ratio = paired_ratio(t, times[own]) if own in times else None
        call = lambda index, c=candidate: once(c, index)  # noqa: E731
        extra = peak_extra_bytes(call, device) if memory else None
        yield Row(
            **common,
            rounds=len(t.seconds),
            median_ms=1e3 * t.median,
            p20_ms=1e3 * t.percentile(20),
            p80_ms=1e3 * t.percentile(80),
            noisy=t.spread > WIDE_SPREAD,
            floor_ms=1e3 * floor,
            percent_of_floor=100 * floor / t.median,
            bytes=counted.bytes,
            flop=counted.flop,
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
    compiled: bool,
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
                    )
