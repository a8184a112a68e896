"""Each kind of problem: its targets, losses, metrics and errors."""

import copy
import math
import os

import lightning as L
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, jaccard_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassJaccardIndex, MultilabelF1Score

from lightning_kd.core import (
    Classification,
    MultiLabel,
    MultiLabelClassification,
    Segmentation,
    SingleLabel,
    Supervised,
)
from lightning_kd.core.multilabel_metrics import MultiLabelMetric, average_precision, f1_of_counts
from lightning_kd.core.outputs import auxiliary_logits
from lightning_kd.core.segmentation_metrics import SegmentationMetric
from lightning_kd.core.training_watch import TrainingWatch
from lightning_kd.data import ArrayDataModule
from lightning_kd.distillation import KD, Distillation
from lightning_kd.nets import build_network
from lightning_kd.noisy_labels import CrossEntropy
from tests.test_fourth_problem import Regression
from tests.two_processes import on_two_ranks


def labels(seed=0, count=60, classes=5, decimals=None):
    generator = np.random.default_rng(seed)
    scores = generator.random((count, classes)).astype(np.float32)
    if decimals is not None:
        scores = scores.round(decimals)  # ties
    return torch.from_numpy(scores), torch.from_numpy((generator.random((count, classes)) < 0.3).astype(np.float32))


@pytest.mark.parametrize(
    ("scores", "label", "expected"),
    [
        ([0.9, 0.8, 0.7, 0.6, 0.5], [1, 0, 1, 0, 1], 0.755556),
        ([0.5, 0.5, 0.5], [1, 0, 0], 1 / 3),
        ([0.5, 0.5, 0.5], [0, 0, 1], 1 / 3),
        ([0.9, 0.8, 0.1], [1, 1, 0], 1.0),
        ([0.9, 0.8, 0.1, 0.05], [0, 0, 0, 1], 0.25),
    ],
)
def test_average_precision_worked_numbers(scores, label, expected):
    found = average_precision(torch.tensor(scores)[:, None], torch.tensor(label)[:, None])
    assert found.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("decimals", [None, 1])
def test_average_precision_equals_scikit_learn(decimals):
    scores, target = labels(decimals=decimals)
    expected = [average_precision_score(target[:, c], scores[:, c]) for c in range(5)]
    np.testing.assert_allclose(average_precision(scores, target), expected, rtol=1e-9)
    known = torch.rand(60, 5, generator=torch.Generator().manual_seed(1)) < 0.7
    partly = target.masked_fill(~known, -1)
    expected = [average_precision_score(target[k, c], scores[k, c]) for c, k in enumerate(known.T)]
    np.testing.assert_allclose(average_precision(scores, partly), expected, rtol=1e-9)


def test_multi_label_metrics_equal_references():
    scores, target = labels()
    target[:, 3] = 0  # no positive: left out of map and of the mean recall
    metric = MultiLabelMetric(5)
    for part in torch.arange(60).split(7):
        metric.update(scores[part], target[part])
    found = metric.compute()
    expected = np.mean([average_precision_score(target[:, c], scores[:, c]) for c in (0, 1, 2, 4)])
    assert found["map"] == pytest.approx(expected, rel=1e-9)
    assert found["absent_classes"] == 1
    micro = MultilabelF1Score(5, average="micro")(scores, target.int())
    assert found["of1"] == pytest.approx(float(micro), abs=1e-6)
    predicted = scores >= 0.5
    hits = (predicted & (target == 1)).sum(0).double()
    precision, recall = (hits / predicted.sum(0)).mean(), (hits / target.sum(0))[[0, 1, 2, 4]].mean()
    assert found["cf1"] == pytest.approx(float(2 * precision * recall / (precision + recall)), rel=1e-9)


