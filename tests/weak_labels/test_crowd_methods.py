"""The crowd layer, the EM with a network, the aggregating baselines: losses, reports, resume, two processes."""

import csv
import math
from functools import partial

import pytest
import torch
from torch import nn

from lightning_kd.core.run_callbacks import run_callbacks
from lightning_kd.core.run_folder import RunFolder
from lightning_kd.data import DigitsDataModule, LabelFile
from lightning_kd.spreadsheet import csv_text
from lightning_kd.weak_labels import (
    AggregatedCrowd,
    AnnotatorLayer,
    CrowdLayer,
    NetworkEM,
    annotator_probabilities,
    crowd_loss,
    dawid_skene,
    majority_vote,
)
from lightning_kd.weak_labels.crowd_statistics import confusion_of
from lightning_kd.weak_labels.crowd_task import aggregated_rows
from tests.two_processes import on_two_ranks
from tests.weak_labels.crowd_runs import built, crowd_data, even_data, fitted, resumes_to_the_bit, trainer_of


def flat_network():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


class NoUpdate(torch.optim.SGD):
    """SGD that leaves all weights unchanged."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.0)


def first_step(method, **options):
    """The task before any step, its first batch and the loss of its first step."""
    seen = []

    class Looking(method):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            seen.append((batch, loss.detach()))
            return loss

    task, data, _ = fitted(Looking, network=flat_network(), optimizer=NoUpdate, **options)
    return task, data, *seen[0]


@pytest.mark.parametrize("per_annotation", [True, False])
def test_first_loss_of_the_crowd_layer_equals_a_plain_computation(per_annotation):
    task, _, batch, loss = first_step(CrowdLayer, per_annotation=per_annotation)
    p = task(batch.image).softmax(1)
    kernel = torch.eye(10)[..., None].repeat(1, 1, 4)
    expected = crowd_loss(annotator_probabilities(p, kernel), batch.extras["annotations"], per_annotation)
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_kernels_learn_except_that_of_an_annotator_without_annotations():
    task, _, trainer = fitted(CrowdLayer)
    kernel = task.annotators.kernel.detach()
    assert torch.equal(kernel[..., 3], torch.eye(10))
    assert all(not torch.equal(kernel[..., r], torch.eye(10)) for r in range(3))
    assert isinstance(trainer.optimizers[0], torch.optim.Adam)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 1e-3
    flat = math.e / (math.e + 9)
    assert float(trainer.callback_metrics["train/kernel_trace"]) == pytest.approx(flat, rel=0.2)


@pytest.mark.parametrize("variant", ["VW", "VB", "VW+B", "SW"])
def test_annotator_layer_variants_scale_and_shift_the_probabilities(variant):
    layer = AnnotatorLayer(3, variant)
    layer.allocate(2)
    p = torch.tensor([[0.2, 0.5, 0.3]])
    assert torch.allclose(layer(p), p.softmax(1)[..., None].repeat(1, 1, 2))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.arange(1.0, parameter.numel() + 1).view_as(parameter))
    scale = {"VW": [2.0, 4.0, 6.0], "VW+B": [2.0, 4.0, 6.0], "SW": [2.0] * 3, "VB": [1.0] * 3}[variant]
    bias = torch.tensor([2.0, 4.0, 6.0]) if "B" in variant else torch.zeros(3)
    assert torch.allclose(layer(p)[0, :, 1], (p[0] * torch.tensor(scale) + bias).softmax(0))
    assert layer.confusion().shape == (2, 3, 3)
    with pytest.raises(ValueError, match="variant must be one of MW, VW, VB"):
        AnnotatorLayer(3, "WM")


def test_kernel_lr_gives_the_annotator_layer_its_own_learning_rate():
    _, _, trainer = fitted(CrowdLayer, kernel_lr=0.1)
    groups = trainer.optimizers[0].param_groups
    assert [group["lr"] for group in groups] == [pytest.approx(1e-3), pytest.approx(1e-4)]
    assert [p.shape for p in groups[1]["params"]] == [(10, 10, 4)]
    with pytest.raises(ValueError, match=r"kernel_lr=0.1 and backbone_lr=0.5 exclude each other"):
        built(CrowdLayer, kernel_lr=0.1, backbone_lr=0.5)


def test_first_loss_and_two_epochs_of_the_em_equal_a_plain_computation():
    task, data, batch, loss = first_step(NetworkEM)
    p, given = task(batch.image).softmax(1), batch.extras["annotations"]
    start = (torch.eye(10, dtype=torch.float64) + 0.01) / 1.1
    total = 0.0
    for row, answers in zip(p.tolist(), given.tolist(), strict=True):
        t = [max(v, 1e-3) * math.prod(float(start[k, a]) for a in answers if a >= 0) for k, v in enumerate(row)]
        total -= sum(v / sum(t) * math.log(q) for v, q in zip(t, row, strict=True))
    assert float(loss) == pytest.approx(total / len(p), rel=1e-5)
    # the network stays the same; the second epoch's posteriors use the first epoch's confusion matrices
    index = torch.from_numpy(data.train_indices)
    given = data.train_annotations[index].long()
    with torch.no_grad():
        image = next(iter(data.loader("train", batch_size=1000))).image
        prior = task(image).softmax(1).clamp(min=1e-3).double()
    confusion = start.repeat(4, 1, 1)
    for _ in range(2):
        t = prior.clone()
        for i, r in (given >= 0).nonzero().tolist():
            t[i] *= confusion[r, :, given[i, r]]
        t /= t.sum(1, keepdim=True)
        confusion = confusion_of(t, given, 0.01)
    assert torch.allclose(task.confusions, confusion, atol=1e-5)
    assert torch.allclose(task.posteriors.rows[index].double(), t, atol=1e-5)


@pytest.mark.parametrize("aggregation", ["vote", "dawid_skene"])
@pytest.mark.parametrize("soft", [False, True])
def test_first_loss_of_the_aggregating_baselines_equals_a_plain_one(aggregation, soft):
    task, data, batch, loss = first_step(AggregatedCrowd, aggregation=aggregation, soft=soft, iterations=3)
    used = torch.from_numpy(task.used_indices())
    given = data.train_annotations[used].long()
    found = majority_vote(given, 10) if aggregation == "vote" else dawid_skene(given, 10, 3).posterior
    learnt = found if soft else torch.eye(10, dtype=torch.float64)[found.argmax(1)]
    rows = learnt[torch.searchsorted(used, batch.index)]
    expected = -(rows * task(batch.image).log_softmax(1)).sum(1).mean()
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert len(used) > len(data.train_indices)


@pytest.mark.parametrize("method", [CrowdLayer, NetworkEM, AggregatedCrowd])
def test_reports_list_annotators_by_reliability_and_samples_by_probability(method, tmp_path):
    run = trainer_of(callbacks=run_callbacks(RunFolder(tmp_path), "val/acc"), enable_checkpointing=True)
    task, data, _ = fitted(method, trainer=run)
    with (tmp_path / "annotators.csv").open() as file:
        people = list(csv.DictReader(file))
    assert [row["annotator"] for row in people][-1] == "3"
    assert (people[-1]["count"], people[-1]["reliability"], people[-1]["confusion"]) == ("0", "", "")
    values = [float(row["reliability"]) for row in people[:-1]]
    assert values == sorted(values)
    confusion = task.annotator_confusion()
    for row in people[:-1]:
        r = int(row["annotator"])
        assert int(row["count"]) == int((data.train_annotations[:, r] >= 0).sum())
        assert float(row["reliability"]) == pytest.approx(float(confusion[r].diagonal().mean()), rel=1e-4)
        assert [float(v) for v in row["confusion"].split(";")] == pytest.approx(
            confusion[r].flatten().tolist(), rel=1e-4
        )
    with (tmp_path / "aggregated.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted(int(row["index"]) for row in rows) == task.used_indices().tolist()
    sure = [float(row["probability"]) for row in rows]
    assert sure == sorted(sure)
    index, posterior = task.posterior()
    place = dict(zip(index.tolist(), posterior, strict=True))
    for row in rows[:5] + rows[-5:]:
        expected = place[int(row["index"])]
        assert row["class_name"] == str(int(expected.argmax()))
        assert [float(v) for v in row["posterior"].split(";")] == pytest.approx(expected.tolist(), abs=1e-5)
        answers = data.train_annotations[int(row["index"])]
        assert int(row["count"]) == int((answers >= 0).sum())
        assert float(row["disagreement"]) == 0  # one annotation each


def test_aggregated_rows_have_disagreement_and_are_sorted_by_probability():
    given = torch.tensor([[0, 0, 1], [1, 1, 1], [-1, -1, -1], [0, 1, -1]])
    posterior = torch.tensor([[0.7, 0.3], [0.1, 0.9], [0.5, 0.5], [0.5, 0.5]])
    rows = aggregated_rows(torch.tensor([4, 7, 8, 9]), posterior, given, ["cat", "dog"], None)
    assert rows[0] == ["index", "class_name", "probability", "disagreement", "count", "posterior"]
    assert [row[:5] for row in rows[1:]] == [
        [9, "cat", "0.5", "0.5", 2],
        [8, "cat", "0.5", "0", 0],
        [4, "cat", "0.7", "0.333333", 3],
        [7, "dog", "0.9", "0", 3],
    ]
    files = [f"{k}.png" for k in range(10)]
    assert aggregated_rows(torch.tensor([4, 7, 8, 9]), posterior, given, ["cat", "dog"], files)[1][1] == "9.png"


def test_class_names_that_are_numbers_are_read_back_as_names(tmp_path):
    posterior, given = torch.eye(3)[[2, 0, 1]], torch.tensor([[2], [0], [1]])
    rows = aggregated_rows(torch.arange(3), posterior, given, ["1", "10", "2"], None)
    (tmp_path / "aggregated.csv").write_text(csv_text(rows))
    found = LabelFile(str(tmp_path / "aggregated.csv")).corrupt([0, 0, 0], ["1", "10", "2"])
    assert found.tolist() == [2, 0, 1]


def test_logged_kernel_trace_leaves_out_annotators_without_annotations():
    task, data, trainer = fitted(CrowdLayer, optimizer=partial(torch.optim.Adam, lr=0.2))
    traces = task.annotator_confusion().diagonal(dim1=1, dim2=2).mean(1)
    assert not bool((data.train_annotations[:, 3] >= 0).any())
    found = float(trainer.callback_metrics["train/kernel_trace"])
    assert found == pytest.approx(float(traces[:3].mean()), rel=1e-5)
    assert abs(found - float(traces.mean())) > 5e-5


@pytest.mark.parametrize("method", [CrowdLayer, NetworkEM, AggregatedCrowd])
def test_data_without_annotations_raises(method):
    with pytest.raises(ValueError, match=f"^{method.__name__} learns from several annotators, but Digits"):
        fitted(method, DigitsDataModule(train_per_class=5))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (CrowdLayer, {"variant": "X"}, "variant must be one of MW"),
        (CrowdLayer, {"kernel_lr": 0.0}, "kernel_lr must be above 0, got 0.0"),
        (NetworkEM, {"smoothing": 0.0}, "smoothing must be above 0, got 0.0"),
        (AggregatedCrowd, {"aggregation": "mean"}, "aggregation must be 'vote' or 'dawid_skene', got 'mean'"),
        (AggregatedCrowd, {"iterations": -1}, "iterations must be at least 0, got -1"),
    ],
)
def test_wrong_arguments_raise(method, options, message):
    with pytest.raises(ValueError, match=message):
        built(method, **options)


@pytest.mark.parametrize("method", [CrowdLayer, NetworkEM, AggregatedCrowd])
def test_resumes_to_the_bit(method, tmp_path):
    assert resumes_to_the_bit(method, tmp_path)


@pytest.mark.parametrize("method", [CrowdLayer, NetworkEM])
def test_loaded_checkpoint_has_the_parameters_of_the_annotators(method, tmp_path):
    task, data, trainer = fitted(method)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    again = method.load_from_checkpoint(tmp_path / "end.ckpt")
    for name, value in task.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    plain = built(method)
    trainer_of().test(plain, datamodule=crowd_data(), ckpt_path=tmp_path / "end.ckpt", weights_only=True, verbose=False)
    assert torch.equal(plain.annotator_confusion(), task.annotator_confusion())
    assert int(plain.confusion.sum()) == data.test_size  # the confusion matrix of the test is separate


def weights_of_a_run(devices, method):
    options = {"strategy": "ddp", "devices": devices} if devices > 1 else {}
    data = even_data(batch_size=32 // devices)
    task, _, _ = fitted(method, data, trainer_of(**options))
    return [value.double().tolist() for value in task.state_dict().values() if value.is_floating_point()]


@pytest.mark.parametrize("method", [CrowdLayer, NetworkEM])
def test_two_processes_train_as_one(method):
    first, second = on_two_ranks(weights_of_a_run, 2, method)
    assert first == second
    for a, b in zip(first, weights_of_a_run(1, method), strict=True):
        assert torch.allclose(torch.tensor(a), torch.tensor(b), atol=1e-5)
