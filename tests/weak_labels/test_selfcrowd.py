"""Self-Crowd as a task: rounds, added annotations, the control by confidence, resume, a kill, two processes."""

import csv
import signal
from functools import partial

import pytest
import torch

from lightning_kd.core.batch import Batch
from lightning_kd.core.run_callbacks import run_callbacks
from lightning_kd.core.run_folder import RunFolder
from lightning_kd.core.schedules import CosineAnnealing
from lightning_kd.data import SimulatedCrowd
from lightning_kd.weak_labels import (
    CrowdLayer,
    PseudoCells,
    SelfCrowd,
    annotation_balance,
    select_pseudo_annotations,
)
from tests.killing import fit_dropping
from tests.two_processes import on_two_ranks
from tests.weak_labels.crowd_runs import built, crowd_data, even_data, fitted, resumes_to_the_bit, trainer_of

ROUNDS = {"start_epochs": 1, "rounds": 2, "round_epochs": 1, "budget": 0.2}
# so that the network knows something of rare classes when the first round begins
FAST = {**ROUNDS, "network": "mlp_32", "optimizer": partial(torch.optim.Adam, lr=0.02), "start_epochs": 8}


def test_pseudo_cells_fill_only_missing_annotations_of_a_batch():
    rows = torch.tensor([[5, 1, 2], [2, 0, 1], [5, 0, 3], [7, 2, 0]])
    cells = PseudoCells(rows, 9)
    given = torch.tensor([[-1, -1, 4], [3, -1, -1], [-1, -1, -1], [-1, -1, 4]])
    filled, added = cells.fill(given, torch.tensor([5, 2, 0, 7]))
    # the given annotations of samples 2 and 7 stay
    assert filled.tolist() == [[3, 2, 4], [3, -1, -1], [-1, -1, -1], [-1, -1, 4]]
    assert added.tolist() == [[True, True, False], [False] * 3, [False] * 3, [False] * 3]


def test_rounds_begin_after_the_set_epochs():
    task = built(SelfCrowd, start_epochs=4, rounds=3, round_epochs=2)
    assert [task.round_before(epoch) for epoch in range(13)] == [0, 0, 0, 0, 1, 0, 2, 0, 3, 0, 0, 0, 0]
    assert [built(SelfCrowd, rounds=0).round_before(epoch) for epoch in range(40)] == [0] * 40


def test_rounds_add_the_selected_annotations_and_log_their_balance(capsys):
    seen = []

    class Looking(SelfCrowd):
        def select(self, number):
            rows = super().select(number)
            index, p = self.probabilities_of(self.used_indices())
            given = self.annotations[index]
            predicted = self.annotators(p).transpose(1, 2).detach()
            step = int(0.2 * int((given >= 0).sum()))
            expected = select_pseudo_annotations(predicted, given, number * step)
            expected[:, 0] = index[expected[:, 0]]
            assert torch.equal(rows, expected)
            seen.append((self.current_epoch, number, len(rows)))
            return rows

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            without = (batch.extras["annotations"] < 0).all(1)
            seen.append((self.current_epoch, int(without.sum())))
            return loss

    data = crowd_data(batch_size=8, train_per_class=60)
    task, _, trainer = fitted(Looking, data, trainer_of(max_epochs=10), **FAST)
    selections = [entry for entry in seen if len(entry) == 3]
    assert [entry[:2] for entry in selections] == [(7, 1), (8, 2)]
    assert all(count > 0 for *_, count in selections)
    joined = {epoch: sum(e[1] for e in seen if len(e) == 2 and e[0] == epoch) for epoch in range(10)}
    assert joined[7] == 0
    items = task.pseudo[:, 0].unique().numpy()
    assert joined[9] == len(set(items) & set(data.unlabelled_indices)) > 0
    assert bool((data.train_annotations[task.pseudo[:, 0], task.pseudo[:, 1]] == -1).all())
    assert 3 not in task.pseudo[:, 1]  # the annotator without annotations
    assert set(items) <= set(task.used_indices())
    found = trainer.callback_metrics
    assert float(found["train/pseudo_annotations"]) == len(task.pseudo)
    balance = annotation_balance(task.counts())
    assert float(found["train/annotation_ratio"]) == pytest.approx(balance.ratio)
    assert float(found["train/annotation_distance"]) == pytest.approx(balance.distance)
    assert 0 <= float(found["train/pseudo_correct"]) <= 1
    assert "is enough for" not in capsys.readouterr().err


def test_balanced_selection_is_more_balanced_than_the_confident_control():
    ratios = {}
    for selection in ("balanced", "confident"):
        data = crowd_data(SimulatedCrowd(4, (0.6, 0.9), 2, imbalance=6.0), train_per_class=40, batch_size=8)
        task, _, _ = fitted(SelfCrowd, data, trainer_of(max_epochs=10), selection=selection, **FAST)
        given = data.train_annotations
        before = torch.bincount(given[given >= 0].long(), minlength=10)
        ratios[selection] = annotation_balance(task.counts())
        if selection == "confident":
            step = int(0.2 * int(before.sum()))
            assert len(task.pseudo) == 2 * step  # without class quotas, all are filled
            assert bool((task._class_weight == 1).all())
        else:
            assert ratios[selection].distance < annotation_balance(before).distance
    assert ratios["balanced"].distance < ratios["confident"].distance


