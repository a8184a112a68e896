"""Pages of real commands, labelled on in a browser by keyboard, and taken in by real commands."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_kd.cli import main
from lightning_kd.core.run_folder import RunFolder
from lightning_kd.data import DigitsDataModule, ImageFolderDataModule, LabelFile
from lightning_kd.pool import PoolRecord
from lightning_kd.spreadsheet import read_rows
from tests.browser import Browser, needs_browser

QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
SHORT = [*QUIET, "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--run", "r"]


@pytest.fixture
def browser(tmp_path):
    with Browser(tmp_path / "browser") as found:
        yield found


def photos(folder, *places):
    generator = np.random.default_rng(0)
    for place in places:
        (folder / place).mkdir(parents=True)
        for k in range(4):
            pixels = generator.integers(0, 255, (100, 120, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / place / f"{k} & é.png")


FOLDER = ["ImageFolderDataModule", "--data.root", "photos", "--data.image_size", "8", "--data.val_fraction", "0"]
PLACES = ["train/<b>cat", "train/=dög", "test/<b>cat", "test/=dög"]


@needs_browser
def test_a_query_is_answered_in_a_browser(browser, tmp_path, capsys):
    photos(tmp_path / "photos", *PLACES, "pool/</script>", "pool/@x")
    pool = ["--model", "LfOSA", "--model.network", "mlp_8", "--data", "OpenSetDataModule", "--data.source", *FOLDER]
    words = [word.replace("--data.", "--data.source.") for word in pool[7:]]
    main(["fit", *pool[:7], *words, "--data.pool", "photos/pool", "--data.budget", "6", *SHORT])
    main(["query", "--config", "r/config.yaml", *QUIET])
    assert "open r/query_00.html in a browser" in capsys.readouterr().out
    _, *asked = [cells for _, cells in read_rows(Path("r/query_00.csv"))]
    browser.open(Path("r/query_00.html"))
    browser.press("1", "0", "ArrowRight", "2")
    browser.press("s", control=True)
    path = browser.downloaded("query_00.csv")
    assert path.read_text().splitlines()[0] == Path("r/query_00.csv").read_text().splitlines()[0]
    main(["label", str(path), "--run", "r"])
    assert "3 samples still wait" in capsys.readouterr().out
    answers = {row["path"]: row["answer"] for row in PoolRecord.load("r/pool.json").queries}
    assert answers == {
        row[1]: answer for row, answer in zip(asked, ["<b>cat", "unknown", None, "=dög", None, None], strict=True)
    }


@needs_browser
def test_labels_are_corrected_in_a_browser(browser, tmp_path):
    photos(tmp_path / "photos", *PLACES)
    main(["fit", "--model", "CrossEntropy", "--model.network", "mlp_8", "--data", *FOLDER, *SHORT])
    _, *rows = [cells for _, cells in read_rows(Path("r/noisy_labels.csv"))]
    browser.open(Path("r/noisy_labels.html"))
    browser.press("2", "ArrowRight", "1", "ArrowLeft", "ArrowLeft", "2")
    browser.press("s", control=True)
    path = browser.downloaded("corrections.csv")
    index = [int(row[0]) for row in rows]
    options = {"root": "photos", "image_size": 8, "val_fraction": 0.0}
    own, corrected = ImageFolderDataModule(**options), ImageFolderDataModule(**options, noise=LabelFile(str(path)))
    for data in (own, corrected):
        data.setup()
    expected = own.train_target.clone()
    expected[index[0]], expected[index[1]], expected[index[2]] = 1, 1, 0
    assert corrected.train_target.tolist() == expected.tolist()
    again = ["--data.noise", "LabelFile", "--data.noise.path", str(path), "--run", "again"]  # as the page says
    main(["fit", "--config", "r/config.yaml", *again])


@pytest.mark.parametrize("count", [0, 7])
def test_how_many_labels_are_shown(count, capsys):
    words = ["--config", "noisy_labels/ce_digits", "--config", "_overlay/smoke", "--model.label_page", str(count)]
    main(["fit", *words, *QUIET, "--run", "r"])
    assert Path("r/noisy_labels.html").is_file() == (count > 0)
    if count:
        page = Path("r/noisy_labels.html").read_text()
        first = [line.split(",")[0] for line in Path("r/noisy_labels.csv").read_text().splitlines()[1 : count + 1]]
        assert page.count('"cells"') == count
        assert [cells.split('"')[0] for cells in page.split('"cells": "')[1:]] == first
        assert Path("r/noisy_labels.html") in RunFolder("r").written()


def test_features_have_no_page_and_that_is_told(tmp_path, capsys):
    generator = np.random.default_rng(0)
    features = {f"{split}_feature": generator.normal(size=(20, 5)).astype(np.float32) for split in ("train", "test")}
    np.savez("f.npz", **features, train_target=np.arange(20) % 2, test_target=np.arange(20) % 2)
    data = ["--data", "ArrayDataModule", "--data.path", "f.npz", "--data.val_fraction", "0"]
    main(["fit", "--model", "CrossEntropy", "--model.network", "mlp_8", *data, *SHORT])
    assert "no noisy_labels.html to label on (the samples of ArrayDataModule are no images)" in capsys.readouterr().err
    assert not Path("r/noisy_labels.html").exists()
    assert Path("r/noisy_labels.csv").is_file()


def test_a_picture_is_the_sample():
    data = DigitsDataModule()
    picture = data.picture(5)
    assert picture.mode == "L"
    assert np.array_equal(np.asarray(picture), data.train_image[5, 0].numpy())
