"""Two operators in CUDA C++ (`csrc/cuda/`), where a block's shared tile is what they need.

`multi_dilation_conv` reads its neighbourhood nine times per branch, and `gate_statistics` reduces
over pixels and channels at once: both want a tile of the picture, with a halo, in shared memory,
which Triton cannot express.
"""

from __future__ import annotations

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refuses(x: Tensor) -> str | None:
    """Why the CUDA kernels cannot take `x`, or None: what is the same for both operators."""
    if x.device.type != "cuda":
        return f"it runs on CUDA devices and the input is on {x.device}"
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return "it needs a card of compute capability 8.0 or later"
    return refuses_size(x)


def refuses_size(x: Tensor) -> str | None:
    """The part of `refuses` that does not concern the device."""
    if x.dtype not in _DTYPES:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        return f"it accepts {accepted} and the input is {str(x.dtype).removeprefix('torch.')}"
    # Pixels of a picture and tiles of a batch are counted in int32; offsets are int64.
    if x.dim() == 4 and max(x.shape[2] * x.shape[3], x.shape[0] * x.shape[2] * x.shape[3] // 16) > (
        2**31 - 1
    ):
        return f"it takes fewer pixels than an input of shape {tuple(x.shape)} has"
    return None