def test_without_refresh_earlier_pseudo_annotations_stay():
    kept = []

    class Looking(SelfCrowd):
        def select(self, number):
            kept.append(super().select(number))
            return kept[-1]

    fitted(Looking, trainer=trainer_of(max_epochs=3), refresh=False, **ROUNDS)
    first, both = kept
    assert torch.equal(both[: len(first)], first)
    assert len(both) > len(first)
    assert len({(i, r) for i, r, _ in both.tolist()}) == len(both)


def test_pseudo_annotations_are_weighted_by_pseudo_weight_and_class():
    one_round = {**ROUNDS, "rounds": 1}  # else those of the next round are selected at the end
    task, data, _ = fitted(SelfCrowd, trainer=trainer_of(max_epochs=2), pseudo_weight=0.5, **one_round)
    pseudo = {(i, r): label for i, r, label in task.pseudo.tolist()}
    cells = (data.train_annotations >= 0).nonzero().tolist()
    given = {(i, r): int(data.train_annotations[i, r]) for i, r in cells}
    labels = [*given.values(), *pseudo.values()]
    mean = sum(labels.count(label) ** -0.5 for label in labels) / len(labels)
    weight = [max(1, labels.count(c)) ** -0.5 / mean for c in range(10)]
    assert max(weight) > 1.5 * min(weight)
    batch = next(iter(data.loader("train", torch.from_numpy(task.used_indices()))))
    found = task.weights_of(task.annotations_of(batch), batch)
    seen = {"given": 0, "pseudo": 0}
    for i, row in zip(batch.index.tolist(), found.tolist(), strict=True):
        for r, value in enumerate(row):
            if (i, r) in given:
                seen["given"] += 1
                assert value == pytest.approx(weight[given[i, r]], rel=1e-5)
            elif (i, r) in pseudo:
                seen["pseudo"] += 1
                assert value == pytest.approx(0.5 * weight[pseudo[i, r]], rel=1e-5)
    assert min(seen.values()) > 0


def test_annotation_weights_of_a_round_equal_worked_numbers(monkeypatch):
    """Of 1, 4 and 9 annotations: weights 1, 1/2 and 1/3, whose mean over the 14 is 6/14."""
    task, _, _ = fitted(SelfCrowd, trainer=trainer_of(max_epochs=2), pseudo_weight=0.25, **{**ROUNDS, "rounds": 1})
    task.pseudo = torch.tensor([[0, 0, 2]])
    given = torch.tensor([[0, 1], [1, 1], [1, 2], [2, 2], [2, 2], [2, 2], [2, -1]])
    monkeypatch.setattr(SelfCrowd, "annotations", property(lambda self: given))
    task.on_train_epoch_start()
    annotations = torch.tensor([[2, -1, 0], [1, -1, 2]])
    batch = Batch(None, None, torch.tensor([1, 0]), {"annotations": annotations})
    task._cells = PseudoCells(torch.tensor([[0, 1, 2]]), 2)
    found = task.weights_of(task.annotations_of(batch), batch)
    missing = 0, 1
    expected = torch.tensor([[7 / 9, 0, 7 / 3], [7 / 6, 0.25 * 7 / 9, 7 / 9]])
    found[missing] = 0  # any weight
    torch.testing.assert_close(found, expected)


def test_without_pseudo_annotations_it_trains_like_the_crowd_layer():
    dense = {"crowd": SimulatedCrowd(3, 0.9, 3)}
    one, _, _ = fitted(SelfCrowd, crowd_data(**dense), trainer_of(max_epochs=3), resample=0.0, **ROUNDS)
    other, _, _ = fitted(CrowdLayer, crowd_data(**dense), trainer_of(max_epochs=3))
    assert len(one.pseudo) == 0
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_restart_begins_rounds_with_the_first_weights_and_a_fresh_optimizer():
    first = {}

    class Looking(SelfCrowd):
        def on_train_epoch_start(self):
            super().on_train_epoch_start()
            first[self.current_epoch] = {k: v.clone() for k, v in self.state_dict().items()}
            assert not self.trainer.optimizers[0].state

    fitted(Looking, trainer=trainer_of(max_epochs=3), restart=True, **ROUNDS)
    for epoch in (1, 2):
        assert all(torch.equal(first[0][name], value) for name, value in first[epoch].items())


def test_training_too_short_for_all_rounds_prints_a_warning(capsys):
    fitted(SelfCrowd, trainer=trainer_of(max_epochs=2), **{**ROUNDS, "rounds": 5})
    assert "max_epochs=2 is enough for 1 of 5 rounds of 1 epochs only" in capsys.readouterr().err


def test_fit_in_double_precision():
    task, _, _ = fitted(SelfCrowd, trainer=trainer_of(max_epochs=2, precision="64-true"), **ROUNDS)
    assert task.annotators.kernel.dtype == torch.float64
    assert len(task.pseudo) > 0


