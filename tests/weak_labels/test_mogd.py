"""MoGD as a task: the algorithm step by step, its extra passes, its report, resume, processes."""

import csv
import signal

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lightning_kd.core.run_callbacks import run_callbacks
from lightning_kd.core.run_folder import RunFolder
from lightning_kd.data import DigitsDataModule
from lightning_kd.flatness import SAM
from lightning_kd.weak_labels import MoGD, candidate_meta_gradient, uniform_weights, updated_weights
from tests.killing import fit_dropping
from tests.two_processes import on_two_ranks
from tests.weak_labels.runs import built, data_module, fitted, resumes_to_the_bit, trainer_of


class Recording(MoGD):
    """Keeps each step's batch, network, stored and chosen weights, learning rate, loss and logits."""

    def on_fit_start(self):
        super().on_fit_start()
        self.steps = []

    def choose_weights(self, batch, feature):
        before = {name: p.detach().clone() for name, p in self.network.named_parameters()}
        rows = self.stored.rows[batch.labelled.index].clone()
        found = super().choose_weights(batch, feature)
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.steps.append([batch, before, rows, rate, *found])
        return found

    def step_loss(self, terms, logits, target):
        self.steps[-1] += [terms["loss"].detach(), logits.detach()]
        return super().step_loss(terms, logits, target)


def expected_weights(step, network, init, normalization, weight_step):
    """The weights of a step by ``candidate_meta_gradient`` and ``updated_weights``."""
    batch, before, rows, rate = step[:4]
    candidates = batch.labelled.extras["candidates"]
    start = torch.where(rows.sum(1, keepdim=True) > 0, rows, uniform_weights(candidates))
    start = start if init == "confidence" else torch.zeros_like(rows)

    def forward(parameters, x):
        return functional_call(network, dict(parameters), (x,))

    given = (batch.labelled.image, candidates, batch.meta.image, batch.meta.target, start)
    gradient = candidate_meta_gradient(forward, before, *given, rate)
    return updated_weights(start, gradient * len(rows) / rate, candidates, weight_step, normalization)


@pytest.mark.parametrize(
    ("init", "normalization"),
    [("confidence", "example"), ("zero", "example"), ("confidence", "batch"), ("zero", "batch")],
)
def test_weights_and_losses_of_the_steps_follow_the_algorithm(init, normalization):
    options = {"init": init, "normalization": normalization, "weight_step": 0.7, "meta_batch_size": 16}
    task, trainer = fitted(Recording, trainer=trainer_of(max_epochs=2, limit_train_batches=3), **options)
    assert len(task.steps) == 6
    for step in (task.steps[0], task.steps[-1]):
        weights, rows, loss, logits = step[4:]
        whole = expected_weights(step, task.network, init, normalization, 0.7)
        scale = 1 if normalization == "example" else len(rows)
        torch.testing.assert_close(weights, whole * scale)
        torch.testing.assert_close(rows, expected_weights(step, task.network, init, "example", 0.7))
        torch.testing.assert_close(loss, -(weights * logits.log_softmax(1)).sum() / len(logits))
    last = task.steps[-1]
    assert torch.equal(task.stored.rows[last[0].labelled.index], last[5])
    seen = {*torch.cat([step[0].labelled.index for step in task.steps]).tolist()}
    others = [i for i in range(len(task.stored.rows)) if i not in seen]
    assert bool((task.stored.rows[others] == 0).all())
    data = trainer.datamodule
    for step in task.steps:
        assert len(step[0].meta.target) == 16
        assert {*step[0].meta.index.tolist()} <= {*data.meta_indices.tolist()}
        assert not {*step[0].labelled.index.tolist()} & {*data.meta_indices.tolist()}
    assert 0 < trainer.callback_metrics["train/true_weight"] <= 1


def test_meta_layer_head_equals_all_for_a_linear_network():
    def run(layer):
        torch.manual_seed(0)
        return fitted(Recording, network=nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), meta_layer=layer)[0]

    one, two = run("all"), run("head")
    for a, b in zip(one.steps, two.steps, strict=True):
        torch.testing.assert_close(a[4], b[4], rtol=1e-4, atol=1e-5)


