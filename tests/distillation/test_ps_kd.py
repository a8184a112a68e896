"""PS-KD: targets, the bank of predictions, and resuming with it."""

from functools import partial

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from lightning_kd.core.batch import as_batch
from lightning_kd.data import DigitsDataModule
from lightning_kd.distillation import PSKD, progressive_target
from lightning_kd.flatness import SAM
from tests.two_processes import on_two_ranks

SHAPE = (1, 8, 8)
ZERO_RATE = partial(torch.optim.SGD, lr=0.0)


def trainer_of(**options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(**{**quiet, "enable_checkpointing": False, "max_epochs": 2, "num_sanity_val_steps": 0, **options})


def data_module(**options):
    return DigitsDataModule(**{"fake": True, "batch_size": 32, "val_fraction": 0.25, "augment": False, **options})


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def fitted(network=None, data=None, trainer=None, ckpt_path=None, **options):
    L.seed_everything(0, verbose=False)
    task = PSKD(linear() if network is None else network, 10, input_shape=SHAPE, **options)
    trainer = trainer or trainer_of()
    trainer.fit(task, datamodule=data or data_module(), ckpt_path=ckpt_path)
    return task, trainer


def test_progressive_target_mixes_label_and_past_prediction():
    past = torch.tensor([[0.2, 0.3, 0.5], [0.0, 1.0, 0.0]])
    soft = progressive_target(torch.tensor([0, 1]), past.requires_grad_(), 0.4)
    torch.testing.assert_close(soft, torch.tensor([[0.68, 0.12, 0.2], [0.0, 1.0, 0.0]]))
    assert soft[1].tolist() == [0, 1, 0]  # exactly
    assert not soft.requires_grad
    assert progressive_target(torch.tensor([0, 1]), past.bfloat16(), 0.4).dtype == torch.float32


@pytest.mark.parametrize(
    ("target", "past", "alpha", "message"),
    [
        ([0, 1], torch.zeros(2, 3), 0.5, "past must hold probabilities that sum to 1, got sums from 0 to 0"),
        ([0, 1], torch.full((2, 2), 0.5), 1.5, "alpha must be at least 0 and at most 1, got 1.5"),
        ([0, 2], torch.full((2, 2), 0.5), 0.5, "target must be between 0 and 1, got 0 to 2"),
        ([[1.0, 0.0]], torch.full((1, 2), 0.5), 0.5, "target must be int64"),
    ],
)
def test_wrong_past_target_or_alpha_raises(target, past, alpha, message):
    with pytest.raises(ValueError, match=message):
        progressive_target(torch.tensor(target), past, alpha)


@pytest.mark.parametrize(("epoch", "alpha"), [(0, 0.0026667), (149, 0.4), (299, 0.8)])
def test_alpha_grows_linearly_to_alpha_t_in_the_last_epoch(monkeypatch, epoch, alpha):
    task = PSKD(linear(), 10, input_shape=SHAPE)
    trainer_of(max_epochs=300).strategy.connect(task)
    task.trainer = trainer_of(max_epochs=300)
    monkeypatch.setattr(PSKD, "current_epoch", epoch)
    assert task.alpha == pytest.approx(alpha, abs=1e-7)


def test_unlimited_epochs_raise():
    with pytest.raises(ValueError, match="alpha_t is reached in the last epoch, and max_epochs=-1 does not say"):
        fitted(trainer=trainer_of(max_epochs=-1))


class StepRecorder(L.Callback):
    """Records loss, batch and logits of each step."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        batch = as_batch(batch)
        with torch.no_grad():
            self.steps.append((outputs["loss"].item(), batch, pl_module.network(batch.image)))


def test_first_epoch_is_cross_entropy_and_second_mixes_in_the_bank():
    seen = StepRecorder()
    task, trainer = fitted(optimizer=ZERO_RATE, trainer=trainer_of(callbacks=seen))
    steps = trainer.num_training_batches
    for k, (loss, batch, logits) in enumerate(seen.steps):  # at learning rate 0 past and present predictions are equal
        p = logits.softmax(1)
        one_hot = F.one_hot(batch.target, 10)
        soft = one_hot if k < steps else 0.2 * one_hot + 0.8 * p
        assert loss == pytest.approx(-(soft * p.log()).sum(1).mean().item(), rel=1e-5)
        torch.testing.assert_close(task.bank.rows[batch.index], p)
    assert len(seen.steps) == 2 * steps
    assert seen.steps[0][0] == F.cross_entropy(seen.steps[0][2], seen.steps[0][1].target).item()


def test_image_repeated_in_the_first_epoch_keeps_its_label_as_target():
    seen = StepRecorder()
    x, y = torch.randn(12, *SHAPE, generator=torch.Generator().manual_seed(3)), torch.arange(12) % 10
    loader = DataLoader([(x[i], y[i], i) for i in range(12)], 6, sampler=[*range(12), *range(12)])
    task = PSKD(linear(), 10, input_shape=SHAPE, optimizer=ZERO_RATE)
    trainer_of(callbacks=seen, max_epochs=1).fit(task, loader)
    assert len(seen.steps) == 4
    for loss, batch, logits in seen.steps:
        assert loss == pytest.approx(F.cross_entropy(logits, batch.target).item(), rel=1e-6)


def test_bank_rows_of_unseen_samples_are_their_labels():
    data = data_module(batch_size=8)
    task, _ = fitted(data=data, trainer=trainer_of(max_epochs=1, limit_train_batches=2))
    one_hot = F.one_hot(data.train_target, 10).float()
    changed = (task.bank.rows != one_hot).any(1)
    assert int(changed.sum()) == 16
    assert set(changed.nonzero().squeeze(1).tolist()) <= set(data.train_indices.tolist())
    assert task.bank.rows.sum(1).tolist() == pytest.approx([1.0] * len(one_hot), abs=1e-5)


def test_targets_do_not_depend_on_the_order_of_the_samples():
    """Each sample's target is mixed with its own row of the bank."""
    found = []
    for order in (1, -1):
        seen = StepRecorder()
        generator = torch.Generator().manual_seed(2)
        x, y = torch.randn(24, 1, 8, 8, generator=generator), torch.arange(24) % 10
        loader = DataLoader([(x[i], y[i], i) for i in range(24)][::order], 1)
        task = PSKD(linear(), 10, input_shape=SHAPE, optimizer=ZERO_RATE)
        trainer_of(callbacks=seen).fit(task, loader)
        found.append({int(batch.index): loss for loss, batch, _ in seen.steps[24:]})
    assert found[0] == found[1]
    assert len(found[0]) == 24


def test_second_fit_starts_with_a_new_bank():
    task, first = fitted(optimizer=ZERO_RATE, trainer=trainer_of(max_epochs=1))
    again = trainer_of(max_epochs=1)
    again.fit(task, datamodule=data_module())
    assert again.callback_metrics["train/loss"] == pytest.approx(first.callback_metrics["train/loss"].item(), rel=1e-6)


def test_resumes_to_the_bit(tmp_path):
    whole, _ = fitted("cnn_tiny", trainer=trainer_of(max_epochs=3), channels_last=False)
    trainer = trainer_of(max_epochs=3, limit_val_batches=0)

    class Stop(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                raise KeyboardInterrupt

        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "last.ckpt")

    trainer.callbacks.append(Stop())
    with pytest.raises(SystemExit):
        fitted("cnn_tiny", trainer=trainer, channels_last=False)
    begun = []

    class Begin(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            begun.append(trainer.current_epoch)

    longer = trainer_of(max_epochs=3, callbacks=Begin())
    again, _ = fitted("cnn_tiny", trainer=longer, ckpt_path=tmp_path / "last.ckpt", channels_last=False)
    assert begun == [2]
    assert torch.equal(whole.bank.rows, again.bank.rows)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    # a checkpoint without the bank cannot be resumed
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    del checkpoint["memories"]
    torch.save(checkpoint, tmp_path / "bare.ckpt")
    with pytest.raises(ValueError, match=r"bare\.ckpt holds no predictions of the training samples: go on from one"):
        fitted("cnn_tiny", trainer=trainer_of(max_epochs=3), ckpt_path=tmp_path / "bare.ckpt")


def test_both_sam_evaluations_have_the_same_target():
    """With rho = 0 SAM equals SGD, unless the second evaluation reads what the first wrote into the bank."""
    sgd = partial(torch.optim.SGD, lr=0.1)
    weights = []
    for optimizer in (sgd, partial(SAM, rho=0.0, base_optimizer=sgd)):
        task, _ = fitted(trainer=trainer_of(max_epochs=1), optimizer=optimizer)
        weights.append(task.network[1].weight.detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-5)


def fit_on_two():
    seen = []

    class IndexRecorder(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.current_epoch == 0:
                seen.extend(batch.index.tolist())

    trainer = trainer_of(strategy="ddp", devices=2, callbacks=IndexRecorder(), max_epochs=1)
    task, _ = fitted(optimizer=ZERO_RATE, data=data_module(train_per_class=4), trainer=trainer)
    return seen, task.bank.rows.tolist(), float(trainer.callback_metrics["train/loss"])


def test_two_processes_share_their_predictions_in_the_bank():
    ranks = on_two_ranks(fit_on_two)
    alone, trainer = fitted(optimizer=ZERO_RATE, data=data_module(train_per_class=4), trainer=trainer_of(max_epochs=1))
    assert 0 < len(ranks[0][0]) < 40
    assert len({*ranks[0][0], *ranks[1][0]}) == 40
    for _, rows, loss in ranks:
        torch.testing.assert_close(torch.tensor(rows), alone.bank.rows)
        assert loss == pytest.approx(float(trainer.callback_metrics["train/loss"]), rel=1e-5)


def test_bank_on_the_host_has_the_same_rows():
    one, two = (fitted(bank_on_host=host)[0].bank for host in (False, True))
    assert two.on_host
    assert torch.equal(one.rows, two.rows)


def test_wrong_alpha_t_missing_index_and_mixed_targets_raise():
    with pytest.raises(ValueError, match=r"alpha_t must be at least 0 and at most 1, got 1\.2"):
        PSKD(linear(), 10, input_shape=SHAPE, alpha_t=1.2)
    plain = DataLoader([(torch.zeros(1, 8, 8), 0)], 1)
    with pytest.raises(ValueError, match="stores values for every sample, but the batch has no index"):
        trainer_of().fit(PSKD(linear(), 10, input_shape=SHAPE), plain)
    mixed = DataLoader([(torch.zeros(1, 8, 8), torch.full((10,), 0.1), 0)], 1)
    with pytest.raises(ValueError, match="target must be int64"):
        trainer_of().fit(PSKD(linear(), 10, input_shape=SHAPE), mixed)