def test_schedule_by_step_raises_if_rounds_make_epochs_longer():
    options = {"lr_scheduler": CosineAnnealing, "lr_interval": "step", **ROUNDS}
    with pytest.raises(ValueError, match=r"does not say how many steps SelfCrowd trains: give lr_interval epoch"):
        fitted(SelfCrowd, **options)
    fitted(SelfCrowd, **{**options, "rounds": 0})
    fitted(SelfCrowd, even_data(), **options)  # all samples have an annotation from the start
    fitted(SelfCrowd, **{**options, "lr_interval": "epoch"})


def test_pseudo_annotations_file_lists_the_selected_cells(tmp_path):
    run = trainer_of(max_epochs=3, callbacks=run_callbacks(RunFolder(tmp_path), "val/acc"), enable_checkpointing=True)
    task, _, _ = fitted(SelfCrowd, trainer=run, **ROUNDS)
    with (tmp_path / "pseudo_annotations.csv").open() as file:
        rows = [[int(value) for value in row.values()] for row in csv.DictReader(file)]
    assert rows == task.pseudo.tolist()
    assert (tmp_path / "annotators.csv").is_file()
    assert (tmp_path / "pseudo_annotations.csv").read_text().startswith("index,annotator,class_name\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": "all"}, "selection must be 'balanced' or 'confident', got 'all'"),
        ({"start_epochs": 0}, "start_epochs must be at least 1, got 0"),
        ({"round_epochs": 0}, "round_epochs must be at least 1, got 0"),
        ({"rounds": -1}, "rounds must be at least 0, got -1"),
        ({"budget": 0.0}, "budget must be above 0, got 0.0: give a share of the annotations"),
        ({"balance": -1.0}, "balance must be at least 0, got -1.0"),
        ({"resample": -1.0}, "resample must be at least 0, got -1.0"),
        ({"threshold": 2.0}, "threshold must be at least 0 and at most 1, got 2.0: give a probability"),
        ({"pseudo_weight": -1.0}, "pseudo_weight must be at least 0, got -1.0"),
    ],
)
def test_wrong_arguments_raise(options, message):
    with pytest.raises(ValueError, match=message):
        built(SelfCrowd, **options)


@pytest.mark.parametrize("options", [{}, {"refresh": False, "restart": True}])
def test_resumes_to_the_bit(tmp_path, options):
    assert resumes_to_the_bit(SelfCrowd, tmp_path, **ROUNDS, **options)
    assert len(torch.load(tmp_path / "two.ckpt", weights_only=True)["pseudo_annotations"]) > 0


def test_run_killed_in_a_round_and_resumed_equals_an_undisturbed_one(tmp_path):
    arguments = (
        "--config weak_labels/selfcrowd_digits --model.start_epochs 1 --model.rounds 3 --model.round_epochs 1"
        " --data.train_per_class 30 --data.batch_size 50 --trainer.max_epochs 4"
    )
    whole = fit_dropping(tmp_path, "whole", arguments)
    assert whole.returncode == 0, whole.stderr
    steps = torch.load(tmp_path / "whole/checkpoints/last.ckpt", weights_only=True)["global_step"]
    killed = fit_dropping(tmp_path, "broken", arguments, kill_at=steps - 1)
    assert killed.returncode == -signal.SIGKILL
    reached = torch.load(tmp_path / "broken/checkpoints/last.ckpt", weights_only=True)
    assert reached["epoch"] == 2
    assert len(reached["pseudo_annotations"]) > 0
    resumed = fit_dropping(tmp_path, "broken", arguments, "--ckpt_path", "last")
    assert resumed.returncode == 0, resumed.stderr
    a, b = (torch.load(tmp_path / run / "checkpoints/last.ckpt", weights_only=True) for run in ("whole", "broken"))
    for key, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][key]), key
    assert torch.equal(a["pseudo_annotations"], b["pseudo_annotations"])
    for name in ("metrics.csv", "annotators.csv", "aggregated.csv", "pseudo_annotations.csv"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "broken" / name).read_text(), name
    assert (tmp_path / "whole/noise.npz").read_bytes() == (tmp_path / "broken/noise.npz").read_bytes()


def pseudo_annotations_of_a_run(devices):
    options = {"strategy": "ddp", "devices": devices} if devices > 1 else {}
    data = even_data(batch_size=32 // devices)
    task, _, _ = fitted(SelfCrowd, data, trainer_of(max_epochs=3, **options), **ROUNDS)
    return task.pseudo.tolist(), [value.double().tolist() for value in task.state_dict().values()]


def test_two_processes_train_as_one():
    first, second = on_two_ranks(pseudo_annotations_of_a_run, 2)
    assert first == second
    rows, weights = pseudo_annotations_of_a_run(1)
    assert first[0] == rows
    for a, b in zip(first[1], weights, strict=True):
        assert torch.allclose(torch.tensor(a), torch.tensor(b), atol=1e-4)
