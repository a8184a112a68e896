"""The baselines with one network as tasks."""

import csv

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_kd.core.batch import Batch
from lightning_kd.core.mixing import draw_mix, mix
from lightning_kd.noisy_labels import GCE, SCE, CrossEntropy, Mixup, NegativeLearning, gce_loss, mixup_loss, sce_loss
from tests.noisy_labels.runs import data_module, fitted, resumes_to_the_bit, trainer_of

METHODS = {
    "CrossEntropy": (CrossEntropy, {}),
    "GCE": (GCE, {}),
    "GCE truncated": (GCE, {"truncation": 0.1, "start_epoch": 1, "refresh_every": 1}),
    "SCE": (SCE, {}),
    "NegativeLearning": (NegativeLearning, {"complementary_labels": 2}),
    "Mixup": (Mixup, {}),
}


@pytest.mark.parametrize("name", METHODS)
def test_fit_logs_metrics_and_writes_noisy_labels_csv(name, tmp_path):
    method, arguments = METHODS[name]
    task, trainer = fitted(method, **arguments)
    logged = trainer.callback_metrics
    for key in ("loss", "acc", "clean_fraction", "clean_auc", "pure_ratio", "memorised_wrong"):
        assert logged[f"train/{key}"].isfinite(), key
    task.write_results(tmp_path)
    rows = list(csv.DictReader((tmp_path / "noisy_labels.csv").open()))
    assert len(rows) == trainer.datamodule.train_size
    trainer.test(task, datamodule=trainer.datamodule, verbose=False)
    assert 0 <= trainer.callback_metrics["test/acc"] <= 1


@pytest.mark.parametrize("name", ["GCE truncated", "NegativeLearning", "Mixup"])
def test_resumes_to_the_bit(name, tmp_path):
    method, arguments = METHODS[name]
    assert resumes_to_the_bit(method, tmp_path, **arguments)


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        (GCE, {"q": 0.0}, "q must be above 0 and at most 1, got 0.0"),
        (GCE, {"q": 1.1}, "q must be above 0 and at most 1, got 1.1"),
        (GCE, {"truncation": 0.0}, "truncation must be above 0 and below 1, got 0.0"),
        (GCE, {"truncation": 1.0}, "truncation must be above 0 and below 1, got 1.0"),
        (GCE, {"start_epoch": -1}, "start_epoch must be at least 0, got -1"),
        (GCE, {"refresh_every": 0}, "refresh_every must be at least 1, got 0"),
        (SCE, {"alpha": -1.0}, "alpha must be at least 0, got -1.0"),
        (SCE, {"log_zero": 1.0}, "log_zero must be below 0, got 1.0"),
        (NegativeLearning, {"complementary_labels": 0}, "complementary_labels must be at least 1, got 0"),
        (NegativeLearning, {"eps": 1.0}, r"eps must be at least 0 and below 1, got 1.0"),
        (Mixup, {"alpha": 0.0}, "alpha must be above 0, got 0.0"),
    ],
)
def test_wrong_arguments_raise(method, arguments, message):
    with pytest.raises(ValueError, match=message):
        method("cnn_tiny", 10, input_shape=(1, 8, 8), **arguments)


def test_tasks_use_their_losses_with_default_arguments():
    logits, target = torch.randn(8, 10), torch.arange(8)
    batch = Batch(None, target)
    made = {m: m("cnn_tiny", 10, input_shape=(1, 8, 8)) for m in (CrossEntropy, GCE, SCE)}
    assert torch.equal(made[CrossEntropy].noisy_loss(logits, batch), F.cross_entropy(logits, target))
    assert torch.equal(made[GCE].noisy_loss(logits, batch), gce_loss(logits, target, 0.7))
    assert torch.equal(made[SCE].noisy_loss(logits, batch), sce_loss(logits, target, 0.1, 1.0))


# -- truncated GCE ---------------------------------------------------------------------------------------------------


def test_truncated_gce_gives_worked_number_and_drops_a_sample():
    task = GCE("cnn_tiny", 3, input_shape=(1, 8, 8), truncation=0.5)
    assert task.bound == pytest.approx(0.549183, abs=1e-6)
    task.kept.allocate(4, torch.device("cpu"))
    task.kept.write(torch.tensor([3]), torch.tensor([0.0]))
    logits = torch.tensor([[0.7, 0.2, 0.1]]).log().repeat(2, 1).requires_grad_()
    loss = task.noisy_loss(logits, Batch(None, torch.tensor([0, 0]), torch.tensor([1, 3])))
    assert loss.item() == pytest.approx((0.315634 - 0.549183) / 2, abs=1e-6)  # the mean over both, one is dropped
    loss.backward()
    assert logits.grad[0].any()
    assert not logits.grad[1].any()


