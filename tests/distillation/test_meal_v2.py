"""MEAL V2: mean probabilities of several teachers, the discriminator in its three modes, CutMix, SAM, errors."""

import warnings

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_kd import KD, MEALV2, DigitsDataModule
from lightning_kd.cli import get_cli
from lightning_kd.core.teacher import FrozenTeacher
from lightning_kd.distillation.meal_v2 import Discriminator, discriminator_loss, mean_probabilities
from lightning_kd.flatness import SAM

SHAPE = (1, 8, 8)


def trainer(**options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return L.Trainer(**{**quiet, "enable_model_summary": False, "max_epochs": 1, "num_sanity_val_steps": 0, **options})


def linear(seed, hidden=12):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 10)).double()


def samples(target=None):
    image = torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return DataLoader(TensorDataset(image, torch.arange(32) % 10 if target is None else target), 8)


# -- functions -------------------------------------------------------------------------------------------------------


def test_mean_probabilities_averages_after_the_softmax():
    logits = [torch.tensor([row]).log() for row in ([0.8, 0.1, 0.1], [0.2, 0.6, 0.2])]
    mean = mean_probabilities(logits)
    torch.testing.assert_close(mean, torch.tensor([[0.5, 0.35, 0.15]]))
    assert (mean - (logits[0] + logits[1]).div(2).softmax(1)).abs().max() > 0.02  # not the softmax of mean logits
    torch.testing.assert_close(mean_probabilities(logits[:1] * 3), logits[0].exp())  # identical teachers count as one
    assert mean_probabilities([logits[0].half(), logits[1].half()]).dtype == torch.float32
    with pytest.raises(ValueError, match="logits must be those of one teacher or more, got none"):
        mean_probabilities([])
    with pytest.raises(ValueError, match=r"logits\[1\] must be \[1, 3\], got \[1, 2\]"):
        mean_probabilities([logits[0], logits[1][:, :2]])


def identity_discriminator(final_relu=True):
    """A discriminator of identity layers; its last one has the bias (0, -1)."""
    net = Discriminator(2, [2, 2], final_relu)
    with torch.no_grad():
        for layer in (net.fc1, net.fc2, net.fc3):
            layer.weight.copy_(torch.eye(2))
            layer.bias.zero_()
        net.fc3.bias[1] = -1
    return net


@pytest.mark.parametrize(("final_relu", "expected"), [(True, 0.503205), (False, 0.408233)])
def test_discriminator_loss_gives_worked_numbers(final_relu, expected):
    student, teacher = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.0, 2.0]])
    # the student gives (1, 0), without the final ReLU (1, -1), for target (1, 0); the teacher (0, 1) for (0, 1)
    net = identity_discriminator(final_relu)
    assert float(discriminator_loss(net, student, teacher).detach()) == pytest.approx(expected, abs=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert float(discriminator_loss(net, student.bfloat16(), teacher).detach()) == pytest.approx(expected, abs=1e-6)


def test_discriminator_has_the_official_layer_sizes():
    shapes = [tuple(p.shape) for p in Discriminator(1000).parameters()]
    assert shapes == [(125, 1000), (125,), (15, 125), (15,), (2, 15), (2,)]
    assert [tuple(p.shape) for p in Discriminator(10, 16).parameters()][2] == (2, 16)
    assert Discriminator(1000)(torch.randn(4, 1000)).min() >= 0
    for bad, message in ((0, "hidden must be at least 1, got 0"), ([4, 4, 4], "hidden must be the widths of two")):
        with pytest.raises(ValueError, match=message):
            Discriminator(10, bad)


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["none", "cooperative", "adversarial"])
def test_step_equals_its_definition_in_each_discriminator_mode(mode):
    student, expected = linear(0), linear(0)
    task = MEALV2(
        student,
        [linear(1), linear(2, 20)],
        10,
        input_shape=SHAPE,
        discriminator=mode,
        discriminator_hidden=[8, 4],
        final_relu=False,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.5),
    ).double()
    image = next(iter(samples()))[0]
    answers = [one.network(image) for one in task.teachers]
    q = (answers[0].softmax(1) + answers[1].softmax(1)) / 2
    logits = expected(image)
    similarity = -(q * logits.log_softmax(1)).sum(1).mean()
    total, gradients = similarity, torch.autograd.grad(similarity, expected.parameters(), retain_graph=True)
    if mode != "none":
        both = torch.cat([logits, (answers[0] + answers[1]) / 2])
        output = task.discriminator(both)
        target = torch.tensor([[1.0, 0.0]] * 8 + [[0.0, 1.0]] * 8).double()
        loss = F.binary_cross_entropy_with_logits(output, target)
        own = torch.autograd.grad(loss, task.discriminator.parameters(), retain_graph=True)
        moved = [p - 0.5 * g for p, g in zip(task.discriminator.parameters(), own, strict=True)]
        back = torch.autograd.grad(loss, expected.parameters())
        sign = -1 if mode == "adversarial" else 1
        gradients = [a + sign * b for a, b in zip(gradients, back, strict=True)]
        total = similarity + loss
    run = trainer(precision=64, limit_train_batches=1)
    run.fit(task, samples())
    assert float(run.callback_metrics["train/loss"]) == pytest.approx(float(total.detach()))
    for new, old, gradient in zip(student.parameters(), expected.parameters(), gradients, strict=True):
        torch.testing.assert_close(new, old - 0.5 * gradient)
    if mode != "none":  # the discriminator descends in both modes
        for new, expect in zip(task.discriminator.parameters(), moved, strict=True):
            torch.testing.assert_close(new, expect)


