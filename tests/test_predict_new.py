"""Predictions for new samples, without labels and without the training data, through the real command."""

import base64
import csv
import io
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonargparse import Namespace
from PIL import Image

import lightning_kd
from lightning_kd.cli import main
from lightning_kd.cli.new_samples import take_from_run, without_predict
from lightning_kd.core import prediction_page
from lightning_kd.core.run_folder import RunFolder
from lightning_kd.data import ArrayDataModule, ImageFolderDataModule, OpenSetDataModule
from lightning_kd.data.described_samples import DescribedSamples
from lightning_kd.data.new_samples import files_to_predict
from lightning_kd.data.preparation import Preparation

QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
FIT = ["fit", "--model", "Classification", "--model.network", "cnn_tiny", "--trainer.max_epochs", "2", "--run", "r"]
FIT += ["--model.optimizer", "AdamW", "--model.optimizer.lr", "0.01", *QUIET]
FILES = [
    "--data",
    "ImageFolderDataModule",
    "--data.root",
    "photos",
    "--data.image_size",
    "16",
    "--data.augment",
    "false",
]
NAMES = ["=blue", "a <b> & c", "rot"]
COLOURS = {"=blue": (20, 30, 220), "a <b> & c": (30, 200, 40), "rot": (220, 30, 20)}


def picture(path, colour, size=(24, 20), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-20, 20, (size[1], size[0], 3))
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(path)


def rows(path="r/predictions.csv"):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Run ``r`` on an image folder, which is deleted afterwards, run ``a`` on arrays, and new samples of both kinds."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, colour in COLOURS.items():
            for i in range(20):
                picture(Path(f"photos/{name}/{i:02d}.png"), colour, seed=i)
        main([*FIT, *FILES, "--data.mean", "[0.4, 0.4, 0.4]"])
        shutil.rmtree("photos")
        for i, colour in enumerate([*COLOURS.values(), *COLOURS.values()]):
            picture(Path(f"new/{'deep/' if i % 2 else ''}{i}.{'png' if i < 4 else 'jpg'}"), colour, seed=50 + i)
        generator = np.random.default_rng(0)
        target = np.arange(60) % 3
        image = (generator.integers(0, 60, (60, 12, 12, 1)) + 90 * target[:, None, None, None]).clip(0, 255)
        np.savez("mine.npz", image=image.astype(np.uint8), target=np.array(["no", "some", "all"])[target])
        main([*FIT[:-4], "--run", "a", *QUIET, "--data", "ArrayDataModule", "--data.path", "mine.npz"])
        np.save("new.npy", image[:9].astype(np.uint8))
        np.savez("new.npz", image=image[:9].astype(np.uint8))
    return folder


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


PREDICT = ["predict", "--config", "r/config.yaml", "--ckpt_path", "last", *QUIET]
ARRAYS = ["predict", "--config", "a/config.yaml", "--ckpt_path", "best", *QUIET]


def test_nested_folder_is_predicted_after_the_training_data_is_deleted(run):
    assert not Path("photos").exists()
    main([*PREDICT, "--data.predict", "new"])
    found = rows()
    assert [row["path"] for row in found] == sorted(str(p) for p in Path("new").rglob("*.*"))
    assert [row["index"] for row in found] == [str(i) for i in range(6)]
    names = ["'=blue", *NAMES[1:]]  # quoted, so that a spreadsheet takes it for no formula
    colour = {f"{i}": names[i % 3] for i in range(6)}
    assert [row["class_name"] for row in found] == [colour[Path(row["path"]).stem] for row in found]
    for row in found:
        probabilities = [float(row[f"probability_{k}"]) for k in range(3)]
        assert sum(probabilities) == pytest.approx(1, abs=1e-4)
        assert names[int(np.argmax(probabilities))] == row["class_name"]


