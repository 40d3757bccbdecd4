"""Everything between a folder of pictures and batches, for Lightning and its command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from eamnet.data.cache import PictureStore
from eamnet.data.dataset import EpochSampler, ResumableLoader, SegmentationDataset
from eamnet.data.folder import FolderSource
from eamnet.data.isic import IsicSource
from eamnet.data.ph2 import Ph2Source
from eamnet.data.source import MaskFormat, Pixels, Source, shorten
from eamnet.data.splits import (
    PARTS,
    Split,
    external_split,
    kfold_split,
    official_split,
    random_split,
    validation_as_test_split,
)
from eamnet.data.synthetic import SyntheticSource
from eamnet.data.transforms import Augmentation, resize_mask_nearest

DatasetName = Literal["isic2016", "isic2017", "isic2018", "ph2", "folder", "synthetic"]
Protocol = Literal["auto", "official", "validation-as-test", "random", "kfold", "external"]

_FILES: dict[str, Callable[..., Source]] = {
    "isic2016": lambda root, **options: IsicSource(root, 2016, **options),
    "isic2017": lambda root, **options: IsicSource(root, 2017, **options),
    "isic2018": lambda root, **options: IsicSource(root, 2018, **options),
    "ph2": Ph2Source,
    "folder": FolderSource,
}


class SegmentationData(L.LightningDataModule):
    """Training, validation and test pictures of one data set.

    Every picture is read once in :meth:`setup`, so that damaged files and unfit masks show before
    a job and not inside it: unreadable pictures are left out and named, in :attr:`report` and at
    the end of the job; masks of the wrong size or with unknown classes are an error.

    Args:
        dataset: which.
        root: its folder; not for "synthetic".
        size: side of the square pictures the network sees, in pixels.
        batch_size: pictures per step and process.
        num_workers: processes that prepare batches; 0 prepares them in this one.
        split: a split file: read if it exists, else drawn and written. ``None`` draws the split
            anew, with the same result for the same seed.
        protocol: how to draw it. "official": the parts as given. "validation-as-test": the official
            validation part is the test part. "random", "kfold", "external" (all are test
            pictures). "auto": official where there is a test part with masks, else
            validation-as-test where there is a validation part, else random.
        val_fraction: part of the pictures that choose the checkpoint, where the set has no such
            part.
        test_fraction: part of the pictures held out for the score; protocol "random" alone.
        folds, fold: number of folds and the one to test on; protocol "kfold" alone.
        parts: official parts to use at all, such as ``["train"]`` for random parts of it.
        exclude: ids to leave out; ``None``: those known to spoil a score
            (:data:`eamnet.data.isic.EXCLUSIONS`).
        seed: of the split, the order and the augmentation; of "synthetic", also of the pictures.
        order_seed: of the order and the augmentation alone; ``None``: ``seed``. Trainings that are
            to differ by chance alone, on the same pictures, differ in this.
        cache_dir: folder for decoded and resized pictures. ``None`` keeps them in memory: every
            process of a job then reads them all.
        augment: of training pictures; ``True`` for the defaults.
        num_classes: 1 for binary masks, else the number of classes.
        palette: colours of the classes, for masks that are colour pictures.
        resize_masks: accept masks of another size than their picture.
        missing_masks: "error", or "skip" to leave pictures without a mask out.
        strict: stop at an unreadable picture.
        synthetic_count: number of pictures of the "synthetic" set.
        synthetic_size: side of its pictures before they are resized; ``None``: ``size``.

    Attributes:
        source: the data set; after :meth:`setup`, as all that follows.
        split: the split in use.
        report: one line for each thing the user should know.
        skipped: reason by id, for pictures that cannot be read.
    """

    source: Source
    split: Split

    def __init__(
        self,
        dataset: DatasetName,
        root: str | None = None,
        size: int = 256,
        batch_size: int = 8,
        num_workers: int = 0,
        split: str | None = None,
        protocol: Protocol = "auto",
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        folds: int = 5,
        fold: int = 0,
        parts: list[str] | None = None,
        exclude: list[str] | None = None,
        seed: int = 0,
        order_seed: int | None = None,
        cache_dir: str | None = None,
        augment: bool | Augmentation = True,
        num_classes: int = 1,
        palette: list[str] | None = None,
        resize_masks: bool = False,
        missing_masks: Literal["error", "skip"] = "error",
        strict: bool = False,
        synthetic_count: int = 400,
        synthetic_size: int | None = None,
    ) -> None:
        super().__init__()
        if dataset != "synthetic" and dataset not in _FILES:
            raise ValueError(f"dataset must be one of {[*_FILES, 'synthetic']}, got {dataset!r}")
        if dataset != "synthetic" and root is None:
            raise ValueError(f"root must name the folder of {dataset}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if num_workers < 0:
            raise ValueError(f"num_workers must not be negative, got {num_workers}")
        self.dataset: DatasetName = dataset
        self.root = root
        self.size = size
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.split_file = split
        self.protocol: Protocol = protocol
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.folds = folds
        self.fold = fold
        self.parts = parts
        self.exclude = exclude
        self.seed = seed
        self.order_seed = seed if order_seed is None else order_seed
        self.cache_dir = cache_dir
        self.augment: Augmentation | None = Augmentation() if augment is True else augment or None
        self.masks = MaskFormat(num_classes, tuple(palette) if palette else None, resize_masks)
        self.num_classes = num_classes
        self.missing_masks = missing_masks
        self.strict = strict
        self.synthetic_count = synthetic_count
        self.synthetic_size = synthetic_size
        self.report: list[str] = []
        self.skipped: dict[str, str] = {}
        self._store: PictureStore | None = None
        self._read: set[str] = set()
        self._contents: dict[bytes, str] = {}  # the first picture of each content

    # Indexing and splitting -----------------------------------------------------------------

    @property
    def split_hash(self) -> str:
        """Hash of the split in use; two scores with different hashes are not comparable."""
        return self.split.hash

    def prepare_data(self) -> None:
        """Fill the cache and write the split file, before other processes come to need them."""
        if self.cache_dir is not None or self.split_file is not None:
            # Within a job, no more than it needs: predicting asks for no masks and no split.
            stage = None if self.trainer is None else self.trainer.state.fn
            self.setup(None if stage is None else stage.value)

    def setup(self, stage: str | None = None) -> None:
        """Index, split and read the pictures of a stage ("fit", "validate", "test", "predict").

        Raises:
            ValueError: if the folder, masks, split or arguments do not fit; see the classes of
                :mod:`eamnet.data`.
        """
        if stage == "predict":
            self._open("skip")
            self._fill([record.id for record in self.source])
            return
        self.index()
        wanted = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        for part in wanted.get(stage or "", PARTS):
            self._fill(getattr(self.split, part))

    def index(self) -> Split:
        """Open the data set and read or draw its split, without decoding a picture.

        Raises:
            ValueError: as :meth:`setup`.
        """
        self._open(self.missing_masks)
        if not hasattr(self, "split"):
            self.split = self._find_split()
            self.report.append(
                f"split: {self.split.protocol}, seed {self.split.seed}: "
                f"{len(self.split.train)} train, {len(self.split.val)} val, "
                f"{len(self.split.test)} test; hash {self.split.hash[:12]}"
            )
        return self.split

    def _open(self, missing_masks: str) -> None:
        if self._store is not None:
            return
        self.source = self._open_source(missing_masks)
        self.report = list(self.source.report)
        self._store = PictureStore(
            self.source, self.size, self.cache_dir, in_memory=self.cache_dir is None
        )

    def _open_source(self, missing_masks: str) -> Source:
        if self.dataset == "synthetic":
            return SyntheticSource(
                self.synthetic_count, self.seed, self.synthetic_size or self.size, self.num_classes
            )
        return _FILES[self.dataset](self.root, masks=self.masks, missing_masks=missing_masks)

    def _find_split(self) -> Split:
        usable = [r for r in self.source if r.has_mask]
        if self.parts is not None:
            unknown = sorted(set(self.parts) - set(self.source.parts))
            if unknown:
                raise ValueError(
                    f"parts: {self.source.name} has {list(self.source.parts)}, not {unknown}"
                )
            usable = [r for r in usable if r.part in self.parts]
        if not usable:
            raise ValueError(f"{self.source.name} at {self.root} has no pictures with a mask")
        exclude = self.source.exclusions if self.exclude is None else dict.fromkeys(self.exclude)
        if self.exclude and (unknown := [i for i in self.exclude if i not in self.source]):
            raise ValueError(f"exclude: {self.source.name} has no pictures {shorten(unknown)}")
        if self.split_file is not None and Path(self.split_file).exists():
            split = self._read_split(self.split_file)
            split.check(r.id for r in usable)
        else:
            split = self._draw_split(usable, exclude)
            if self.split_file is not None:
                split.write(self.split_file)
        part_of = {i: part for part in PARTS for i in getattr(split, part)}
        if self.exclude and (kept := [i for i in self.exclude if i in part_of]):
            raise ValueError(
                f"exclude: {shorten(kept)} stand in the split file {self.split_file}, which was "
                "drawn before; give another file or run_dir"
            )
        for picture_id in sorted(set(exclude) & {r.id for r in usable}):
            reason = exclude[picture_id] or "listed in exclude"
            part = part_of.get(picture_id)
            fate = "left out:" if part is None else f"is in the split file's {part} part:"
            self.report.append(f"{picture_id} {fate} {reason}")
        unused = sorted({r.id for r in usable} - set(part_of) - set(exclude))
        if unused:
            self.report.append(f"{len(unused)} pictures are in no part: {shorten(unused)}")
        # Official parts and split files are taken as they are, leaks and all, but not in silence.
        parts_of_group: dict[str, set[str]] = {}
        for record in usable:
            if record.group is not None and record.id in part_of:
                parts_of_group.setdefault(record.group, set()).add(part_of[record.id])
        for group, parts in sorted(parts_of_group.items()):
            if len(parts) > 1:
                self.report.append(
                    f"leak: {group} is divided between {' and '.join(sorted(parts))}"
                )
        return split

    def _read_split(self, path: str) -> Split:
        split = Split.read(path)
        if split.dataset != self.source.name:
            raise ValueError(
                f"split file {path} is of {split.dataset}, but dataset is {self.source.name}"
            )
        if self.protocol != "auto" and not split.protocol.startswith(_PREFIX[self.protocol]):
            raise ValueError(
                f"split file {path} was drawn as {split.protocol!r}, but protocol is "
                f"{self.protocol!r}; give another file or leave protocol at 'auto'"
            )
        fold = f"fold {self.fold} of {self.folds}, "
        if self.protocol == "kfold" and not split.protocol.startswith(fold):
            raise ValueError(
                f"split file {path} was drawn as {split.protocol!r}, but fold is {self.fold} and "
                f"folds {self.folds}; give another file"
            )
        return split

    def _draw_split(self, usable: Sequence[Any], exclude: dict[str, Any]) -> Split:
        ids = [r.id for r in usable]
        groups = {r.id: r.group for r in usable if r.group is not None}
        parts: dict[str, list[str]] = {}
        for record in usable:
            if record.part is not None:
                parts.setdefault(record.part, []).append(record.id)
        name = self.source.name
        common: dict[str, Any] = {
            "val_fraction": self.val_fraction,
            "seed": self.seed,
            "groups": groups,
            "exclude": exclude,
        }
        protocol = self.protocol
        if protocol == "auto":
            protocol = (
                "official"
                if "train" in parts and "test" in parts
                else "validation-as-test"
                if "train" in parts and "val" in parts
                else "random"
            )
        if protocol == "official":
            return official_split(name, parts, **common)
        if protocol == "validation-as-test":
            return validation_as_test_split(name, parts, **common)
        if protocol == "random":
            return random_split(name, ids, test_fraction=self.test_fraction, **common)
        if protocol == "kfold":
            return kfold_split(name, ids, fold=self.fold, folds=self.folds, **common)
        if protocol == "external":
            return external_split(name, ids, exclude=exclude)
        raise ValueError(f"protocol must be one of {['auto', *_PREFIX]}, got {protocol!r}")

    # Reading --------------------------------------------------------------------------------

    def _fill(self, ids: Sequence[str]) -> None:
        """Read pictures that were not read yet, and report what was found."""
        new = [i for i in ids if i not in self._read]
        self._read.update(new)
        assert self._store is not None
        findings = self._store.fill([self.source[i] for i in new], self.strict)
        self.skipped.update(findings.unreadable)
        self.report += [f"left out: {reason}" for reason in findings.unreadable.values()]
        for note in sorted({note for notes in findings.notes.values() for note in notes}):
            concerned = [i for i, notes in findings.notes.items() if note in notes]
            self.report.append(f"{len(concerned)} pictures: {note}: {shorten(concerned)}")
        if hasattr(self, "split"):
            self._report_twins(findings.contents)

    def _report_twins(self, contents: dict[str, bytes]) -> None:
        """Report pictures that are the same, pixel for pixel at network size, in two parts."""
        part_of = {i: part for part in PARTS for i in getattr(self.split, part)}
        twins = []
        for picture_id, content in contents.items():
            other = self._contents.setdefault(content, picture_id)
            if part_of[other] != part_of[picture_id]:
                twins.append(
                    f"{other} in {part_of[other]} and {picture_id} in {part_of[picture_id]}"
                )
        if twins:
            self.report.append(
                f"leak: {len(twins)} pictures are the same in two parts: {shorten(twins)}"
            )

    def native_mask(self, picture_id: str) -> Pixels:
        """The truth at the picture's original size: uint8 ``(H, W)`` class index.

        For a downsized copy whose original sizes are known, the mask enlarged to that size by
        nearest pixel.
        """
        record = self.source[picture_id]
        _, mask = self.source.load(record)
        if mask is None:
            raise ValueError(f"{picture_id!r} has no mask")
        return resize_mask_nearest(mask, *(record.native_size or mask.shape))

    # Batches --------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Batches in an order of (seed, epoch), of full size in every step.

        An incomplete last batch is dropped, other pictures in each epoch: batch statistics of one
        or two pictures would be noise, and steps of several processes would not line up. Only a
        set smaller than one batch is taken as it is.
        """
        dataset = self._dataset("train", self.augment)
        replicas, rank = self._processes()
        if len(dataset) < self.batch_size * replicas and (replicas > 1 or not len(dataset)):
            raise ValueError(
                f"{len(dataset)} training pictures are fewer than batch_size={self.batch_size} x "
                f"{replicas} processes"
            )
        sampler = EpochSampler(
            dataset.ids, seed=self.order_seed, shuffle=True, num_replicas=replicas, rank=rank
        )
        return ResumableLoader(
            dataset,
            sampler=sampler,
            batch_size=self.batch_size,
            drop_last=len(dataset) >= self.batch_size,
            **self._workers(),
        )

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Every validation picture once, sorted by id."""
        return self._evaluation(self._dataset("val"))

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Every test picture once, sorted by id."""
        return self._evaluation(self._dataset("test"))

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Every picture of the data set once, with a mask or without, sorted by id."""
        return self._evaluation(self._subset([record.id for record in self.source]))

    def _dataset(self, part: str, augment: Augmentation | None = None) -> SegmentationDataset:
        ids = getattr(self.split, part)
        if not ids:
            raise ValueError(
                f"the split ({self.split.protocol}) has no {part} pictures; choose another protocol"
            )
        return self._subset(ids, augment)

    def _subset(
        self, ids: Sequence[str], augment: Augmentation | None = None
    ) -> SegmentationDataset:
        readable = [i for i in ids if i not in self.skipped]
        return SegmentationDataset(
            self.source, readable, augment=augment, seed=self.order_seed, store=self._store
        )

    def _evaluation(self, dataset: SegmentationDataset) -> DataLoader[dict[str, Any]]:
        replicas, rank = self._processes()
        count, batch_size = len(dataset), self.batch_size
        if count < replicas:
            raise ValueError(f"{count} pictures are too few for {replicas} processes")
        # Processes must run the same number of steps, or those that wait for each other hang.
        # Shares that differ by one picture give different numbers only where the smaller share
        # is a whole number of batches: a slightly larger batch, which evaluation can afford.
        while count % replicas and (count // replicas) % batch_size == 0:
            batch_size += 1
        sampler = EpochSampler(dataset.ids, shuffle=False, num_replicas=replicas, rank=rank)
        return DataLoader(dataset, sampler=sampler, batch_size=batch_size, **self._workers())

    def _processes(self) -> tuple[int, int]:
        if self.trainer is None:
            return 1, 0
        return self.trainer.world_size, self.trainer.global_rank

    def _workers(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }

    # Checkpoints ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must remember of the data: its name, split and seed."""
        if not hasattr(self, "split"):
            return {}
        return {"dataset": self.split.dataset, "split_hash": self.split_hash, "seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare with what the checkpoint was trained on.

        Raises:
            ValueError: when training is to go on with another split.
        """
        if not state_dict or not hasattr(self, "split"):
            return
        if state_dict["split_hash"] == self.split_hash:
            return
        text = (
            f"the checkpoint was trained on {state_dict['dataset']} with the split "
            f"{state_dict['split_hash'][:12]}, the data now is {self.split.dataset} with the split "
            f"{self.split_hash[:12]}"
        )
        if self.trainer is not None and self.trainer.state.fn == "fit":
            raise ValueError(f"{text}: training cannot go on with other pictures")
        if state_dict["dataset"] == self.split.dataset:
            rank_zero_warn(f"{text}: pictures it was trained on may be among those scored")

    def teardown(self, stage: str | None = None) -> None:
        """Name the pictures that were left out, at the end where it is read."""
        if self.skipped:
            rank_zero_warn(
                f"{len(self.skipped)} pictures could not be read and were left out:\n  "
                + "\n  ".join(self.skipped.values())
            )


#: How the protocol of a split file begins, for each way of drawing it.
_PREFIX = {
    "official": "official",
    "validation-as-test": "validation as test",
    "random": "random",
    "kfold": "fold",
    "external": "external",
}
