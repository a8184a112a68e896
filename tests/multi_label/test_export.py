"""Multi-label runs, loaded and exported: the network that predicts, averaged or live, is the exported one."""

from importlib.util import find_spec

import pytest
import torch

import lightning_kd
from lightning_kd.cli import main
from lightning_kd.core.weights import load_weights
from lightning_kd.deploy.exported_network import ONNX_PACKAGES
from lightning_kd.nets import network_for

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated.*:FutureWarning")
SHAPE = (1, 16, 16)
COUNTS = [f"--data.{name} {count}" for name, count in (("train_mosaics", 64), ("val_mosaics", 16))]
WORDS = "--trainer.enable_progress_bar false --trainer.accelerator cpu --trainer.max_epochs 2 --data.batch_size 16"


def fit(method, network, *options):
    words = ["fit", "--model", method, "--model.network", network, "--data", "MosaicDataModule"]
    words += ["--data.source", "DigitsDataModule", "--data.test_mosaics", "16", "--run", "r"]
    main([*words, *" ".join(COUNTS).split(), *WORDS.split(), "--model.average_decay", "0.5", *options])


@pytest.mark.parametrize("answers", ["average", "live"])
def test_answer_with_decides_which_network_is_loaded_and_exported(answers, capsys):
    fit("MultiLabelClassification", "cnn_tiny+ml_decoder_16", "--model.answer_with", answers)
    predictor = lightning_kd.load("r", device="cpu")
    content = torch.load(predictor.checkpoint, weights_only=True)["state_dict"]
    name = {"average": "average", "live": "network"}[answers]
    kept = content[f"{name}.head.weight"]
    assert torch.equal(predictor.network.head.weight, kept)
    main(["export", "r", "--format", "state_dict"])
    weights = [torch.load(f"r/{name}.pt", weights_only=True)["head.weight"] for name in ("exported", "network")]
    last = torch.load("r/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(weights[0], kept)
    assert torch.equal(weights[1], last[f"{name}.head.weight"])  # network.pt is of the end of the fit
    if answers == "average":
        assert not torch.equal(last["average.head.weight"], last["network.head.weight"])
    # a teacher loaded from the checkpoint is the network that predicts
    teacher = network_for("cnn_tiny+ml_decoder_16", 10, SHAPE)
    load_weights(teacher, "r/checkpoints/last.ckpt", 10)
    assert torch.equal(teacher.head.weight, last[f"{name}.head.weight"])
    main(["export", "r", "--format", "torchscript"])
    unit = torch.rand(3, *SHAPE)
    file = torch.jit.load("r/exported.torchscript")
    assert len([*file.parameters()]) == len([*predictor.network.parameters()])  # of one network only
    found = file(unit)
    torch.testing.assert_close(found, predictor.network.eval()(predictor.prepare(unit)).logits.sigmoid().detach())


def test_exported_pat_predicts_with_its_patches():
    fit("PAT", "cnn_tiny")
    main(["export", "r", "--format", "torchscript"])
    predictor = lightning_kd.load("r", device="cpu")
    unit = torch.rand(3, *SHAPE)
    found = torch.jit.load("r/exported.torchscript")(unit)
    image = predictor.prepare(unit)
    torch.testing.assert_close(found, predictor.task(image).sigmoid().detach(), atol=1e-5, rtol=0)
    whole = predictor.network.eval()(image)[:, 0].sigmoid().detach()
    assert not torch.allclose(found, whole, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not all(find_spec(name) for name in ONNX_PACKAGES), reason="needs lightning_kd[onnx]")
@pytest.mark.parametrize(("method", "network"), [("CAP", "cnn_tiny+ml_decoder_16"), ("PAT", "cnn_tiny")])
def test_onnx_export_agrees_with_the_network(method, network, capsys):
    fit(method, network)
    main(["export", "r"])
    assert float(capsys.readouterr().out.partition("differ by ")[2].split()[0]) < 1e-5
