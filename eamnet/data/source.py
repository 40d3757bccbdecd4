"""What every data set offers: records, decoding, and the problems met on the way."""

from __future__ import annotations

import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageColor

Pixels = npt.NDArray[np.uint8]

#: File names with these endings, in any case, are pictures; everything else is stray.
IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})

#: Raised whenever the same file is decoded to other pixels or classes, for the cache's keys.
DECODE_VERSION = 2

#: What makes a picture upright, by its EXIF orientation.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

#: Channels that differ by more are colour, not the noise that JPEG makes of grey.
_COLOUR = 32


class UnreadablePictureError(ValueError):
    """A file that should be a picture cannot be decoded."""


class MaskError(ValueError):
    """A mask that can be decoded cannot be used: wrong size, unknown class or colour."""


@dataclass(frozen=True)
class Record:
    """One picture of a data set.

    Attributes:
        id: unique in its set and stable across machines.
        image: the picture's file; ``None`` where pictures are drawn, not read.
        mask: the truth's file; ``None`` where there is none or it is drawn.
        group: pictures of one group (the same lesion, near-duplicates) go to one part of a split.
        diagnosis: as the data set states it.
        part: the official part ("train", "val", "test") where the data set has parts.
        native_size: (height, width) in pixels to report at, where it is not the file's own:
            for downsized copies whose original sizes are known.
    """

    id: str
    image: Path | None = None
    mask: Path | None = None
    group: str | None = None
    diagnosis: str | None = None
    part: str | None = None
    native_size: tuple[int, int] | None = None

    @property
    def has_mask(self) -> bool:
        """Whether there is a truth, as a file or drawn with the picture."""
        return self.mask is not None or self.image is None


@dataclass(frozen=True)
class Picture:
    """A decoded record: uint8 ``(H, W, 3)`` RGB, uint8 ``(H, W)`` class index or ``None``.

    ``notes`` says what had to be done to the files to get there, in words that are the same for
    every picture, so that they can be counted.
    """

    image: Pixels
    mask: Pixels | None
    notes: tuple[str, ...] = ()


class Source(ABC):
    """A data set: its records in sorted order and how to read one.

    Attributes:
        name: of the data set, as split files record it.
        records: sorted by id; ids are unique.
        report: one line for each thing the user should know (files not read, pictures without
            truth, ...).
        exclusions: ids that should be left out of training and scores, with the reason.
        num_classes: 1 for a binary truth, else the number of classes.
    """

    name: str
    num_classes: int = 1

    def __init__(self, records: Iterable[Record]) -> None:
        self.records = sorted(records, key=lambda record: record.id)
        self.report: list[str] = []
        self.exclusions: dict[str, str] = {}
        self._by_id = {record.id: record for record in self.records}
        for picture_id in self._by_id:
            try:
                picture_id.encode()
            except UnicodeEncodeError:
                raise ValueError(
                    f"the name of {picture_id!r} is not UTF-8, and split files and results are: "
                    "rename the file"
                ) from None
        if len(self._by_id) < len(self.records):
            repeated = next(a for a, b in pairwise(self.records) if a.id == b.id)
            files = [str(record.image) for record in self.records if record.id == repeated.id]
            raise ValueError(f"two pictures have the id {repeated.id!r}: {' and '.join(files)}")

    def __getitem__(self, picture_id: str) -> Record:
        try:
            return self._by_id[picture_id]
        except KeyError:
            raise ValueError(f"{self.name} has no picture {picture_id!r}") from None

    def __contains__(self, picture_id: str) -> bool:
        return picture_id in self._by_id

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    @property
    def parts(self) -> dict[str, list[str]]:
        """Ids of each official part, sorted; empty where the set has no parts."""
        parts: dict[str, list[str]] = {}
        for record in self.records:
            if record.part is not None:
                parts.setdefault(record.part, []).append(record.id)
        return parts

    @abstractmethod
    def read(self, record: Record) -> Picture:
        """Decode one record.

        Raises:
            UnreadablePictureError: if a file cannot be decoded.
            MaskError: if the mask does not fit the picture or the classes.
        """

    @abstractmethod
    def fingerprint(self, record: Record) -> str:
        """A text that changes whenever what :meth:`read` returns may change."""

    def load(self, record: Record) -> tuple[Pixels, Pixels | None]:
        """Picture and mask of a record, without the notes; see :meth:`read`."""
        picture = self.read(record)
        return picture.image, picture.mask


