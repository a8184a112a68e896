"""Fine-tuning: published weights with a new classifier, a frozen backbone, a smaller rate for the backbone."""

import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
import torchvision
from torch import nn

from lightning_kd import BLDR, DCFS, KD, CrossEntropy, PoolClassifier
from lightning_kd.cli import main
from lightning_kd.core import Classification, SemanticSegmentation
from lightning_kd.core.feature_hooks import find_classifier
from lightning_kd.core.schedules import CosineAnnealing
from lightning_kd.core.starting_weights import pretrained_network
from lightning_kd.core.weights import load_weights
from lightning_kd.data import DigitsDataModule
from lightning_kd.nets import build_network

LIBRARY_CLASSES = 1000


@pytest.fixture
def published(monkeypatch):
    """Replaces torchvision's downloads by random weights; holds the weights given, by network name."""
    real, given = torchvision.models.get_model, {}

    def get_model(name, weights=None, **options):
        if weights is None:
            return real(name, weights=None, **options)
        assert (weights, options) == ("DEFAULT", {})
        classes = len(torchvision.models.get_model_weights(name).DEFAULT.meta["categories"])
        extra = {"weights_backbone": None} if name.startswith("lraspp") else {}
        network = real(name, weights=None, num_classes=classes, **extra)
        given[name] = {key: value.clone() for key, value in network.state_dict().items()}
        return network

    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    return given


def fit(task, tmp_path, epochs=1, ckpt_path=None, **options):
    data = DigitsDataModule(batch_size=32, train_per_class=10, fake=False)
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, enable_checkpointing=False, limit_val_batches=1, **options,
    )  # fmt: skip
    trainer.fit(task, data, ckpt_path=ckpt_path)
    return trainer


def digits_task(**options):
    torch.manual_seed(0)
    return Classification(build_network("resnet8", 10, 1), 10, input_shape=(1, 8, 8), **options)


# -- published weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "squeezenet1_1"])
def test_published_weights_get_a_new_classifier(published, name):
    network = pretrained_network(f"torchvision/{name}", 7, new_classifier=False)
    kept, state = published[name], network.state_dict()
    different = [key for key in state if state[key].shape != kept[key].shape]
    assert {key.rpartition(".")[0] for key in different} == {"classifier.3" if name[0] == "m" else "classifier.1"}
    assert all(len(state[key]) == 7 for key in different)
    assert all(torch.equal(state[key], kept[key]) for key in state.keys() - different)
    assert network.eval()(torch.randn(2, 3, 64, 64)).shape == (2, 7)


def test_same_number_of_classes_keeps_the_published_classifier_unless_new(published):
    name = "mobilenet_v3_small"
    same = pretrained_network(f"torchvision/{name}", LIBRARY_CLASSES, new_classifier=False)
    assert torch.equal(same.state_dict()["classifier.3.weight"], published[name]["classifier.3.weight"])
    new = pretrained_network(f"torchvision/{name}", LIBRARY_CLASSES, new_classifier=True)
    assert not torch.equal(new.state_dict()["classifier.3.weight"], published[name]["classifier.3.weight"])
    assert torch.equal(new.state_dict()["features.0.0.weight"], published[name]["features.0.0.weight"])


def test_published_segmentation_networks_get_new_classifiers(published):
    task = SemanticSegmentation("torchvision/lraspp_mobilenet_v3_large", 4, input_shape=(3, 32, 32), weights="default")
    output = task.network.eval()(torch.randn(1, 3, 32, 32))
    assert output["out"].shape == (1, 4, 32, 32)


