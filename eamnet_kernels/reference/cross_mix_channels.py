"""CMAM's cross mix with the channels of a head as tokens, residual included; linear in the pixels.

With `X_s = g_s X` and `X_c = g_c X`, and the rows of every Q and K divided by their L2 norm over
the pixels: `SA = softmax(t_0 Q_s K_c^T) V_c`, `CA = softmax(t_1 Q_c K_s^T) V_s`, result `X + W_o
(SA + CA)`. Source: EAM-Net (arXiv:2512.07275), equations 1-5; normalised rows and learned
temperature as in XCiT (arXiv:2106.09681).

The folded form never makes Q, K or V: scores and norms are quadratic forms in the three Gram
matrices `G_p = X diag(g_s^p) X^T`, and the result is `X + A_1 X + A_2 (g_s X)` with two C x C
matrices per sample. `mixing_matrices` is that algebra between the two passes over X, shared by all
backends.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from eamnet_kernels.backends import Arguments
from eamnet_kernels.ops.layout import accumulation_dtype, memory_format, times_pixels

# torch.nn.functional.normalize divides by max(norm, 1e-12); on squared norms that is this.
_SMALLEST_SQUARED_NORM = 1e-24


def can_run(arguments: Arguments) -> str | None:
    return None


def direct(
    x: Tensor,
    spatial_gate: Tensor,
    channel_gate: Tensor,
    w_spatial: Tensor,
    w_channel: Tensor,
    w_out: Tensor,
    temperature: Tensor,
) -> Tensor:
    """x (B,C,H,W), gates (B,1,H,W) and (B,C), weights (3C,C), (3C,C), (C,C), temperature (2,h)."""
    batch, channels = x.shape[:2]
    heads = temperature.shape[1]

    def projections(gated: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        stacked = times_pixels(weight, gated.flatten(2))
        stacked = stacked.view(batch, 3, heads, channels // heads, stacked.shape[2])
        return stacked.unbind(1)

    q_s, k_s, v_s = projections(spatial_gate * x, w_spatial)
    q_c, k_c, v_c = projections(channel_gate[:, :, None, None] * x, w_channel)

    def attend(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        scores = normalize(q, dim=-1) @ normalize(k, dim=-1).transpose(-1, -2)
        return torch.softmax(t[:, None, None].to(scores.dtype) * scores, -1) @ v

    mixed = attend(q_s, k_c, v_c, temperature[0]) + attend(q_c, k_s, v_s, temperature[1])
    return x + times_pixels(w_out, mixed.flatten(1, 2)).view_as(x)


class _Mix(NamedTuple):
    """One direction: its result `mixed` (B,C,C) and what the backward of the algebra needs."""

    mixed: Tensor  # (B,C,C): P V, to be multiplied by W_o
    weights: Tensor  # (B,h,d,d): P
    cosines: Tensor  # (B,h,d,d): the normalised scores before the temperature
    q_gram: Tensor  # (B,C,C): Q G_1
    inverse_q: Tensor  # (B,C): 1 / |Q row|
    inverse_k: Tensor


def _heads(matrix: Tensor, heads: int) -> Tensor:
    return matrix.unflatten(-2, (heads, -1))


def _inverse_norm(rows: Tensor, gram: Tensor) -> Tensor:
    squared = ((rows @ gram) * rows).sum(-1)
    return squared.clamp_min(_SMALLEST_SQUARED_NORM).rsqrt()


def _mix(
    q: Tensor, k: Tensor, v: Tensor, gram: Tensor, gram_q: Tensor, gram_k: Tensor, t: Tensor
) -> _Mix:
    heads = t.shape[0]
    inverse_q, inverse_k = _inverse_norm(q, gram_q), _inverse_norm(k, gram_k)
    q_gram = q @ gram
    scores = _heads(q_gram, heads) @ _heads(k, heads).transpose(-1, -2)
    cosines = (
        scores
        * inverse_q.unflatten(-1, (heads, -1)).unsqueeze(-1)
        * inverse_k.unflatten(-1, (heads, -1)).unsqueeze(-2)
    )
    weights = torch.softmax(t[:, None, None] * cosines, -1)
    mixed = (weights @ _heads(v, heads)).flatten(-3, -2)
    return _Mix(mixed, weights, cosines, q_gram, inverse_q, inverse_k)


def _inverse_norm_backward(
    grad: Tensor, inverse: Tensor, rows: Tensor, gram: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the rows and of the (symmetric) Gram matrix through `_inverse_norm`."""
    # d/ds s^(-1/2) = -1/2 s^(-3/2); nothing passes where the norm was clamped.
    clamped = inverse >= _SMALLEST_SQUARED_NORM**-0.5
    grad_squared = torch.where(clamped, 0.0, -0.5 * inverse**3 * grad).unsqueeze(-1)
    grad_rows = 2 * grad_squared * (rows @ gram)
    return grad_rows, rows.transpose(-1, -2) @ (grad_squared * rows)


