"""The algebra of `cross_mix_channels` between the passes over pixels, in few large products.

The same functions as `mixing_matrices` and its backward in `reference/cross_mix_channels.py`, whose
docstring has the definition, arranged for matrices so small that the number of products counts: at
C = 256 and N = 1024 they take as long as the passes over pixels. Everything is kept as rows of
projections, so that heads and the two directions are views or whole pieces of memory, and what a
norm passes to its rows is a multiple of `W G`, which is there already.

Products of C^3 per sample: 8 forward (each of the 4 C rows of Q and K times a Gram matrix for its
norm, half of them times another for the scores; W_o), 12 backward, and in the backward 8 again,
because to keep what they gave would take more memory than the Gram matrices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# torch.nn.functional.normalize divides by max(norm, 1e-12); on squared norms that is this.
_SMALLEST_SQUARED_NORM = 1e-24


class Mixing(NamedTuple):
    """`matrices` (2,B,C,C), A_1 and A_2, and what their backward needs.

    Where there are two of something, the first belongs to the direction `Q_s K_c^T`, the second to
    `Q_c K_s^T`. Q and K of one side are stacked in 2C rows.
    """

    matrices: Tensor
    channel_gate: Tensor  # (B,1,C)
    w_spatial: Tensor  # (3C,C)
    w_channel: Tensor  # (3C,C)
    w_out: Tensor  # (C,C)
    temperature: Tensor  # (2,1,h,1,1)
    gated: Tensor  # (B,3C,C): w_channel diag(channel_gate)
    norm_s: Tensor  # (B,2C,C): rows of Q_s and K_s times G_2
    norm_c: Tensor  # (B,2C,C): rows of Q_c and K_c times G_0
    left: Tensor  # (2,B,h,d,C): left right^T are the scores
    right: Tensor  # (2,B,h,d,C)
    values: Tensor  # (2,B,h,d,C): V_c, V_s
    inverse_q: Tensor  # (2,B,h,d,1): 1 / |row|
    inverse_k: Tensor  # (2,B,h,1,d)
    cosines: Tensor  # (2,B,h,d,d)
    weights: Tensor  # (2,B,h,d,d): P
    mixed: Tensor  # (2 B,C,C): P V


def _each(matrix: Tensor, like: Tensor) -> Tensor:
    """One matrix for each of a batch: bmm reads it in place, where matmul would copy the batch."""
    return matrix.expand(like.shape[0], -1, -1)


def _inverse_norms(rows: Tensor, rows_gram: Tensor) -> Tensor:
    return (rows * rows_gram).sum(-1).clamp_min(_SMALLEST_SQUARED_NORM).rsqrt()


def mix(
    grams: Tensor,
    channel_gate: Tensor,
    w_spatial: Tensor,
    w_channel: Tensor,
    w_out: Tensor,
    temperature: Tensor,
) -> Mixing:
    """From grams (3,B,C,C); all in their dtype, to which the other arguments are converted."""
    channel_gate, w_spatial, w_channel, w_out, temperature = (
        t.to(grams.dtype) for t in (channel_gate, w_spatial, w_channel, w_out, temperature)
    )
    channel_gate = channel_gate.unsqueeze(1)
    temperature = temperature[:, None, :, None, None]
    batch, channels, heads = grams.shape[1], grams.shape[2], temperature.shape[2]

    def per_head(first: Tensor, second: Tensor) -> Tensor:
        return torch.stack((first, second)).unflatten(2, (heads, -1))

    gated = w_channel * channel_gate
    gram_s = grams[1:].flatten(0, 1)
    rows_s = torch.bmm(_each(w_spatial[: 2 * channels], gram_s), gram_s)
    scores_s, norm_s = rows_s.view(2, batch, 2 * channels, channels)
    norm_c = torch.bmm(gated[:, : 2 * channels], grams[0])
    q_s, k_s = _inverse_norms(w_spatial[: 2 * channels], norm_s).split(channels, 1)
    q_c, k_c = _inverse_norms(gated[:, : 2 * channels], norm_c).split(channels, 1)
    inverse_q, inverse_k = per_head(q_s, q_c).unsqueeze(-1), per_head(k_c, k_s).unsqueeze(-2)

    left = per_head(scores_s[:, :channels], gated[:, :channels])
    right = per_head(gated[:, channels : 2 * channels], scores_s[:, channels:])
    values = per_head(gated[:, 2 * channels :], _each(w_spatial[2 * channels :], gated))
    cosines = left @ right.mT * inverse_q * inverse_k
    weights = torch.softmax(temperature * cosines, -1)
    mixed = (weights @ values).view(2 * batch, channels, channels)
    matrices = torch.bmm(_each(w_out, mixed), mixed).view(2, batch, channels, channels)
    return Mixing(
        matrices,
        channel_gate,
        w_spatial,
        w_channel,
        w_out,
        temperature,
        gated,
        norm_s,
        norm_c,
        left,
        right,
        values,
        inverse_q,
        inverse_k,
        cosines,
        weights,
        mixed,
    )


def mix_backward(
    grad_matrices: Tensor, m: Mixing, grams: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """For grad_matrices (2,B,C,C): twice the gradient of `grams` (3,B,C,C), and those of the rest.

    The first is symmetric. The others, of channel_gate, w_spatial, w_channel, w_out and
    temperature, are in the dtype of `grams`.
    """
    channels = m.w_out.shape[0]
    grads = grad_matrices.flatten(0, 1)
    grad_w_out = torch.bmm(grads, m.mixed.mT).sum(0)
    grad_mixed = torch.bmm(_each(m.w_out.t(), grads), grads).view_as(m.values)
    grad_v_c, grad_v_s = (m.weights.mT @ grad_mixed).flatten(2, 3)

    grad_weights = grad_mixed @ m.values.mT
    grad_logits = m.weights * (grad_weights - (m.weights * grad_weights).sum(-1, keepdim=True))
    grad_temperature = (grad_logits * m.cosines).sum((1, 3, 4))
    grad_cosines = grad_logits * m.temperature
    grad_scores = grad_cosines * m.inverse_q * m.inverse_k
    grad_left = (grad_scores @ m.right).flatten(2, 3)
    grad_right = (grad_scores.mT @ m.left).flatten(2, 3)

    # cosine = score / (|q| |k|), hence d cosine / d |q|^2 = -1/2 cosine / |q|^2; likewise of k.
    # Nothing passes where a norm was clamped. Twice the gradients of the squared norms:
    through = grad_cosines * m.cosines
    norm_q, norm_k = (
        torch.where(
            inverse < _SMALLEST_SQUARED_NORM**-0.5,
            -inverse.square() * through.sum(axis, keepdim=True),
            0.0,
        ).flatten(2)
        for inverse, axis in ((m.inverse_q, -1), (m.inverse_k, -2))
    )
    by_norm_s = torch.cat((norm_q[0], norm_k[1]), 1).unsqueeze(-1)
    by_norm_c = torch.cat((norm_q[1], norm_k[0]), 1).unsqueeze(-1)

    grad_scores_s = torch.cat((grad_left[0], grad_right[1]), 1)  # of [Q_s; K_s] G_1
    grad_s = torch.bmm(grad_scores_s, grams[1]).addcmul_(by_norm_s, m.norm_s)
    grad_gated = torch.cat((grad_left[1], grad_right[0], grad_v_c), 1)
    grad_gated[:, : 2 * channels].addcmul_(by_norm_c, m.norm_c)

    # Gradients of the Gram matrices, doubled. The norms' part, W^T diag(..) W, is symmetric.
    w_s, w_c = m.w_spatial[: 2 * channels], m.gated[:, : 2 * channels]
    gram_s = torch.bmm(_each(w_s.t(), grad_scores_s), grad_scores_s)
    gram_ss = torch.bmm(_each(w_s.t(), by_norm_s), by_norm_s * w_s)
    gram = torch.bmm(w_c.mT, by_norm_c * w_c)
    return (
        torch.stack((gram, gram_s + gram_s.mT, gram_ss)),
        (grad_gated * m.w_channel).sum(1),
        torch.cat((grad_s.sum(0), grad_v_s.sum(0))),
        (grad_gated * m.channel_gate).sum(0),
        grad_w_out,
        grad_temperature,
    )
