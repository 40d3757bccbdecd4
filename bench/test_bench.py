"""pytest-benchmark cases: `pytest bench/` times every operator on every backend that can run it.

For comparisons with rivals, floors and intervals use `eamnet bench`; these are for a quick look,
for `--benchmark-compare`, and for other tools that read pytest-benchmark's files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench.operators import describe
from bench.subjects import SUBJECTS, Subject
from eamnet_kernels import backends, use_backend


def cases() -> Iterator[Any]:
    for subject in SUBJECTS.values():
        for case in subject.cases if subject.operator is not None else ():
            yield pytest.param(subject, case, id=f"{subject.name} {describe(case)}")


@pytest.mark.parametrize("mode", ["forward", "both"])
@pytest.mark.parametrize("backend", [*backends.names(), "plain"])
@pytest.mark.parametrize(("subject", "case"), cases())
def test_operator(
    benchmark: Any, subject: Subject, case: dict[str, Any], backend: str, mode: str
) -> None:
    torch.manual_seed(0)
    inputs = subject.make(case, lambda *shape: torch.randn(shape))
    tensors = [t for v in inputs.values() for t in (v if isinstance(v, list) else [v])]
    for tensor in tensors:
        tensor.requires_grad_(mode == "both")
    assert subject.operator is not None
    if backend != "plain":
        reason = backends.explain(subject.operator, *subject.raw(inputs, case)).reasons[backend]
        if reason is not None and not reason.startswith("can run"):
            pytest.skip(reason)
    function = subject.plain if backend == "plain" else subject.ours

    def call() -> None:
        out = function(inputs, case)
        if mode == "both":
            total = sum(o.sum() for o in (out if isinstance(out, tuple) else (out,)))
            torch.autograd.grad(total, tensors)

    benchmark.group = f"{subject.name} {describe(case)} {mode}"
    with use_backend("auto" if backend == "plain" else backend):
        benchmark(call)
