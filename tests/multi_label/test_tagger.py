"""Multi-label classification: losses, prediction with averaged weights, the head with a query for each label."""

import copy

import pytest
import torch
from torch import nn

from lightning_kd.core import MultiLabelClassification
from lightning_kd.core.averaging import update_average
from lightning_kd.core.losses import asymmetric_loss
from lightning_kd.core.outputs import embeddings_of
from lightning_kd.core.weights import load_weights
from lightning_kd.distillation import L2D
from lightning_kd.multi_label import PAT
from lightning_kd.nets import build_network, network_for, with_ml_decoder
from tests.multi_label.runs import CLASSES, SHAPE, Labels, built, fitted, resumes_to_the_bit, trainer_of

LOGITS = torch.tensor([[1.0, -1.0, 0.5, 0.0]])
TARGET = torch.tensor([[1.0, 0.0, -1.0, 0.0]])


def test_loss_option_gives_bce_or_the_asymmetric_loss():
    plain = built(MultiLabelClassification)
    assert plain.loss(None, LOGITS, TARGET)["supervised"] == plain.problem.loss(LOGITS, TARGET)
    task = built(MultiLabelClassification, loss="asymmetric", gamma_negative=2.0, gamma_positive=1.0, margin=0.1)
    found = task.loss(None, LOGITS, TARGET)["asymmetric"]
    assert found == asymmetric_loss(LOGITS, TARGET, 2.0, 1.0, 0.1)
    assert found != asymmetric_loss(LOGITS, TARGET)
    assert (plain.loss_is_plain, task.loss_is_plain) == (True, False)
    assert isinstance(plain.configure_optimizers(), torch.optim.SGD)
    # the summed loss is too large for the default rate of SGD
    assert isinstance(task.configure_optimizers(), torch.optim.AdamW)
    with pytest.raises(ValueError, match=r"^loss must be 'bce' or 'asymmetric', got 'asl'"):
        built(MultiLabelClassification, loss="asl")
    with pytest.raises(ValueError, match=r"^answer_with must be 'average', 'live' or 'better', got 'ema'"):
        built(MultiLabelClassification, answer_with="ema")


def test_task_keeps_no_average_by_default():
    task = built(MultiLabelClassification)
    assert task.average is None
    assert not any(key.startswith("average") for key in task.state_dict())
    assert task.main_network is task.network


def test_average_is_updated_at_each_optimizer_step():
    class Recording(MultiLabelClassification):
        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            if self.trainer.global_step != self.seen:
                self.seen = self.trainer.global_step
                update_average(self.expected, self.network, 0.9, "average")

    task = built(Recording, answer_with="average", average_decay=0.9)
    task.expected, task.seen = copy.deepcopy(task.average), 0
    trainer_of(accumulate_grad_batches=2).fit(task, datamodule=Labels())
    assert task.seen == 4  # 3 batches an epoch are 2 steps
    for key, value in task.expected.state_dict().items():
        assert torch.equal(value, task.average.state_dict()[key]), key
    assert not torch.equal(task.average.fc.weight, task.network.fc.weight)
    assert task.exports()["network"] is task.main_network is task.average
    assert not task.average.training
    assert not any(parameter.requires_grad for parameter in task.average.parameters())


@pytest.mark.parametrize("decay", [0.0, 0.9999])
def test_answer_with_better_reports_the_better_network(decay):
    task, trainer = fitted(MultiLabelClassification, answer_with="better", average_decay=decay)
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    live, average = values["val/live_map"], values["val/average_map"]
    assert values["val/map"] == max(live, average)
    assert (live == average) == (decay == 0)
    assert (task.main_network is task.average) == (average > live)
    (alone,) = trainer.validate(task, datamodule=Labels(), verbose=False)
    assert alone["val/map"] == pytest.approx(values["val/map"])


def test_better_average_is_chosen_and_the_choice_is_kept_in_the_checkpoint(tmp_path):
    class Spoilt(MultiLabelClassification):
        def on_validation_epoch_start(self):
            super().on_validation_epoch_start()
            with torch.no_grad():
                for parameter in self.network.fc.parameters():
                    parameter.zero_()  # all its predictions are equal

    task, trainer = fitted(Spoilt, answer_with="better", average_decay=0.5)
    assert task.main_network is task.average
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    again = MultiLabelClassification.load_from_checkpoint(tmp_path / "one.ckpt")
    assert again.main_network is again.average


def test_resumes_to_the_bit(tmp_path):
    assert resumes_to_the_bit(MultiLabelClassification, tmp_path, answer_with="better", average_decay=0.9)


# -- the head --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cnn_tiny", "resnet8", "vgg8", "wrn_16_1"])
def test_ml_decoder_finds_the_last_feature_map_of_each_network(name):
    network = network_for(f"{name}+ml_decoder_16", CLASSES, (3, 32, 32))
    image = torch.randn(3, 3, 32, 32)
    logits, embeddings = network(image)
    assert (logits.shape, embeddings.shape) == ((3, CLASSES), (3, CLASSES, 16))
    assert embeddings_of(network(image)).shape == (3, CLASSES, 16)
    logits.sum().backward()
    lost = [n for n, p in network.named_parameters() if p.requires_grad and p.grad is None]
    assert not lost
    stages = {"cnn_tiny": "layer3", "resnet8": "layer3", "wrn_16_1": "bn1"}
    assert name not in stages or network.feature_map == stages[name], network.feature_map


