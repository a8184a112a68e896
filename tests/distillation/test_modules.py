"""The tasks KD, DKD and DHKD: what is trained, gradients, precision, two processes, checkpoints."""

from functools import partial

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_kd.core import Classification
from lightning_kd.core.run_callbacks import RunRecorder, run_callbacks
from lightning_kd.core.run_folder import RunFolder
from lightning_kd.data import DigitsDataModule
from lightning_kd.distillation import DHKD, DKD, KD, Distillation
from lightning_kd.distillation.dhkd import align_gradients
from lightning_kd.distillation.kd import kd_loss
from tests.distillation.noting_kd import NotingKD
from tests.two_processes import on_two_ranks

SHAPE = (1, 8, 8)
METHODS = {
    "kd": lambda **k: KD("cnn_tiny", "cnn", 10, input_shape=SHAPE, teacher_weights="random", **k),
    "dkd": lambda **k: DKD("cnn_tiny", "cnn", 10, input_shape=SHAPE, teacher_weights="random", **k),
    "dhkd": lambda **k: DHKD("cnn_tiny", "cnn", 10, input_shape=SHAPE, teacher_weights="random", **k),
    "dhkd_aligned": lambda **k: DHKD(
        "cnn_tiny",
        "cnn",
        10,
        input_shape=SHAPE,
        teacher_weights="random",
        gradient_alignment="all",
        auxiliary_head="nonlinear",
        **k,
    ),
    "classification": lambda **k: Classification("cnn_tiny", 10, input_shape=SHAPE, **k),
}


def trainer(**options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return L.Trainer(**{**quiet, "enable_model_summary": False, "max_epochs": 1, "num_sanity_val_steps": 0, **options})


def digits(**options):
    return DigitsDataModule(fake=True, batch_size=32, **options)


def linear_pair(dtype=torch.float64):
    torch.manual_seed(3)
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10)).to(dtype)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).to(dtype)
    return student, teacher


def pairs(dtype=torch.float64, count=32, batch_size=8):
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(count, 1, 8, 8, generator=generator), torch.randint(0, 10, (count,), generator=generator)
    return DataLoader(TensorDataset(x.to(dtype), y), batch_size)


@pytest.mark.parametrize("name", METHODS)
def test_fit_test_reload(name, tmp_path):
    task = METHODS[name]()
    teacher = task.teacher.network if isinstance(task, Distillation) else None
    frozen = {} if teacher is None else {k: v.clone() for k, v in teacher.state_dict().items()}
    before = {k: v.clone() for k, v in task.main_network.state_dict().items()}
    run = trainer(enable_checkpointing=True, callbacks=run_callbacks(RunFolder(tmp_path)), max_epochs=2)
    run.fit(task, digits())
    run.test(task, digits(), verbose=False)
    assert bool(frozen) == isinstance(task, Distillation)
    for key, value in frozen.items():  # running statistics too
        assert torch.equal(value, teacher.state_dict()[key]), key
    moved = task.main_network.state_dict()
    assert all(not torch.equal(before[k], moved[k]) for k in before if "weight" in k)
    last = tmp_path / "checkpoints/last.ckpt"
    state = torch.load(last, weights_only=True)["state_dict"]
    assert not [k for k in state if k.startswith("teacher.")]
    again = type(task).load_from_checkpoint(last)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in state.items())
    assert again.hparams == task.hparams
    name, _ = next(iter(task.exports().items()))
    plain = torch.load(tmp_path / f"{name}.pt", weights_only=True)
    METHODS["classification"]().network.load_state_dict(plain)
    assert not [k for k in plain if "auxiliary" in k]


