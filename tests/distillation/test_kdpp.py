"""KD++: the ND loss, published weights, class means of the teacher, one step, resuming, two processes, errors."""

import math

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_kd.data import DigitsDataModule
from lightning_kd.distillation import KDPlusPlus, dist_loss, dkd_loss, kd_loss, norm_direction_loss, published_weights
from tests.two_processes import on_two_ranks

SHAPE = (1, 8, 8)
S, T, MEAN = torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
FIRST = torch.tensor([0])


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- the loss ----------------------------------------------------------------------------------------------------------


def test_nd_loss_gives_worked_numbers():
    assert norm_direction_loss(S, T, MEAN, FIRST).item() == pytest.approx(0.8, abs=1e-6)
    assert norm_direction_loss(10 * S, T, MEAN, FIRST).item() == pytest.approx(1 - 1 / math.sqrt(2), abs=1e-6)


def test_nd_loss_equals_a_loop_over_samples():
    student, teacher, mean = random(7, 5), random(7, 5, seed=1), random(3, 5, seed=2)
    student[:3] *= 5
    target = torch.tensor([0, 2, 1, 1, 0, 2, 0])
    plain = 0.0
    for s, t, k in zip(student, teacher, target, strict=True):
        e = mean[k] / mean[k].norm()
        plain += 1 - float(s @ e) / max(float(s.norm()), float(t.norm()))
    assert norm_direction_loss(student, teacher, mean, target).item() == pytest.approx(plain / 7, rel=1e-9)
    scale = torch.tensor([[3.0], [0.1], [7.0]])
    again = norm_direction_loss(student, teacher, scale * mean, target)
    assert again.item() == pytest.approx(plain / 7, rel=1e-9)


def test_nd_loss_falls_with_feature_length_up_to_the_teachers_length():
    losses = [norm_direction_loss(a * S, T, MEAN, FIRST).item() for a in (1.0, 2.0, 3.0, 4.0, 9.0)]
    assert losses[0] > losses[1] + 0.1 > losses[2] + 0.2
    assert losses[3] == pytest.approx(losses[4], abs=1e-6)  # 4 sqrt(2) is longer than 5


def test_nd_gradient_of_short_long_and_equally_long_features():
    student, teacher = random(4, 3).requires_grad_(), 100 * random(4, 3, seed=1)
    mean, target = random(2, 3, seed=2).requires_grad_(), torch.tensor([0, 1, 1, 0])
    norm_direction_loss(student, teacher.requires_grad_(), mean, target).backward()
    e = (mean / mean.norm(dim=1, keepdim=True)).detach()[target]
    torch.testing.assert_close(student.grad, -e / (4 * teacher.detach().norm(dim=1, keepdim=True)))
    assert teacher.grad is None
    assert mean.grad is None
    long = random(4, 3, seed=3).requires_grad_()
    norm_direction_loss(long, 0.001 * teacher.detach(), mean, target).backward()
    assert (long * long.grad).sum(1).abs().max() < 1e-12  # changes the direction, not the length
    assert long.grad.abs().sum() > 0.1
    for equal in (torch.tensor([[3.0, 4.0]]), torch.tensor([[5.0, 0.0]])):  # as long as the teacher's feature
        equal.requires_grad_()
        norm_direction_loss(equal, T, MEAN, FIRST).backward()
        assert (equal * equal.grad).sum().item() == pytest.approx(0, abs=1e-7)


def test_nd_loss_is_0_at_best_2_at_worst_and_finite_for_zero_features():
    for length, expected in ((5.0, 0.0), (9.0, 0.0), (-9.0, 2.0)):
        feature = torch.tensor([[length, 0.0]], requires_grad=True)
        loss = norm_direction_loss(feature, T, MEAN, FIRST)
        loss.backward()
        assert loss.item() == pytest.approx(expected, abs=1e-6)
        assert feature.grad.abs().max() < 1e-6
    nothing = torch.zeros(1, 2, requires_grad=True)
    loss = norm_direction_loss(nothing, torch.zeros(1, 2), MEAN, FIRST)
    loss.backward()
    assert loss.item() == 1
    assert nothing.grad.isfinite().all()
    assert norm_direction_loss(S.half(), T.half(), MEAN.half(), FIRST).dtype == torch.float32


