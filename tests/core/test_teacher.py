"""The frozen teacher gives logits, and stays out of checkpoints, optimizers and train mode."""

import copy
import os

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_kd import KD, DigitsDataModule
from lightning_kd.core.problems import Segmentation, SingleLabel
from lightning_kd.core.teacher import FrozenTeacher
from tests.two_processes import on_two_ranks


class Holder(nn.Module):
    """A module with a teacher, as a user would write one; nothing in it knows about checkpoints."""

    def __init__(self, **options):
        super().__init__()
        self.student = nn.Linear(4, 3)
        body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 3))
        self.teacher = FrozenTeacher(body, SingleLabel(3), **options)


def test_teacher_gives_logits_in_eval_mode_without_gradient():
    holder = Holder().train()
    assert holder.student.training
    assert not any(module.training for module in holder.teacher.modules())
    assert [name for name, p in holder.named_parameters() if p.requires_grad] == ["student.weight", "student.bias"]
    image = torch.randn(5, 4, requires_grad=True)
    before = copy.deepcopy(holder.teacher.network.state_dict())
    logits = holder.teacher(image)
    assert torch.equal(logits, holder.teacher(image))  # no dropout, no batch statistics
    assert not logits.requires_grad
    assert not logits.is_inference()
    after = holder.teacher.network.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize("wrap", [lambda m: m, copy.deepcopy, torch.optim.swa_utils.AveragedModel])
def test_teacher_is_in_no_state_dict_and_loading_leaves_it_unchanged(wrap):
    one, other = wrap(Holder()), wrap(Holder())
    state = one.state_dict()
    assert not [key for key in state if "teacher" in key]
    assert [key for key in state if key.endswith("student.weight")]
    network = next(m for m in other.modules() if isinstance(m, FrozenTeacher)).network
    teacher = copy.deepcopy(network.state_dict())
    other.load_state_dict(state)  # strictly
    kept = network.state_dict()
    assert teacher
    assert all(torch.equal(value, kept[key]) for key, value in teacher.items())
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in state.items())
    with pytest.raises(RuntimeError, match=r"student\.bias"):  # any other missing key still raises
        other.load_state_dict({key: value for key, value in state.items() if not key.endswith("student.bias")})


def test_images_are_resized_and_renormalised_for_the_teacher():
    seen = []
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 4, 2))
    network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    teacher = FrozenTeacher(network, SingleLabel(2), mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 4.0], size=(6, 4))
    teacher.set_data_normalisation([0.5, 0.5, 0.5], [0.25, 0.25, 0.25])
    raw = torch.rand(2, 3, 12, 8)
    teacher((raw - 0.5) / 0.25)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1)
    whole = (raw - mean) / std
    torch.testing.assert_close(seen[0], F.interpolate(whole, (6, 4), mode="bilinear", antialias=True))
    # at half the size, antialiasing weights four neighbours by 1, 3, 3, 1 where they are all inside
    weight = torch.tensor([1.0, 3, 3, 1]) / 8
    kernel = torch.outer(weight, weight).expand(3, 1, 4, 4)
    torch.testing.assert_close(seen[0][..., 1:-1, 1:-1], F.conv2d(whole[..., 1:-1, 1:-1], kernel, stride=2, groups=3))


@pytest.mark.parametrize("size", [0, (4,), (4, 4, 4), (4.5, 4), "8"])
def test_wrong_teacher_sizes_raise(size):
    with pytest.raises(ValueError, match="teacher_size must be a whole number above 0, or"):
        FrozenTeacher(nn.Linear(4, 3), SingleLabel(3), size=size)


