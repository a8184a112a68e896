"""CDCR as a task: the warm-up, the trusted candidates, the file at the end, resume."""

import csv

import lightning as L
import pytest
import torch
import torch.nn.functional as F

from lightning_kd.core.one_cycle import OneCycle
from lightning_kd.core.run_callbacks import run_callbacks
from lightning_kd.core.run_folder import RunFolder
from lightning_kd.data import CandidateLabels, DigitsDataModule, MosaicDataModule
from lightning_kd.multi_label import CDCR, select_candidates
from tests.multi_label.runs import Labels, built, fitted, noisy, resumes_to_the_bit, trainer_of
from tests.two_processes import on_two_ranks

OPTIONS = {"warmup_epochs": 1, "average_decay": 0.5, "alpha": 0.5, "view": "weak"}


def candidates(**options):
    return Labels(noisy, **options)


def test_untrusted_candidates_do_not_count_in_the_loss():
    task = built(CDCR, **OPTIONS)
    data, seen = candidates(), []

    class Looking(CDCR):
        def step_loss(self, terms, logits, target):
            seen.append((self.current_epoch, terms["loss"].item(), logits.detach(), target))
            return super().step_loss(terms, logits, target)

        def index_of(self, batch):
            self.rows = self.trusted.rows[batch.index].clone()
            seen.append(self.rows)
            return super().index_of(batch)

    task.__class__ = Looking
    trainer_of().fit(task, datamodule=data)
    warm = [entry for entry in seen if isinstance(entry, tuple) and entry[0] == 0]
    for _, loss, logits, target in warm:
        assert loss == pytest.approx(F.binary_cross_entropy_with_logits(logits, target, reduction="sum").item())
    trusted, (_, loss, logits, target) = seen[len(warm)], seen[len(warm) + 1]
    assert bool((~trusted).any())
    assert bool(trusted[target == 0].all())
    each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    assert loss == pytest.approx(each[trusted].sum().item(), rel=1e-5)
    assert loss < each.sum().item() - 0.1


def test_second_stage_starts_from_the_average_with_a_fresh_optimizer():
    class Looking(CDCR):
        def disambiguate(self, view="plain"):
            if self.trainer.training:
                self.same = torch.equal(self.network.fc.weight, self.average.fc.weight)
                self.forgot = not self.optimizers().optimizer.state
            return super().disambiguate(view)

    task, trainer = fitted(Looking, candidates(), **OPTIONS)
    assert task.same
    assert task.forgot
    assert not torch.equal(task.network.fc.weight, task.average.fc.weight)
    assert 0 < trainer.callback_metrics["train/trusted"] <= 1
    assert 0 <= trainer.callback_metrics["train/purity"] <= 1


def test_confidence_is_of_weak_views_drawn_anew_each_epoch():
    seen = []

    class Looking(CDCR):
        def forward(self, image):
            if self.trainer.training and not torch.is_grad_enabled() and not self.trainer.validating:
                seen.append((self.current_epoch, image.clone()))
            return super().forward(image)

        def on_validation_start(self):
            seen.append(None)

    data = candidates(batch_size=48, eval_batch_size=48)
    fitted(Looking, data, trainer=trainer_of(max_epochs=3, limit_val_batches=0), **OPTIONS)
    (first, one), (second, two) = seen
    assert (first, second) == (1, 2)
    plain = next(iter(data.loader("train"))).image
    assert not torch.equal(one, plain)
    assert not torch.equal(one, two)
    trained = data.loader("train", views="weak")
    trained.set_epoch(1)
    assert not torch.equal(one, next(iter(trained)).image)  # not the view that is trained on


def test_number_of_clipped_classes_is_logged():
    _, trainer = fitted(CDCR, candidates(), **{**OPTIONS, "alpha": 0.99}, clip_thresholds=True)
    assert 1 <= trainer.callback_metrics["train/clipped"] <= 4


def test_wrong_candidates_raise():
    with pytest.raises(ValueError, match=r"^candidates must hold 0 and 1, got values from -1"):
        fitted(CDCR, Labels(lambda target: target - 1), **OPTIONS)
    with pytest.raises(ValueError, match=r"^candidates must include all true labels"):
        fitted(CDCR, Labels(lambda target: target * 0), **OPTIONS)


def test_fit_with_candidates_made_by_the_data_module():
    source = DigitsDataModule(fake=True, val_fraction=0.2)
    counts = {"train_mosaics": 64, "val_mosaics": 16, "test_mosaics": 16}
    data = MosaicDataModule(source, **counts, batch_size=32, candidates=CandidateLabels(0.3))
    L.seed_everything(0, verbose=False)
    options = {**OPTIONS, "alpha": 0.05, "input_shape": data.input_shape, "channels_last": False}
    task = CDCR("cnn_tiny", data.num_classes, **options)
    trainer = trainer_of()
    trainer.fit(task, datamodule=data)
    assert {"train/trusted", "train/purity"} <= {*trainer.callback_metrics}
    assert bool(task.trusted.rows[data.train_target == 0].all())


def test_wrong_labels_file_lists_candidates_by_confidence(tmp_path):
    trainer = trainer_of(callbacks=run_callbacks(RunFolder(tmp_path), "val/map"), enable_checkpointing=True)
    data = candidates()
    task, _ = fitted(CDCR, data, trainer=trainer, **OPTIONS)
    with (tmp_path / "wrong_labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    there = data.train_target[data.train_indices] > 0
    assert len(rows) == int(there.sum())
    values = [float(row["confidence"]) for row in rows]
    assert values == sorted(values)
    with torch.no_grad():
        image = next(iter(data.loader("train", data.train_indices, batch_size=len(data.train_indices)))).image
        confidence = task.average.eval()(image).sigmoid()
    chosen = select_candidates(confidence, there.float(), 0.5, True) & there
    assert sum(int(row["trusted"]) for row in rows) == pytest.approx(int(chosen.sum()), abs=2)
    first = rows[0]
    assert data.train_target[int(first["index"]), data.class_names.index(first["label"])] == 1


@pytest.mark.parametrize("warmup", [1, 2])
def test_resumes_to_the_bit(tmp_path, warmup):
    cycle = {"lr_scheduler": OneCycle, "lr_interval": "step"} if warmup == 2 else {}  # restarts with stage two
    assert resumes_to_the_bit(CDCR, tmp_path, candidates, **{**OPTIONS, "warmup_epochs": warmup}, **cycle)


def trusted_candidates_of_a_run(devices):
    task = built(CDCR, network="cnn_tiny", **{**OPTIONS, "warmup_epochs": 0})
    options = {"strategy": "ddp", "devices": devices} if devices > 1 else {}
    trainer_of(max_epochs=1, **options).fit(task, datamodule=candidates(batch_size=64 // devices))
    return task.trusted.rows.tolist()


def test_two_processes_trust_what_one_trusts():
    first, second = on_two_ranks(trusted_candidates_of_a_run, 2)
    assert first == second == trusted_candidates_of_a_run(1)