def test_saturated_probabilities_are_ranked_by_their_logits():
    """In float32 the probabilities of the first three are all 1."""
    problem = MultiLabel(1)
    logits, target = torch.tensor([[18.0], [20.0], [19.0], [-1.0]]), torch.tensor([[0.0], [1.0], [1.0], [0.0]])
    metrics = problem.metrics()
    problem.update_metrics(metrics, logits, problem.probabilities(logits), target)
    found = metrics["labels"].compute()
    assert found["map"] == pytest.approx(1.0)
    assert found["of1"] == pytest.approx(0.8)  # three labels predicted, two of them right
    with pytest.raises(TypeError, match="takes no label_smoothing"):
        problem.loss(logits, target, label_smoothing=0.1)


def test_f1_leaves_out_classes_that_were_never_predicted():
    cf1, of1 = f1_of_counts(torch.tensor([2, 0]), torch.tensor([4, 0]), torch.tensor([2, 2]))
    assert cf1 == pytest.approx(0.5)  # precision 0.5 of one class, recall (1 + 0) / 2
    assert of1 == pytest.approx(0.5)
    assert f1_of_counts(torch.zeros(2), torch.zeros(2), torch.zeros(2)) == (0.0, 0.0)


def masks(seed=0, classes=4, shape=(6, 8, 9)):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, classes - 1, shape, generator=generator)  # the last class occurs in no target
    prediction = torch.where(torch.rand(shape, generator=generator) < 0.6, target, (target + 1) % (classes - 1))
    return prediction, target.masked_fill(torch.rand(shape, generator=generator) < 0.2, -1)


def test_segmentation_metrics_equal_references():
    prediction, target = masks()
    metric = SegmentationMetric(4)
    for part in (slice(0, 2), slice(2, 6)):
        metric.update(prediction[part], target[part])
    found = metric.compute()
    known = target >= 0
    assert found["miou"] == pytest.approx(
        jaccard_score(target[known], prediction[known], average="macro", labels=[0, 1, 2]), rel=1e-9
    )
    reference = MulticlassJaccardIndex(4, ignore_index=-1)(prediction, target)
    assert found["miou"] == pytest.approx(float(reference), rel=1e-5)
    assert found["pixel_acc"] == pytest.approx(float((prediction == target)[known].float().mean()), rel=1e-5)


def _metrics_of_a_rank():
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    scores, target = labels()
    prediction, mask = masks()
    several, pixels = MultiLabelMetric(5), SegmentationMetric(4)
    mine = slice(0, 41) if rank == 0 else slice(41, 60)  # uneven shares
    several.update(scores[mine], target[mine])
    mine = slice(0, 4) if rank == 0 else slice(4, 6)
    pixels.update(prediction[mine], mask[mine])
    return several.compute(), pixels.compute()


def test_metrics_of_two_processes_equal_those_of_one():
    whole = (MultiLabelMetric(5), SegmentationMetric(4))
    whole[0].update(*labels())
    whole[1].update(*masks())
    expected = tuple(metric.compute() for metric in whole)
    for found in on_two_ranks(_metrics_of_a_rank):
        for mine, theirs in zip(found, expected, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-9)


def test_losses_ignore_missing_labels():
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([[1.0, 0, -1], [0, 0, 1], [-1, -1, -1], [1, 1, 0]])
    problem = MultiLabel(3)
    known = target >= 0
    expected = F.binary_cross_entropy_with_logits(logits[known], target[known])
    torch.testing.assert_close(problem.loss(logits, target), expected)
    torch.testing.assert_close(problem.loss_of_probabilities(logits.sigmoid(), target), expected, rtol=1e-4, atol=1e-5)
    assert problem.loss(logits[2:3], target[2:3]) == 0
    pixels = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    mask = torch.randint(-1, 3, (2, 4, 5), generator=torch.Generator().manual_seed(2))
    problem = Segmentation(3)
    torch.testing.assert_close(problem.loss(pixels, mask), F.cross_entropy(pixels, mask, ignore_index=-1))
    assert problem.loss(pixels, torch.full_like(mask, -1)) == 0


