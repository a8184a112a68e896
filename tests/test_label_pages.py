"""Label pages that real commands write, filled in by keyboard in a browser, and read by real commands."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_kd import CrossEntropy
from lightning_kd.cli import main
from lightning_kd.core.run_folder import RunFolder
from lightning_kd.data import DigitsDataModule, ImageFolderDataModule, LabelFile, OpenSetDataModule
from lightning_kd.noisy_labels.correction_page import correction_page
from lightning_kd.noisy_labels.label_scores import LabelScores
from lightning_kd.pool import PoolRecord
from lightning_kd.spreadsheet import read_rows
from tests.browser import Browser, needs_browser
from tests.noisy_labels.runs import fitted

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
    main(["fit", "--config", "r/config.yaml", "--overwrite"])
    main(["query", "--config", "r/config.yaml", *QUIET])  # the pool's 2 other images, then the unanswered ones
    _, *again = [row[1] for _, row in read_rows(Path("r/query_01.csv"))]
    assert again[2:] == [asked[k][1] for k in (2, 4, 5)]
    there = {f"{place}/{k} & é.png" for place in ("</script>", "@x") for k in range(4)}
    assert {*again[:2]} == there - {row[1] for row in asked}
    browser.open(Path("r/query_01.html"))
    browser.press("1", "ArrowRight", "2")
    browser.press("s", control=True)
    main(["label", str(browser.downloaded("query_01.csv")), "--run", "r"])
    answers = {row["path"]: row["answer"] for row in PoolRecord.load("r/pool.json").queries}
    assert [answers[path] for path in again] == ["<b>cat", None, "=dög", None, None]


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
    main(["fit", "--config", "r/config.yaml", *again, "--model.label_page", "6", *QUIET])
    browser.open(Path("again/noisy_labels.html"))  # a second round of corrections keeps the first one
    _, *rows = [cells for _, cells in read_rows(Path("again/noisy_labels.csv"))]
    browser.press("1")
    path.unlink()
    browser.press("s", control=True)
    corrected = ImageFolderDataModule(**options, noise=LabelFile(str(browser.downloaded("corrections.csv"))))
    corrected.setup()
    expected[int(rows[0][0])] = 0
    assert corrected.train_target.tolist() == expected.tolist()


def test_earlier_corrections_of_validation_samples_are_kept(tmp_path):
    photos(tmp_path / "photos", *PLACES)
    Path("c.csv").write_text("index,class_name\n" + "".join(f"{k},=dög\n" for k in range(3)))
    data = ImageFolderDataModule("photos", image_size=8, val_fraction=0.5, noise=LabelFile("c.csv"))
    data.setup()
    index = torch.from_numpy(data.train_indices)
    given, n = data.train_target[index], len(index)
    assert {*range(3)} & {*data.val_indices.tolist()}  # else the test could not fail
    scores = LabelScores(index, given, given, torch.zeros(n), torch.zeros(n), torch.ones(n).double())
    page = correction_page(scores, data, 2)
    content = json.loads(page.split('id="page">', 1)[1].split("</script>", 1)[0])
    lines = [*content["more"], *(f"{row['cells']},{row['otherwise']}" for row in content["rows"] if row["otherwise"])]
    Path("again.csv").write_text("\n".join([content["header"], *lines]))
    again = ImageFolderDataModule("photos", image_size=8, val_fraction=0.5, noise=LabelFile("again.csv"))
    again.setup()
    assert again.train_target.tolist() == data.train_target.tolist()


def test_label_page_shows_as_many_labels_as_asked_for_and_0_writes_none(tmp_path):
    count = 7
    words = ["--config", "noisy_labels/ce_digits", "--config", "_overlay/smoke", "--model.label_page", str(count)]
    main(["fit", *words, *QUIET, "--run", "r"])
    page = Path("r/noisy_labels.html").read_text()
    first = [line.split(",")[0] for line in Path("r/noisy_labels.csv").read_text().splitlines()[1 : count + 1]]
    assert [cells.split('"')[0] for cells in page.split('"cells": "')[1:]] == first
    assert Path("r/noisy_labels.html") in RunFolder("r").written()
    task, _ = fitted(CrossEntropy, label_page=0)
    task.write_results(tmp_path)
    assert (tmp_path / "noisy_labels.csv").is_file()
    assert not (tmp_path / "noisy_labels.html").exists()
    with pytest.raises(ValueError, match="label_page must be at least 0, got -1: give 0 for no page"):
        CrossEntropy("cnn_tiny", 10, label_page=-1)


def test_feature_data_have_no_label_page_and_a_note_says_so(tmp_path, capsys):
    generator = np.random.default_rng(0)
    features = {f"{split}_feature": generator.normal(size=(20, 5)).astype(np.float32) for split in ("train", "test")}
    np.savez("f.npz", **features, train_target=np.arange(20) % 2, test_target=np.arange(20) % 2)
    data = ["--data", "ArrayDataModule", "--data.path", "f.npz", "--data.val_fraction", "0"]
    main(["fit", "--model", "CrossEntropy", "--model.network", "mlp_8", *data, *SHORT])
    assert (
        "the page noisy_labels.html could not be written (the samples of ArrayDataModule are no images)"
        in capsys.readouterr().err
    )
    assert not Path("r/noisy_labels.html").exists()
    assert Path("r/noisy_labels.csv").is_file()


def test_picture_has_the_pixels_of_the_sample():
    data = DigitsDataModule()
    picture = data.picture(5)
    assert picture.mode == "L"
    assert np.array_equal(np.asarray(picture), data.train_image[5, 0].numpy())


def label_some(folder, *labels):
    """Write ``answers.csv``: the first query with these labels for its first samples."""
    text = Path(folder, "query_00.csv").read_text().splitlines()
    labels = [*labels, *[""] * (len(text) - 1 - len(labels))]
    lines = [line + label for line, label in zip(text[1:], labels, strict=True)]
    Path(folder, "answers.csv").write_text("\n".join([text[0], *lines]))


def test_new_class_needs_a_fit_from_scratch_and_a_labelled_sample(tmp_path, capsys):
    photos(tmp_path / "photos", *PLACES, "pool")
    source = [word.replace("--data.", "--data.source.") for word in FOLDER]
    pool = ["--data", "OpenSetDataModule", "--data.source", *source, "--data.pool", "photos/pool", "--data.budget", "3"]
    main(["fit", "--model", "LfOSA", "--model.network", "mlp_8", *pool, *SHORT])
    main(["query", "--config", "r/config.yaml", *QUIET])
    label_some("r", "bird", "<b>cat")
    with pytest.raises(SystemExit):
        main(["label", "r/answers.csv"])
    assert "'bird' is none of <b>cat, =dög, unknown" in capsys.readouterr().err
    main(["label", "r/answers.csv", "--new_class", "bird"])
    capsys.readouterr()
    for words in (["fit", "--ckpt_path", "last", "--trainer.max_epochs", "2"], ["test", "--ckpt_path", "last"]):
        with pytest.raises(SystemExit):
            main([words[0], "--config", "r/config.yaml", *words[1:]])
        assert "the classes of the data are not those of the checkpoint (['bird'] are new;" in capsys.readouterr().err
    main(["fit", "--config", "r/config.yaml", "--overwrite"])
    assert torch.load("r/checkpoints/last.ckpt", weights_only=True)["class_names"] == ["<b>cat", "=dög", "bird"]
    assert "new_classes:\n    - bird\n" in Path("r/config.yaml").read_text()
    main(["test", "--config", "r/config.yaml", "--ckpt_path", "last"])
    with pytest.raises(SystemExit):
        main(["label", "r/query_00.csv"])
    assert "holds no answer" in capsys.readouterr().err
    label_some("r", "=dög")  # the sample labelled bird is one of another class
    main(["label", "r/answers.csv", "--correct"])
    with pytest.raises(SystemExit):
        main(["fit", "--config", "r/config.yaml", "--overwrite"])
    assert "no sample of the new class 'bird' left" in capsys.readouterr().err


def test_pool_images_may_be_added_and_deleted_between_query_and_answers(tmp_path, capsys):
    photos(tmp_path / "photos", *PLACES, "pool/m")
    source = [word.replace("--data.", "--data.source.") for word in FOLDER]
    pool = ["--data", "OpenSetDataModule", "--data.source", *source, "--data.pool", "photos/pool", "--data.budget", "3"]
    main(["fit", "--model", "LfOSA", "--model.network", "mlp_8", *pool, *SHORT])
    query = ["query", "--config", "r/config.yaml", *QUIET]
    main(query)
    label_some("r", "<b>cat")
    main(["label", "r/answers.csv"])
    photos(tmp_path / "photos", "pool/first")  # sorted before the other images
    _, *asked = [row for _, row in read_rows(Path("r/query_00.csv"))]
    Path("photos/pool", asked[1][1]).unlink()  # one of the two unanswered ones
    main([*query, "--data.budget", "6"])  # more than the pool holds besides the unanswered one
    _, *again = [row for _, row in read_rows(Path("r/query_01.csv"))]
    assert [row[1] for row in again[5:]] == [asked[2][1]]
    assert asked[1][1] not in [row[1] for row in again]
    label_some("r", "=dög", "unknown", "<b>cat")  # answers to the first query
    capsys.readouterr()
    main(["label", "r/answers.csv", "--correct"])
    assert "2 new, 1 changed" in capsys.readouterr().out
    answers = {row["path"]: row["answer"] for row in PoolRecord.load("r/pool.json").queries}
    expected = zip(asked, ["=dög", "unknown", "<b>cat"], strict=True)
    assert answers == {row[1]: None for row in again} | {row[1]: answer for row, answer in expected}
    with pytest.raises(SystemExit):
        main(query)
    assert "5 samples of query_01.csv wait for an answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"new_classes": ["bird"], "known_classes": 4, "initial_count": 20}, "for a pool of your own"),
        ({"new_classes": ["3"], "pool": "p.npz"}, "holds '3', which is a class already"),
        ({"new_classes": ["bird", "bird"], "pool": "p.npz"}, "holds 'bird', which is a class already"),
    ],
)
def test_new_classes_that_exist_or_without_an_own_pool_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        OpenSetDataModule(DigitsDataModule(), **arguments)


def test_data_module_without_the_new_class_of_its_record_raises(tmp_path):
    np.savez("p.npz", image=np.zeros((40, 8, 8, 1), np.uint8))
    data = OpenSetDataModule(DigitsDataModule(), pool="p.npz", budget=3)
    data.setup()
    record = PoolRecord(tmp_path / "pool.json")
    data.set_record(record)
    record.add_classes(["bird"])
    with pytest.raises(ValueError, match=r"give OpenSetDataModule new_classes=\['bird'\]"):
        data.set_record(record)
