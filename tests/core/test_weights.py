from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from lightning_kd import KD, ArrayDataModule, Classification
from lightning_kd.core.starting_weights import pretrained_network
from lightning_kd.core.weights import load_weights, other_classes
from lightning_kd.nets import build_network


@pytest.fixture
def source() -> nn.Module:
    torch.manual_seed(1)
    network = build_network("cnn_tiny", 10)
    network(torch.randn(4, 3, 8, 8))  # so that the running statistics are not the initial ones
    return network


@pytest.fixture
def target() -> nn.Module:
    torch.manual_seed(2)
    return build_network("cnn_tiny", 10)


def copy(network: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}


def assert_equal(network: nn.Module, weights: dict[str, Tensor]) -> None:
    state = network.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[key], weights[key]) for key in weights)


@pytest.fixture
def unchanged(target: nn.Module) -> Iterator[None]:
    """Checks that the network is the same after the test."""
    before = copy(target)
    yield
    assert_equal(target, before)


def save(content: Any, folder: Path, name: str = "weights.pt") -> Path:
    torch.save(content, folder / name)
    return folder / name


# -- files that are loaded -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weights.pt", "weights.pth", "weights.ckpt"])
@pytest.mark.parametrize("as_text", [False, True])
def test_state_dict_file_is_loaded(
    source: nn.Module, target: nn.Module, tmp_path: Path, name: str, as_text: bool
) -> None:
    path = save(source.state_dict(), tmp_path, name)
    load_weights(target, str(path) if as_text else path, 10)
    assert_equal(target, copy(source))