def test_tasks_with_published_weights_default_to_adamw(published):
    name = "torchvision/mobilenet_v3_small"
    plain = Classification(name, 7, weights="default")
    noisy = CrossEntropy(name, 7, weights="default")
    distilled = KD(name, "cnn_tiny", 7, teacher_weights="random", student_weights="default")
    first = published["mobilenet_v3_small"]["classifier.0.weight"]
    for task, network in ((plain, plain.network), (noisy, noisy.network), (distilled, distilled.student)):
        assert network(torch.randn(2, 3, 32, 32)).shape == (2, 7)
        assert network.classifier[0].weight.shape == first.shape
        optimizer = task.configure_optimizers()
        assert (type(optimizer), optimizer.param_groups[0]["lr"]) == (torch.optim.AdamW, 1e-4)
    assert isinstance(CrossEntropy("resnet8", 7).configure_optimizers(), torch.optim.SGD)


@pytest.mark.parametrize(
    ("method", "outputs", "options"),
    [(PoolClassifier, 3, {}), (DCFS, 4, {"num_outputs": "K+1"}), (BLDR, 3, {"warmup_epochs": 1})],
)
def test_pool_and_noise_methods_freeze_or_slow_the_backbone(tmp_path, method, outputs, options):
    torch.save(build_network("resnet8", 10).state_dict(), tmp_path / "ten.pt")
    plain = method("resnet8", 3, **options)
    assert type(plain.configure_optimizers()) is torch.optim.SGD
    given = {"weights": str(tmp_path / "ten.pt"), "new_classifier": True, **options}
    frozen = method("resnet8", 3, freeze="backbone", **given)
    network = frozen.network.train()
    frozen.train()
    assert network.fc.out_features == outputs
    assert [name for name, p in network.named_parameters() if p.requires_grad] == ["fc.weight", "fc.bias"]
    assert not any(m.training for m in network.modules() if isinstance(m, nn.BatchNorm2d))
    assert torch.equal(network.conv1.weight, torch.load(tmp_path / "ten.pt", weights_only=True)["conv1.weight"])
    slow = method("resnet8", 3, backbone_lr=0.1, **given).configure_optimizers()
    assert [group["lr"] for group in slow.param_groups] == pytest.approx([1e-4, 1e-5])
    assert {id(p) for p in frozen.parameters() if p.requires_grad} == {
        id(p) for group in frozen.configure_optimizers().param_groups for p in group["params"]
    }


def test_timm_makes_the_new_classifier_itself(monkeypatch):
    timm = pytest.importorskip("timm")
    asked, create_model = [], timm.create_model

    def create(name, pretrained=False, **options):
        asked.append((name, pretrained, options))
        return create_model(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", create)
    task = Classification("timm/test_resnet", 7, input_shape=(1, 32, 32), weights="default")
    assert task(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    assert asked == [("test_resnet", True, {"num_classes": 7, "in_chans": 1})]


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (lambda: nn.Linear(3, 2), {"weights": "default"}, "^weights 'default' needs the network by name, got a Linear"),
        (lambda: "torchvision/resnet18", {"weights": "default", "input_shape": (8,)}, r"input_shape is \(8,\)"),
        (lambda: "torchvision/resnet18", {"weights": "default", "input_shape": (1, 8, 8)}, "takes images of 3 channel"),
        (lambda: "resnet8", {"weights": "default"}, "'default' exist only for timm/ and torchvision/ names"),
        (lambda: "resnet8", {"new_classifier": True}, "^new_classifier=True needs weights to start from"),
        (lambda: "resnet8", {"freeze": "backbone"}, "^freeze='backbone' needs weights to start from"),
        (lambda: "resnet8", {"freeze": "all"}, "^freeze must be 'backbone' or None, got 'all'"),
        (lambda: "resnet8", {"backbone_lr": 0.0}, "^backbone_lr must be above 0, got 0.0: give freeze: backbone"),
        (lambda: build_network("cnn", 2), {"freeze": "backbone", "backbone_lr": 0.1}, "^freeze leaves no backbone"),
        (lambda: nn.Conv2d(3, 2, 1), {"freeze": "backbone"}, "with an nn.Linear as classifier, Conv2d has none"),
    ],
)
def test_wrong_fine_tuning_options_raise_before_any_download(published, network, options, message):
    with pytest.raises(ValueError, match=message):
        Classification(network(), 2, **options)
    assert not published  # nothing was downloaded