def test_meta_layer_head_takes_the_meta_gradient_of_the_last_layer():
    task, _ = fitted(Recording, trainer=trainer_of(max_epochs=1, limit_train_batches=2), meta_layer="head")
    batch, before, rows, rate, weights, *_ = task.steps[1]
    (name, _), *others = [(n, m) for n, m in task.network.named_modules() if isinstance(m, nn.Linear)][::-1]
    assert others
    head = {n: p for n, p in before.items() if n.startswith(name)}
    still = {n: p for n, p in before.items() if n not in head}

    def forward(parameters, x):
        return functional_call(task.network, {**still, **parameters}, (x,))

    candidates = batch.labelled.extras["candidates"]
    start = torch.where(rows.sum(1, keepdim=True) > 0, rows, uniform_weights(candidates))
    given = (batch.labelled.image, candidates, batch.meta.image, batch.meta.target, start, rate)
    gradient = candidate_meta_gradient(forward, head, *given) * len(rows) / rate
    torch.testing.assert_close(weights, updated_weights(start, gradient, candidates, 1.0), rtol=1e-4, atol=1e-5)


class Normed(nn.Module):
    """A network with batch norm and dropout."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.mark.parametrize("layer", ["all", "head"])
def test_meta_passes_leave_network_and_random_state_unchanged(layer):
    class Looking(MoGD):
        def choose_weights(self, batch, feature):
            before = [torch.get_rng_state(), *map(torch.clone, self.network.state_dict().values())]
            found = super().choose_weights(batch, feature)
            after = [torch.get_rng_state(), *self.network.state_dict().values()]
            self.same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            with self.stateless_forward() as forward:
                one, two = (forward({}, batch.labelled.image) for _ in range(2))
            self.same_masks = torch.equal(one, two)
            return found

    trainer = trainer_of(max_epochs=1)
    task, _ = fitted(Looking, network=Normed(), trainer=trainer, meta_layer=layer)
    assert task.same
    assert task.same_masks
    assert int(task.network.body[2].num_batches_tracked) == trainer.global_step
    assert all(p.grad is None or p.grad.isfinite().all() for p in task.parameters())


def test_warmup_trains_with_equal_weights():
    task, _ = fitted(Recording, warmup_epochs=1)
    half = len(task.steps) // 2
    for step in task.steps[:half]:
        torch.testing.assert_close(step[4], uniform_weights(step[0].labelled.extras["candidates"]))
        assert bool((step[2] == 0).all())
    assert any(
        not torch.equal(step[4], uniform_weights(step[0].labelled.extras["candidates"])) for step in task.steps[half:]
    )


def test_second_pass_of_sam_uses_the_same_weights():
    def optimizer(parameters):
        return SAM(parameters, lambda p: torch.optim.SGD(p, lr=0.05), rho=0.05)

    trainer = trainer_of(max_epochs=1)
    task, _ = fitted(Recording, trainer=trainer, optimizer=optimizer)
    assert len(task.steps) == trainer.global_step > 1
    assert all(len(step) == 10 for step in task.steps)  # two losses for each choice of weights
    for step in task.steps:
        for loss, logits in (step[6:8], step[8:10]):
            torch.testing.assert_close(loss, -(step[4] * logits.log_softmax(1)).sum() / len(logits))


def test_training_gives_most_weight_to_the_true_labels():
    task, trainer = fitted(MoGD, data_module(q=0.5), trainer=trainer_of(max_epochs=6))
    data = trainer.datamodule
    weights = task.stored.rows[data.train_indices]
    true = weights.gather(1, data.train_target[data.train_indices][:, None])
    assert true.mean() > 0.8
    assert trainer.callback_metrics["train/true_weight"] > 0.6
    torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)))
    assert bool((weights[data.train_candidates[data.train_indices] == 0] == 0).all())


def test_disambiguated_file_lists_samples_by_weight(tmp_path):
    trainer = trainer_of(callbacks=run_callbacks(RunFolder(tmp_path)), enable_checkpointing=True)
    task, _ = fitted(MoGD, trainer=trainer)
    data = trainer.datamodule
    with (tmp_path / "disambiguated.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted(int(row["index"]) for row in rows) == data.train_indices.tolist()
    values = [float(row["weight"]) for row in rows]
    assert values == sorted(values)
    for row in (rows[0], rows[-1]):
        weights, candidates = task.stored.rows[int(row["index"])], data.train_candidates[int(row["index"])]
        assert float(row["weight"]) == pytest.approx(weights.max().item(), rel=1e-4)
        assert row["class_name"] == data.class_names[int(weights.argmax())]
        assert row["candidates"].split("|") == [data.class_names[c] for c in candidates.nonzero().squeeze(1).tolist()]
        assert row["predicted"] in row["candidates"].split("|")
        assert 0 < float(row["probability"]) <= 1


class Overlapping(DigitsDataModule):
    def setup(self, stage=None):
        super().setup(stage)
        self.meta_indices = self.train_indices[:3]


def test_wrong_arguments_and_data_raise():
    with pytest.raises(ValueError, match=r"^init must be 'confidence' or 'zero', got 'one'"):
        built(MoGD, init="one")
    with pytest.raises(ValueError, match=r"^meta_layer must be 'all' or 'head', got 'last'"):
        built(MoGD, meta_layer="last")
    with pytest.raises(ValueError, match=r"^weight_step must be above 0, got 0"):
        built(MoGD, weight_step=0)
    with pytest.raises(ValueError, match=r"^MoGD learns from candidates, and DigitsDataModule has none: set data"):
        fitted(MoGD, DigitsDataModule(fake=True, meta_per_class=2))
    with pytest.raises(ValueError, match=r"^MoGD needs a few samples with true labels, got meta_per_class=None"):
        fitted(MoGD, data_module(meta_per_class=None))
    overlapping = Overlapping(fake=True, candidates=data_module().candidates)
    with pytest.raises(ValueError, match=r"^meta_indices must be disjoint from train_indices, got sample \d+ in both"):
        fitted(MoGD, overlapping)


@pytest.mark.parametrize("init", ["confidence", "zero"])
def test_resumes_to_the_bit(tmp_path, init):
    assert resumes_to_the_bit(MoGD, tmp_path, init=init)


def weights_of_a_run(devices):
    task = built(MoGD, meta_batch_size=20 // devices)
    options = {"strategy": "ddp", "devices": devices} if devices > 1 else {}
    trainer = trainer_of(max_epochs=1, **options)
    trainer.fit(task, datamodule=data_module(batch_size=32 // devices))
    return task.stored.rows.tolist(), [p.tolist() for p in task.parameters()]


def test_two_processes_learn_as_one():
    first, second = on_two_ranks(weights_of_a_run, 2)
    alone = weights_of_a_run(1)
    torch.testing.assert_close(torch.tensor(first[0]), torch.tensor(second[0]), rtol=0, atol=0)
    torch.testing.assert_close(torch.tensor(first[0]), torch.tensor(alone[0]), rtol=1e-3, atol=1e-4)
    for one, other in zip(first[1], alone[1], strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-3, atol=1e-5)


def test_run_killed_and_resumed_equals_an_undisturbed_one(tmp_path):
    arguments = (
        "--config weak_labels/mogd_digits --data.train_per_class 12 --data.meta_per_class 2 --data.batch_size 25"
        " --data.val_fraction 0 --trainer.max_epochs 3"
    )
    whole = fit_dropping(tmp_path, "whole", arguments)
    assert whole.returncode == 0, whole.stderr
    # 4 steps an epoch, each with 4 forward passes, of which 3 choose the weights
    killed = fit_dropping(tmp_path, "broken", arguments, kill_at=38)
    assert killed.returncode == -signal.SIGKILL
    reached = torch.load(tmp_path / "broken/checkpoints/last.ckpt", weights_only=True)
    assert 0 <= reached["epoch"] < 2
    resumed = fit_dropping(tmp_path, "broken", arguments, "--ckpt_path", "last")
    assert resumed.returncode == 0, resumed.stderr
    a, b = (torch.load(tmp_path / run / "checkpoints/last.ckpt", weights_only=True) for run in ("whole", "broken"))
    assert all(torch.equal(value, b["state_dict"][key]) for key, value in a["state_dict"].items())
    assert torch.equal(*(c["memories"]["candidate_weights"]["rows"] for c in (a, b)))
    for name in ("metrics.csv", "disambiguated.csv"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "broken" / name).read_text(), name
