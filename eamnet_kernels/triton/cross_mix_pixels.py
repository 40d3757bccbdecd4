"""`cross_mix_pixels` in Triton: both attentions in one kernel, their backward in two.

Definition and backward formulas: `reference/cross_mix_pixels.py`. Floor, per head, with N tokens of
d channels: 8 d N^2 operations and 2 N^2 exponentials forward, 20 d N^2 and 2 N^2 backward. The
kernels here do 28 d N^2 backward, because scores and dP are made once for dQ and once for dK, dV:
the other way, in one kernel, is to add dQ atomically, in an order that differs from run to run.

The spatial gate never multiplies a tensor. It is one number per pixel, so scores take it as a
factor of their rows (Q_s) or columns (K_s), and weights that of their columns (V_s), in float32: no
rounding is added to those of the reference, and no operand of a matrix instruction is touched.

Scores are in units of log2, for `exp2`. A row whose scores are all -inf so far has no weight yet;
without the care taken of it, -inf - -inf would make it NaN where a later key is finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from eamnet_kernels.backends import Arguments
from eamnet_kernels.triton import declines as declines
from eamnet_kernels.triton import refuses
from eamnet_kernels.triton.configurations import Configuration, Rule, Table
from eamnet_kernels.triton.launch import blocks, launch, power_of_two, wide
from eamnet_kernels.triton.products import configured, precision

_LN2 = tl.constexpr(math.log(2))
_LOG2E = tl.constexpr(1 / math.log(2))
_LARGEST_D = 128
# Bytes that 16-bit heads of more than 64 channels take of a block's shared memory without Hopper's
# instructions (docs/triton-audit.md, sm_80). GeForce cards and their kin have 101376.
_MOST_SHARED = 106624


def _configuration(queries: int, keys: int, warps: int, stages: int) -> Configuration:
    return Configuration({"QUERIES": queries, "KEYS": keys}, warps, stages)


# Keyed by the padded channels of a head, `dims`, and the width of an element. Blocks are the
# largest that spill nowhere (docs/triton-audit.md).
FORWARD = Table(
    "cross_mix_pixels.forward",
    Rule({"bits": 16, "dims": 32}, _configuration(128, 64, 8, 3)),
    Rule({"bits": 16, "dims": 64}, _configuration(128, 64, 8, 2)),
    Rule({"bits": 16}, _configuration(64, 64, 8, 2)),
    Rule({"dims": 16}, _configuration(32, 16, 4, 2)),
    Rule({"dims": 64}, _configuration(32, 32, 4, 2)),
    Rule({}, _configuration(32, 16, 4, 2)),
)
BACKWARD_Q = Table(
    "cross_mix_pixels.backward_q",
    Rule({"bits": 16, "dims": 64}, _configuration(128, 64, 8, 2)),
    Rule({"bits": 16}, _configuration(64, 64, 8, 2)),
    Rule({"dims": 32}, _configuration(32, 32, 4, 2)),
    Rule({"dims": 64}, _configuration(32, 32, 8, 2)),
    Rule({}, _configuration(32, 16, 4, 2)),
)
BACKWARD_KV = Table(
    "cross_mix_pixels.backward_kv",
    Rule({"bits": 16, "dims": 32}, _configuration(64, 128, 8, 2)),
    Rule({"bits": 16}, _configuration(64, 64, 8, 2)),
    Rule({"dims": 32}, _configuration(32, 32, 4, 2)),
    Rule({"dims": 64}, _configuration(16, 32, 8, 2)),
    Rule({}, _configuration(16, 16, 8, 1)),
)


def can_run(arguments: Arguments) -> str | None:
    q = arguments["q_s"]
    dims = q.shape[3]
    if dims > _LARGEST_D:
        return f"a head has {dims} channels; it takes up to {_LARGEST_D}"
    reason = refuses(arguments)
    if reason is None and dims > 64 and q.dtype != torch.float32 and q.is_cuda:
        card: Any = torch.cuda.get_device_properties(q.device)
        there = card.shared_memory_per_block_optin
        if there < _MOST_SHARED:
            return f"a head of {dims} channels takes more shared memory than this card's {there} B"
    return reason


@triton.jit
def _load(  # type: ignore[no-untyped-def]
    tensor,  # (N,D) of one head
    n,
    N,
    stride_n,
    stride_d,
    D: tl.constexpr,
    DIMS: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Tokens `n`, zero beyond N and D; `EVEN` where no block goes beyond N."""
    index = tl.int64 if WIDE else tl.int32
    d = tl.arange(0, DIMS)
    at = tensor + (n.to(index) * stride_n)[:, None] + (d.to(index) * stride_d)[None, :]
    if EVEN and D == DIMS:
        value = tl.load(at)
    elif EVEN:
        value = tl.load(at, (d < D)[None, :], other=0.0)
    elif D == DIMS:
        value = tl.load(at, (n < N)[:, None], other=0.0)
    else:
        value = tl.load(at, (n < N)[:, None] & (d < D)[None, :], other=0.0)
    return value


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    tensor,  # (N,D), contiguous
    value,
    n,
    N,
    D: tl.constexpr,
    DIMS: tl.constexpr,
    WIDE: tl.constexpr,
):
    index = tl.int64 if WIDE else tl.int32
    d = tl.arange(0, DIMS)
    inside = (n < N)[:, None] & (d < D)[None, :]
    at = tensor + (n.to(index) * D)[:, None] + d[None, :]
    tl.store(at, value.to(tensor.dtype.element_ty), inside)


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    scores,  # (queries,keys) float32, times log2(e)
    column,  # (keys): the gate of v, or None
    v,  # (keys,d)
    top,  # (queries): the largest score so far
    total,  # (queries): the sum of the weights relative to it
    mixed,  # (queries,d): weights times v
    PRECISION: tl.constexpr,
):
    """One block of keys added to a softmax over keys."""
    new = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(new == -float("inf"), 0.0, new)
    weight = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weight, 1)
    if column is not None:
        weight = weight * column[None, :]
    mixed = tl.dot(weight.to(v.dtype), v, mixed * shrink[:, None], input_precision=PRECISION)
    return new, total, mixed


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    q_s,  # (B,h,N,D), as are the next five, all with one set of strides
    k_s,
    v_s,
    q_c,
    k_c,
    v_c,
    gate,  # (B,N), or None
    out,  # (B,h,N,D)
    branches,  # (2,B,h,N,D), or None
    lse,  # (2,B,h,N) float32, or None
    scale,
    heads,
    N,
    count,  # B*h
    stride_b,
    stride_h,
    stride_n,
    stride_d,
    D: tl.constexpr,
    DIMS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (bh,t) does queries t*QUERIES and following of one head, over all keys."""
    tiles = tl.cdiv(N, QUERIES)
    program = tl.program_id(0)
    bh = (program // tiles).to(tl.int64)
    n = (program % tiles) * QUERIES + tl.arange(0, QUERIES)
    head = (bh // heads) * stride_b + (bh % heads) * stride_h
    factor = scale * _LOG2E
    row = tl.full([QUERIES], 1.0, tl.float32) * factor
    if gate is not None:
        gate += (bh // heads) * N
        row *= tl.load(gate + n, n < N, other=0.0).to(tl.float32)
    query_s = _load(q_s + head, n, N, stride_n, stride_d, D, DIMS, EVEN, WIDE)
    query_c = _load(q_c + head, n, N, stride_n, stride_d, D, DIMS, EVEN, WIDE)

    top_s = tl.full([QUERIES], -float("inf"), tl.float32)
    top_c = tl.full([QUERIES], -float("inf"), tl.float32)
    total_s = tl.zeros([QUERIES], tl.float32)
    total_c = tl.zeros([QUERIES], tl.float32)
    mixed_s = tl.zeros([QUERIES, DIMS], tl.float32)
    mixed_c = tl.zeros([QUERIES, DIMS], tl.float32)
    for start in range(0, N, KEYS):
        m = start + tl.arange(0, KEYS)
        key = _load(k_c + head, m, N, stride_n, stride_d, D, DIMS, EVEN, WIDE)
        value = _load(v_c + head, m, N, stride_n, stride_d, D, DIMS, EVEN, WIDE)
        scores = tl.dot(query_s, tl.trans(key), input_precision=PRECISION) * row[:, None]
        if not EVEN:
            scores = tl.where((m < N)[None, :], scores, -float("inf"))
        top_s, total_s, mixed_s = _attend(scores, None, value, top_s, total_s, mixed_s, PRECISION)

        key = _load(k_s + head, m, N, stride_n, stride_d, D, DIMS, EVEN, WIDE)
        value = _load(v_s + head, m, N, stride_n, stride_d, D, DIMS, EVEN, WIDE)
        scores = tl.dot(query_c, tl.trans(key), input_precision=PRECISION) * factor
        if gate is not None:
            column = tl.load(gate + m, m < N, other=0.0).to(tl.float32)
            scores *= column[None, :]
        else:
            column = None
        if not EVEN:
            scores = tl.where((m < N)[None, :], scores, -float("inf"))
        top_c, total_c, mixed_c = _attend(scores, column, value, top_c, total_c, mixed_c, PRECISION)

    mixed_s = mixed_s / total_s[:, None]
    mixed_c = mixed_c / total_c[:, None]
    _store(out + bh * N * D, mixed_s + mixed_c, n, N, D, DIMS, WIDE)
    if branches is not None:
        second = bh + count
        _store(branches + bh * N * D, mixed_s, n, N, D, DIMS, WIDE)
        _store(branches + second * N * D, mixed_c, n, N, D, DIMS, WIDE)
        tl.store(lse + bh * N + n, (top_s + tl.log2(total_s)) * _LN2, n < N)
        tl.store(lse + second * N + n, (top_c + tl.log2(total_c)) * _LN2, n < N)


@triton.jit
def _backward_q_kernel(  # type: ignore[no-untyped-def]
    grad,  # (B,h,N,D)
    q_s,  # (B,h,N,D), as are the next five, all with one set of strides
    k_s,
    v_s,
    q_c,
    k_c,
    v_c,
    gate,  # (B,N), or None
    branches,  # (2,B,h,N,D)
    lse,  # (2,B,h,N) float32
    delta,  # (2,B,h,N) float32, written: Σ_d grad branches
    grad_q_s,  # (B,h,N,D)
    grad_q_c,  # (B,h,N,D)
    grad_gate,  # (2,B,h,N) float32, or None: [0] is written, what comes by Q_s
    scale,
    heads,
    N,
    count,  # B*h
    stride_b,
    stride_h,
    stride_n,
    stride_d,
    grad_stride_b,
    grad_stride_h,
    grad_stride_n,
    grad_stride_d,
    D: tl.constexpr,
    DIMS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (branch,bh,t) does queries t*QUERIES and following of one softmax of one head."""
    tiles = tl.cdiv(N, QUERIES)
    program = tl.program_id(0)
    which = (program // tiles).to(tl.int64)  # of 2 B h
    second = which >= count
    bh = which % count
    n = (program % tiles) * QUERIES + tl.arange(0, QUERIES)
    head = (bh // heads) * stride_b + (bh % heads) * stride_h
    grad += (bh // heads) * grad_stride_b + (bh % heads) * grad_stride_h
    if second:
        q = q_c + head
        k = k_s + head
        v = v_s + head
        to = grad_q_c
    else:
        q = q_s + head
        k = k_c + head
        v = v_c + head
        to = grad_q_s
    query = _load(q, n, N, stride_n, stride_d, D, DIMS, EVEN, WIDE)
    grad_mixed = _load(grad, n, N, grad_stride_n, grad_stride_d, D, DIMS, EVEN, WIDE)
    mixed = _load(branches + which * N * D, n, N, D, 1, D, DIMS, EVEN, WIDE)
    row_delta = tl.sum(grad_mixed.to(tl.float32) * mixed.to(tl.float32), 1)
    tl.store(delta + which * N + n, row_delta, n < N)
    row_lse = tl.load(lse + which * N + n, n < N, other=0.0) * _LOG2E
    row = tl.full([QUERIES], 1.0, tl.float32)
    if gate is not None:
        gate += (bh // heads) * N
        row = tl.load(gate + n, (n < N) & (second == 0), other=1.0).to(tl.float32)
    factor = row * scale * _LOG2E

    result = tl.zeros([QUERIES, DIMS], tl.float32)
    for start in range(0, N, KEYS):
        m = start + tl.arange(0, KEYS)
        key = _load(k, m, N, stride_n, stride_d, D, DIMS, EVEN, WIDE)
        value = _load(v, m, N, stride_n, stride_d, D, DIMS, EVEN, WIDE)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * factor[:, None]
        grad_weight = tl.dot(grad_mixed, tl.trans(value), input_precision=PRECISION)
        if gate is not None:
            column = tl.load(gate + m, (m < N) & second, other=1.0).to(tl.float32)
            scores *= column[None, :]
            grad_weight *= column[None, :]
        weight = tl.exp2(scores - row_lse[:, None])
        if not EVEN:
            weight = tl.where((m < N)[None, :], weight, 0.0)
        grad_scores = weight * (grad_weight - row_delta[:, None])
        if gate is not None:
            grad_scores *= column[None, :]
        result = tl.dot(grad_scores.to(key.dtype), key, result, input_precision=PRECISION)

    result *= scale
    _store(to + bh * N * D, result * row[:, None], n, N, D, DIMS, WIDE)
    if gate is not None:
        along = tl.sum(result * query.to(tl.float32), 1)
        tl.store(grad_gate + bh * N + n, along, (n < N) & (second == 0))


@triton.jit
def _backward_kv_kernel(  # type: ignore[no-untyped-def]
    grad,  # (B,h,N,D)
    q_s,  # (B,h,N,D), as are the next five, all with one set of strides
    k_s,
    v_s,
    q_c,
    k_c,
    v_c,
    gate,  # (B,N), or None
    lse,  # (2,B,h,N) float32
    delta,  # (2,B,h,N) float32
    grad_k_s,  # (B,h,N,D), as are the next three
    grad_v_s,
    grad_k_c,
    grad_v_c,
    grad_gate,  # (2,B,h,N) float32, or None: [1] is written, what comes by K_s and V_s
    scale,
    heads,
    N,
    count,  # B*h
    stride_b,
    stride_h,
    stride_n,
    stride_d,
    grad_stride_b,
    grad_stride_h,
    grad_stride_n,
    grad_stride_d,
    D: tl.constexpr,
    DIMS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (branch,bh,t) does keys t*KEYS and following of one softmax of one head.

    Queries beyond N need no mask: with q, grad, lse and delta zero, they add nothing.
    """
    tiles = tl.cdiv(N, KEYS)
    program = tl.program_id(0)
    which = (program // tiles).to(tl.int64)  # of 2 B h
    second = which >= count
    bh = which % count
    m = (program % tiles) * KEYS + tl.arange(0, KEYS)
    head = (bh // heads) * stride_b + (bh % heads) * stride_h
    grad += (bh // heads) * grad_stride_b + (bh % heads) * grad_stride_h
    if second:
        q = q_c + head
        k = k_s + head
        v = v_s + head
        to_k = grad_k_s
        to_v = grad_v_s
    else:
        q = q_s + head
        k = k_c + head
        v = v_c + head
        to_k = grad_k_c
        to_v = grad_v_c
    key = _load(k, m, N, stride_n, stride_d, D, DIMS, EVEN, WIDE)
    value = _load(v, m, N, stride_n, stride_d, D, DIMS, EVEN, WIDE)
    column = tl.full([KEYS], 1.0, tl.float32)
    if gate is not None:
        gate += (bh // heads) * N
        column = tl.load(gate + m, (m < N) & second, other=1.0).to(tl.float32)
    factor = column * scale * _LOG2E
    lse += which * N
    delta += which * N

    result_k = tl.zeros([KEYS, DIMS], tl.float32)
    result_v = tl.zeros([KEYS, DIMS], tl.float32)
    for start in range(0, N, QUERIES):
        n = start + tl.arange(0, QUERIES)
        query = _load(q, n, N, stride_n, stride_d, D, DIMS, EVEN, WIDE)
        grad_mixed = _load(grad, n, N, grad_stride_n, grad_stride_d, D, DIMS, EVEN, WIDE)
        row_lse = tl.load(lse + n, n < N, other=0.0) * _LOG2E
        row_delta = tl.load(delta + n, n < N, other=0.0)
        # Transposed, keys first: what is summed over queries then needs no transposition.
        scores = tl.dot(key, tl.trans(query), input_precision=PRECISION) * factor[:, None]
        if gate is not None:
            row = tl.load(gate + n, (n < N) & (second == 0), other=1.0).to(tl.float32)
            scores *= row[None, :]
        weight = tl.exp2(scores - row_lse[None, :])
        result_v = tl.dot(
            weight.to(grad_mixed.dtype), grad_mixed, result_v, input_precision=PRECISION
        )
        grad_weight = tl.dot(value, tl.trans(grad_mixed), input_precision=PRECISION)
        grad_scores = weight * (grad_weight * column[:, None] - row_delta[None, :])
        if gate is not None:
            grad_scores *= row[None, :]
        result_k = tl.dot(grad_scores.to(query.dtype), query, result_k, input_precision=PRECISION)

    result_k *= scale
    _store(to_k + bh * N * D, result_k * column[:, None], m, N, D, DIMS, WIDE)
    _store(to_v + bh * N * D, result_v * column[:, None], m, N, D, DIMS, WIDE)
    if gate is not None:
        along = tl.sum(result_k * key.to(tl.float32) + result_v * value.to(tl.float32), 1)
        tl.store(grad_gate + which * N + m, along, (m < N) & second)


def _alike(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The six inputs with one set of strides, which is what the kernels take.

    Views into one packed tensor have it, and so have six contiguous ones; those that differ are
    copied, all to the contiguous layout.
    """
    if all(t.stride() == tensors[0].stride() for t in tensors):
        return tensors
    return tuple(t.contiguous() for t in tensors)


def _shape(q: Tensor) -> tuple[int, int, int, int]:
    batch, heads, tokens, _ = q.shape
    return heads, tokens, batch * heads, power_of_two(max(16, q.shape[3]))


def _even(tokens: int, configuration: Configuration) -> bool:
    return tokens % max(configuration.blocks.values()) == 0


def forward(
    q_s: Tensor,
    k_s: Tensor,
    v_s: Tensor,
    q_c: Tensor,
    k_c: Tensor,
    v_c: Tensor,
    spatial_gate: Tensor | None,
    scale: float,
    save_for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = _alike((q_s, k_s, v_s, q_c, k_c, v_c))
    gate = None if spatial_gate is None else spatial_gate.contiguous()
    heads, tokens, count, dims = _shape(q_s)
    out = q_s.new_empty(q_s.shape)
    branches = q_s.new_empty((2, *q_s.shape) if save_for_backward else 0)
    lse = q_s.new_empty((2, *q_s.shape[:3]) if save_for_backward else 0, dtype=torch.float32)
    configuration = configured(FORWARD, q_s, dims=dims)
    launch(
        _forward_kernel,
        (count * blocks(tokens, configuration.blocks["QUERIES"]),),
        *tensors,
        gate,
        out,
        branches if save_for_backward else None,
        lse if save_for_backward else None,
        scale, heads, tokens, count, *tensors[0].stride(),
        configuration=configuration,
        D=q_s.shape[3],
        DIMS=dims,
        EVEN=_even(tokens, configuration),
        WIDE=wide(*tensors, out),
        PRECISION=precision(q_s.dtype),
    )  # fmt: skip
    return out, branches, lse


def backward(
    grad_out: Tensor,
    q_s: Tensor,
    k_s: Tensor,
    v_s: Tensor,
    q_c: Tensor,
    k_c: Tensor,
    v_c: Tensor,
    spatial_gate: Tensor | None,
    branches: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    tensors = _alike((q_s, k_s, v_s, q_c, k_c, v_c))
    gate = None if spatial_gate is None else spatial_gate.contiguous()
    branches, lse = branches.contiguous(), lse.contiguous()
    heads, tokens, count, dims = _shape(q_s)
    grads = [q_s.new_empty(q_s.shape) for _ in range(6)]
    grad_q_s, grad_k_s, grad_v_s, grad_q_c, grad_k_c, grad_v_c = grads
    delta = torch.empty_like(lse)
    gate_parts = None if gate is None else torch.empty_like(lse)
    shape = (scale, heads, tokens, count, *tensors[0].stride(), *grad_out.stride())
    constants = {
        "D": q_s.shape[3],
        "DIMS": dims,
        "WIDE": wide(*tensors, grad_out, grad_q_s),
        "PRECISION": precision(q_s.dtype),
    }
    configuration = configured(BACKWARD_Q, q_s, dims=dims)
    launch(
        _backward_q_kernel,
        (2 * count * blocks(tokens, configuration.blocks["QUERIES"]),),
        grad_out, *tensors, gate, branches, lse, delta, grad_q_s, grad_q_c, gate_parts, *shape,
        configuration=configuration,
        EVEN=_even(tokens, configuration),
        **constants,
    )  # fmt: skip
    configuration = configured(BACKWARD_KV, q_s, dims=dims)
    launch(
        _backward_kv_kernel,
        (2 * count * blocks(tokens, configuration.blocks["KEYS"]),),
        grad_out, *tensors, gate, lse, delta, grad_k_s, grad_v_s, grad_k_c, grad_v_c, gate_parts,
        *shape,
        configuration=configuration,
        EVEN=_even(tokens, configuration),
        **constants,
    )  # fmt: skip
    if gate is None or gate_parts is None:
        return (*grads, grad_out.new_empty(0))
    return (*grads, gate_parts.sum((0, 2)).to(gate.dtype))


def exercise(empty: Callable[..., Tensor]) -> None:
    """Forward and backward at shapes that meet every rule of the tables, for the audit."""
    if not empty(1, 2, 2, 2).is_contiguous():
        return  # maps have two layouts, tokens one
    for heads, tokens, dims, gated in (
        (4, 4096, 32, True),
        (2, 1024, 64, True),
        (2, 1000, 80, True),
        (2, 1024, 128, True),
        (4, 1024, 16, False),
        (4, 2**22, 32, True),
    ):
        packed = empty(8, tokens, 6, heads * dims).unflatten(3, (heads, dims))
        q_s, k_s, v_s, q_c, k_c, v_c = packed.permute(2, 0, 3, 1, 4)
        gate = empty(8, tokens) if gated else None
        tensors = (q_s, k_s, v_s, q_c, k_c, v_c, gate)
        if not gated:
            forward(*tensors, dims**-0.5, False)
        out, branches, lse = forward(*tensors, dims**-0.5, True)
        backward(out, *tensors, branches, lse, dims**-0.5)
