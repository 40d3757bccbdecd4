"""The identities of docs/algebra.md, each on random data in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from eamnet_kernels.reference import cross_mix_channels, external_memory

C, N, S = 6, 50, 5


def rand(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


X, G_S, G_C = rand(C, N), rand(N).sigmoid(), rand(C).sigmoid()
W_Q, W_K = rand(C, C), rand(C + 1, C)[:C]


def gram(power: int) -> Tensor:
    return X @ torch.diag(G_S**power) @ X.t()


def test_gates_fold_into_weights_and_loads() -> None:
    same(W_Q @ (G_S * X), G_S * (W_Q @ X))
    same(W_Q @ (G_C[:, None] * X), (W_Q * G_C) @ X)


def test_scores_and_norms_are_quadratic_forms_in_the_grams() -> None:
    q_s, k_s = W_Q @ (G_S * X), W_K @ (G_S * X)
    q_c, k_c = W_Q @ (G_C[:, None] * X), W_K @ (G_C[:, None] * X)
    same(q_s @ k_c.t(), W_Q @ gram(1) @ (W_K * G_C).t())
    same(q_c @ k_s.t(), (W_Q * G_C) @ gram(1) @ W_K.t())
    same(q_s.square().sum(1), (W_Q @ gram(2) @ W_Q.t()).diagonal())
    same(k_c.square().sum(1), ((W_K * G_C) @ gram(0) @ (W_K * G_C).t()).diagonal())


def test_mixing_matrices_give_the_direct_result() -> None:
    x = X.view(1, C, 5, 10)
    weights = (rand(3 * C, C), rand(3 * C + 3, C)[:-3], rand(C, C), rand(2, 2))
    gates = (G_S.view(1, 1, 5, 10), G_C[None])
    grams = torch.stack([gram(p)[None] for p in range(3)])
    a_1, a_2 = cross_mix_channels.mixing_matrices(grams, gates[1], *weights)
    folded = X + a_1[0] @ X + (a_2[0] @ X) * G_S
    same(cross_mix_channels.direct(x, *gates, *weights).view(C, N), folded)


def test_a_bias_cancels_in_the_softmax_over_pixels() -> None:
    key, w_in, b_in = rand(S, C), rand(C, C), rand(C, 1)
    same(
        torch.softmax(key @ (w_in @ X + b_in), -1),
        torch.softmax((key @ w_in) @ X, -1),
    )


def test_double_normalisation_in_the_log_domain() -> None:
    key = 30 * rand(S, C)  # sharp: most pixels are attended to by no slot
    logits = key @ X
    direct = torch.softmax(logits, -1)
    direct = direct / (external_memory.EPSILON + direct.sum(0))
    weights = torch.exp(logits - torch.logsumexp(logits, -1, keepdim=True))
    assert weights.max() <= 1 + 1e-12
    assert (weights.sum(0) < external_memory.EPSILON).any()
    same(weights / (external_memory.EPSILON + weights.sum(0)), direct)


def test_the_memory_folds_into_one_matrix() -> None:
    attention, value, w_out = rand(S, N), rand(S, C), rand(C, C)
    kept = torch.tensor([1.0, 0, 0, 1, 1, 0], dtype=torch.float64)
    features = kept[:, None] * (value.t() @ attention)
    same(w_out @ features, ((w_out * kept) @ value.t()) @ attention)