# -- the weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "teacher", "kd", "dkd", "reviewkd", "dist"),
    [
        ("resnet20", "resnet56", (1, 1, 2), (2.5, 4, 3.5), (1, 1.2, 1), (1, 2, 1)),
        ("resnet8x4", "resnet32x4", (1, 3.5, 2), (2, 8, 0.5), (1, 8, 1), (1, 1.5, 4)),
        ("wrn_40_1", "wrn_40_2", (1, 1, 1.5), (1, 6, 1), (1, 5, 4), (1, 2.5, 3)),
        ("mobilenetv2", "resnet50", (1, 3, 0.5), (0.5, 8, 1), (1, 6, 2), (1, 7, 1)),
        ("shufflenetv1", "resnet32x4", (1, 2.5, 1.5), (0.5, 8, 4), (1, 7, 1), (1, 2.5, 3)),
        ("shufflenetv2", "resnet32x4", (1, 4, 0.5), (0.5, 6, 0.5), (1, 8, 1.5), (1, 3, 4)),
    ],
)
def test_published_weights_are_those_of_the_paper(student, teacher, kd, dkd, reviewkd, dist):
    for base, expected in (("kd", kd), ("reviewkd", reviewkd), ("dist", dist)):
        assert published_weights(student, teacher, base)[:3] == expected
    found = published_weights(student, teacher, "dkd")
    assert (found.ce, found.kd) == (1, 1)
    assert (found.alpha, found.beta, found.nd) == dkd


def test_published_weights_of_imagenet_and_defaults_for_other_pairs():
    found = published_weights("torchvision/resnet18", "torchvision/resnet101", "kd")
    assert found[:3] == (1, 3.5, 4)
    assert published_weights("torchvision/resnet18", "torchvision/resnet50", "dkd")[2:] == (2, 0.6, 0.5)
    assert published_weights("vgg8", "vgg13", "dkd") == (1, 1, 1, 1, 6)
    assert published_weights(nn.Linear(2, 2), "resnet56", "kd")[:3] == (1, 1, 1)
    with pytest.raises(ValueError, match="base must be one of kd, dkd, dist, reviewkd, got 'dhkd'"):
        published_weights("resnet20", "resnet56", "dhkd")
    task = KDPlusPlus("resnet20", "resnet56", 100, teacher_weights="random", base="dkd", beta=3.0)
    assert (task.ce_weight, task.kd_weight, task.nd_weight, task.alpha, task.beta) == (1, 1, 3.5, 2.5, 3)
    task = KDPlusPlus("resnet20", "resnet56", 100, teacher_weights="random", kd_weight=0.5)
    assert (task.ce_weight, task.kd_weight, task.nd_weight) == (1, 0.5, 2)


# -- the task ----------------------------------------------------------------------------------------------------------


def networks(dtype=torch.float32, width=12, seed=3):
    torch.manual_seed(seed)
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10)).to(dtype)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10)).to(dtype)
    return student, teacher


def built(cls=KDPlusPlus, dtype=torch.float32, width=12, seed=3, **options):
    return cls(*networks(dtype, width, seed), 10, input_shape=SHAPE, **options).to(dtype)


