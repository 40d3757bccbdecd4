"""Cache, data set, sampler and data module: the same batches whatever happens in between."""

import json
import threading

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from eamnet.data import (
    Augmentation,
    EpochSampler,
    FolderSource,
    PictureStore,
    SegmentationData,
    SegmentationDataset,
    Split,
    SyntheticSource,
    UnreadablePictureError,
)
from eamnet.data.isic import LAYOUT

torch.set_num_threads(1)


def make_folder(root, count=6, size=(40, 30)):
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        pixels = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"p{index}.png")
        mask = (pixels[..., 0] > 128).astype(np.uint8) * 255
        Image.fromarray(mask).save(root / "masks" / f"p{index}.png")
    return root


def synthetic(**options):
    return SegmentationData("synthetic", **{"size": 32, "synthetic_count": 40, **options})


def drain(loader):
    return [batch["id"] for batch in loader]


# Cache --------------------------------------------------------------------------------------


class CountingSource(FolderSource):
    reads = 0

    def read(self, record):
        self.reads += 1
        return super().read(record)


def same(a, b):
    return (
        np.array_equal(a.image, b.image)
        and np.array_equal(a.mask, b.mask)
        and (a.native_size, a.notes) == (b.native_size, b.notes)
    )


def test_cached_pictures_are_those_that_were_made(tmp_path):
    # Enough of them that every byte value occurs in the checksums.
    source = SyntheticSource(count=300, seed=1, size=16)
    fresh, cached = PictureStore(source, 12), PictureStore(source, 12, tmp_path)
    cached.fill(source.records)
    reread = PictureStore(source, 12, tmp_path)
    for record in source:
        assert same(fresh[record], reread[record])


def test_cache_is_used_and_follows_its_files(tmp_path):
    root = make_folder(tmp_path / "data")
    cache = tmp_path / "cache"
    source = CountingSource(root)
    record = source.records[0]
    PictureStore(source, 16, cache)[record]
    PictureStore(source, 16, cache)[record]
    assert source.reads == 1
    PictureStore(source, 24, cache)[record]
    assert source.reads == 2, "another size is another picture"
    Image.new("RGB", (40, 30), (9, 9, 9)).save(record.image)
    assert PictureStore(source, 16, cache)[record].image.max() == 9
    assert source.reads == 3
    assert not list(cache.rglob("*.part"))