@pytest.mark.parametrize("name", ["kd", "dhkd"])
def test_teacher_stays_frozen_in_eval_mode_and_out_of_the_optimizer(name):
    task = METHODS[name]()
    task.train()
    assert task.student.training
    assert not any(module.training for module in task.teacher.modules())
    assert not any(p.requires_grad for p in task.teacher.parameters())
    optimized = {id(p) for group in task.configure_optimizers().param_groups for p in group["params"]}
    assert not optimized & {id(p) for p in task.teacher.parameters()}
    assert optimized == {id(p) for n, p in task.named_parameters() if not n.startswith("teacher.")}
    logits = task.teacher_logits(torch.randn(2, *SHAPE))
    assert not logits.requires_grad
    assert not logits.is_inference()


def test_teacher_without_weights_or_with_other_classes_raises(tmp_path):
    with pytest.raises(ValueError, match="teacher 'cnn' has no weights: set teacher_weights"):
        KD("cnn_tiny", "cnn", 10, input_shape=SHAPE)
    with pytest.raises(ValueError, match="the teacher has 7 classes, the data 10"):
        KD("cnn_tiny", nn.Sequential(nn.Flatten(), nn.Linear(64, 7)), 10, input_shape=SHAPE)
    net = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="student and teacher are one module"):
        KD(net, net, 3)
    with pytest.raises(ValueError, match="teacher_mean and teacher_std go together"):
        KD("cnn_tiny", "cnn", 10, input_shape=SHAPE, teacher_weights="random", teacher_mean=[0.5])
    torch.save(Classification("cnn", 7, input_shape=SHAPE).network.state_dict(), tmp_path / "seven.pt")
    with pytest.raises(ValueError, match="7 classes"):
        KD("cnn_tiny", "cnn", 10, input_shape=SHAPE, teacher_weights=str(tmp_path / "seven.pt"))


def test_wrong_arguments_raise():
    for bad, message in (
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"loss": "mse"}, "loss must be one of binary_kl_norm, binary_kl, kd, got 'mse'"),
        ({"heads": 3}, "heads must be one of 1, 2, got 3"),
        ({"gradient_alignment": "some"}, "gradient_alignment must be one of off, all, shared"),
        ({"stop_epoch": 0}, "stop_epoch must be at least 1"),
        ({"lr_interval": "batch"}, "lr_interval must be 'epoch' or 'step'"),
    ):
        with pytest.raises(ValueError, match=message):
            METHODS["dhkd"](**bad)
    with pytest.raises(ValueError, match=r"'a\.B' looks like a class: write class_path"):
        KD("a.B", "cnn", 10, input_shape=SHAPE, teacher_weights="random")


def test_weak_teacher_warns_and_its_accuracy_is_logged_once():
    student, teacher = linear_pair(torch.float32)
    with torch.no_grad():
        teacher[1].bias[3] += 100  # always predicts class 3
    data, task = digits(val_fraction=0.3), NotingKD(student, teacher, 10, input_shape=SHAPE)
    run = trainer(max_epochs=3, limit_train_batches=1)
    with pytest.warns(UserWarning, match="the teacher's validation accuracy is .*chance is 10.0%") as caught:
        run.fit(task, data)
    assert sum("the teacher's validation accuracy" in str(one.message) for one in caught) == 1
    share = float((data.train_target[data.val_indices] == 3).double().mean())
    assert task.teacher_acc == [(0, pytest.approx(share))]
    assert float(run.callback_metrics["val/teacher_acc"]) == pytest.approx(share)


def test_teacher_accuracy_is_not_measured_again_after_resuming(tmp_path):
    run = trainer(enable_checkpointing=True, callbacks=run_callbacks(RunFolder(tmp_path)))
    run.fit(METHODS["kd"](), digits(val_fraction=0.3))
    assert "val/teacher_acc" in run.callback_metrics
    more, last = trainer(max_epochs=2), tmp_path / "checkpoints/last.ckpt"
    more.fit(METHODS["kd"](), digits(val_fraction=0.3), ckpt_path=last, weights_only=True)
    assert "val/acc" in more.callback_metrics
    assert "val/teacher_acc" not in more.callback_metrics


