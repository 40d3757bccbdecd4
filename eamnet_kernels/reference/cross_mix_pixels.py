"""Two attentions over pixels that exchange their keys and values, added: CMAM's cross mix.

`SA = softmax(Q_s K_c^T) V_c`, `CA = softmax(Q_c K_s^T) V_s`, result `SA + CA`; Q_s, K_s and V_s are
first multiplied by the spatial gate of their pixel. Source: EAM-Net (arXiv:2512.07275), equations
1-5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eamnet_kernels.backends import Arguments
from eamnet_kernels.ops.layout import accumulation_dtype

# Scores held at a time. The N x N matrix of a branch is cut into blocks of query rows of this many
# elements over batch and heads (64 MiB in float32), so that memory stays linear in N.
_SCORES_PER_BLOCK = 1 << 24


def can_run(arguments: Arguments) -> str | None:
    return None


def _gated(tensors: tuple[Tensor, ...], spatial_gate: Tensor | None) -> tuple[Tensor, ...]:
    if spatial_gate is None:
        return tensors
    return tuple(spatial_gate[:, None, :, None] * t for t in tensors)


def direct(
    q_s: Tensor,
    k_s: Tensor,
    v_s: Tensor,
    q_c: Tensor,
    k_c: Tensor,
    v_c: Tensor,
    spatial_gate: Tensor | None,
    scale: float,
) -> Tensor:
    """Six (B,h,N,d), gate (B,N) or None -> (B,h,N,d); both N x N score matrices are written out."""
    q_s, k_s, v_s = _gated((q_s, k_s, v_s), spatial_gate)
    spatial = torch.softmax(q_s @ k_c.transpose(-1, -2) * scale, -1) @ v_c
    channel = torch.softmax(q_c @ k_s.transpose(-1, -2) * scale, -1) @ v_s
    return spatial + channel


def _row_blocks(q: Tensor, k: Tensor) -> list[slice]:
    batch, heads, rows, _ = q.shape
    columns = k.shape[2]
    step = max(1, _SCORES_PER_BLOCK // max(1, batch * heads * columns))
    return [slice(start, start + step) for start in range(0, rows, step)]


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention and the log-sum-exp of its scores, block by block of query rows."""
    outs, lses = [], []
    for rows in _row_blocks(q, k):
        scores = q[:, :, rows] @ k.transpose(-1, -2) * scale
        lse = torch.logsumexp(scores, -1, keepdim=True)
        outs.append(torch.exp(scores - lse) @ v)
        lses.append(lse.squeeze(-1))
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    delta = (grad * out).sum(-1, keepdim=True)
    grad_q, grad_k, grad_v = q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    for rows in _row_blocks(q, k):
        scores = q[:, :, rows] @ k.transpose(-1, -2) * scale
        weights = torch.exp(scores - lse[:, :, rows, None])
        grad_v += weights.transpose(-1, -2) @ grad[:, :, rows]
        grad_scores = weights * (grad[:, :, rows] @ v.transpose(-1, -2) - delta[:, :, rows])
        grad_q[:, :, rows] = grad_scores @ k * scale
        grad_k += grad_scores.transpose(-1, -2) @ q[:, :, rows] * scale
    return grad_q, grad_k, grad_v


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
    dtype, accumulate = q_s.dtype, accumulation_dtype(q_s.dtype)
    q_s, k_s, v_s, q_c, k_c, v_c = (t.to(accumulate) for t in (q_s, k_s, v_s, q_c, k_c, v_c))
    q_s, k_s, v_s = _gated((q_s, k_s, v_s), spatial_gate)
    spatial, lse_s = _attention(q_s, k_c, v_c, scale)
    channel, lse_c = _attention(q_c, k_s, v_s, scale)
    out = (spatial + channel).to(dtype).contiguous()
    if not save_for_backward:
        return out, out.new_empty(0), lse_s.new_empty(0)
    return out, torch.stack((spatial, channel)).to(dtype), torch.stack((lse_s, lse_c))


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
    dtype, accumulate = q_s.dtype, accumulation_dtype(q_s.dtype)
    ungated = tuple(t.to(accumulate) for t in (q_s, k_s, v_s))
    q_s, k_s, v_s = _gated(ungated, spatial_gate)
    q_c, k_c, v_c, grad = (t.to(accumulate) for t in (q_c, k_c, v_c, grad_out))
    spatial, channel = branches.to(accumulate)
    grad_q_s, grad_k_c, grad_v_c = _attention_backward(grad, q_s, k_c, v_c, spatial, lse[0], scale)
    grad_q_c, grad_k_s, grad_v_s = _attention_backward(grad, q_c, k_s, v_s, channel, lse[1], scale)
    grads_s: tuple[Tensor, ...] = (grad_q_s, grad_k_s, grad_v_s)
    grad_gate = grad_out.new_empty(0)
    if spatial_gate is not None:
        gate_terms = [(g * t).sum((1, 3)) for g, t in zip(grads_s, ungated, strict=True)]
        grad_gate = torch.stack(gate_terms).sum(0).to(spatial_gate.dtype)
        grads_s = _gated(grads_s, spatial_gate)
    grads = (*grads_s, grad_q_c, grad_k_c, grad_v_c)
    return (*(g.to(dtype).contiguous() for g in grads), grad_gate)