def test_segmentation_logits_are_resized_to_the_image():
    problem = Segmentation(3)
    small = torch.randn(2, 3, 4, 4)
    found = problem.logits({"out": small}, torch.zeros(2, 3, 8, 8), nn.Identity())
    torch.testing.assert_close(found, F.interpolate(small, (8, 8), mode="bilinear", align_corners=False))
    with pytest.raises(ValueError, match=r"Identity gives \[2, 3\], expected \[B, 3, h, w\]"):
        problem.logits(torch.zeros(2, 3), torch.zeros(2, 3, 8, 8), nn.Identity())


@pytest.mark.parametrize(
    ("problem", "target", "message"),
    [
        (SingleLabel(3), torch.tensor([0, 3]), "between 0 and 2, got 0 to 3"),
        (SingleLabel(3), torch.zeros(2, 3), r"int64 \[B\].*one class for each image"),
        (SingleLabel(3), torch.zeros(2, 1), r"take target.squeeze\(1\).long\(\)"),
        (SingleLabel(3), torch.tensor([0.3, 1.5]), r"from training_target"),
        (Segmentation(3), torch.zeros(2, 1, 4, 4), r"take target.squeeze\(1\).long\(\)"),
        (SingleLabel(3), torch.zeros(2), r"take target.long\(\)"),
        (SingleLabel(3), torch.tensor([1, 3, 2]), "got 1 to 3: count classes from 0"),
        (SingleLabel(3), torch.tensor([1, -1, 2]), "leave out samples without a label"),
        (SingleLabel(3), torch.tensor([-1, 5]), "got -1 to 5: correct labels or num_classes"),
        (Segmentation(3), torch.tensor([[[-1, 255]]]), "got -1 to 255: give ignored pixels as -1, not as 255"),
        (MultiLabel(3), torch.tensor([[1, 255, 0]], dtype=torch.uint8), "must hold 1, 0 and -1"),
        (MultiLabel(3), torch.tensor([[0.0, 2, 1]]), "must hold 1, 0 and -1"),
        (MultiLabel(3), torch.zeros(2, 4), r"\[B, 3\]"),
        (Segmentation(3), torch.full((1, 2, 2), 3), "between -1 and 2"),
        (Segmentation(3), torch.zeros(2, dtype=torch.int64), r"int64 \[B, H, W\]"),
    ],
)
def test_wrong_targets_raise(problem, target, message):
    with pytest.raises(ValueError, match=message):
        problem.check_target(target)


@pytest.mark.parametrize("problem", [SingleLabel, MultiLabel, Segmentation])
def test_too_few_classes_raise(problem):
    with pytest.raises(ValueError, match="num_classes must be at least"):
        problem(0)


def test_numpy_integer_is_a_valid_num_classes_and_a_fraction_raises():
    problem = MultiLabel(np.int64(3))
    assert type(problem.num_classes) is int
    with pytest.raises(ValueError, match=r"a whole number, got 2\.5"):
        SingleLabel(2.5)


class OnGPU:
    """A target on the CPU that names a GPU as its device."""

    device = torch.device("cuda")

    def __init__(self, target):
        self.target = target

    def __getattr__(self, name):
        return getattr(self.target, name)

    def __eq__(self, other):
        return self.target == other

    __hash__ = None


@pytest.mark.parametrize(
    ("problem", "target"),
    [
        (SingleLabel(3), torch.tensor([0, 255])),
        (MultiLabel(3), torch.tensor([[0.0, 255, 1]])),
        (Segmentation(3), torch.full((1, 2, 2), 255)),
    ],
)
def test_targets_on_a_gpu_are_checked_too(problem, target):
    with pytest.raises(ValueError, match="255"):
        problem.check_target(OnGPU(target))


class CheckCounter(SingleLabel):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.checked = 0

    def check_target(self, target):
        self.checked += 1


