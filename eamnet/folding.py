"""The same network for inference: batch norms inside convolutions, memories as one matrix."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_weights

from eamnet.blocks import ResidualBlock
from eamnet.model import EAMNet
from eamnet_kernels.modules import EAB, MRCF

__all__ = ["fold", "native_bfloat16"]


def fold(network: EAMNet, dtype: torch.dtype = torch.float32) -> EAMNet:
    """A copy of a trained network that computes the same in evaluation mode with less work.

    Batch norms become part of the convolution before them, in the MRCF and the EAB of the 1x1
    product before them; the EAB's key and input projection become one S x C matrix; the auxiliary
    head, which only training reads, is dropped; the convolutions' weights lie channels-last, as
    the picture should. CMAM has nothing left to fold: its gates are part of the weights already,
    and depend on the picture (``docs/algebra.md``, section 1).

    Args:
        network: the network; it stays as it is.
        dtype: of the copy's weights and of the pictures that it takes. The algebra is done in
            float64 and rounded once. The temperatures of CMAM, whose rounding would scale every
            logit, stay float32 in lower precision.

    Returns:
        The copy, in evaluation mode, on the network's device, without gradients. It cannot be
        trained, nor can ``save_pretrained`` of it be loaded again: keep the original for that.
    """
    device = next(network.parameters()).device
    # On the CPU, because not every accelerator has float64.
    folded = copy.deepcopy(network).cpu().double().eval().requires_grad_(False)
    folded.msef = None
    for module in folded.modules():
        if isinstance(module, ResidualBlock):
            module.conv1, module.bn1 = _into_convolution(module.conv1, module.bn1), nn.Identity()
            module.conv2, module.bn2 = _into_convolution(module.conv2, module.bn2), nn.Identity()
            if isinstance(module.shortcut, nn.Sequential):
                module.shortcut = _into_convolution(*module.shortcut)
        elif isinstance(module, MRCF) and isinstance(module.norm, nn.BatchNorm2d):
            module.w_point, module.bias = _into_product(module.w_point, module.norm)
            module.norm = nn.Identity()
        elif isinstance(module, EAB) and isinstance(module.norm, nn.BatchNorm2d):
            module.memory_key = nn.Parameter(module.key(), requires_grad=False)
            module.w_in = None
            module.w_out, bias = _into_product(module.w_out, module.norm)
            module.norm = _Shift(bias)
    for name, tensor in folded.named_parameters():
        wide = name.endswith("temperature") and dtype.itemsize < 4
        tensor.data = tensor.data.to(torch.float32 if wide else dtype)
    for module in folded.modules():
        # Not all weights of four dimensions: the operators of `eamnet_kernels` take theirs in rows.
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.to(memory_format=torch.channels_last)
    return folded.to(device)


def native_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 itself; where it does not, it is the slower dtype."""
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return False


class _Shift(nn.Module):
    """What is left of a batch norm whose scale went into the weights: one number per channel."""

    def __init__(self, bias: nn.Parameter) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias.detach()[:, None, None], requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B,C,H,W), an operator's own result, which is written over."""
        return x.add_(self.bias)


def _into_convolution(conv: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
    """The convolution together with the batch norm after it; itself where there is none."""
    return fuse_conv_bn_eval(conv, norm) if isinstance(norm, nn.BatchNorm2d) else conv


def _into_product(weight: nn.Parameter, norm: nn.BatchNorm2d) -> tuple[nn.Parameter, nn.Parameter]:
    """The weight (C,C) and bias (C) of a 1x1 product with the batch norm that follows it."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return fuse_linear_bn_weights(
        weight, None, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