@dataclass(frozen=True)
class MaskFormat:
    """How mask files are to be understood.

    Attributes:
        num_classes: 1: foreground or not. More: the class of each pixel.
        palette: colours ("#rrggbb" or names) of class 0, 1, ...: for masks that are colour
            pictures. Without it, values (of palette files: palette indices) are classes.
        resize: bring a mask of another size to its picture's (nearest pixel) instead of refusing.
    """

    num_classes: int = 1
    palette: tuple[str, ...] | None = None
    resize: bool = False
    _colours: npt.NDArray[np.uint8] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.num_classes < 1 or self.num_classes > 255:
            raise ValueError(f"num_classes must lie in 1 .. 255, got {self.num_classes}")
        classes = max(2, self.num_classes)
        if self.palette is not None and len(self.palette) != classes:
            raise ValueError(
                f"palette must name one colour for each of the {classes} classes, "
                f"got {len(self.palette)}: {list(self.palette)}"
            )
        colours = [ImageColor.getrgb(colour)[:3] for colour in self.palette or ()]
        object.__setattr__(self, "_colours", np.array(colours, dtype=np.uint8).reshape(-1, 3))

    def decode(self, image: Image.Image, name: str) -> tuple[Pixels, str | None]:
        """Class of each pixel, uint8 ``(H, W)``, and a note if the values had to be bent.

        Raises:
            MaskError: for values or colours that are no class.
        """
        if image.mode == "F":
            raise MaskError(f"{name}: floating-point masks are not supported; save integers")
        if "A" in image.getbands() and len(set(image.getchannel("A").getextrema())) > 1:
            raise MaskError(
                f"{name}: is transparent in part, and transparency is not read; save the mask "
                "itself as grey values or colours"
            )
        if self.palette is not None:
            return self._by_colour(np.asarray(image.convert("RGB")), name), None
        values = np.asarray(image) if self.num_classes > 1 and image.mode == "P" else _grey(image)
        if values.min() < 0:
            raise MaskError(f"{name}: holds {values.min()}; classes are 0 and higher")
        if self.num_classes == 1:
            return _binary(values, image, name)
        if image.mode != "P" and _spread(image) > 0:
            raise MaskError(f"{name}: is a colour picture; give palette, one colour for each class")
        highest = int(values.max())
        if highest >= self.num_classes:
            raise MaskError(
                f"{name}: holds class {highest}, but num_classes={self.num_classes} accepts "
                f"0 .. {self.num_classes - 1}; where grey values or colours stand for classes, "
                f"give palette, one colour for each class"
            )
        return values.astype(np.uint8), None

    def _by_colour(self, pixels: Pixels, name: str) -> Pixels:
        # One integer per pixel makes the comparison with each colour a single pass.
        packed = pixels.astype(np.uint32) @ np.array([65536, 256, 1], dtype=np.uint32)
        classes = np.full(packed.shape, 255, dtype=np.uint8)
        for index, (red, green, blue) in enumerate(self._colours.tolist()):
            classes[packed == (red << 16 | green << 8 | blue)] = index
        unknown = packed[classes == 255]
        if unknown.size:
            raise MaskError(
                f"{name}: {unknown.size} pixels have colours outside the palette, "
                f"first #{int(unknown[0]):06x}; accepted: {', '.join(self.palette or ())}"
            )
        return classes


def _grey(image: Image.Image) -> npt.NDArray[np.integer]:
    """One channel of integers."""
    if image.mode.startswith("I"):
        return np.asarray(image)
    # A palette file's own colours decide, not its indices: they may be in any order.
    grey = np.asarray(image.convert("L"))
    return (grey > 0).astype(np.uint8) if image.mode == "1" else grey


def _spread(image: Image.Image) -> int:
    """The largest difference between the channels of a pixel: 0 for grey pictures."""
    if image.mode in ("1", "L", "LA") or image.mode.startswith("I"):
        return 0
    channels = np.asarray(image.convert("RGB"))
    return int((channels.max(axis=2) - channels.min(axis=2)).max())