@pytest.mark.parametrize("damage", ["truncated", "flipped bit", "empty"])
def test_damaged_cache_files_are_made_again(tmp_path, damage):
    source = CountingSource(make_folder(tmp_path / "data"))
    record = source.records[0]
    good = PictureStore(source, 16, tmp_path / "cache")[record]
    (file,) = (tmp_path / "cache").rglob("*.picture")
    content = bytearray(file.read_bytes())
    if damage == "flipped bit":
        content[-5] ^= 1
    file.write_bytes(content if damage == "flipped bit" else content[: len(content) // 2])
    if damage == "empty":
        file.write_bytes(b"")
    assert same(PictureStore(source, 16, tmp_path / "cache")[record], good)
    assert source.reads == 2
    PictureStore(source, 16, tmp_path / "cache")[record]
    assert source.reads == 2, "the damaged file was replaced"


def test_many_may_fill_one_cache(tmp_path):
    source = FolderSource(make_folder(tmp_path / "data", count=8))
    stores = [PictureStore(source, 16, tmp_path / "cache") for _ in range(4)]
    threads = [threading.Thread(target=store.fill, args=(source.records,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for record in source:
        assert same(stores[0][record], PictureStore(source, 16)[record])
    assert len(list((tmp_path / "cache").rglob("*"))) == 1 + len(source)


def test_memory_reads_once(tmp_path):
    source = CountingSource(make_folder(tmp_path))
    store = PictureStore(source, 16, in_memory=True)
    store.fill(source.records)
    assert store[source.records[0]] is store[source.records[0]]
    assert source.reads == len(source)


def test_fill_finds_everything_that_is_wrong(tmp_path):
    root = make_folder(tmp_path, count=6)
    (root / "images" / "p1.png").write_bytes(b"not a picture")
    (root / "masks" / "p2.png").write_bytes(b"")
    Image.new("L", (40, 30), 90).save(root / "masks" / "p3.png")
    source = FolderSource(root)
    findings = PictureStore(source, 16).fill(source.records)
    assert set(findings.unreadable) == {"p1", "p2"}
    assert "images/p1.png" in findings.unreadable["p1"]
    assert "masks/p2.png" in findings.unreadable["p2"]
    assert set(findings.notes) == {"p3"}
    with pytest.raises(UnreadablePictureError, match=r"p1.png"):
        PictureStore(source, 16).fill(source.records, strict=True)
    for name in ("p4", "p5"):
        Image.new("L", (50, 30)).save(root / "masks" / f"{name}.png")
    with pytest.raises(ValueError, match=r"2 of 6 masks cannot be used:\n.*p4.*\n.*p5"):
        PictureStore(source, 16).fill(source.records)
    with pytest.raises(ValueError, match="size must be at least 8 pixels, got 4"):
        PictureStore(source, 4)


# Data set and sampler -----------------------------------------------------------------------


def test_items_have_the_documented_form(tmp_path):
    source = FolderSource(make_folder(tmp_path))
    item = SegmentationDataset(source, ["p2"], size=16)[0]
    assert item["id"] == "p2"
    assert item["image"].dtype == torch.float32
    assert item["image"].shape == (3, 16, 16)
    assert 0.2 < item["image"].mean() < 0.8
    assert item["mask"].dtype == torch.float32
    assert item["mask"].shape == (1, 16, 16)
    assert set(item["mask"].unique().tolist()) == {0.0, 1.0}
    assert item["native_size"].tolist() == [30, 40]
    many = SegmentationDataset(SyntheticSource(2, size=32, num_classes=4), ["synthetic_000001"], 32)
    assert many[0]["mask"].dtype == torch.int64
    assert many[0]["mask"].max() > 1


def test_pictures_without_masks_have_no_mask_entry(tmp_path):
    root = make_folder(tmp_path)
    (root / "masks" / "p0.png").unlink()
    source = FolderSource(root, missing_masks="skip")
    assert "mask" not in SegmentationDataset(source, ["p0", "p1"], size=16)[1]
    assert "mask" in SegmentationDataset(source, ["p1"], size=16)[0]


def test_epoch_of_the_key_or_of_set_epoch_decides(tmp_path):
    source = FolderSource(make_folder(tmp_path))
    dataset = SegmentationDataset(source, ["p0"], size=16, augment=Augmentation())
    first, third = dataset[0]["image"], dataset[(3, 0)]["image"]
    assert not torch.equal(first, third)
    dataset.set_epoch(3)
    assert torch.equal(dataset[0]["image"], third)
    assert torch.equal(dataset[(0, 0)]["image"], first)


IDS = [f"p{i}" for i in range(37)]


def order(**options):
    epoch = options.pop("epoch", 0)
    sampler = EpochSampler(IDS, **options)
    sampler.set_epoch(epoch)
    keys = list(sampler)
    assert all(e == epoch for e, _ in keys)
    assert len(keys) == len(sampler)
    return [index for _, index in keys]


def test_order_is_shuffled_by_seed_and_epoch():
    assert sorted(order()) == list(range(37))
    assert order() == order()
    orders = [order(seed=s, epoch=e) for s in range(3) for e in range(3)]
    assert len({tuple(o) for o in orders}) == 9
    assert order(shuffle=False) == list(range(37))


@pytest.mark.parametrize("replicas", [2, 3])
def test_processes_share_each_global_batch(replicas):
    per_process = 4
    one = order(epoch=2)
    shares = [order(epoch=2, num_replicas=replicas, rank=r) for r in range(replicas)]
    assert len({len(share) for share in shares}) == 1
    for step in range(len(shares[0]) // per_process):
        together = {i for s in shares for i in s[step * per_process : (step + 1) * per_process]}
        width = per_process * replicas
        assert together == set(one[step * width : (step + 1) * width])


def test_evaluation_shares_hold_every_picture_once():
    shares = [order(shuffle=False, num_replicas=3, rank=r) for r in range(3)]
    assert sorted(i for share in shares for i in share) == list(range(37))


# Data module --------------------------------------------------------------------------------


def test_synthetic_needs_no_files():
    data = synthetic(batch_size=4)
    data.setup()
    assert (len(data.split.train), len(data.split.val), len(data.split.test)) == (28, 4, 8)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, 3, 32, 32)
    assert batch["mask"].shape == (4, 1, 32, 32)
    assert drain(data.val_dataloader()) == [list(data.split.val)]
    assert [i for ids in drain(data.test_dataloader()) for i in ids] == list(data.split.test)
    assert sum(map(len, drain(data.predict_dataloader()))) == 40
    assert data.native_mask(data.split.test[0]).shape == (32, 32)
    assert any(data.split_hash[:12] in line for line in data.report)


def test_training_drops_the_rest_and_small_sets_are_kept_whole():
    data = synthetic(batch_size=5)
    data.setup("fit")
    loader = data.train_dataloader()
    assert [len(ids) for ids in drain(loader)] == [5] * 5
    assert len(loader) == 5
    loader.sampler.set_epoch(1)
    left_out = set(data.split.train) - {i for ids in drain(loader) for i in ids}
    loader.sampler.set_epoch(2)
    assert left_out != set(data.split.train) - {i for ids in drain(loader) for i in ids}
    small = synthetic(synthetic_count=8, batch_size=16)
    small.setup("fit")
    assert [len(ids) for ids in drain(small.train_dataloader())] == [len(small.split.train)]


def test_workers_and_caches_do_not_change_batches(tmp_path):
    def batches(**options):
        data = synthetic(batch_size=8, **options)
        data.prepare_data()
        data.setup("fit")
        loader = data.train_dataloader()
        result = []
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            result += [(b["id"], b["image"], b["mask"]) for b in loader]
        return result

    plain = batches()
    for other in (batches(num_workers=2), batches(cache_dir=str(tmp_path))):
        assert [ids for ids, *_ in other] == [ids for ids, *_ in plain]
        for (_, *tensors), (_, *expected) in zip(other, plain, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))


def test_split_files_are_written_once_and_obeyed(tmp_path):
    path = str(tmp_path / "split.json")
    first = synthetic(split=path)
    first.prepare_data()
    first.setup("fit")
    assert Split.read(path).hash == first.split_hash
    second = synthetic(split=path, seed=9)
    second.setup("fit")
    assert second.split_hash == first.split_hash
    assert synthetic(split=path, protocol="random").split_file == path
    with pytest.raises(ValueError, match=r"was drawn as 'random.*but protocol is 'kfold'"):
        synthetic(split=path, protocol="kfold").setup()
    with pytest.raises(ValueError, match="are not in synthetic"):
        synthetic(split=path, synthetic_count=20).setup()
    content = json.loads((tmp_path / "split.json").read_text())
    other = tmp_path / "other.json"
    Split("ph2", "mine", 0, tuple(content["train"])).write(other)
    with pytest.raises(ValueError, match="is of ph2, but dataset is synthetic"):
        synthetic(split=str(other)).setup()


def test_damaged_pictures_are_left_out_and_named_at_the_end(tmp_path):
    root = make_folder(tmp_path, count=20)
    (root / "images" / "p7.png").write_bytes(b"not a picture")
    Image.new("L", (40, 30), 90).save(root / "masks" / "p3.png")
    data = SegmentationData("folder", root=str(root), size=16, batch_size=2)
    data.setup()
    report = "\n".join(data.report)
    assert "left out" in report
    assert "p7.png: cannot be read" in report
    assert "1 pictures: mask has an unusual foreground value, taken as such: p3" in report
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    seen = {i for loader in loaders for ids in drain(loader) for i in ids}
    assert "p7" in data.split.train + data.split.val + data.split.test
    assert "p7" not in seen
    with pytest.warns(UserWarning, match="1 pictures could not be read.*\n.*p7.png"):
        data.teardown()
    strict = SegmentationData("folder", root=str(root), size=16, strict=True)
    with pytest.raises(UnreadablePictureError, match=r"p7.png"):
        strict.setup()


def test_links_to_nowhere_count_as_damaged(tmp_path):
    root = make_folder(tmp_path, count=3)
    (root / "images" / "p1.png").unlink()
    (root / "images" / "p1.png").symlink_to(root / "gone.png")
    source = FolderSource(root)
    findings = PictureStore(source, 16, tmp_path / "cache").fill(source.records)
    assert list(findings.unreadable) == ["p1"]


def test_leaks_and_unused_pictures_are_reported(tmp_path):
    make_isic(tmp_path, 2017, {"train": 3, "val": 2})
    for part, name in (("train", "ISIC_0012970"), ("val", "ISIC_0012127")):
        images, masks = (tmp_path / f for f in vars(LAYOUT[2017][part]).values())
        Image.new("RGB", (24, 16)).save(images / f"{name}.jpg")
        Image.new("L", (24, 16), 255).save(masks / f"{name}_segmentation.png")

    def report(**options):
        data = SegmentationData("isic2017", root=str(tmp_path), size=16, **options)
        data.setup()
        return "\n".join(data.report), data.split

    text, split = report()
    assert "ISIC_0012127 left out: validation picture that is also in the training part" in text
    assert split.test == ("ISIC_0000003", "ISIC_0000004")
    assert "leak" not in text
    text, split = report(exclude=[])
    assert "ISIC_0012127" in split.test
    assert "leak: duplicates-ISIC_0012127 is divided between" in text
    Split("isic2017", "mine", 0, ("ISIC_0000000",), ("ISIC_0000001",)).write(tmp_path / "s.json")
    text, _ = report(split=str(tmp_path / "s.json"))
    assert "4 pictures are in no part" in text


def test_the_same_picture_in_two_parts_is_reported(tmp_path):
    for part in ("train", "test"):
        make_folder(tmp_path / part, count=6)
    for index in range(1, 6):
        path = tmp_path / "test" / "images" / f"p{index}.png"
        Image.new("RGB", (40, 30), (index, 0, 0)).save(path)

    def report():
        data = SegmentationData(
            "folder", root=str(tmp_path), size=16, val_fraction=0.2, cache_dir=str(tmp_path / "c")
        )
        data.setup("fit")
        before = "\n".join(data.report)
        data.setup("test")
        return before, data.report[-1]

    for _ in range(2):  # the second time from the cache
        before, leak = report()
        assert "leak" not in before
        assert leak.startswith("leak: 1 pictures are the same in two parts: train/p0 in ")
        assert leak.endswith(" and test/p0 in test")


def test_notes_and_damage_are_reported_from_a_warm_cache(tmp_path):
    root = make_folder(tmp_path / "data", count=10)
    Image.new("L", (40, 30), 90).save(root / "masks" / "p3.png")
    (root / "images" / "p7.png").write_bytes(b"not a picture")

    def report():
        data = SegmentationData(
            "folder", root=str(root), size=16, cache_dir=str(tmp_path / "cache")
        )
        data.setup()
        return data.report

    assert report() == report()
    assert sum("p3" in line or "p7" in line for line in report()) == 2


def make_isic(root, year, counts):
    number = 0
    for part, count in counts.items():
        images, masks = root / LAYOUT[year][part].images, root / LAYOUT[year][part].masks
        images.mkdir(parents=True)
        masks.mkdir()
        for _ in range(count):
            colour = (200, 150, 120 + number)
            Image.new("RGB", (24, 16), colour).save(images / f"ISIC_{number:07d}.png")
            mask = Image.new("L", (24, 16))
            mask.paste(255, (5, 5, 15, 10))
            mask.save(masks / f"ISIC_{number:07d}_segmentation.png")
            number += 1


@pytest.mark.parametrize(
    ("counts", "protocol", "sizes"),
    [
        ({"train": 20, "val": 5, "test": 5}, "official", (20, 5, 5)),
        ({"train": 20, "test": 5}, "official, val 0.1 of train", (18, 2, 5)),
        ({"train": 20, "val": 5}, "validation as test, val 0.1 of train", (18, 2, 5)),
        ({"train": 20}, "random, val 0.1, test 0.2", (14, 2, 4)),
    ],
)
def test_auto_takes_the_most_official_protocol(tmp_path, counts, protocol, sizes):
    make_isic(tmp_path, 2018, counts)
    data = SegmentationData("isic2018", root=str(tmp_path), size=16)
    data.setup()
    assert data.split.protocol == protocol
    assert (len(data.split.train), len(data.split.val), len(data.split.test)) == sizes


def test_parts_exclusions_and_folds(tmp_path):
    make_isic(tmp_path, 2018, {"train": 20, "test": 5})
    options = {"root": str(tmp_path), "size": 16, "protocol": "kfold", "parts": ["train"]}
    data = SegmentationData("isic2018", exclude=["ISIC_0000003"], **options)
    data.setup()
    assert len(data.split.train + data.split.val + data.split.test) == 19
    assert "ISIC_0000003 left out: listed in exclude" in data.report
    drawn = SegmentationData("isic2018", split=str(tmp_path / "fold0.json"), **options)
    drawn.setup()
    again = {**options, "split": drawn.split_file}
    with pytest.raises(ValueError, match=r"was drawn as 'fold 0 of 5.*but fold is 1 and folds 5"):
        SegmentationData("isic2018", fold=1, **again).setup()
    with pytest.raises(ValueError, match="exclude: ISIC_0000003 stand in the split file"):
        SegmentationData("isic2018", exclude=["ISIC_0000003"], **again).setup()
    with pytest.raises(ValueError, match="has \\['train', 'test'\\], not \\['val'\\]"):
        SegmentationData("isic2018", root=str(tmp_path), parts=["val"]).setup()
    with pytest.raises(ValueError, match="exclude: isic2018 has no pictures ISIC_3"):
        SegmentationData("isic2018", exclude=["ISIC_3"], **options).setup()
    external = SegmentationData("isic2018", root=str(tmp_path), size=16, protocol="external")
    external.setup("test")
    assert len(external.split.test) == 25
    with pytest.raises(ValueError, match="has no train pictures"):
        external.train_dataloader()


def test_native_mask_undoes_a_known_reduction(tmp_path):
    make_isic(tmp_path, 2017, {"train": 3})
    (tmp_path / "native_sizes.csv").write_text("id,width,height\nISIC_0000001,48,64\n")
    data = SegmentationData("isic2017", root=str(tmp_path), size=16, protocol="external")
    data.setup("test")
    assert data.native_mask("ISIC_0000001").shape == (64, 48)
    assert data.native_mask("ISIC_0000001").mean() == pytest.approx(50 / (24 * 16), rel=0.1)
    assert data.native_mask("ISIC_0000000").shape == (16, 24)
    (batch,) = data.test_dataloader()
    assert batch["native_size"].tolist() == [[16, 24], [64, 48], [16, 24]]
    with pytest.raises(ValueError, match="has no picture 'ISIC_9'"):
        data.native_mask("ISIC_9")


def test_predicting_needs_no_masks(tmp_path):
    root = make_folder(tmp_path)
    for file in (root / "masks").iterdir():
        file.unlink()
    (root / "masks").rmdir()
    data = SegmentationData("folder", root=str(root), size=16)
    data.setup("predict")
    assert sum(map(len, drain(data.predict_dataloader()))) == 6
    with pytest.raises(ValueError, match="has no pictures with a mask"):
        SegmentationData("folder", root=str(root), size=16).setup("fit")


def test_multi_class_pictures():
    data = synthetic(num_classes=3, synthetic_size=48)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["mask"].dtype == torch.int64
    assert batch["mask"].shape == (8, 1, 32, 32)
    assert batch["native_size"][0].tolist() == [48, 48]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "isic2019"}, "dataset must be one of"),
        ({"dataset": "ph2"}, "root must name the folder of ph2"),
        ({"dataset": "synthetic", "batch_size": 0}, "batch_size must be at least 1"),
        ({"dataset": "synthetic", "num_workers": -1}, "num_workers must not be negative"),
        ({"dataset": "synthetic", "num_classes": 0}, "num_classes must lie in"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SegmentationData(**options)


def test_evaluation_steps_line_up_across_processes():
    class FakeTrainer:
        world_size, global_rank = 2, 0

    # 8 test pictures of 41: shares of 4 and 4, then 9 of 45: shares of 5 and 4, where batches of
    # 4 or 2 would give unequal numbers of steps.
    for count, batch_size in ((41, 4), (45, 4), (45, 2), (45, 1)):
        steps, ids = [], []
        for rank in (0, 1):
            data = synthetic(synthetic_count=count, batch_size=batch_size)
            data.setup("test")
            data.trainer = FakeTrainer()
            data.trainer.global_rank = rank
            batches = drain(data.test_dataloader())
            steps.append(len(batches))
            ids += [i for batch in batches for i in batch]
        assert steps[0] == steps[1]
        assert sorted(ids) == list(data.split.test)


# Training that is interrupted ---------------------------------------------------------------


class Recorder(L.LightningModule):
    """Trains nothing; notes what it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, index):
        key = (self.current_epoch, tuple(batch["id"]), batch["image"].double().sum().item())
        self.seen.append(key)
        return self.weight * batch["image"].mean()

    def validation_step(self, batch, index):
        self.log("score", batch["image"].mean(), batch_size=1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, *, num_workers, epochs=3, resume=None, callbacks=None, **options):
    module = Recorder()
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=callbacks is not None,
        callbacks=callbacks,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        **options,
    )
    data = synthetic(batch_size=8, num_workers=num_workers)
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return module.seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumed_training_sees_what_an_unbroken_one_sees(tmp_path, num_workers):
    each_step = ModelCheckpoint(
        tmp_path, filename="step{step}", every_n_train_steps=1, save_top_k=-1
    )
    each_validation = ModelCheckpoint(
        tmp_path, filename="epoch{epoch}", monitor="score", save_top_k=-1
    )
    unbroken = fit(tmp_path, num_workers=num_workers, callbacks=[each_step, each_validation])
    assert len(unbroken) == 9
    assert [epoch for epoch, *_ in unbroken] == [0] * 3 + [1] * 3 + [2] * 3
    checkpoints = [(tmp_path / f"stepstep={n}.ckpt", n) for n in (1, 4, 5, 6)]
    checkpoints += [(tmp_path / f"epochepoch={e}.ckpt", 3 * (e + 1)) for e in (0, 1)]
    if num_workers:
        checkpoints = [checkpoints[2], checkpoints[4]]
    for path, steps in checkpoints:
        resumed = fit(tmp_path, num_workers=num_workers, resume=path)
        assert resumed == unbroken[steps:], path.name


@pytest.mark.filterwarnings("ignore")
def test_training_cannot_go_on_with_another_split(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="last")
    fit(tmp_path, num_workers=0, epochs=1, callbacks=[checkpoint])
    module, trainer = Recorder(), L.Trainer(max_epochs=2, accelerator="cpu", logger=False)
    data = synthetic(batch_size=8, protocol="kfold")
    path = tmp_path / "last.ckpt"
    with pytest.raises(ValueError, match="training cannot go on with other pictures"):
        trainer.fit(module, data, ckpt_path=path, weights_only=True)
    with pytest.warns(UserWarning, match="may be among those scored"):
        trainer.validate(module, data, ckpt_path=path, weights_only=True, verbose=False)


@pytest.mark.filterwarnings("ignore")
def test_overfitting_on_few_batches_still_works(tmp_path):
    seen = fit(tmp_path, num_workers=0, epochs=2, overfit_batches=2)
    assert seen[0][1] == seen[2][1]
    assert len(seen) == 4


def test_order_seed_changes_order_and_augmentation_and_nothing_else() -> None:
    def data(order_seed: int | None) -> SegmentationData:
        result = SegmentationData(
            "synthetic",
            size=32,
            batch_size=17,
            protocol="random",
            synthetic_count=24,
            order_seed=order_seed,
        )
        result.setup("fit")
        return result

    usual, same, other = data(None), data(0), data(1)
    assert usual.split_hash == other.split_hash
    batches = [next(iter(d.train_dataloader())) for d in (usual, same, other)]
    assert batches[0]["id"] == batches[1]["id"]
    assert torch.equal(batches[0]["image"], batches[1]["image"])
    assert batches[0]["id"] != batches[2]["id"]
    assert sorted(batches[0]["id"]) == sorted(batches[2]["id"])
    validation = [next(iter(d.val_dataloader())) for d in (usual, other)]
    assert torch.equal(validation[0]["image"], validation[1]["image"])
