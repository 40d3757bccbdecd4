"""The operators in Triton, for NVIDIA GPUs of compute capability 8.0 and later.

One module per operator. Importing this package does not import Triton; the modules of the operators
do, and they are imported at the first call that Triton can serve.

With `TRITON_INTERPRET=1` in the environment the kernels run on CPU tensors, statement by statement
in NumPy: slow, and what the conformance suite uses where there is no GPU. `auto` then passes the
backend over; it is there for who asks by name.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache

import torch

from eamnet_kernels.backends import Arguments

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CAPABILITY = (8, 0)  # bfloat16 matrix instructions


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def unavailable() -> str | None:
    """Why Triton kernels cannot run on this machine, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not interpreted():
        if torch.version.hip is not None:
            return "the kernels are written and audited for NVIDIA, and this torch is for ROCm"
        if not torch.cuda.is_available():
            return "there is no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU)"
    try:
        importlib.import_module("triton")
    except Exception as error:
        return f"Triton does not import: {error!r}"
    return None


def refuses(arguments: Arguments) -> str | None:
    """Why the tensors' device, dtype or size does not serve, the same for all operators; or None.

    Indices within a sample are 32 bits wide where that is enough, but always those of its pixels,
    of which a run of blocks may go beyond the last by as many again.
    """
    kind = "cpu" if interpreted() else "cuda"
    tensors = [
        (name, tensor)
        for name, value in arguments.items()
        for tensor in (value if isinstance(value, (list, tuple)) else [value])
        if isinstance(tensor, torch.Tensor)
    ]
    for name, tensor in tensors:
        if tensor.device.type != kind:
            return f"{name} is on {tensor.device}; it takes tensors on {kind}"
        if tensor.is_floating_point() and tensor.dtype not in _DTYPES:
            given, *accepted = (str(d).removeprefix("torch.") for d in (tensor.dtype, *_DTYPES))
            return f"{name} is {given}; it takes {', '.join(accepted)}"
    device = tensors[0][1].device
    if kind == "cuda" and torch.cuda.get_device_capability(device) < _CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} has a compute capability below 8.0"
    for name, tensor in tensors:
        if tensor.dim() == 4 and tensor.shape[2] * tensor.shape[3] >= 2**30:
            return f"{name} has 2^30 pixels or more in a sample"
    return None


def declines(arguments: Arguments) -> str | None:
    """Interpreted kernels are for tests, not for speed."""
    return "it is interpreted here (TRITON_INTERPRET=1)" if interpreted() else None