def teacher_accuracy(**options):
    student, teacher = linear_pair()
    with torch.no_grad():
        teacher[1].bias[3] += 100  # always predicts class 3, whose samples are shared unequally between the processes
    run = trainer(precision="64-true", **options)
    run.fit(KD(student, teacher, 10, input_shape=SHAPE).double(), digits())
    return float(run.callback_metrics["val/teacher_acc"])


def teacher_accuracy_on_two():
    return teacher_accuracy(strategy="ddp", devices=2)


def test_teacher_accuracy_counts_the_samples_of_all_processes():
    alone = teacher_accuracy()
    assert 0 < alone < 1
    assert on_two_ranks(teacher_accuracy_on_two) == pytest.approx([alone, alone])


def test_ce_weight_and_kd_weight_scale_their_terms():
    student, teacher = linear_pair()
    loader = pairs(count=8)
    ((image, target),) = loader
    with torch.no_grad():
        ce = 0.5 * F.cross_entropy(student(image), target)
        kd = 3 * kd_loss(student(image), teacher(image), 2.0)
    settings = {"temperature": 2.0, "ce_weight": 0.5, "kd_weight": 3.0, "optimizer": partial(torch.optim.SGD, lr=0.0)}
    run = trainer(precision="64-true")
    run.fit(KD(student, teacher, 10, input_shape=SHAPE, **settings).double(), loader)
    assert float(run.callback_metrics["train/loss_ce"]) == pytest.approx(float(ce))
    assert float(run.callback_metrics["train/loss_kd"]) == pytest.approx(float(kd))


def test_teacher_input_has_its_own_normalisation():
    seen = []
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    teacher[0].register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    data = digits()
    task = KD("cnn_tiny", teacher, 10, input_shape=SHAPE, teacher_mean=[0.25], teacher_std=[2.0])
    trainer(limit_train_batches=1, limit_val_batches=0).fit(task, data)
    loader = data.loader("train", shuffle=True, augment=True, batch_size=32)
    image = next(iter(loader)).image
    raw = image * data.std[0] + data.mean[0]
    torch.testing.assert_close(seen[0], (raw - 0.25) / 2.0)


class Squares(Distillation):
    """A new method: its loss alone."""

    def distillation_loss(self, student_logits, teacher_logits, target):
        return (student_logits - teacher_logits).square().mean()


def test_new_method_needs_only_distillation_loss():
    student, teacher = linear_pair(torch.float32)
    task = Squares(student, teacher, 10, input_shape=SHAPE, kd_weight=2.0)
    run = trainer()
    run.fit(task, pairs(torch.float32), pairs(torch.float32))
    assert run.callback_metrics["train/loss"] == pytest.approx(
        float(run.callback_metrics["train/loss_ce"] + run.callback_metrics["train/loss_kd"]), rel=1e-5
    )


def gradients_of(task):
    """A list for the gradients of each optimizer step, and the hook that fills it."""
    steps = []
    hook = lambda *_: steps.append([None if p.grad is None else p.grad.clone() for p in task.student.parameters()])  # noqa: E731
    return steps, hook


