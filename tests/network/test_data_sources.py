"""Data sets as users have them, with the stray, missing and damaged files they come with."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from eamnet.data import (
    FolderSource,
    IsicSource,
    MaskError,
    MaskFormat,
    Ph2Source,
    UnreadablePictureError,
)
from eamnet.data.isic import LAYOUT
from eamnet.data.source import read_image

WIDTH, HEIGHT = 20, 12


def write(path, *, mode="RGB", size=(WIDTH, HEIGHT), value=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    if value is None:
        value = (200, 150, 120) if mode == "RGB" else 0
    Image.new(mode, size, value).save(path)


def write_mask(path, *, size=(WIDTH, HEIGHT), foreground=255):
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros((size[1], size[0]), dtype=np.uint8)
    mask[3:7, 5:9] = foreground
    Image.fromarray(mask).save(path)


def make_isic(root, year, parts, count=3, ending=None):
    ending = ending or ("_Segmentation" if year == 2016 else "_segmentation")
    number = 0
    for part in parts:
        folders = LAYOUT[year][part]
        for _ in range(count):
            write(root / folders.images / f"ISIC_{number:07d}.jpg")
            write_mask(root / folders.masks / f"ISIC_{number:07d}{ending}.png")
            number += 1


# ISIC ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("year", [2016, 2017, 2018])
def test_isic_as_downloaded(tmp_path, year):
    make_isic(tmp_path, year, LAYOUT[year])
    source = IsicSource(tmp_path, year)
    assert source.name == f"isic{year}"
    assert {part: len(ids) for part, ids in source.parts.items()} == dict.fromkeys(LAYOUT[year], 3)
    assert source.report == []
    image, mask = source.load(source["ISIC_0000001"])
    assert image.shape == (HEIGHT, WIDTH, 3)
    assert image.dtype == mask.dtype == np.uint8
    assert mask.sum() == 16
    assert mask.max() == 1


def test_isic_one_part_alone(tmp_path):
    make_isic(tmp_path, 2018, ["train", "test"])
    assert list(IsicSource(tmp_path, 2018).parts) == ["train", "test"]
    assert list(IsicSource(tmp_path, 2018, "test").parts) == ["test"]
    with pytest.raises(ValueError, match=r"holds no pictures of ISIC 2018 \(val\)"):
        IsicSource(tmp_path, 2018, "val")
    with pytest.raises(ValueError, match="part must be one of"):
        IsicSource(tmp_path, 2016, "val")
    with pytest.raises(ValueError, match="year must be one of"):
        IsicSource(tmp_path, 2019)


def test_isic_in_folders_of_their_own_and_unpacked_twice(tmp_path):
    make_isic(tmp_path / "Training", 2017, ["train"])
    inner = LAYOUT[2017]["val"]
    write(tmp_path / "Validation" / inner.images / inner.images / "ISIC_0000009.jpg")
    write_mask(tmp_path / "Validation" / inner.masks / "ISIC_0000009_segmentation.png")
    source = IsicSource(tmp_path, 2017)
    assert source.parts["val"] == ["ISIC_0000009"]
    assert len(source.parts["train"]) == 3


def test_isic_stray_files_are_reported_and_never_read(tmp_path):
    make_isic(tmp_path, 2017, ["train"])
    images = tmp_path / LAYOUT[2017]["train"].images
    for number in range(3):
        write(images / f"ISIC_{number:07d}_superpixels.png")
    for name in ("LICENSE.txt", "ATTRIBUTION.txt", "Thumbs.db", ".DS_Store", "._ISIC_0000000.jpg"):
        (images / name).write_text("x")
    write(images / "notes.png")
    (images / "old").mkdir()
    (tmp_path / LAYOUT[2017]["train"].masks / "LICENSE.txt").write_text("x")
    source = IsicSource(tmp_path, 2017)
    assert len(source) == 3
    report = "\n".join(source.report)
    assert "3 *_superpixels.png" in report
    for name in (
        "LICENSE.txt",
        "Thumbs.db",
        ".DS_Store",
        "._ISIC_0000000.jpg",
        "notes.png",
        "old/",
    ):
        assert name in report


def test_isic_missing_mask_is_an_error_that_can_be_waived(tmp_path):
    make_isic(tmp_path, 2018, ["train"])
    (tmp_path / LAYOUT[2018]["train"].masks / "ISIC_0000001_segmentation.png").unlink()
    with pytest.raises(ValueError, match="1 of 3 pictures have no mask: ISIC_0000001"):
        IsicSource(tmp_path, 2018)
    source = IsicSource(tmp_path, 2018, missing_masks="skip")
    assert [r.id for r in source if not r.has_mask] == ["ISIC_0000001"]
    assert any("have no mask: ISIC_0000001" in line for line in source.report)


def test_isic_part_without_truth_is_kept_for_prediction(tmp_path):
    make_isic(tmp_path, 2018, ["train"])
    write(tmp_path / LAYOUT[2018]["test"].images / "ISIC_0000100.jpg")
    source = IsicSource(tmp_path, 2018)
    assert not source["ISIC_0000100"].has_mask
    assert any("test: no masks" in line for line in source.report)


def test_isic_mask_without_picture_is_reported(tmp_path):
    make_isic(tmp_path, 2018, ["train"])
    write_mask(tmp_path / LAYOUT[2018]["train"].masks / "ISIC_0000077_segmentation.png")
    assert any("have no picture: ISIC_0000077" in r for r in IsicSource(tmp_path, 2018).report)


def test_isic_wrong_root_says_what_was_found(tmp_path):
    make_isic(tmp_path / "data", 2018, ["train"])
    names = LAYOUT[2018]["train"]
    with pytest.raises(ValueError, match="is dataset='isic2018' meant"):
        IsicSource(tmp_path / "data", 2017)
    with pytest.raises(ValueError, match=f"give {tmp_path / 'data'} instead"):
        IsicSource(tmp_path / "data" / names.images, 2018)
    with pytest.raises(ValueError, match="does not exist"):
        IsicSource(tmp_path / "nowhere", 2018)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="Found: an empty folder") as caught:
        IsicSource(tmp_path / "empty", 2018)
    assert f"{names.images}/ISIC_0000000.jpg" in str(caught.value)
    (tmp_path / "data" / "sub").mkdir()
    with pytest.raises(ValueError, match=f"The folder above holds {names.images}"):
        IsicSource(tmp_path / "data" / "sub", 2018)


def test_isic_empty_part_says_what_was_expected(tmp_path):
    folder = tmp_path / LAYOUT[2018]["train"].images
    folder.mkdir()
    (folder / "LICENSE.txt").write_text("x")
    with pytest.raises(ValueError, match=r"named like ISIC_0000000.jpg; found: LICENSE.txt"):
        IsicSource(tmp_path, 2018)


def test_isic_same_id_twice_is_an_error(tmp_path):
    make_isic(tmp_path, 2018, ["train"])
    for part, kind in (("val", "jpg"),):
        write(tmp_path / LAYOUT[2018][part].images / f"ISIC_0000001.{kind}")
    with pytest.raises(ValueError, match="two pictures have the id 'ISIC_0000001'"):
        IsicSource(tmp_path, 2018)
    write(tmp_path / LAYOUT[2018]["train"].images / "ISIC_0000002.png")
    with pytest.raises(ValueError, match="stand for the same picture 'ISIC_0000002'"):
        IsicSource(tmp_path, 2018)


def test_isic_native_sizes_are_read(tmp_path):
    make_isic(tmp_path, 2017, ["train"])
    table = tmp_path / "native_sizes.csv"
    table.write_text("split,id,width,height\r\ntraining,ISIC_0000001,3024,2016\r\n")
    source = IsicSource(tmp_path, 2017)
    assert source["ISIC_0000001"].native_size == (2016, 3024)
    assert source["ISIC_0000000"].native_size is None
    table.write_text("id,width\nISIC_0000001,3024\n")
    with pytest.raises(ValueError, match=r"lacks \{'height'\}"):
        IsicSource(tmp_path, 2017)
    table.write_text("id,width,height\nISIC_0000001,wide,2016\n")
    with pytest.raises(ValueError, match="whole pixels"):
        IsicSource(tmp_path, 2017)
    table.write_text("id,width,height\nISIC_0000001,0,2016\n")
    with pytest.raises(ValueError, match="must be positive: ISIC_0000001"):
        IsicSource(tmp_path, 2017)


def test_isic_native_sizes_beside_the_folders_as_excel_writes_them(tmp_path):
    inner = tmp_path / "copies" / "small"
    make_isic(inner, 2017, ["train"])
    table = "\ufeffid,width,height\nISIC_0000001,3024,2016\nISIC_9,1,1\n"
    (inner / "native_sizes.csv").write_text(table)
    source = IsicSource(tmp_path, 2017)
    assert source["ISIC_0000001"].native_size == (2016, 3024)
    assert (
        "native_sizes.csv lacks 2 of 3 pictures, which are scored at the sizes of their files: "
        "ISIC_0000000, ISIC_0000002"
    ) in source.report


# PH2 ----------------------------------------------------------------------------------------


PH2_TABLE = """
||   Name ||   Histological Diagnosis || Clinical Diagnosis || Asymmetry | Network || Colors ||
|| IMD002 ||                          ||                  0 ||         0 |               T || 4 ||
|| IMD003 || Melanoma                 ||                  2 ||         2 |              AT || 3 4 ||

