"""A trained run as one file: ``lightning-kd export``, through the real command."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import lightning_kd
from lightning_kd.cli import main
from lightning_kd.deploy import exported_network

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated.*:FutureWarning")
needs_onnx = pytest.mark.skipif(
    not all(find_spec(name) for name in exported_network.ONNX_PACKAGES), reason="needs lightning_kd[onnx]"
)
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run on image files."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        generator = np.random.default_rng(0)
        for name in ("blue", "green", "red"):
            Path(f"photos/{name}").mkdir(parents=True)
            for i in range(12):
                pixels = generator.integers(0, 256, (20, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(f"photos/{name}/{i:02d}.png")
        data = ["--data", "ImageFolderDataModule", "--data.root", "photos", "--data.image_size", "16"]
        main(["fit", "--model", "Classification", "--model.network", "resnet8", *data, *QUIET, "--run", "r"])
    return folder


@pytest.fixture
def run(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return tmp_path


def expected_of(name, images):
    """The images as tensors of 0 to 1, not normalised, and the probabilities that the loaded run gives for them."""
    predictor = lightning_kd.load(name, device="cpu")
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (predictor.mean, predictor.std))
    unit = predictor.prepare(images) * std + mean
    return unit, predictor.predict(images).probabilities


def printed_difference(out):
    """How much the outputs of run and file differ, as the command says."""
    return float(out.partition("differ by ")[2].split()[0])


@needs_onnx
def test_onnx_file_gives_the_probabilities_of_the_run(run, capsys):
    import onnx
    import onnxruntime

    main(["export", "r", "--format", "onnx"])
    out = capsys.readouterr().out
    assert "r/exported.onnx: onnx of r/checkpoints/best.ckpt" in out
    assert "of the test set of the run" in out
    assert printed_difference(out) < 1e-5
    files = [str(path) for path in sorted(Path("photos/red").iterdir())[:3]]
    unit, expected = expected_of("r", files)
    session = onnxruntime.InferenceSession("r/exported.onnx", providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["image"]
    (found,) = session.run(["probabilities"], {"image": unit.numpy()})
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    (one,) = session.run(None, {"image": unit[:1].numpy()})
    np.testing.assert_allclose(one, expected[:1].numpy(), atol=1e-5)
    properties = {entry.key: entry.value for entry in onnx.load("r/exported.onnx").metadata_props}
    assert json.loads(properties["class_names"]) == ["blue", "green", "red"]
    assert not list(Path("r").glob("*.data"))


def test_torchscript_file_gives_the_probabilities_of_the_run(run, capsys):
    main(
        [
            "export",
            "r/checkpoints/last.ckpt",
            "--format",
            "torchscript",
            "--output",
            "out/mine.pt",
            "--images",
            "photos",
        ]
    )
    out = capsys.readouterr().out
    assert "out/mine.pt: torchscript of r/checkpoints/last.ckpt" in out
    assert "on 32 samples of photos" in out
    assert printed_difference(out) < 1e-5
    unit, expected = expected_of("r/checkpoints/last.ckpt", "photos")
    names = {"class_names.json": ""}
    exported = torch.jit.load("out/mine.pt", _extra_files=names)
    torch.testing.assert_close(exported(unit), expected, atol=1e-5, rtol=0)
    assert json.loads(names["class_names.json"]) == ["blue", "green", "red"]


def test_state_dict_gives_the_probabilities_of_the_run(run, capsys):
    main(["export", "r", "--format", "state_dict"])
    out = capsys.readouterr().out
    assert "normalise its images by mean [0.485, 0.456, 0.406]" in out
    network = lightning_kd.build_network("resnet8", 3)
    network.load_state_dict(torch.load("r/exported.pt", weights_only=True))
    predictor = lightning_kd.load("r", device="cpu")
    with torch.no_grad():
        found = network.eval()(predictor.prepare("photos")).softmax(1)
    torch.testing.assert_close(found, predictor.predict("photos").probabilities, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "name", ["noisy_labels/dpc_digits", "active_learning/lfosa_digits", "segmentation/baseline_arrays"]
)
def test_methods_of_other_kinds_are_exported_as_torchscript(name, tmp_path, capsys):
    main(["fit", "--config", name, "--config", "_overlay/smoke", *QUIET, "--run", "x"])
    capsys.readouterr()
    main(["export", "x", "--format", "torchscript"])
    assert printed_difference(capsys.readouterr().out) < 1e-5
    predictor = lightning_kd.load("x", device="cpu")
    unit = torch.rand(3, *predictor.input_shape)
    _, probabilities = predictor.task.scores_and_probabilities(predictor.prepare(unit))
    found = torch.jit.load("x/exported.torchscript")(unit)
    torch.testing.assert_close(found, probabilities.detach(), atol=1e-5, rtol=0)


def test_export_without_the_data_compares_on_random_noise_and_says_so(run, capsys):
    shutil.rmtree("photos")
    main(["export", "r", "--format", "torchscript"])
    out = capsys.readouterr()
    assert "on 32 samples of random noise" in out.out
    assert "--images" in out.err


def test_export_of_an_ml_decoder_takes_any_number_of_images(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = np.random.default_rng(0)
    image, target = rows.integers(0, 256, (30, 16, 16, 3), np.uint8), rows.integers(0, 2, (30, 4), np.uint8)
    np.savez("mine.npz", image=image, target=target)
    data = ["--data", "ArrayDataModule", "--data.path", "mine.npz", "--trainer.limit_train_batches", "1"]
    model = ["--model", "MultiLabelClassification", "--model.network", "resnet8+ml_decoder_32"]
    main(["fit", *model, *data, *QUIET, "--run", "m"])
    capsys.readouterr()
    main(["export", "m", "--format", "torchscript"])
    out = capsys.readouterr().out
    assert "on 6 samples of the test set" in out
    assert printed_difference(out) < 1e-5


def test_export_that_fails_for_another_number_of_images_is_not_kept(run, capsys, monkeypatch):
    seen = []

    def read(answer, path, images):
        seen.append(len(images))
        raise RuntimeError("shape '[2, 3]' is invalid")

    monkeypatch.setattr(exported_network, "_read_torchscript", read)
    with pytest.raises(SystemExit):
        main(["export", "r", "--format", "torchscript", "--images", "photos/red/00.png"])
    error = capsys.readouterr().err
    assert "this network cannot be exported as torchscript (RuntimeError: shape '[2, 3]' is invalid)" in error
    assert seen == [3]
    assert not Path("r/exported.torchscript").exists()


def test_missing_run_or_image_and_folder_as_output_give_an_error(run, capsys):
    Path("there").mkdir()
    for given, message in (
        (["gone"], "run 'gone' does not exist: name the folder of a run"),
        (["r", "--output", "there"], "--output 'there' is a folder: name a file in it"),
        (["r", "--images", "there"], "images 'there' holds no image"),
    ):
        with pytest.raises(SystemExit):
            main(["export", *given, "--format", "torchscript"])
        assert message in capsys.readouterr().err


def test_export_of_a_feature_network_says_nothing_of_pixel_ranges(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    feature = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    np.savez("mine.npz", feature=feature, target=np.arange(40) % 2)
    np.save("new.npy", feature[:7])
    data = ["--data", "ArrayDataModule", "--data.path", "mine.npz"]
    main(["fit", "--model", "Classification", "--model.network", "mlp", *data, *QUIET, "--run", "f"])
    capsys.readouterr()
    for name in ("torchscript", "state_dict"):
        main(["export", "f", "--format", name, "--images", "new.npy"])
        out = capsys.readouterr().out
        assert "on 7 samples of new.npy" in out
        assert "of 0 to 1" not in out
        assert "from 0 to 1" not in out


def test_export_with_other_outputs_is_removed_and_a_failing_one_raises(run, capsys, monkeypatch):
    def wrong(answer, example, path, names):
        torch.jit.save(torch.jit.trace(nn.Softmax(1), example.flatten(1)[:, :3]), str(path))

    def read(answer, path, images):
        return torch.jit.load(str(path))(images.flatten(1)[:, :3])

    monkeypatch.setattr(exported_network, "_write_torchscript", wrong)
    monkeypatch.setattr(exported_network, "_read_torchscript", read)
    with pytest.raises(SystemExit):
        main(["export", "r", "--format", "torchscript"])
    assert "outputs of the exported" in capsys.readouterr().err
    assert not list(Path("r").glob("*exported*"))

    def broken(answer, example, path, names):
        path.write_bytes(b"half of it")
        raise RuntimeError("no such operator")

    monkeypatch.setattr(exported_network, "_write_torchscript", broken)
    with pytest.raises(SystemExit):
        main(["export", "r", "--format", "torchscript"])
    assert "cannot be exported as torchscript (RuntimeError: no such operator)" in capsys.readouterr().err
    assert not list(Path("r").glob("*exported*"))


def test_missing_package_checkpoint_or_images_give_an_error(run, capsys, monkeypatch):
    monkeypatch.setattr(exported_network, "ONNX_PACKAGES", ("onnx", "no_such_package"))
    for words, message in (
        (["r"], "format onnx needs no_such_package: pip install 'lightning_kd[onnx]'"),
        (["photos"], "run 'photos' holds no checkpoint"),
        (["r", "--format", "torchscript", "--images", "nowhere"], "'nowhere' does not exist"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["export", *words])
        assert stop.value.code == 1
        assert message in capsys.readouterr().err