def _mix_backward(
    grad_mixed: Tensor,
    mix: _Mix,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gram: Tensor,
    gram_q: Tensor,
    gram_k: Tensor,
    t: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, gram, gram_q, gram_k and t, the first six per sample."""
    heads = t.shape[0]
    grad = _heads(grad_mixed, heads)
    weights, cosines = mix.weights, mix.cosines
    grad_v = (weights.transpose(-1, -2) @ grad).flatten(-3, -2)
    grad_weights = grad @ _heads(v, heads).transpose(-1, -2)
    grad_logits = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
    grad_t = (grad_logits * cosines).sum((0, 2, 3))
    grad_cosines = grad_logits * t[:, None, None]
    inverse_q = mix.inverse_q.unflatten(-1, (heads, -1)).unsqueeze(-1)
    inverse_k = mix.inverse_k.unflatten(-1, (heads, -1)).unsqueeze(-2)
    # cosine = score * inverse_q * inverse_k, so its part of either inverse is cosine / inverse.
    grad_inverse_q = (grad_cosines * cosines).sum(-1).flatten(-2) / mix.inverse_q
    grad_inverse_k = (grad_cosines * cosines).sum(-2).flatten(-2) / mix.inverse_k
    grad_scores = grad_cosines * inverse_q * inverse_k
    grad_q_gram = (grad_scores @ _heads(k, heads)).flatten(-3, -2)
    grad_k = (grad_scores.transpose(-1, -2) @ _heads(mix.q_gram, heads)).flatten(-3, -2)
    more_q, grad_gram_q = _inverse_norm_backward(grad_inverse_q, mix.inverse_q, q, gram_q)
    more_k, grad_gram_k = _inverse_norm_backward(grad_inverse_k, mix.inverse_k, k, gram_k)
    grad_q = grad_q_gram @ gram.transpose(-1, -2) + more_q
    grad_gram = q.transpose(-1, -2) @ grad_q_gram
    return grad_q, grad_k + more_k, grad_v, grad_gram, grad_gram_q, grad_gram_k, grad_t


class _Operands(NamedTuple):
    """The two directions' q, k, v and Gram matrices, gates folded into the weights."""

    spatial: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
    channel: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _operands(
    grams: Tensor, channel_gate: Tensor, w_spatial: Tensor, w_channel: Tensor
) -> _Operands:
    gram, gram_s, gram_ss = grams
    q_s, k_s, v_s = (w.expand_as(gram) for w in w_spatial.chunk(3))
    q_c, k_c, v_c = (w * channel_gate[:, None, :] for w in w_channel.chunk(3))
    return _Operands(
        (q_s, k_c, v_c, gram_s, gram_ss, gram),
        (q_c, k_s, v_s, gram_s, gram, gram_ss),
    )


def mixing_matrices(
    grams: Tensor,
    channel_gate: Tensor,
    w_spatial: Tensor,
    w_channel: Tensor,
    w_out: Tensor,
    temperature: Tensor,
) -> Tensor:
    """The per-sample matrices of `X + A_1 X + A_2 (g_s X)`, stacked: grams (3,B,C,C) -> (2,B,C,C).

    All in the dtype of `grams`, to which the other arguments are converted.
    """
    channel_gate, w_spatial, w_channel, w_out, temperature = (
        t.to(grams.dtype) for t in (channel_gate, w_spatial, w_channel, w_out, temperature)
    )
    operands = _operands(grams, channel_gate, w_spatial, w_channel)
    return torch.stack(
        [w_out @ _mix(*o, t).mixed for o, t in zip(operands, temperature, strict=True)]
    )


def mixing_matrices_backward(
    grad_matrices: Tensor,
    grams: Tensor,
    channel_gate: Tensor,
    w_spatial: Tensor,
    w_channel: Tensor,
    w_out: Tensor,
    temperature: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `mixing_matrices`' arguments for `grad_matrices` (2,B,C,C), in their order.

    That of the grams is made symmetric, as the Gram matrices are.
    """
    gate, spatial, channel, out, t = (
        a.to(grams.dtype) for a in (channel_gate, w_spatial, w_channel, w_out, temperature)
    )
    operands = _operands(grams, gate, spatial, channel)
    grad_out = torch.zeros_like(out)
    grads = []
    for operand, grad_matrix, t_direction in zip(operands, grad_matrices, t, strict=True):
        mix = _mix(*operand, t_direction)
        grad_out += (grad_matrix @ mix.mixed.transpose(-1, -2)).sum(0)
        grads.append(_mix_backward(out.t() @ grad_matrix, mix, *operand, t_direction))
    (
        (q_s, k_c, v_c, gram_s1, gram_ss1, gram1, t_0),
        (q_c, k_s, v_s, gram_s2, gram2, gram_ss2, t_1),
    ) = grads
    grad_grams = torch.stack((gram1 + gram2, gram_s1 + gram_s2, gram_ss1 + gram_ss2))
    grad_grams = 0.5 * (grad_grams + grad_grams.transpose(-1, -2))
    grad_gated = torch.cat((q_c, k_c, v_c), 1)  # of w_channel diag(gate), (B,3C,C)
    return (
        grad_grams,
        (grad_gated * channel).sum(1).to(channel_gate.dtype),
        torch.cat((q_s, k_s, v_s), 1).sum(0).to(w_spatial.dtype),
        (grad_gated * gate[:, None, :]).sum(0).to(w_channel.dtype),
        grad_out.to(w_out.dtype),
        torch.stack((t_0, t_1)).to(temperature.dtype),
    )


def working_dtype(x: Tensor) -> torch.dtype:
    """What the sums are made in: float32, or float64 for float64 and for few pixels.

    Quadratic forms square the condition number of X. With fewer pixels than about twice the
    channels (where folding gains nothing anyway) the Gram matrices are singular or nearly so, and
    float32 lost 3 digits against the direct form at one pixel.
    """
    few = x.shape[2] * x.shape[3] < 2 * x.shape[1]
    return torch.float64 if few else accumulation_dtype(x.dtype)


def _product_dtype(x: Tensor) -> torch.dtype:
    """`working_dtype`, and float64 with few channels, where it costs next to nothing.

    A library's product of few rows adds all pixels in one chain for each entry. With 8 channels in
    channels-last and 3333 pixels, on a processor with AVX2, that made up to 1.6 times the error
    allowed.
    """
    return torch.float64 if x.shape[1] < 16 else working_dtype(x)


def gated_grams(pixels: Tensor, gate: Tensor) -> Tensor:
    """pixels (B,C,N), gate (B,1,N) -> the three Gram matrices (3,B,C,C)."""
    gated = pixels * gate
    transposed = pixels.transpose(1, 2)
    return torch.stack((pixels @ transposed, gated @ transposed, gated @ gated.transpose(1, 2)))


def forward(
    x: Tensor,
    spatial_gate: Tensor,
    channel_gate: Tensor,
    w_spatial: Tensor,
    w_channel: Tensor,
    w_out: Tensor,
    temperature: Tensor,
) -> tuple[Tensor, Tensor]:
    dtype = _product_dtype(x)
    pixels, gate = x.flatten(2).to(dtype), spatial_gate.flatten(2).to(dtype)
    grams = gated_grams(pixels, gate)
    a_1, a_2 = mixing_matrices(grams, channel_gate, w_spatial, w_channel, w_out, temperature)
    out = (pixels + a_1 @ pixels + gate * (a_2 @ pixels)).to(x.dtype).view(x.shape)
    return out.contiguous(memory_format=memory_format(x)), grams.to(accumulation_dtype(x.dtype))


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
    dtype = _product_dtype(x)
    pixels, grad = x.flatten(2).to(dtype), grad_out.flatten(2).to(dtype)
    gate = spatial_gate.flatten(2).to(dtype)
    if dtype != grams.dtype:
        grams = gated_grams(pixels, gate)
    weights = (channel_gate, w_spatial, w_channel, w_out, temperature)
    transposed = pixels.transpose(1, 2)
    grad_matrices = torch.stack((grad @ transposed, (grad * gate) @ transposed))
    grad_grams, *grad_weights = mixing_matrices_backward(grad_matrices, grams, *weights)
    a_1, a_2 = mixing_matrices(grams, *weights).transpose(-1, -2)

    # X enters through the residual, the two products, and twice through each Gram matrix.
    through_a2 = a_2 @ grad
    d_0, d_1, d_2 = (2 * g @ pixels for g in grad_grams)
    grad_x = grad + a_1 @ grad + d_0 + gate * (through_a2 + d_1 + gate * d_2)
    grad_gate = (pixels * (through_a2 + 0.5 * d_1 + gate * d_2)).sum(1)
    grad_x = grad_x.to(x.dtype).view(x.shape).contiguous(memory_format=memory_format(x))
    return grad_x, grad_gate.view(spatial_gate.shape).to(spatial_gate.dtype), *grad_weights