def test_safetensors_file_is_loaded(source: nn.Module, target: nn.Module, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(source.state_dict(), tmp_path / "weights.safetensors")
    load_weights(target, tmp_path / "weights.safetensors")
    assert_equal(target, copy(source))


@pytest.mark.parametrize("attribute", ["network", "student"])
def test_only_the_network_of_a_lightning_checkpoint_is_loaded(
    source: nn.Module, target: nn.Module, tmp_path: Path, attribute: str
) -> None:
    """Other parts of the task, among them a teacher of the same architecture, are ignored."""

    class SomeTask(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters({"widths": [1, 2]})
            self.auxiliary_head = nn.Linear(3, 3)
            self.teacher = build_network("cnn_tiny", 10)
            setattr(self, attribute, source)
            self.register_buffer("memory", torch.full((3,), torch.nan))

    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    trainer.strategy.connect(SomeTask())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    load_weights(target, tmp_path / "last.ckpt", 10)
    assert_equal(target, copy(source))


@pytest.mark.parametrize("nests", [["model"], ["state_dict"], ["net"], ["state_dict", "model"]])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_nested_and_prefixed_public_files_are_loaded(
    source: nn.Module, target: nn.Module, tmp_path: Path, nests: list[str], prefix: str
) -> None:
    content: dict[str, Any] = {prefix + key: value for key, value in source.state_dict().items()}
    for nest in nests:
        content = {"epoch": 240, "opt": argparse.Namespace(lr=0.05), "accuracy": torch.tensor(75.6), nest: content}
    load_weights(target, save(content, tmp_path))
    assert_equal(target, copy(source))


def test_public_mobilenetv2_with_other_classifier_names_is_loaded(tmp_path: Path) -> None:
    source, target = build_network("mobilenetv2", 5), build_network("mobilenetv2", 5)
    content = {key.replace("classifier.", "classifier.0."): value for key, value in source.state_dict().items()}
    assert "classifier.0.weight" in content
    load_weights(target, save({"model": content}, tmp_path), 5)
    assert_equal(target, copy(source))


def test_a_part_called_network_is_not_taken_for_a_prefix(tmp_path: Path) -> None:
    source, target = nn.Sequential(), nn.Sequential()
    for module in (source, target):
        module.add_module("network", nn.Linear(3, 4))
        module.add_module("head", nn.Linear(4, 2))
    load_weights(target, save(source.state_dict(), tmp_path), 2)
    assert_equal(target, copy(source))


def test_batch_counters_may_be_missing(source: nn.Module, target: nn.Module, tmp_path: Path) -> None:
    content = {key: value for key, value in source.state_dict().items() if not key.endswith("num_batches_tracked")}
    load_weights(target, save(content, tmp_path))
    for key, value in target.state_dict().items():
        assert torch.equal(value, content[key] if key in content else torch.tensor(0))


def test_half_precision_file_is_loaded_as_float32(source: nn.Module, target: nn.Module, tmp_path: Path) -> None:
    content = {key: value.half() if value.is_floating_point() else value for key, value in source.state_dict().items()}
    load_weights(target, save(content, tmp_path))
    weight = target.get_parameter("fc.weight")
    assert weight.dtype == torch.float32
    assert torch.equal(weight, content["fc.weight"].float())


def test_network_without_a_linear_layer_is_loaded(tmp_path: Path) -> None:
    source, target = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
    load_weights(target, save(source.state_dict(), tmp_path), 10)
    assert_equal(target, copy(source))


# -- files that raise ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchanged")
class TestErrors:
    def test_missing_file_raises(self, target: nn.Module, tmp_path: Path) -> None:
        for path in (tmp_path / "missing.pt", tmp_path):
            with pytest.raises(FileNotFoundError, match=r"^weights '.*': there is no such file; give a checkpoint"):
                load_weights(target, path)

    @pytest.mark.parametrize("content", [b"", b"hello there", b"PK\x03\x04 cut short"])
    @pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
    def test_damaged_file_raises(self, target: nn.Module, tmp_path: Path, content: bytes, name: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            ValueError, match=r"cannot be read: the file is damaged or .*; save it again with torch\.save"
        ):
            load_weights(target, tmp_path / name)

    def test_pickled_objects_are_never_run(self, target: nn.Module, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> tuple[Any, ...]:
                return (Path.touch, (tmp_path / "was_run",))

        path = save({"state_dict": target.state_dict(), "callback": Evil()}, tmp_path)
        with pytest.raises(ValueError, match=r"holds objects other than tensors and plain values; save it again with"):
            load_weights(target, path)
        assert not (tmp_path / "was_run").exists()
        torch.load(path, weights_only=False)
        assert (tmp_path / "was_run").exists()  # so unpickling does run it

    def test_pickled_module_raises(self, target: nn.Module, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"torch\.save\(network\.state_dict\(\), path\)$"):
            load_weights(target, save(target, tmp_path))

    @pytest.mark.parametrize(
        ("content", "found"),
        [({}, r"a dict of \[\]"), ({"epoch": 3, "best": 0.5}, r"a dict of \['epoch', 'best'\]"), ([1], "a list")],
    )
    def test_file_without_a_state_dict_raises(
        self, target: nn.Module, tmp_path: Path, content: Any, found: str
    ) -> None:
        with pytest.raises(ValueError, match=f"hold no state_dict but {found}; save it again"):
            load_weights(target, save(content, tmp_path))

    def test_missing_names_raise(self, source: nn.Module, target: nn.Module, tmp_path: Path) -> None:
        content = source.state_dict()
        for key in ("layer1.0.weight", "layer2.1.bias", "layer3.1.running_mean", "fc.bias"):
            del content[key]
        message = (
            r"do not fit the network CNN: 4 \(layer1\.0\.weight, layer2\.1\.bias, layer3\.1\.running_mean, \.\.\.\) "
            r"missing, 0 unexpected; give weights of the same network$"
        )
        with pytest.raises(ValueError, match=message):
            load_weights(target, save(content, tmp_path))

    def test_unexpected_names_raise(self, source: nn.Module, target: nn.Module, tmp_path: Path) -> None:
        content = {**source.state_dict(), "fc2.weight": torch.ones(1), "fc2.bias": torch.ones(1)}
        with pytest.raises(ValueError, match=r": 0 missing, 2 \(fc2\.weight, fc2\.bias\) unexpected"):
            load_weights(target, save(content, tmp_path))

    def test_checkpoint_of_another_network_raises(self, target: nn.Module, tmp_path: Path) -> None:
        other = {f"student.{key}": value for key, value in build_network("mlp_4", 10, 3).state_dict().items()}
        content = {"state_dict": {**other, "teacher.fc.weight": torch.ones(1)}}
        message = r"15 \(layer1\.0\.weight, .*\) missing, 2 \(hidden\.0\.weight, hidden\.0\.bias\) unexpected"
        with pytest.raises(ValueError, match=message):
            load_weights(target, save(content, tmp_path))

    @pytest.mark.parametrize("num_classes", [10, None])
    @pytest.mark.parametrize("prefix", ["", "network."])
    def test_file_with_another_number_of_classes_raises(
        self, target: nn.Module, tmp_path: Path, num_classes: int | None, prefix: str
    ) -> None:
        content = {prefix + key: value for key, value in build_network("cnn_tiny", 100).state_dict().items()}
        with pytest.raises(ValueError, match=r"weights\.pt' has 100 classes, the network has 10: give weights trained"):
            load_weights(target, save(content, tmp_path), num_classes)

    def test_data_with_another_number_of_classes_raises(
        self, source: nn.Module, target: nn.Module, tmp_path: Path
    ) -> None:
        with pytest.raises(ValueError, match=r"weights\.pt' has 10 classes, the data has 100: give a network"):
            load_weights(target, save(source.state_dict(), tmp_path), 100)

    def test_other_shapes_raise(self, source: nn.Module, target: nn.Module, tmp_path: Path) -> None:
        content = {**source.state_dict(), "layer1.0.weight": torch.ones(8, 1, 3, 3)}
        message = r"1 shapes differ \(layer1\.0\.weight \(8, 1, 3, 3\) for \(8, 3, 3, 3\)\); give weights of the same"
        with pytest.raises(ValueError, match=message):
            load_weights(target, save(content, tmp_path))
        content = {**source.state_dict(), "fc.weight": torch.ones(10, 7), "fc.bias": torch.ones(9)}
        with pytest.raises(ValueError, match="2 shapes differ"):
            load_weights(target, save(content, tmp_path))

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_infinite_or_nan_values_raise(
        self, source: nn.Module, target: nn.Module, tmp_path: Path, value: float
    ) -> None:
        content = copy(source)
        content["layer3.1.running_var"][5] = value
        with pytest.raises(ValueError, match=r": layer3\.1\.running_var holds values that are not finite"):
            load_weights(target, save(content, tmp_path))

    def test_values_other_than_tensors_raise(self, source: nn.Module, target: nn.Module, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r": fc\.bias is a list, not a tensor; save it again"):
            load_weights(target, save({**source.state_dict(), "fc.bias": [0.0] * 10}, tmp_path))

    def test_safetensors_file_without_the_package_raises(
        self, target: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "weights.safetensors").touch()
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
        with pytest.raises(ImportError, match=r"need safetensors: pip install safetensors$"):
            load_weights(target, tmp_path / "weights.safetensors")


# -- published weights -----------------------------------------------------------------------------------------------


def test_default_weights_of_torchvision_are_checked_before_the_download(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    network = nn.Linear(2, 1000)

    def get_model(name: str, **options: Any) -> nn.Module:
        asked.append((name, options))
        return network

    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    assert pretrained_network("torchvision/resnet18", 1000) is network
    assert asked == [("resnet18", {"weights": "DEFAULT"})]
    # Refused before anything is downloaded.
    with pytest.raises(ValueError, match=r"'torchvision/resnet18' have 1000 classes, the data has 100: train"):
        pretrained_network("torchvision/resnet18", 100)
    with pytest.raises(ValueError, match=r"^network 'torchvision/resnet19' is not known"):
        pretrained_network("torchvision/resnet19", 1000)
    assert len(asked) == 1


def test_default_weights_of_timm_are_checked_before_the_download(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    asked = []
    network = nn.Linear(2, 1000)

    def create_model(name: str, **options: Any) -> nn.Module:
        asked.append((name, options))
        return network

    monkeypatch.setattr(timm, "create_model", create_model)
    assert pretrained_network("timm/resnet18", 1000) is network
    assert asked == [("resnet18", {"pretrained": True})]
    with pytest.raises(ValueError, match=r"'timm/resnet18' have 1000 classes, the data has 10: train"):
        pretrained_network("timm/resnet18", 10)
    with pytest.raises(ValueError, match=r"^network 'timm/resnet19' is not known"):
        pretrained_network("timm/resnet19", 1000)
    monkeypatch.setattr(timm.models, "is_model_pretrained", lambda name: False)
    with pytest.raises(ValueError, match=r"^network 'timm/resnet18' has no published weights: give a file"):
        pretrained_network("timm/resnet18", 1000)
    assert len(asked) == 1


def test_default_weights_without_timm_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="'timm/resnet18' needs timm"):
        pretrained_network("timm/resnet18", 1000)


def test_default_weights_without_a_connection_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_model(name: str, **options: Any) -> nn.Module:
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    message = r"^the published weights of 'torchvision/resnet18' cannot be downloaded \(no route to host\): connect, or"
    with pytest.raises(OSError, match=message):
        pretrained_network("torchvision/resnet18", 1000)


@pytest.mark.parametrize("name", ["resnet8", "mlp", "hub/resnet18"])
def test_default_weights_of_other_networks_raise(name: str) -> None:
    with pytest.raises(ValueError, match=f"'default' exist only for timm/ and torchvision/ names, not for '{name}'"):
        pretrained_network(name, 10)


# -- the classes that weights were trained on ------------------------------------------------------------------------


def animals(*names: str, **options: Any) -> ArrayDataModule:
    target = np.array(names)[np.arange(30) % len(names)]
    np.savez("animals.npz", image=np.zeros((30, 4, 4), np.uint8), target=target)
    return ArrayDataModule("animals.npz", class_names=list(names), **options)


def quiet_trainer(**options: Any) -> L.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(**{**quiet, "enable_model_summary": False, "accelerator": "cpu", "max_epochs": 1, **options})


def task_of(**options: Any) -> Classification:
    return Classification("mlp_8", 3, input_shape=(1, 4, 4), **options)


def student_of(**options: Any) -> KD:
    return KD("mlp_8", "mlp_8", 3, input_shape=(1, 4, 4), **options)


@pytest.fixture
def trained() -> str:
    trainer = quiet_trainer()
    trainer.fit(task_of(), animals("ant", "bee", "cat"))
    trainer.save_checkpoint("animals.ckpt")
    return "animals.ckpt"


@pytest.mark.filterwarnings("ignore:the teacher's validation accuracy")
@pytest.mark.parametrize("names", ["bee cat dog", "bee ant cat"])
def test_teacher_trained_on_other_classes_raises_in_fit_and_validate(trained: str, names: str) -> None:
    message = r"the teacher was trained on other classes .*class 0 was 'ant', here it is 'bee'"
    for verb in ("fit", "validate"):
        with pytest.raises(ValueError, match=message):
            getattr(quiet_trainer(), verb)(student_of(teacher_weights=trained), animals(*names.split()))
    quiet_trainer().test(student_of(teacher_weights=trained), animals(*names.split()), verbose=False)
    quiet_trainer().fit(student_of(teacher_weights=trained), animals("ant", "bee", "cat"))


@pytest.mark.filterwarnings("ignore:the teacher's validation accuracy")
@pytest.mark.parametrize(
    "make", [lambda w: task_of(weights=w), lambda w: student_of(teacher_weights="random", student_weights=w)]
)
def test_starting_weights_of_other_classes_warn_unless_resumed(
    trained: str, make: Any, recwarn: pytest.WarningsRecorder
) -> None:
    def class_warnings() -> int:
        said = [str(w.message) for w in recwarn]
        recwarn.clear()
        return sum("trained on other classes, or in another order (class 1 was 'bee', here" in text for text in said)

    quiet_trainer().fit(make(trained), animals("ant", "bee", "cat"))
    assert class_warnings() == 0
    trainer, task, data = quiet_trainer(), make(trained), animals("ant", "cat", "bee")
    trainer.fit(task, data)
    assert class_warnings() == 1
    trainer.save_checkpoint("next.ckpt")
    quiet_trainer(max_epochs=2).fit(make(trained), data, ckpt_path="next.ckpt", weights_only=True)
    assert class_warnings() == 0


def test_other_classes_compares_names_but_not_plain_numbers(trained: str) -> None:
    network = build_network("mlp_8", 3, 16)
    load_weights(network, trained)
    assert other_classes(network, animals("1", "2", "3")) is None
    assert other_classes(network, animals("ant", "bee")) is None  # a data set may lack the last classes
    assert other_classes(network, animals("ant", "cat")) == "class 1 was 'bee', here it is 'cat'"
    assert other_classes(network, None) is None
    assert other_classes(task_of().network, animals("ant", "cat")) is None


def test_new_classifier_drops_the_class_names_of_the_weights(trained: str) -> None:
    assert other_classes(task_of(weights=trained).network, animals("ant", "cat")) is not None
    assert other_classes(task_of(weights=trained, new_classifier=True).network, animals("ant", "cat")) is None
