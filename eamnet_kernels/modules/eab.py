"""EAB, the external attention bridge of EAM-Net (arXiv:2512.07275, section II.D)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from eamnet_kernels.functional import external_memory


class EAB(nn.Module):
    """External attention (EANet, arXiv:2105.02358), channel selection, batch norm, residual, ReLU.

    `ReLU(BN(W_out select(M_v^T attention(M_k W_in x))) + x)`. A bias before the memory's keys would
    cancel in the softmax over pixels, and one after W_out in the batch norm, so there are none.

    Args:
        channels: C of the input and the output.
        memory_size: S, the number of memory slots.
        top_k: channels of largest L1 norm that are kept; C/2 by default, C keeps all.

    `w_in` is None in a network folded for inference, whose `memory_key` has it as a factor.

    Shapes: (B,C,H,W) -> (B,C,H,W); any dtype and layout the operators take.
    """

    w_in: nn.Parameter | None

    def __init__(self, channels: int, memory_size: int = 64, top_k: int | None = None) -> None:
        super().__init__()
        if memory_size < 1:
            raise ValueError(f"memory_size={memory_size}; accepted: at least 1")
        if top_k is None:
            top_k = max(1, channels // 2)
        if not 1 <= top_k <= channels:
            raise ValueError(f"top_k={top_k}; accepted: 1 to channels={channels}")
        self.channels = channels
        self.memory_size = memory_size
        self.top_k = top_k
        self.w_in = nn.Parameter(torch.empty(channels, channels))
        self.memory_key = nn.Parameter(torch.empty(memory_size, channels))
        self.memory_value = nn.Parameter(torch.empty(memory_size, channels))
        self.w_out = nn.Parameter(torch.empty(channels, channels))
        self.norm: nn.Module = nn.BatchNorm2d(channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as `nn.Linear` draws its own: uniform within 1/sqrt(fan in)."""
        for weight in (self.w_in, self.memory_key, self.w_out):
            assert weight is not None
            nn.init.uniform_(weight, -1 / math.sqrt(self.channels), 1 / math.sqrt(self.channels))
        bound = 1 / math.sqrt(self.memory_size)
        nn.init.uniform_(self.memory_value, -bound, bound)

    def key(self) -> Tensor:
        """The keys (S,C) as pixels meet them: the input projection is part of them."""
        return self.memory_key if self.w_in is None else self.memory_key @ self.w_in

    def forward(self, x: Tensor) -> Tensor:
        """x (B,C,H,W) -> (B,C,H,W)."""
        attended = external_memory(x, self.key(), self.memory_value, self.w_out, self.top_k)
        return torch.relu(self.norm(attended) + x)

    def extra_repr(self) -> str:
        """The arguments, for `print`."""
        return f"{self.channels}, memory_size={self.memory_size}, top_k={self.top_k}"