def _binary(
    values: npt.NDArray[np.integer], image: Image.Image, name: str
) -> tuple[Pixels, str | None]:
    """Foreground or not, from the grey values of a mask."""
    highest = int(values.max())
    if highest <= 1:
        return values.astype(np.uint8), None
    full = 255 if highest <= 255 else 65535
    if ((values == 0) | (values == highest)).all():
        note = None if highest == full else "mask has an unusual foreground value, taken as such"
        return (values != 0).astype(np.uint8), note
    if highest <= full // 2:
        raise MaskError(
            f"{name}: holds {len(np.unique(values))} values up to {highest}, none of which is "
            f"above half of {full}; where they are classes, give num_classes"
        )
    if _spread(image) > _COLOUR:
        raise MaskError(
            f"{name}: has several colours; give palette, one colour for each class, or save it in "
            "black and white"
        )
    return (values > full // 2).astype(np.uint8), "mask not binary, thresholded at half"


def _open(path: Path) -> tuple[Image.Image, int]:
    """A decoded file, upright, and the EXIF orientation that it had, 1 where none is given."""
    try:
        image = Image.open(path)
        image.load()
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise UnreadablePictureError(f"{path}: cannot be read as a picture: {error}") from error
    try:
        orientation = int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF of a picture that is whole
        orientation = 1
    # Not `ImageOps.exif_transpose`, which also writes the EXIF anew and fails where it is odd.
    if orientation not in _UPRIGHT:
        return image, 1
    return image.transpose(_UPRIGHT[orientation]), orientation


def read_image(path: Path) -> Pixels:
    """Decode a picture to uint8 ``(H, W, 3)`` RGB, upright as its EXIF orientation says.

    Grey pictures are repeated over the channels, 16-bit ones scaled to 8 bits, alpha is dropped.

    Raises:
        UnreadablePictureError: if the file cannot be decoded.
    """
    return _read_image(path)[0]


def _read_image(path: Path) -> tuple[Pixels, int]:
    """As :func:`read_image`, with the EXIF orientation that the file had."""
    image, orientation = _open(path)
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise UnreadablePictureError(f"{path}: has values beyond 16 bits")
        scale = 257 if values.max() > 255 else 1
        image = Image.fromarray((values // scale).astype(np.uint8))
    elif image.mode == "F":
        raise UnreadablePictureError(f"{path}: floating-point pictures are not supported")
    return np.asarray(image.convert("RGB")), orientation


class FileSource(Source):
    """A data set whose pictures and masks are files."""

    def __init__(self, records: Iterable[Record], masks: MaskFormat | None = None) -> None:
        super().__init__(records)
        self.masks = masks or MaskFormat()
        self.num_classes = self.masks.num_classes

    def read(self, record: Record) -> Picture:
        """Decode a picture and its mask; see :meth:`Source.read`."""
        assert record.image is not None
        image, turned = _read_image(record.image)
        if record.mask is None:
            return Picture(image, None)
        notes = []
        mask_image, mask_turned = _open(record.mask)
        if turned != mask_turned:
            if mask_image.size == (image.shape[0], image.shape[1]) != mask_image.size[::-1]:
                raise MaskError(
                    f"{record.mask}: the mask lies on its side: its picture {record.image.name} is "
                    f"turned by its EXIF orientation, {turned}, and that of the mask is "
                    f"{mask_turned}; save both upright"
                )
            notes.append("turned by its EXIF orientation, and its mask not: see that they fit")
        if mask_image.size != (image.shape[1], image.shape[0]):
            found = f"{mask_image.size[0]}x{mask_image.size[1]}"
            expected = f"{image.shape[1]}x{image.shape[0]}"
            if not self.masks.resize:
                raise MaskError(
                    f"{record.mask}: the mask is {found} (width x height), but its picture "
                    f"{record.image.name} is {expected}; resize_masks=True accepts it"
                )
            notes.append("mask resized to its picture's size")
            mask_image = mask_image.resize(
                (image.shape[1], image.shape[0]), Image.Resampling.NEAREST
            )
        mask, note = self.masks.decode(mask_image, str(record.mask))
        if note is not None:
            notes.append(note)
        return Picture(image, mask, tuple(notes))

    def fingerprint(self, record: Record) -> str:
        """Paths, sizes and times of change of the files, and how masks are read."""
        assert record.image is not None
        stamps = []
        for path in (record.image, record.mask):
            if path is not None:
                try:
                    status = path.stat()
                except OSError as error:  # such as a link to nowhere
                    raise UnreadablePictureError(f"{path}: {error.strerror}") from error
                stamps.append(f"{path.absolute()}:{status.st_size}:{status.st_mtime_ns}")
        return "/".join([*stamps, repr(self.masks), str(DECODE_VERSION)])


@dataclass
class Listing:
    """The files of one folder: pictures by the id their names give, and everything else."""

    folder: Path
    files: dict[str, Path]
    stray: list[str]

    def report(self) -> list[str]:
        """One line for the stray files, if any: by kind where there are many of a kind."""
        if not self.stray:
            return []
        kinds = Counter(_kind(name) for name in self.stray)
        shown = [
            next(n for n in self.stray if _kind(n) == kind) if count == 1 else f"{count} {kind}"
            for kind, count in sorted(kinds.items())
        ]
        return [f"{self.folder.name}: not read as pictures: {', '.join(shown)}"]


def _kind(name: str) -> str:
    stem, dot, extension = name.rpartition(".")
    tail = "_" + stem.rpartition("_")[2] if "_" in stem else ""
    return f"*{'' if tail[1:].isdigit() else tail}{dot}{extension}" if stem else name


def named_as_picture(path: Path) -> bool:
    """Whether a file has a picture's ending and is not hidden, as macOS's ._picture.jpg are."""
    return path.suffix.lower() in IMAGE_EXTENSIONS and not path.name.startswith(".")


def list_pictures(folder: Path, suffixes: Sequence[str] = ("",), prefix: str = "") -> Listing:
    """Sort a folder's entries into pictures and stray files; nothing is opened.

    A picture has an extension of :data:`IMAGE_EXTENSIONS`, no leading dot, a stem that starts
    with ``prefix`` and, in order of preference, ends with one of ``suffixes`` (in any case),
    which is not part of the id. Ids are in Unicode's composed form (NFC), however the file system
    spells them.

    Raises:
        ValueError: if two files give the same id.
    """
    files: dict[str, Path] = {}
    stray = []
    for path in sorted(folder.iterdir()):
        stem = path.stem
        ending = next((s for s in suffixes if stem.lower().endswith(s)), None)
        if (
            ending is None
            or not named_as_picture(path)
            or not stem.startswith(prefix)
            or path.is_dir()
        ):
            stray.append(path.name + ("/" if path.is_dir() else ""))
            continue
        picture_id = unicodedata.normalize("NFC", stem[: len(stem) - len(ending)])
        if picture_id in files:
            raise ValueError(
                f"{folder}: {files[picture_id].name} and {path.name} stand for the same picture "
                f"{picture_id!r}; keep one of them"
            )
        files[picture_id] = path
    return Listing(folder, files, stray)


def pair(
    images: Mapping[str, Path], masks: Mapping[str, Path] | None, where: str, missing: str
) -> tuple[dict[str, Path | None], list[str]]:
    """Match pictures with masks of the same id.

    Args:
        images, masks: files by id; ``masks=None`` where there is no mask folder at all.
        where: the data set or folder, for messages.
        missing: what to do about pictures without a mask: "error" or "skip" (report them and
            leave them out of training and scores).

    Returns:
        The mask of each picture, or ``None``, and report lines.

    Raises:
        ValueError: naming the pictures without a mask, if ``missing`` is "error".
    """
    if masks is None:
        return dict.fromkeys(images), [
            f"{where}: no masks; its {len(images)} pictures have no truth"
        ]
    without = sorted(set(images) - set(masks))
    unused = sorted(set(masks) - set(images))
    report = []
    if without:
        text = f"{where}: {len(without)} of {len(images)} pictures have no mask: {shorten(without)}"
        if missing == "error":
            raise ValueError(f"{text}; missing_masks='skip' leaves them out")
        report.append(text)
    if unused:
        report.append(f"{where}: {len(unused)} masks have no picture: {shorten(unused)}")
    return {picture_id: masks.get(picture_id) for picture_id in images}, report


def shorten(names: Sequence[str], limit: int = 5) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
