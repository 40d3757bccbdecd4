"""Test-time augmentation: the mean prediction over the eight flips and quarter turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["augmented_logits"]


def augmented_logits(network: Callable[[Tensor], Any], image: Tensor) -> Tensor:
    """Average a network's probabilities over the symmetries of the square.

    A dermoscopy picture has no upright: each of its eight flips and quarter turns is as good a
    picture of the same lesion. The mean is taken of probabilities and given back as logits, so
    that whatever follows the network follows this as well.

    Args:
        network: pictures ``(B, C, H, W)`` to logits ``(B, K, H, W)``; it runs eight times.
        image: ``(B, C, H, W)``.

    Returns:
        float32 ``(B, K, H, W)``, whose sigmoid (one channel) or softmax (more) is the mean.
    """
    # In the log domain: the logit of a mean of probabilities that round to 1 would be infinite.
    for_, against = None, None
    for turns in range(4):
        for flip in (False, True):
            turned = torch.rot90(image, turns, (2, 3))
            logits = network(turned.flip(3) if flip else turned).float()
            logits = torch.rot90(logits.flip(3) if flip else logits, -turns, (2, 3))
            if logits.shape[1] == 1:
                more, less = F.logsigmoid(logits), F.logsigmoid(-logits)
                against = less if against is None else torch.logaddexp(against, less)
            else:
                more = F.log_softmax(logits, 1)
            for_ = more if for_ is None else torch.logaddexp(for_, more)
    assert for_ is not None
    return for_ if against is None else for_ - against
