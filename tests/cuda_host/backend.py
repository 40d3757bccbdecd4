"""The CUDA kernels, compiled for the CPU, as a backend `cuda_host` for the conformance suite.

The other side of `interface.cpp`: the structures of `csrc/cuda/*_host.h` through ctypes.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from eamnet_kernels.backends import Arguments, Backend
from eamnet_kernels.cuda import refuses_size
from eamnet_kernels.cuda.multi_dilation_conv import MAX_BRANCHES, refuses_shape
from eamnet_kernels.ops.layout import empty_like, is_channels_last, memory_format

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "csrc"
SHARED_BYTES = 96 << 10  # kLimits of interface.cpp
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = ("relu", "silu", "identity")
Pointer = ctypes.c_void_p


def compile_command(source: Path, output: Path, *flags: str, csrc: Path = SOURCES) -> list[str]:
    """g++ (or CXX) for a source that includes the kernels of `csrc`."""
    return [
        *os.environ.get("CXX", "g++").split(),
        *("-std=c++20", "-O1", "-g1", "-pthread", "-Wall", "-Wextra", "-Wno-unknown-pragmas"),
        *(f"-I{csrc}", f"-I{HERE}", *flags, str(source), "-o", str(output)),
    ]


def build(folder: Path) -> Path:
    """The shared library in `folder`."""
    library = folder / "cuda_host.so"
    command = compile_command(HERE / "interface.cpp", library, "-fPIC", "-shared", "-Werror")
    subprocess.run(command, check=True)
    return library


class TensorRef(ctypes.Structure):
    _fields_ = (("data", Pointer), ("strides", ctypes.c_int64 * 4))

    @classmethod
    def of(cls, x: Tensor) -> TensorRef:
        return cls(x.data_ptr(), (ctypes.c_int64 * 4)(*x.stride()))


class ConvCall(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int32),
        ("branches", ctypes.c_int32),
        ("depthwise", ctypes.c_int32),
        ("channels_last", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("sizes", ctypes.c_int64 * 4),
        ("dilations", ctypes.c_int64 * MAX_BRANCHES),
        ("x", TensorRef),
        ("out", TensorRef),
        ("preactivation", TensorRef),
        ("grad_out", TensorRef),
        ("grad_x", TensorRef),
        ("branch", Pointer * MAX_BRANCHES),
        ("point", Pointer),
        ("bias", Pointer),
        ("grad_branch", Pointer * MAX_BRANCHES),
        ("grad_point", Pointer),
        ("grad_bias", Pointer),
        ("workspace", Pointer),
    )


class GateCall(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int32),
        ("channels_last", ctypes.c_int32),
        ("sizes", ctypes.c_int64 * 4),
        ("x", TensorRef),
        ("pixel_mean", Pointer),
        ("pixel_max", Pointer),
        ("channel_mean", Pointer),
        ("channel_max", Pointer),
        ("pixel_argmax", Pointer),
        ("channel_argmax", Pointer),
        ("grad_x", Pointer),
        ("workspace", Pointer),
    )


def _workspace(size: int) -> Tensor:
    # NaN: what a kernel reads without having written it shows.
    return torch.full((size // 4 + 64,), torch.nan)


def _aligned(memory: Tensor) -> int:
    return -(-memory.data_ptr() // 16) * 16


class Conv:
    """`multi_dilation_conv`, with the functions of a backend's module."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.conv_workspace.restype = ctypes.c_int64

    def can_run(self, arguments: Arguments) -> str | None:
        x = arguments["x"]
        if x.device.type != "cpu":
            return "it runs on the CPU"
        branches = len(arguments["w_branches"])
        return refuses_size(x) or refuses_shape(x, branches, SHARED_BYTES)

    def _call(
        self,
        x: Tensor,
        w_branches: Sequence[Tensor],
        w_point: Tensor,
        dilations: Sequence[int],
        activation: str,
    ) -> ConvCall:
        call = ConvCall(
            type=TYPES[x.dtype],
            branches=len(dilations),
            depthwise=bool(w_branches) and w_branches[0].shape[1] == 1,
            channels_last=is_channels_last(x),
            activation=ACTIVATIONS.index(activation),
            x=TensorRef.of(x),
            point=w_point.data_ptr(),
        )
        call.sizes[:] = x.shape
        for i, (weight, dilation) in enumerate(zip(w_branches, dilations, strict=True)):
            call.branch[i], call.dilations[i] = weight.data_ptr(), dilation
        return call

    def _run(self, call: ConvCall, backward: bool) -> None:
        memory = _workspace(self.library.conv_workspace(ctypes.byref(call), backward))
        call.workspace = _aligned(memory)
        self.library.conv_run(ctypes.byref(call), backward)

    def forward(
        self,
        x: Tensor,
        w_branches: Sequence[Tensor],
        w_point: Tensor,
        bias: Tensor | None,
        dilations: Sequence[int],
        activation: str,
        save_for_backward: bool,
    ) -> tuple[Tensor, Tensor]:
        w_branches, w_point = [w.contiguous() for w in w_branches], w_point.contiguous()
        call = self._call(x, w_branches, w_point, dilations, activation)
        out = empty_like(x)
        call.out = TensorRef.of(out)
        preactivation = x.new_empty(0)
        if save_for_backward:
            batch, channels, height, width = x.shape
            convolved = channels - channels // (len(dilations) + 1)
            preactivation = torch.empty(
                (batch, convolved, height, width), dtype=x.dtype, memory_format=memory_format(x)
            )
            call.preactivation = TensorRef.of(preactivation)
        bias = None if bias is None else bias.contiguous()
        call.bias = None if bias is None else bias.data_ptr()
        self._run(call, False)
        return out, preactivation

    def backward(
        self,
        grad_out: Tensor,
        x: Tensor,
        w_branches: Sequence[Tensor],
        w_point: Tensor,
        has_bias: bool,
        dilations: Sequence[int],
        activation: str,
        preactivation: Tensor,
    ) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
        w_branches, w_point = [w.contiguous() for w in w_branches], w_point.contiguous()
        call = self._call(x, w_branches, w_point, dilations, activation)
        grad_x = empty_like(x)
        grad_branches = [torch.empty_like(w) for w in w_branches]
        grad_point = torch.empty_like(w_point)
        grad_bias = x.new_empty(x.shape[1] if has_bias else 0)
        call.grad_out, call.preactivation = TensorRef.of(grad_out), TensorRef.of(preactivation)
        call.grad_x = TensorRef.of(grad_x)
        for i, grad in enumerate(grad_branches):
            call.grad_branch[i] = grad.data_ptr()
        call.grad_point = grad_point.data_ptr()
        call.grad_bias = grad_bias.data_ptr() if has_bias else None
        self._run(call, True)
        return grad_x, grad_branches, grad_point, grad_bias


