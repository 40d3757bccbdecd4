"""Every operator on every backend over the same cases: values, gradients, layouts, tracing.

Uninitialised memory is filled with NaN throughout (`poisoned`), so that an output element which a
kernel does not write fails the comparison.

The bound on errors is relative to what plain PyTorch does: against the definition in float64, the
largest error is at most 2 times (gradients: 3 times) that of the definition in the same dtype, plus
one rounding of the largest value (of any gradient, for one that cancels to nothing). The largest of
a few errors is now and then small by luck: for a gradient of few elements plain PyTorch's is taken
over several incoming gradients. In float64, where the definition is itself the truth, the bound is
the textbook one for a sum of n terms, n roundings of the largest value.

EAMNET_TEST_DEVICE=cuda puts the tensors on a GPU. With TRITON_INTERPRET=1 fewer cases run
(`operators.py`), and what does not depend on the dtype runs in one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import eamnet_kernels
from eamnet_kernels import backends
from eamnet_kernels.triton import interpreted

from .operators import OPERATORS, Inputs, Operator

DEVICE = os.environ.get("EAMNET_TEST_DEVICE", "cpu")
torch.backends.cudnn.allow_tf32 = False  # plain PyTorch is the measure, in the dtype that it names

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
TWO_DTYPES = ("float32",) if interpreted() else ("float32", "bfloat16")
CASES = [
    pytest.param(operator, case, id=f"{operator.name}-{name}")
    for operator in OPERATORS.values()
    for name, case in operator.cases.items()
]
FIRST_CASES = [
    pytest.param(operator, next(iter(operator.cases.values())), id=operator.name)
    for operator in OPERATORS.values()
]


not_interpreted = pytest.mark.skipif(
    interpreted(), reason="of `registration`, which does the same for all backends"
)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """`torch.empty`, in Python and in C++, gives NaN (integers: the largest) in this suite."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=backends.names())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with eamnet_kernels.use_backend(request.param):
        yield request.param


def leaves(inputs: Inputs) -> list[Tensor]:
    values = (v if isinstance(v, list) else [v] for v in inputs.values())
    return [v for group in values for v in group if v is not None]


def mapped(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    def one(value: Any) -> Any:
        if isinstance(value, list):
            return [change(v) for v in value]
        return None if value is None else change(value)

    return {name: one(value) for name, value in inputs.items()}


def draw(operator: Operator, case: dict[str, Any], dtype: torch.dtype, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return mapped(operator.make(case, randn), lambda t: t.to(DEVICE, dtype))


def require(backend: str, operator: Operator, inputs: Inputs, case: dict[str, Any]) -> None:
    """Skip where the backend says that it cannot; then it must also refuse, with that reason."""
    arguments = operator.raw(inputs, case)
    reason = backends.explain(operator.name, *arguments).reasons[backend]
    if reason is not None and not reason.startswith("can run"):
        with pytest.raises(RuntimeError, match=backend):
            operator.run(inputs, case)
        pytest.skip(reason)


def outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def evaluate(
    function: Callable[[Inputs, dict[str, Any]], Any],
    inputs: Inputs,
    case: dict[str, Any],
    grads: list[Tensor] | None = None,
    seed: int = 1,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], list[Tensor]]:
    """Values, gradients of all inputs, and the incoming gradients (drawn where not given)."""
    inputs = mapped(inputs, lambda t: t.detach().requires_grad_())
    out = outputs(function(inputs, case))
    if grads is None:
        generator = torch.Generator().manual_seed(seed)
        grads = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in out]
        grads = [g.to(o) for g, o in zip(grads, out, strict=True)]
    got = torch.autograd.grad(
        out, leaves(inputs), [g.to(o.dtype) for g, o in zip(grads, out, strict=True)]
    )
    return tuple(o.detach() for o in out), got, grads


def worst(a: Tensor, truth: Tensor) -> float:
    return (a.double() - truth).abs().max().item() if truth.numel() else 0.0