@pytest.mark.parametrize("scope", ["all", "shared"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_alignment_in_training_equals_the_definition(scope, accumulate):
    student, teacher = linear_pair()
    task = DHKD(
        student,
        teacher,
        10,
        input_shape=SHAPE,
        gradient_alignment=scope,
        kd_weight=3.0,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.5),
    ).double()
    weights = {k: v.clone() for k, v in task.state_dict().items()}
    trainer(limit_train_batches=accumulate, accumulate_grad_batches=accumulate, precision=64).fit(task, pairs())
    moved = {k: (weights[k] - v) / 0.5 for k, v in task.state_dict().items() if v.is_floating_point()}

    reference = DHKD(*linear_pair(), 10, input_shape=SHAPE, kd_weight=3.0).double()
    reference.load_state_dict(weights)
    parameters = [p for p in reference.parameters() if p.requires_grad]
    names = [n for n, p in reference.named_parameters() if p.requires_grad]
    ce = kd = 0.0
    for image, target in list(pairs())[:accumulate]:
        logits = reference(image)
        auxiliary = reference.auxiliary_head(reference._feature.pop())
        ce = ce + F.cross_entropy(logits, target) / accumulate
        kd = kd + 3.0 * reference.distillation_loss(auxiliary, reference.teacher_logits(image), target) / accumulate
    g1 = torch.autograd.grad(ce, parameters, retain_graph=True, allow_unused=True)
    g2 = torch.autograd.grad(kd, parameters, allow_unused=True)
    shared = [a is not None and b is not None for a, b in zip(g1, g2, strict=True)]
    assert sum(shared) == 2
    merged = align_gradients(g1, g2, shared if scope == "shared" else None)
    for name, gradient in zip(names, merged, strict=True):
        torch.testing.assert_close(moved[name], gradient, msg=name)


def test_alignment_without_conflict_trains_as_the_plain_sum():
    """While the cosine of both gradients is positive, alignment must change nothing."""
    results = []
    for scope in ("off", "all"):
        student, _ = linear_pair()
        # a teacher whose logits are the targets' one-hot: both objectives pull the same way
        teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
        task = DHKD(
            student,
            teacher,
            10,
            input_shape=SHAPE,
            gradient_alignment=scope,
            loss="kd",
            temperature=1.0,
            kd_weight=1e-3,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.01),
        ).double()
        task.teacher_logits = lambda image: 20.0 * F.one_hot(image.flatten(1)[:, :10].argmax(1), 10).double()
        with torch.no_grad():
            task.auxiliary_head.load_state_dict(task.student[3].state_dict())
        x = torch.randn(32, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        loader = DataLoader(TensorDataset(x, x.flatten(1)[:, :10].argmax(1)), 8)
        run = trainer(precision=64)
        run.fit(task, loader)
        results.append(task.student.state_dict())
        if scope == "all":
            assert run.callback_metrics["train/cosine"] > 0.5
    for key in results[0]:
        torch.testing.assert_close(results[0][key], results[1][key])


def test_dhkd_without_kd_weight_trains_as_plain_classification():
    """Also with stop_epoch=1, where distillation never begins."""
    results = []
    for build in (
        lambda s, t: DHKD(s, t, 10, input_shape=SHAPE, kd_weight=0.0),
        lambda s, t: Classification(s, 10, input_shape=SHAPE),
        lambda s, t: DHKD(s, t, 10, input_shape=SHAPE, stop_epoch=1),
    ):
        task = build(*linear_pair())
        trainer(max_epochs=2, precision=64).fit(task, pairs())
        results.append(task.main_network.state_dict())
    for other in results[1:]:
        for key, value in results[0].items():
            assert torch.equal(value, other[key])


def test_stop_epoch_2_asks_the_teacher_in_the_first_epoch_only():
    task = METHODS["dhkd"](stop_epoch=2, gradient_alignment="all")
    run = trainer(max_epochs=2)
    calls = []
    original = task.teacher_logits
    task.teacher_logits = lambda image: (calls.append(task.current_epoch), original(image))[1]
    task._teacher_judged = True
    run.fit(task, digits())
    assert set(calls) == {0}


def test_dkd_loss_grows_linearly_over_the_warmup_epochs():
    task = METHODS["dkd"](warmup_epochs=4)
    logits = torch.randn(2, 3, 10)
    target = torch.tensor([0, 1, 2])
    values = []
    for epoch in (0, 1, 3, 9):
        fake = L.Trainer.__new__(L.Trainer)
        fake.__class__ = type("T", (), {"current_epoch": epoch})
        task._trainer = fake
        values.append(task.distillation_loss(*logits, target).item())
    assert [v / values[-1] for v in values] == pytest.approx([0.25, 0.5, 1.0, 1.0])


@pytest.mark.parametrize("name", ["classification", "kd", "dhkd_aligned"])
def test_bf16_mixed_accumulation_and_clipping_keep_finite_float32_weights(name):
    task = METHODS[name]()
    run = trainer(precision="bf16-mixed", accumulate_grad_batches=2, gradient_clip_val=0.5)
    run.fit(task, digits())
    assert run.callback_metrics["train/loss"].isfinite()
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in task.parameters())


