"""EAM-Net: one tester for every configuration, and what only one configuration can show."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import eamnet.model
from eamnet.blocks import MultiScaleHead, ResidualBlock, pad_to_multiple
from eamnet.complexity import count_complexity, count_parameters
from eamnet.model import (
    EAMNet,
    EAMNetConfig,
    EAMNetOutput,
    available_weights,
    weights_metadata,
)
from eamnet_kernels.modules import CMAM

TINY = EAMNetConfig(
    widths=(4, 8, 8, 16),
    blocks=(1, 1, 1, 1),
    decoder_widths=(4, 8, 8),
    heads=(1, 2, 2, 2),
    memory_size=4,
    reduction=4,
)
CONFIGURATIONS = {
    "default": TINY,
    "no_mrcf": replace(TINY, mrcf=False),
    "no_eab": replace(TINY, eab=False),
    "no_cmam": replace(TINY, cmam="none"),
    "serial": replace(TINY, cmam="serial"),
    "parallel": replace(TINY, cmam="parallel"),
    "no_msdf": replace(TINY, msdf=False),
    "no_msef": replace(TINY, msef=False),
    "plain": replace(TINY, mrcf=False, eab=False, cmam="none", msdf=False, msef=False),
    "depthwise": replace(TINY, depthwise=True),
    "all_pixels": replace(TINY, attend=("pixels",) * 4),
    "other_choices": replace(
        TINY, attend=("channels",) * 4, top_k=TINY.widths, dilations=(1,), activation="silu"
    ),
    "multiclass_multispectral": replace(TINY, in_channels=5, num_classes=4),
    "three_stages": replace(
        TINY,
        widths=(4, 8, 12),
        blocks=(2, 1, 1),
        decoder_widths=(8, 4),
        decoder_blocks=(2, 1),
        attend=("channels", "pixels", "pixels"),
        heads=(2, 2, 3),
    ),
}
PICTURE_SIZES = [(61, 83), (32, 32), (16, 130), (9, 7), (1, 1)]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(config: EAMNetConfig, seed: int = 0) -> EAMNet:
    torch.manual_seed(seed)
    return EAMNet(config)


def picture(config: EAMNetConfig, batch: int, height: int, width: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, config.in_channels, height, width, generator=generator)


def with_used_statistics(model: EAMNet) -> EAMNet:
    """Evaluation mode, with running statistics and affine parameters unlike a fresh network's."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(picture(model.config, 4, 32, 32))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.2, 0.2)
    return model.eval()


@pytest.fixture(params=CONFIGURATIONS, scope="class")
def config(request: pytest.FixtureRequest) -> EAMNetConfig:
    return CONFIGURATIONS[request.param]


@pytest.fixture(scope="class")
def model(config: EAMNetConfig) -> EAMNet:
    """A network in evaluation mode that the tests of a configuration share and do not change."""
    return with_used_statistics(build(config))