def test_teacher_size_sets_the_size_of_the_teachers_images():
    class Larger(nn.Sequential):
        def forward(self, image):
            assert image.shape[1:] == (1, 16, 16)
            return super().forward(image)

    task = KD(
        "cnn_tiny",
        Larger(nn.Flatten(), nn.Linear(256, 10)),
        num_classes=10,
        input_shape=(1, 8, 8),
        teacher_size=16,
    )
    fit(task, max_epochs=1)
    named = KD("cnn_tiny", "mlp_8", 10, input_shape=(1, 8, 8), teacher_weights="random", teacher_size=[16, 12])
    assert next(m for m in named.teacher.modules() if isinstance(m, nn.Linear)).in_features == 16 * 12


def fit(task, ckpt_path=None, **options):
    defaults = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 2}
    quiet = {"enable_model_summary": False, "accelerator": "cpu", "limit_train_batches": 3, "limit_val_batches": 1}
    trainer = L.Trainer(**{**defaults, **quiet, **options})
    trainer.fit(task, DigitsDataModule(fake=True, batch_size=16), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def distilling(**options):
    L.seed_everything(0, verbose=False)
    return KD("cnn_tiny", "cnn", 10, input_shape=(1, 8, 8), teacher_weights="random", **options)


@pytest.mark.parametrize("averaged", [False, True])
def test_resume_without_the_teacher_in_the_checkpoint_is_exact(tmp_path, averaged):
    def callbacks(folder):
        keep = ModelCheckpoint(tmp_path / folder, "{epoch}", save_top_k=-1)
        return [EMAWeightAveraging(decay=0.5), keep] if averaged else [keep]

    whole, again = distilling(), distilling()
    fit(whole, callbacks=callbacks("whole"), enable_checkpointing=True)
    saved = torch.load(tmp_path / "whole/epoch=0.ckpt", weights_only=True)
    parts = ("state_dict", "current_model_state") if averaged else ("state_dict",)
    assert not [key for part in parts for key in saved[part] if "teacher" in key]
    trainer = fit(again, tmp_path / "whole/epoch=0.ckpt", callbacks=callbacks("again"), enable_checkpointing=True)
    assert not (tmp_path / "again/epoch=0.ckpt").exists()
    assert trainer.current_epoch == 2
    for key, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def fit_in_two_processes(folder):
    task = distilling()
    trainer = fit(task, strategy="ddp", devices=2)
    trainer.save_checkpoint(f"{folder}/two.ckpt")
    state = torch.load(f"{folder}/two.ckpt", weights_only=True)["state_dict"]
    return [key for key in state if "teacher" in key], [float(v.double().sum()) for v in task.state_dict().values()]


def test_two_processes_agree_and_save_no_teacher(tmp_path):
    one, other = on_two_ranks(fit_in_two_processes, str(tmp_path))
    assert one == other
    assert one[0] == []


def test_compiled_teacher_is_in_no_state_dict():
    options = {"teacher_weights": "random", "input_shape": (1, 8, 8), "compile": True}
    tasks = [KD("cnn_tiny", "cnn_tiny", 10, **options) for _ in range(2)]
    for task in tasks:
        task._trainer = L.Trainer(logger=False, barebones=True)
        task.setup("fit")
        assert task.teacher.network._compiled_call_impl is not None
    state = tasks[0].state_dict()
    assert state
    assert not [key for key in state if "teacher" in key or "_orig_mod" in key]
    teacher = {key: value.clone() for key, value in tasks[1].teacher.network.state_dict().items()}
    tasks[1].load_state_dict(state)
    assert all(torch.equal(value, tasks[1].state_dict()[key]) for key, value in state.items())
    assert all(torch.equal(value, tasks[1].teacher.network.state_dict()[key]) for key, value in teacher.items())


class TrainEverything(L.Callback):
    """Puts every module, those of the teacher too, into train mode before each batch."""

    def on_train_batch_start(self, trainer, pl_module, *args):
        pl_module.apply(lambda module: module.train())
        for module in [*pl_module.modules(), *pl_module.teacher.network.modules()]:
            module.train()
        assert any(module.training for module in pl_module.teacher.network.modules())


def averaging():
    return StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1, device=None)