def test_each_batch_is_checked_on_a_cpu_and_the_first_elsewhere():
    task = Classification(nn.Linear(4, 3), 3)
    task.problem = CheckCounter(3)
    trainer, watch = L.Trainer(accelerator="cpu", barebones=True), TrainingWatch()
    for device, expected in (("cpu", 5), ("meta", 1)):
        watch.on_train_start(trainer, task)
        task.problem.checked = 0
        for step in range(5):
            batch = (torch.zeros(2, 4, device=device), torch.zeros(2, dtype=torch.int64, device=device))
            watch.on_train_batch_start(trainer, task, batch, step % 2)  # two epochs and a half
        assert task.problem.checked == expected


@pytest.mark.parametrize("later", [False, True])
def test_wrong_labels_of_a_plain_loader_raise_in_training(later):
    target = torch.tensor([0, 1, 2, 0] * 2)
    target[6 if later else 0] = 3
    loader = DataLoader(TensorDataset(torch.randn(8, 4), target), batch_size=4)
    for task in (
        Classification(nn.Linear(4, 3), 3),
        KD(nn.Linear(4, 3), nn.Linear(4, 3), 3),
        CrossEntropy(nn.Linear(4, 3), 3),
    ):
        with pytest.raises(ValueError, match="target must be between 0 and 2, got 0 to 3"):
            L.Trainer(accelerator="cpu", barebones=True, max_epochs=1).fit(task, loader)


def test_a_task_refuses_data_of_more_classes():
    with pytest.raises(ValueError, match="num_classes=5 is less than the 10 classes of ArrayDataModule"):
        Classification(nn.Linear(4, 5), 5).check_data(ArrayDataModule("none.npz", fake=True))
    Classification(nn.Linear(4, 12), 12).check_data(ArrayDataModule("none.npz", fake=True))  # more are fine


def test_supervised_refuses_another_number_of_classes_than_its_problem():
    with pytest.raises(ValueError, match="num_classes must be that of the problem, 3, got 4"):
        Supervised(nn.Linear(4, 4), 4, problem=MultiLabel(3))


class Matching(Distillation):
    problem_class = MultiLabel

    def distillation_loss(self, student_logits, teacher_logits, target):
        return (student_logits - teacher_logits).square().mean()


