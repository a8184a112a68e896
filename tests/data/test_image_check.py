"""Damaged or unusable image files: when they raise an error, and when they are left out."""

import json
import os

import lightning as L
import numpy as np
import pytest
from PIL import Image

from lightning_kd import callbacks
from lightning_kd.core.run_callbacks import RunRecorder
from lightning_kd.core.run_folder import RunFolder
from lightning_kd.data import ImageFolderDataModule, OpenSetDataModule, SymmetricNoise
from lightning_kd.data.image_check import damaged_images
from lightning_kd.data.image_files import images_below, read_image
from tests.data.image_trees import damage_three_files, fit, write_image_folders


def record_opened_files(monkeypatch):
    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda path, *args: opened.append(str(path)) or real(path, *args))
    return opened


def write_splits(root, *names, count=6):
    for name in names:
        write_image_folders(root / name, count=count)
    return root


def folder_data(root, **options):
    return ImageFolderDataModule(str(root), image_size=8, batch_size=4, **options)


def test_damaged_files_are_listed_together_before_training(tmp_path):
    bad = damage_three_files(write_splits(tmp_path, "train", "test") / "train")
    with pytest.raises(ValueError, match="3 of 12 images cannot be read") as error:
        fit(folder_data(tmp_path))
    assert all(path in str(error.value) for path in bad)


def test_on_error_skip_leaves_out_damaged_files(tmp_path):
    write_splits(tmp_path, "train", "test")
    bad = damage_three_files(tmp_path / "train") | damage_three_files(tmp_path / "test")
    data = folder_data(tmp_path, on_error="skip")
    with pytest.warns(UserWarning, match="left out, as 3 of 12 images cannot be read"):
        trainer, task = fit(data)
    with pytest.warns(UserWarning, match="left out, as 3 of 12 images cannot be read"):
        trainer.test(task, data, verbose=False)
    used = [*(data.train_image[i] for i in (*data.train_indices, *data.val_indices))]
    used += [data.test_image[i] for i in data.test_indices]
    assert len(used) == 18
    assert not {*used} & bad


def test_only_files_of_the_current_stage_are_opened(tmp_path, monkeypatch):
    damage_three_files(write_splits(tmp_path, "train", "val", "test") / "train")
    trainer, task = fit(folder_data(write_splits(tmp_path / "other", "train")))
    data, opened = folder_data(tmp_path), record_opened_files(monkeypatch)
    trainer.test(task, data, verbose=False)
    trainer.predict(task, data)
    trainer.validate(task, data, verbose=False)
    assert not any(f"{os.sep}train{os.sep}" in path for path in opened)
    with pytest.raises(ValueError, match="3 of 12 images cannot be read"):  # files of val were checked before
        fit(data)


@pytest.mark.parametrize("use", ["test", "predict", "curve", "loader"])
def test_damaged_test_files_raise_at_their_first_use(use, tmp_path):
    damage_three_files(write_splits(tmp_path, "train", "test") / "test")
    data = folder_data(tmp_path)
    if use != "curve":
        trainer, task = fit(data)
    uses = {
        "test": lambda: trainer.test(task, data),
        "predict": lambda: trainer.predict(task, data),
        "curve": lambda: fit(data, callbacks.TestCurve()),
        "loader": lambda: data.loader("test"),
    }
    with pytest.raises(ValueError, match="3 of 12 images cannot be read"):
        uses[use]()


@pytest.mark.parametrize(
    ("split", "damaged", "emptied"),
    [
        ("train", "b/*", r"class 'b' in split 'train'"),
        ("train", "*/*", r"split 'train'"),
        ("val", "a/*", r"class 'a' in split 'val'"),
        ("val", "*/*", r"split 'val'"),
        ("test", "b/*", r"class 'b' in split 'test'"),
        ("test", "*/*", r"split 'test'"),
    ],
)
def test_skip_raises_where_a_split_or_class_would_be_empty(split, damaged, emptied, tmp_path):
    write_splits(tmp_path, "train", "val", "test")
    for path in (tmp_path / split).glob(damaged):
        path.write_bytes(b"")
    data = folder_data(tmp_path, on_error="skip")
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(ValueError, match=f"^no image of {emptied} can be read, so on_error='skip' leaves none"),
    ):
        data.setup()