@pytest.mark.parametrize("callback", [TrainEverything, averaging, lambda: EMAWeightAveraging(use_buffers=True)])
def test_callbacks_leave_the_teacher_unchanged(callback):
    L.seed_everything(0, verbose=False)
    body = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(512, 10)
    )
    body[1].running_mean.uniform_()
    body[1].running_var.uniform_(1, 2)
    task = KD("cnn_tiny", body, 10, input_shape=(1, 8, 8))
    image = torch.rand(16, 1, 8, 8)
    before, answer = copy.deepcopy(body.state_dict()), task.teacher_logits(image)
    student = copy.deepcopy(task.student.state_dict())
    fit(task, callbacks=[callback()], max_epochs=3)
    assert not all(value.equal(task.student.state_dict()[key]) for key, value in student.items())
    assert all(value.equal(body.state_dict()[key]) for key, value in before.items())
    assert task.teacher_logits(image).equal(answer)
    assert not any(module.training for module in body.modules())


def test_copied_teacher_stays_in_eval_mode_and_is_cast_with_its_holder():
    holder = Holder()
    for one in (holder, copy.deepcopy(holder)):
        one.teacher.network.train()
        one.teacher.network[1].weight.data.fill_(2.0)
        image = torch.randn(5, 4)
        assert one.teacher(image).equal(one.teacher(image))
        assert not one.teacher.network.training
        assert one.double().teacher.network[0].weight.dtype == torch.float64
        assert one.teacher(image.double()).dtype == torch.float64
        assert not [name for name, _ in one.named_modules() if name.startswith("teacher.")]
        assert [*one.teacher.modules()][1:] == [*one.teacher.network.modules()]
        assert len([*one.teacher.parameters()]) == 6


class Squeezed(nn.Module):
    """A segmentation network with a linear layer that is not its head."""

    def __init__(self, classes):
        super().__init__()
        self.stem, self.gate, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 8), nn.Conv2d(8, classes, 1)

    def forward(self, image):
        feature = self.stem(image)
        return self.head(feature * self.gate(feature.mean((2, 3))).sigmoid()[..., None, None])


def test_inner_linear_layer_is_not_taken_for_the_classifier():
    teacher = FrozenTeacher(Squeezed(3), Segmentation(3))
    assert teacher(torch.zeros(2, 3, 4, 4)).shape == (2, 3, 4, 4)
    pooled = FrozenTeacher(nn.Sequential(Squeezed(3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), SingleLabel(3))
    assert pooled(torch.zeros(2, 3, 4, 4)).shape == (2, 3)
    with pytest.raises(ValueError, match="the teacher has 5 classes, the data 3"):
        FrozenTeacher(nn.Sequential(nn.Flatten(), nn.Linear(8, 5)), SingleLabel(3))


class Projecting(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.projection = nn.Linear(4, 3), nn.Linear(4, 128)

    def forward(self, image):
        return self.fc(image), self.projection(image)


def test_projection_beside_the_head_is_not_taken_for_the_head():
    assert FrozenTeacher(Projecting(), SingleLabel(3))(torch.zeros(2, 4)).shape == (2, 3)


class Stream(IterableDataset):
    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)


def _teacher_of_a_rank():
    task = KD(nn.Linear(4, 3), nn.Linear(4, 3), 3, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    rank = int(os.environ["LOCAL_RANK"])
    rows = torch.arange(8.0).repeat(4, 1).T[:, :4] if rank else torch.zeros(0, 4)
    loader = DataLoader(Stream([(row, k % 3) for k, row in enumerate(rows)]), batch_size=4)
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, use_distributed_sampler=False,
    )  # fmt: skip
    return "val/teacher_acc" in trainer.validate(task, loader, verbose=False)[0]


def test_validation_does_not_hang_where_a_process_has_no_batch():
    assert on_two_ranks(_teacher_of_a_rank) == [True, True]