def test_multi_label_distillation_trains_with_the_multi_label_loss():
    torch.manual_seed(0)
    task = Matching(nn.Linear(4, 3), nn.Linear(4, 3), 3, kd_weight=0.0, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    image, target = torch.randn(8, 4), torch.tensor([[1.0, 0, -1]] * 8)
    weight = task.student.weight.detach().clone().requires_grad_()
    loss = MultiLabel(3).loss(F.linear(image, weight, task.student.bias.detach()), target)
    (gradient,) = torch.autograd.grad(loss, weight)
    loader = DataLoader(TensorDataset(image, target), batch_size=8)
    L.Trainer(accelerator="cpu", barebones=True, max_steps=1).fit(task, loader)
    torch.testing.assert_close(task.student.weight.detach(), weight.detach() - 0.1 * gradient)


def test_nan_loss_makes_the_validation_loss_nan():
    task = Classification(nn.Linear(4, 3), 3)
    loader = DataLoader(TensorDataset(torch.tensor([[1.0] * 4, [float("nan")] * 4]), torch.tensor([0, 1])))
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    (found,) = trainer.validate(task, loader, verbose=False)
    assert math.isnan(found["val/loss"])


def test_train_loss_is_the_mean_over_known_labels_not_batches():
    problem = MultiLabel(3)
    task = MultiLabelClassification(nn.Linear(4, 3), 3, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    image = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([[1.0, 0, 1]] * 4 + [[-1.0, -1, 1]] * 4)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(task, DataLoader(TensorDataset(image, target), batch_size=4))
    expected = problem.loss(task.network(image), target)  # the mean over all sixteen labels
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(expected.item(), rel=1e-5)


def _uneven_metrics_of_a_rank():
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    metric = MultiLabelMetric(5)
    if rank == 1:
        metric.update(*labels())
    return metric.compute()


def test_metrics_where_a_process_has_no_batch_equal_those_of_one():
    metric = MultiLabelMetric(5)
    metric.update(*labels())
    for found in on_two_ranks(_uneven_metrics_of_a_rank):
        assert found == pytest.approx(metric.compute(), rel=1e-9)


def test_a_task_refuses_data_of_another_kind():
    task = Classification(nn.Linear(4, 10), 10)
    with pytest.raises(ValueError, match=r"Classification is for one class.*has several labels"):
        task.check_data(ArrayDataModule("none.npz", kind="multi_label", fake=True))
    MultiLabelClassification(nn.Linear(4, 10), 10).check_data(ArrayDataModule("no.npz", kind="multi_label", fake=True))


@pytest.mark.parametrize("name", ["fcn_tiny", "torchvision/deeplabv3_resnet50"])
def test_segmentation_networks_have_main_and_auxiliary_logits(name):
    network = build_network(name, 5).eval()
    with torch.no_grad():
        output = network(torch.randn(1, 3, 40, 32))
    assert output["out"].shape == auxiliary_logits(output).shape == (1, 5, 40, 32)
    assert sum(p.numel() for p in build_network("fcn_tiny", 5).parameters()) < 100_000


class SubclassedSingleLabel(SingleLabel):
    pass


class SubclassedProblemTask(Classification):
    problem_class = SubclassedSingleLabel


def test_subclassed_problem_accepts_data_of_its_parent_class():
    task = SubclassedProblemTask(nn.Linear(4, 10), 10)
    task.check_data(ArrayDataModule("none.npz", fake=True))
    with pytest.raises(ValueError, match="has several labels"):
        task.check_data(ArrayDataModule("none.npz", kind="multi_label", fake=True))


def test_data_with_more_classes_is_accepted_without_targets():
    task, data = Classification(nn.Linear(4, 5), 5), ArrayDataModule("none.npz", fake=True)
    task.check_data(data, has_targets=False)
    with pytest.raises(ValueError, match="num_classes=5 is less"):
        task.check_data(data)


class TwoViews(Classification):
    def training_step(self, batch, batch_idx):
        first, second = batch
        return (self(first) - self(second)).square().mean()


def test_custom_method_may_train_on_two_views_without_targets():
    views = torch.randn(8, 3, 8, 8), torch.randn(8, 3, 8, 8)
    task = TwoViews("cnn_tiny", 10, input_shape=(3, 8, 8))
    trainer, before = L.Trainer(accelerator="cpu", barebones=True, max_steps=1), copy.deepcopy(task.state_dict())
    trainer.fit(task, DataLoader(TensorDataset(*views), batch_size=4))
    assert trainer.global_step == 1
    assert not all(torch.equal(value, before[key]) for key, value in task.state_dict().items())


def _curve_of_a_rank():
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    metric = SingleLabel(3).curve_metrics()["calibration"]
    if rank == 1:
        metric.update(torch.eye(3), torch.eye(3), torch.arange(3))
    return metric.compute()


def test_curve_metrics_agree_where_a_process_has_no_batch():
    assert [found["acc"] for found in on_two_ranks(_curve_of_a_rank)] == [1.0, 1.0]


def test_separator_and_backslash_in_label_names_are_escaped():
    both = torch.ones(1, 2, dtype=torch.bool)
    outputs = {"prediction": both, "probabilities": torch.ones(1, 2)}
    assert MultiLabel(2).columns(outputs, ["a\\", "b"])["labels"] == ["a\\\\|b"]
    outputs["prediction"] = torch.tensor([[True, False]])
    assert MultiLabel(2).columns(outputs, ["a|b", "c"])["labels"] == ["a\\|b"]


def test_loss_of_probabilities_takes_regression_outputs():
    problem = Regression(1)
    output = torch.tensor([[-2.0]])
    assert problem.loss_of_probabilities(problem.probabilities(output), output) == 0
