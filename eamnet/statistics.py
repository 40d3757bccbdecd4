"""What a study may conclude: differences between configurations, with their uncertainty.

A score is an array ``(seeds, images)`` for each configuration: one metric of every picture after
each training. Pictures are the same for all configurations; trainings are not paired, because the
same seed gives other initial weights where the architecture differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import wilcoxon

__all__ = ["Effect", "Scores", "contrast", "holm"]

Scores = Mapping[str, NDArray[np.float64]]

RESAMPLES = 4000
CONFIDENCE = 0.95


class Effect(NamedTuple):
    """A weighted sum of configurations' mean scores.

    ``low`` and ``high`` bound its bootstrap interval; ``p`` is that of the Wilcoxon signed-rank
    test over pictures.
    """

    value: float
    low: float
    high: float
    p: float

    @property
    def certain(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


def contrast(
    scores: Scores,
    weights: Mapping[str, float],
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Effect:
    """Estimate ``sum(weights[c] * mean(scores[c]))`` over configurations ``c``.

    A single weight of 1 gives a configuration's mean, 1 and -1 the paired difference of two, and
    +-1/4 over the eight configurations of a factorial design the main effect of a module.

    The bootstrap draws pictures, the same for all configurations, and trainings, for each
    configuration by itself: the interval covers other pictures of the kind and other seeds. Of
    ``S`` trainings ``S - 1`` are drawn with replacement: the variance of their mean is then
    without bias (Rao and Wu 1988), where ``S`` draws of three trainings lose a third of it. From a
    single training nothing is known about another, and the interval covers pictures alone.

    Args:
        scores: ``(S, I)`` for each configuration; ``S`` may differ, the ``I`` pictures may not.
        weights: of the configurations that take part.
        resamples: bootstrap resamples.
        confidence: coverage of the interval.
        seed: of the draws.

    Raises:
        ValueError: no weights, an unknown configuration, unequal numbers of pictures, or a score
            that is NaN.
    """
    if not weights or (unknown := sorted(set(weights) - set(scores))):
        raise ValueError(
            f"weights must name configurations among {sorted(scores)}, "
            f"got {unknown if weights else 'none'}"
        )
    images = {scores[name].shape[1] for name in weights}
    if len(images) != 1 or not min(images):
        raise ValueError(f"scores must be of the same pictures, got {sorted(images)} of them")
    if unscored := sorted(name for name in weights if np.isnan(scores[name]).any()):
        raise ValueError(f"scores must be numbers, got NaN for {unscored}")
    (count,) = images
    generator = np.random.default_rng(seed)
    drawn = _draws(generator, resamples, count, count)
    difference = np.zeros(count)
    samples = np.zeros(resamples)
    for name in sorted(weights):
        table = scores[name]
        trainings = len(table)
        seeds = _draws(generator, resamples, trainings, max(1, trainings - 1))
        samples += weights[name] * np.einsum("rs,sr->r", seeds, table @ drawn.T)
        difference += weights[name] * table.mean(0)
    tail = (1 - confidence) / 2
    low, high = np.quantile(samples, [tail, 1 - tail])
    return Effect(float(difference.mean()), float(low), float(high), _wilcoxon(difference))


def _draws(
    generator: np.random.Generator, resamples: int, count: int, draws: int
) -> NDArray[np.float64]:
    """Weights ``(resamples, count)``, each row the share of ``draws`` that fell on an item."""
    picks = generator.integers(count, size=(resamples, draws))
    picks += count * np.arange(resamples)[:, None]
    counts = np.bincount(picks.ravel(), minlength=resamples * count)
    return counts.reshape(resamples, count) / draws


def _wilcoxon(differences: NDArray[np.float64]) -> float:
    """Two-sided p; 1 where nothing differs."""
    # Sums of equal scores in another order leave differences of 1e-17, which are ties.
    rounded = differences.round(12)
    return float(wilcoxon(rounded).pvalue) if rounded.any() else 1.0


def holm(values: Sequence[float]) -> list[float]:
    """Holm's correction of the p values of several tests, in the order given."""
    order = np.argsort(values)
    corrected = [0.0] * len(values)
    highest = 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - place) * values[index]))
        corrected[index] = highest
    return corrected
