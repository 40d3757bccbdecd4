"""Data sets, splits, caching, augmentation and batches.

A *source* knows the files of one data set (:class:`IsicSource`, :class:`Ph2Source`,
:class:`FolderSource`) or draws its pictures (:class:`SyntheticSource`); a :class:`Split` says
which of them are for training, validation and test; :class:`SegmentationDataset` gives them as
tensors; :class:`SegmentationData` puts all of it together for training.
"""

from eamnet.data.cache import PictureStore
from eamnet.data.datamodule import SegmentationData
from eamnet.data.dataset import EpochSampler, ResumableLoader, SegmentationDataset
from eamnet.data.folder import FolderSource
from eamnet.data.isic import IsicSource
from eamnet.data.ph2 import Ph2Source
from eamnet.data.source import (
    MaskError,
    MaskFormat,
    Picture,
    Record,
    Source,
    UnreadablePictureError,
)
from eamnet.data.splits import (
    Split,
    external_split,
    kfold_split,
    official_split,
    random_split,
    validation_as_test_split,
)
from eamnet.data.synthetic import SyntheticSource
from eamnet.data.transforms import Augmentation

__all__ = [
    "Augmentation",
    "EpochSampler",
    "FolderSource",
    "IsicSource",
    "MaskError",
    "MaskFormat",
    "Ph2Source",
    "Picture",
    "PictureStore",
    "Record",
    "ResumableLoader",
    "SegmentationData",
    "SegmentationDataset",
    "Source",
    "Split",
    "SyntheticSource",
    "UnreadablePictureError",
    "external_split",
    "kfold_split",
    "official_split",
    "random_split",
    "validation_as_test_split",
]
