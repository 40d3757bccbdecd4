"""Prediction: any size, any kind of picture file, and what happens on damaged ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from eamnet.cli import main
from eamnet.data import SyntheticSource
from eamnet.inference import Predictor, export_weights, most_probable, probabilities
from eamnet.metrics import calibration_bins, image_metrics, read_csv
from eamnet.model import EAMNet, EAMNetConfig


def picture(index: int = 0, size: int = 48) -> NDArray[np.uint8]:
    source = SyntheticSource(8, 5, size, 1)
    return source.load(source.records[index])[0]


@pytest.fixture(scope="module")
def weights(trained: Path) -> Path:
    return trained / "best.safetensors"


@pytest.fixture
def predictor(weights: Path) -> Predictor:
    return Predictor.from_file(weights)


@pytest.mark.parametrize("size", [(32, 32), (1, 1), (5, 200), (97, 61)])
def test_the_prediction_has_the_size_of_the_picture(
    predictor: Predictor, size: tuple[int, int]
) -> None:
    found = predictor(np.zeros((*size, 3), np.uint8))
    assert found.shape == size
    assert found.dtype == np.float32
    assert ((found >= 0) & (found <= 1)).all()


def test_it_is_the_networks_output_brought_back(predictor: Predictor) -> None:
    image = picture(size=32)  # the network's own size: nothing to resize
    with torch.no_grad():
        logits = predictor.model(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)
    np.testing.assert_allclose(predictor(image), logits.sigmoid()[0, 0], atol=1e-6)


def test_a_batch_of_several_sizes_gives_what_single_pictures_give(predictor: Predictor) -> None:
    images = [picture(0, 32), picture(1, 64)[:40], picture(2, 48)]
    for found, image in zip(predictor.batch(images), images, strict=True):
        np.testing.assert_allclose(found, predictor(image), atol=1e-6)
    for mask, image in zip(predictor.masks(images), images, strict=True):
        assert np.array_equal(mask, predictor(image) > 0.5)
    assert predictor.batch([]) == []


def test_several_classes() -> None:
    torch.manual_seed(0)
    model = EAMNet(
        EAMNetConfig(
            num_classes=3,
            widths=(8, 8),
            blocks=(1, 1),
            decoder_widths=(8,),
            decoder_blocks=(1,),
            attend=("channels", "pixels"),
        )
    )
    predictor = Predictor(model, size=16)
    found = predictor(picture(size=20))
    assert found.shape == (3, 20, 20)
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-5)
    assert np.array_equal(predictor.masks([picture(size=20)])[0], found.argmax(0))


def test_low_precision_is_close(weights: Path, predictor: Predictor) -> None:
    image = picture()
    low = Predictor.from_file(weights, precision="bfloat16")(image)
    assert low.dtype == np.float32
    assert np.abs(low - predictor(image)).max() < 0.1


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_takes_bfloat16_where_the_processor_has_it(
    weights: Path, monkeypatch: pytest.MonkeyPatch, native: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr("eamnet.inference.native_bfloat16", lambda device: native)
    predictor = Predictor.from_file(weights, precision="auto")
    assert predictor.dtype == dtype
    assert next(predictor.model.parameters()).dtype == dtype


def test_the_network_given_is_left_as_it_is(weights: Path) -> None:
    model = EAMNet.from_pretrained(weights).train()
    expected = Predictor.from_file(weights)(picture())
    assert np.array_equal(Predictor(model, size=32)(picture()), expected)
    assert model.training
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())


def test_checkpoint_and_exported_weights_agree(
    trained: Path, weights: Path, tmp_path: Path
) -> None:
    image = picture()
    expected = Predictor.from_file(weights)(image)
    checkpoint = trained / "checkpoints" / "best.ckpt"
    assert np.array_equal(Predictor.from_file(checkpoint)(image), expected)
    again = Predictor.from_file(export_weights(checkpoint, tmp_path / "again.safetensors"))
    assert np.array_equal(again(image), expected)


def test_weights_remember_the_size_they_were_trained_at(trained: Path, weights: Path) -> None:
    assert Predictor.from_file(weights).size == 32
    assert Predictor.from_file(trained / "checkpoints" / "best.ckpt").size == 32
    assert Predictor.from_file(weights, size=64).size == 64


def test_prediction_and_evaluation_are_the_same(trained: Path, tmp_path: Path) -> None:
    rows = [
        r for r in read_csv(trained / "validation" / "per_image.csv") if r.resolution == "native"
    ]
    source = SyntheticSource(24, 0, 32, 1)
    predictor = Predictor.from_file(trained / "checkpoints" / "best.ckpt")
    for row in rows:
        image, truth = source.load(source[row.id])
        mask = predictor.masks([image])[0]
        bins = calibration_bins(truth, predictor(image)[None])
        (ours,) = image_metrics(row.id, truth, mask, resolution="native", bins=bins)
        assert row.ece == pytest.approx(ours.ece, abs=1e-5)
        assert replace(row, ece=0, contrast=0) == replace(ours, ece=0, contrast=0)


@pytest.mark.parametrize(
    ("image", "error"),
    [
        (np.zeros((4, 4, 3), np.float32), TypeError),
        (np.zeros((4, 4), np.uint8), ValueError),
        (np.zeros((4, 4, 4), np.uint8), ValueError),
        (np.zeros((0, 4, 3), np.uint8), ValueError),
    ],
)
def test_wrong_pictures_are_refused(
    predictor: Predictor, image: NDArray[np.uint8], error: type[Exception]
) -> None:
    with pytest.raises(error, match="image must be"):
        predictor(image)


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    for name in ("a.ckpt", "a.safetensors", "nothing"):
        with pytest.raises(FileNotFoundError, match=name):
            Predictor.from_file(tmp_path / name)
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="not written by `eamnet fit`"):
        Predictor.from_file(tmp_path / "other.ckpt")


def test_the_most_probable_class() -> None:
    logits = torch.tensor([[[[0.0, 1e-3, -1e-3]]]])
    assert most_probable(probabilities(logits, (1, 3))).tolist() == [[[0, 1, 0]]]
    logits = torch.tensor([[0.0, 2.0, 1.0]])[:, :, None, None]
    assert most_probable(probabilities(logits, (1, 1))).item() == 1
    for channels in (1, 3):
        logits = torch.zeros(1, channels, 2, 2)
        logits[0, 0, 0, 0] = float("nan")
        with pytest.raises(ValueError, match="not a number"):
            most_probable(probabilities(logits, (2, 2)))


# The command


def predict(weights: Path, *words: object) -> int:
    return main(["predict", "--checkpoint", str(weights), *map(str, words)])


def test_all_kinds_of_pictures_are_read_upright(
    weights: Path, predictor: Predictor, tmp_path: Path
) -> None:
    pixels = picture(1)[:30]  # 30 high, 48 wide
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: a quarter turn clockwise brings it upright
    image.save(pictures / "turned.png", exif=exif)
    image.save(pictures / "plain.png")
    image.convert("L").save(pictures / "grey.bmp")
    image.convert("RGBA").save(pictures / "alpha.tif")
    sixteen = np.asarray(image.convert("L")).astype(np.uint16) * 257
    Image.fromarray(sixteen).save(pictures / "sixteen.png")
    (pictures / "LICENSE.txt").write_text("no picture")
    out = tmp_path / "out"
    assert predict(weights, pictures, "--output", out) == 0
    masks = {p.name: np.asarray(Image.open(p)) for p in (out / "masks").iterdir()}
    assert set(masks) == {"turned.png", "plain.png", "grey.png", "alpha.png", "sixteen.png"}
    assert all(set(np.unique(mask)) <= {0, 255} for mask in masks.values())
    assert masks["turned.png"].shape == (48, 30)
    expected = {
        "plain.png": pixels,
        "alpha.png": pixels,
        "turned.png": np.ascontiguousarray(np.rot90(pixels, -1)),
        "grey.png": np.repeat(np.asarray(image.convert("L"))[..., None], 3, 2),
        "sixteen.png": np.repeat(np.asarray(image.convert("L"))[..., None], 3, 2),
    }
    for name, shown in expected.items():
        assert np.array_equal(masks[name] > 0, predictor(shown) > 0.5), name
        with Image.open(out / "overlays" / name.replace(".png", ".jpg")) as overlay:
            assert overlay.size == shown.shape[1::-1]


def test_it_goes_on_past_damaged_pictures_and_names_them(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(6):
        Image.fromarray(picture(index)).save(tmp_path / f"{index}.jpg")
    whole = (tmp_path / "2.jpg").read_bytes()
    (tmp_path / "2.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "4.jpg").write_bytes(b"")
    out = tmp_path / "out"
    assert predict(weights, tmp_path, "--output", out, "--batch_size", 2) == 1
    assert {p.stem for p in (out / "masks").iterdir()} == {"0", "1", "3", "5"}
    said = capsys.readouterr()
    assert "4 pictures segmented" in said.out
    ending = said.err.partition("2 failed:")[2]
    assert "2.jpg" in ending
    assert "4.jpg" in ending
    assert "5.jpg" not in ending


def test_an_output_that_is_not_a_number_is_no_mask(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(picture()).save(tmp_path / "a.png")
    network = EAMNet.from_pretrained(weights)
    with torch.no_grad():
        next(network.parameters()).fill_(float("nan"))
    broken = network.save_pretrained(tmp_path / "broken.safetensors")
    assert predict(broken, tmp_path / "a.png", "--output", tmp_path / "out") == 1
    assert not (tmp_path / "out" / "masks").exists()
    said = capsys.readouterr()
    assert "0 pictures segmented" in said.out
    assert "a.png: the network's output is not a number (NaN)" in said.err


def test_nothing_is_overwritten_unless_asked(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "a.png", tmp_path / "out"
    Image.fromarray(picture()).save(path)
    assert predict(weights, path, "--output", out) == 0
    mask = out / "masks" / "a.png"
    mask.write_bytes(b"mine")
    assert predict(weights, path, "--output", out) == 2
    assert mask.read_bytes() == b"mine"
    assert "--overwrite" in capsys.readouterr().err
    assert predict(weights, path, "--output", out, "--overwrite", "true") == 0
    assert mask.read_bytes() != b"mine"


def test_pictures_that_would_share_a_mask_are_refused(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.png", "a.jpg"):
        Image.fromarray(picture()).save(tmp_path / name)
    out = tmp_path / "out"
    assert predict(weights, tmp_path, "--output", out, "--overwrite", "true") == 2
    said = capsys.readouterr().err
    assert "a.png" in said
    assert "a.jpg" in said
    assert not out.exists()


def test_folders_within_folders(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures, out = tmp_path / "pictures", tmp_path / "pictures" / "out"
    for name in ("one", "two"):
        (pictures / name).mkdir(parents=True)
        Image.fromarray(picture()).save(pictures / name / "a.png")
    assert predict(weights, pictures, "--output", out) == 2
    assert "--recursive" in capsys.readouterr().err
    for _ in range(2):  # the second time, the results of the first lie inside the folder
        words = ("--output", out, "--recursive", "true", "--overwrite", "true")
        assert predict(weights, pictures, *words, "--overlays", "false") == 0
        found = sorted(str(p.relative_to(out)) for p in out.rglob("*.*"))
        assert found == ["masks/one/a.png", "masks/two/a.png"]


def test_results_beside_the_pictures(weights: Path, tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "a.png")
    (tmp_path / "._a.png").write_bytes(b"what macOS leaves beside a picture")
    words = ("--output", tmp_path, "--recursive", "true", "--overwrite", "true")
    for _ in range(2):
        assert predict(weights, tmp_path, *words) == 0
        found = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*"))
        assert found == ["._a.png", "a.png", "masks/a.png", "overlays/a.jpg"]


def test_an_input_that_is_not_there_is_named(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(weights, tmp_path / "nothing.png", "--output", tmp_path) == 2
    assert "nothing.png" in capsys.readouterr().err