def test_similarity_gradient_is_the_difference_of_probabilities():
    logits = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 10, dtype=torch.float64)
    task = MEALV2(linear(0), linear(1), 10, input_shape=SHAPE)
    task.distillation_loss(logits, teacher, torch.zeros(4)).backward()
    torch.testing.assert_close(logits.grad, (logits.softmax(1) - teacher.softmax(1)).detach() / 4)


def test_labels_do_not_change_the_training():
    results = []
    for target in (torch.arange(32) % 10, torch.full((32,), 3), torch.full((32,), -1)):
        student = linear(0)
        trainer(precision=64).fit(MEALV2(student, [linear(1)], 10, input_shape=SHAPE).double(), samples(target))
        results.append(student.state_dict())
    assert all(torch.equal(value, other[key]) for other in results[1:] for key, value in results[0].items())


def test_cutmix_gives_student_and_teachers_the_same_mixed_images():
    seen = {}
    student, teachers = linear(0), [linear(1), linear(2)]
    for name, network in (("student", student), ("a", teachers[0]), ("b", teachers[1])):
        network.register_forward_pre_hook(lambda m, args, name=name: seen.setdefault(name, []).append(args[0]))
    original = next(iter(samples()))[0]
    task = MEALV2(student, teachers, 10, input_shape=SHAPE, cutmix=1.0).double()
    trainer(precision=64, limit_train_batches=1).fit(task, samples())
    assert torch.equal(seen["student"][0], seen["a"][0])
    assert torch.equal(seen["student"][0], seen["b"][0])
    changed = (seen["student"][0] != original).flatten(1)
    assert changed.any()
    # each pixel is that of some image of the batch, at the same place
    same = (seen["student"][0][:, None] == original[None]).flatten(2).any(1)
    assert same.all()
    with pytest.raises(ValueError, match=r"cutmix=0.5 needs images, got input_shape \(64,\)"):
        MEALV2("mlp", "mlp", 10, input_shape=(64,), teacher_weights="random", cutmix=0.5)


def test_both_sam_evaluations_see_the_same_mixed_images():
    seen, student = [], linear(0)
    student.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    options = {"cutmix": 1.0, "optimizer": lambda p: SAM(p, lambda q: torch.optim.SGD(q, lr=0.1))}
    task = MEALV2(student, [linear(1)], 10, input_shape=SHAPE, **options).double()
    trainer(precision=64, limit_train_batches=1).fit(task, samples())
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], next(iter(samples()))[0])


# -- several teachers ------------------------------------------------------------------------------------------------


