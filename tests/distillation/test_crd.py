"""CRD: loss, memory banks, drawing of negatives, one training step, subsets, resuming, two processes, errors."""

import math

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_kd.data import DigitsDataModule
from lightning_kd.distillation import CRD, ContrastBanks, _negative_images, contrast_loss
from lightning_kd.distillation._negative_images import NegativeImages
from tests.two_processes import on_two_ranks

SHAPE = (1, 8, 8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=seeded(seed)))


def banks_of(count, dim=4, **options):
    banks = ContrastBanks(dim, **options)
    banks.allocate(count, seeded(9))
    return banks


# -- the loss and the banks --------------------------------------------------------------------------------------------


def test_contrast_loss_gives_worked_numbers():
    # m = 1/2: -log(0.5 / 1) - log(0.5 / 0.75)
    assert contrast_loss(torch.tensor([[0.5, 0.25]]), 2).item() == pytest.approx(math.log(3), abs=1e-6)
    # m = 2/4, and two samples: the mean of both sums
    score = torch.tensor([[0.5, 0.25, 0.5], [1.5, 0.5, 0.5]], dtype=torch.float64)
    plain = (math.log(2) + math.log(1.5) + math.log(2) + math.log(4 / 3) + 2 * math.log(2)) / 2
    assert contrast_loss(score, 4).item() == pytest.approx(plain, abs=1e-6)
    with pytest.raises(ValueError, match=r"^score must be \[N, 1 \+ K\] with K at least 1, got \[3, 1\]"):
        contrast_loss(torch.ones(3, 1), 2)


def test_banks_equal_a_plain_loop_over_three_steps():
    """Scores, the constants Z of the first batch, gradients and updated rows, one by one in float64."""
    banks, momentum, temperature = banks_of(6, momentum=0.25, temperature=0.5), 0.25, 0.5
    rows = [memory.rows.double().clone() for memory in (banks.student, banks.teacher)]
    z = None
    for step in range(3):
        v = [unit(2, 4, seed=10 * step + side).double().requires_grad_() for side in (1, 2)]
        row = torch.tensor([[0, 3], [3, 5], [1, 0]][step])
        negatives = torch.tensor([[1, 2, 2], [4, 5, 1]])
        found = banks(*v, row, negatives)
        chosen = torch.cat([row[:, None], negatives], 1)
        scores = [
            torch.stack(
                [torch.stack([(rows[1 - side][j] @ v[side][i] / temperature).exp() for j in chosen[i]]) for i in (0, 1)]
            )
            for side in (0, 1)
        ]
        z = [score.mean().item() * 6 for score in scores] if z is None else z
        plain = 0.0
        for side in (0, 1):
            p = scores[side] / z[side]
            plain -= (p[:, 0] / (p[:, 0] + 3 / 6)).log().sum() / 2 + (0.5 / (p[:, 1:] + 3 / 6)).log().sum() / 2
        assert found.item() == pytest.approx(plain.item(), rel=1e-5)
        for own, other in zip(torch.autograd.grad(found, v), torch.autograd.grad(plain, v), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)
        for side in (0, 1):
            moved = momentum * rows[side][row] + (1 - momentum) * v[side].detach()
            rows[side][row] = moved / moved.norm(dim=1, keepdim=True)
        for memory, expected in zip((banks.student, banks.teacher), rows, strict=True):
            torch.testing.assert_close(memory.rows, expected.float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(banks.z, torch.tensor(z), rtol=1e-5, atol=0)


def test_z_stays_float32_when_the_banks_are_cast_to_half_precision():
    banks = ContrastBanks(dim=4)
    banks.z.copy_(torch.tensor([110_700.0, 2.0]))
    for cast in (banks.half(), banks.to(torch.bfloat16)):
        assert cast.z.tolist() == [110_700.0, 2.0]
        assert cast.z.dtype == torch.float32


def test_banks_update_only_the_rows_of_the_batch_and_set_z_once():
    banks = banks_of(5)
    start = banks.student.rows.clone()
    width = 1 / math.sqrt(4 / 3)
    assert start.abs().max() <= width
    assert start.min() < -0.5 * width
    assert start.max() > 0.5 * width
    assert not torch.equal(start, banks.teacher.rows)
    v = unit(2, 4, seed=3).requires_grad_()
    banks(v, unit(2, 4, seed=4), torch.tensor([1, 3]), torch.tensor([[0], [2]])).backward()
    assert not banks.z.requires_grad
    assert not banks.student.rows.requires_grad
    z = banks.z.clone()
    assert banks.student.rows[[1, 3]].norm(dim=1).tolist() == pytest.approx([1, 1], abs=1e-6)
    assert torch.equal(banks.student.rows[[0, 2, 4]], start[[0, 2, 4]])
    banks(unit(2, 4, seed=5), unit(2, 4, seed=6), torch.tensor([0, 4]), torch.tensor([[1], [2]]))
    assert torch.equal(banks.z, z)
    again = ContrastBanks(4)
    again.load_state_dict(banks.state_dict())
    again.allocate(5, seeded(1))
    again(unit(2, 4, seed=5), unit(2, 4, seed=6), torch.tensor([0, 4]), torch.tensor([[1], [2]]))
    assert torch.equal(again.z, z)


def test_banks_compute_the_loss_in_float32_under_autocast():
    values = []
    for mixed in (False, True):
        banks = banks_of(64, dim=32)
        arguments = unit(8, 32), unit(8, 32, seed=1), torch.arange(8), torch.arange(8, 40).view(8, 4)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = banks(*arguments)
        assert loss.dtype == torch.float32
        values.append(loss.item())
    assert values[0] == values[1]


# -- negatives ---------------------------------------------------------------------------------------------------------


def test_negatives_are_distinct_images_of_other_classes_drawn_evenly():
    labels = torch.randint(0, 4, (200,), generator=seeded())
    images = NegativeImages(labels, 100)
    target = torch.tensor([0, 1, 2, 3, 3, 0])
    drawn = images.draw(target, seeded(1))
    assert drawn.shape == (6, 100)
    assert not (labels[drawn] == target[:, None]).any()
    assert all(len(set(row)) == 100 for row in drawn.tolist())
    assert set(drawn[3].tolist()) != set(drawn[4].tolist())
    many = torch.cat([images.draw(target[3:4], seeded(seed)).flatten() for seed in range(200)]).bincount(minlength=200)
    allowed = labels != 3
    share = 200 * 100 / int(allowed.sum())  # how often each is drawn on average
    assert many[allowed].min() > 0.6 * share
    assert many[allowed].max() < 1.4 * share


@pytest.mark.parametrize("negatives", [7, 30])
def test_negatives_repeat_when_the_other_classes_have_too_few_images(negatives):
    labels = torch.tensor([2] * 9 + [0] * 2 + [1] * 4)[torch.randperm(15, generator=seeded(3))]
    images = NegativeImages(labels, negatives)
    target = torch.tensor([2, 0, 1, 2])
    drawn = images.draw(target, seeded(1))
    assert not (labels[drawn] == target[:, None]).any()
    distinct = [len(set(row)) for row in drawn.tolist()]
    assert distinct[0] <= 6
    if negatives == 7:
        assert distinct[1:3] == [7, 7]  # classes 0 and 1 have 13 and 11 images of other classes
    drawn = torch.cat([images.draw(target, seeded(seed)) for seed in range(200)])
    many = drawn[0::4].flatten().bincount(minlength=15)
    assert (many > 0).tolist() == (labels != 2).tolist()
    assert many[labels != 2].min() > 0.7 * many.max()


def test_negatives_do_not_depend_on_chunk_size_or_on_skipped_samples(monkeypatch):
    labels = torch.arange(60) % 3
    images = NegativeImages(labels, 10)
    target = torch.tensor([0, 1, 2, 1])
    whole = images.draw(target, seeded(1))
    assert torch.equal(images.draw(target[3:], seeded(1), skip=3), whole[3:])
    monkeypatch.setattr(_negative_images, "AT_ONCE", 120)
    assert torch.equal(images.draw(target, seeded(1)), whole)
    assert torch.equal(images.draw(target[3:], seeded(1), skip=3), whole[3:])
    with pytest.raises(ValueError, match=r"^negatives need images of two classes or more"):
        NegativeImages(torch.zeros(5, dtype=torch.int64), 2)


# -- the task ----------------------------------------------------------------------------------------------------------


def networks(dtype=torch.float32):
    torch.manual_seed(3)
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10)).to(dtype)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 10)).to(dtype)
    return student, teacher