def test_alignment_is_unchanged_by_a_gradient_scale():
    """16-mixed scales the loss before ``backward``: the merged gradient must be scaled likewise, and no more."""
    grads = []
    for scale in (1.0, 1024.0):
        student, teacher = linear_pair()
        task = DHKD(student, teacher, 10, input_shape=SHAPE, gradient_alignment="all").double()
        run = trainer(limit_train_batches=1, precision=64)
        plain = task.backward
        task.backward = lambda loss, *a, plain=plain, scale=scale, **k: plain(loss * scale, *a, **k)
        steps, hook = gradients_of(task)
        task.on_before_optimizer_step = hook
        run.fit(task, pairs())
        grads.append([g / scale for g in steps[0]])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["kd", "dhkd_aligned"])
def test_compiled_networks_give_the_same_training_loss(name):
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        task = METHODS[name](compile=compiled)
        if compiled:  # the tracing is what is tested, not a C++ compiler
            for network in task._built:
                network.compile(backend="eager")
        run = trainer(limit_train_batches=3)
        L.seed_everything(1)
        run.fit(task, digits())
        losses.append(float(run.callback_metrics["train/loss"]))
        assert not [k for k in task.state_dict() if "_orig_mod" in k]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_channels_last_is_the_default_for_convolutions():
    task = METHODS["kd"]()
    weight = next(p for p in task.student.parameters() if p.ndim == 4 and p.shape[1] > 1)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert task.format_image(torch.randn(2, 3, 4, 4)).is_contiguous(memory_format=torch.channels_last)
    assert KD(*linear_pair(), 10, input_shape=SHAPE).channels_last is False
    assert METHODS["kd"](channels_last=False).format_image(torch.randn(2, 3, 4, 4)).is_contiguous()


def test_alignment_with_a_further_loss_term_raises():
    class Decayed(DHKD):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.student.fc.weight.square().sum()

    task = Decayed("cnn_tiny", "cnn", 10, input_shape=SHAPE, teacher_weights="random", gradient_alignment="all")
    with pytest.raises(RuntimeError, match="the loss has further terms"):
        trainer().fit(task, digits())


def test_validate_before_and_between_fits_measures_the_weights_of_that_time():
    task, data = METHODS["kd"](), digits()
    measured = []
    for _ in range(2):
        (found,) = trainer().validate(task, data, verbose=False)
        measured.append(found)
        before = {key: value.clone() for key, value in task.student.state_dict().items()}
        run = trainer()
        run.fit(task, data)
        assert run.callback_metrics["train/loss"].isfinite()
        assert any(not torch.equal(value, before[key]) for key, value in task.student.state_dict().items())
        measured.append({key: float(run.callback_metrics[key]) for key in ("val/loss", "val/acc")})
    for i in (0, 2):
        assert measured[i]["val/loss"] != pytest.approx(measured[i + 1]["val/loss"], rel=1e-4)
    for key in ("val/loss", "val/acc"):  # unchanged between the first fit and the second validation
        assert measured[2][key] == pytest.approx(measured[1][key], rel=1e-6)
    assert "val/teacher_acc" in measured[0]


def test_wrong_number_of_logits_raises():
    task = Classification(nn.Sequential(nn.Flatten(), nn.Linear(64, 20)), 10, input_shape=SHAPE)
    with pytest.raises(ValueError, match=r"Sequential gives \[32, 20\], expected \[B, 10\]"):
        trainer(limit_val_batches=0).fit(task, digits())