def test_skip_may_leave_out_a_class_of_a_drawn_validation_split(tmp_path):
    data = folder_data(write_image_folders(tmp_path, count=10), val_fraction=0.2)
    data.setup()
    few = data.val_indices[data.train_target[data.val_indices] == 0]
    for i in few:
        with open(data.train_image[i], "wb"):
            pass
    skipping = folder_data(tmp_path, val_fraction=0.2, on_error="skip")
    with pytest.warns(UserWarning, match="left out"):
        skipping.setup()
    assert skipping.val_indices.tolist() == [*set(data.val_indices.tolist()) - {*few.tolist()}]


def test_pool_with_damaged_files_is_the_same_in_every_stage(tmp_path):
    damage_three_files(write_image_folders(tmp_path, classes=("a", "b", "c"), count=12))

    def pool(stage):
        data = OpenSetDataModule(folder_data(tmp_path, on_error="skip"), 2, initial_fraction=0.4, budget=2, rounds=2)
        data.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        with pytest.warns(UserWarning, match="left out"):
            data.setup(stage)
        return [indices.tolist() for indices in (data.known_indices, data.unlabelled_indices, data.test_indices)]

    assert pool("fit") == pool("test") == pool("predict")


def test_damaged_files_stay_left_out_when_a_run_loads_the_data_again(tmp_path):
    bad = damage_three_files(write_image_folders(tmp_path / "images", count=20))
    noise = SymmetricNoise(0.2)
    data = ImageFolderDataModule(str(tmp_path / "images"), image_size=8, batch_size=4, on_error="skip", noise=noise)
    with pytest.warns(UserWarning, match="left out"):
        data.setup()  # the run folder is not known yet; the fit knows it and loads the data again
    recorder = RunRecorder(RunFolder(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    with pytest.warns(UserWarning, match="left out"):
        fit(data, recorder)
    assert not {data.train_image[i] for i in (*data.train_indices, *data.val_indices)} & bad


def test_damaged_pool_files_raise_or_are_skipped(tmp_path):
    source = write_image_folders(tmp_path / "labelled")
    pool = write_image_folders(tmp_path / "pool", classes=("x",))
    (pool / "x" / "3.png").write_bytes(b"a letter")

    def data(on_error):
        labelled = ImageFolderDataModule(str(source), image_size=8, batch_size=4, on_error=on_error, val_fraction=0.0)
        return OpenSetDataModule(labelled, pool=str(pool), budget=2)

    with pytest.raises(ValueError, match=r"1 of 6 images cannot be read: .*3\.png"):
        data("raise").setup()
    skipping = data("skip")
    with pytest.warns(UserWarning, match="left out, as 1 of 6"):
        skipping.setup()
    assert len(skipping.unlabelled_indices) == 5


def test_checked_files_are_opened_again_only_after_a_change(tmp_path, monkeypatch):
    write_image_folders(tmp_path)
    files = images_below(tmp_path)
    assert damaged_images(files, tmp_path) == {}
    opened = record_opened_files(monkeypatch)
    assert damaged_images(files, tmp_path) == {}
    assert not opened
    (tmp_path / "a" / "0.png").write_bytes(b"other")
    assert list(damaged_images(files, tmp_path)) == [str(tmp_path / "a" / "0.png")]
    assert {*opened} == {str(tmp_path / "a" / "0.png")}
    os.remove(tmp_path / "b" / "1.png")
    assert {*damaged_images(files, tmp_path)} == {str(tmp_path / "a" / "0.png"), str(tmp_path / "b" / "1.png")}


def test_truncated_jpeg_with_a_preview_is_damaged(tmp_path):
    path = tmp_path / "some.jpg"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    image.save(path, comment=b"\xff\xd8 a preview \xff\xd9")
    assert damaged_images([str(path)], tmp_path) == {}
    path.write_bytes(path.read_bytes()[:3000])
    assert [*damaged_images([str(path)], tmp_path)] == [str(path)]


@pytest.mark.parametrize(
    ("mode", "ending", "format"),
    [
        ("RGB", "bmp", None), ("RGB", "tif", None), ("RGB", "ppm", None), ("L", "pgm", None), ("RGB", "jpg", "MPO"),
        ("RGB", "jpg", None), ("RGB", "png", None), ("RGB", "webp", None), ("P", "png", "GIF"),
    ],
)  # fmt: skip
def test_truncated_file_of_each_format_is_damaged(mode, ending, format, tmp_path):
    path = tmp_path / f"some.{ending}"
    noise = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    first, second = (Image.fromarray(image).convert(mode) for image in noise)
    first.save(path, format, **({"save_all": True, "append_images": [second]} if format == "MPO" else {}))
    assert damaged_images([str(path)], tmp_path) == {}
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    assert [*damaged_images([str(path)], tmp_path)] == [str(path)]
    with pytest.raises(ValueError, match="cannot be read"):
        read_image(path)


def test_images_that_need_image_range_are_listed_with_the_damaged(tmp_path):
    root = write_image_folders(tmp_path / "images")
    (root / "a" / "0.png").write_bytes(b"")
    for mode, kind in (("F", np.float32), ("I", np.int32)):
        Image.fromarray(np.full((8, 8), 7, kind)).save(root / "a" / f"{mode}.tif")
    files = images_below(root)
    expected = {str(root / "a" / name) for name in ("0.png", "F.tif", "I.tif")}
    for _ in range(2):  # checked, then read from the cache
        damaged = damaged_images(files, root)
        assert {*damaged} == expected
        assert damaged[str(root / "a" / "F.tif")].startswith("holds floats, which have no fixed range: give ima")
        assert damaged[str(root / "a" / "I.tif")].startswith("holds 32-bit integers")
        assert {*damaged_images(files, root, (0, 10))} == {str(root / "a" / "0.png")}


def test_only_the_new_file_is_opened(tmp_path, monkeypatch):
    root = write_image_folders(tmp_path / "images")
    files = images_below(root)
    damaged_images(files, root)
    opened = record_opened_files(monkeypatch)
    Image.new("RGB", (4, 4)).save(root / "b" / "new.png")
    assert damaged_images(images_below(root), root) == {}
    assert damaged_images(files[2:], root) == {}
    monkeypatch.chdir(root)
    assert damaged_images(["a/0.png", "b/new.png"], ".") == {}
    assert opened == [str(root / "b" / "new.png")]


def test_cache_has_one_record_per_root_without_removed_files(tmp_path, monkeypatch):
    root = write_image_folders(tmp_path / "images")
    files = images_below(root)
    damaged_images(files, root)
    damaged_images(files[:3], root)
    os.remove(root / "b" / "5.png")
    Image.new("RGB", (4, 4)).save(root / "b" / "new.png")
    damaged_images([str(root / "b" / "new.png")], root)
    folder = os.path.join(os.environ["XDG_CACHE_HOME"], "lightning_kd")
    (record,) = os.listdir(folder)
    with open(os.path.join(folder, record), encoding="utf-8") as file:
        assert {*json.load(file)} == {*images_below(root)}
    for broken in ("[1, 2", "[]", json.dumps(dict.fromkeys(files, 1)), json.dumps({file: [1, 2] for file in files})):
        with open(os.path.join(folder, record), "w", encoding="utf-8") as file:
            file.write(broken)
        assert damaged_images(images_below(root), root) == {}
