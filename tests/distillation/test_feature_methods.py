"""Methods that compare features: what is trained and saved, one step, two processes, precision, batches of one."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_kd.core.run_callbacks import run_callbacks
from lightning_kd.core.run_folder import RunFolder
from lightning_kd.distillation import (
    AT,
    NST,
    PKT,
    RKD,
    SP,
    FeatureDistillation,
    FitNet,
    Regressor,
    ReviewKD,
    angle_loss,
    attention_loss,
    distance_loss,
    hierarchical_context_loss,
    nst_loss,
    pkt_loss,
    similarity_loss,
)
from tests.distillation.test_modules import SHAPE, digits, trainer
from tests.two_processes import on_two_ranks

METHODS = {"fitnet": FitNet, "at": AT, "nst": NST, "sp": SP, "rkd": RKD, "pkt": PKT, "reviewkd": ReviewKD}
WITH_OWN_MODULES = ("fitnet", "reviewkd")


def build(name, student="cnn_tiny", teacher="cnn", **options):
    if isinstance(teacher, str):
        options["teacher_weights"] = "random"
    return METHODS[name](student, teacher, 10, input_shape=SHAPE, **options)


@pytest.mark.parametrize("name", METHODS)
def test_fit_test_reload(name, tmp_path):
    task = build(name)
    parts = {k: v.clone() for k, v in task.state_dict().items() if not k.startswith("student.")}
    frozen = {k: v.clone() for k, v in task.teacher.network.state_dict().items()}
    assert bool(parts) == (name in WITH_OWN_MODULES)
    optimized = {id(p) for group in task.configure_optimizers().param_groups for p in group["params"]}
    assert optimized == {id(p) for n, p in task.named_parameters() if not n.startswith("teacher.")}
    run = trainer(enable_checkpointing=True, callbacks=run_callbacks(RunFolder(tmp_path)), max_epochs=2)
    run.fit(task, digits())
    assert run.callback_metrics["train/loss_kd"] > 0
    run.test(task, digits(), verbose=False)
    assert all(torch.equal(value, task.teacher.network.state_dict()[key]) for key, value in frozen.items())
    moved = task.state_dict()
    assert all(not torch.equal(value, moved[key]) for key, value in parts.items())
    again = METHODS[name].load_from_checkpoint(tmp_path / "checkpoints/last.ckpt")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in moved.items())
    plain = torch.load(tmp_path / "student.pt", weights_only=True)
    assert plain.keys() == build("at").student.state_dict().keys()


def small_pair(dtype=torch.float64):
    """Networks with two stages, without batch normalisation."""

    def net(width):
        class Net(nn.Sequential):
            feature_stages = ("0", "1", "3")

        conv = [nn.Conv2d(1, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU()]
        return Net(*conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10)).to(dtype)

    torch.manual_seed(3)
    return net(3), net(4)


def maps_of(net, image):
    first = net[1](net[0](image))
    second = net[3](net[2](first))
    return [first, second], second.mean((2, 3))


def loss_by_definition(name, student, teacher):
    """The weighted loss of each method by its definition, from lists of maps and pooled features."""
    (maps, pooled), (other_maps, other) = student, teacher
    pairs = list(zip(maps, other_maps, strict=True))
    return {
        "at": lambda: 1000 * sum(attention_loss(*pair) for pair in pairs),
        "nst": lambda: 50 * sum(nst_loss(*pair) for pair in pairs),
        "sp": lambda: 3000 * similarity_loss(*pairs[-1]),
        "rkd": lambda: 25 * distance_loss(pooled, other) + 50 * angle_loss(pooled, other),
        "pkt": lambda: 30000 * pkt_loss(pooled, other),
    }[name]()


def one_batch(dtype=torch.float64, count=8):
    generator = torch.Generator().manual_seed(5)
    image = torch.randn(count, *SHAPE, generator=generator, dtype=torch.float64)
    return image.to(dtype), torch.randint(0, 10, (count,), generator=generator)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in WITH_OWN_MODULES])
def test_one_step_equals_the_definition(name):
    image, target = one_batch()
    student, teacher = small_pair()
    logits = student(image)
    with torch.no_grad():
        theirs = maps_of(teacher, image)
    loss = F.cross_entropy(logits, target) + loss_by_definition(name, maps_of(student, image), theirs)
    gradients = torch.autograd.grad(loss, list(student.parameters()))
    wanted = [p.detach() - 0.01 * g for p, g in zip(student.parameters(), gradients, strict=True)]
    task = build(name, student, teacher, optimizer=lambda p: torch.optim.SGD(p, lr=0.01)).double()
    run = trainer(precision="64-true")
    run.fit(task, DataLoader(TensorDataset(image, target), 8))
    assert float(run.callback_metrics["train/loss"]) == pytest.approx(loss.item())
    for found, value in zip(student.parameters(), wanted, strict=True):
        torch.testing.assert_close(found.detach(), value)


def loss_at_the_start(name, **options):
    """``train/loss_kd`` at learning rate 0, the initial weights of the method's own modules, both networks' maps."""
    image, target = one_batch()
    task = build(name, *small_pair(), optimizer=lambda p: torch.optim.SGD(p, lr=0.0), **options).double()
    parts = {k: v.clone() for k, v in task.state_dict().items() if k.startswith(("review", "regressor"))}
    run = trainer(precision="64-true")
    run.fit(task, DataLoader(TensorDataset(image, target), 8))
    return float(run.callback_metrics["train/loss_kd"]), parts, (maps_of(net, image) for net in small_pair())


def normalised(x):
    return (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("stage", [1, 2])
def test_fitnet_loss_equals_the_definition(stage):
    found, parts, (student, teacher) = loss_at_the_start("fitnet", hint_stage=stage)
    hint = F.conv2d(student[0][stage - 1], parts["regressor.conv.weight"], parts["regressor.conv.bias"])
    hint = normalised(hint).relu()
    assert found == pytest.approx(100 * (hint - teacher[0][stage - 1]).square().mean().item())


def test_reviewkd_loss_equals_the_definition():
    """From deep to shallow: pooled, second stage, first stage; the teacher's maps before their ReLU."""
    found, parts, ((maps, pooled), _) = loss_at_the_start("reviewkd", warmup_epochs=4)
    net, image = small_pair()[1], one_batch()[0]
    first = net[0](image)
    second = net[2](first.relu())
    targets = [second.relu().mean((2, 3))[..., None, None], second, first]
    sources = [pooled[..., None, None], maps[1], maps[0]]
    total, fused = 0.0, None
    for k, (source, wanted) in enumerate(zip(sources, targets, strict=True)):
        names = {n.removeprefix(f"review.fusions.{k}."): v for n, v in parts.items() if f"fusions.{k}." in n}
        x = normalised(F.conv2d(source, names["conv1.0.weight"]))
        if k:
            up = fused.repeat_interleave(x.shape[2] // fused.shape[2], 2)
            up = up.repeat_interleave(x.shape[3] // fused.shape[3], 3)
            share = F.conv2d(torch.cat([x, up], 1), names["att_conv.0.weight"], names["att_conv.0.bias"]).sigmoid()
            x = x * share[:, 0, None] + up * share[:, 1, None]
        fused = x
        out = normalised(F.conv2d(x, names["conv2.0.weight"], padding=1))
        total += hierarchical_context_loss(out, wanted).item()
    assert found == pytest.approx(5 / 4 * total)  # weight 5, in the first of four warm-up epochs


def test_reviewkd_takes_maps_before_the_activation_and_warms_up():
    task = build("reviewkd", student_preact=True, warmup_epochs=4)
    image = torch.randn(4, *SHAPE)
    student, teacher = (maps(image) for maps in (task.student, task.teacher))
    student, teacher = task.student_features.pop(), task.teacher_features.pop()
    assert all(m.min() < 0 for m in student.before + teacher.before)
    values = []
    for epoch in (0, 1, 3, 9):
        task._trainer = type("T", (L.Trainer,), {"current_epoch": epoch, "__init__": lambda self: None})()
        values.append(task.feature_loss(student, teacher, None).item())
    assert [v / values[-1] for v in values] == pytest.approx([0.25, 0.5, 1.0, 1.0], rel=1e-4)
    bigger = task.review(student._replace(before=tuple(m.square() for m in student.before)), teacher)
    assert bigger.item() != pytest.approx(values[-1], rel=1e-4)


PAIRS = {
    ("shufflenetv1", "resnet32x4"): [64, 128, 256, 256],
    ("mobilenetv2", "vgg13"): [128, 256, 512, 512, 512],
    ("wrn_40_1", "wrn_40_2"): [32, 64, 128, 128],
}


@pytest.mark.parametrize("pair", PAIRS)
def test_published_pairs_have_matching_shapes_and_finite_losses(pair):
    task = ReviewKD(*pair, 100, teacher_weights="random")
    assert [f.conv2[0].out_channels for f in reversed(task.review.fusions)] == PAIRS[pair]
    image = torch.randn(2, 3, 32, 32)
    for network in (task.student, task.teacher):
        network(image)
    student, teacher = task.student_features.pop(), task.teacher_features.pop()
    losses = [task.review(student, teacher), similarity_loss(student.maps[-1], teacher.maps[-1])]
    for ours, theirs in zip(student.maps, teacher.maps, strict=True):
        losses += [attention_loss(ours, theirs), nst_loss(ours, theirs)]
    hint = Regressor(*(features.shapes.maps[1] for features in (task.student_features, task.teacher_features)))
    assert hint(student.maps[1]).shape == teacher.maps[1].shape
    assert all(loss.isfinite() for loss in losses)


class Channels(FeatureDistillation):
    """A new method: its loss alone."""

    def feature_loss(self, student, teacher, target):
        return (student.maps[-1].mean(1) - teacher.maps[-1].mean(1)).square().mean()


def test_new_method_needs_only_feature_loss():
    image, target = one_batch(torch.float32)
    task = Channels(*small_pair(torch.float32), 10, input_shape=SHAPE, kd_weight=2.0)
    run = trainer()
    run.fit(task, DataLoader(TensorDataset(image, target), 4))
    assert run.callback_metrics["train/loss_kd"] > 0


def test_unfitting_stages_and_wrong_arguments_raise():
    with pytest.raises(ValueError, match=r"as many stages, got layer1, layer2, layer3 and 1, 3: name them in"):
        build("at", "cnn_tiny", small_pair(torch.float32)[1])
    task = build("at", "cnn_tiny", small_pair(torch.float32)[1], student_stages=["layer1", "layer3"])
    assert task.student_features.paths == ["layer1", "layer3"]
    with pytest.raises(ValueError, match="hint_stage must be at least 1 and at most 3, got 4"):
        build("fitnet", hint_stage=4)
    headless = nn.Sequential(nn.Conv2d(1, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match="RKD compares what enters the classifier, and the teacher Sequential has no"):
        build("rkd", "cnn_tiny", headless)
    for name, bad in (("reviewkd", {"warmup_epochs": -1}), ("rkd", {"angle_weight": -1.0}), ("at", {"p": 0})):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be at least"):
            build(name, **bad)


@pytest.mark.parametrize("name", ["rkd", "pkt"])
def test_rkd_and_pkt_train_networks_without_feature_maps(name):
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))
    run = trainer(limit_train_batches=2, limit_val_batches=0)
    run.fit(build(name, "mlp_8", teacher), digits())
    assert run.callback_metrics["train/loss_kd"] > 0


@pytest.mark.parametrize("name", METHODS)
def test_last_batch_of_one_trains_and_warns_where_the_loss_is_undefined(name, recwarn):
    image, target = one_batch(torch.float32, count=5)
    task = build(name, *small_pair(torch.float32))
    run = trainer()
    run.fit(task, DataLoader(TensorDataset(image, target), 4))
    assert run.callback_metrics["train/loss"].isfinite()
    said = [w for w in recwarn if "is not defined for a batch of 1 and counts 0 there" in str(w.message)]
    assert bool(said) == (name not in ("at", "nst"))


@pytest.mark.parametrize("name", METHODS)
def test_bf16_mixed_with_accumulation_keeps_finite_float32_weights(name):
    task = build(name)
    run = trainer(precision="bf16-mixed", accumulate_grad_batches=2, limit_train_batches=4, limit_val_batches=0)
    run.fit(task, digits())
    assert run.callback_metrics["train/loss"].isfinite()
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in task.parameters())


