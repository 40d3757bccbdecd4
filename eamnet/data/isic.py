"""The ISIC challenges' lesion boundary sets of 2016, 2017 and 2018, as they are downloaded.

The folders may lie directly in the root or in folders of their own below it, and any part may be
missing: what is there is found. Folder names, sizes and file names are the challenge's own
(https://challenge.isic-archive.com/data/).
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from eamnet.data.source import (
    FileSource,
    Listing,
    MaskFormat,
    Record,
    list_pictures,
    pair,
    shorten,
)


@dataclass(frozen=True)
class _Part:
    images: str
    masks: str


LAYOUT: dict[int, dict[str, _Part]] = {
    2016: {
        "train": _Part(
            "ISBI2016_ISIC_Part1_Training_Data", "ISBI2016_ISIC_Part1_Training_GroundTruth"
        ),
        "test": _Part("ISBI2016_ISIC_Part1_Test_Data", "ISBI2016_ISIC_Part1_Test_GroundTruth"),
    },
    2017: {
        "train": _Part("ISIC-2017_Training_Data", "ISIC-2017_Training_Part1_GroundTruth"),
        "val": _Part("ISIC-2017_Validation_Data", "ISIC-2017_Validation_Part1_GroundTruth"),
        "test": _Part("ISIC-2017_Test_v2_Data", "ISIC-2017_Test_v2_Part1_GroundTruth"),
    },
    2018: {
        "train": _Part("ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth"),
        "val": _Part("ISIC2018_Task1-2_Validation_Input", "ISIC2018_Task1_Validation_GroundTruth"),
        "test": _Part("ISIC2018_Task1-2_Test_Input", "ISIC2018_Task1_Test_GroundTruth"),
    },
}

#: Pictures that must not be scored, with the reason; found by comparing the pictures of 2017.
EXCLUSIONS: dict[int, dict[str, str]] = {
    2017: {
        "ISIC_0012127": "validation picture that is also in the training part, as ISIC_0012970 "
        "(their two official masks agree to an IoU of 0.81)",
        "ISIC_0014946": "validation picture of the lesion of ISIC_0000157 in the training part",
        "ISIC_0015124": "validation picture of the lesion of ISIC_0000171 in the training part",
        "ISIC_0015313": "validation picture of the lesion of ISIC_0000215 in the training part",
    },
}

#: Pictures of one lesion, mostly the same photograph in other colours, that must not be divided
#: between training and scores: found by their content (`eamnet/data/overlap.py`), then by eye.
#: In 2017; the archive's ids are the same in every year.
GROUPS: tuple[tuple[str, ...], ...] = (
    ("ISIC_0012127", "ISIC_0012970"),
    ("ISIC_0000157", "ISIC_0014946"),
    ("ISIC_0000171", "ISIC_0015124"),
    ("ISIC_0000215", "ISIC_0015313"),
    ("ISIC_0000164", "ISIC_0014795"),
    ("ISIC_0000165", "ISIC_0014788"),
    ("ISIC_0000204", "ISIC_0014748"),
    ("ISIC_0000205", "ISIC_0014742"),
    ("ISIC_0000206", "ISIC_0014739"),
    ("ISIC_0000222", "ISIC_0014846"),
    ("ISIC_0000225", "ISIC_0014778"),
    ("ISIC_0000229", "ISIC_0014771"),
    ("ISIC_0012290", "ISIC_0013594"),
    ("ISIC_0012672", "ISIC_0012673"),
    ("ISIC_0012756", "ISIC_0013184"),
)

#: Optional table (columns ``id``, ``width``, ``height``) in the root of a downsized copy, or beside
#: its challenge folders: the pictures' original sizes. Results are then reported at those sizes.
NATIVE_SIZES = "native_sizes.csv"


class IsicSource(FileSource):
    """One year's set.

    Args:
        root: the folder that holds the challenge's folders, directly or one or two levels down.
        year: 2016, 2017 or 2018.
        part: "train", "val" or "test" for that part alone; ``None`` for all that are there.
        masks: how to read masks.
        missing_masks: "error" or "skip", for pictures without a mask in a part that has masks.

    Raises:
        ValueError: if the root, year or part does not exist, pictures lack masks, or ids repeat.
    """

    def __init__(
        self,
        root: str | Path,
        year: int,
        part: str | None = None,
        *,
        masks: MaskFormat | None = None,
        missing_masks: str = "error",
    ) -> None:
        if year not in LAYOUT:
            raise ValueError(f"year must be one of {sorted(LAYOUT)}, got {year}")
        layout = LAYOUT[year]
        if part is not None and part not in layout:
            raise ValueError(f"part must be one of {sorted(layout)} for ISIC {year}, got {part!r}")
        root = Path(root)
        folders = _find_folders(root)
        wanted = [p for p in layout if part in (None, p)]
        found = [p for p in wanted if layout[p].images in folders]
        if not found:
            raise ValueError(_explain_nothing_found(root, year, wanted, folders))
        places = {root, *(folders[layout[p].images].parent for p in found)}
        sizes = {i: s for place in sorted(places) for i, s in _native_sizes(place).items()}
        group_of = {i: f"duplicates-{g[0]}" for g in GROUPS for i in g}
        records: list[Record] = []
        report: list[str] = []
        for name in found:
            listing = list_pictures(folders[layout[name].images], prefix="ISIC_")
            _set_aside(listing, "_superpixels")
            if not listing.files:
                raise ValueError(
                    f"{listing.folder} holds no pictures named like ISIC_0000000.jpg; "
                    f"found: {shorten(listing.stray) or 'nothing'}"
                )
            report += listing.report()
            files: dict[str, Path] | None = None
            if layout[name].masks in folders:
                truth = list_pictures(
                    folders[layout[name].masks], suffixes=("_segmentation",), prefix="ISIC_"
                )
                report += truth.report()
                files = truth.files
            where = f"ISIC {year} {name}"
            mask_of, lines = pair(listing.files, files, where, missing_masks)
            report += lines
            records += [
                Record(
                    id=picture_id,
                    image=image,
                    mask=mask_of[picture_id],
                    group=group_of.get(picture_id),
                    part=name,
                    native_size=sizes.get(picture_id),
                )
                for picture_id, image in listing.files.items()
            ]
        unsized = [r.id for r in records if r.native_size is None]
        if sizes and unsized:
            report.append(
                f"{NATIVE_SIZES} lacks {len(unsized)} of {len(records)} pictures, which are scored "
                f"at the sizes of their files: {shorten(unsized)}"
            )
        super().__init__(records, masks)
        self.name = f"isic{year}"
        self.report = report
        self.exclusions = dict(EXCLUSIONS.get(year, {}))


def _set_aside(listing: Listing, ending: str) -> None:
    """Move pictures that are by-products, not data, to the stray files."""
    for picture_id in [i for i in listing.files if i.endswith(ending)]:
        listing.stray.append(listing.files.pop(picture_id).name)


def _find_folders(root: Path, depth: int = 3) -> dict[str, Path]:
    """The challenge folders of any year at or below the root, by name.

    Unpacking often makes a folder inside one of the same name: the inner one is taken.
    """
    names = {n for year in LAYOUT.values() for p in year.values() for n in (p.images, p.masks)}
    found: dict[str, Path] = {}
    level = [root] if root.is_dir() else []
    for _ in range(depth):
        folders = [p for f in level for p in sorted(f.iterdir()) if p.is_dir()]
        level = []
        for folder in folders:
            if folder.name not in names:
                level.append(folder)
            else:
                inner = folder / folder.name
                found.setdefault(folder.name, inner if inner.is_dir() else folder)
    return found


def _explain_nothing_found(
    root: Path, year: int, parts: list[str], folders: dict[str, Path]
) -> str:
    layout = LAYOUT[year]
    name = parts[0] if len(parts) == 1 else "train"
    text = (
        f"{root} holds no pictures of ISIC {year} ({' or '.join(parts)}). Expected, for example:\n"
        f"  {root}/{layout[name].images}/ISIC_0000000.jpg\n"
        f"  {root}/{layout[name].masks}/ISIC_0000000_"
        f"{'S' if year == 2016 else 's'}egmentation.png\n"
    )
    others = [y for y, p in LAYOUT.items() for q in p.values() if q.images in folders and y != year]
    known = {n for p in LAYOUT.values() for q in p.values() for n in (q.images, q.masks)}
    if not root.exists():
        return text + "This folder does not exist."
    if root.name in known:
        return text + f"This is one of the challenge's own folders: give {root.parent} instead."
    if others:
        return text + f"This folder holds ISIC {others[0]}: is dataset='isic{others[0]}' meant?"
    above = sorted(p.name for p in root.absolute().parent.iterdir() if p.name in known)
    if above:
        return text + f"The folder above holds {shorten(above)}: give {root.absolute().parent}."
    entries = sorted(p.name + ("/" if p.is_dir() else "") for p in root.iterdir())
    return text + f"Found: {shorten(entries, 10) or 'an empty folder'}."


def _native_sizes(folder: Path) -> dict[str, tuple[int, int]]:
    """(height, width) by id, from the folder's table if it has one."""
    path = folder / NATIVE_SIZES
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8-sig") as file:  # Excel writes a byte order mark
        rows = csv.DictReader(file)
        missing = {"id", "width", "height"} - set(rows.fieldnames or ())
        if missing:
            raise ValueError(f"{path}: needs the columns id, width and height; lacks {missing}")
        try:
            sizes = {row["id"]: (int(row["height"]), int(row["width"])) for row in rows}
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: width and height must be whole pixels: {error}") from error
    if empty := sorted(picture_id for picture_id, size in sizes.items() if min(size) < 1):
        raise ValueError(f"{path}: width and height must be positive: {shorten(empty)}")
    return sizes