class TestEveryConfiguration:
    @pytest.mark.parametrize("size", PICTURE_SIZES)
    def test_forward_keeps_the_picture_size(
        self, config: EAMNetConfig, model: EAMNet, size: tuple[int, int]
    ) -> None:
        with torch.no_grad():
            logits = model(picture(config, 2, *size))
        assert isinstance(logits, Tensor)
        assert logits.shape == (2, config.num_classes, *size)
        assert logits.isfinite().all()
        assert logits.dtype == torch.float32

    def test_training_output(self, config: EAMNetConfig) -> None:
        output = build(config).train()(picture(config, 2, 21, 40))
        assert isinstance(output, EAMNetOutput)
        assert output.logits.shape == (2, config.num_classes, 21, 40)
        if config.msef:
            assert output.auxiliary is not None
            assert output.auxiliary.shape == output.logits.shape
        else:
            assert output.auxiliary is None

    def test_every_parameter_gets_a_finite_gradient(self, config: EAMNetConfig) -> None:
        # Without ReLU in the branches: on maps smaller than a dilation a branch of a few channels
        # may be dead from the start.
        network = build(replace(config, activation="silu")).train()
        output = network(picture(config, 2, 32, 32))
        loss = output.logits.square().mean()
        if output.auxiliary is not None:
            loss = loss + output.auxiliary.square().mean()
        loss.backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), f"{name} does not reach the output"

    def test_empty_batch(self, config: EAMNetConfig, model: EAMNet) -> None:
        assert model(picture(config, 0, 16, 24)).shape == (0, config.num_classes, 16, 24)

    def test_pictures_of_a_batch_are_independent(self, config: EAMNetConfig, model: EAMNet) -> None:
        pictures = picture(config, 3, 24, 16)
        with torch.no_grad():
            together = model(pictures)
            alone = torch.cat([model(p[None]) for p in pictures])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)

    def test_determinism(self, config: EAMNetConfig) -> None:
        def gradients() -> list[Tensor]:
            network = build(config).train()
            network(picture(config, 2, 24, 32)).logits.square().sum().backward()
            return [p.grad for p in network.parameters() if p.grad is not None]

        torch.use_deterministic_algorithms(True)
        try:
            first, second = gradients(), gradients()
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_double_precision_agrees(self, config: EAMNetConfig, model: EAMNet) -> None:
        x = picture(config, 2, 24, 32)
        with torch.no_grad():
            double = copy.deepcopy(model).double()(x.double())
            single = model(x)
        assert double.dtype == torch.float64
        scale = double.abs().max()
        assert (single - double).abs().max() < 1e-4 * scale

    def test_channels_last_agrees(self, config: EAMNetConfig, model: EAMNet) -> None:
        x = picture(config, 2, 24, 32)
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        with torch.no_grad():
            torch.testing.assert_close(
                last(x.contiguous(memory_format=torch.channels_last)),
                model(x),
                rtol=1e-4,
                atol=1e-5,
            )

    def test_autocast_stays_finite(self, config: EAMNetConfig) -> None:
        network = build(config).train()
        with torch.autocast("cpu", torch.bfloat16):
            output = network(picture(config, 2, 24, 32))
        output.logits.float().square().mean().backward()
        assert output.logits.isfinite().all()
        assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)

    def test_save_and_load(self, config: EAMNetConfig, model: EAMNet, tmp_path: Path) -> None:
        path = model.save_pretrained(tmp_path / "folder" / "weights.safetensors")
        random_state = torch.get_rng_state()
        loaded = EAMNet.from_pretrained(path)
        assert torch.equal(torch.get_rng_state(), random_state)
        assert loaded.config == config
        assert not loaded.training
        state = loaded.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())

    def test_half_storage(self, config: EAMNetConfig, model: EAMNet, tmp_path: Path) -> None:
        whole = model.save_pretrained(tmp_path / "whole.safetensors")
        half = model.save_pretrained(tmp_path / "half.safetensors", dtype=torch.float16)
        stored = load_file(half)
        assert all(t.dtype == torch.float16 for t in stored.values() if t.is_floating_point())
        assert half.stat().st_size < whole.stat().st_size
        loaded = EAMNet.from_pretrained(half)
        for name, tensor in model.state_dict().items():
            restored = loaded.state_dict()[name]
            assert restored.dtype == tensor.dtype, name
            torch.testing.assert_close(restored, tensor, rtol=2**-11, atol=2**-24)

    def test_configuration_round_trip(self, config: EAMNetConfig) -> None:
        assert EAMNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


# Tracing takes seconds: those configurations that hold every module in every form between them.
@pytest.mark.parametrize(
    "config", ["default", "serial", "parallel", "plain", "other_choices"], indirect=True
)
class TestTracing:
    def test_compile_is_one_graph_with_the_same_values(
        self, config: EAMNetConfig, model: EAMNet
    ) -> None:
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        x = picture(config, 2, 19, 32)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)

    def test_export_with_a_free_batch(self, config: EAMNetConfig, model: EAMNet) -> None:
        batch = torch.export.Dim("batch")
        with torch.no_grad():
            program = torch.export.export(
                model, (picture(config, 2, 24, 32),), dynamic_shapes={"x": {0: batch}}
            )
            for size in (1, 5):
                x = picture(config, size, 24, 32)
                torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


