"""Batch norm over the batch of all processes, where PyTorch's own refuses: on the CPU.

``torch.nn.SyncBatchNorm`` runs on accelerators only. Without it, two processes normalise by the
statistics of their own halves of a batch, and do not train the network that one process trains.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from torch import Tensor, nn

__all__ = ["CrossProcessBatchNorm2d", "CrossProcessBatchNormSync"]


class _SumOverProcesses(torch.autograd.Function):
    """Sum a tensor over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone()
        dist.all_reduce(gradient)
        return gradient


class CrossProcessBatchNorm2d(nn.BatchNorm2d):
    """``BatchNorm2d`` whose training statistics are those of all processes' pictures together.

    Parameters, buffers and evaluation are those of ``torch.nn.BatchNorm2d``, to which it is equal
    in a single process. Statistics are computed in float32 or better. The processes may hold
    different numbers of pixels. Each training forward takes two collective sums (the mean first,
    then the deviations from it: the sum of squares alone would cancel), each backward two.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x``, ``(B, C, H, W)``; the result has its shape and dtype."""
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        self._check_input_dim(x)
        wide = x if x.dtype == torch.float64 else x.float()
        count = x.numel() // x.shape[1]
        sums = torch.cat([wide.sum((0, 2, 3)), wide.new_full((1,), count)])
        sums = _SumOverProcesses.apply(sums)
        total = sums[-1].detach()
        mean = sums[:-1] / total
        centred = wide - mean[:, None, None]
        variance = _SumOverProcesses.apply(centred.square().sum((0, 2, 3))) / total
        if self.track_running_stats:
            self._update_running(mean.detach(), variance.detach(), total)
        scale = torch.rsqrt(variance + self.eps)
        if self.affine:
            scale = scale * self.weight
        out = centred * scale[:, None, None]
        if self.affine:
            out = out + self.bias[:, None, None]
        return out.to(x.dtype)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, variance: Tensor, total: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        # The running variance is the unbiased one, the normalising one is not: as in BatchNorm2d.
        unbiased = variance * (total / (total - 1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)


class CrossProcessBatchNormSync(TorchSyncBatchNorm):
    """Lightning's ``--trainer.sync_batchnorm`` for processes on the CPU."""

    def apply(self, model: nn.Module) -> nn.Module:
        """Let every ``BatchNorm2d`` of ``model`` take its statistics over all processes."""
        for module in model.modules():
            if type(module) is nn.BatchNorm2d:
                # Only the forward differs: the same object keeps its parameters, buffers and
                # hooks, and whoever holds a reference to it sees the change.
                module.__class__ = CrossProcessBatchNorm2d
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Undo :meth:`apply`."""
        for module in model.modules():
            if type(module) is CrossProcessBatchNorm2d:
                module.__class__ = nn.BatchNorm2d  # type: ignore[assignment]
        return model