def test_probabilities_are_those_of_the_plain_network(run):
    main([*PREDICT, "--data.predict", "new"])
    data = ImageFolderDataModule("gone", image_size=16, class_names=NAMES, mean=[0.4] * 3, predict="new")
    (batch,) = data.predict_dataloader()
    assert batch.target.tolist() == [-1] * 6
    checkpoint = torch.load("r/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["data_description"]["mean"] == [0.4] * 3
    from lightning_kd import build_network

    network = build_network("cnn_tiny", 3).eval()
    weights = checkpoint["state_dict"]
    network.load_state_dict({k.removeprefix("network."): v for k, v in weights.items() if k.startswith("network.")})
    with torch.no_grad():
        expected = network(batch.image).softmax(1)
    found = torch.tensor([[float(row[f"probability_{k}"]) for k in range(3)] for row in rows()])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_one_image_and_lists_are_predicted_in_their_order(run):
    main([*PREDICT, "--data.predict", "new/0.png"])
    assert [row["path"] for row in rows()] == ["new/0.png"]
    main([*PREDICT, "--data.predict", "new"])
    whole = {row["path"]: row["probability_0"] for row in rows()}
    wanted = ["new/deep/1.png", "new/0.png", "new/deep/5.jpg"]
    Path("list.txt").write_text("\ufeff" + "\n".join(wanted) + "\n\n", encoding="utf-8")
    Path("new/list.csv").write_text("number;Path\n1;deep/1.png\n2;0.png\n3;deep/5.jpg\n")  # from its own folder
    Path("bare.csv").write_text("\r\n".join(wanted))
    for name in ("list.txt", "new/list.csv", "bare.csv"):
        main([*PREDICT, "--data.predict", name])
        assert [row["path"] for row in rows()] == wanted
        assert [float(row["probability_0"]) for row in rows()] == pytest.approx([float(whole[p]) for p in wanted])


def test_damaged_and_missing_files_give_an_error_or_are_skipped(run, capsys):
    Path("new/deep/broken.jpg").write_bytes(Path("new/deep/5.jpg").read_bytes()[:200])
    Path("list.txt").write_text("new/0.png\nnew/deep/broken.jpg\nnew/gone.png\nnew/2.png\n")
    for given, culprits in (("new", ["broken.jpg"]), ("list.txt", ["broken.jpg", "gone.png"])):
        before = Path("r/run.json").read_bytes()
        with pytest.raises(SystemExit):
            main([*PREDICT, "--data.predict", given])
        error = capsys.readouterr().err
        assert all(culprit in error for culprit in culprits)
        assert "on_error: skip" in error
        assert Path("r/run.json").read_bytes() == before
    with pytest.warns(UserWarning, match="2 of 4 images cannot be read"):
        main([*PREDICT, "--data.predict", "list.txt", "--data.on_error", "skip"])
    assert [(row["index"], row["path"]) for row in rows()] == [("0", "new/0.png"), ("3", "new/2.png")]
    with pytest.raises(SystemExit), pytest.warns(UserWarning, match="cannot be read"):
        main([*PREDICT, "--data.predict", "new/deep/broken.jpg", "--data.on_error", "skip"])
    assert "no image of split 'predict' can be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere", "'nowhere' does not exist"),
        ("empty", "'empty' holds no image"),
        ("none.txt", "'none.txt' holds no image"),
        ("notes.md", "'notes.md' must be a folder, an image"),
    ],
)
def test_paths_without_images_give_an_error(given, message, run, capsys):
    Path("empty").mkdir()
    Path("none.txt").write_text("\n")
    Path("notes.md").write_text("no image")
    with pytest.raises(SystemExit):
        main([*PREDICT, "--data.predict", given])
    assert message in capsys.readouterr().err


