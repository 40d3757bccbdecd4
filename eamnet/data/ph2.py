"""The PH2 database, as it is downloaded: one folder per lesion, bitmaps inside.

Mendonça et al., "PH2 - A dermoscopic image database for research and benchmarking", EMBC 2013.
200 pictures: 80 common nevi, 80 atypical nevi, 40 melanomas.
"""

from __future__ import annotations

from pathlib import Path

from eamnet.data.source import FileSource, MaskFormat, Record, pair, shorten

#: The codes of the "Clinical Diagnosis" column.
DIAGNOSES = {"0": "common nevus", "1": "atypical nevus", "2": "melanoma"}

_IMAGES = "PH2 Dataset images"


class Ph2Source(FileSource):
    """PH2.

    Diagnoses come from ``PH2_dataset.txt``, which every copy of the database has beside its
    ``.xlsx`` twin; where it is missing, the report says so and the pictures have no diagnosis.

    Args:
        root: ``PH2Dataset``, the folder above it, or ``PH2 Dataset images`` itself.
        masks: how to read masks.
        missing_masks: "error" or "skip", for pictures without a mask.

    Raises:
        ValueError: if the root holds no PH2 pictures or pictures lack masks.
    """

    name = "ph2"

    def __init__(
        self,
        root: str | Path,
        *,
        masks: MaskFormat | None = None,
        missing_masks: str = "error",
    ) -> None:
        root = Path(root)
        candidates = [root / _IMAGES, root / "PH2Dataset" / _IMAGES, root]
        folder = next((c for c in candidates if _cases(c)), None)
        if folder is None:
            entries = sorted(p.name for p in root.iterdir()) if root.is_dir() else []
            raise ValueError(
                f"{root} holds no PH2 pictures. Expected, for example:\n"
                f"  {root}/{_IMAGES}/IMD002/IMD002_Dermoscopic_Image/IMD002.bmp\n"
                f"  {root}/{_IMAGES}/IMD002/IMD002_lesion/IMD002_lesion.bmp\n"
                f"Found: {shorten(entries, 10) or 'nothing'}."
            )
        cases = _cases(folder)
        images = {c: folder / c / f"{c}_Dermoscopic_Image" / f"{c}.bmp" for c in cases}
        masks_of = {c: folder / c / f"{c}_lesion" / f"{c}_lesion.bmp" for c in cases}
        report = []
        absent = [c for c in cases if not images[c].is_file()]
        if absent:
            report.append(f"PH2: {len(absent)} folders without a picture: {shorten(absent)}")
        stray = sorted(p.name for p in folder.iterdir() if p.name not in cases)
        if stray and folder != root:
            report.append(f"{folder.name}: not read: {shorten(stray, 10)}")
        images = {c: p for c, p in images.items() if p.is_file()}
        mask_of, lines = pair(
            images, {c: p for c, p in masks_of.items() if p.is_file()}, "PH2", missing_masks
        )
        report += lines
        table = next(
            (
                p
                for p in (folder.parent / "PH2_dataset.txt", root / "PH2_dataset.txt")
                if p.is_file()
            ),
            None,
        )
        diagnosis = _diagnoses(table) if table else {}
        if table is None:
            report.append("PH2: no PH2_dataset.txt beside the pictures, so no diagnoses")
        elif unknown := sorted(set(images) - set(diagnosis)):
            report.append(f"PH2: no diagnosis in {table.name} for {shorten(unknown)}")
        super().__init__(
            [Record(c, images[c], mask_of[c], diagnosis=diagnosis.get(c)) for c in images], masks
        )
        self.report = report


def _cases(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(
        p.name for p in folder.glob("IMD*") if (p / f"{p.name}_Dermoscopic_Image").is_dir()
    )


def _diagnoses(table: Path) -> dict[str, str]:
    """Parse the rows ``|| IMD003 || <histology> || <clinical code> || ...`` of the text table."""
    diagnoses = {}
    for line in table.read_text(encoding="utf-8", errors="replace").splitlines():
        cells = [cell.strip() for cell in line.split("||")]
        if len(cells) > 3 and cells[1].startswith("IMD") and cells[3] in DIAGNOSES:
            diagnoses[cells[1]] = DIAGNOSES[cells[3]]
    return diagnoses
