"""Synthetic dermoscopy: the same everywhere, neither empty nor trivial, of every kind."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from eamnet.data.synthetic import CLASSES, SyntheticSource, draw

# SHA-256 over picture and four-class truth. A change here changes every synthetic result ever
# reported: raise synthetic.VERSION with it.
HASHES = {
    (0, 0, 128): "04fdc9de6477d0f025333e94a01b4e15ae8aa0531e6c8176f48d131277f55a79",
    (0, 1, 128): "6a3cecdd5463aeab35085b32e1db2a46675758dd9a2cfcfaf4acf6d1ec230404",
    (7, 123456, 64): "0e7b03e190760934de81f118739a83902480f120e518e0d0334a30adcb53dc65",
    (2**64 - 1, 5, 96): "f129646cd432c007897253edbb9c5954e9394cc719f854462ef76aa077b2c84c",
}


@pytest.mark.parametrize("key", HASHES, ids=str)
def test_pictures_are_the_same_on_every_machine(key):
    image, classes = draw(*key, num_classes=4)
    assert hashlib.sha256(image.tobytes() + classes.tobytes()).hexdigest() == HASHES[key]


@pytest.fixture(scope="module")
def pictures():
    return [draw(3, index, 96, num_classes=4) for index in range(120)]


def test_every_picture_has_a_lesion_and_skin(pictures):
    for index in range(40):
        image, mask = draw(3, index, 96)
        assert image.shape == (96, 96, 3)
        assert image.dtype == mask.dtype == np.uint8
        assert set(np.unique(mask)) == {0, 1}
        assert 0.003 < mask.mean() < 0.9
        # The picture does not depend on what the truth tells apart.
        assert np.array_equal(image, pictures[index][0])


def test_classes_beyond_the_lesion(pictures):
    present = np.array([[(classes == c).any() for c in range(4)] for _, classes in pictures])
    ink, hair = present[:, 2].mean(), present[:, 3].mean()
    assert 0.1 < ink < 0.5, "ink should be in some pictures, not in all"
    assert 0.3 < hair < 0.9
    three = draw(3, 0, 96, num_classes=3)[1]
    assert three.max() <= 2


def otsu(grey):
    histogram = np.bincount(grey.ravel(), minlength=256) / grey.size
    below = histogram.cumsum()
    mean = (histogram * np.arange(256)).cumsum()
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (mean[-1] * below - mean) ** 2 / (below * (1 - below))
    return int(np.nanargmax(np.where(np.isfinite(between), between, -1)))


def test_a_threshold_does_not_solve_them_and_difficulty_is_spread():
    scores = []
    for index in range(120):
        image, mask = draw(11, index, 96)
        grey = np.asarray(Image.fromarray(image).convert("L"))
        found = grey <= otsu(grey)
        scores.append(2 * (found & (mask > 0)).sum() / (found.sum() + mask.sum()))
    assert 0.4 < np.mean(scores) < 0.8
    assert np.mean(np.array(scores) > 0.9) > 0.1, "some pictures should be easy"
    assert np.mean(np.array(scores) < 0.4) > 0.1, "some pictures should be hard"


def test_pictures_differ_in_skin_and_light(pictures):
    skin = np.array([np.median(image[classes == 0], axis=0) for image, classes in pictures])
    assert skin.std(axis=0).min() > 15
    assert len({image.tobytes() for image, _ in pictures}) == len(pictures)


def test_seeds_give_other_sets():
    assert not np.array_equal(draw(0, 0, 64)[0], draw(1, 0, 64)[0])
    assert not np.array_equal(draw(0, 1, 64)[0], draw(1, 0, 64)[0])


def test_source_reads_what_draw_draws():
    source = SyntheticSource(count=3, seed=5, size=64, num_classes=3)
    assert [record.id for record in source] == [f"synthetic_00000{i}" for i in range(3)]
    image, mask = source.load(source["synthetic_000002"])
    expected = draw(5, 2, 64, num_classes=3)
    assert np.array_equal(image, expected[0])
    assert np.array_equal(mask, expected[1])
    other = SyntheticSource(count=3, seed=6, size=64, num_classes=3)
    assert source.fingerprint(source.records[0]) != other.fingerprint(other.records[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"size": 8}, "size must be at least 16"),
        ({"seed": -1}, "seed must lie in"),
        ({"num_classes": len(CLASSES) + 1}, "num_classes must lie in 1 .. 4"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SyntheticSource(**options)