def test_arrays_are_predicted_without_training_data_and_wrong_ones_raise(run, capsys):
    main([*ARRAYS, "--data.predict", "new.npz"])
    there = rows("a/predictions.csv")
    Path("mine.npz").unlink()
    for name in ("new.npz", "new.npy"):
        main([*ARRAYS, "--data.predict", name])
        assert rows("a/predictions.csv") == there  # normalised by the mean and deviation of the run
    assert [row["index"] for row in there] == [str(i) for i in range(9)]
    assert {row["class_name"] for row in there} <= {"no", "some", "all"}
    np.save("colour.npy", np.zeros((2, 12, 12, 3), np.uint8))
    with pytest.raises(SystemExit):
        main([*ARRAYS, "--data.predict", "colour.npy"])
    assert "have shape (3, 12, 12), but training samples have (1, 12, 12)" in capsys.readouterr().err
    np.save("large.npy", np.zeros((2, 20, 20), np.uint8))
    with pytest.raises(SystemExit):
        main([*ARRAYS, "--data.predict", "large.npy"])
    assert "have shape (1, 20, 20), but training samples have (1, 12, 12)" in capsys.readouterr().err
    np.savez("strange.npz", pictures=np.zeros((2, 12, 12), np.uint8))
    with pytest.raises(SystemExit):
        main([*ARRAYS, "--data.predict", "strange.npz"])
    assert "must hold the array 'image' or 'feature', got ['pictures']" in capsys.readouterr().err


def rows_checked_by_load(name, new):
    """The rows that ``predict`` wrote for ``new``, checked: ``lightning_kd.load`` gives the same probabilities."""
    found = rows(f"{name}/predictions.csv")
    loaded = lightning_kd.load(f"{name}/checkpoints/last.ckpt", device="cpu").predict(new)
    columns = [key for key in found[0] if key.startswith("probability_")]
    table = torch.tensor([[float(row[key]) for key in columns] for row in found])
    torch.testing.assert_close(table, loaded.probabilities, atol=1e-4, rtol=0)
    return found


def test_runs_on_arrays_predict_files_and_runs_on_files_predict_arrays(run, capsys):
    last = ["predict", "--config", "a/config.yaml", "--ckpt_path", "last", *QUIET]
    main([*last, "--data.predict", "new"])
    assert [row["path"] for row in rows_checked_by_load("a", "new")] == sorted(str(p) for p in Path("new").rglob("*.*"))
    image = np.random.default_rng(0).integers(0, 256, (3, 40, 30, 3), dtype=np.uint8)
    np.save("colour.npy", image)
    main([*PREDICT, "--data.predict", "colour.npy"])
    assert len(rows_checked_by_load("r", image)) == len(rows_checked_by_load("r", "colour.npy")) == 3
    for k, one in enumerate(image):  # files of the same images, resized the same way
        Image.fromarray(one).save(f"new/{k}.png")
    main([*PREDICT, "--data.predict", "new/1.png"])
    rows_checked_by_load("r", image[1])


POOL = ["PoolClassifier", "--data", "OpenSetDataModule", "--data.source", "ImageFolderDataModule"]
POOL += ["--data.source.root", "photos", "--data.source.image_size", "16", "--data.pool", "new", "--data.budget", "1"]
TAGS = ["MultiLabelClassification", "--data", "MultiLabelFolderDataModule", "--data.root", "photos"]


