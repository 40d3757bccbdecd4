"""`multi_dilation_conv` in Triton: branches, activation and the 1x1 product in one kernel.

Forward: a program takes a block of pixels with all their channels. It convolves one group after the
other, and multiplies each by its columns of the point weight as soon as it is there, so that the
concatenation exists only a group and a block at a time. The neighbours that the nine taps of a
branch read come from cache: Triton has no tile with a halo.

Backward, four kernels: the gradient before the activation, which the stencil needs of neighbours
and which is therefore written; the gradient of x from it; and two that sum products over pixels,
for the branches' and the point weight. These cut the pixels into a number of parts that depends on
the shape alone and leave one sum per part, added in order by torch: repeatable bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from eamnet_kernels import backends
from eamnet_kernels.backends import Arguments
from eamnet_kernels.cpu import pixels_in_sequence
from eamnet_kernels.ops.layout import empty_like, is_channels_last, memory_format
from eamnet_kernels.triton import declines as declined_by_all
from eamnet_kernels.triton import refuses
from eamnet_kernels.triton.configurations import Configuration, Rule, Table
from eamnet_kernels.triton.launch import blocks, launch, power_of_two, wide
from eamnet_kernels.triton.products import configured, parts_of_sum, precision, strides, within

# All channels of a block of pixels are one program's sums, and so are the weights of a group: more
# would not fit its registers.
_MOST_CHANNELS, _MOST_OF_GROUP = 256, 64

FORWARD = Table(
    "multi_dilation_conv.forward",
    Rule({"channels": 64, "group": 16, "bits": 16}, Configuration({"PIXELS": 64, "INNER": 16})),
    Rule({"bits": 16}, Configuration({"PIXELS": 64, "INNER": 32}, num_warps=8)),
    # Exact products of float32 keep their operands in registers.
    Rule({"channels": 64, "group": 16}, Configuration({"PIXELS": 32, "INNER": 16})),
    Rule({}, Configuration({"PIXELS": 16, "INNER": 16}, num_warps=16)),
)
POINT_BACKWARD = Table(
    "multi_dilation_conv.point_backward",
    Rule({"group": 16, "bits": 16}, Configuration({"PIXELS": 128, "INNER": 32})),
    Rule({"bits": 16}, Configuration({"PIXELS": 64, "INNER": 32})),
    Rule({"group": 32}, Configuration({"PIXELS": 64, "INNER": 16})),
    Rule({}, Configuration({"PIXELS": 32, "INNER": 16})),
)
BRANCH_BACKWARD = Table(
    "multi_dilation_conv.branch_backward",
    Rule({"group": 16, "bits": 16}, Configuration({"PIXELS": 128, "INNER": 16})),
    Rule({"group": 16}, Configuration({"PIXELS": 64, "INNER": 16}, num_stages=1)),
    Rule({}, Configuration({"PIXELS": 32, "INNER": 16}, num_stages=1)),
)
BRANCH_WEIGHT = Table(
    "multi_dilation_conv.branch_weight",
    Rule({"group": 16, "bits": 16}, Configuration({"PIXELS": 128})),
    Rule({"bits": 16}, Configuration({"PIXELS": 64})),
    Rule({"group": 16, "inner": 1}, Configuration({"PIXELS": 128})),
    Rule({"inner": 1}, Configuration({"PIXELS": 32})),
    # A dense one is a product over PIXELS.
    Rule({"group": 32}, Configuration({"PIXELS": 16})),
    Rule({}, Configuration({"PIXELS": 16}, num_warps=8)),
)
POINT_WEIGHT = Table(
    "multi_dilation_conv.point_weight",
    Rule({"bits": 16}, Configuration({"PIXELS": 64, "OUT": 32})),
    Rule({"group": 16}, Configuration({"PIXELS": 32, "OUT": 32})),
    Rule({}, Configuration({"PIXELS": 16, "OUT": 32})),
)


def can_run(arguments: Arguments) -> str | None:
    reason = refuses(arguments)
    if reason is None and not arguments["w_branches"]:
        reason = "there is no branch"
    if reason is not None:
        return reason
    channels, group = arguments["x"].shape[1], arguments["w_branches"][0].shape[0]
    if channels > _MOST_CHANNELS:
        return f"x has {channels} channels; it takes up to {_MOST_CHANNELS}"
    if group > _MOST_OF_GROUP:
        return f"a group has {group} channels; it takes up to {_MOST_OF_GROUP}"
    return None


def declines(arguments: Arguments) -> str | None:
    """Few channels in 16 bits, whose picture the CUDA kernels read once, with its halo.

    Milliseconds on an H200, theirs and these, batch 4, bfloat16 (bench/results/nvidia-h200):
    dense forward 0.092 and 0.139 with C = 32, 0.038 and 0.053 with C = 64, 0.049 and 0.036 with
    C = 128. In channels-last, where 32 channels are 64 bytes, also depthwise, forward 0.067 and
    0.179, and the backward of both, 0.27 and 0.37 to 0.35 and 0.48.
    """
    reason = declined_by_all(arguments)
    if reason is not None:
        return reason
    x, w_branches = arguments["x"], arguments["w_branches"]
    if x.dtype == torch.float32 or "cuda" not in backends.names():
        return None
    dense, forward = w_branches[0].shape[1] > 1, "grad_out" not in arguments
    few = 64 if dense and forward else 32 if is_channels_last(x) else 0
    if x.shape[1] > few:
        return None
    if backends.get("cuda").reason_not("multi_dilation_conv", arguments) is not None:
        return None
    return f"with up to {few} channels the CUDA kernels were measured faster"


@triton.jit
def _activated(z, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    if ACTIVATION == "relu":
        z = tl.where(z <= 0.0, 0.0, z)  # NaN stays
    if ACTIVATION == "silu":
        z = z * tl.sigmoid(z)
    return z


@triton.jit
def _activation_backward(z, grad, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    if ACTIVATION == "relu":
        grad = tl.where(z <= 0.0, 0.0, grad)
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(z)
        grad = grad * sigmoid * (1.0 + z * (1.0 - sigmoid))
    return grad


@triton.jit
def _dilation(branch, DILATIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """DILATIONS[branch], which Triton cannot index by what is known at run time only."""
    found = branch * 0
    for i in tl.static_range(len(DILATIONS)):
        found = tl.where(branch == i, DILATIONS[i], found)
    return found


@triton.jit
def _tap(tap, row, column, dilation, H, W):  # type: ignore[no-untyped-def]
    """How far on lies the pixel that a tap (0 to 8) reads, and whether it is inside the picture."""
    down = (tap // 3 - 1) * dilation
    right = (tap % 3 - 1) * dilation
    # As unsigned numbers, those below zero are the largest.
    inside = ((row + down).to(tl.uint32) < H) & ((column + right).to(tl.uint32) < W)
    return down * W + right, inside


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    x,  # (B,C,N)
    w_branches,  # (n,9,GROUP,GROUP) or (n,9,GROUP,1): branch, tap, channel out and in of a group
    w_point,  # (OUT,n+1,GROUP)
    bias,  # (C), if HAS_BIAS
    out,  # (B,C,N)
    preactivation,  # (B,n*G,N), if SAVE
    C,
    G,
    H,
    W,
    x_b,
    x_c,
    x_n,
    out_b,
    out_c,
    out_n,
    pre_b,
    pre_c,
    pre_n,
    DILATIONS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DENSE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,  # at least G
    OUT: tl.constexpr,  # at least C
    PIXELS: tl.constexpr,
    INNER: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Program (b,t) does pixels t*PIXELS and following of sample b."""
    index = tl.int64 if WIDE else tl.int32
    N = H * W
    tiles = tl.cdiv(N, PIXELS)
    program = tl.program_id(0)
    b = (program // tiles).to(tl.int64)
    n = (program % tiles) * PIXELS + tl.arange(0, PIXELS)
    x += b * x_b
    g = tl.arange(0, GROUP)
    o = tl.arange(0, OUT)
    inside = (g < G)[:, None] & (n < N)[None, :]
    row, column = n // W, n % W
    x += (n.to(index) * x_n)[None, :]
    at_g = (g.to(index) * x_c)[:, None]

    unchanged = tl.load(x + at_g, inside, other=0.0)
    w_point += o[:, None] * ((len(DILATIONS) + 1) * GROUP) + g[None, :]
    weight = tl.load(w_point)
    total = tl.dot(weight, unchanged, input_precision=PRECISION)
    # Counted at run time: of one branch the compiler makes no loop, and spills.
    for branch in range(C // G - 1):
        dilation = _dilation(branch, DILATIONS)
        group = x + (branch + 1) * G * tl.cast(x_c, index)
        weights = w_branches + branch * 9 * GROUP * (GROUP if DENSE else 1)
        z = tl.zeros([GROUP, PIXELS], tl.float32)
        for tap in range(9):
            further, reads = _tap(tap, row, column, dilation, H, W)
            reads = (reads & (n < N))[None, :]
            read = group + tl.cast(further, index) * x_n
            if DENSE:
                for start in range(0, G, INNER):
                    k = start + tl.arange(0, INNER)
                    value = tl.load(
                        read + (k.to(index) * x_c)[:, None], (k < G)[:, None] & reads, other=0.0
                    )
                    of_tap = tl.load(weights + (tap * GROUP + g)[:, None] * GROUP + k[None, :])
                    z = tl.dot(of_tap, value, z, input_precision=PRECISION)
            else:
                value = tl.load(read + at_g, (g < G)[:, None] & reads, other=0.0)
                scale = tl.load(weights + tap * GROUP + g).to(tl.float32)
                z += scale[:, None] * value.to(tl.float32)
        # Rows beyond the group are 0 * x, which is NaN for infinite x, and must not be added.
        z = tl.where(inside, z, 0.0).to(x.dtype.element_ty)
        if SAVE:
            channel = (branch * G + g).to(index)
            to = b * pre_b + (channel * pre_c)[:, None] + (n.to(index) * pre_n)[None, :]
            tl.store(preactivation + to, z, inside)
        activated = _activated(z.to(tl.float32), ACTIVATION).to(x.dtype.element_ty)
        weight = tl.load(w_point + (branch + 1) * GROUP)
        total = tl.dot(weight, activated, total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + o, o < C, other=0.0).to(tl.float32)[:, None]
    to = b * out_b + (o.to(index) * out_c)[:, None] + (n.to(index) * out_n)[None, :]
    tl.store(out + to, total.to(out.dtype.element_ty), (o < C)[:, None] & (n < N)[None, :])


def _padded(weight: Tensor, *shape: int) -> Tensor:
    """`weight` with zeros up to `shape`.

    Kernels read whole blocks of it then, 128 bits at a time whatever the number of channels; with
    masks, and an address for each element, they spilled where it was odd.
    """
    if weight.shape == shape:
        return weight.contiguous()
    padded = weight.new_zeros(shape)
    padded[tuple(map(slice, weight.shape))] = weight
    return padded


def _by_tap(w_branches: Sequence[Tensor], padded: int) -> Tensor:
    """The branches' weights as the kernels read them, (n,9,GROUP,GROUP) or (n,9,GROUP,1)."""
    by_tap = torch.stack(list(w_branches)).flatten(3).permute(0, 3, 1, 2)
    return _padded(by_tap, *by_tap.shape[:2], padded, 1 if by_tap.shape[3] == 1 else padded)


def _by_group(w_point: Tensor, group: int) -> Tensor:
    """The 1x1's weight (C,C) as the kernels read it, (OUT,n+1,GROUP)."""
    sizes = (_padding(w_point.shape[0]), w_point.shape[1] // group, _padding(group))
    return _padded(w_point.unflatten(1, (-1, group)), *sizes)


def _padding(channels: int) -> int:
    """Into how many channels a kernel's block takes as many."""
    return power_of_two(max(16, channels))


def forward(
    x: Tensor,
    w_branches: Sequence[Tensor],
    w_point: Tensor,
    bias: Tensor | None,
    dilations: Sequence[int],
    activation: str,
    save_for_backward: bool,
) -> tuple[Tensor, Tensor]:
    out = empty_like(x)
    batch, channels, height, width = x.shape
    group = channels // (len(dilations) + 1)
    padded = _padding(group)
    preactivation = x.new_empty(0)
    if save_for_backward:
        preactivation = _empty_branches(x, len(dilations) * group)
    x = pixels_in_sequence(x)
    configuration = configured(FORWARD, x, channels=channels, group=group, pixels=height * width)
    launch(
        _forward_kernel,
        (batch * blocks(height * width, configuration.blocks["PIXELS"]),),
        x, _by_tap(w_branches, padded),
        _by_group(w_point, group),
        w_point if bias is None else bias.contiguous(),
        out, preactivation if save_for_backward else out,
        channels, group, height, width, *strides(x), *strides(out),
        *(strides(preactivation) if save_for_backward else (0, 0, 0)),
        configuration=configuration,
        DILATIONS=tuple(dilations),
        ACTIVATION=activation,
        DENSE=w_branches[0].shape[1] == group and group > 1,
        HAS_BIAS=bias is not None,
        SAVE=save_for_backward,
        PRECISION=precision(x.dtype),
        GROUP=padded,
        OUT=_padding(channels),
        WIDE=wide(x, out),
        **within(configuration, group, "INNER"),
    )  # fmt: skip
    return out, preactivation


def _empty_branches(x: Tensor, channels: int) -> Tensor:
    """What the branches hold together, uninitialised, in the layout of `x`."""
    batch, _, height, width = x.shape
    return torch.empty(
        (batch, channels, height, width),
        dtype=x.dtype,
        device=x.device,
        memory_format=memory_format(x),
    )


@triton.jit
def _point_backward_kernel(  # type: ignore[no-untyped-def]
    grad_out,  # (B,C,N)
    w_point,  # (OUT,n+1,GROUP), OUT as in the forward kernel
    preactivation,  # (B,n*G,N)
    grad_x,  # (B,C,N): of which the first group
    grad_pre,  # (B,n*G,N)
    C,
    G,
    N,
    out_b,
    out_c,
    out_n,
    pre_b,
    pre_c,
    pre_n,
    x_b,
    x_c,
    x_n,
    grad_pre_b,
    grad_pre_c,
    grad_pre_n,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    PIXELS: tl.constexpr,
    INNER: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Program (b,t,i) does group i of pixels t*PIXELS and following of sample b."""
    index = tl.int64 if WIDE else tl.int32
    groups = C // G
    tiles = tl.cdiv(N, PIXELS)
    program = tl.program_id(0)
    i = program % groups  # groups side by side in time: grad_out is in cache for all but one
    rest = program // groups
    b = (rest // tiles).to(tl.int64)
    n = (rest % tiles) * PIXELS + tl.arange(0, PIXELS)
    g = tl.arange(0, GROUP)
    grad = tl.zeros([GROUP, PIXELS], tl.float32)
    for start in range(0, C, INNER):
        o = start + tl.arange(0, INNER)
        value = tl.load(
            grad_out + b * out_b + (o.to(index) * out_c)[:, None] + (n.to(index) * out_n)[None, :],
            (o < C)[:, None] & (n < N)[None, :],
            other=0.0,
        )
        weight = tl.load(w_point + (o[None, :] * groups + i) * GROUP + g[:, None])
        grad = tl.dot(weight, value, grad, input_precision=PRECISION)
    inside = (g < G)[:, None] & (n < N)[None, :]
    if i == 0:
        to = b * x_b + (g.to(index) * x_c)[:, None] + (n.to(index) * x_n)[None, :]
        tl.store(grad_x + to, grad.to(grad_x.dtype.element_ty), inside)
    else:
        channel = ((i - 1) * G + g).to(index)
        at = b * pre_b + (channel * pre_c)[:, None] + (n.to(index) * pre_n)[None, :]
        z = tl.load(preactivation + at, inside, other=0.0).to(tl.float32)
        grad = _activation_backward(z, grad, ACTIVATION)
        to = b * grad_pre_b + (channel * grad_pre_c)[:, None]
        to += (n.to(index) * grad_pre_n)[None, :]
        tl.store(grad_pre + to, grad.to(grad_pre.dtype.element_ty), inside)


@triton.jit
def _branch_backward_kernel(  # type: ignore[no-untyped-def]
    grad_pre,  # (B,n*G,N)
    w_branches,  # (n,9,GROUP,GROUP) or (n,9,GROUP,1)
    grad_x,  # (B,C,N): of which all but the first group
    G,
    H,
    W,
    pre_b,
    pre_c,
    pre_n,
    x_b,
    x_c,
    x_n,
    DILATIONS: tl.constexpr,
    DENSE: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    PIXELS: tl.constexpr,
    INNER: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Program (b,t,i) does branch i of pixels t*PIXELS and following of sample b."""
    index = tl.int64 if WIDE else tl.int32
    N = H * W
    tiles = tl.cdiv(N, PIXELS)
    program = tl.program_id(0)
    branch = program % len(DILATIONS)
    rest = program // len(DILATIONS)
    b = (rest // tiles).to(tl.int64)
    n = (rest % tiles) * PIXELS + tl.arange(0, PIXELS)
    g = tl.arange(0, GROUP)
    dilation = _dilation(branch, DILATIONS)
    row, column = n // W, n % W
    group = grad_pre + b * pre_b + branch * G * tl.cast(pre_c, index)
    group += (n.to(index) * pre_n)[None, :]
    at_g = (g.to(index) * pre_c)[:, None]
    weights = w_branches + branch * 9 * GROUP * (GROUP if DENSE else 1)
    grad = tl.zeros([GROUP, PIXELS], tl.float32)
    for tap in range(9):
        # The pixel that reads n at this tap.
        further, reads = _tap(8 - tap, row, column, dilation, H, W)
        reads = (reads & (n < N))[None, :]
        read = group + tl.cast(further, index) * pre_n
        if DENSE:
            for start in range(0, G, INNER):
                k = start + tl.arange(0, INNER)
                value = tl.load(
                    read + (k.to(index) * pre_c)[:, None], (k < G)[:, None] & reads, other=0.0
                )
                weight = tl.load(weights + (tap * GROUP + k)[None, :] * GROUP + g[:, None])
                grad = tl.dot(weight, value, grad, input_precision=PRECISION)
        else:
            value = tl.load(read + at_g, (g < G)[:, None] & reads, other=0.0)
            weight = tl.load(weights + tap * GROUP + g).to(tl.float32)
            grad += weight[:, None] * value.to(tl.float32)
    channel = ((branch + 1) * G + g).to(index)
    to = b * x_b + (channel * x_c)[:, None] + (n.to(index) * x_n)[None, :]
    tl.store(grad_x + to, grad.to(grad_x.dtype.element_ty), (g < G)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["B"])
def _branch_weight_kernel(  # type: ignore[no-untyped-def]
    grad_pre,  # (B,n*G,N)
    x,  # (B,C,N)
    partial,  # (S,n,9,GROUP,GROUP) or (S,n,9,GROUP,1) float32
    B,
    G,
    H,
    W,
    pre_b,
    pre_c,
    pre_n,
    x_b,
    x_c,
    x_n,
    DILATIONS: tl.constexpr,
    DENSE: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    PIXELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Program (s,i,tap) sums over every S-th block of pixels of the batch, from block s."""
    index = tl.int64 if WIDE else tl.int32
    N = H * W
    tiles = tl.cdiv(N, PIXELS)
    program = tl.program_id(0)
    tap = program % 9
    branch = (program // 9) % len(DILATIONS)
    s = program // 9 // len(DILATIONS)
    parts = tl.num_programs(0) // 9 // len(DILATIONS)
    g = tl.arange(0, GROUP)
    dilation = _dilation(branch, DILATIONS)
    of_pre = (branch * G + g).to(index) * pre_c
    of_x = ((branch + 1) * G + g).to(index) * x_c
    total = tl.zeros([GROUP, GROUP if DENSE else PIXELS], tl.float32)
    for tile in range(s, B * tiles, parts):
        b = tl.cast(tile // tiles, tl.int64)
        n = (tile % tiles) * PIXELS + tl.arange(0, PIXELS)
        further, reads = _tap(tap, n // W, n % W, dilation, H, W)
        inside = (g < G)[:, None] & (n < N)[None, :]
        grad = tl.load(
            grad_pre + b * pre_b + of_pre[:, None] + (n.to(index) * pre_n)[None, :],
            inside,
            other=0.0,
        )
        value = tl.load(
            x + b * x_b + of_x[:, None] + ((n + further).to(index) * x_n)[None, :],
            inside & reads[None, :],
            other=0.0,
        )
        if DENSE:
            total = tl.dot(grad, tl.trans(value), total, input_precision=PRECISION)
        else:
            total += grad.to(tl.float32) * value.to(tl.float32)
    if DENSE:
        to = tl.cast(program, tl.int64) * GROUP * GROUP + g[:, None] * GROUP + g[None, :]
        tl.store(partial + to, total)
    else:
        tl.store(partial + tl.cast(program, tl.int64) * GROUP + g, tl.sum(total, 1))


@triton.jit(do_not_specialize=["B"])
def _point_weight_kernel(  # type: ignore[no-untyped-def]
    grad_out,  # (B,C,N)
    x,  # (B,C,N): of which the first group
    preactivation,  # (B,n*G,N)
    partial,  # (S,rows*OUT,n+1,GROUP) float32
    partial_bias,  # (S,C) float32, if HAS_BIAS
    B,
    C,
    G,
    N,
    out_b,
    out_c,
    out_n,
    x_b,
    x_c,
    x_n,
    pre_b,
    pre_c,
    pre_n,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    OUT: tl.constexpr,
    PIXELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Program (s,j,i): rows j*OUT and following, columns of group i, every S-th block of pixels."""
    index = tl.int64 if WIDE else tl.int32
    groups = C // G
    rows = tl.cdiv(C, OUT)
    tiles = tl.cdiv(N, PIXELS)
    program = tl.program_id(0)
    i = program % groups
    j = (program // groups) % rows
    s = program // groups // rows
    parts = tl.num_programs(0) // groups // rows
    g = tl.arange(0, GROUP)
    o = j * OUT + tl.arange(0, OUT)
    # The concatenation's groups: the first of x, then the branches.
    source = x if i == 0 else preactivation
    source_b = tl.cast(tl.where(i == 0, x_b, pre_b), tl.int64)
    source_c = tl.cast(tl.where(i == 0, x_c, pre_c), index)
    source_n = tl.cast(tl.where(i == 0, x_n, pre_n), index)
    of_source = (tl.maximum(i - 1, 0) * G + g).to(index) * source_c
    total = tl.zeros([OUT, GROUP], tl.float32)
    total_bias = tl.zeros([OUT, PIXELS], tl.float32)
    for tile in range(s, B * tiles, parts):
        b = tl.cast(tile // tiles, tl.int64)
        n = (tile % tiles) * PIXELS + tl.arange(0, PIXELS)
        grad = tl.load(
            grad_out + b * out_b + (o.to(index) * out_c)[:, None] + (n.to(index) * out_n)[None, :],
            (o < C)[:, None] & (n < N)[None, :],
            other=0.0,
        )
        value = tl.load(
            source + b * source_b + of_source[:, None] + (n.to(index) * source_n)[None, :],
            (g < G)[:, None] & (n < N)[None, :],
            other=0.0,
        )
        if i > 0:
            value = _activated(value.to(tl.float32), ACTIVATION).to(x.dtype.element_ty)
        total = tl.dot(grad, tl.trans(value), total, input_precision=PRECISION)
        if HAS_BIAS:
            total_bias += grad.to(tl.float32)
    to = ((tl.cast(s, tl.int64) * rows * OUT + o)[:, None] * groups + i) * GROUP + g[None, :]
    tl.store(partial + to, total)
    if HAS_BIAS and i == 0:
        tl.store(partial_bias + tl.cast(s, tl.int64) * C + o, tl.sum(total_bias, 1), o < C)


def backward(
    grad_out: Tensor,
    x: Tensor,
    w_branches: Sequence[Tensor],
    w_point: Tensor,
    has_bias: bool,
    dilations: Sequence[int],
    activation: str,
    preactivation: Tensor,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    batch, channels, height, width = x.shape
    pixels, branches = height * width, len(dilations)
    group, inner = channels // (branches + 1), w_branches[0].shape[1]
    dense = inner == group and group > 1
    grad_x, grad_pre = empty_like(x), _empty_branches(x, branches * group)
    x, grad_out, preactivation = map(pixels_in_sequence, (x, grad_out, preactivation))
    padded = _padding(group)
    by_tap = _by_tap(w_branches, padded)
    key = {"channels": channels, "group": group, "inner": inner, "pixels": pixels}
    common = {
        "PRECISION": precision(x.dtype),
        "GROUP": padded,
        "WIDE": wide(x, grad_out, preactivation, grad_x),
    }

    def tiles(configuration: Configuration) -> int:
        return batch * blocks(pixels, configuration.blocks["PIXELS"])

    configuration = configured(POINT_BACKWARD, x, **key)
    launch(
        _point_backward_kernel,
        (tiles(configuration) * (branches + 1),),
        grad_out, _by_group(w_point, group), preactivation, grad_x, grad_pre,
        channels, group, pixels,
        *strides(grad_out), *strides(preactivation), *strides(grad_x), *strides(grad_pre),
        configuration=configuration,
        ACTIVATION=activation,
        **common,
        **within(configuration, channels, "INNER"),
    )  # fmt: skip
    configuration = configured(BRANCH_BACKWARD, x, **key)
    launch(
        _branch_backward_kernel,
        (tiles(configuration) * branches,),
        grad_pre, by_tap, grad_x, group, height, width, *strides(grad_pre), *strides(grad_x),
        configuration=configuration,
        DILATIONS=tuple(dilations),
        DENSE=dense,
        **common,
        **within(configuration, group, "INNER"),
    )  # fmt: skip

    configuration = configured(BRANCH_WEIGHT, x, **key)
    parts = parts_of_sum(tiles(configuration), 9 * branches)
    partial = by_tap.new_empty((parts, *by_tap.shape), dtype=torch.float32)
    launch(
        _branch_weight_kernel,
        (parts * branches * 9,),
        grad_pre, x, partial, batch, group, height, width, *strides(grad_pre), *strides(x),
        configuration=configuration,
        DILATIONS=tuple(dilations),
        DENSE=dense,
        **common,
    )  # fmt: skip
    grad_branches = partial.sum(0)[:, :, :group, :inner].permute(0, 2, 3, 1)
    grad_branches = grad_branches.unflatten(3, (3, 3)).to(x.dtype)

    configuration = configured(POINT_WEIGHT, x, **key)
    rows = blocks(channels, configuration.blocks["OUT"])
    parts = parts_of_sum(tiles(configuration), rows * (branches + 1))
    sizes = (parts, rows * configuration.blocks["OUT"], branches + 1, padded)
    partial = w_point.new_empty(sizes, dtype=torch.float32)
    partial_bias = w_point.new_empty((parts, channels), dtype=torch.float32)
    launch(
        _point_weight_kernel,
        (parts * rows * (branches + 1),),
        grad_out, x, preactivation, partial, partial_bias, batch, channels, group, pixels,
        *strides(grad_out), *strides(x), *strides(preactivation),
        configuration=configuration,
        ACTIVATION=activation,
        HAS_BIAS=has_bias,
        **common,
    )  # fmt: skip
    grad_bias = partial_bias.sum(0).to(x.dtype) if has_bias else grad_out.new_empty(0)
    grads = [g.contiguous() for g in grad_branches]
    grad_point = partial.sum(0)[:channels, :, :group].flatten(1).to(x.dtype)
    return grad_x, grads, grad_point, grad_bias


def exercise(empty: Callable[..., Tensor]) -> None:
    """Forward and backward at shapes that meet every rule of the tables, for the audit.

    Dense and depthwise, activations, bias: each form at one of the shapes, not all at each.
    """
    for channels, inner, side, activation, bias in (
        (64, 16, 128, "relu", False),
        (64, 1, 128, "silu", True),
        (256, 64, 32, "relu", False),
        (256, 1, 32, "relu", False),
        (20, 5, 9, "identity", False),
        (252, 63, 31, "relu", True),
        (64, 16, 8192, "relu", False),
    ):
        x, w_point = empty(8, channels, side, side), empty(channels, channels)
        w_branches = [empty(channels // 4, inner, 3, 3).contiguous() for _ in range(3)]
        arguments = (x, w_branches, w_point)
        rest = (empty(channels) if bias else None, (3, 5, 7), activation)
        if bias:
            forward(*arguments, *rest, False)
        out, pre = forward(*arguments, *rest, True)
        backward(out, *arguments, bias, *rest[1:], pre)
