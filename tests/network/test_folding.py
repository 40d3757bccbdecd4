"""A folded network computes what the network computes, and leaves it alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from eamnet.folding import fold, native_bfloat16
from eamnet.model import EAMNet, EAMNetConfig
from eamnet_kernels.modules import EAB

from .test_model import CONFIGURATIONS, TINY


def network(config: EAMNetConfig) -> EAMNet:
    """As training might leave it: no batch norm close to the identity, and all biases used."""
    torch.manual_seed(0)
    model = EAMNet(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def picture(config: EAMNetConfig, *size: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(2, config.in_channels, *size, generator=generator)
    return x.contiguous(memory_format=torch.channels_last)


def distance(got: Tensor, truth: Tensor) -> float:
    return ((got.double() - truth.double()).abs().max() / truth.abs().max()).item()


@pytest.mark.parametrize("size", [(16, 24), (13, 9)], ids=["whole", "odd"])
@pytest.mark.parametrize("config", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
@torch.inference_mode()
def test_float32_is_the_same(config: EAMNetConfig, size: tuple[int, int]) -> None:
    model = network(config)
    x = picture(config, *size)
    got = fold(model)(x)
    assert got.dtype == torch.float32
    assert distance(got, model.double()(x.double())) < 1e-5


@pytest.mark.parametrize("name", ["default", "depthwise", "all_pixels", "plain"])
@torch.inference_mode()
def test_bfloat16_is_close(name: str) -> None:
    # Without selection: which channels are kept is a matter of rounding with random weights.
    config = CONFIGURATIONS[name]
    config = EAMNetConfig.from_dict({**config.to_dict(), "top_k": list(config.widths)})
    model = network(config)
    x = picture(config, 24, 32).bfloat16()
    got = fold(model, torch.bfloat16)(x)
    assert got.dtype == torch.bfloat16
    assert distance(got, model(x.float())) < 0.05


def test_nothing_is_left_to_fold_and_the_convolutions_lie_channels_last() -> None:
    folded = fold(network(TINY), torch.bfloat16)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert all(m.w_in is None for m in folded.modules() if isinstance(m, EAB))
    assert folded.msef is None
    assert not folded.training
    for name, parameter in folded.named_parameters():
        assert not parameter.requires_grad
        wide = name.endswith("temperature")
        assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), name
    weights = [m.weight for m in folded.modules() if isinstance(m, nn.Conv2d)]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)


@torch.inference_mode()
def test_every_map_stays_channels_last() -> None:
    """One that does not would be turned and turned back between two convolutions."""
    folded = fold(network(TINY))
    turned: list[str] = []

    def look(name: str) -> None:
        def hook(_: nn.Module, __: object, out: object) -> None:
            assert isinstance(out, Tensor)
            if out.dim() == 4 and not out.is_contiguous(memory_format=torch.channels_last):
                turned.append(name)

        folded.get_submodule(name).register_forward_hook(hook)

    for name, _ in folded.named_modules():
        look(name)
    folded(picture(TINY, 16, 24))
    assert not turned


@torch.inference_mode()
def test_the_network_is_left_as_it_is() -> None:
    model = network(TINY).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    gradients = [p.requires_grad for p in model.parameters()]
    folded = fold(model)
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == gradients
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name
        assert after[name].stride() == value.stride(), name
    x = picture(TINY, 16, 16)
    expected = folded(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(folded(x), expected), "the copy shares memory with the network"


@torch.inference_mode()
def test_folding_twice_changes_nothing() -> None:
    once = fold(network(TINY))
    again = fold(copy.deepcopy(once))
    x = picture(TINY, 16, 16)
    assert torch.equal(again(x), once(x))


def test_bfloat16_is_native_only_where_the_processor_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for bf16, amx in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda bf16=bf16: bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert native_bfloat16(torch.device("cpu")) == (bf16 or amx)
    assert not native_bfloat16(torch.device("meta"))