@pytest.mark.parametrize(
    "method",
    [POOL, [*TAGS, "--data.image_size", "16"], ["Classification", "--data", "DigitsDataModule"]],
    ids=["pool", "tags", "digits"],
)
def test_a_run_of_any_data_module_predicts_new_files(method, run, capsys):
    lines = ["file,labels"]
    for k, name in enumerate(["blue", "red"]):
        for i in range(8):
            picture(Path(f"photos/{name}/{i}.png"), COLOURS["rot" if k else "=blue"], size=(60, 20), seed=i)
            lines.append(f"{name}/{i}.png,{name}{'|even' * (i % 2)}")
    Path("photos/labels.csv").write_text("\n".join(lines))
    fit = ["--model.network", "cnn_tiny", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"]
    main(["fit", "--model", *method, *fit, "--run", "m", *QUIET])
    last = ["predict", "--config", "m/config.yaml", "--ckpt_path", "last", *QUIET]
    main(last)
    if method[0] == TAGS[0]:  # wide pictures, squeezed to the input size instead of cut
        rows_checked_by_load("m", [row["path"] for row in rows("m/predictions.csv")])
        shown = [(row["path"], row["probability_0"]) for row in rows("m/predictions.csv")]
        checkpoint = torch.load("m/checkpoints/last.ckpt", weights_only=True)
        del checkpoint["data_description"]["stretch"]  # as in older checkpoints
        torch.save(checkpoint, "m/checkpoints/last.ckpt")
        rows_checked_by_load("m", [path for path, _ in shown])
        Path("same.txt").write_text("\n".join(path for path, _ in shown))
        main([*last, "--data.predict", "same.txt"])
        assert [row["probability_0"] for row in rows("m/predictions.csv")] == [share for _, share in shown]
    shutil.rmtree("photos")
    main([*last, "--data.predict=new", "--sort", "confidence"])
    main([*last, "--data.predict", "new"])
    assert [row["path"] for row in rows_checked_by_load("m", "new")] == sorted(str(p) for p in Path("new").rglob("*.*"))
    assert Path("m/predictions.html").is_file()
    np.save("wrong.npy", np.zeros((2, 5), np.float32))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*last, "--data.predict", "wrong.npy"])
    error = capsys.readouterr().err
    assert "samples of predict 'wrong.npy' have shape (5,), but training samples have (" in error
    assert "give samples of that shape" in error


def test_new_samples_without_a_checkpoint_give_an_error(run, capsys):
    with pytest.raises(SystemExit):
        main(["predict", "--config", "distillation/teacher_digits", "--data.predict", "new", "--run", "none", *QUIET])
    assert "DigitsDataModule cannot read predict='new' without a checkpoint" in capsys.readouterr().err
    # with fast_dev_run, too, the new files are read and not the deleted training data
    main([*PREDICT, "--data.predict", "new", "--trainer.fast_dev_run", "true"])


def test_student_predicts_after_its_teacher_is_deleted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(lightning_kd.build_network("cnn_tiny", 10, 1).state_dict(), "teacher.pt")
    pair = ["--model.student", "cnn_tiny", "--model.teacher", "cnn_tiny", "--model.teacher_weights", "teacher.pt"]
    limits = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", *QUIET]
    main(["fit", "--model", "KD", *pair, "--data", "DigitsDataModule", *limits, "--run", "s"])
    last = ["predict", "--config", "s/config.yaml", "--ckpt_path", "last", *QUIET]
    main(last)
    expected = rows("s/predictions.csv")
    Path("teacher.pt").unlink()
    main(last)
    assert rows("s/predictions.csv") == expected


@pytest.mark.parametrize("kind", ["multi_label", "segmentation"])
def test_multi_label_and_segmentation_runs_predict_new_arrays(kind, tmp_path):
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    shape = (30, 4) if kind == "multi_label" else (30, 8, 8)
    np.savez("mine.npz", image=image, target=generator.integers(0, 2, shape, dtype=np.uint8))
    task, network = {
        "multi_label": ("MultiLabelClassification", "cnn_tiny"),
        "segmentation": ("SemanticSegmentation", "fcn_tiny"),
    }[kind]
    data = ["--data", "ArrayDataModule", "--data.path", "mine.npz"]
    limits = ["--trainer.max_epochs", "1", "--run", "r", *QUIET]
    main(["fit", "--model", task, "--model.network", network, *data, *limits])
    Path("mine.npz").unlink()
    np.save("new.npy", image[:5])
    main([*PREDICT, "--data.predict", "new.npy"])
    assert len(rows()) == 5
    assert len(list(Path("r/predictions").glob("*.png"))) == 5 * (kind == "segmentation")


def test_image_folder_with_predict_keeps_its_own_classes_and_splits(run):
    for name, colour in COLOURS.items():
        for i in range(10):
            picture(Path(f"photos/{name}/{i:02d}.png"), colour, seed=i)
    data = ImageFolderDataModule("photos", image_size=16, predict="new")
    assert (data.class_names, data.test_size) == (NAMES, 6)
    assert len(data.predict_dataloader().sampler.indices) == 6
    assert data.path_of(0) == "new/0.png"
    with pytest.raises(ValueError, match="class_names has 'green', which is not a folder"):
        ImageFolderDataModule("photos", class_names=[*NAMES, "green"]).setup()
    other = ImageFolderDataModule("photos", image_size=16, class_names=NAMES[::-1])
    other.setup()
    assert other.train_target[0] == 2
    with pytest.raises(ValueError, match="split must be 'train', 'val' or 'test', got 'predict'"):
        other.loader("predict")