def test_kept_samples_come_from_the_network_and_are_refreshed_on_time():
    refreshed = []

    class Watched(GCE):
        def refresh(self):
            super().refresh()
            refreshed.append(self.current_epoch)

    task, trainer = fitted(Watched, trainer=trainer_of(max_epochs=6), truncation=0.1, start_epoch=1, refresh_every=2)
    assert refreshed == [1, 3, 5]
    task.refresh()
    data = trainer.datamodule
    task.eval()
    with torch.no_grad():
        for batch in data.loader("train"):
            p = task(batch.image).softmax(1).gather(1, batch.target[:, None]).squeeze(1)
            assert torch.equal(task.kept.rows[batch.index], (p > 0.1).float())
    assert 0 < task.kept.rows.mean() < 1


def test_truncation_before_its_start_epoch_changes_no_training():
    plain, _ = fitted(GCE)
    truncated, _ = fitted(GCE, truncation=0.5, start_epoch=2)
    for a, b in zip(plain.parameters(), truncated.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_truncation_without_a_data_module_raises():
    pairs = TensorDataset(torch.randn(8, 1, 8, 8), torch.arange(8), torch.arange(8))
    task = GCE("cnn_tiny", 10, input_shape=(1, 8, 8), truncation=0.5)
    with pytest.raises(ValueError, match="give your data in a data module"):
        trainer_of().fit(task, DataLoader(pairs, batch_size=4))


# -- negative learning -----------------------------------------------------------------------------------------------


def test_negative_learning_draws_anew_each_step_and_weights_classes():
    seen = []

    class Watched(NegativeLearning):
        def noisy_loss(self, logits, batch):
            state = self._draws.bit_generator.state["state"]["state"]
            seen.append((self.current_epoch, state))
            return super().noisy_loss(logits, batch)

    task, trainer = fitted(Watched)
    assert len(set(seen)) == len(seen)
    given = trainer.datamodule.train_target[trainer.datamodule.train_indices]
    counts = given.bincount(minlength=10).float()
    torch.testing.assert_close(task._class_weight, counts.max() / counts)


def test_empty_class_gets_no_infinite_weight():
    data = data_module(noise=None)
    data.setup()
    data.train_target[data.train_target == 4] = 5
    task, trainer = fitted(NegativeLearning, data=data)
    assert task._class_weight.isfinite().all()
    assert trainer.callback_metrics["train/loss"].isfinite()


def test_negative_learning_learns_random_labels_slower():
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(64, 1, 8, 8, generator=generator)
    target = torch.randint(10, (64,), generator=generator)
    accuracy = {}
    for method, arguments in ((CrossEntropy, {}), (NegativeLearning, {"balanced": False})):
        L.seed_everything(0, verbose=False)
        task = method("mlp_64", 10, input_shape=(1, 8, 8), **arguments)
        trainer = trainer_of(max_epochs=25)
        trainer.fit(task, DataLoader(TensorDataset(image, target), batch_size=32))
        task.eval()
        accuracy[method] = (task(image).argmax(1) == target).float().mean().item()
    assert accuracy[NegativeLearning] < accuracy[CrossEntropy] - 0.2


# -- MixUp -----------------------------------------------------------------------------------------------------------


def test_draw_mix_gives_weights_above_half_and_mix_mixes_by_them():
    generator = np.random.default_rng(0)
    draws = [draw_mix(generator, 1.0, 5) for _ in range(400)]
    weights = np.array([weight for weight, _ in draws])
    assert weights.min() >= 0.5
    assert weights.mean() == pytest.approx(0.75, abs=0.02)  # the mean of max(w, 1 - w) for uniform w
    assert all(partner.sort().values.tolist() == [0, 1, 2, 3, 4] for _, partner in draws)
    image = torch.arange(3.0)[:, None]
    mixed = mix(image, torch.tensor([1, 2, 0]), 0.75)
    assert mixed.squeeze(1).tolist() == [0.25, 1.25, 1.5]
    assert torch.equal(mix(image, torch.tensor([1, 2, 0]), 1.0), image)


def test_mixup_trains_on_mixed_images_and_labels():
    steps = []

    class Watched(Mixup):
        def forward(self, image):
            self.seen = image
            return super().forward(image)

        def noisy_loss(self, logits, batch):
            loss = super().noisy_loss(logits, batch)
            plain = data.train_image[batch.index].float() / 255
            plain = (plain - data.mean[0]) / data.std[0]
            expected = self._weight * plain + (1 - self._weight) * plain[self._partner]
            torch.testing.assert_close(self.seen, expected, atol=1e-4, rtol=0)
            partner = data.train_target[batch.index][self._partner]
            torch.testing.assert_close(loss, mixup_loss(logits, batch.target, partner, self._weight))
            steps.append(self._weight)
            return loss

    data = data_module()
    fitted(Watched, data=data, trainer=trainer_of(max_epochs=1))
    assert len(set(steps)) == len(steps) > 2