def plain_error(
    operator: Operator, inputs: Inputs, doubled: Inputs, case: dict[str, Any], index: int
) -> float:
    """Plain PyTorch's largest error in 32 elements or more of gradient `index`: as many incoming
    gradients as that takes."""
    errors, elements = [0.0], 0
    while elements < 32:
        _, plain, incoming = evaluate(operator.direct, inputs, case, seed=len(errors) + 1)
        true = evaluate(operator.direct, doubled, case, incoming)[1][index]
        errors.append(worst(plain[index], true))
        elements += true.numel()
    return max(errors)


def check(
    operator: Operator, inputs: Inputs, case: dict[str, Any], dtype: torch.dtype, factor: float = 1
) -> None:
    values, grads, incoming = evaluate(operator.run, inputs, case)
    doubled = mapped(inputs, lambda t: t.detach().double())
    true_values, true_grads, _ = evaluate(operator.direct, doubled, case, incoming)
    plain_values, plain_grads, _ = evaluate(operator.direct, inputs, case, incoming)
    largest = (
        max(t.abs().max().item() for t in true_grads if t.numel()) if incoming[0].numel() else 0
    )
    n, m = len(values), len(grads)
    for kind, times, index, got, plain, true in (
        *zip("v" * n, [2] * n, range(n), values, plain_values, true_values, strict=True),
        *zip("g" * m, [3] * m, range(m), grads, plain_grads, true_grads, strict=True),
    ):
        assert got.dtype == plain.dtype
        assert got.shape == true.shape
        assert not got.isnan().any(), "an output element was not written, or is NaN"
        scale = true.abs().max().item() if true.numel() else 0.0
        rounding = torch.finfo(dtype).eps * (scale or largest)
        if dtype == torch.float64:
            terms = max(t.numel() for t in leaves(inputs))
            bound = terms * torch.finfo(dtype).eps * max(scale, largest)
            if case.get("singular"):  # where products X X^T keep half the digits, as they do
                bound = torch.finfo(dtype).eps ** 0.5 * max(scale, largest)
        else:
            bound = times * worst(plain, true) + rounding
            if kind == "g" and 0 < true.numel() < 32 and worst(got, true) > factor * bound:
                bound = times * plain_error(operator, inputs, doubled, case, index) + rounding
        assert worst(got, true) <= factor * bound, f"{kind}: {worst(got, true)} > {bound}"


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("operator", "case"), CASES)
def test_values_and_gradients(
    operator: Operator, case: dict[str, Any], dtype: torch.dtype, backend: str
) -> None:
    inputs = draw(operator, case, dtype)
    require(backend, operator, inputs, case)
    check(operator, inputs, case, dtype)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _sliced(x: Tensor) -> Tensor:
    """The same values inside a larger tensor: gaps between rows, channels and samples."""
    big = x.new_full([s + 2 for s in x.shape], torch.nan)
    inner = big[tuple(slice(1, s + 1) for s in x.shape)]
    inner.copy_(x)
    return inner


def _sliced_channels(x: Tensor) -> Tensor:
    big = x.new_full((x.shape[0], x.shape[1] + 3, *x.shape[2:]), torch.nan)
    big[:, 2:-1] = x
    return big[:, 2:-1]


def _expanded(x: Tensor) -> Tensor:
    return x[:1].expand(3, -1, -1, -1)


def _reversed_dims(x: Tensor) -> Tensor:
    return x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)


LAYOUTS = {
    "channels-last": _channels_last,
    "sliced": _sliced,
    "sliced-channels": _sliced_channels,
    "expanded": _expanded,
    "reversed": _reversed_dims,
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [DTYPES[name] for name in TWO_DTYPES], ids=TWO_DTYPES)
@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_layouts(
    operator: Operator, dtype: torch.dtype, layout: Callable[[Tensor], Tensor], backend: str
) -> None:
    for case in list(operator.cases.values())[:1] + list(operator.cases.values())[-2:]:
        shape = [case.get("shape", case.get("tokens"))]
        if layout is _expanded:
            key = "shape" if "shape" in case else "tokens"
            case = {**case, key: (3, *shape[0][1:])}
        inputs = draw(operator, case, dtype)
        inputs[operator.layout] = layout(inputs[operator.layout])
        require(backend, operator, inputs, case)
        if (
            layout is _channels_last
            and operator.layout == "x"
            and operator.name != "gate_statistics"
        ):
            out = operator.run(inputs, case)
            assert out.is_contiguous(memory_format=torch.channels_last)
        check(operator, inputs, case, dtype)