def test_array_data_with_predict_keep_their_splits_and_check_shapes(run):
    data = ArrayDataModule("mine.npz", predict="new.npy")
    assert (data.train_size + data.val_size + data.test_size, len(data.class_names)) == (60, 3)
    (batch,) = data.predict_dataloader()
    assert batch.image.shape == (9, 1, 12, 12)
    np.save("large.npy", np.zeros((2, 20, 20), np.uint8))
    with pytest.raises(ValueError, match=r"must be like those trained on \(1, 12, 12\), got \(1, 20, 20\)"):
        ArrayDataModule("mine.npz", predict="large.npy").setup("predict")


def test_pool_of_a_source_with_predict_raises_and_names_load(run):
    with pytest.raises(ValueError, match=r"lightning_kd\.load"):
        OpenSetDataModule(ArrayDataModule("mine.npz", predict="new.npy"), known_classes=2, initial_count=4, budget=2)


def test_sort_by_confidence_orders_rows_and_page_by_probability(run, capsys):
    main([*PREDICT, "--data.predict", "new"])
    plain = rows()
    main([*PREDICT, "--data.predict", "new", "--sort", "confidence"])
    assert "to look at: r/predictions.html" in capsys.readouterr().out
    found = rows()
    highest = [max(float(row[f"probability_{k}"]) for k in range(3)) for row in found]
    assert highest == sorted(highest, reverse=True)
    assert sorted(found, key=lambda row: int(row["index"])) == plain
    page = ParsedPage()
    page.feed(Path("r/predictions.html").read_text(encoding="utf-8"))
    assert page.tags.count("img") == page.tags.count("figure") == 6
    assert "c" not in page.tags  # class names are escaped, not read as tags
    assert not {"script", "link"} & {*page.tags}
    for row, text, source in zip(found, page.captions, page.sources, strict=True):
        probability = max(float(row[f"probability_{k}"]) for k in range(3))
        assert text == f"{row['class_name'].lstrip(chr(39))} {probability:.1%}{row['path']}"
        with Image.open(io.BytesIO(base64.b64decode(source.partition(";base64,")[2]))) as image:
            seen = np.asarray(image).mean((0, 1))
        assert np.abs(seen - COLOURS[text.partition(" ")[0].replace("a", "a <b> & c")]).max() < 20


class ParsedPage(HTMLParser):
    """The tags, image sources and captions of a page."""

    def __init__(self):
        super().__init__()
        self.tags, self.sources, self.captions = [], [], []
        self.inside = False

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [dict(attrs)["src"]] if tag == "img" else []
        if tag == "figcaption":
            self.inside = True
            self.captions.append("")

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "figcaption"

    def handle_data(self, data):
        if self.inside:
            self.captions[-1] += data


def test_page_shows_the_first_images_only_and_is_removed_for_features(tmp_path, monkeypatch):
    monkeypatch.setattr(prediction_page, "PAGE_IMAGES", 3)
    np.save("new.npy", np.zeros((5, 8, 8), np.uint8))
    options = {"class_names": ["a", "b"], "mean": [0.5], "std": [0.2]}
    data = ArrayDataModule("gone.npz", predict="new.npy", **options)
    prediction_page.write_page(tmp_path, [4, 2, 0, 1, 3], ["a"] * 5, None, data)
    text = Path("predictions.html").read_text()
    assert text.count("<figure>") == 3
    assert "The first 3 of 5 predictions" in text
    assert text.index("sample 4") < text.index("sample 2") < text.index("sample 0")
    np.save("new.npy", np.zeros((5, 1), np.float32))
    features = ArrayDataModule("gone.npz", predict="new.npy", **options)
    prediction_page.write_page(tmp_path, [0, 1], ["a"] * 2, None, features)
    assert not Path("predictions.html").exists()