def test_reviewkd_trains_with_a_teacher_of_another_image_size():
    task = build("reviewkd", teacher_size=16)
    assert [shape[1] for shape in task.teacher_features.shapes.maps] == [8, 4, 2]
    run = trainer(limit_train_batches=2, limit_val_batches=0)
    run.fit(task, digits())
    assert run.callback_metrics["train/loss"].isfinite()


def test_compiled_networks_give_the_same_training_loss():
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        task = build("at", compile=compiled)
        if compiled:
            for network in task._built:
                network.compile(backend="eager")
        run = trainer(limit_train_batches=2, limit_val_batches=0)
        L.seed_everything(1)
        run.fit(task, digits())
        losses.append(float(run.callback_metrics["train/loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# -- two processes -----------------------------------------------------------------------------------------------------


def fit_one(name, batch_size, networks="small", **options):
    pair = small_pair() if networks == "small" else ("cnn_tiny", "cnn")
    task = build(name, *pair, kd_weight=1.0).double()
    run = trainer(precision="64-true", limit_train_batches=4, **options)
    run.fit(task, digits_of(batch_size))
    return {k: v.tolist() for k, v in task.student.state_dict().items()}


def digits_of(batch_size):
    data = digits()
    data.batch_size = batch_size
    return data


def fit_two(name, batch_size, networks):
    return fit_one(name, batch_size, networks, strategy="ddp", devices=2)


@pytest.mark.parametrize("name", ["at", "nst"])
def test_two_processes_equal_one_with_the_joint_batch(name):
    weights = fit_one(name, 32)
    for other in on_two_ranks(fit_two, name, 16, "small"):
        for key, value in weights.items():
            torch.testing.assert_close(torch.tensor(other[key]), torch.tensor(value), rtol=1e-9, atol=1e-9)


def test_reviewkd_students_are_equal_in_two_processes():
    first, second = on_two_ranks(fit_two, "reviewkd", 16, "named")
    assert first["fc.weight"] == second["fc.weight"]
