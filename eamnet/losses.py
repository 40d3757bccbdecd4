"""The training loss: soft Dice plus cross-entropy on the prediction and the auxiliary output."""

from __future__ import annotations

import torch
from monai.losses.dice import DiceCELoss
from torch import Tensor, nn

__all__ = ["SegmentationLoss"]


class SegmentationLoss(nn.Module):
    """Soft Dice plus cross-entropy, 1:1, computed in float32 whatever the logits' dtype.

    With ``num_classes == 1`` the terms are the Dice loss of ``sigmoid(logits)`` and the binary
    cross-entropy; with more classes, the Dice loss of ``softmax(logits)`` averaged over the
    classes other than the background (class 0) and the cross-entropy over all classes. Both come
    from :class:`monai.losses.DiceCELoss`. The auxiliary output (MSEF) adds ``auxiliary_weight``
    times the same loss.

    For one picture and class, with probabilities ``p`` and truth ``t``,

        ``dice_loss = 1 - (2 sum(p t) + s) / (sum(p) + sum(t) + s)``,  ``s = 1e-5``.

    It is taken per picture and then averaged, never over the pooled pixels of a batch, so that
    the mean over equal shares of a batch (data-parallel processes, accumulated gradients) is the
    loss of the whole batch. ``s`` keeps a picture without foreground finite: its Dice term is
    then nearly constant and the cross-entropy teaches.

    Args:
        num_classes: channels of the logits; 1 means sigmoid, more means softmax.
        auxiliary_weight: weight of the loss on the auxiliary output, at least 0.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, num_classes: int = 1, auxiliary_weight: float = 0.4) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if not auxiliary_weight >= 0:
            raise ValueError(f"auxiliary_weight must be at least 0, got {auxiliary_weight}")
        self.num_classes = num_classes
        self.auxiliary_weight = auxiliary_weight
        binary = num_classes == 1
        self.dice_ce = DiceCELoss(
            include_background=binary,
            to_onehot_y=not binary,
            sigmoid=binary,
            softmax=not binary,
        )

    def forward(self, logits: Tensor, auxiliary: Tensor | None, mask: Tensor) -> Tensor:
        """Return the loss as a float32 scalar.

        Args:
            logits: ``(B, num_classes, H, W)``, any floating dtype.
            auxiliary: logits of the auxiliary output, same shape, or ``None``.
            mask: ``(B, 1, H, W)``; values in {0, 1} of any dtype for one class, class indices of
                an integer dtype below ``num_classes`` for more.

        Raises:
            TypeError: ``logits`` or ``auxiliary`` is not floating point, or ``mask`` of a
                multi-class problem is not of an integer dtype.
            ValueError: shapes that do not fit, or an empty batch.
        """
        self._check(logits, auxiliary, mask)
        # Sums over a 512x512 picture overflow float16 and lose whole pixels in bfloat16, so
        # neither the inputs' dtype nor an enclosing autocast may decide the arithmetic.
        with torch.autocast(device_type=logits.device.type, enabled=False):
            target = mask.float() if self.num_classes == 1 else mask.long()
            loss: Tensor = self.dice_ce(logits.float(), target)
            if auxiliary is not None:
                loss = loss + self.auxiliary_weight * self.dice_ce(auxiliary.float(), target)
        return loss

    def _check(self, logits: Tensor, auxiliary: Tensor | None, mask: Tensor) -> None:
        if not logits.is_floating_point():
            raise TypeError(f"logits must be floating point, got {logits.dtype}")
        if logits.ndim != 4 or logits.shape[1] != self.num_classes or logits.numel() == 0:
            raise ValueError(
                f"logits must be a non-empty (B, {self.num_classes}, H, W), "
                f"got {tuple(logits.shape)}"
            )
        if auxiliary is not None and not auxiliary.is_floating_point():
            raise TypeError(f"auxiliary must be floating point, got {auxiliary.dtype}")
        if auxiliary is not None and auxiliary.shape != logits.shape:
            raise ValueError(
                f"auxiliary must have the shape of logits, {tuple(logits.shape)}, "
                f"got {tuple(auxiliary.shape)}"
            )
        expected = (logits.shape[0], 1, *logits.shape[2:])
        if tuple(mask.shape) != expected:
            raise ValueError(f"mask must have shape {expected}, got {tuple(mask.shape)}")
        if self.num_classes > 1 and (
            mask.is_floating_point() or mask.is_complex() or mask.dtype == torch.bool
        ):
            raise TypeError(
                f"mask of a {self.num_classes}-class problem must hold integer class indices, "
                f"got {mask.dtype}"
            )
