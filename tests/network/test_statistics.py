"""Differences between configurations: their values, intervals and p."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import wilcoxon

from eamnet.statistics import Effect, contrast, holm
from eamnet.studies import differences, main_effects


def test_a_difference_is_that_of_the_means() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.random((3, 40)), generator.random((2, 40))
    effect = contrast({"a": first, "b": second}, {"a": 1, "b": -1})
    assert effect.value == pytest.approx(first.mean() - second.mean())
    assert effect.low < effect.value < effect.high
    assert effect.p == pytest.approx(wilcoxon(first.mean(0), second.mean(0)).pvalue)


def test_pairing_pictures_narrows_the_interval() -> None:
    generator = np.random.default_rng(0)
    pictures = generator.normal(0, 0.3, 60)
    scores = {c: pictures + generator.normal(s, 0.01, (3, 60)) for c, s in (("a", 0.02), ("b", 0))}
    paired = contrast(scores, {"a": 1, "b": -1})
    alone = contrast(scores, {"a": 1})
    assert paired.certain
    assert paired.high - paired.low < 0.1 * (alone.high - alone.low)


def test_the_spread_of_trainings_is_without_bias() -> None:
    generator = np.random.default_rng(0)
    widths, expected = [], []
    for seed in range(100):
        of_seed = generator.normal(0, 1, 5)
        scores = {"a": np.repeat(of_seed[:, None], 4, axis=1)}  # pictures do not vary
        effect = contrast(scores, {"a": 1}, confidence=0.6827, resamples=2000, seed=seed)
        widths.append((effect.high - effect.low) / 2)
        expected.append(of_seed.std(ddof=1) / 5**0.5)
    # Five draws of five would give 0.89 of it.
    assert np.mean(widths) == pytest.approx(np.mean(expected), rel=0.05)


def test_the_interval_covers_other_trainings() -> None:
    generator = np.random.default_rng(0)
    hits = alone = 0
    for seed in range(100):
        pictures = generator.normal(0, 0.15, 100)
        scores = {
            name: pictures + generator.normal(0, 0.02, (3, 1)) + generator.normal(0, 0.05, (3, 100))
            for name in ("a", "b")
        }
        effect = contrast(scores, {"a": 1, "b": -1}, resamples=400, seed=seed)
        hits += effect.low <= 0 <= effect.high
        means = {name: table.mean(0, keepdims=True) for name, table in scores.items()}
        effect = contrast(means, {"a": 1, "b": -1}, resamples=400, seed=seed)
        alone += effect.low <= 0 <= effect.high
    assert hits >= 85  # nominally 95
    assert alone <= 75  # of pictures alone


def test_nothing_that_differs_has_p_one() -> None:
    table = np.random.default_rng(0).random((2, 10))
    effect = contrast({"a": table, "b": table[::-1]}, {"a": 1, "b": -1})
    assert effect.p == 1
    assert effect.value == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("weights", "said"), [({}, "none"), ({"c": 1}, "'c'"), ({"a": 1, "b": -1}, "same pictures")]
)
def test_contrasts_without_meaning_are_refused(weights: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        contrast({"a": np.zeros((1, 4)), "b": np.zeros((1, 5))}, weights)


def test_a_score_that_is_no_number_is_refused() -> None:
    scores = {"a": np.array([[0.5, np.nan]]), "b": np.array([[0.5, 0.6]])}
    with pytest.raises(ValueError, match=r"NaN for \['a'\]"):
        contrast(scores, {"a": 1.0, "b": -1.0})
    assert not Effect(0.1, math.nan, math.nan, 1.0).certain


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


def test_main_effects_are_found_among_all_eight() -> None:
    generator = np.random.default_rng(0)
    pictures = generator.normal(0.7, 0.1, 50)
    scores = {}
    for name in ("baseline", "mrcf", "cmam", "eab", "mrcf+cmam", "mrcf+eab", "cmam+eab", "full"):
        gain = 0.02 * ("mrcf" in name or name == "full") + 0.01 * ("cmam" in name or name == "full")
        scores[name] = pictures + gain + generator.normal(0, 0.001, (3, 50))
    effects = main_effects(scores)
    assert effects["mrcf"].value == pytest.approx(0.02, abs=5e-4)
    assert effects["cmam"].value == pytest.approx(0.01, abs=5e-4)
    assert effects["eab"].value == pytest.approx(0, abs=5e-4)
    assert effects["mrcf"].certain
    assert differences(scores, "baseline")["full"].value == pytest.approx(0.03, abs=5e-4)