def test_loading_a_checkpoint_downloads_nothing(published, tmp_path, monkeypatch):
    task = Classification("torchvision/mobilenet_v3_small", 7, input_shape=(3, 32, 32), weights="default")
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    trainer.strategy.connect(task)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    published.clear()
    again = Classification.load_from_checkpoint(tmp_path / "last.ckpt")
    assert not published
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in task.state_dict().items())
    Classification("torchvision/mobilenet_v3_small", 7, weights="default")
    assert published  # a new task downloads them


def test_test_and_resume_need_no_weights_file_but_a_new_fit_does(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(build_network("cnn_tiny", 10, 1).state_dict(), "old.pt")
    options = ["--model.network", "cnn_tiny", "--model.weights", "old.pt", "--model.new_classifier", "true"]
    options += ["--model.backbone_lr", "0.1", "--trainer.enable_progress_bar", "false"]
    main(["fit", "--config", "distillation/teacher_digits", "--config", "_overlay/smoke", "--run", "r", *options])
    Path("old.pt").unlink()
    main(["test", "--config", "r/config.yaml", "--ckpt_path", "last"])
    main(["fit", "--config", "r/config.yaml", "--ckpt_path", "last", "--trainer.max_epochs", "3"])
    with pytest.raises(SystemExit):
        main(["fit", "--config", "r/config.yaml", "--run", "other"])
    assert "there is no such file" in capsys.readouterr().err


# -- files with another classifier -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet8", "mobilenetv2", "vgg8"])
def test_new_classifier_loads_all_weights_but_the_classifier(tmp_path, monkeypatch, name):
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)  # messages name the path as it is given
    old, new = build_network(name, 10), build_network(name, 4)
    path, before = Path("old.pt"), {key: value.clone() for key, value in new.state_dict().items()}
    torch.save(old.state_dict(), path)
    with pytest.raises(ValueError, match=r"has 10 classes, the network has 4: .*, or new_classifier: true to load all"):
        load_weights(new, path, 4, new_classifier=False)
    with pytest.raises(
        ValueError, match=r"has 10 classes, the network has 4: give weights trained on the same class"
    ) as e:
        load_weights(new, path, 4)
    assert "new_classifier" not in str(e.value)
    load_weights(new, path, 4, new_classifier=True)
    layer = find_classifier(new)[0]
    for key, value in new.state_dict().items():
        kept = before if key.startswith(f"{layer}.") else old.state_dict()
        assert torch.equal(value, kept[key]), key


def test_new_classifier_ignores_a_missing_or_matching_classifier(tmp_path):
    old = build_network("resnet8", 10)
    torch.save({key: value for key, value in old.state_dict().items() if not key.startswith("fc.")}, tmp_path / "b.pt")
    torch.save(old.state_dict(), tmp_path / "same.pt")
    for name in ("b.pt", "same.pt"):
        new = build_network("resnet8", 10)
        fresh = new.fc.weight.detach().clone()
        load_weights(new, tmp_path / name, 10, new_classifier=True)
        assert torch.equal(new.fc.weight, fresh)
        assert torch.equal(new.conv1.weight, old.conv1.weight)


def test_new_classifier_with_weights_of_another_network_raises(tmp_path):
    torch.save(build_network("resnet8x4", 10).state_dict(), tmp_path / "wide.pt")
    with pytest.raises(ValueError, match="do not fit the network"):
        load_weights(build_network("resnet8", 4), tmp_path / "wide.pt", 4, new_classifier=True)


# -- a frozen backbone -----------------------------------------------------------------------------------------------


class Watched(Classification):
    def training_step(self, batch, batch_idx):
        self.seen = [m.training for m in self.network.modules() if isinstance(m, nn.BatchNorm2d)]
        return super().training_step(batch, batch_idx)

    def on_after_backward(self):
        self.reached = {name for name, p in self.network.named_parameters() if p.grad is not None}


