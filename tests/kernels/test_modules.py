"""CMAM, EAB and MRCF: what they compute, how they are configured, and how they are patched in."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from eamnet_kernels import CMAM, EAB, MRCF, use_backend
from eamnet_kernels.functional import gate_statistics
from eamnet_kernels.patch import patch, unpatch

MODULES: dict[str, Callable[[], nn.Module]] = {
    "cmam-channels": lambda: CMAM(8, heads=2),
    "cmam-pixels": lambda: CMAM(8, attend="pixels", heads=2),
    "cmam-serial": lambda: CMAM(8, fusion="serial"),
    "cmam-parallel": lambda: CMAM(8, fusion="parallel"),
    "eab": lambda: EAB(8, memory_size=6),
    "mrcf-dense": lambda: MRCF(8),
    "mrcf-depthwise": lambda: MRCF(8, depthwise=True),
}


@pytest.fixture(params=MODULES.values(), ids=MODULES)
def module(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = request.param()
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_keeps_shape_and_dtype_and_reaches_every_parameter(
    module: nn.Module, dtype: torch.dtype
) -> None:
    module = module.to(dtype)
    x = torch.randn(2, 8, 7, 5, dtype=dtype, requires_grad=True)
    out = module(x)
    assert out.shape == x.shape
    assert out.dtype == dtype
    out.square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_channels_last_gives_the_same(module: nn.Module) -> None:
    x = torch.randn(2, 8, 7, 5)
    module.eval()
    torch.testing.assert_close(module(x.to(memory_format=torch.channels_last)), module(x))


def test_exports(module: nn.Module) -> None:
    x = torch.randn(2, 8, 6, 5)
    module.eval()
    program = torch.export.export(
        module, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},)
    )
    torch.testing.assert_close(program.module()(x), module(x))
    bigger = torch.randn(3, 8, 6, 5)
    torch.testing.assert_close(program.module()(bigger), module(bigger))


def test_state_loads_strictly(module: nn.Module) -> None:
    x = torch.randn(2, 8, 6, 5)
    module.eval()
    expected = module(x)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    module.load_state_dict(state, strict=True)
    torch.testing.assert_close(module(x), expected)


def direct_cmam(m: CMAM, x: Tensor) -> Tensor:
    """The module's formula with the gated copies written out."""
    statistics = gate_statistics(x)
    g_s, g_c = m.spatial_gate(statistics), m.channel_gate(statistics)
    batch, channels, height, width = x.shape

    def heads(w: Tensor, gated: Tensor) -> list[Tensor]:
        projected = w @ gated.flatten(2)
        return [p.unflatten(1, (m.heads, -1)) for p in projected.chunk(3, 1)]

    q_s, k_s, v_s = heads(m.w_spatial, g_s * x)
    q_c, k_c, v_c = heads(m.w_channel, g_c[:, :, None, None] * x)
    scale = (channels // m.heads) ** -0.5

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (B,h,d,N)
        return v @ torch.softmax(scale * q.transpose(-1, -2) @ k, -1).transpose(-1, -2)

    mixed = (attend(q_s, k_c, v_c) + attend(q_c, k_s, v_s)).flatten(1, 2)
    return x + (m.w_out @ mixed).view(batch, channels, height, width)


def test_pixel_attention_is_the_formula() -> None:
    m = CMAM(12, attend="pixels", heads=3).double()
    x = torch.randn(2, 12, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(m(x), direct_cmam(m, x))


def test_fusions_are_the_plain_gates() -> None:
    x = torch.randn(2, 8, 5, 6)
    parallel = CMAM(8, fusion="parallel")
    statistics = gate_statistics(x)
    g_s, g_c = parallel.spatial_gate(statistics), parallel.channel_gate(statistics)
    torch.testing.assert_close(parallel(x), g_s * x + g_c[:, :, None, None] * x)
    serial = CMAM(8, fusion="serial")
    serial.load_state_dict(parallel.state_dict())
    gated = g_c[:, :, None, None] * x
    torch.testing.assert_close(serial(x), serial.spatial_gate(gate_statistics(gated)) * gated)


def test_bridge_is_the_formula() -> None:
    m = EAB(8, memory_size=6, top_k=8).eval()
    x = torch.randn(2, 8, 5, 4)
    attention = torch.softmax(m.memory_key @ (m.w_in @ x.flatten(2)), -1)
    attention = attention / (1e-9 + attention.sum(1, keepdim=True))
    attended = (m.w_out @ m.memory_value.t() @ attention).view_as(x)
    torch.testing.assert_close(m(x), torch.relu(m.norm(attended) + x))


def test_a_bias_before_the_memory_would_change_nothing() -> None:
    m = EAB(8, memory_size=6).double().eval()
    x = torch.randn(2, 8, 5, 4, dtype=torch.float64)
    shifted = torch.linalg.solve(m.w_in, torch.randn(8, dtype=torch.float64))
    attended = [
        torch.ops.eamnet_kernels.external_memory(
            z, m.memory_key @ m.w_in, m.memory_value, m.w_out, 4
        )[0]
        for z in (x, x + shifted[:, None, None])
    ]
    torch.testing.assert_close(*attended)


def test_fusion_is_the_formula() -> None:
    m = MRCF(8, dilations=(1, 4, 2)).eval()
    x = torch.randn(2, 8, 9, 8)
    first, *groups = x.chunk(4, 1)
    branches = [
        torch.relu(nn.functional.conv2d(g, w, padding=d, dilation=d))
        for g, w, d in zip(groups, m.w_branches, m.dilations, strict=True)
    ]
    mixed = nn.functional.conv2d(torch.cat((first, *branches), 1), m.w_point[:, :, None, None])
    torch.testing.assert_close(m(x), torch.relu(m.norm(mixed)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CMAM(8, attend="rows"), "attend='rows'"),  # type: ignore[arg-type]
        (lambda: CMAM(8, fusion="sum"), "fusion='sum'"),  # type: ignore[arg-type]
        (lambda: CMAM(8, heads=3), "heads=3; accepted: a divisor"),
        (lambda: CMAM(0), "channels=0"),
        (lambda: EAB(8, memory_size=0), "memory_size=0"),
        (lambda: EAB(8, top_k=9), "top_k=9; accepted: 1 to channels=8"),
        (lambda: MRCF(10), "channels=10 do not divide into 4"),
        (lambda: MRCF(8, dilations=()), "one or more"),
    ],
)
def test_bad_configurations(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def network() -> nn.Sequential:
    shared = nn.Conv2d(8, 8, 1)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(shared, nn.ReLU()), shared)


def test_patch_and_unpatch_restore_the_same_objects() -> None:
    net = network().double().eval()
    x = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    before, originals = net(x), list(net.modules())
    replaced = patch(net, lambda name, m: nn.Sequential(m, MRCF(8)) if name == "1.0" else None)
    assert replaced == ["1.0", "2"]
    assert net[2] is net[1][0]
    assert not net[2].training
    assert next(net[2][1].parameters()).dtype == torch.float64
    assert net(x).shape == before.shape
    assert not torch.equal(net(x), before)
    assert unpatch(net) == ["1.0", "2"]
    assert list(net.modules()) == originals
    assert torch.equal(net(x), before)


def test_patch_of_a_container_that_the_network_holds_twice() -> None:
    shared = nn.Sequential(nn.Conv2d(4, 4, 1))
    net = nn.Sequential(nn.Sequential(shared), nn.Sequential(shared))
    asked: list[str] = []

    def rule(name: str, m: nn.Module) -> nn.Module | None:
        asked.append(name)
        return nn.Sequential(m, CMAM(4)) if isinstance(m, nn.Conv2d) else None

    original = shared[0]
    assert patch(net, rule) == ["0.0.0"]
    assert asked == ["0", "0.0", "0.0.0", "1"]
    assert net(torch.randn(1, 4, 3, 3)).shape == (1, 4, 3, 3)
    assert unpatch(net) == ["0.0.0"]
    assert shared[0] is original


def test_patch_leaves_the_original_in_the_replacement_as_it_is() -> None:
    """Such as a frozen norm in float32 beside convolutions in bfloat16."""
    norm = nn.BatchNorm2d(4).eval()
    net = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1).bfloat16(), norm))
    patch(net, lambda name, m: nn.Sequential(m, CMAM(4)) if name == "0" else None)
    assert {p.dtype for p in net[0][1].parameters()} == {torch.bfloat16}
    assert net[0][1].training
    assert not norm.training
    assert {p.dtype for p in norm.parameters()} == {torch.float32}