def parts(config: EAMNetConfig) -> dict[str, int]:
    """Parameters that each module adds, from the definitions alone."""
    groups = len(config.dilations) + 1
    widths, slots = config.widths, config.memory_size
    hidden = [max(4, c // config.reduction) for c in widths]
    gates = sum(2 * c * m + c + m + 2 * 49 + 1 for c, m in zip(widths, hidden, strict=True))
    temperatures = sum(
        2 * heads
        for heads, attend in zip(config.heads_per_scale, config.attend, strict=True)
        if attend == "channels"
    )
    return {
        "mrcf": sum((groups - 1) * 9 * (c // groups) ** 2 + c * c + 2 * c for c in widths),
        "eab": sum(2 * c * c + 2 * slots * c + 2 * c for c in widths),
        "gates": gates,
        "cmam": gates + sum(7 * c * c for c in widths) + temperatures,
        "msdf": sum((c + 1) * config.num_classes for c in config.decoder_widths[1:])
        + (len(config.decoder_widths) * config.num_classes + 1) * config.num_classes,
        "msef": sum((c + 1) * config.num_classes for c in widths)
        + (len(widths) * config.num_classes + 1) * config.num_classes,
    }


@pytest.mark.parametrize(
    ("change", "fewer"),
    [
        ({"mrcf": False}, ["mrcf"]),
        ({"eab": False}, ["eab"]),
        ({"cmam": "none"}, ["cmam"]),
        ({"msdf": False}, ["msdf"]),
        ({"msef": False}, ["msef"]),
        (
            {"mrcf": False, "eab": False, "cmam": "none", "msdf": False, "msef": False},
            ["mrcf", "eab", "cmam", "msdf", "msef"],
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, (dict, list)) else None,
)
@pytest.mark.parametrize("config", [EAMNetConfig(), replace(TINY, num_classes=3)])
def test_an_ablation_removes_its_module_and_nothing_else(
    config: EAMNetConfig, change: dict[str, Any], fewer: list[str]
) -> None:
    full, ablated = EAMNet(config), EAMNet(replace(config, **change))
    removed = sum(parts(config)[name] for name in fewer)
    assert count_parameters(full) - count_parameters(ablated) == removed
    kept = {name: t.shape for name, t in ablated.state_dict().items()}
    assert kept.items() <= {name: t.shape for name, t in full.state_dict().items()}.items()


@pytest.mark.parametrize("fusion", ["serial", "parallel"])
def test_gate_fusions_keep_the_gates_alone(fusion: Any) -> None:
    def attention(config: EAMNetConfig) -> int:
        plain = EAMNet(replace(config, cmam="none"))
        return count_parameters(EAMNet(config)) - count_parameters(plain)

    assert attention(replace(TINY, cmam=fusion)) == parts(TINY)["gates"]


@pytest.mark.parametrize("folded", [False, True])
def test_size_of_the_paper(folded: bool) -> None:
    """4.6 M parameters and 16.85 G multiply-accumulates at 256x256, within 2 %."""
    counted = count_complexity(EAMNet(), folded=folded)
    assert counted.parameters == pytest.approx(4.6e6, rel=0.02)
    assert counted.macs == pytest.approx(16.85e9, rel=0.02)
    print(f"{counted.parameters / 1e6:.3f} M parameters, {counted.macs / 1e9:.3f} G MACs")


def test_size_of_the_paper_with_the_memory_unfolded() -> None:
    """Even where the bridge's input projection is applied to the pixels, not to the memory."""
    config = EAMNetConfig()
    more = sum(c**2 * (256 >> i) ** 2 for i, c in enumerate(config.widths))
    assert count_complexity(EAMNet(config)).macs + more == pytest.approx(16.85e9, rel=0.02)


def closed_form_macs(config: EAMNetConfig, size: int, folded: bool) -> int:
    """MACs with every module on, from the equations, written apart from the counter."""

    def residual(c_in: int, c_out: int) -> int:
        return 9 * c_in * c_out + 9 * c_out**2 + (c_in != c_out) * c_in * c_out

    total, previous = 0, config.in_channels
    for i, c in enumerate(config.widths):
        pixels, slots, d = (size >> i) ** 2, config.memory_size, c // config.heads_per_scale[i]
        per_pixel = residual(previous, c) + (config.blocks[i] - 1) * residual(c, c)
        group = c // (len(config.dilations) + 1)
        per_pixel += len(config.dilations) * 9 * group**2 + c**2  # MRCF
        per_pixel += 4 * slots * c if folded else 2 * slots * c + c**2  # EAB
        total += slots * c**2 + folded * slots * c**2
        per_pixel += 2 * 49  # spatial gate
        total += 2 * 2 * c * max(4, c // config.reduction)  # channel gate
        if config.attend[i] == "pixels":
            per_pixel += 7 * c**2 + 4 * pixels * c
        elif folded:
            per_pixel += 5 * c**2  # three Gram matrices and two products to apply
            total += 8 * c**3 + 4 * c**2 * d
        else:
            per_pixel += 7 * c**2 + 4 * d * c
        total += per_pixel * pixels
        previous = c
    for i, c in reversed(list(enumerate(config.widths[:-1]))):
        out = config.decoder_widths[i]
        per_pixel = previous * c + residual(2 * c, out)
        per_pixel += (config.decoder_blocks[i] - 1) * residual(out, out)
        total += (per_pixel + out * config.num_classes) * (size >> i) ** 2
        previous = out
    return total + size**2 * len(config.decoder_widths) * config.num_classes**2


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("config", [EAMNetConfig(), replace(TINY, num_classes=3)])
def test_counted_macs_are_those_of_the_equations(config: EAMNetConfig, folded: bool) -> None:
    counted = count_complexity(EAMNet(config), (64, 64), folded=folded)
    assert counted.macs == closed_form_macs(config, 64, folded)


def test_counting_changes_nothing_and_sums_up() -> None:
    model = build(TINY).train()
    before = copy.deepcopy(model.state_dict())
    counted = count_complexity(model, (40, 48))
    assert model.training
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    top = [f"{group}.{i}" for group in ("stages", "bridges", "decoder") for i in range(4)]
    names = [*top, "bottom", "msdf"]
    assert sum(counted.by_module.get(name, 0) for name in names) == counted.macs


def test_padding_repeats_the_edge_below_and_right() -> None:
    x = picture(TINY, 2, 13, 8)
    padded = pad_to_multiple(x, 8)
    assert padded.shape == (2, 3, 16, 8)
    assert torch.equal(padded[:, :, :13], x)
    assert torch.equal(padded[:, :, 13:], x[:, :, 12:].expand(-1, -1, 3, -1))
    model = with_used_statistics(build(TINY))
    with torch.no_grad():
        assert torch.equal(model(x), model(padded)[:, :, :13])


def test_residual_block_keeps_the_scale_of_its_input() -> None:
    """Kaiming initialisation: neither vanishing nor exploding over many blocks."""
    torch.manual_seed(0)
    x = torch.randn(8, 16, 16, 16).relu()
    with torch.no_grad():
        for _ in range(10):
            x = ResidualBlock(16, 16).eval()(x)
    assert 0.1 < x.std() < 1e3


def test_residual_block_shortcut() -> None:
    assert isinstance(ResidualBlock(8, 8).shortcut, nn.Identity)
    block = ResidualBlock(4, 8).eval()
    x = torch.randn(1, 4, 5, 5)
    nn.init.zeros_(block.bn2.weight)
    with torch.no_grad():
        torch.testing.assert_close(block(x), F.relu(block.shortcut(x)))


def test_multi_scale_head_starts_as_the_mean_of_its_scales() -> None:
    head = MultiScaleHead((4, 6), num_classes=3)
    fine, coarse = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4)
    up = F.interpolate(head.heads[1](coarse), size=(8, 8), mode="bilinear", align_corners=False)
    expected = (head.heads[0](fine) + up) / 2
    torch.testing.assert_close(head((fine, coarse)), expected)


def test_attention_sits_where_it_should() -> None:
    attends = {name: m.attend for name, m in EAMNet().named_modules() if isinstance(m, CMAM)}
    assert attends == {
        "bottom": "pixels",
        "decoder.0.attention": "channels",
        "decoder.1.attention": "channels",
        "decoder.2.attention": "channels",
    }


# Compiling takes time in proportion to the number of modules: two stages hold one of each.
TWO_STAGES = EAMNetConfig(
    widths=(4, 8),
    blocks=(1, 1),
    decoder_widths=(4,),
    decoder_blocks=(1,),
    attend=("channels", "pixels"),
    heads=2,
    memory_size=4,
)


def test_inductor_gives_the_same_values() -> None:
    torch.compiler.reset()
    model = with_used_statistics(build(TWO_STAGES))
    x = picture(TWO_STAGES, 2, 24, 32)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)(x)
        torch.testing.assert_close(compiled, model(x), rtol=1e-4, atol=1e-5)


def test_compiled_training_gives_the_same_gradients() -> None:
    torch.compiler.reset()
    x = picture(TWO_STAGES, 2, 16, 16)
    gradients = []
    for compile_it in (False, True):
        model = build(TWO_STAGES).double().train()
        network = torch.compile(model, fullgraph=True, backend="aot_eager") if compile_it else model
        output = network(x.double())
        loss: Tensor = output.logits.square().mean() + output.auxiliary.square().mean()
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_export_with_free_height_and_width() -> None:
    model = with_used_statistics(build(TINY))
    rows, columns = torch.export.Dim("rows", min=2), torch.export.Dim("columns", min=2)
    with torch.no_grad():
        program = torch.export.export(
            model,
            (picture(TINY, 2, 40, 48),),
            dynamic_shapes={"x": {0: torch.export.Dim("batch"), 2: 8 * rows, 3: 8 * columns}},
        )
        x = picture(TINY, 3, 64, 24)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


def test_learns_blobs_by_heart() -> None:
    """Eight ellipses on a textured ground: a network that cannot fit them is wired wrongly."""
    torch.manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    centre = torch.rand(8, 2, 1, 1) * 16 + 8
    radius = torch.rand(8, 2, 1, 1) * 5 + 4
    distance = ((rows - centre[:, 0]) / radius[:, 0]) ** 2
    distance = distance + ((columns - centre[:, 1]) / radius[:, 1]) ** 2
    masks = (distance < 1).float()[:, None]
    colour = torch.rand(8, 3, 1, 1) * 0.3
    pictures = 0.6 - colour * masks + 0.1 * torch.randn(8, 3, 32, 32)

    model = build(TINY).train()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        logits, auxiliary = model(pictures)
        loss = F.binary_cross_entropy_with_logits(logits, masks)
        loss = loss + 0.4 * F.binary_cross_entropy_with_logits(auxiliary, masks)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    with torch.no_grad():
        predicted = (model.eval()(pictures) > 0).float()
    dice = 2 * (predicted * masks).sum() / (predicted.sum() + masks.sum())
    assert losses[-1] < 0.15 * losses[0]
    assert dice > 0.95


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("in_channels", 0, ValueError),
        ("in_channels", 3.0, TypeError),
        ("num_classes", True, TypeError),
        ("num_classes", -1, ValueError),
        ("widths", (32,), ValueError),
        ("widths", 32, TypeError),
        ("widths", (32, 64, 128, 250), ValueError),
        ("widths", (32, 64, 0, 256), ValueError),
        ("blocks", (1, 2, 2), ValueError),
        ("blocks", (1, 2, 2, 0), ValueError),
        ("decoder_widths", (16, 64, 128, 256), ValueError),
        ("decoder_blocks", (1, 1), ValueError),
        ("dilations", (3, 0), ValueError),
        ("dilations", (3, 5), ValueError),
        ("depthwise", 1, TypeError),
        ("mrcf", "yes", TypeError),
        ("memory_size", 0, ValueError),
        ("top_k", 0, ValueError),
        ("top_k", 33, ValueError),
        ("top_k", (32, 64, 128), ValueError),
        ("top_k", (32, 64, 128, 257), ValueError),
        ("cmam", "mixed", ValueError),
        ("attend", "pixels", TypeError),
        ("attend", ("channels", "pixels"), ValueError),
        ("attend", ("channels", "channels", "channels", "slots"), ValueError),
        ("heads", (1, 2), ValueError),
        ("heads", (1, 3, 4, 8), ValueError),
        ("heads", 3, ValueError),
        ("heads", None, TypeError),
        ("activation", "tanh", ValueError),
        ("reduction", 0, ValueError),
    ],
)
def test_invalid_configuration_names_the_field(
    field: str, value: Any, error: type[Exception]
) -> None:
    named = {"dilations": "dilations|widths"}.get(field, field)
    with pytest.raises(error, match=rf"EAMNetConfig\.({named}):"):
        EAMNetConfig(**{field: value})


def test_unknown_field_is_an_error_with_a_hint() -> None:
    with pytest.raises(ValueError, match=r"'memory_sise'.*'memory_size'"):
        EAMNetConfig.from_dict({"memory_sise": 64})


def test_configuration_accepts_lists_and_is_hashable() -> None:
    config = EAMNetConfig.from_dict({"widths": [32, 64, 128, 256], "attend": ["channels"] * 4})
    assert config.widths == (32, 64, 128, 256)
    assert hash(config) == hash(replace(EAMNetConfig(), attend=("channels",) * 4))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(3, 32, 32), ValueError, r"\(B, 3, H, W\).*\(3, 32, 32\)"),
        (torch.zeros(1, 4, 32, 32), ValueError, r"\(B, 3, H, W\).*\(1, 4, 32, 32\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, "floating-point.*uint8"),
        (torch.zeros(1, 3, 0, 32), ValueError, "H, W >= 1"),
        (torch.zeros(1, 3, 8, 5), ValueError, "batch normalisation"),
    ],
)
def test_wrong_input_says_what_is_accepted(x: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(TINY).train()(x)


def test_smallest_training_inputs() -> None:
    model = build(TINY).train()
    assert model(picture(TINY, 2, 1, 1)).logits.shape == (2, 1, 1, 1)
    assert model(picture(TINY, 1, 9, 1)).logits.shape == (1, 1, 9, 1)


class TestWeights:
    @pytest.fixture
    def saved(self, tmp_path: Path) -> Path:
        return build(TINY).save_pretrained(tmp_path / "weights.safetensors")

    def rewrite(self, path: Path, tensors: dict[str, Tensor], config: object = TINY) -> None:
        text = json.dumps(config.to_dict() if isinstance(config, EAMNetConfig) else config)
        save_file(tensors, path, metadata={"eamnet_config": text})

    def test_missing_and_unexpected_tensors_are_named(self, saved: Path) -> None:
        tensors = load_file(saved)
        del tensors["decoder.0.up.weight"]
        tensors["decoder.0.upp.weight"] = torch.zeros(1)
        self.rewrite(saved, tensors)
        with pytest.raises(ValueError, match=r"(?s)decoder\.0\.up\.weight.*decoder\.0\.upp"):
            EAMNet.from_pretrained(saved)

    def test_wrong_shape_is_named(self, saved: Path) -> None:
        tensors = load_file(saved)
        tensors["decoder.0.up.weight"] = torch.zeros(1)
        self.rewrite(saved, tensors)
        with pytest.raises(ValueError, match=r"decoder\.0\.up\.weight"):
            EAMNet.from_pretrained(saved)

    def test_unknown_configuration_field(self, saved: Path) -> None:
        self.rewrite(saved, load_file(saved), {**TINY.to_dict(), "gamma": 1})
        with pytest.raises(ValueError, match="gamma"):
            EAMNet.from_pretrained(saved)

    def test_no_configuration(self, saved: Path) -> None:
        save_file(load_file(saved), saved)
        with pytest.raises(ValueError, match="no EAM-Net configuration"):
            EAMNet.from_pretrained(saved)

    def test_pickle_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "weights.safetensors"
        path.write_bytes(pickle.dumps({"weight": 1}))
        with pytest.raises(ValueError, match="not a safetensors file"):
            EAMNet.from_pretrained(path)

    def test_truncated_file(self, saved: Path) -> None:
        saved.write_bytes(saved.read_bytes()[:-100])
        with pytest.raises(ValueError, match="not a safetensors file"):
            EAMNet.from_pretrained(saved)

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
            EAMNet.from_pretrained(tmp_path / "none.safetensors")

    def test_bundled_names(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(eamnet.model, "_WEIGHTS", tmp_path)
        with pytest.raises(FileNotFoundError, match=r"'lesion'.*there are none"):
            EAMNet.from_pretrained("lesion")
        build(TINY).save_pretrained(tmp_path / "lesion.safetensors")
        assert available_weights() == ["lesion"]
        assert EAMNet.from_pretrained("lesion").config == TINY
        with pytest.raises(FileNotFoundError, match=r"'lesions'.*: lesion$"):
            EAMNet.from_pretrained("lesions")

    def test_metadata(self, tmp_path: Path) -> None:
        path = build(TINY).save_pretrained(tmp_path / "w.safetensors", metadata={"size": "128"})
        metadata = weights_metadata(path)
        assert metadata["size"] == "128"
        assert EAMNetConfig.from_dict(json.loads(metadata["eamnet_config"])) == TINY
        assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]

    def test_a_failed_write_leaves_the_old_file(
        self, saved: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
            path.write_bytes(b"half")
            raise OSError("disk full")

        before = saved.read_bytes()
        monkeypatch.setattr(eamnet.model, "save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            build(TINY, seed=1).save_pretrained(saved)
        assert saved.read_bytes() == before
        assert list(saved.parent.iterdir()) == [saved]

    def test_file_ending(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"path: .*safetensors.*weights\.pt"):
            build(TINY).save_pretrained(tmp_path / "weights.pt")

    def test_overflow_in_storage(self, tmp_path: Path) -> None:
        model = build(TINY)
        model.get_buffer("decoder.0.blocks.0.bn1.running_var").fill_(1e6)
        with pytest.raises(ValueError, match="running_var"):
            model.save_pretrained(tmp_path / "half.safetensors", dtype=torch.float16)

    def test_channels_last_weights(self, tmp_path: Path) -> None:
        model = build(TINY).to(memory_format=torch.channels_last)
        loaded = EAMNet.from_pretrained(model.save_pretrained(tmp_path / "w.safetensors"))
        name = "stages.0.blocks.0.conv1.weight"
        assert torch.equal(loaded.get_parameter(name), model.get_parameter(name))

    def test_target_dtype(self, saved: Path) -> None:
        loaded = EAMNet.from_pretrained(saved, dtype=torch.float64)
        assert loaded(picture(TINY, 1, 16, 16).double()).dtype == torch.float64


def test_state_names_and_shapes_are_stable() -> None:
    """Published weights depend on them: a change needs a conversion and a new digest here."""
    lines = [f"{name} {tuple(t.shape)}" for name, t in EAMNet().state_dict().items()]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert (len(lines), digest[:16]) == (297, "2b68dede7add4e25")