def trainer(**options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return L.Trainer(**{**quiet, "enable_model_summary": False, "max_epochs": 1, "num_sanity_val_steps": 0, **options})


def digits(**options):
    return DigitsDataModule(fake=True, **{"batch_size": 32, "val_fraction": 0.25, **options})


def means_of(teacher, image, target):
    feature = teacher[:3](image).detach().double()
    return torch.stack([feature[target == k].mean(0) for k in range(10)])


def test_class_means_use_the_training_samples_without_augmentation():
    task, data = built(), digits(train_per_class=6, augment=True)
    trainer(limit_train_batches=1).fit(task, data)
    image, target = data.loader("train", batch_size=1000).__iter__().__next__()[:2]
    assert len(target) == 60
    expected = means_of(task.teacher.network, image, target)
    torch.testing.assert_close(task.class_mean.double(), expected, rtol=1e-5, atol=1e-6)
    augmented = built(augmented_means=True)
    trainer(limit_train_batches=1).fit(augmented, digits(train_per_class=6, augment=True))
    assert not torch.allclose(augmented.class_mean.double(), expected, rtol=1e-3)


@pytest.mark.parametrize("base", ["kd", "dkd", "dist"])
@pytest.mark.parametrize("width", [12, 20])
def test_step_loss_is_the_sum_of_its_weighted_terms(base, width):
    seen = []

    class Recording(KDPlusPlus):
        def step_loss(self, terms, logits, target):
            seen.append((self.current_epoch, {name: term.item() for name, term in terms.items()}))
            return super().step_loss(terms, logits, target)

    generator = torch.Generator().manual_seed(5)
    image, target = torch.randn(40, *SHAPE, generator=generator), torch.arange(40) % 10
    weights = {"ce_weight": 0.5, "kd_weight": 3.0, "nd_weight": 2.0, "alpha": 2.0, "beta": 0.5, "temperature": 3.0}
    options = {**weights, "warmup_epochs": 2, "optimizer": lambda p: torch.optim.SGD(p, lr=0.0)}
    task = built(Recording, width=width, base=base, **options)
    if width == 20:
        task.adapter[1].p = 0.0
    run = trainer(max_epochs=4)
    run.fit(task, DataLoader(TensorDataset(image, target), 40, shuffle=True))
    student, teacher = task.student, task.teacher.network
    logits, taught = student(image), teacher(image)
    kd = {
        "kd": lambda: kd_loss(logits, taught, 3.0),
        "dkd": lambda: dkd_loss(logits, taught, target, 2.0, 0.5, 3.0),
        "dist": lambda: dist_loss(logits, taught, 1.0, 1.0, 3.0),
    }[base]()
    means = means_of(teacher, image, target)
    feature = student[:3](image)
    if width == 20:
        feature = task.adapter[2]((feature - feature.mean(0)) / (feature.var(0, unbiased=False) + 1e-5).sqrt())
        assert not task.adapter[2].bias.any()
    nd = norm_direction_loss(feature, teacher[:3](image), means.float(), target)
    assert [epoch for epoch, _ in seen] == [0, 1, 2, 3]
    for epoch, terms in seen:
        assert terms["ce"] == pytest.approx(0.5 * F.cross_entropy(logits, target).item(), rel=1e-5)
        assert terms["kd"] == pytest.approx(3 * min(1, epoch / 2) * kd.item(), rel=1e-5)
        assert terms["nd"] == pytest.approx(2 * nd.item(), rel=1e-4)
    assert float(run.callback_metrics["train/loss"]) == pytest.approx(sum(seen[-1][1].values()), rel=1e-5)


def test_adapter_trains_and_is_not_exported():
    task = built(width=20)
    before = {name: value.clone() for name, value in task.adapter.named_parameters()}
    assert sorted(before) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    trainer().fit(task, digits())
    assert all(not torch.equal(value, dict(task.adapter.named_parameters())[name]) for name, value in before.items())
    assert task.exports()["student"].state_dict().keys() == networks()[0].state_dict().keys()
    assert not list(built().adapter.parameters())


def test_reviewkd_base_adds_its_loss_and_is_not_exported():
    """The fusion blocks of ReviewKD are in the checkpoint, not in the exported student."""
    seen = {}

    class Recording(KDPlusPlus):
        def step_loss(self, terms, logits, target):
            seen.update(terms)
            return super().step_loss(terms, logits, target)

    L.seed_everything(0, verbose=False)
    options = {"teacher_weights": "random", "base": "reviewkd", "input_shape": SHAPE, "warmup_epochs": 0}
    task = Recording("cnn_tiny", "cnn", 10, kd_weight=3.0, optimizer=lambda p: torch.optim.SGD(p, lr=0.0), **options)
    assert any(key.startswith("review.") for key in task.state_dict())
    assert not [key for key in task.exports()["student"].state_dict() if "review" in key]
    image, target = torch.randn(20, *SHAPE), torch.arange(20) % 10
    trainer().fit(task, DataLoader(TensorDataset(image, target), 20))
    task.train()
    task(image)
    task.teacher_logits(image)
    plain = task.review(task._student_stages.pop(), task._teacher_stages.pop())
    assert plain > 0.1
    assert seen["kd"].item() == pytest.approx(3 * plain.item(), rel=1e-4)
    assert seen["nd"] > 0
    assert KDPlusPlus("cnn_tiny", "cnn", 10, **options).kd_weight == 5


def test_fusion_blocks_of_the_reviewkd_base_train():
    options = {"teacher_weights": "random", "base": "reviewkd", "input_shape": SHAPE, "warmup_epochs": 0}
    task = KDPlusPlus("cnn_tiny", "cnn", 10, **options)
    before = {name: value.clone() for name, value in task.review.named_parameters()}
    assert before
    trainer(limit_train_batches=2, limit_val_batches=0).fit(task, digits())
    assert not [name for name, value in task.review.named_parameters() if torch.equal(value, before[name])]


def test_kd_loss_counts_from_the_first_epoch_without_warm_up():
    task = built(warmup_epochs=0)
    run = trainer(limit_train_batches=1)
    run.fit(task, digits())
    assert run.callback_metrics["train/loss_kd"] > 0


def test_nd_loss_under_bf16_mixed_is_float32_and_close():
    losses = []
    for precision in ("32-true", "bf16-mixed"):
        run = trainer(precision=precision, limit_train_batches=1)
        run.fit(built(width=20), digits())
        assert run.callback_metrics["train/loss_nd"].dtype == torch.float32
        losses.append(float(run.callback_metrics["train/loss_nd"]))
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def resumed(folder, epochs, path=None, **options):
    L.seed_everything(0, verbose=False)
    task, run = built(**{"width": 20, **options}), trainer(max_epochs=epochs)
    run.fit(task, digits(), ckpt_path=path, weights_only=True)
    run.save_checkpoint(folder / f"{epochs}.ckpt")
    return task


def test_resumes_to_the_bit_without_computing_class_means_again(tmp_path, monkeypatch):
    whole = resumed(tmp_path, 3)
    resumed(tmp_path, 2)
    monkeypatch.setattr(KDPlusPlus, "class_means", lambda self: pytest.fail("they are in the checkpoint"))
    again = resumed(tmp_path, 3, tmp_path / "2.ckpt").state_dict()
    assert {"class_mean", "class_mean_teacher"} <= again.keys()
    assert all(torch.equal(value, again[key]) for key, value in whole.state_dict().items())
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"^the class means in the checkpoint are of another teacher than this one"):
        resumed(tmp_path, 3, tmp_path / "2.ckpt", seed=4)
    with pytest.raises(ValueError, match=r"^the checkpoint has class means \[10, 20\], of another .* with \[10, 12\]"):
        resumed(tmp_path, 3, tmp_path / "2.ckpt", width=12)


