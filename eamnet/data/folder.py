"""A user's own pictures: a folder ``images`` beside a folder ``masks``."""

from __future__ import annotations

from pathlib import Path

from eamnet.data.source import FileSource, MaskFormat, Record, list_pictures, pair, shorten

PARTS = ("train", "val", "test")

#: Endings of mask names that are not part of the id, besides none at all.
MASK_SUFFIXES = ("_segmentation", "_mask", "")


class FolderSource(FileSource):
    """Pictures and masks matched by name: ``images/a.jpg`` with ``masks/a.png``.

    A mask may be called like its picture, or with ``_segmentation`` or ``_mask`` after it. The
    root may instead hold folders ``train``, ``val`` and ``test`` with ``images`` and ``masks`` in
    each; ids then carry the part's name (``train/a``). Without any ``masks`` folder the pictures
    can be predicted, not trained on.

    Args:
        root: the folder that holds ``images``.
        masks: how to read masks.
        missing_masks: "error" or "skip", for pictures without a mask beside a ``masks`` folder.

    Raises:
        ValueError: if the root holds no pictures, pictures lack masks, or names clash.
    """

    name = "folder"

    def __init__(
        self,
        root: str | Path,
        *,
        masks: MaskFormat | None = None,
        missing_masks: str = "error",
    ) -> None:
        root = Path(root)
        parts = [p for p in PARTS if (root / p / "images").is_dir()]
        if (root / "images").is_dir():
            parts = [""]
        if not parts:
            raise ValueError(_explain_nothing_found(root))
        records: list[Record] = []
        report: list[str] = []
        for part in parts:
            listing = list_pictures(root / part / "images")
            report += listing.report()
            if not listing.files:
                raise ValueError(
                    f"{listing.folder} holds no pictures (.jpg, .png, .bmp, .tif or .webp); "
                    f"found: {shorten(listing.stray) or 'nothing'}"
                )
            files: dict[str, Path] | None = None
            if (root / part / "masks").is_dir():
                truth = list_pictures(root / part / "masks", suffixes=MASK_SUFFIXES)
                report += truth.report()
                # A picture may itself be called a_mask.jpg: its mask is then a_mask.png.
                files = {
                    path.stem if path.stem in listing.files else picture_id: path
                    for picture_id, path in truth.files.items()
                }
            where = f"{root.name}/{part}" if part else root.name
            mask_of, lines = pair(listing.files, files, where, missing_masks)
            report += lines
            records += [
                Record(
                    id=f"{part}/{picture_id}" if part else picture_id,
                    image=image,
                    mask=mask_of[picture_id],
                    part=part or None,
                )
                for picture_id, image in listing.files.items()
            ]
        super().__init__(records, masks)
        self.report = report


def _explain_nothing_found(root: Path) -> str:
    text = (
        f"{root} holds no folder 'images'. Expected, for example:\n"
        f"  {root}/images/lesion1.jpg\n"
        f"  {root}/masks/lesion1.png   (or lesion1_mask.png, lesion1_segmentation.png)\n"
    )
    if not root.is_dir():
        return text + "This folder does not exist."
    if root.name in ("images", "masks"):
        return text + f"Give the folder above it: {root.parent}."
    below = sorted(p.parent for p in root.glob("*/images") if p.is_dir())
    if below:
        return text + f"Is {below[0]} meant?"
    entries = sorted(p.name + ("/" if p.is_dir() else "") for p in root.iterdir())
    return text + f"Found: {shorten(entries, 10) or 'an empty folder'}."
