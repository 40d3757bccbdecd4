"""Which pictures are for training, for choosing a checkpoint, and for the final score.

A split is drawn once, written to a file and read from there ever after, so that two runs with the
same file are comparable and two with different files say so. Draws depend on the seed and the ids
alone, through SHA-256, never on the order of a directory listing or a library's random numbers.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eamnet.versions import package_versions

SCHEMA = 1
PARTS = ("train", "val", "test")


def rank(ids: Iterable[str], *salt: object) -> list[str]:
    """Order ids as if shuffled: by the SHA-256 of the salt and the id.

    The same on every machine and in every version, and an id that is added or removed leaves the
    order of the others as it was.
    """
    prefix = "/".join(map(str, salt))
    return sorted(ids, key=lambda i: hashlib.sha256(f"{prefix}/{i}".encode()).digest())


@dataclass(frozen=True)
class Split:
    """Three disjoint sets of ids, sorted.

    Attributes:
        dataset: name of the data set, as its source gives it.
        protocol: how the parts were made, with every number that went into it.
        seed: of the draw.
        train, val, test: ids; ``val`` chooses the checkpoint, ``test`` never does.
    """

    dataset: str
    protocol: str
    seed: int
    train: tuple[str, ...]
    val: tuple[str, ...] = ()
    test: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        seen: dict[str, str] = {}
        for part in PARTS:
            ids = tuple(sorted(getattr(self, part)))
            object.__setattr__(self, part, ids)
            for picture_id in ids:
                if picture_id in seen:
                    raise ValueError(
                        f"split: {picture_id!r} is in {seen[picture_id]} and in {part}; "
                        f"each id may be in one part, once"
                    )
                seen[picture_id] = part

    @property
    def hash(self) -> str:
        """SHA-256 over the canonical JSON (sorted keys, no spaces, ASCII) of all fields."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def write(self, path: str | Path) -> None:
        """Write the split file, unless it is already there with this content.

        Raises:
            ValueError: if the file holds another split. It is never overwritten.
        """
        path = Path(path)
        if path.exists():
            present = Split.read(path)
            if present.hash != self.hash:
                raise ValueError(
                    f"{path} holds another split ({present.protocol}, seed {present.seed}, hash "
                    f"{present.hash[:12]}) than the one to be written ({self.protocol}, seed "
                    f"{self.seed}, hash {self.hash[:12]}); split files are never overwritten"
                )
            return
        content: dict[str, Any] = {
            "schema": SCHEMA,
            "hash": self.hash,
            "version": package_versions()["eamnet-kernels"],
        }
        content.update(asdict(self))
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written beside and moved, so that no other process ever reads half a file.
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=path.name, delete=False, encoding="utf-8"
        ) as file:
            json.dump(content, file, indent=1)
            file.write("\n")
        Path(file.name).chmod(0o644)
        Path(file.name).replace(path)

    @staticmethod
    def read(path: str | Path) -> Split:
        """Read a split file and check it against its own hash.

        Raises:
            ValueError: if it is no split file, of a newer schema, or was edited.
        """
        path = Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["schema"] != SCHEMA:
                raise ValueError(f"has schema {content['schema']}, this version reads {SCHEMA}")
            split = Split(
                dataset=str(content["dataset"]),
                protocol=str(content["protocol"]),
                seed=int(content["seed"]),
                **{part: tuple(map(str, content[part])) for part in PARTS},
            )
            if split.hash != content["hash"]:
                raise ValueError(
                    f"was edited: its ids hash to {split.hash[:12]}, it records "
                    f"{str(content['hash'])[:12]}; write changed splits to a new file"
                )
        except OSError as error:
            raise ValueError(f"split file {path}: {error}") from error
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a split file: {error!r}") from error
        except ValueError as error:
            raise ValueError(f"split file {path} {error}") from error
        return split

    def check(self, available: Iterable[str]) -> None:
        """Make sure every id of the split is there.

        Raises:
            ValueError: naming ids that are not.
        """
        present = set(available)
        missing = [i for part in PARTS for i in getattr(self, part) if i not in present]
        if missing:
            total = sum(len(getattr(self, part)) for part in PARTS)
            raise ValueError(
                f"{len(missing)} of the split's {total} pictures are not in {self.dataset} (or "
                f"have no mask): {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}; "
                f"the split belongs to another or a more complete copy of the data"
            )


def official_split(
    dataset: str,
    parts: Mapping[str, Sequence[str]],
    *,
    val_fraction: float = 0.1,
    seed: int = 0,
    groups: Mapping[str, str] | None = None,
    exclude: Iterable[str] = (),
) -> Split:
    """The parts as the data set gives them; a missing "val" is drawn from "train"."""
    left_out = set(exclude)
    kept = {part: [i for i in ids if i not in left_out] for part, ids in parts.items()}
    if not kept.get("train"):
        raise ValueError(f"{dataset} has no official training part; parts: {sorted(parts)}")
    protocol = "official"
    if not kept.get("val"):
        val = _draw(kept["train"], val_fraction, "val_fraction", seed, groups)
        protocol = f"official, val {val_fraction:g} of train"
        kept["val"], kept["train"] = val, sorted(set(kept["train"]) - set(val))
    return Split(dataset, protocol, seed, *(tuple(kept.get(part, ())) for part in PARTS))


