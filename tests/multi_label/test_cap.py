"""CAP as a task: its batches, pseudo-labels, the baselines that share its code, the file, resume."""

import csv
from functools import partial

import lightning as L
import numpy as np
import pytest
import torch

from lightning_kd.core.losses import asymmetric_loss
from lightning_kd.core.one_cycle import OneCycle
from lightning_kd.core.phased_loader import Phase, PhasedLoader
from lightning_kd.core.run_callbacks import run_callbacks
from lightning_kd.core.run_folder import RunFolder
from lightning_kd.data import DigitsDataModule, MosaicDataModule
from lightning_kd.multi_label import CAP, pseudo_labels
from tests.multi_label.runs import CLASSES, Labels, built, fitted, resumes_to_the_bit, trainer_of
from tests.two_processes import on_two_ranks

OPTIONS = {"warmup_epochs": 1, "average_decay": 0.5, "view": "weak"}


class QuarterLabelled(Labels):
    """A quarter of the training images is labelled, as in data modules with ``labelled_fraction``."""

    def _load(self):
        super()._load()
        whole = self.train_indices
        self.train_indices = whole[::4]
        self.unlabelled_indices = np.setdiff1d(whole, self.train_indices)
        self.train_clean, self.train_target = self.train_target, self.train_target.clone()
        self.train_target[self.unlabelled_indices] = -1


def test_phase_led_by_the_unlabelled_loader_repeats_the_labelled_one():
    class Loader(list):
        def set_epoch(self, epoch):
            self.epoch = epoch

    few, many = Loader("ab"), Loader("12345")
    loader = PhasedLoader([Phase(0, few, many, by_unlabelled=True)])
    loader.set_epoch(3)
    assert len(loader) == 5
    assert [(b.labelled, b.unlabelled) for b in loader] == [("a", "1"), ("b", "2"), ("a", "3"), ("b", "4"), ("a", "5")]
    assert few.epoch == many.epoch == 3
    assert [batch.progress for batch in loader] == [0, 0.2, 0.4, 0.6, 0.8]


def test_warmup_trains_on_labelled_images_and_later_steps_on_both():
    seen = []

    class Looking(CAP):
        def step_loss(self, terms, logits, target):
            seen.append((self.current_epoch, set(terms), len(target)))
            return super().step_loss(terms, logits, target)

    task, trainer = fitted(Looking, QuarterLabelled(), **OPTIONS)
    warm, later = ([entry for entry in seen if entry[0] == epoch] for epoch in (0, 1))
    assert all(terms == {"labelled"} for _, terms, _ in warm)
    assert sum(count for *_, count in warm) == 12
    # 5 of the 16 images of a step are labelled: the 36 unlabelled ones make 4 steps of 11
    assert [(terms, count) for _, terms, count in later] == [({"labelled", "unlabelled"}, count) for *_, count in later]
    assert len(later) == 4
    assert {count for *_, count in later} <= {5, 6, 2, 7}
    assert {"train/pseudo_precision", "train/pseudo_recall", "train/pseudo_positives"} <= {*trainer.callback_metrics}
    assert task.schedule_length("step") == len(seen)


def test_pseudo_labels_come_from_weak_views_with_a_fresh_optimizer_state():
    class Looking(CAP):
        def assign_pseudo_labels(self, view="plain"):
            found = super().assign_pseudo_labels(view)
            if view == "weak":
                loader = self.data.loader("train", self.parts()[1], views="weak", stream="scores", batch_size=36)
                loader.set_epoch(self.current_epoch)
                weak, plain = next(iter(loader)), super().assign_pseudo_labels()[1]
                with torch.no_grad():
                    own = self.average(weak.image)
                self.close = [torch.allclose(found[1], scores, atol=1e-5) for scores in (own, plain)]
                self.forgot = not self.optimizers().optimizer.state
            return found

    task, _ = fitted(Looking, QuarterLabelled(), **OPTIONS)
    assert task.close == [True, False]
    assert task.forgot


@pytest.mark.parametrize("start", ["live", "average"])
def test_second_stage_from_sets_the_weights_it_starts_with(start):
    class Looking(CAP):
        def assign_pseudo_labels(self, view="plain"):
            if view == "weak":
                self.same = torch.equal(self.network.fc.weight, self.average.fc.weight)
            return super().assign_pseudo_labels(view)

    task, _ = fitted(Looking, QuarterLabelled(), second_stage_from=start, **OPTIONS)
    assert task.same == (start == "average")
    with pytest.raises(ValueError, match=r"^second_stage_from must be 'live' or 'average', got 'ema'"):
        built(CAP, second_stage_from="ema")


def test_one_cycle_schedule_starts_anew_with_the_second_stage():
    rates = []

    class Looking(CAP):
        def on_train_batch_start(self, batch, batch_idx):
            super().on_train_batch_start(batch, batch_idx)
            rates.append(self.optimizers().optimizer.param_groups[0]["lr"])

    adam = partial(torch.optim.AdamW, lr=0.01)
    options = {"optimizer": adam, "lr_scheduler": OneCycle, "lr_interval": "step"}
    fitted(Looking, QuarterLabelled(), trainer=trainer_of(max_epochs=4), **{**OPTIONS, "warmup_epochs": 2}, **options)
    # the 12 labelled images make 1 step in the warm-up, the 36 unlabelled ones 4 steps of 11 later
    assert len(rates) == 10
    lowest = 0.01 / 25
    assert [rates[0], rates[2]] == pytest.approx([lowest] * 2)
    assert [rates[1], rates[-1]] == pytest.approx([lowest / 1e4] * 2)
    rates.clear()
    trainer = trainer_of(max_epochs=4, limit_train_batches=2)
    fitted(Looking, QuarterLabelled(), trainer=trainer, **{**OPTIONS, "warmup_epochs": 2}, **options)
    assert len(rates) == 6
    assert [rates[1], rates[-1]] == pytest.approx([lowest / 1e4] * 2)