def test_second_fit_computes_class_means_again():
    task = built()
    trainer(limit_train_batches=1).fit(task, digits(train_per_class=3))
    first = task.class_mean.clone()
    trainer(limit_train_batches=1).fit(task, digits(train_per_class=8))
    assert not torch.allclose(first, task.class_mean)


def test_teacher_fingerprint_depends_on_weights_and_normalisation():
    first, same, other = (built(seed=seed).teacher.fingerprint() for seed in (3, 3, 4))
    assert first == same != other
    assert len(first) == 32
    assert built(dtype=torch.float64).teacher.fingerprint() == first  # float64 of the same values
    assert built(teacher_mean=[0.5], teacher_std=[0.5]).teacher.fingerprint() != first


def fitted_on(batch_size, **options):
    L.seed_everything(0, verbose=False)
    task = built(dtype=torch.float64)
    run = trainer(precision="64-true", max_epochs=2, **options)
    run.fit(task, digits(batch_size=batch_size, train_per_class=16, eval_batch_size=17))
    return task.class_mean.tolist(), task.student[1].weight.tolist()


def fitted_on_two():
    return fitted_on(16, strategy="ddp", devices=2)


def test_two_processes_equal_one_with_the_joint_batch():
    mean, weight = fitted_on(32)
    for found in on_two_ranks(fitted_on_two):
        for ours, theirs in zip((mean, weight), found, strict=True):
            torch.testing.assert_close(torch.tensor(theirs), torch.tensor(ours), rtol=0, atol=1e-6)


def test_missing_classes_wrong_targets_and_arguments_raise():
    image = torch.randn(18, *SHAPE)
    with pytest.raises(ValueError, match=r"^class 9 has no training sample, .* \(1 of 10 classes have none\)"):
        trainer().fit(built(), DataLoader(TensorDataset(image, torch.arange(18) % 9), 6))
    with pytest.raises(ValueError, match=r"^target must be int64"):
        trainer().fit(built(), DataLoader(TensorDataset(image, torch.rand(18, 10)), 6))
    with pytest.raises(ValueError, match=r"^a batch of 1 has no statistics .*: choose a batch_size"):
        trainer().fit(built(width=20), DataLoader(TensorDataset(image[:11], torch.arange(11) % 10), 5))
    for bad, message in (
        ({"base": "dhkd"}, "base must be one of kd, dkd, dist, reviewkd, got 'dhkd'"),
        ({"nd_weight": -1.0}, "nd_weight must be at least 0, got -1.0"),
        ({"alpha": -1.0}, "alpha must be at least 0, got -1.0"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"warmup_epochs": 0.5}, "warmup_epochs must be"),
    ):
        with pytest.raises(ValueError, match=message):
            built(**bad)
    with pytest.raises(ValueError, match=r"^class_mean must be \[C, D\] of 2 classes or more, got \[1, 2\]"):
        norm_direction_loss(S, T, MEAN[:1], FIRST)
