"""`cross_mix_channels` in Triton: the passes over pixels; between them, `mixing.py` in torch.

Definition: `reference/cross_mix_channels.py`. Per pixel, in multiply-adds and numbers read (r) or
written (w):

    grams    G_p = X diag(g^p) X^T, p = 0, 1, 2                 1.5 C^2      C r
    apply    Y = X + A_1 X + g A_2 X                              2 C^2      C r + C w
    grads    E_p = dY diag(g^p) X^T, p = 0, 1                     2 C^2    2 C r
    back     dX = dY + A_1^T dY + D_0 X + g (A_2^T dY + D_1 X + g D_2 X)
             dg = sum over c of X (A_2^T dY + D_1 X / 2 + g D_2 X)
             D_p: twice the gradient of G_p                       5 C^2    2 C r + C w

A program of the first kernel has a block of a product and a run of blocks of pixels; the sums of
the runs are written and added up in a fixed order. Of symmetric products, blocks above the diagonal
are copies.

With 16-bit operands the gate is multiplied in float32 and rounded where a factor of a product needs
it, g X, which plain PyTorch rounds as well; where it can be a factor of the result, it is that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from eamnet_kernels.backends import Arguments
from eamnet_kernels.cpu import pixels_in_sequence
from eamnet_kernels.mixing import mix, mix_backward
from eamnet_kernels.ops.layout import empty_like, is_channels_last
from eamnet_kernels.reference.cross_mix_channels import working_dtype
from eamnet_kernels.triton import declines as declined_by_all
from eamnet_kernels.triton import refuses
from eamnet_kernels.triton.configurations import Configuration, Rule, Table
from eamnet_kernels.triton.launch import blocks, launch, wide
from eamnet_kernels.triton.products import (
    configured,
    exact_float32,
    precision,
    run_length,
    strides,
    tile,
    within,
)


def _configuration(warps: int, stages: int, greedy: bool = True, **sizes: int) -> Configuration:
    return Configuration(sizes, warps, stages, all_registers=greedy)


# ROWS are the channels of a block of a result; CHANNELS, and DEPTH of pixels, what one product sums
# over. A deep one loses precision: with 256 float32 pixels temperature's gradient has twice the
# error that it has with 32. More of them spill, in float32 32 and in 16 bits 64.
PRODUCTS = Table(
    "cross_mix_channels.products",
    Rule({"bits": 16}, _configuration(8, 3, DEPTH=32, ROWS=64)),
    Rule({}, _configuration(8, 1, DEPTH=16, ROWS=32)),
)
APPLY = Table(
    "cross_mix_channels.apply",
    Rule({"bits": 16}, _configuration(4, 3, PIXELS=64, ROWS=64, CHANNELS=64)),
    Rule({}, _configuration(4, 2, False, PIXELS=64, ROWS=32, CHANNELS=16)),  # greedy, it spills
)
APPLY_BACKWARD = Table(
    "cross_mix_channels.apply_backward",
    Rule({"bits": 16}, _configuration(4, 2, PIXELS=64, ROWS=64, CHANNELS=32)),
    Rule({}, _configuration(4, 2, False, PIXELS=32, ROWS=32, CHANNELS=16)),  # as APPLY
)


def can_run(arguments: Arguments) -> str | None:
    x = arguments["x"]
    if working_dtype(x) == torch.float64 != x.dtype:
        return "with fewer pixels than twice the channels the sums are to be made in float64"
    return refuses(arguments)


def declines(arguments: Arguments) -> str | None:
    """Exact products of float32 over few pixels of many channels in NCHW, forward.

    Milliseconds of `reference` and of these kernels on an H200: 0.30 and 0.36 at 4x256x32x32, in
    channels-last 0.30 and 0.26; 0.43 and 0.33 at 4x128x64x64 (bench/results/nvidia-h200).
    """
    reason = declined_by_all(arguments)
    x = arguments["x"]
    if reason is not None or not exact_float32(x):
        return reason
    few = x.shape[1] >= 256 and x.shape[0] * x.shape[2] * x.shape[3] <= 4096
    if few and "grad_out" not in arguments and not is_channels_last(x):
        return "in exact float32 reference was measured faster for few pixels of many channels"
    return None


@triton.jit(do_not_specialize=["B", "T", "run"])
def _products_kernel(  # type: ignore[no-untyped-def]
    z,  # (B,C,N)
    x,  # (B,C,N)
    gate,  # (B,N)
    partial,  # (T,POWERS,B,C,C) float32: z diag(gate^p) x^T over a run of blocks of pixels
    B,
    C,
    N,
    T,
    run,
    z_stride_b,
    z_stride_c,
    z_stride_n,
    stride_b,
    stride_c,
    stride_n,
    POWERS: tl.constexpr,  # 3: z is x, the results are symmetric; or 2
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (b,t,i,j) does block (i,j) of the results of sample b over `run` blocks of pixels."""
    SYMMETRIC: tl.constexpr = POWERS == 3
    program = tl.program_id(0)
    groups = tl.cdiv(C, ROWS)
    j = program % groups
    i = program // groups % groups
    t = program // groups // groups % T
    b = (program // groups // groups // T).to(tl.int64)
    if SYMMETRIC and j > i:
        return
    row = i * ROWS + tl.arange(0, ROWS)
    column = j * ROWS + tl.arange(0, ROWS)
    z += b * z_stride_b
    x += b * stride_b
    gate += b * N
    result_0 = tl.zeros([ROWS, ROWS], tl.float32)
    result_1 = tl.zeros([ROWS, ROWS], tl.float32)
    result_2 = tl.zeros([ROWS, ROWS], tl.float32)
    for step in range(run):
        n = (t * run + step) * DEPTH + tl.arange(0, DEPTH)
        g = tl.load(gate + n, n < N, other=0.0).to(tl.float32)[None, :]
        left = tile(z, row, n, C, N, z_stride_c, z_stride_n, WIDE)
        right = tile(x, column, n, C, N, stride_c, stride_n, WIDE)
        gated = (right.to(tl.float32) * g).to(right.dtype)
        result_0 = tl.dot(left, tl.trans(right), result_0, input_precision=PRECISION)
        result_1 = tl.dot(left, tl.trans(gated), result_1, input_precision=PRECISION)
        if SYMMETRIC:
            left = (left.to(tl.float32) * g).to(left.dtype)
            result_2 = tl.dot(left, tl.trans(gated), result_2, input_precision=PRECISION)
    size = tl.cast(C, tl.int64) * C
    to = partial + (t * POWERS * B + b) * size
    at = row[:, None] * C + column[None, :]
    inside = (row < C)[:, None] & (column < C)[None, :]
    tl.store(to + at, result_0, inside)
    tl.store(to + B * size + at, result_1, inside)
    if SYMMETRIC:
        tl.store(to + 2 * B * size + at, result_2, inside)
        if i != j:
            at = column[None, :] * C + row[:, None]
            tl.store(to + at, result_0, inside)
            tl.store(to + B * size + at, result_1, inside)
            tl.store(to + 2 * B * size + at, result_2, inside)


@triton.jit(do_not_specialize=["B"])
def _apply_kernel(  # type: ignore[no-untyped-def]
    x,  # (B,C,N)
    gate,  # (B,N)
    matrices,  # (2,B,C,C) in the dtype of x: A_1, A_2
    out,  # (B,C,N)
    B,
    C,
    N,
    stride_b,
    stride_c,
    stride_n,
    out_stride_b,
    out_stride_c,
    out_stride_n,
    PIXELS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (b,t,i) writes channels i*ROWS and following of block t of the pixels of sample b."""
    index = tl.int64 if WIDE else tl.int32
    program = tl.program_id(0)
    groups = tl.cdiv(C, ROWS)
    tiles = tl.cdiv(N, PIXELS)
    row = (program % groups) * ROWS + tl.arange(0, ROWS)
    n = (program // groups % tiles) * PIXELS + tl.arange(0, PIXELS)
    b = (program // groups // tiles).to(tl.int64)
    x += b * stride_b
    first = matrices + b * C * C
    second = first + B.to(tl.int64) * C * C
    result = tl.zeros([ROWS, PIXELS], tl.float32)
    gated = tl.zeros([ROWS, PIXELS], tl.float32)
    for start in range(0, C, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        at = row[:, None] * C + c[None, :]
        inside = (row < C)[:, None] & (c < C)[None, :]
        right = tile(x, c, n, C, N, stride_c, stride_n, WIDE)
        left = tl.load(first + at, inside, other=0.0)
        result = tl.dot(left, right, result, input_precision=PRECISION)
        left = tl.load(second + at, inside, other=0.0)
        gated = tl.dot(left, right, gated, input_precision=PRECISION)
    g = tl.load(gate + b * N + n, n < N, other=0.0).to(tl.float32)
    result += g[None, :] * gated
    # Last: it is larger than what is added to it, and every sum would be rounded at its size.
    result += tile(x, row, n, C, N, stride_c, stride_n, WIDE).to(tl.float32)
    at = (row.to(index) * out_stride_c)[:, None] + (n.to(index) * out_stride_n)[None, :]
    inside = (row < C)[:, None] & (n < N)[None, :]
    tl.store(out + b * out_stride_b + at, result.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["B"])
def _apply_backward_kernel(  # type: ignore[no-untyped-def]
    grad,  # (B,C,N)
    x,  # (B,C,N)
    gate,  # (B,N)
    matrices,  # (2,B,C,C) in the dtype of x: A_1, A_2
    doubled,  # (3,B,C,C) in the dtype of x: D_0, D_1, D_2 by `scale`, symmetric
    scale,  # (B) float32, or None for 1
    grad_x,  # (B,C,N)
    grad_gate,  # (I,B,N) float32: of each block of channels
    B,
    C,
    N,
    grad_stride_b,
    grad_stride_c,
    grad_stride_n,
    stride_b,
    stride_c,
    stride_n,
    out_stride_b,
    out_stride_c,
    out_stride_n,
    PIXELS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (b,t,i) writes channels i*ROWS and following of block t of the pixels of sample b."""
    index = tl.int64 if WIDE else tl.int32
    program = tl.program_id(0)
    groups = tl.cdiv(C, ROWS)
    tiles = tl.cdiv(N, PIXELS)
    i = program % groups
    row = i * ROWS + tl.arange(0, ROWS)
    n = (program // groups % tiles) * PIXELS + tl.arange(0, PIXELS)
    b = (program // groups // tiles).to(tl.int64)
    x += b * stride_b
    grad += b * grad_stride_b
    size = tl.cast(C, tl.int64) * C
    matrices += b * size
    doubled += b * size
    g = tl.load(gate + b * N + n, n < N, other=0.0).to(tl.float32)[None, :]

    product_0 = tl.zeros([ROWS, PIXELS], tl.float32)
    product_1 = tl.zeros([ROWS, PIXELS], tl.float32)
    product_2 = tl.zeros([ROWS, PIXELS], tl.float32)
    for start in range(0, C, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        at = row[:, None] * C + c[None, :]
        inside = (row < C)[:, None] & (c < C)[None, :]
        right = tile(x, c, n, C, N, stride_c, stride_n, WIDE)
        left = tl.load(doubled + at, inside, other=0.0)
        product_0 = tl.dot(left, right, product_0, input_precision=PRECISION)
        left = tl.load(doubled + B * size + at, inside, other=0.0)
        product_1 = tl.dot(left, right, product_1, input_precision=PRECISION)
        left = tl.load(doubled + 2 * B * size + at, inside, other=0.0)
        product_2 = tl.dot(left, right, product_2, input_precision=PRECISION)
    of_gate = 0.5 * product_1 + g * product_2
    result = product_0 + g * (product_1 + g * product_2)
    if scale is not None:
        factor = tl.load(scale + b)
        of_gate *= factor
        result *= factor

    gated = tl.zeros([ROWS, PIXELS], tl.float32)
    for start in range(0, C, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        at = row[:, None] + c[None, :] * C
        inside = (row < C)[:, None] & (c < C)[None, :]
        right = tile(grad, c, n, C, N, grad_stride_c, grad_stride_n, WIDE)
        left = tl.load(matrices + at, inside, other=0.0)
        result = tl.dot(left, right, result, input_precision=PRECISION)
        left = tl.load(matrices + B * size + at, inside, other=0.0)
        gated = tl.dot(left, right, gated, input_precision=PRECISION)
    of_gate += gated
    result += g * gated

    result += tile(grad, row, n, C, N, grad_stride_c, grad_stride_n, WIDE).to(tl.float32)
    of_gate *= tile(x, row, n, C, N, stride_c, stride_n, WIDE).to(tl.float32)
    tl.store(grad_gate + (i * B + b) * N + n, tl.sum(of_gate, 0), n < N)
    at = (row.to(index) * out_stride_c)[:, None] + (n.to(index) * out_stride_n)[None, :]
    inside = (row < C)[:, None] & (n < N)[None, :]
    tl.store(grad_x + b * out_stride_b + at, result.to(grad_x.dtype.element_ty), inside)


def _products(z: Tensor, x: Tensor, gate: Tensor, powers: int) -> Tensor:
    """z diag(gate^p) x^T for p below `powers`: (powers,B,C,C) float32."""
    (batch, channels), pixels = x.shape[:2], x.shape[2] * x.shape[3]
    configuration = configured(PRODUCTS, x)
    cut = within(configuration, channels, "ROWS")
    pieces = blocks(channels, cut["ROWS"]) ** 2
    programs = None
    if x.dtype != torch.float32:
        # What the programs write is not to be more than what they read, unless too few are left to
        # fill a card: 1024 of them wrote 50 MB of sums for 2 MB of x (4x256x32x32 on an H200).
        programs = max(256, x.nbytes // (4 * powers * cut["ROWS"] ** 2))
    run, runs = run_length(batch * pieces, pixels, configuration.blocks["DEPTH"], programs)
    partial = x.new_empty((runs, powers, batch, channels, channels), dtype=torch.float32)
    launch(
        _products_kernel,
        (batch * runs * pieces,),
        z, x, gate, partial, batch, channels, pixels, runs, run, *strides(z), *strides(x),
        configuration=configuration,
        POWERS=powers,
        WIDE=wide(z, x),
        PRECISION=precision(x.dtype),
        **cut,
    )  # fmt: skip
    if x.dtype != torch.float32:
        return partial.sum(0)
    # In float32 this sum was a third of the error of temperature's gradient. It copies `partial`.
    return partial.sum(0, dtype=torch.float64).float()


def forward(
    x: Tensor,
    spatial_gate: Tensor,
    channel_gate: Tensor,
    w_spatial: Tensor,
    w_channel: Tensor,
    w_out: Tensor,
    temperature: Tensor,
) -> tuple[Tensor, Tensor]:
    """The result as `x` lies, and the Gram matrices (3,B,C,C)."""
    out = empty_like(x)
    x, gate = pixels_in_sequence(x), spatial_gate.contiguous()
    (batch, channels), pixels = x.shape[:2], x.shape[2] * x.shape[3]
    grams = _products(x, x, gate, 3)
    matrices = mix(grams, channel_gate, w_spatial, w_channel, w_out, temperature).matrices
    configuration = configured(APPLY, x)
    cut = within(configuration, channels, "ROWS", "CHANNELS")
    tiles = blocks(pixels, configuration.blocks["PIXELS"])
    launch(
        _apply_kernel,
        (batch * tiles * blocks(channels, cut["ROWS"]),),
        x, gate, matrices.to(x.dtype), out, batch, channels, pixels, *strides(x), *strides(out),
        configuration=configuration,
        WIDE=wide(x, out),
        PRECISION=precision(x.dtype),
        **cut,
    )  # fmt: skip
    return out, grams


def backward(
    grad_out: Tensor,
    x: Tensor,
    spatial_gate: Tensor,
    channel_gate: Tensor,
    w_spatial: Tensor,
    w_channel: Tensor,
    w_out: Tensor,
    temperature: Tensor,
    grams: Tensor,
) -> tuple[Tensor, ...]:
    """The gradients of the seven inputs, that of `x` as `x` lies."""
    grad_x = empty_like(x)
    grad, x = pixels_in_sequence(grad_out), pixels_in_sequence(x)
    gate = spatial_gate.contiguous()
    (batch, channels), pixels = x.shape[:2], x.shape[2] * x.shape[3]
    weights = (channel_gate, w_spatial, w_channel, w_out, temperature)
    mixing = mix(grams, *weights)
    doubled, *grad_weights = mix_backward(_products(grad, x, gate, 2), mixing, grams)
    scale = None
    if x.dtype == torch.float16:
        # The more pixels, the smaller the gradient of their products: 1/N, which float16 has not.
        scale = doubled.abs().amax((0, 2, 3)).clamp_min(torch.finfo(torch.float32).tiny)
        doubled = doubled / scale[:, None, None]
    configuration = configured(APPLY_BACKWARD, x)
    cut = within(configuration, channels, "ROWS", "CHANNELS")
    groups = blocks(channels, cut["ROWS"])
    grad_gate = x.new_empty((groups, *gate.shape), dtype=torch.float32)
    launch(
        _apply_backward_kernel,
        (batch * blocks(pixels, configuration.blocks["PIXELS"]) * groups,),
        grad, x, gate, mixing.matrices.to(x.dtype), doubled.to(x.dtype), scale, grad_x, grad_gate,
        batch, channels, pixels, *strides(grad), *strides(x), *strides(grad_x),
        configuration=configuration,
        WIDE=wide(grad, x, grad_x),
        PRECISION=precision(x.dtype),
        **cut,
    )  # fmt: skip
    return (
        grad_x,
        grad_gate.sum(0).to(gate.dtype),
        *(g.to(w.dtype) for g, w in zip(grad_weights, weights, strict=True)),
    )


def exercise(empty: Callable[..., Tensor]) -> None:
    """Forward and backward at shapes that meet every rule of the tables, for the audit."""
    for batch, channels, height, width in (
        (8, 256, 32, 32),
        (2, 20, 9, 11),
        (1, 64, 8192, 8192),
    ):
        x, gate = empty(batch, channels, height, width), empty(batch, 1, height, width)
        stacked, square = x.new_empty(3 * channels, channels), x.new_empty(channels, channels)
        weights = (x.new_empty(batch, channels), stacked, stacked, square, x.new_empty(2, 2))
        out, grams = forward(x, gate, *weights)
        backward(out, x, gate, *weights, grams)