def test_patch_under_two_names_of_one_parent_and_twice() -> None:
    conv = nn.Conv2d(4, 4, 1)
    net = nn.Sequential(nn.Sequential(conv, conv))
    assert patch(net, lambda name, m: CMAM(4) if m is conv else None) == ["0.0", "0.1"]
    assert net[0][0] is net[0][1] is not conv
    outer = net[0]
    assert patch(net, lambda name, m: nn.Sequential(m) if m is outer else None) == ["0"]
    assert unpatch(net) == ["0", "0.0", "0.1"]
    assert net[0] is outer
    assert outer[0] is outer[1] is conv


def test_parameters_are_drawn_after_to_empty(module: nn.Module) -> None:
    """As for networks that are made on the meta device: every parameter belongs to a reset."""
    for parameter in module.parameters():
        nn.init.constant_(parameter, 777.0)
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    for name, parameter in module.named_parameters():
        assert not parameter.eq(777).any(), name


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_can_be_saved(module: nn.Module) -> None:
    x = torch.randn(1, 8, 5, 6)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, x, check_trace=False), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), module(x))


def test_patch_that_does_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"replaced none.*1\.0"):
        patch(network(), lambda name, m: None)
    with pytest.raises(TypeError, match="returned a str for 0"):
        patch(network(), lambda name, m: "CMAM")  # type: ignore[arg-type,return-value]


def test_modules_agree_between_backends(module: nn.Module) -> None:
    x = torch.randn(2, 8, 9, 7)
    module.eval()
    with use_backend("reference"):
        expected = module(x)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