def test_checkpoint_stores_paths_and_numpy_numbers_as_plain_values(tmp_path):
    torch.save(Classification("cnn", 10, input_shape=SHAPE).network.state_dict(), tmp_path / "t.pt")
    task = KD(
        "cnn_tiny",
        "cnn",
        10,
        input_shape=torch.Size(SHAPE),
        teacher_weights=tmp_path / "t.pt",
        temperature=np.float64(3),
        optimizer=lambda p: torch.optim.Adam(p),
    )
    run = trainer(limit_train_batches=1)
    run.fit(task, digits())
    run.save_checkpoint(tmp_path / "x.ckpt")
    again = KD.load_from_checkpoint(tmp_path / "x.ckpt")
    assert again.temperature == 3
    assert again.hparams["teacher_weights"] == str(tmp_path / "t.pt")


def test_predict_accepts_a_plain_dataloader():
    outputs = trainer().predict(METHODS["classification"](), pairs(torch.float32))
    assert sum(len(part["prediction"]) for part in outputs) == 32


# -- two processes -----------------------------------------------------------------------------------------------------


def build_for_ranks(name, scope="all"):
    student, teacher = linear_pair()
    if name == "kd":
        return KD(student, teacher, 10, input_shape=SHAPE).double()
    if name == "dkd":
        return DKD(student, teacher, 10, input_shape=SHAPE).double()
    return DHKD(student, teacher, 10, input_shape=SHAPE, gradient_alignment=scope, stop_epoch=3).double()


def fit_one(name, batch_size, scope="all", **options):
    data = DigitsDataModule(fake=True, batch_size=batch_size)
    task = build_for_ranks(name, scope)
    run = trainer(max_epochs=3, precision=64, gradient_clip_val=1.0, **options)
    run.fit(task, data)
    metrics = {k: float(v) for k, v in run.callback_metrics.items()}
    return {k: v.tolist() for k, v in task.student.state_dict().items()}, metrics


def fit_two(name, batch_size, scope):
    return fit_one(name, batch_size, scope, strategy="ddp", devices=2)


@pytest.mark.parametrize(
    ("name", "scope"), [("kd", "off"), ("dkd", "off"), ("dhkd", "off"), ("dhkd", "all"), ("dhkd", "shared")]
)
def test_two_processes_equal_one_with_the_joint_batch(name, scope):
    weights, metrics = fit_one(name, 32, scope)
    answers = on_two_ranks(fit_two, name, 16, scope)
    for other, their_metrics in answers:
        for key, value in weights.items():
            torch.testing.assert_close(torch.tensor(other[key]), torch.tensor(value), rtol=1e-9, atol=1e-9)
        for key in ("val/acc", "val/loss", "val/teacher_acc", "train/loss", "train/acc"):
            if key in metrics:
                assert their_metrics[key] == pytest.approx(metrics[key], rel=1e-5), key


def predict_two(folder):
    data, task = DigitsDataModule(fake=True, eval_batch_size=7), METHODS["kd"]()
    run = trainer(strategy="ddp", devices=2, callbacks=[RunRecorder(RunFolder(folder))])
    run.predict(task, data, return_predictions=False)
    return data.test_size


def test_predictions_of_two_processes_are_complete(tmp_path):
    sizes = on_two_ranks(predict_two, str(tmp_path))
    lines = (tmp_path / "predictions.csv").read_text().splitlines()[1:]
    assert [int(line.split(",")[0]) for line in lines] == list(range(sizes[0]))


@pytest.mark.parametrize("name", ["kd", "dkd", "dhkd"])
def test_step_gets_teacher_logits_from_teacher_logits_for_alone(name, monkeypatch):
    asked = []

    def logits(task, batch):
        asked.append(batch.index.clone())
        return torch.zeros(len(batch.target), 10)

    monkeypatch.setattr(Distillation, "teacher_logits_for", logits)
    monkeypatch.setattr(Distillation, "teacher_logits", lambda *_: pytest.fail("the teacher was run"))
    trainer(limit_train_batches=2, limit_val_batches=0).fit(METHODS[name](), digits())
    assert [len(index) for index in asked] == [32, 32]
