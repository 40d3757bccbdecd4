"""Pictures as tensors, in an order and with an augmentation that a resumed run repeats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from eamnet.data.cache import PictureStore
from eamnet.data.source import Source
from eamnet.data.splits import rank as rank_by_hash
from eamnet.data.transforms import Augmentation, to_float

#: Position in the list of ids; with the epoch before it, as :class:`EpochSampler` gives it.
Key = int | tuple[int, int]


class SegmentationDataset(Dataset[dict[str, Any]]):
    """Pictures of a source at network size.

    Items are dictionaries: ``image`` float32 ``(3, S, S)`` in [0, 1]; ``mask`` float32
    ``(1, S, S)`` of 0 and 1 for binary sources, int64 ``(1, S, S)`` class index otherwise, absent
    if any of the pictures has no mask; ``id``; ``native_size`` int64 ``(2,)``, height and width.

    Args:
        source: where pictures come from.
        ids: which of them, in this order.
        size: side of the square pictures in pixels.
        augment: what to do to them, or ``None``.
        seed: of the augmentation.
        cache_dir: where to keep decoded pictures; ``None`` decodes each time.
        store: pictures that are kept already, instead of ``size`` and ``cache_dir``.
    """

    def __init__(
        self,
        source: Source,
        ids: Sequence[str],
        size: int = 256,
        augment: Augmentation | None = None,
        seed: int = 0,
        cache_dir: str | Path | None = None,
        store: PictureStore | None = None,
    ) -> None:
        self.ids = list(ids)
        self.augment = augment
        self.seed = seed
        self.epoch = 0
        self.num_classes = source.num_classes
        self._store = store or PictureStore(source, size, cache_dir)
        self._records = [source[picture_id] for picture_id in self.ids]
        # A batch cannot be built from items of which only some have a mask.
        self._with_masks = all(record.has_mask for record in self._records)

    def __len__(self) -> int:
        return len(self.ids)

    def set_epoch(self, epoch: int) -> None:
        """Choose the augmentation of items that are asked for by position alone."""
        self.epoch = epoch

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (self.epoch, key)
        record = self._records[index]
        picture = self._store[record]
        labels: Tensor | None
        if self.augment is not None:
            image, labels = self.augment(
                picture.image,
                picture.mask,
                seed=self.seed,
                epoch=epoch,
                picture_id=record.id,
            )
        else:
            image = to_float(picture.image)
            labels = None if picture.mask is None else torch.tensor(picture.mask)
        item: dict[str, Any] = {
            "image": image,
            "id": record.id,
            "native_size": torch.tensor(picture.native_size, dtype=torch.int64),
        }
        if self._with_masks and labels is not None:
            item["mask"] = labels[None].to(torch.float32 if self.num_classes == 1 else torch.int64)
        return item


class EpochSampler(DistributedSampler[tuple[int, int]]):
    """Which pictures this process sees, as (epoch, position) pairs.

    The epoch travels with each position, so that workers, kept from epoch to epoch or not, need
    not be told of it. Process r of R takes every R-th picture from the r-th on: at each step the
    processes together hold the batch that one process with R times the batch size would hold.

    Being a ``DistributedSampler`` keeps Lightning from putting its own in place, whose order
    depends on ``seed + epoch`` (so that epoch 1 of seed 0 is epoch 0 of seed 1) and which repeats
    pictures in evaluation to make the processes' shares equal.

    Args:
        ids: of the data set, in its order.
        seed: of the shuffling.
        shuffle: training: an order by hash of (seed, epoch, id), and shares of equal size, which
            leaves out up to R - 1 pictures, others in each epoch. Otherwise evaluation: the
            order of ``ids``, every picture once, so that shares may differ by one.
        num_replicas: number of processes, R.
        rank: of this process.
    """

    def __init__(
        self,
        ids: Sequence[str],
        *,
        seed: int = 0,
        shuffle: bool = True,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(
            ids,  # type: ignore[arg-type]  # only its length is asked for
            num_replicas=num_replicas,
            rank=rank,
            shuffle=shuffle,
            seed=seed,
            drop_last=shuffle,
        )
        self.ids = list(ids)
        self._position = {picture_id: i for i, picture_id in enumerate(self.ids)}
        self.skip = 0

    def __len__(self) -> int:
        spare = len(self.ids) % self.num_replicas
        return len(self.ids) // self.num_replicas + (not self.shuffle and self.rank < spare)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = rank_by_hash(self.ids, self.seed, self.epoch) if self.shuffle else self.ids
        own = order[self.rank :: self.num_replicas][: len(self)]
        return iter([(self.epoch, self._position[i]) for i in own[self.skip :]])


class ResumableLoader(DataLoader[dict[str, Any]]):
    """A training ``DataLoader`` that goes on in the middle of an epoch.

    Lightning stores its state with each checkpoint. It also asks for the iterator of the first
    epoch after a restart before it tells the sampler which epoch that is; workers would by then
    have fetched from the wrong one, so iteration does not begin before the first batch is taken.
    """

    _resume_epoch = -1
    _taken = 0

    def state_dict(self) -> dict[str, int]:
        """Epoch and number of batches taken in it."""
        return {"epoch": getattr(self.sampler, "epoch", -1), "batches": self._taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration, if it is of the state's epoch, begin after its batches."""
        self._resume_epoch, self._taken = state["epoch"], state["batches"]

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        sampler = self.sampler
        if not isinstance(sampler, EpochSampler):  # replaced, as overfit_batches does
            yield from super().__iter__()
            return
        self._taken = self._taken if sampler.epoch == self._resume_epoch else 0
        self._resume_epoch = -1
        assert self.batch_size is not None
        sampler.skip = self._taken * self.batch_size
        try:
            for batch in super().__iter__():
                self._taken += 1
                yield batch
        finally:
            sampler.skip = 0