def test_pseudo_labels_follow_the_class_proportions_of_labelled_images():
    task = built(CAP, **OPTIONS)
    data = QuarterLabelled()
    trainer_of(max_epochs=2).fit(task, datamodule=data)
    index, scores, found = task.assign_pseudo_labels()
    share = (data.train_target[data.train_indices] > 0).double().mean(0)
    assert torch.equal(index, torch.from_numpy(data.unlabelled_indices))
    assert torch.equal(found.label, pseudo_labels(scores, share).label)
    positives = found.label.sum(0).long().tolist()
    assert positives == [int(36 * value + 1e-6) for value in share.tolist()]
    rows = task.given.rows
    assert bool((rows[data.train_indices] == -1).all())
    assert {*rows[data.unlabelled_indices].unique().tolist()} <= {-1, 0, 1}


def test_masked_labels_do_not_count_in_the_loss():
    task = built(CAP, **OPTIONS)
    logits = torch.tensor([[1.0, -1.0, 2.0, 0.0]])
    assert task._loss(logits, torch.tensor([[1.0, 0.0, -1.0, -1.0]])) == asymmetric_loss(
        logits[:, :2], torch.tensor([[1.0, 0.0]])
    )


def test_pseudo_labels_by_fixed_threshold_and_training_without_any():
    task, _ = fitted(CAP, QuarterLabelled(), pseudo="fixed", threshold=0.7, **OPTIONS)
    _, scores, found = task.assign_pseudo_labels()
    assert torch.equal(found.label > 0, scores.sigmoid() >= 0.7)
    assert bool(found.mask.all())
    task, trainer = fitted(CAP, QuarterLabelled(), pseudo="none", **OPTIONS)
    assert bool((task.given.rows == -1).all())
    assert "train/pseudo_positives" not in trainer.callback_metrics
    with pytest.raises(ValueError, match=r"^pseudo must be 'by_class', 'fixed' or 'none', got 'top'"):
        built(CAP, pseudo="top")


def test_images_without_known_labels_are_unlabelled_and_listed_in_the_file(tmp_path):
    def hide(target):
        return torch.where(torch.arange(len(target))[:, None] % 3 > 0, -1.0, target)

    data = Labels(hide, val_fraction=0.0)
    run = trainer_of(callbacks=run_callbacks(RunFolder(tmp_path), "val/map"), enable_checkpointing=True)
    task, _ = fitted(CAP, data, trainer=run, **OPTIONS)
    labelled, unlabelled = task.parts()
    assert labelled.tolist() == list(range(0, 64, 3))
    with (tmp_path / "pseudo_labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == unlabelled.tolist()
    assert {name for row in rows for name in row["labels"].split("|") if name} <= {f"c{k}" for k in range(CLASSES)}
    assert any(row["labels"] for row in rows)
    assert tmp_path / "pseudo_labels.csv" in RunFolder(tmp_path).written()  # so --overwrite deletes it


def test_labelled_fraction_of_the_data_decides_which_images_are_labelled():
    source = DigitsDataModule(fake=True, val_fraction=0.2)
    counts = {"train_mosaics": 64, "val_mosaics": 16, "test_mosaics": 16}
    data = MosaicDataModule(source, **counts, batch_size=32, labelled_fraction=0.25)
    L.seed_everything(0, verbose=False)
    task = CAP("cnn_tiny", data.num_classes, input_shape=data.input_shape, channels_last=False, **OPTIONS)
    trainer = trainer_of()
    trainer.fit(task, datamodule=data)
    labelled, unlabelled = task.parts()
    assert (len(labelled), len(unlabelled)) == (16, 48)
    assert sorted([*labelled, *unlabelled]) == list(range(64))
    assert bool((task.given.rows[labelled] == -1).all())
    assert bool((task.given.rows[unlabelled] >= 0).any())
    assert 0 <= trainer.callback_metrics["train/pseudo_recall"] <= 1


def test_data_without_a_labelled_image_raises():
    with pytest.raises(ValueError, match=r"^no training image has a known label"):
        fitted(CAP, Labels(lambda target: target * 0 - 1, val_fraction=0.0), **OPTIONS)


@pytest.mark.parametrize("warmup", [1, 2])
def test_resumes_to_the_bit(tmp_path, warmup):
    cycle = {"lr_scheduler": OneCycle, "lr_interval": "step"} if warmup == 2 else {}  # restarts with stage two
    assert resumes_to_the_bit(CAP, tmp_path, QuarterLabelled, **{**OPTIONS, "warmup_epochs": warmup}, **cycle)


def pseudo_labels_of_a_run(devices):
    task = built(CAP, **{**OPTIONS, "warmup_epochs": 0})
    options = {"strategy": "ddp", "devices": devices} if devices > 1 else {}
    trainer_of(max_epochs=1, **options).fit(task, datamodule=QuarterLabelled(batch_size=64 // devices))
    return task.given.rows.tolist()


def test_two_processes_give_the_pseudo_labels_of_one():
    first, second = on_two_ranks(pseudo_labels_of_a_run, 2)
    assert first == second == pseudo_labels_of_a_run(1)
