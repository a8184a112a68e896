"""A trained run in Python: ``lightning_kd.load``."""

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lightning_kd
from lightning_kd.cli import get_cli, main
from lightning_kd.data import DigitsDataModule

QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "2"]
CLASSIFY = ["fit", "--model", "Classification", "--model.network", "cnn_tiny", *QUIET]
NAMES = ["blue", "green", "red"]


def probabilities(path):
    with open(path, newline="") as file:
        found = list(csv.DictReader(file))
    count = sum(name.startswith("probability_") for name in found[0])
    return torch.tensor([[float(row[f"probability_{k}"]) for k in range(count)] for row in found])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run on image files, its predictions for three new files, and these; the other files are deleted."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        generator = np.random.default_rng(0)
        for k, name in enumerate(NAMES):
            Path(f"photos/{name}").mkdir(parents=True)
            for i in range(15):
                pixels = generator.integers(0, 90, (20, 30, 3))
                pixels[..., 2 - k] += 160
                Image.fromarray(pixels.astype(np.uint8)).save(f"photos/{name}/{i:02d}.png")
        data = ["--data", "ImageFolderDataModule", "--data.root", "photos", "--data.image_size", "16"]
        main([*CLASSIFY, *data, "--data.resize", "18", "--data.std", "[0.3, 0.3, 0.3]", "--run", "r"])
        Path("new").mkdir()
        for k, name in enumerate(NAMES):
            Path(f"photos/{name}/00.png").rename(f"new/{k}.png")
        shutil.rmtree("photos")
        main(["predict", "--config", "r/config.yaml", "--ckpt_path", "last", "--data.predict", "new", *QUIET])
    return folder