@pytest.mark.parametrize(("operator", "case"), FIRST_CASES)
def test_incoming_gradients_in_any_layout(
    operator: Operator, case: dict[str, Any], backend: str
) -> None:
    inputs = draw(operator, case, torch.float32)
    require(backend, operator, inputs, case)
    _, expected, grads = evaluate(operator.run, inputs, case)
    for change in (_sliced, _reversed_dims, _channels_last):
        changed = [change(g) if g.dim() == 4 else g.t().contiguous().t() for g in grads]
        _, got, _ = evaluate(operator.run, inputs, case, changed)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
    # The gradient of a sum is one element, expanded.
    ones = [g.new_ones(()).expand_as(g) for g in grads]
    _, got, _ = evaluate(operator.run, inputs, case, ones)
    _, expected, _ = evaluate(operator.run, inputs, case, [o.contiguous() for o in ones])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("operator", "case"), FIRST_CASES)
def test_nan_and_inf_reach_the_output(
    operator: Operator, case: dict[str, Any], value: float, backend: str
) -> None:
    for name in operator.make(case, torch.randn):
        inputs = draw(operator, case, torch.float32)
        if inputs[name] is None:
            continue
        require(backend, operator, inputs, case)
        target = inputs[name][0] if isinstance(inputs[name], list) else inputs[name]
        target[(target.shape[0] - 1, *(s // 2 for s in target.shape[1:]))] = value
        got = outputs(operator.run(inputs, case))
        expected = outputs(operator.direct(inputs, case))
        for a, b in zip(got, expected, strict=True):
            assert (~a.isfinite())[~b.isfinite()].all(), f"{name}: a value was masked away"
            # What the value does not touch stays finite wherever plain PyTorch keeps it finite per
            # sample: samples are independent.
            finite = b.isfinite().flatten(1).all(1)
            assert a.isfinite().flatten(1).all(1)[finite].all(), f"{name}: spread to other samples"


@pytest.mark.parametrize(("operator", "case"), FIRST_CASES)
def test_inputs_are_not_written_to(operator: Operator, case: dict[str, Any], backend: str) -> None:
    inputs = draw(operator, case, torch.float32)
    require(backend, operator, inputs, case)
    before = mapped(inputs, torch.clone)
    _, _, grads = evaluate(operator.run, inputs, case)
    grads_before = [g.clone() for g in grads]
    evaluate(operator.run, inputs, case, grads)
    for a, b in zip(leaves(inputs) + grads, leaves(before) + grads_before, strict=True):
        assert torch.equal(a, b)
        assert a._version == 0 or torch.equal(a, b)


@pytest.mark.parametrize("dtype", [DTYPES[name] for name in TWO_DTYPES], ids=TWO_DTYPES)
@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_repeatable_whatever_the_number_of_threads(
    operator: Operator, dtype: torch.dtype, backend: str
) -> None:
    # Not the case of 40 channels, except where there are no threads: from three on, MKL splits
    # products of that size, such as the C x C algebra of two operators, in another way.
    case = [c for n, c in operator.cases.items() if n != "ragged-blocks" or interpreted()][-1]
    inputs = draw(operator, case, dtype)
    require(backend, operator, inputs, case)
    threads = torch.get_num_threads()
    # Plain PyTorch promises the same bits for the same number of threads; compiled kernels for any.
    # The interpreter has no threads.
    once = backend == "reference" or interpreted()
    counts = (threads, threads) if once else (1, 2, 2, 3)
    try:
        results = []
        for count in counts:
            torch.set_num_threads(count)
            values, grads, _ = evaluate(operator.run, inputs, case)
            results.append((*values, *grads))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("operator", "case"), CASES)
def test_gradcheck(operator: Operator, case: dict[str, Any], backend: str) -> None:
    """First derivatives against finite differences; second ones on an operator's first case."""
    shape = case.get("shape", case.get("tokens"))
    if max(shape) > 40 or 0 in shape:
        pytest.skip("finite differences are for small cases")
    if case.get("ties"):
        pytest.skip("a maximum has no derivative at a tie")
    inputs = draw(operator, case, torch.float64)
    require(backend, operator, inputs, case)
    inputs = mapped(inputs, lambda t: t.contiguous().requires_grad_())
    flat = leaves(inputs)

    def function(*tensors: Tensor) -> Any:
        rest = iter(tensors)
        return operator.run(mapped(inputs, lambda _: next(rest)), case)

    assert torch.autograd.gradcheck(function, flat, fast_mode=True)
    if case is next(iter(operator.cases.values())):
        assert torch.autograd.gradgradcheck(function, flat, fast_mode=True)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels-last"])
@pytest.mark.parametrize(("operator", "case"), FIRST_CASES)
def test_opcheck(
    operator: Operator, case: dict[str, Any], channels_last: bool, backend: str
) -> None:
    torch.use_deterministic_algorithms(False)
    inputs = draw(operator, case, torch.float32)
    if channels_last:
        inputs[operator.layout] = _channels_last(inputs[operator.layout])
    require(backend, operator, inputs, case)
    inputs = mapped(inputs, lambda t: t.detach().requires_grad_())
    op = getattr(torch.ops.eamnet_kernels, operator.name)
    torch.library.opcheck(op.default, operator.raw(inputs, case), {"backend": backend})


class _Names(TorchDispatchMode):
    """Notes the operators that are called under it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("operator", "case"), FIRST_CASES)
def test_modes_and_kinds_of_tensors_that_dispatch(
    operator: Operator, case: dict[str, Any], grad: bool
) -> None:
    """What watches operators sees these; tensors without data get shapes and reach no kernel."""
    inputs = mapped(draw(operator, case, torch.float32), lambda t: t.requires_grad_(grad))
    expected = outputs(operator.run(inputs, case))

    names = _Names()
    with names:
        out = outputs(operator.run(inputs, case))
        if grad:
            torch.autograd.grad([o.sum() for o in out], leaves(inputs))
    for name in (operator.name, f"{operator.name}_backward")[: 1 + grad]:
        assert names.names.count(f"eamnet_kernels.{name}.default") == 1
    # Autograd makes no gradients of zeros for what is kept for the backward.
    assert not [name for name in names.names if "zeros" in name]

    mode = FakeTensorMode()
    fakes = mapped(inputs, mode.from_tensor)
    with mode:
        within = outputs(operator.run(fakes, case))
    after = outputs(operator.run(fakes, case))
    meta = outputs(operator.run(mapped(inputs, lambda t: t.detach().to("meta")), case))
    for want, *got in zip(expected, within, after, meta, strict=True):
        assert [(g.shape, g.dtype) for g in got] == [(want.shape, want.dtype)] * 3
        assert isinstance(got[0], FakeTensor)
        assert isinstance(got[1], FakeTensor)
        assert got[2].is_meta


@pytest.mark.parametrize(("operator", "case"), FIRST_CASES)
def test_a_view_that_negates(operator: Operator, case: dict[str, Any], backend: str) -> None:
    inputs = draw(operator, case, torch.float32)
    require(backend, operator, inputs, case)
    x = inputs[operator.layout]
    negated = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert negated.is_neg()
    got = outputs(operator.run({**inputs, operator.layout: negated}, case))
    torch.testing.assert_close(got, outputs(operator.run(inputs, case)))


@pytest.mark.parametrize(("operator", "case"), FIRST_CASES)
def test_a_result_that_nothing_depends_on(
    operator: Operator, case: dict[str, Any], backend: str
) -> None:
    """Its gradient is missing, which counts as zero."""
    inputs = draw(operator, case, torch.float32)
    require(backend, operator, inputs, case)

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> None:
            return None

    inputs = mapped(inputs, lambda t: t.requires_grad_())
    first, *others = outputs(operator.run(inputs, case))
    loss = Nothing.apply(first).sum() + sum((o.square().sum() for o in others), torch.zeros(()))
    loss.to(DEVICE).backward()
    if others:
        inputs_only = mapped(inputs, lambda t: t.detach().clone().requires_grad_())
        _, *others = outputs(operator.run(inputs_only, case))
        sum((o.square().sum() for o in others), torch.zeros((), device=DEVICE)).backward()
        for got, expected in zip(leaves(inputs), leaves(inputs_only), strict=True):
            torch.testing.assert_close(got.grad, expected.grad)
    else:
        assert all(t.grad is None or not t.grad.any() for t in leaves(inputs))


@pytest.mark.parametrize(("operator", "case"), FIRST_CASES)
def test_func_grad(operator: Operator, case: dict[str, Any], backend: str) -> None:
    inputs = draw(operator, case, torch.float64)
    require(backend, operator, inputs, case)

    def loss(value: Tensor) -> Tensor:
        out = outputs(operator.run({**inputs, operator.layout: value}, case))
        return sum((o.square().sum() for o in out), torch.zeros(()))

    x = inputs[operator.layout].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(x), x, create_graph=True)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected.detach())
    (second,) = torch.autograd.grad(expected.square().sum(), x)
    got = torch.func.grad(lambda v: torch.func.grad(loss)(v).square().sum())(x.detach())
    torch.testing.assert_close(got, second)


@not_interpreted
@pytest.mark.parametrize(("operator", "case"), FIRST_CASES)
def test_no_gradient_comes_in(operator: Operator, case: dict[str, Any], backend: str) -> None:
    """From what the results went into: then none goes out, and no backward runs."""

    class Ends(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *values: Tensor) -> tuple[Tensor, ...]:
            return tuple(value.clone() for value in values)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
            return (None,) * len(grads)

    inputs = draw(operator, case, torch.float32)
    require(backend, operator, inputs, case)
    inputs = mapped(inputs, lambda t: t.contiguous().requires_grad_())
    called = getattr(torch.ops.eamnet_kernels, operator.name)
    for results in (
        operator.run(inputs, case),
        called(*operator.raw(inputs, case), backend=backend),  # past `functional`
    ):
        ended = Ends.apply(*(out for out in outputs(results) if out.requires_grad))
        everything = sum((t.sum() for t in (*ended, *leaves(inputs))), torch.zeros(()))
        with _Names() as calls:
            grads = torch.autograd.grad(everything, leaves(inputs))
        assert not [name for name in calls.names if name.startswith("eamnet_kernels")]
        for grad in grads:
            assert grad.eq(1).all()


@not_interpreted
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("operator", "case"), FIRST_CASES)
def test_checkpointing_changes_nothing(
    operator: Operator, case: dict[str, Any], reentrant: bool, backend: str
) -> None:
    inputs = draw(operator, case, torch.float32)
    require(backend, operator, inputs, case)
    inputs = mapped(inputs, lambda t: t.contiguous().requires_grad_())
    flat = leaves(inputs)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        rest = iter(tensors)
        return outputs(operator.run(mapped(inputs, lambda _: next(rest)), case))

    found = []
    for out in (function(*flat), checkpoint(function, *flat, use_reentrant=reentrant)):
        sum(o.square().sum() for o in out).backward()
        found.append([t.grad for t in flat])
        for t in flat:
            t.grad = None
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@not_interpreted
@pytest.mark.parametrize(("operator", "case"), FIRST_CASES)
def test_a_transform_inside_of_autograd(
    operator: Operator, case: dict[str, Any], backend: str
) -> None:
    """The transform's operand needs no gradient, what the operator is given does all the same."""
    inputs = draw(operator, case, torch.float64)
    require(backend, operator, inputs, case)
    x = inputs[operator.layout].clone().requires_grad_()
    scale = torch.tensor(1.5, dtype=x.dtype, device=x.device)

    def loss(scale: Tensor) -> Tensor:
        out = outputs(operator.run({**inputs, operator.layout: x}, case))
        return sum((o.square().sum() * scale**2 for o in out), torch.zeros(()))

    got = torch.autograd.grad(torch.func.grad(loss)(scale), x)[0]
    expected = torch.autograd.grad(loss(scale) * 2 / scale, x)[0]
    torch.testing.assert_close(got, expected)


@not_interpreted
@pytest.mark.parametrize(("operator", "case"), FIRST_CASES)
def test_forward_mode_is_refused_and_not_zero(
    operator: Operator, case: dict[str, Any], backend: str
) -> None:
    inputs = draw(operator, case, torch.float32)
    require(backend, operator, inputs, case)
    x = inputs[operator.layout]
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        operator.run({**inputs, operator.layout: forward_ad.make_dual(x, x)}, case)


def test_compile_gives_the_same_values_and_gradients(backend: str) -> None:
    """All operators in one graph, without breaks, at two sizes with dynamic shapes."""
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    cases = {
        "gate_statistics": {"shape": (2, 8, 6, 10)},
        "cross_mix_pixels": {"tokens": (2, 2, 24, 8)},
        "cross_mix_channels": {"shape": (2, 8, 6, 10)},
        "external_memory": {"shape": (2, 8, 6, 10)},
        "multi_dilation_conv": {"shape": (2, 8, 6, 10)},
    }

    def everything(all_inputs: dict[str, Inputs]) -> list[Tensor]:
        out: list[Tensor] = []
        for name, inputs in all_inputs.items():
            out.extend(outputs(OPERATORS[name].run(inputs, cases[name])))
        return out

    compiled = torch.compile(everything, fullgraph=True, dynamic=True)
    for batch in (2, 3):
        all_inputs = {}
        for name, case in cases.items():
            key = "shape" if "shape" in case else "tokens"
            case = {key: (batch, *case[key][1:])}
            inputs = draw(OPERATORS[name], case, torch.float32)
            reason = backends.explain(name, *OPERATORS[name].raw(inputs, case)).reasons[backend]
            if reason is None or reason.startswith("can run"):
                all_inputs[name] = mapped(inputs, lambda t: t.detach().requires_grad_())
        if not all_inputs:
            pytest.skip(f"{backend} runs none of them here")
        flat = [leaf for inputs in all_inputs.values() for leaf in leaves(inputs)]
        results = []
        for function in (everything, compiled):
            out = function(all_inputs)
            loss = torch.stack([o.square().sum() for o in out]).sum()
            results.append((*out, *torch.autograd.grad(loss, flat)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("operator", "case"), FIRST_CASES)
def test_autocast(operator: Operator, case: dict[str, Any], backend: str) -> None:
    inputs = draw(operator, case, torch.float32)
    rounded = mapped(inputs, lambda t: t.bfloat16())
    require(backend, operator, rounded, case)
    with torch.autocast(DEVICE, torch.bfloat16):
        values, grads, _ = evaluate(operator.run, inputs, case)
    keeps = operator.name == "gate_statistics"
    assert all(v.dtype == (torch.float32 if keeps else torch.bfloat16) for v in values)
    assert all(g.dtype == torch.float32 for g in grads)
    assert not any(g.isnan().any() for g in grads)


@not_interpreted
@pytest.mark.parametrize(("operator", "case"), FIRST_CASES)
def test_second_derivatives_under_autocast_are_those_without(
    operator: Operator, case: dict[str, Any], backend: str
) -> None:
    inputs = draw(operator, case, torch.float32)
    require(backend, operator, inputs, case)
    inputs = mapped(inputs, lambda t: t.contiguous().requires_grad_())
    flat = leaves(inputs)
    out = outputs(operator.run(inputs, case))
    grads = torch.autograd.grad(sum(o.square().sum() for o in out), flat, create_graph=True)
    loss = sum(g.square().sum() for g in grads)
    expected = torch.autograd.grad(loss, flat, retain_graph=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = torch.autograd.grad(loss, flat)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_second_device(backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for operator in OPERATORS.values():
        case = next(iter(operator.cases.values()))
        inputs = mapped(draw(operator, case, torch.float32), lambda t: t.to("cuda:1"))
        require(backend, operator, inputs, case)
        check(operator, inputs, case, torch.float32)