def test_ml_decoder_uses_the_last_stage_for_tiny_images():
    network = network_for("cnn_tiny+ml_decoder_16", CLASSES, SHAPE)
    assert network.feature_map == "layer3"
    assert network.head.embed.in_features == 32
    assert network(torch.randn(2, *SHAPE)).logits.shape == (2, CLASSES)


def test_named_feature_map_is_used_and_later_layers_are_frozen():
    base = build_network("cnn_tiny", 9)
    network = with_ml_decoder(base, CLASSES, (3, 32, 32), "layer2", embedding_dim=8, heads=2, inner_dim=8)
    assert network.head.embed.in_features == 16
    assert not any(parameter.requires_grad for parameter in base.layer3.parameters())
    assert all(parameter.requires_grad for parameter in base.layer1.parameters())
    assert isinstance(base.fc, nn.Identity)


def test_missing_feature_maps_raise():
    with pytest.raises(ValueError, match=r"^feature_map must be a module of CNN, got 'layer9'; known: \['layer1'"):
        with_ml_decoder(build_network("cnn_tiny", 4), 4, (3, 32, 32), "layer9")
    with pytest.raises(ValueError, match=r"^MLP must have a feature map \[B, F, h, w\], but none was found: set"):
        network_for("mlp+ml_decoder", 4, (3, 8, 8))
    with pytest.raises(ValueError, match=r"^input_shape must be \(channels, height, width\), got \(5,\)"):
        network_for("mlp+ml_decoder", 4, (5,))


def test_copied_network_uses_its_own_feature_map():
    network = network_for("cnn_tiny+ml_decoder_16", CLASSES, SHAPE).eval()
    other = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in other.network.parameters():
            parameter.mul_(2)
    image = torch.randn(2, *SHAPE)
    own = network(image).logits
    assert not torch.equal(other(image).logits, own)
    assert torch.equal(network(image).logits, own)


def test_checkpoint_of_a_network_with_ml_decoder_loads_the_average(tmp_path):
    task, trainer = fitted(
        MultiLabelClassification, network="cnn_tiny+ml_decoder_16", answer_with="average", average_decay=0.5
    )
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    other = network_for("cnn_tiny+ml_decoder_16", CLASSES, SHAPE)
    load_weights(other, tmp_path / "one.ckpt", CLASSES)
    assert torch.equal(other.head.weight, task.average.head.weight)  # the network that predicts
    assert not torch.equal(other.head.weight, task.network.head.weight)
    assert torch.equal(task.average.head.queries, task.network.head.queries)


def test_pretrained_weights_are_loaded_under_a_new_head(monkeypatch):
    published = build_network("cnn_tiny", 9)
    monkeypatch.setattr("lightning_kd.core.starting_weights.pretrained_network", lambda *args: copy.deepcopy(published))
    task = MultiLabelClassification("torchvision/x+ml_decoder_16", CLASSES, input_shape=(3, 32, 32), weights="default")
    assert torch.equal(task.network.network.layer1[0].weight, published.layer1[0].weight)
    assert task.network.head.weight.shape == (CLASSES, 16)
    assert task.hparams.weights == "default"
    monkeypatch.undo()
    with pytest.raises(ValueError, match="has a head without published weights: train it, and give its file"):
        L2D("cnn_tiny", "torchvision/resnet18+ml_decoder", CLASSES, teacher_weights="default")


def test_view_option_sets_the_augmentation_of_training():
    seen = []

    class Data(Labels):
        def loader(self, split="train", *args, views=None, **kwargs):
            if kwargs.get("shuffle"):
                seen.append(views)
            return super().loader(split, *args, views=views, **kwargs)

    for method, options in ((MultiLabelClassification, {}), (PAT, {"attention": None, "view": "strong_patches"})):
        fitted(method, Data(), trainer=trainer_of(max_epochs=1), **({"view": "strong"} | options))
    fitted(MultiLabelClassification, Data(), trainer=trainer_of(max_epochs=1))
    assert seen == ["strong", "strong", "weak"]  # PAT without attention has no head for patches


def test_new_classifier_with_a_frozen_backbone(tmp_path):
    source = network_for("cnn_tiny+ml_decoder_16", 3, SHAPE)
    torch.save(source.state_dict(), tmp_path / "three.pt")
    options = {"network": "cnn_tiny+ml_decoder_16", "weights": str(tmp_path / "three.pt"), "new_classifier": True}
    task = built(MultiLabelClassification, **options, freeze="backbone", answer_with="better")
    assert torch.equal(task.network.head.linear2.weight, source.head.linear2.weight)
    assert task.network.head.weight.shape == (CLASSES, 16)
    assert not any(parameter.requires_grad for parameter in task.network.network.parameters())
    assert task.network.head.linear2.weight.requires_grad
    task.train()
    assert {module for module in task.modules() if not module.training} == set(task.modules_at_rest())
