"""Benchmarks of the network: training step and inference, beside what one would pick instead."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.results import Record
from bench.subjects import direct_definitions
from bench.timing import WIDE_SPREAD, interleaved, paired_ratio, peak_extra_bytes
from eamnet.complexity import count_complexity
from eamnet.folding import fold, native_bfloat16
from eamnet.losses import SegmentationLoss
from eamnet.model import EAMNet, EAMNetConfig, EAMNetOutput


def rivals() -> dict[str, Callable[[], nn.Module]]:
    """Networks one would pick instead, where their packages are installed."""
    found: dict[str, Callable[[], nn.Module]] = {}
    with contextlib.suppress(ImportError):
        import segmentation_models_pytorch as smp

        found["U-Net, ResNet-34 (smp)"] = lambda: smp.Unet("resnet34", encoder_weights=None)
        found["U-Net, MobileNetV2 (smp)"] = lambda: smp.Unet("mobilenet_v2", encoder_weights=None)
    with contextlib.suppress(ImportError):
        from monai.networks.nets.attentionunet import AttentionUnet
        from monai.networks.nets.basic_unet import BasicUNet

        found["BasicUNet (MONAI)"] = lambda: BasicUNet(2, 3, 1)
        found["AttentionUnet (MONAI)"] = lambda: AttentionUnet(
            2, 3, 1, (32, 64, 128, 256), (2, 2, 2)
        )
    return found


def _logits(output: Any) -> tuple[Tensor, Tensor | None]:
    return tuple(output) if isinstance(output, EAMNetOutput) else (output, None)  # type: ignore[return-value]


# Largest error of a logit, over the largest logit in float64, from which a network is wrong:
# float32's rounding through some sixty layers, and bfloat16's.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def _builders(
    compiled: bool, inference: bool, device: torch.device
) -> dict[str, Callable[[], nn.Module]]:
    """What is compared; a name says by its words how the network is run."""
    without = EAMNetConfig(mrcf=False, cmam="none", eab=False)
    found: dict[str, Callable[[], nn.Module]] = {
        "EAM-Net": EAMNet,
        "EAM-Net, channels-last": EAMNet,
        "EAM-Net, plain": EAMNet,
        "EAM-Net, plain, channels-last": EAMNet,
        "without MRCF, CMAM, EAB": lambda: EAMNet(without),
        "without MRCF, CMAM, EAB, channels-last": lambda: EAMNet(without),
    }
    if device.type == "cuda":
        for name in list(found):
            if "channels-last" in name:
                found[f"{name}, autocast to bfloat16"] = found[name]
    if inference:
        found["EAM-Net, folded, channels-last"] = lambda: fold(EAMNet())
        if native_bfloat16(device):  # elsewhere a convolution takes minutes
            name = "EAM-Net, folded, channels-last, bfloat16"
            found[name] = lambda: fold(EAMNet(), torch.bfloat16)
    if compiled:
        found["EAM-Net, plain, torch.compile"] = EAMNet
    return {**found, **rivals()}


def _largest_error(call: Callable[[int], Any], truth: Tensor) -> float:
    got = _logits(call(0))[0]
    return float((got.double() - truth).abs().max() / truth.abs().max())


@contextlib.contextmanager
def _scope(plain: bool, autocast_on: torch.device | None) -> Iterator[None]:
    """Around a call: the direct definitions instead of ours, autocast to bfloat16."""
    with contextlib.ExitStack() as stack:
        if plain:
            stack.enter_context(direct_definitions())
        if autocast_on is not None:
            stack.enter_context(torch.autocast(autocast_on.type, torch.bfloat16))
        yield


def training_step(
    run: nn.Module,
    images: Tensor,
    masks: Tensor,
    loss_of: SegmentationLoss,
    optimizer: torch.optim.Optimizer,
) -> None:
    """What a training does for every batch."""
    loss = loss_of(*_logits(run(images)), masks)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def measure(
    size: int, batch: int, rounds: int, budget: float, compiled: bool, device: torch.device
) -> Iterator[Record]:
    """Training step at `batch` and inference at batch 1: ours, the direct definitions, others.

    On a GPU as a user runs them, with the time that Python takes to queue the kernels.
    """
    torch.manual_seed(0)
    loss_of = SegmentationLoss()
    for mode in ("inference", "training step"):
        images = torch.rand(1 if mode == "inference" else batch, 3, size, size).to(device)
        masks = (torch.rand(len(images), 1, size, size) > 0.5).float().to(device)
        calls: dict[str, Callable[[int], object]] = {}
        networks: dict[str, nn.Module] = {}
        errors: dict[str, float] = {}
        torch.manual_seed(0)
        with direct_definitions(), torch.no_grad():
            exact = EAMNet().to(device, torch.double).train(mode != "inference")
            truth = _logits(exact(images.double()))[0]
        for name, build in _builders(compiled, mode == "inference", device).items():
            torch.manual_seed(0)
            network = build().to(device).train(mode != "inference")
            x = images
            if "channels-last" in name:
                network = network.to(memory_format=torch.channels_last)
                x = images.contiguous(memory_format=torch.channels_last)
            dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
            autocast = "autocast" in name
            if not autocast:
                x = x.to(dtype)
            networks[name] = network
            run: nn.Module = torch.compile(network) if "compile" in name else network  # type: ignore[assignment]
            scope = partial(_scope, ", plain" in name, device if autocast else None)
            optimizer = torch.optim.Adam(network.parameters())

            def infer(_: int, run: nn.Module = run, x: Tensor = x, scope: Any = scope) -> object:
                with scope(), torch.no_grad():
                    return run(x)

            def step(
                _: int,
                run: nn.Module = run,
                x: Tensor = x,
                scope: Any = scope,
                optimizer: torch.optim.Optimizer = optimizer,
                masks: Tensor = masks,
            ) -> None:
                with scope():
                    training_step(run, x, masks, loss_of, optimizer)

            calls[name] = infer if mode == "inference" else step
            if name.startswith("EAM-Net"):
                errors[name] = _largest_error(infer, truth)
                if errors[name] > TOLERANCE[dtype]:
                    raise RuntimeError(f"{name}, {mode}: {errors[name]:.2g} off float64; not timed")
        times = interleaved(calls, rounds, device, budget, graphs=False)
        parameters = sum(p.numel() for p in networks["EAM-Net"].parameters())
        for name, t in times.items():
            ratio = paired_ratio(t, times["EAM-Net"])
            extra = peak_extra_bytes(calls[name], device)
            counted = count_complexity(networks[name], (size, size))
            yield {
                "network": name,
                "mode": mode,
                "size": size,
                "batch": len(images),
                "error": errors.get(name),
                "rounds": len(t.seconds),
                **t.milliseconds(),
                "noisy": t.spread > WIDE_SPREAD,
                "times_ours": ratio.median,
                "times_ours_low": ratio.low,
                "times_ours_high": ratio.high,
                # Folding makes constants of them.
                "parameters": counted.parameters or parameters,
                "macs": counted.macs,
                "peak_extra_mb": None if extra is None else extra / 1e6,
            }