def test_frozen_backbone_does_not_change_in_training(tmp_path):
    torch.manual_seed(0)
    task = Watched(build_network("resnet8", 10, 1), 10, input_shape=(1, 8, 8), freeze="backbone")
    before = {key: value.clone() for key, value in task.network.state_dict().items()}
    task.network.train()  # as a user's callback might
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*eval mode")
        trainer = fit(task, tmp_path, epochs=2)
    assert task.seen == [False] * len(task.seen) != []
    assert task.reached == {"fc.weight", "fc.bias"}
    held = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(task.network.fc.weight), id(task.network.fc.bias)}
    changed = {key for key, value in task.network.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"fc.weight", "fc.bias"}
    assert {*task.state_dict()} == {f"network.{key}" for key in before}  # which were trained is not saved


def test_freezing_puts_only_batch_norm_in_eval_mode(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 10))
    Classification(network, 10, input_shape=(1, 8, 8), freeze="backbone").train()
    assert [m.training for m in network] == [True, True, False, True, True]


def test_frozen_student_still_trains_the_heads_of_its_method():
    from lightning_kd import DHKD

    student, teacher = build_network("resnet8", 10), build_network("resnet8", 10)
    task = DHKD(student, teacher, 10, freeze="backbone")
    names = {name for name, p in task.named_parameters() if p.requires_grad}
    assert names == {"student.fc.weight", "student.fc.bias", "auxiliary_head.weight", "auxiliary_head.bias"}
    assert set(task.modules_at_rest()) == {m for m in task.modules() if not m.training}


# -- a smaller learning rate for the backbone ------------------------------------------------------------------------


def rates(trainer):
    return [group["lr"] for group in trainer.optimizers[0].param_groups]


@pytest.mark.parametrize("method", [Classification, CrossEntropy])
def test_backbone_lr_gives_the_backbone_a_smaller_rate(tmp_path, method):
    network = build_network("resnet8", 10, 1)
    task = method(network, 10, input_shape=(1, 8, 8), backbone_lr=0.1, optimizer=lambda p: torch.optim.SGD(p, lr=0.2))
    fast, slow = task.configure_optimizers().param_groups
    assert (fast["lr"], slow["lr"]) == (0.2, pytest.approx(0.02))
    assert [id(p) for p in fast["params"]] == [id(network.fc.weight), id(network.fc.bias)]
    assert len(slow["params"]) == len(list(network.parameters())) - 2


def test_schedules_scale_both_rates_and_onecyclelr_warns(tmp_path):
    def rates_after(epochs, scheduler):
        task = digits_task(backbone_lr=0.1, optimizer=lambda p: torch.optim.SGD(p, lr=0.2), lr_scheduler=scheduler)
        return rates(fit(task, tmp_path, epochs, limit_train_batches=1))

    assert rates_after(2, lambda o: CosineAnnealing(o, T_max=4)) == pytest.approx([0.1, 0.01])
    assert rates_after(1, CosineAnnealing) == pytest.approx([0.0, 0.0])
    with pytest.warns(UserWarning, match="OneCycleLR sets learning rates of its own, so backbone_lr=0.1 has no"):
        rates_after(1, lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10))


@pytest.mark.parametrize("options", [{"backbone_lr": 0.1}, {"freeze": "backbone"}])
def test_resumed_fine_tuning_equals_an_uninterrupted_run(tmp_path, options):
    def task():
        return digits_task(
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lr_scheduler=CosineAnnealing, **options
        )

    L.seed_everything(0)
    whole = task()
    fit(whole, tmp_path, epochs=3)
    L.seed_everything(0)
    first = task()

    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer, module):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "two.ckpt")

    fit(first, tmp_path, epochs=3, callbacks=[Stop()])
    resumed = task()
    trainer = fit(resumed, tmp_path, epochs=3, ckpt_path=tmp_path / "two.ckpt")
    assert trainer.current_epoch == 3
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