Legends:
Clinical Diagnosis: 0 - Common Nevus; 1 - Atypical Nevus; 2 - Melanoma.
"""


def make_ph2(root, ids=("IMD002", "IMD003")):
    folder = root / "PH2 Dataset images"
    for i in ids:
        write(folder / i / f"{i}_Dermoscopic_Image" / f"{i}.bmp")
        mask = Image.new("1", (WIDTH, HEIGHT))
        mask.paste(1, (5, 3, 9, 7))
        (folder / i / f"{i}_lesion").mkdir()
        mask.save(folder / i / f"{i}_lesion" / f"{i}_lesion.bmp")
        write(folder / i / f"{i}_roi" / f"{i}_R1_Label3.bmp")
    (root / "PH2_dataset.txt").write_text(PH2_TABLE)


@pytest.mark.parametrize("where", ["PH2Dataset", ".", "PH2Dataset/PH2 Dataset images"])
def test_ph2_as_downloaded(tmp_path, where):
    make_ph2(tmp_path / "PH2Dataset")
    source = Ph2Source(tmp_path / where)
    assert [r.id for r in source] == ["IMD002", "IMD003"]
    assert [r.diagnosis for r in source] == ["common nevus", "melanoma"]
    assert source.report == []
    image, mask = source.load(source["IMD002"])
    assert image.shape == (HEIGHT, WIDTH, 3)
    assert mask.sum() == 16
    assert set(np.unique(mask)) == {0, 1}


def test_ph2_says_what_it_lacks(tmp_path):
    make_ph2(tmp_path, ids=("IMD002", "IMD004"))
    assert any(
        "no diagnosis in PH2_dataset.txt for IMD004" in r for r in Ph2Source(tmp_path).report
    )
    (tmp_path / "PH2_dataset.txt").unlink()
    source = Ph2Source(tmp_path)
    assert source["IMD002"].diagnosis is None
    assert any("no diagnoses" in line for line in source.report)
    folder = tmp_path / "PH2 Dataset images"
    (folder / "IMD004" / "IMD004_lesion" / "IMD004_lesion.bmp").unlink()
    with pytest.raises(ValueError, match="1 of 2 pictures have no mask: IMD004"):
        Ph2Source(tmp_path)
    (folder / "IMD004" / "IMD004_Dermoscopic_Image" / "IMD004.bmp").unlink()
    assert any("folders without a picture: IMD004" in r for r in Ph2Source(tmp_path).report)


def test_ph2_wrong_root(tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="holds no PH2 pictures") as caught:
        Ph2Source(tmp_path)
    assert "IMD002_lesion.bmp" in str(caught.value)
    assert "Found: other" in str(caught.value)


# A user's own folder ------------------------------------------------------------------------


def test_folder_matches_names_and_endings(tmp_path):
    for picture, mask in [
        ("a.jpg", "a.png"),
        ("b.PNG", "b_mask.png"),
        ("c.jpeg", "c_Segmentation.PNG"),
        ("d.tif", "d.bmp"),
        ("e_mask.webp", "e_mask.png"),
    ]:
        write(tmp_path / "images" / picture)
        write_mask(tmp_path / "masks" / mask)
    (tmp_path / "images" / "Thumbs.db").write_text("x")
    source = FolderSource(tmp_path)
    assert [r.id for r in source] == ["a", "b", "c", "d", "e_mask"]
    for record in source:
        assert source.load(record)[1].sum() == 16
    assert source.report == ["images: not read as pictures: Thumbs.db"]


def test_folder_with_parts(tmp_path):
    for part in ("train", "test"):
        write(tmp_path / part / "images" / "1.png")
        write_mask(tmp_path / part / "masks" / "1.png")
    source = FolderSource(tmp_path)
    assert source.parts == {"train": ["train/1"], "test": ["test/1"]}
    assert source.load(source["test/1"])[1].sum() == 16


def test_folder_problems_are_explained(tmp_path):
    root = tmp_path / "mine"
    root.mkdir()
    with pytest.raises(ValueError, match=r"Expected, for example:\n.*images/lesion1.jpg"):
        FolderSource(root / "nowhere")
    (root / "images").mkdir()
    with pytest.raises(ValueError, match=r"holds no pictures .* found: nothing"):
        FolderSource(root)
    write(root / "images" / "a.jpg")
    assert any("no masks" in line for line in FolderSource(root).report)
    write_mask(root / "masks" / "b.png")
    with pytest.raises(ValueError, match="1 of 1 pictures have no mask: a"):
        FolderSource(root)
    write_mask(root / "masks" / "a.png")
    assert any("have no picture: b" in line for line in FolderSource(root).report)
    write_mask(root / "masks" / "a_mask.png")
    with pytest.raises(ValueError, match="stand for the same picture 'a'"):
        FolderSource(root)
    with pytest.raises(ValueError, match=f"Give the folder above it: {root}"):
        FolderSource(root / "images")
    with pytest.raises(ValueError, match=f"Is {root} meant"):
        FolderSource(tmp_path)


# Masks --------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "images" / "a.png")
    (tmp_path / "masks").mkdir()
    return tmp_path


def read_one(root, masks=None):
    source = FolderSource(root, masks=masks)
    return source.read(source["a"])


@pytest.mark.parametrize("foreground", [1, 255])
def test_binary_masks_need_no_note(folder, foreground):
    write_mask(folder / "masks" / "a.png", foreground=foreground)
    picture = read_one(folder)
    assert picture.mask.sum() == 16
    assert picture.notes == ()


def test_non_binary_mask_is_thresholded_at_half_and_noted(folder):
    values = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    values[0, :4] = [127, 128, 254, 3]
    Image.fromarray(values).save(folder / "masks" / "a.png")
    picture = read_one(folder)
    assert picture.mask[0, :4].tolist() == [0, 1, 1, 0]
    assert picture.notes == ("mask not binary, thresholded at half",)


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (Image.fromarray(np.arange(240, dtype=np.uint8).reshape(12, 20) % 3), "give num_classes"),
        (Image.fromarray((np.arange(240, dtype=np.uint16) + 300).reshape(12, 20)), "num_classes"),
        (Image.fromarray(np.full((12, 20), -1, np.int32)), "holds -1"),
        (Image.fromarray(np.full((12, 20), 0.9, np.float32)), "floating-point"),
    ],
    ids=["labels", "instances", "negative", "float"],
)
def test_masks_that_would_turn_empty_are_refused(folder, mask, said):
    mask.save(folder / "masks" / "a.tif")
    with pytest.raises(MaskError, match=said):
        read_one(folder)


def test_masks_of_several_colours_or_in_the_transparency_are_refused(folder):
    mask = Image.new("RGB", (WIDTH, HEIGHT))
    mask.paste("red", (0, 0, 4, 4))
    mask.paste("white", (5, 5, 9, 9))
    mask.save(folder / "masks" / "a.png")
    with pytest.raises(MaskError, match="several colours"):
        read_one(folder)
    mask = Image.new("RGBA", (WIDTH, HEIGHT))
    mask.paste((0, 0, 0, 255), (5, 5, 9, 9))
    mask.save(folder / "masks" / "a.png")
    for masks in (None, MaskFormat(num_classes=3)):
        with pytest.raises(MaskError, match="transparent in part"):
            read_one(folder, masks)
    mask = Image.new("RGBA", (WIDTH, HEIGHT), "black")  # opaque
    mask.paste((255, 255, 255, 255), (5, 5, 9, 9))
    mask.save(folder / "masks" / "a.png")
    assert read_one(folder).mask.sum() == 16


def test_two_valued_mask_keeps_its_foreground(folder):
    write_mask(folder / "masks" / "a.png", foreground=38)
    picture = read_one(folder)
    assert picture.mask.sum() == 16
    assert "unusual foreground" in picture.notes[0]


def test_sixteen_bit_and_palette_masks(folder):
    values = np.zeros((HEIGHT, WIDTH), dtype=np.uint16)
    values[3:7, 5:9] = 65535
    Image.fromarray(values).save(folder / "masks" / "a.png")
    assert read_one(folder).mask.sum() == 16
    # White comes first in this palette: the colours decide, not the indices.
    inverted = Image.new("P", (WIDTH, HEIGHT), 1)
    inverted.putpalette([255, 255, 255, 0, 0, 0])
    inverted.paste(0, (5, 3, 9, 7))
    inverted.save(folder / "masks" / "a.png")
    assert read_one(folder).mask.sum() == 16


def test_mask_of_wrong_size_names_both(folder):
    write_mask(folder / "masks" / "a.png", size=(WIDTH * 2, HEIGHT * 2))
    with pytest.raises(MaskError, match=r"the mask is 40x24 .* a.png is 20x12"):
        read_one(folder)
    picture = read_one(folder, MaskFormat(resize=True))
    assert picture.mask.shape == (HEIGHT, WIDTH)
    assert picture.notes == ("mask resized to its picture's size",)


def test_class_index_masks(folder):
    values = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH) % 3
    Image.fromarray(values).save(folder / "masks" / "a.png")
    assert np.array_equal(read_one(folder, MaskFormat(3)).mask, values)
    with pytest.raises(MaskError, match=r"holds class 2, but num_classes=2 accepts 0 .. 1"):
        read_one(folder, MaskFormat(2))
    indexed = Image.fromarray(values)
    indexed.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    indexed.save(folder / "masks" / "a.png")
    assert np.array_equal(read_one(folder, MaskFormat(3)).mask, values)


def test_colour_masks_need_a_palette(folder):
    mask = Image.new("RGB", (WIDTH, HEIGHT), "#000000")
    mask.paste("#ff0000", (0, 0, 4, 4))
    mask.paste("#0000ff", (8, 8, 10, 10))
    mask.save(folder / "masks" / "a.png")
    found = read_one(folder, MaskFormat(3, ("black", "#ff0000", "blue"))).mask
    assert [int((found == c).sum()) for c in range(3)] == [HEIGHT * WIDTH - 20, 16, 4]
    with pytest.raises(MaskError, match="give palette, one colour for each class"):
        read_one(folder, MaskFormat(3))
    with pytest.raises(MaskError, match="4 pixels have colours outside the palette, first #0000ff"):
        read_one(folder, MaskFormat(2, ("black", "red")))
    with pytest.raises(ValueError, match="one colour for each of the 3 classes, got 2"):
        MaskFormat(3, ("black", "red"))


def test_grey_masks_saved_as_colour_count_as_grey(folder):
    values = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    values[:2] = 2
    Image.fromarray(values).save(folder / "masks" / "a.png")
    assert read_one(folder, MaskFormat(3)).mask[:2].min() == 2


# Pictures -----------------------------------------------------------------------------------


def test_pictures_of_any_mode_become_rgb(tmp_path):
    for mode, name in [("L", "g.png"), ("RGBA", "t.png"), ("P", "p.png"), ("CMYK", "c.jpg")]:
        write(tmp_path / name, mode=mode, value=0)
        image = read_image(tmp_path / name)
        assert image.shape == (HEIGHT, WIDTH, 3)
        assert image.dtype == np.uint8
    deep = np.full((HEIGHT, WIDTH), 65535, dtype=np.uint16)
    deep[0] = 257 * 100
    Image.fromarray(deep).save(tmp_path / "deep.png")
    image = read_image(tmp_path / "deep.png")
    assert image[0, 0].tolist() == [100] * 3
    assert image[1, 0].tolist() == [255] * 3


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (WIDTH, HEIGHT))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (WIDTH, HEIGHT, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_that_of_pillow(tmp_path, orientation):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.png", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "turned.png"))
    assert np.array_equal(read_image(tmp_path / "turned.png"), np.asarray(upright))


def test_odd_exif_does_not_cost_the_picture(tmp_path):
    image = Image.new("RGB", (WIDTH, HEIGHT))
    exif = image.getexif()
    exif[0x0112] = 6
    exif[0x010E] = "description"
    image.save(tmp_path / "odd.jpg", exif=exif)
    content = (tmp_path / "odd.jpg").read_bytes()
    read = 0
    for position in range(content.index(b"Exif"), content.index(b"description") + 11):
        for value in (0, 2, 0xFF):
            damaged = content[:position] + bytes([value]) + content[position + 1 :]
            (tmp_path / "odd.jpg").write_bytes(damaged)
            try:
                read += read_image(tmp_path / "odd.jpg").size == WIDTH * HEIGHT * 3
            except UnreadablePictureError:
                read += 1
    assert read == 3 * (content.index(b"description") + 11 - content.index(b"Exif"))


def test_a_mask_that_is_not_turned_with_its_picture(folder):
    path = folder / "images" / "a.png"
    image = Image.open(path)
    image.load()
    exif = image.getexif()
    write_mask(folder / "masks" / "a.png")
    exif[0x0112] = 3
    image.save(path, exif=exif)
    assert read_one(folder).notes == (
        "turned by its EXIF orientation, and its mask not: see that they fit",
    )
    exif[0x0112] = 6
    image.save(path, exif=exif)
    for masks in (None, MaskFormat(resize=True)):
        with pytest.raises(MaskError, match=r"a.png: the mask lies on its side: .* orientation, 6"):
            read_one(folder, masks)
    mask = Image.open(folder / "masks" / "a.png")
    mask.load()
    mask.save(folder / "masks" / "a.png", exif=exif)
    picture = read_one(folder)
    assert picture.notes == ()
    assert picture.mask.shape == picture.image.shape[:2] == (WIDTH, HEIGHT)


def test_names_are_composed_and_must_be_utf8(folder):
    (folder / "images" / "a.png").rename(folder / "images" / "la\u0308sion.png")  # NFD
    write_mask(folder / "masks" / "l\u00e4sion_mask.png")  # NFC
    assert FolderSource(folder)["l\u00e4sion"].has_mask
    path = folder / "images" / "la\u0308sion.png"
    path.rename(path.with_name(os.fsdecode(b"b\xe4.png")))
    with pytest.raises(ValueError, match=r"the name of 'b\\udce4' is not UTF-8"):
        FolderSource(folder, missing_masks="skip")


@pytest.mark.parametrize("damage", ["empty", "text", "truncated"])
def test_damaged_pictures_are_named(tmp_path, damage):
    path = tmp_path / "bad.jpg"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"not a picture", "truncated": content[:400]}[damage])
    with pytest.raises(UnreadablePictureError, match=r"bad.jpg: cannot be read as a picture"):
        read_image(path)


def test_fingerprint_follows_the_files(folder):
    write_mask(folder / "masks" / "a.png")
    source = FolderSource(folder)
    record = source["a"]
    before = source.fingerprint(record)
    assert FolderSource(folder).fingerprint(record) == before
    assert FolderSource(folder, masks=MaskFormat(2)).fingerprint(record) != before
    status = record.mask.stat()
    os.utime(record.mask, ns=(status.st_atime_ns, status.st_mtime_ns + 1000))
    assert source.fingerprint(record) != before


def test_unknown_ids_are_refused(folder):
    write_mask(folder / "masks" / "a.png")
    with pytest.raises(ValueError, match="folder has no picture 'b'"):
        FolderSource(folder)["b"]


# The real thing, where it is ----------------------------------------------------------------


def real_data():
    given = os.environ.get("EAMNET_DATA")
    return Path(given) if given else Path(__file__).parents[2].parent / "shared" / "data"


def needs(folder):
    missing = not (real_data() / folder).is_dir()
    return pytest.mark.skipif(missing, reason=f"{folder} is not in EAMNET_DATA or ../shared/data")


@needs("isic2017")
def test_real_isic_2017():
    source = IsicSource(real_data() / "isic2017", 2017)
    assert {part: len(ids) for part, ids in source.parts.items()} == {"train": 2000, "val": 150}
    assert source.report == []
    assert "ISIC_0012127" in source.exclusions
    assert source["ISIC_0012290"].group == source["ISIC_0013594"].group
    assert all(record.native_size is not None for record in source)
    picture = source.read(source["ISIC_0012970"])
    assert picture.image.shape == (256, 256, 3)
    assert set(np.unique(picture.mask)) == {0, 1}
    assert picture.notes == ()


@needs("nuclei2018")
def test_real_nuclei_2018():
    source = FolderSource(real_data() / "nuclei2018")
    assert len(source) == 220
    assert source.report == []
    picture = source.read(source.records[0])
    assert picture.mask.shape == picture.image.shape[:2]
    assert set(np.unique(picture.mask)) == {0, 1}