class Gate:
    """`gate_statistics`, with the functions of a backend's module."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.gate_workspace.restype = ctypes.c_int64

    def can_run(self, arguments: Arguments) -> str | None:
        x = arguments["x"] if "x" in arguments else arguments["grad_pixel_mean"]
        return "it runs on the CPU" if x.device.type != "cpu" else refuses_size(x)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        batch, channels, height, width = x.shape
        out = (
            x.new_empty(batch, 1, height, width),
            x.new_empty(batch, 1, height, width),
            x.new_empty(batch, channels),
            x.new_empty(batch, channels),
            x.new_empty((batch, 1, height, width), dtype=torch.int32),
            x.new_empty((batch, channels), dtype=torch.int64),
        )
        call = GateCall(TYPES[x.dtype], is_channels_last(x), tuple(x.shape), TensorRef.of(x))
        for name, tensor in zip([field[0] for field in GateCall._fields_[4:10]], out, strict=True):
            setattr(call, name, tensor.data_ptr())
        memory = _workspace(self.library.gate_workspace(ctypes.byref(call)))
        call.workspace = _aligned(memory)
        self.library.gate_run(ctypes.byref(call), False)
        return out

    def backward(self, *arguments: Any) -> Tensor:
        *tensors, channels_last = arguments
        tensors = [t.contiguous() for t in tensors]
        batch, channels = tensors[2].shape
        height, width = tensors[0].shape[2:]
        grad_x = torch.empty(
            (batch, channels, height, width),
            dtype=tensors[0].dtype,
            memory_format=torch.channels_last if channels_last else torch.contiguous_format,
        )
        call = GateCall(TYPES[grad_x.dtype], channels_last, tuple(grad_x.shape))
        for name, tensor in zip(
            [field[0] for field in GateCall._fields_[4:10]], tensors, strict=True
        ):
            setattr(call, name, tensor.data_ptr())
        call.grad_x = grad_x.data_ptr()
        self.library.gate_run(ctypes.byref(call), True)
        return grad_x


@cache
def _modules(library: str) -> SimpleNamespace:
    loaded = ctypes.CDLL(library)
    return SimpleNamespace(gate_statistics=Gate(loaded), multi_dilation_conv=Conv(loaded))


class HostBackend(Backend):
    """A registered backend whose modules are the objects above."""

    library = ""

    def module(self, operator: str) -> ModuleType:
        return cast(ModuleType, getattr(_modules(HostBackend.library), operator))


def supported() -> bool:
    return sys.platform == "linux"