def validation_as_test_split(
    dataset: str,
    parts: Mapping[str, Sequence[str]],
    *,
    val_fraction: float = 0.1,
    seed: int = 0,
    groups: Mapping[str, str] | None = None,
    exclude: Iterable[str] = (),
) -> Split:
    """The official "val" is held out for the score; the checkpoint is chosen on part of "train"."""
    if not parts.get("val"):
        raise ValueError(f"{dataset} has no official validation part; parts: {sorted(parts)}")
    split = official_split(
        dataset,
        {"train": parts.get("train", ()), "test": parts["val"]},
        val_fraction=val_fraction,
        seed=seed,
        groups=groups,
        exclude=exclude,
    )
    protocol = f"validation as test, val {val_fraction:g} of train"
    return Split(dataset, protocol, seed, split.train, split.val, split.test)


def random_split(
    dataset: str,
    ids: Iterable[str],
    *,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    seed: int = 0,
    groups: Mapping[str, str] | None = None,
    exclude: Iterable[str] = (),
) -> Split:
    """Random parts of all ids. Fractions are of the whole; groups stay together."""
    pool = sorted(set(ids) - set(exclude))
    nothing_left = (
        f"val_fraction={val_fraction:g} and test_fraction={test_fraction:g} leave nothing of "
        f"{len(pool)} pictures to train on"
    )
    if val_fraction < 1 and test_fraction < 1 <= val_fraction + test_fraction:
        raise ValueError(nothing_left)
    test = _draw(pool, test_fraction, "test_fraction", seed, groups) if test_fraction else []
    rest = sorted(set(pool) - set(test))
    share = val_fraction * len(pool) / max(1, len(rest))
    val = _draw(rest, share, "val_fraction", seed, groups) if val_fraction else []
    train = set(rest) - set(val)
    if not train:
        raise ValueError(nothing_left)
    protocol = f"random, val {val_fraction:g}, test {test_fraction:g}"
    return Split(dataset, protocol, seed, tuple(train), tuple(val), tuple(test))


def kfold_split(
    dataset: str,
    ids: Iterable[str],
    *,
    fold: int,
    folds: int = 5,
    val_fraction: float = 0.1,
    seed: int = 0,
    groups: Mapping[str, str] | None = None,
    exclude: Iterable[str] = (),
) -> Split:
    """Fold number ``fold`` (from 0) is the test part; "val" is a fraction of the other folds.

    The test parts of all folds are disjoint and together hold every picture; their sizes differ
    by one at most, where there are no groups.
    """
    if folds < 2 or not 0 <= fold < folds:
        raise ValueError(
            f"fold must lie in 0 .. folds - 1 and folds be 2 or more, got {fold=} {folds=}"
        )
    pool = sorted(set(ids) - set(exclude))
    units = _units(pool, groups)
    if len(units) < folds:
        raise ValueError(f"folds={folds} needs that many pictures or groups, got {len(units)}")
    members: list[list[str]] = [[] for _ in range(folds)]
    for first in rank(units, seed, "kfold"):
        min(members, key=len).extend(units[first])
    rest = sorted(set(pool) - set(members[fold]))
    val = _draw(rest, val_fraction, "val_fraction", seed, groups) if val_fraction else []
    protocol = f"fold {fold} of {folds}, val {val_fraction:g} of the rest"
    train = tuple(set(rest) - set(val))
    return Split(dataset, protocol, seed, train, tuple(val), tuple(members[fold]))


def external_split(dataset: str, ids: Iterable[str], *, exclude: Iterable[str] = ()) -> Split:
    """All pictures are for testing: a data set the model has never seen, as PH2 often is."""
    return Split(dataset, "external test", 0, (), (), tuple(set(ids) - set(exclude)))


def _units(ids: Iterable[str], groups: Mapping[str, str] | None) -> dict[str, list[str]]:
    """What may be drawn: single ids, and groups under their first member's id."""
    together: dict[tuple[str, str], list[str]] = {}
    for picture_id in sorted(ids):
        group = (groups or {}).get(picture_id)
        key = ("group", group) if group is not None else ("id", picture_id)
        together.setdefault(key, []).append(picture_id)
    return {members[0]: members for members in together.values()}


def _draw(
    ids: Sequence[str],
    fraction: float,
    argument: str,
    seed: int,
    groups: Mapping[str, str] | None,
) -> list[str]:
    """A random part of the ids: the given fraction, rounded, and at least one picture or group."""
    if not 0 < fraction < 1:
        raise ValueError(f"{argument} must lie between 0 and 1, got {fraction:g}")
    wanted = max(1, round(fraction * len(ids)))
    drawn: list[str] = []
    units = _units(ids, groups)
    order = rank(units, seed, argument)
    for first in order:
        if len(drawn) + len(units[first]) <= wanted:
            drawn += units[first]
        if len(drawn) == wanted:
            break
    if not drawn and units:  # all groups are larger
        drawn = units[min(order, key=lambda first: len(units[first]))]
    return sorted(drawn)