def built(cls=CRD, dtype=torch.float32, **options):
    task = cls(*networks(dtype), 10, input_shape=SHAPE, **{"dim": 8, "negatives": 16, **options})
    return task.to(dtype)


def trainer(**options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return L.Trainer(**{**quiet, "enable_model_summary": False, "max_epochs": 2, "num_sanity_val_steps": 0, **options})


def digits(**options):
    return DigitsDataModule(fake=True, **{"batch_size": 32, "val_fraction": 0.25, **options})


def test_step_terms_equal_contrast_loss_and_cross_entropy():
    class RecordingCRD(CRD):
        def step_loss(self, terms, logits, target):
            self.terms, self.logits = terms, logits
            return super().step_loss(terms, logits, target)

        def draw_negatives(self, batch, batch_idx):
            self.seen = self.index_of(batch), super().draw_negatives(batch, batch_idx), batch
            self.rows = [memory.rows.clone() for memory in (self.banks.student, self.banks.teacher)]
            return self.seen[1]

    task = built(RecordingCRD, kd_weight=0.7, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0).fit(task, digits())
    row, negatives, batch = task.seen
    student, teacher = task.student[:3](batch.image), task.teacher.network[:3](batch.image)
    banks = ContrastBanks(8)
    for memory, rows in zip((banks.student, banks.teacher), task.rows, strict=True):
        memory.rows = rows
    embedded = F.normalize(task.student_embedding(student)), F.normalize(task.teacher_embedding(teacher))
    assert task.terms["kd"].item() == pytest.approx(0.7 * banks(*embedded, row, negatives).item(), rel=1e-5)
    assert task.terms["ce"].item() == pytest.approx(F.cross_entropy(task.logits, batch.target).item(), rel=1e-5)
    assert torch.equal(banks.student.rows, task.banks.student.rows)
    optimized = {id(p) for group in task.configure_optimizers().param_groups for p in group["params"]}
    assert {id(p) for p in [*task.student_embedding.parameters(), *task.teacher_embedding.parameters()]} <= optimized


def test_banks_have_one_row_per_training_sample_of_a_subset():
    task, data = built(), digits(train_per_class=5)
    visited = []
    plain = task.draw_negatives
    task.draw_negatives = lambda batch, k: (visited.append((batch.index, batch.target)), plain(batch, k))[1]
    trainer(max_epochs=1).fit(task, data)
    rows = task.banks.student.rows
    assert len(rows) == data.train_size == 50
    index, target = (torch.cat(column) for column in zip(*visited, strict=True))
    assert rows.norm(dim=1).tolist() == pytest.approx([1] * 50, abs=1e-5)
    assert torch.equal(torch.from_numpy(data.train_indices)[task._row[index]], index)
    assert torch.equal(task._images.labels[task._row[index]], target)


@pytest.mark.parametrize("options", [{}, {"negatives": 400}])
def test_resumes_to_the_bit(tmp_path, options):
    def run(epochs, path=None):
        L.seed_everything(0, verbose=False)
        task, fitting = built(**options), trainer(max_epochs=epochs)
        fitting.fit(task, digits(), ckpt_path=path, weights_only=True)
        return task, fitting

    whole, _ = run(3)
    run(2)[1].save_checkpoint(tmp_path / "two.ckpt")
    again, fitting = run(3, tmp_path / "two.ckpt")
    assert fitting.current_epoch == 3
    state = again.state_dict()
    assert "banks.z" in state
    assert all(torch.equal(value, state[key]) for key, value in whole.state_dict().items())
    for name, memory in whole.memories.items():
        assert torch.equal(memory.rows, again.memories[name].rows), name
    assert whole.banks.z.min() > 0
    held = torch.load(tmp_path / "two.ckpt", weights_only=True)["memories"]
    assert held.keys() == {"student_bank", "teacher_bank"}
    student = CRD.load_from_checkpoint(
        tmp_path / "two.ckpt", student=networks()[0], teacher=networks()[1], weights_only=True
    )
    assert not [key for key in student.exports()["student"].state_dict() if "embedding" in key]


def fitted_on(batch_size, **options):
    L.seed_everything(0, verbose=False)
    task = built(dtype=torch.float64)
    run = trainer(precision="64-true", **options)
    run.fit(task, digits(batch_size=batch_size))
    rows = [memory.rows.tolist() for memory in (task.banks.student, task.banks.teacher)]
    return rows, task.student[1].weight.tolist(), task.banks.z.tolist()


def fitted_on_two():
    return fitted_on(16, strategy="ddp", devices=2)


def test_two_processes_equal_one_with_the_joint_batch():
    rows, weight, z = fitted_on(32)
    for other_rows, other_weight, other_z in on_two_ranks(fitted_on_two):
        np.testing.assert_allclose(other_rows, rows, rtol=0, atol=1e-5)
        np.testing.assert_allclose(other_weight, weight, rtol=0, atol=1e-6)
        assert other_z == pytest.approx(z, rel=1e-6)


def samples(*extra):
    image = torch.randn(24, *SHAPE, generator=seeded(1))
    return DataLoader(TensorDataset(image, torch.arange(24) % 10, *extra), 8, shuffle=True)


def test_plain_dataloader_with_an_index_trains():
    task = built()
    trainer(max_epochs=1).fit(task, samples(torch.arange(24)))
    assert task.banks.student.rows.norm(dim=1).tolist() == pytest.approx([1] * 24, abs=1e-5)


class Pairs(torch.utils.data.Dataset):
    """Holds no array of labels: a label is known only from its sample."""

    def __len__(self):
        return 24

    def __getitem__(self, k):
        return torch.randn(*SHAPE), k % 10, k


def test_wrong_batches_indices_and_arguments_raise():
    with pytest.raises(ValueError, match=r"^CRD stores values for every sample, but the batch has no index"):
        trainer().fit(built(), samples())
    with pytest.raises(ValueError, match=r"^CRD must find the label of each training sample by its index, got a Pairs"):
        trainer().fit(built(), DataLoader(Pairs(), 8))
    with pytest.raises(
        ValueError, match=r"^index must be that of a training sample in use, of 24 in all, got up to 30"
    ):
        trainer().fit(built(), samples(torch.arange(7, 31)))
    task = built()
    task.draw_negatives = lambda batch, k: CRD.draw_negatives(task, batch._replace(target=torch.rand(8, 10)), k)
    with pytest.raises(ValueError, match=r"^target must be int64 \[B\], got torch.float32 \[8, 10\]"):
        trainer().fit(task, samples(torch.arange(24)))
    for bad, message in (
        ({"negatives": 0}, "negatives must be at least 1, got 0"),
        ({"dim": 0}, "dim must be at least 1"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1"),
    ):
        with pytest.raises(ValueError, match=message):
            built(**bad)
