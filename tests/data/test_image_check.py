"""Image files that are damaged or cannot be used, and when they are told."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from lightning_kd.core.run_callbacks import RunRecorder
from lightning_kd.core.run_folder import RunFolder
from lightning_kd.data import ImageFolderDataModule, OpenSetDataModule, SymmetricNoise
from lightning_kd.data.image_check import damaged_images
from lightning_kd.data.image_files import images_below, read_image
from tests.data.image_trees import fit, folders, spoil


def test_damaged_files_are_told_together_before_the_first_epoch(tmp_path):
    bad = spoil(folders(tmp_path))
    data = ImageFolderDataModule(str(tmp_path), image_size=8, batch_size=4)
    with pytest.raises(ValueError, match="3 of 12 images cannot be read") as error:
        fit(data)
    assert all(path in str(error.value) for path in bad)


def test_damaged_files_can_be_left_out(tmp_path):
    bad = spoil(folders(tmp_path))
    data = ImageFolderDataModule(str(tmp_path), image_size=8, batch_size=4, on_error="skip")
    with pytest.warns(UserWarning, match="left out, as 3 of 12 images cannot be read"):
        trainer, task = fit(data)
    trainer.test(task, data, verbose=False)
    used = [*(data.train_image[i] for i in (*data.train_indices, *data.val_indices))]
    used += [data.test_image[i] for i in data.test_indices]
    assert len(used) == 9
    assert not {*used} & bad


def test_damaged_files_stay_out_when_labels_are_drawn_for_a_run(tmp_path):
    bad = spoil(folders(tmp_path / "images"))
    noise = SymmetricNoise(0.2)
    data = ImageFolderDataModule(str(tmp_path / "images"), image_size=8, batch_size=4, on_error="skip", noise=noise)
    with pytest.warns(UserWarning, match="left out"):
        data.setup()  # before there is a run folder, whose record makes it load again
    recorder = RunRecorder(RunFolder(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    with pytest.warns(UserWarning, match="left out"):
        fit(data, recorder)
    assert not {data.train_image[i] for i in (*data.train_indices, *data.val_indices)} & bad


def test_damaged_files_of_a_pool(tmp_path):
    source = folders(tmp_path / "labelled")
    pool = folders(tmp_path / "pool", classes=("x",))
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


def test_what_was_looked_at_is_remembered(tmp_path, monkeypatch):
    folders(tmp_path)
    files = images_below(tmp_path)
    assert damaged_images(files, tmp_path) == {}
    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda path, *args: opened.append(str(path)) or real(path, *args))
    assert damaged_images(files, tmp_path) == {}
    assert not opened
    (tmp_path / "a" / "0.png").write_bytes(b"other")
    assert list(damaged_images(files, tmp_path)) == [str(tmp_path / "a" / "0.png")]
    assert {*opened} == {str(tmp_path / "a" / "0.png")}
    os.remove(tmp_path / "b" / "1.png")
    assert {*damaged_images(files, tmp_path)} == {str(tmp_path / "a" / "0.png"), str(tmp_path / "b" / "1.png")}


def test_a_photograph_with_a_preview_that_is_cut_off(tmp_path):
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
def test_files_that_are_cut_off(mode, ending, format, tmp_path):
    path = tmp_path / f"some.{ending}"
    noise = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    first, second = (Image.fromarray(image).convert(mode) for image in noise)
    first.save(path, format, **({"save_all": True, "append_images": [second]} if format == "MPO" else {}))
    assert damaged_images([str(path)], tmp_path) == {}
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    assert [*damaged_images([str(path)], tmp_path)] == [str(path)]
    with pytest.raises(ValueError, match="cannot be read"):
        read_image(path)


def test_images_without_a_range_are_told_with_the_damaged_ones(tmp_path):
    root = folders(tmp_path / "images")
    (root / "a" / "0.png").write_bytes(b"")
    for mode, kind in (("F", np.float32), ("I", np.int32)):
        Image.fromarray(np.full((8, 8), 7, kind)).save(root / "a" / f"{mode}.tif")
    files = images_below(root)
    expected = {str(root / "a" / name) for name in ("0.png", "F.tif", "I.tif")}
    for _ in range(2):  # looked at, and remembered
        damaged = damaged_images(files, root)
        assert {*damaged} == expected
        assert damaged[str(root / "a" / "F.tif")].startswith("holds floats, which have no range of their own: give ima")
        assert damaged[str(root / "a" / "I.tif")].startswith("holds integers of 32 bits")
        assert {*damaged_images(files, root, (0, 10))} == {str(root / "a" / "0.png")}


def opened_files(monkeypatch):
    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda path, *args: opened.append(os.path.basename(path)) or real(path, *args))
    return opened


def test_one_file_more_is_the_only_one_looked_at(tmp_path, monkeypatch):
    root = folders(tmp_path / "images")
    files = images_below(root)
    damaged_images(files, root)
    opened = opened_files(monkeypatch)
    Image.new("RGB", (4, 4)).save(root / "b" / "new.png")
    assert damaged_images(images_below(root), root) == {}
    assert damaged_images(files[2:], root) == {}
    monkeypatch.chdir(root)
    assert damaged_images(["a/0.png", "b/new.png"], ".") == {}
    assert opened == ["new.png"]


def test_each_root_has_one_record_without_files_that_are_gone(tmp_path, monkeypatch):
    root = folders(tmp_path / "images")
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