def test_predictions_are_written_where_their_page_fails(run, capsys, monkeypatch):
    main([*PREDICT, "--data.predict", "new"])
    monkeypatch.setattr(prediction_page, "picture_uri", lambda *given: 1 / 0)
    main([*PREDICT, "--data.predict", "new/0.png"])
    assert [row["path"] for row in rows()] == ["new/0.png"]
    assert "predictions.html could not be written (division by zero)" in capsys.readouterr().err
    assert not Path("r/predictions.html").exists()  # the page of the earlier predictions is removed


def test_class_names_may_be_numbers_but_must_differ(run, capsys):
    given = ["--data", "ArrayDataModule", "--data.path", "years.npz", "--data.class_names", "[1999, 2000]"]
    np.savez("years.npz", image=np.zeros((20, 8, 8), np.uint8), target=np.array([1999, 2000] * 10))
    main(
        [
            "fit",
            "--model",
            "Classification",
            "--model.network",
            "cnn_tiny",
            *given,
            "--run",
            "y",
            *QUIET,
            "--trainer.max_epochs",
            "1",
        ]
    )
    assert torch.load("y/checkpoints/last.ckpt", weights_only=True)["class_names"] == ["1999", "2000"]
    assert ImageFolderDataModule("gone", predict="new", class_names=[1, "b"]).class_names == ["1", "b"]
    for wrong in (["a", "a"], "ab"):
        with pytest.raises(ValueError, match="class_names must be a list of different names"):
            ImageFolderDataModule("gone", predict="new", class_names=wrong)


@pytest.mark.parametrize("name", ["SegmentationFolderDataModule", "ImageFolderDataModule"])
def test_arrays_for_folder_data_modules_are_resized_to_the_input_shape(name, tmp_path):
    description = {"problem": "Segmentation", "class_names": ["a", "b"], "input_shape": [3, 8, 12], "stretch": True}
    torch.save({"state_dict": {}, "data_description": description}, "c.ckpt")
    np.save("new.npy", np.full((2, 16, 20, 3), 51, np.uint8))
    config = Namespace(ckpt_path="c.ckpt", model=Namespace(), data=Namespace(class_path=name))
    config.data.init_args = Namespace(root="gone", predict=None, mean=None, on_error="skip")
    take_from_run(config, "new.npy", RunFolder("r"))
    data = DescribedSamples(**config.data.init_args)
    (batch,) = data.predict_dataloader()
    assert batch.image.shape == (2, 3, 8, 12)
    torch.testing.assert_close(batch.image, torch.full_like(batch.image, 0.2))


def test_predict_null_or_empty_is_left_to_the_parser():
    words = ["predict", "--data.predict", "null", "--data.predict=", "--data.predict", "", "--seed_everything", "1"]
    assert without_predict(words) == (words, None)
    assert without_predict([*words, "--data.predict=new", "--data.predict"]) == ([*words, "--data.predict"], "new")
    with pytest.raises(FileNotFoundError, match="predict '' does not exist"):  # it does not mean the working folder
        files_to_predict("")


def test_features_with_negative_strides_are_prepared():
    row = np.arange(4.0)[::-1]
    assert Preparation({}, (4,)).unit(row).tolist() == [3, 2, 1, 0]


def test_sort_by_confidence_of_segmentation_gives_an_error(tmp_path, capsys):
    data = ["--data", "ArrayDataModule", "--data.path", "none.npz", "--data.fake", "true"]
    kind = ["--data.kind", "segmentation"]
    model = ["--model", "SemanticSegmentation", "--model.network", "fcn_tiny"]
    with pytest.raises(SystemExit):
        main(["predict", *model, *data, *kind, "--run", "s", "--sort", "confidence", *QUIET])
    assert "sort must be 'index' for a class for each pixel" in capsys.readouterr().err
    assert not Path("s").exists()