def test_each_teacher_sees_its_own_size_and_normalisation(tmp_path):
    seen = {}
    data = DigitsDataModule(fake=True, batch_size=32)
    task = MEALV2(
        "cnn_tiny",
        ["cnn", "cnn"],
        10,
        input_shape=SHAPE,
        teacher_weights="random",
        teacher_mean=[None, [0.25]],
        teacher_std=[None, [2.0]],
        teacher_size=[16, None],
    )
    for k, teacher in enumerate(task.teachers):
        teacher.network.register_forward_pre_hook(lambda m, args, k=k: seen.setdefault(k, args[0].clone()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(limit_train_batches=1, limit_val_batches=0).fit(task, data)
    image = next(iter(data.loader("train", shuffle=True, augment=True, batch_size=32))).image
    torch.testing.assert_close(seen[0], F.interpolate(image, (16, 16), mode="bilinear", antialias=True))
    torch.testing.assert_close(seen[1], (image * data.std[0] + data.mean[0] - 0.25) / 2.0)


def test_ensemble_is_frozen_evaluated_as_one_and_not_saved(tmp_path):
    torch.manual_seed(0)
    two = {"teacher": ["cnn", "cnn"], "teacher_weights": "random"}
    task = MEALV2("cnn_tiny", num_classes=10, input_shape=SHAPE, discriminator="cooperative", **two)
    task.train()
    assert all(isinstance(one, FrozenTeacher) and not one.network.training for one in task.teachers)
    assert not [name for name, _ in task.named_parameters() if name.startswith("teacher.")]
    data, run = DigitsDataModule(fake=True, batch_size=32), trainer()
    with pytest.warns(UserWarning, match="MEAL V2 tunes a student that is trained .* student_weights is None"):
        run.fit(task, data)
    (batch,) = data.val_dataloader()
    right = mean_probabilities([one(batch.image) for one in task.teachers]).argmax(1) == batch.target
    assert float(run.callback_metrics["val/teacher_acc"]) == pytest.approx(float(right.double().mean()))
    run.save_checkpoint(tmp_path / "x.ckpt")
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert not [key for key in state if key.startswith("teacher.")]
    assert [key for key in state if key.startswith("discriminator.")]
    again = MEALV2.load_from_checkpoint(tmp_path / "x.ckpt")
    assert len(again.teachers) == 2
    assert list(task.exports()) == ["student"]


def test_command_line_sets_the_options_of_each_teacher():
    base = ["--config", "distillation/meal_v2_digits", "--data.fake", "true", "--model.student_weights", "null"]
    given = ["--model.teacher_size", "[16, null]", "--model.teacher_mean", "[[0.25], null]"]
    given += ["--model.teacher_std", "[[2.0], null]", "--model.discriminator_hidden", "[16, 8]"]
    cli = get_cli(
        [*base, "--model.teacher_weights", "[random, random]", "--model.discriminator", "adversarial", *given]
    )
    first, second = cli.model.teachers
    assert (first.size, first.mean, second.size, second.mean) == ((16, 16), [0.25], None, None)
    assert cli.model.discriminator.fc2.in_features == 16
    one = get_cli([*base, "--model.teacher", "cnn", "--model.teacher_weights", "random"]).model
    assert len(one.teachers) == 1
    with pytest.raises(ValueError, match=r"ce_weight must be 0, as no label is learnt, got 0\.5"):
        get_cli([*base, "--model.teacher_weights", "random", "--model.ce_weight", "0.5"])


def test_wrong_teachers_and_arguments_raise(tmp_path):
    def made(teacher=("cnn", "cnn"), cls=MEALV2, **options):
        return cls("cnn_tiny", list(teacher), 10, input_shape=SHAPE, **{"teacher_weights": "random", **options})

    shared = linear(0)
    torch.save(nn.Linear(3, 3).state_dict(), tmp_path / "other.pt")
    for call, message in (
        (lambda: made(cls=KD), "teacher of KD must be one network, got a list of 2"),
        (lambda: made(teacher=()), "teacher of MEALV2 must be one network, got a list of 0"),
        (lambda: made(teacher_weights=["random"]), "teacher_weights must be one for all 2 teachers or a list of 2"),
        (lambda: made(teacher_weights=["random", None]), "teacher 'cnn' has no weights: set teacher_weights"),
        (lambda: made(teacher_weights=["random", str(tmp_path / "other.pt")]), "do not fit the network"),
        (lambda: made(teacher_mean=[[0.5], [0.5, 0.5]], teacher_std=[1.0]), "teacher_mean needs 1 values"),
        (lambda: made(discriminator="on"), "discriminator must be 'none', 'cooperative' or 'adversarial', got 'on'"),
        (lambda: made(cutmix=1.5), "cutmix must be at least 0 and at most 1, got 1.5"),
        (
            lambda: KD("cnn_tiny", "cnn", 10, input_shape=SHAPE, teacher_weights=["a", "b"]),
            "teacher_weights must be one file for one teacher",
        ),
        (lambda: MEALV2(shared, [linear(1), shared], 10, input_shape=SHAPE), "student and teacher are one module"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="the teacher has 7 classes, the data 10"):
        MEALV2(linear(0), [linear(1), nn.Sequential(nn.Flatten(), nn.Linear(64, 7))], 10, input_shape=SHAPE)


def test_missing_student_weights_file_raises_and_names_the_argument():
    message = r"^student_weights: weights 'runs/none/network.pt': there is no such file; .* fit that run first; null"
    with pytest.raises(FileNotFoundError, match=message):
        MEALV2("mlp_4", "mlp_4", 3, input_shape=(2,), teacher_weights="random", student_weights="runs/none/network.pt")