@pytest.fixture
def run(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_images_in_any_form_get_the_probabilities_of_the_predict_command(run):
    expected = probabilities("r/predictions.csv")
    predictor = lightning_kd.load("r/checkpoints/last.ckpt", device="cpu")
    assert predictor.class_names == NAMES
    paths = [f"new/{k}.png" for k in range(3)]
    pictures = [Image.open(path) for path in paths]
    arrays = [np.asarray(picture) for picture in pictures]
    small = [picture.resize((27, 18), Image.Resampling.BILINEAR).crop((6, 1, 22, 17)) for picture in pictures]
    tensors = [torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in small]
    several = [paths, "new", Path("new"), pictures, arrays, np.stack(arrays), tensors, torch.stack(tensors)]
    for images in [*several, torch.stack(tensors) / 255, [paths[0], pictures[1], tensors[2]]]:
        found = predictor.predict(images, batch_size=2)
        torch.testing.assert_close(found.probabilities, expected, atol=2e-5, rtol=0)
        assert found.prediction.tolist() == expected.argmax(1).tolist()
        assert found.names == [NAMES[k] for k in found.prediction]
    assert predictor.predict("new").paths == paths
    for one in (paths[1], Path(paths[1]), pictures[1], arrays[1], tensors[1]):
        found = predictor.predict(one)
        assert len(found) == 1
        torch.testing.assert_close(found.probabilities, expected[1:2], atol=2e-5, rtol=0)
    with torch.no_grad():
        logits = predictor.network(predictor.prepare(paths))
    torch.testing.assert_close(logits.softmax(1), expected, atol=2e-5, rtol=0)
    assert not predictor.network.training


def test_float_arrays_of_0_to_1_are_predicted_and_other_values_raise(run, tmp_path):
    predictor = lightning_kd.load("r/checkpoints/last.ckpt", device="cpu")
    array = np.asarray(Image.open("new/1.png"))
    expected = predictor.predict(array).probabilities
    np.save("one.npy", array[None])
    for images in (array / 255, (array / 255).astype(np.float32)[None], "one.npy"):
        torch.testing.assert_close(predictor.predict(images).probabilities, expected, atol=1e-6, rtol=0)
    tensor = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    wrong = [tensor * 255, (tensor - 0.45) / 0.22, tensor.where(tensor > 0.1, torch.nan), array.astype(float)]
    for images in wrong:
        with pytest.raises(ValueError, match="must be from 0 to 1 and not normalised, got values from"):
            predictor.predict(images)
    for empty in (array[None][:0], tensor[None][:0]):
        with pytest.raises(ValueError, match="images is empty"):
            predictor.predict(empty)
    for nothing in (None, 3):
        with pytest.raises(TypeError, match="images must be a path, a PIL image"):
            predictor.predict(nothing)
    with pytest.raises(FileNotFoundError, match="images 'gone' does not exist"):
        predictor.predict("gone")


def test_grey_images_in_one_array_are_predicted_one_by_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main([*CLASSIFY[:-2], "--trainer.max_epochs", "1", "--data", "DigitsDataModule", "--run", "d"])
    predictor = lightning_kd.load("d", device="cpu")
    image = np.random.default_rng(0).integers(0, 256, (5, 8, 8), dtype=np.uint8)
    found = predictor.predict(image).probabilities
    assert found.shape == (5, 10)
    torch.testing.assert_close(found, predictor.predict(list(image)).probabilities)
    torch.testing.assert_close(found[2:3], predictor.predict(image[2]).probabilities, atol=1e-6, rtol=0)


def test_load_takes_the_best_checkpoint_of_a_folder_or_the_named_one(run):
    best, last = (torch.load(f"r/checkpoints/{name}.ckpt", weights_only=True) for name in ("best", "last"))
    key = next(key for key in last["state_dict"] if key.startswith("network."))
    best["state_dict"][key] = best["state_dict"][key] + 1
    torch.save(best, "r/checkpoints/best.ckpt")
    for name, expected in (("r", best), ("r/checkpoints/last.ckpt", last)):
        found = lightning_kd.load(name, device="cpu").network.state_dict()[key.removeprefix("network.")]
        assert torch.equal(found, expected["state_dict"][key])
    Path("r/checkpoints/best.ckpt").unlink()
    assert lightning_kd.load("r").checkpoint == Path("r/checkpoints/last.ckpt")


def test_load_leaves_the_random_state_unchanged(run):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    lightning_kd.load("r")
    assert torch.equal(torch.rand(2), expected)


def test_checkpoint_without_data_description_needs_the_data_folder(run, capsys):
    path = "r/checkpoints/last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["data_description"]
    torch.save(checkpoint, path)
    with pytest.raises(Exception, match="root 'photos' is not a folder"):
        lightning_kd.load(path)
    for name in NAMES:
        Path(f"photos/{name}").mkdir(parents=True)
    found = lightning_kd.load(path, device="cpu")
    torch.testing.assert_close(
        found.predict("new").probabilities, probabilities("r/predictions.csv"), atol=2e-5, rtol=0
    )


def test_student_is_loaded_after_its_teacher_is_deleted(run):
    (run / "teacher").mkdir()
    main(["fit", "--config", "distillation/teacher_digits", "--config", "_overlay/smoke", *QUIET, "--run", "teacher"])
    fit = ["--config", "distillation/kd_digits", "--config", "_overlay/smoke", *QUIET, "--run", "s"]
    main(["fit", *fit, "--model.teacher_weights", "teacher/network.pt"])
    main(["predict", "--config", "s/config.yaml", "--ckpt_path", "best", *QUIET])
    shutil.rmtree("teacher")
    predictor = lightning_kd.load("s", device="cpu")
    data = DigitsDataModule(fake=True)
    data.setup()
    expected = probabilities("s/predictions.csv")
    found = predictor.predict(data.test_image[:5])
    torch.testing.assert_close(found.probabilities, expected[:5], atol=2e-5, rtol=0)
    grey = data.test_image[:5, 0].numpy()
    found = predictor.predict([*grey[:2], grey[2][..., None], Image.fromarray(grey[3])])
    torch.testing.assert_close(found.probabilities, expected[:4], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["noisy_labels/dpc_digits", "active_learning/lfosa_digits"])
def test_load_of_other_families_gives_the_probabilities_of_predict(name, tmp_path):
    main(["fit", "--config", name, "--config", "_overlay/smoke", *QUIET, "--run", "x"])
    main(["predict", "--config", "x/config.yaml", "--ckpt_path", "last", *QUIET])
    predictor = lightning_kd.load("x/checkpoints/last.ckpt", device="cpu")
    with open("x/predictions.csv", newline="") as file:
        index = [int(row["index"]) for row in csv.DictReader(file)][:4]
    data = get_cli(["--config", "x/config.yaml"]).datamodule
    data.setup()
    image = data.train_image if name.startswith("active") else data.test_image
    found = predictor.predict(image[index])
    torch.testing.assert_close(found.probabilities, probabilities("x/predictions.csv")[:4], atol=2e-5, rtol=0)


def test_load_predicts_several_labels_masks_and_features(tmp_path):
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    feature = generator.normal(size=(30, 5)).astype(np.float32)
    for name, samples, target, task, network in (
        ("tags", {"image": image}, (30, 4), "MultiLabelClassification", "cnn_tiny"),
        ("masks", {"image": image}, (30, 8, 8), "SemanticSegmentation", "fcn_tiny"),
        ("rows", {"feature": feature}, (30,), "Classification", "mlp_8"),
    ):
        np.savez(f"{name}.npz", target=generator.integers(0, 2, target, dtype=np.uint8), **samples)
        data = ["--data", "ArrayDataModule", "--data.path", f"{name}.npz"]
        main(["fit", "--model", task, "--model.network", network, *data, *QUIET, "--run", name])
    tags = lightning_kd.load("tags", device="cpu").predict(image[:3])
    assert tags.prediction.shape == tags.probabilities.shape == (3, 4)
    assert tags.names == [[str(k) for k in range(4) if row[k] >= 0.5] for row in tags.probabilities]
    masks = lightning_kd.load("masks", device="cpu").predict(image[0])
    assert masks.prediction.shape == (1, 8, 8)
    assert (masks.names, masks.probabilities) == (None, None)
    rows = lightning_kd.load("rows", device="cpu")
    many, one = rows.predict(feature[:3]), rows.predict(torch.from_numpy(feature[0]))
    torch.testing.assert_close(many.probabilities[:1], one.probabilities)
    assert many.probabilities.shape == (3, 2)
    with pytest.raises(ValueError, match="rows of 5 features, got str"):
        rows.predict(["a.png"])


def test_unreadable_images_and_runs_raise(run):
    predictor = lightning_kd.load("r", device="cpu")
    for images, message in (
        ([], "images is empty"),
        ("gone.png", "'gone.png' does not exist"),
        (["gone.png"], "the image 'gone.png' cannot be read"),
        (torch.zeros(3, 20, 20), r"have the shape of the training samples, \(3, 16, 16\), got \(3, 20, 20\)"),
        (torch.zeros(3, 16, 16, dtype=torch.int64), "must be uint8, or float"),
        (np.zeros((3, 16, 16), np.uint8), "must be an image"),
        (np.zeros((16, 16, 3), np.int64), "must be an image"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            predictor.predict(images)
    with pytest.raises(TypeError, match="got int"):
        predictor.predict([3])
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        lightning_kd.load("new")
    shutil.copy("r/checkpoints/last.ckpt", "last.ckpt")
    with pytest.raises(FileNotFoundError, match="names the network"):
        lightning_kd.load("last.ckpt")
    text = Path("r/config.yaml").read_text()
    Path("r/config.yaml").write_text(text.replace("network: cnn_tiny", "network: resnet8"))
    with pytest.raises(ValueError, match="does not fit the config"):
        lightning_kd.load("r")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_predictions_on_a_gpu_equal_those_on_the_cpu(run):
    predictor = lightning_kd.load("r")
    assert predictor.device.type == "cuda"
    found = predictor.predict("new").probabilities
    torch.testing.assert_close(found, predictor.to("cpu").predict("new").probabilities, atol=1e-3, rtol=0)


def test_import_of_the_package_loads_no_torch_or_lightning():
    code = "import sys, lightning_kd; print([name for name in ('torch', 'lightning') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_opened_image_is_prepared_like_its_file(run):
    predictor = lightning_kd.load("r", device="cpu")
    deep = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100)
    exif = Image.Exif()
    exif[0x0112] = 6
    deep.save("deep.pgm")
    deep.save("deep.tif", exif=exif)
    Image.open("new/0.png").save("turned.jpg", exif=exif)
    for name in ("deep.pgm", "deep.tif", "turned.jpg"):
        with Image.open(name) as opened:
            assert torch.equal(predictor.prepare(opened), predictor.prepare(name)), name
    with pytest.raises(ValueError, match=r"image given holds floats.*give image_range"):
        predictor.prepare(Image.fromarray(np.zeros((20, 30), np.float32)))
