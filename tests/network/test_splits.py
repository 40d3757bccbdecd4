"""Splits: disjoint, reproducible, tamper-evident, and never overwritten."""

import json

import pytest

from eamnet.data.splits import (
    Split,
    external_split,
    kfold_split,
    official_split,
    random_split,
    rank,
    validation_as_test_split,
)

IDS = [f"p{i:03d}" for i in range(100)]


def all_ids(split):
    return sorted(split.train + split.val + split.test)


def test_random_split_divides_everything_in_the_wanted_sizes():
    split = random_split("set", IDS, val_fraction=0.1, test_fraction=0.2, seed=1)
    assert all_ids(split) == IDS
    assert (len(split.train), len(split.val), len(split.test)) == (70, 10, 20)
    assert list(split.train) == sorted(split.train)


def test_draws_depend_on_the_seed_and_not_on_the_order_of_ids():
    split = random_split("set", IDS, seed=1)
    assert random_split("set", IDS[::-1], seed=1) == split
    assert random_split("set", IDS, seed=2).test != split.test


def test_draws_do_not_change_between_versions():
    # Literal: a split file that is lost can be drawn again by any version.
    assert rank(["a", "b", "c", "d", "e"], 0, "val_fraction") == ["b", "d", "c", "e", "a"]


def test_groups_stay_together_in_every_protocol():
    groups = {i: f"lesion{n // 7}" for n, i in enumerate(IDS)}
    splits = [random_split("set", IDS, seed=s, groups=groups) for s in range(5)]
    splits += [kfold_split("set", IDS, fold=f, groups=groups) for f in range(5)]
    splits += [official_split("set", {"train": IDS[:70], "test": IDS[70:]}, groups=groups)]
    for split in splits:
        for group in set(groups.values()):
            members = {i for i in IDS if groups[i] == group}
            parts = [p for p in (split.train, split.val, split.test) if members & set(p)]
            assert len(parts) == 1
        assert split.val
        assert split.test


def test_groups_larger_than_a_part_still_fill_it():
    ids = IDS[:15]
    groups = {name: f"g{index // 5}" for index, name in enumerate(ids)}
    split = random_split("set", ids, groups=groups)
    assert len(split.train) == len(split.val) == len(split.test) == 5


def test_folds_are_disjoint_and_complete():
    splits = [kfold_split("set", IDS, fold=f, folds=7, seed=4) for f in range(7)]
    tested = [i for split in splits for i in split.test]
    assert sorted(tested) == IDS
    assert {len(split.test) for split in splits} == {14, 15}
    assert all(all_ids(split) == IDS for split in splits)
    assert all(split.val for split in splits)


def test_official_parts_are_kept_and_a_missing_val_is_drawn_from_train():
    parts = {"train": IDS[:60], "val": IDS[60:70], "test": IDS[70:]}
    split = official_split("set", parts, exclude=["p060", "p099"])
    assert split.train == tuple(IDS[:60])
    assert split.val == tuple(IDS[61:70])
    assert split.test == tuple(IDS[70:99])
    drawn = official_split("set", {"train": IDS[:60], "test": IDS[70:]}, val_fraction=0.1)
    assert len(drawn.val) == 6
    assert set(drawn.val) < set(IDS[:60])
    assert drawn.test == tuple(IDS[70:])


def test_validation_as_test_never_chooses_on_what_it_scores():
    split = validation_as_test_split("set", {"train": IDS[:80], "val": IDS[80:]}, exclude=["p080"])
    assert split.test == tuple(IDS[81:])
    assert set(split.val) < set(IDS[:80])


def test_external_split_trains_on_nothing():
    split = external_split("ph2", IDS)
    assert split.test == tuple(IDS)
    assert split.train == split.val == ()


def test_overlap_is_refused():
    with pytest.raises(ValueError, match="'b' is in train and in test"):
        Split("set", "mine", 0, ("a", "b"), (), ("b",))
    with pytest.raises(ValueError, match="'a' is in train and in train"):
        Split("set", "mine", 0, ("a", "a"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: random_split("set", IDS, val_fraction=1.0), "val_fraction must lie between"),
        (lambda: random_split("set", IDS[:1]), "leave nothing of 1 pictures"),
        (
            lambda: random_split("set", IDS, val_fraction=0.5, test_fraction=0.5),
            "leave nothing of 100 pictures",
        ),
        (lambda: kfold_split("set", IDS, fold=5, folds=5), "fold must lie in"),
        (lambda: kfold_split("set", IDS[:3], fold=0, folds=5), "needs that many"),
        (lambda: official_split("set", {"test": IDS}), "no official training part"),
        (lambda: validation_as_test_split("set", {"train": IDS}), "no official validation part"),
    ],
)
def test_impossible_draws_say_why(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_files_round_trip_and_are_not_overwritten(tmp_path):
    path = tmp_path / "new" / "split.json"
    split = random_split("set", IDS, seed=1)
    split.write(path)
    assert Split.read(path) == split
    before = path.stat().st_mtime_ns
    split.write(path)
    assert path.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="never overwritten"):
        random_split("set", IDS, seed=2).write(path)
    assert Split.read(path) == split
    assert list(path.parent.iterdir()) == [path], "no temporary files left"
    content = json.loads(path.read_text())
    assert {"schema", "hash", "version", "dataset", "protocol", "seed"} < set(content)


def test_hash_is_of_content_alone():
    a = Split("set", "mine", 0, ("b", "a"), ("c",), ("d",))
    assert a.hash == Split("set", "mine", 0, ("a", "b"), ("c",), ("d",)).hash
    assert a.hash == "bbb850b27f8aa9f447b9503a450d84eeec657fc9e27d81e7c97e3d968a358840"
    assert a.hash != Split("set", "mine", 0, ("a", "c"), ("b",), ("d",)).hash


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["train"].append("p999"), "was edited"),
        (lambda c: c.update(hash="0" * 64), "was edited"),
        (lambda c: c.update(schema=99), "has schema 99"),
        (lambda c: c.pop("val"), "is not a split file"),
        (lambda c: c["val"].append(c["test"][0]), "in val and in test"),
    ],
)
def test_edited_files_are_refused(tmp_path, change, message):
    path = tmp_path / "split.json"
    random_split("set", IDS).write(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        Split.read(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "split.json"
    with pytest.raises(ValueError, match="No such file"):
        Split.read(path)
    for text in ("", "[1, 2]", '{"a": 1}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="is not a split file"):
            Split.read(path)


def test_missing_pictures_are_named():
    split = random_split("set", IDS)
    split.check(IDS)
    with pytest.raises(ValueError, match=r"1 of the split's 100 pictures are not in set.*p042"):
        split.check(set(IDS) - {"p042"})
