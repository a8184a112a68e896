"""BLDR: worked numbers and gradients of its losses, the rows u and v, early exits, the task."""

import csv
import math

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from lightning_kd.core.run_callbacks import run_callbacks
from lightning_kd.core.run_folder import RunFolder
from lightning_kd.data import DigitsDataModule, SymmetricNoise
from lightning_kd.nets import build_network
from lightning_kd.noisy_labels import bldr_losses as losses
from lightning_kd.noisy_labels import find_stages
from lightning_kd.noisy_labels.bldr import BLDR
from tests.two_processes import on_two_ranks

SHAPE = (1, 8, 8)
P = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)
ZERO = torch.tensor([0])
ONE = torch.ones(1, dtype=torch.float64)
NONE = torch.zeros(1, 3, dtype=torch.float64)


def some(*shape, seed=0, dtype=torch.float64, grad=False):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return values.requires_grad_(grad)


def row(column, value):
    rows = NONE.clone()
    rows[0, column] = value
    return rows


# -- worked numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("predicted", "expected"), [(0, 0.328504), (1, 0.105361)])
def test_complementary_loss_gives_worked_numbers(predicted, expected):
    loss = losses.complementary_loss(P.log(), ZERO, torch.tensor([predicted]), ONE)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("u", "v", "expected"), [(row(0, 0.5), NONE, 0.274437), (NONE, row(1, 0.3), 0.262364), (NONE, NONE, 0.356675)]
)
def test_corrected_cross_entropy_gives_worked_numbers(u, v, expected):
    probabilities = losses.corrected_probabilities(P.log(), u, v, ZERO)
    assert losses.corrected_cross_entropy(probabilities, ZERO, ONE).item() == pytest.approx(expected, abs=1e-6)
    assert probabilities.sum().item() == pytest.approx(1)


def test_corrected_probabilities_use_u_at_the_label_v_elsewhere_and_a_floor():
    u, v = row(1, 9.0), row(0, 9.0)  # u counts at the label alone, v elsewhere alone
    torch.testing.assert_close(losses.corrected_probabilities(P.log(), u, v, ZERO), P)
    taken = losses.corrected_probabilities(P.log(), NONE, row(1, 9.0), ZERO)  # v^2 is cut at 1 - 1e-4
    torch.testing.assert_close(taken, torch.tensor([[0.7, 1e-4, 0.1]], dtype=torch.float64) / 0.8001)


def test_separation_loss_gives_worked_numbers():
    loss = losses.separation_loss(P.log(), NONE, NONE, torch.tensor([1]))
    assert loss.item() == 2.0
    assert 50 * 0.1**2 * loss.item() == pytest.approx(1.0)
    assert losses.separation_loss(P.log(), NONE, NONE, ZERO).item() == 0.0


def test_positive_and_negative_loss_are_the_sums_of_their_terms():
    logits, target = some(8, 3), torch.tensor([0, 1, 2, 0])
    u, v, weight = some(4, 3, seed=1), some(4, 3, seed=2), torch.tensor([1.0, 0.5, 0.0, 2.0], dtype=torch.float64)
    own = F.one_hot(target, 3)
    added, taken = u**2 * own, v**2 * (1 - own)
    added, taken = added.clamp(max=1 - 1e-4), taken.clamp(max=1 - 1e-4)
    weak, strong = logits.softmax(1).split(4)
    s = (weak + added - taken).clamp(min=1e-4)
    s = (s / s.sum(1, keepdim=True)).clamp(1e-4, 1)
    ce = sum(-w * s[i, t].log() for i, (w, t) in enumerate(zip(weight, target, strict=True))) / 4
    separation = ((F.one_hot(weak.argmax(1), 3) + added - taken - own) ** 2).sum() / 4
    balance = -s.mean(0).log().sum() / 3
    consistency = (weak * (weak / strong).log()).sum() / 4
    expected = ce + 50 * 0.2**2 * separation + 0.1 * balance + 0.9 * consistency
    torch.testing.assert_close(losses.positive_loss(logits, target, u, v, weight, 0.2), expected)
    only_weak = losses.positive_loss(logits[:4], target, u, v, weight, torch.tensor(0.2))
    torch.testing.assert_close(only_weak, expected - 0.9 * consistency)
    predicted = torch.tensor([1, 1, 0, 0])
    balance = -weak.mean(0).log().sum() / 3
    expected = losses.complementary_loss(logits[:4], target, predicted, weight) + 0.1 * balance + 0.9 * consistency
    torch.testing.assert_close(losses.negative_loss(logits, target, predicted, weight), expected)


def test_balance_loss_gives_worked_numbers():
    for classes in (2, 10, 100):
        assert losses.balance_loss(torch.eye(classes)).item() == pytest.approx(math.log(classes), rel=1e-6)
    assert losses.balance_loss(torch.tensor([[1.0, 0.0]])).item() == pytest.approx(-math.log(1e-4) / 2, rel=1e-6)


def test_exit_losses_give_worked_numbers():
    zeros = torch.zeros(4, 10)
    assert losses.exit_distillation_loss(zeros, zeros).item() == pytest.approx(20.723, abs=1e-3)
    feature, of_exit = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[3.0, 0.0, -5.0]])
    assert losses.exit_feature_loss(of_exit, feature).item() == 4.0  # both at most 0: does not count
    assert losses.exit_feature_loss(of_exit.repeat(3, 1), feature.repeat(3, 1)).item() == 12.0


def test_agreement_loss_is_the_kl_divergence_over_the_number_of_classes():
    a, b = some(5, 7), some(5, 7, seed=1)
    assert losses.agreement_loss(a, a).item() == 0.0
    kl = F.kl_div(b.log_softmax(1), a.softmax(1), reduction="batchmean")
    torch.testing.assert_close(10 * losses.agreement_loss(a, b), 10 / 7 * kl)


def test_reweight_scales_to_0_1_and_gives_none_for_equal_probabilities():
    weight, rho = losses.reweight(torch.tensor([0.2, 0.5, 0.9]))
    torch.testing.assert_close(weight, torch.tensor([0.0, 0.428571, 1.0]), atol=1e-6, rtol=0)
    assert rho == pytest.approx(1 / 3)
    assert losses.reweight(torch.tensor([0.3, 0.3])) == (None, 0.0)


def test_average_decay_grows_to_0_9():
    decays = [losses.average_decay(epoch) for epoch in (0, 1, 2, 79, 80, 300)]
    assert decays == pytest.approx([0.1, 0.181818, 0.25, 80 / 89, 0.9, 0.9], abs=1e-6)


def test_flag_wrong_is_strict_at_the_threshold():
    probability = torch.tensor([0.049, 0.05, 0.051], dtype=torch.float64)
    assert losses.flag_wrong(probability).tolist() == [True, False, False]


# -- gradients -------------------------------------------------------------------------------------------------------


def gradients(loss, *tensors):
    found = torch.autograd.grad(loss, tensors, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]


def test_u_is_trained_at_the_label_and_v_elsewhere():
    logits, target = some(6, 4, grad=True), torch.tensor([0, 1, 2, 3, 0, 1])
    u, v = ((0.3 * some(6, 4, seed=seed)).requires_grad_() for seed in (3, 5))
    own = F.one_hot(target, 4).bool()
    probabilities = losses.corrected_probabilities(logits, u, v, target)
    loss = losses.corrected_cross_entropy(probabilities, target, torch.ones(6)) + losses.balance_loss(probabilities)
    on_logits, on_u, on_v = gradients(loss, logits, u, v)
    assert on_logits.any()
    assert bool((on_u[own] != 0).all())
    assert not on_u[~own].any()
    assert not on_v.any()
    on_logits, on_u, on_v = gradients(losses.separation_loss(logits, u, v, target), logits, u, v)
    assert not on_logits.any()
    assert not on_u.any()
    assert bool((on_v[~own] != 0).any())
    assert not on_v[own].any()


def test_consistency_gradient_reaches_the_strong_view_alone():
    weak, strong = some(3, 4, grad=True), some(3, 4, seed=1, grad=True)
    on_weak, on_strong = gradients(losses.consistency_loss(weak, strong), weak, strong)
    assert not on_weak.any()
    torch.testing.assert_close(on_strong, (strong.softmax(1) - weak.softmax(1)).detach() / 3)
    assert losses.consistency_loss(weak, weak).item() == 0.0


def test_exit_losses_train_the_exit_alone_and_agreement_trains_both():
    teacher, student = some(3, 4, grad=True), some(3, 4, seed=1, grad=True)
    for loss in (losses.exit_distillation_loss(student, teacher), losses.exit_feature_loss(student, teacher)):
        on_teacher, on_student = gradients(loss, teacher, student)
        assert not on_teacher.any()
        assert on_student.any()
    assert all(g.any() for g in gradients(losses.agreement_loss(student, teacher), student, teacher))


def test_sample_weights_scale_only_cross_entropy_and_complementary_term():
    logits, target = some(4, 3), torch.tensor([0, 1, 2, 0])
    u, v, weight = some(4, 3, seed=1), some(4, 3, seed=2), some(4, seed=3).abs()
    positive = [losses.positive_loss(logits, target, u, v, w, 0.1) for w in (weight, 2 * weight)]
    probabilities = losses.corrected_probabilities(logits, u, v, target)
    torch.testing.assert_close(positive[1] - positive[0], losses.corrected_cross_entropy(probabilities, target, weight))
    negative = [losses.negative_loss(logits, target, target, w) for w in (weight, 2 * weight)]
    torch.testing.assert_close(negative[1] - negative[0], losses.complementary_loss(logits, target, target, weight))


def test_complementary_loss_of_two_classes_is_zero_or_cross_entropy():
    logits = some(2, 2, grad=True)
    same, other = torch.tensor([0, 1]), torch.tensor([1, 0])
    loss = losses.complementary_loss(logits, same, other, torch.ones(2))
    assert loss.item() == 0.0
    assert not gradients(loss, logits)[0].any()
    loss = losses.complementary_loss(logits, same, same, torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(loss, F.cross_entropy(logits, same))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_extreme_half_precision_logits_are_finite_float32(dtype):
    logits = (60 * some(8, 10)).to(dtype).requires_grad_()
    target, weight = torch.arange(4), torch.ones(4)
    u, v = torch.full((4, 10), 1e-8), torch.full((4, 10), 1e-8)
    loss = losses.positive_loss(logits, target, u, v, weight, 0.1) + losses.negative_loss(
        logits, target, target, weight
    )
    assert loss.dtype == torch.float32
    wide = losses.positive_loss(logits.double(), target, u, v, weight, 0.1)
    wide = wide + losses.negative_loss(logits.double(), target, target, weight)
    torch.testing.assert_close(loss.double(), wide, rtol=1e-4, atol=1e-4)
    assert gradients(loss, logits)[0].isfinite().all()


# -- rows ------------------------------------------------------------------------------------------------------------


def test_update_rows_equals_dense_sgd_and_skips_non_finite_gradients():
    dense = nn.Parameter(some(20, 3, dtype=torch.float32))
    rows, index = dense.detach().clone(), torch.tensor([4, 7, 4, 19])
    gradient = some(4, 3, seed=1, dtype=torch.float32)
    dense.grad = torch.zeros(20, 3).index_add(0, index, gradient)
    torch.optim.SGD([dense], lr=10.0).step()
    losses.update_rows(rows, index, gradient, 10.0)
    torch.testing.assert_close(rows, dense.detach())
    before = rows.clone()
    losses.update_rows(rows, torch.tensor([2]), torch.tensor([[math.nan, math.inf, 1.0]]), 10.0)
    assert torch.equal(rows, before)  # as a gradient scaler skips the whole step


def test_v_learns_the_class_behind_a_wrong_label():
    # 20 samples in the batch; the first one's label is wrong: it is always predicted as class 3, labelled 1
    logits = torch.zeros(20, 5, dtype=torch.float64)
    target = torch.zeros(20, dtype=torch.int64)
    logits[:, 0], logits[0, 0], logits[0, 3], target[0] = 5.0, 0.0, 5.0, 1
    u, v = (torch.full((20, 5), 1e-3, dtype=torch.float64) for _ in range(2))
    index = torch.arange(20)
    for _ in range(25):
        on = [rows.clone().requires_grad_() for rows in (u, v)]
        loss = losses.positive_loss(logits, target, *on, torch.ones(20), 0.1)
        for rows, gradient in zip((u, v), torch.autograd.grad(loss, on), strict=True):
            losses.update_rows(rows, index, gradient, 10.0)
    assert 1.05 < v[0, 3].item() < 1.09
    assert (1 - v[0, 3].square().clamp(max=1 - 1e-4)).abs().item() < 1e-3
    v[0, 3] = 0
    assert v.abs().max().item() < 2e-3
    u[index, target] = 0
    assert u.abs().max().item() < 2e-3


# -- exits -----------------------------------------------------------------------------------------------------------


def test_resnet34_has_the_parameters_and_exits_of_the_paper():
    task = BLDR("resnet34", 10)
    trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
    assert trained == 23_172_210 - 232_448
    assert task.exits.stages == ["layer1", "layer2", "layer3"]
    kernels = [exit_.body[3].kernel_size for exit_ in task.exits.exits]
    assert kernels == [(8, 8), (4, 4), (2, 2)]
    assert [exit_.body[3].stride for exit_ in task.exits.exits] == kernels


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("cnn_tiny", ["layer1", "layer2"]),
        ("resnet8", ["layer1", "layer2"]),
        ("wrn_16_1", ["block1", "block2"]),
        ("vgg8", ["block0", "block1", "block2"]),
        ("shufflenetv2", ["layer1", "layer2"]),
        ("mobilenetv2", ["blocks.1", "blocks.2", "blocks.4"]),
        ("torchvision/mobilenet_v2", ["features.1", "features.3", "features.6", "features.13"]),
    ],
)
def test_find_stages_finds_stages_and_leaves_the_network_unchanged(name, stages):
    network = build_network(name, 10)
    network.train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    found = find_stages(network, (3, 32, 32))
    assert list(found)[:-1] == stages
    sizes = [shape[1] for shape in found.values()]
    assert sizes == sorted(set(sizes), reverse=True)
    assert all(module.training for module in network.modules())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())


def test_wrong_stages_raise():
    for network, arguments, message in (
        ("mlp_16", {}, "MLP has no stages that are found by name"),
        ("cnn_tiny", {"stages": ["layer1", "layer9"]}, "no module 'layer9' in CNN; it has .*'layer1'"),
        ("cnn_tiny", {"stages": ["layer1"]}, "stages must name at least 2 modules"),
        ("cnn_tiny", {"stages": ["layer1", "fc"]}, "'fc' of CNN gives no feature map"),
    ):
        with pytest.raises(ValueError, match=message):
            BLDR(network, 10, input_shape=SHAPE, **arguments)
    assert BLDR("cnn_tiny", 10, input_shape=SHAPE, stages=["layer2", "layer3"]).exits.stages == ["layer2"]


# -- the task --------------------------------------------------------------------------------------------------------


def digits(**options):
    noise = SymmetricNoise(0.4, "exclusive")
    return DigitsDataModule(**{"fake": True, "batch_size": 32, "noise": noise, "augment": True, **options})


def trainer(**options):
    quiet = {
        "logger": False,
        "enable_checkpointing": "callbacks" in options,
        "enable_progress_bar": False,
        "accelerator": "cpu",
    }
    return L.Trainer(**{**quiet, "enable_model_summary": False, "max_epochs": 2, "num_sanity_val_steps": 0, **options})


def small(network="cnn_tiny", **options):
    torch.manual_seed(0)
    return BLDR(network, 10, input_shape=SHAPE, **{"warmup_epochs": 0, "channels_last": False, **options})


@pytest.mark.parametrize(
    ("network", "options"), [("cnn_tiny", {}), ("resnet8", {"reuse_forward": True, "agreement_weight": 10.0})]
)
def test_fit_test_reload_and_files(network, options, tmp_path):
    task, data = small(network, **options), digits()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    run = trainer(callbacks=run_callbacks(RunFolder(tmp_path)))
    run.fit(task, data)
    still = [n for n, p in task.named_parameters() if p.requires_grad and torch.equal(p, before[n])]
    assert not still
    for name in ("rho", "clean_precision", "clean_auc", "memorised_wrong", "wrong_f1", "loss_exits", "loss_negative"):
        assert f"train/{name}" in run.callback_metrics, name
    assert run.callback_metrics["train/rho"] == task.rho != 0.1
    weight = task.memories["weight"].rows[data.train_indices]
    assert (weight.min(), weight.max()) == (0, 1)
    run.test(task, data, verbose=False)
    last = tmp_path / "checkpoints/last.ckpt"
    state = torch.load(last, weights_only=True)
    again = BLDR.load_from_checkpoint(last)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in state["state_dict"].items())
    assert torch.equal(again.memories["u"].rows, task.memories["u"].rows)
    optimized = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert optimized == {id(p) for part in (task._parts(), task.exits) for p in part.parameters()}
    exported = torch.load(tmp_path / "network.pt", weights_only=True)
    assert all(torch.equal(v, task.average["network"].state_dict()[k]) for k, v in exported.items())
    all_rows = list(csv.DictReader((tmp_path / "noisy_labels.csv").open()))
    assert sorted(int(r["index"]) for r in all_rows) == data.train_indices.tolist()


def test_wrong_labels_file_lists_suspects_with_suggested_classes(tmp_path):
    task, data = small(), digits()
    run = trainer(max_epochs=1, callbacks=run_callbacks(RunFolder(tmp_path)))
    task.detection_threshold = 0.1  # an untrained head gives each class about 0.1
    run.fit(task, data)
    rows = list(csv.DictReader((tmp_path / "wrong_labels.csv").open()))
    assert list(rows[0]) == ["index", "given", "probability", "suggested"]
    believed = [float(r["probability"]) for r in rows]
    assert believed == sorted(believed)
    assert believed[-1] < 0.1 + 1e-6  # written with six digits
    image = next(iter(data.loader("train", batch_size=10**6)))
    task.eval()
    with torch.no_grad():
        _, negative, _ = task._heads(task._parts(), image.image)  # the network as trained, not averaged
        scores, probabilities = task.scores_and_probabilities(image.image)
        averaged = [z.softmax(1) for z in task._heads(task.average, image.image)[:2]]
    torch.testing.assert_close(probabilities, (averaged[0] + averaged[1]) / 2)
    assert torch.equal(scores.argmax(1), (averaged[0] + averaged[1]).argmax(1))
    own = negative.softmax(1).gather(1, image.target[:, None]).squeeze(1)
    assert len(rows) == int((own < 0.1).sum()) > 0
    place = {int(index): i for i, index in enumerate(image.index)}
    for r in rows:
        i = place[int(r["index"])]
        assert float(r["probability"]) == pytest.approx(own[i].item(), rel=1e-4)
        best = next(c for c in scores[i].argsort(descending=True).tolist() if c != int(r["given"]))
        assert int(r["suggested"]) == best


def test_average_is_updated_once_per_epoch_before_validation():
    task, data = small(average_buffers=False), digits(val_fraction=0.3)
    raw, at_validation = [], []

    class Watch(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            raw.append(pl_module.network.fc.weight.detach().clone())

        def on_validation_start(self, trainer, pl_module):
            at_validation.append(pl_module.average["network"].fc.weight.clone())

    trainer(max_epochs=3, callbacks=[Watch()]).fit(task, data)
    one = raw[0].lerp(raw[1], 1 - 2 / 11)
    for seen, expected in zip(at_validation, (raw[0], one, one.lerp(raw[2], 0.75)), strict=True):
        torch.testing.assert_close(seen, expected)
    statistics = [parts["network"].layer1[1].running_mean for parts in (task.average, task._parts())]
    assert torch.equal(*statistics)
    assert not any(p.requires_grad for p in task.average.parameters())


class Pairs(torch.utils.data.Dataset):
    """A user's own dataset of (views, target, index)."""

    def __init__(self, count=24, views=2, classes=10, shift=0):
        self.images = some(count, 2, *SHAPE, dtype=torch.float32)
        self.views, self.classes, self.shift = views, classes, shift

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        views = tuple(self.images[i, : self.views]) if self.views > 1 else self.images[i, 0]
        return views, i % self.classes, i + self.shift


def test_warmup_step_changes_rows_of_its_batch_but_no_sample_weights():
    task = small(agreement_weight=0.0, warmup_epochs=5)
    run = trainer(max_epochs=1, limit_train_batches=1, gradient_clip_val=1e-3)
    run.fit(task, DataLoader(Pairs(), 8))
    u, v = (task.memories[name].rows for name in ("u", "v"))
    assert u.dtype == torch.float32
    assert u.shape == (24, 10)
    assert 0 < u.abs().max() < 1e-6
    # rows of samples outside the batches keep their initial values
    again = small(agreement_weight=0.0)
    trainer(max_epochs=1, limit_train_batches=2).fit(again, DataLoader(Pairs(), 8))
    for mine, theirs in ((u, again.memories["u"].rows), (v, again.memories["v"].rows)):
        assert torch.equal(mine[16:], theirs[16:])
        assert not torch.equal(mine[8:16], theirs[8:16])
    assert bool((task.memories["weight"].rows == 1).all())
    assert task.rho == pytest.approx(0.1)


def test_unseen_samples_keep_their_weight():
    task = small()
    trainer(max_epochs=1, limit_train_batches=2).fit(task, DataLoader(Pairs(), 8))
    weight = task.memories["weight"].rows
    assert sorted(weight[:16].tolist())[::15] == [0, 1]
    assert weight[16:].tolist() == [1] * 8


def test_equal_probabilities_warn_and_keep_the_weights():
    task = small()
    nn.init.zeros_(task.negative_head.weight)
    nn.init.zeros_(task.negative_head.bias)
    with pytest.warns(UserWarning, match="gives all labels one probability"):
        trainer(max_epochs=1, limit_train_batches=1).fit(task, DataLoader(Pairs(), 24))
    assert bool((task.memories["weight"].rows == 1).all())
    assert task.rho == 1.0


def test_batches_of_one_view_or_with_wrong_index_or_target_raise():
    for pairs, message in (
        (Pairs(views=1), "needs a weak and a strong view of each image, got 1"),
        (Pairs(shift=5), "index must be below 24, the size of the training set, got 28"),
        (Pairs(classes=12), "target must be between 0 and 9, got 0 to 11"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(max_epochs=1).fit(small(), DataLoader(pairs, 24))
    trainer(max_epochs=1).fit(small(consistency_weight=0.0), DataLoader(Pairs(views=1), 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"balance_weight": -0.1}, "balance_weight must be at least 0, got -0.1"),
        ({"detection_threshold": 1.0}, "detection_threshold must be above 0 and below 1, got 1.0"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
    ],
)
def test_wrong_arguments_raise(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_trains_with_two_classes():
    task = BLDR("cnn_tiny", 2, input_shape=SHAPE, warmup_epochs=0)
    run = trainer(max_epochs=2)
    run.fit(task, DataLoader(Pairs(classes=2), 8))
    assert run.callback_metrics["train/loss"].isfinite()
    assert all(p.isfinite().all() for p in task.parameters())


def test_default_agreement_weight_is_10_for_100_classes_and_0_for_10():
    assert BLDR("cnn_tiny", 100, input_shape=SHAPE).agreement_weight == 10.0
    assert BLDR("cnn_tiny", 10, input_shape=SHAPE).agreement_weight == 0.0


def test_reuse_forward_updates_running_statistics_once_per_step():
    for reuse, passes in ((True, 1), (False, 2)):
        task = small(reuse_forward=reuse)
        trainer(max_epochs=1, limit_train_batches=1).fit(task, DataLoader(Pairs(), 8))
        assert task.network.layer1[1].num_batches_tracked == passes


def test_16_mixed_updates_the_rows_as_float32_does():
    rows = []
    for plugins in ([], [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))]):
        task = small()
        trainer(max_epochs=1, plugins=plugins).fit(task, DataLoader(Pairs(), 8))
        rows.append(task.memories["u"].rows)  # v also depends on the predicted class, which rounding may change
    torch.testing.assert_close(rows[1], rows[0], rtol=0.05, atol=1e-9)


def test_resumes_to_the_bit(tmp_path):
    folder = RunFolder(tmp_path)

    def fit(epochs, **options):
        L.seed_everything(3, verbose=False)
        task = small(warmup_epochs=1)
        run = trainer(max_epochs=epochs, callbacks=run_callbacks(folder))
        run.fit(task, digits(), **options)
        return task, run.global_step

    whole, steps = fit(3)
    folder.clear()
    _, half = fit(2)
    resumed, total = fit(3, ckpt_path=folder.last, weights_only=True)
    assert half < total == steps
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    for name, memory in whole.memories.items():
        assert torch.equal(memory.rows, resumed.memories[name].rows), name
    assert whole.rho != 0.1


def without_batch_norm(task):
    for module in list(task.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    return task.double()


def fit_rank(devices, batch_size, folder):
    torch.manual_seed(0)
    L.seed_everything(1, verbose=False)
    # no balance loss: each process has its own mean prediction for it
    task = without_batch_norm(small(balance_weight=0.0, feature_weight=1e-3))
    data = digits(batch_size=batch_size, val_fraction=0.0)
    strategy = "ddp" if devices == 2 else "auto"
    run = trainer(
        devices=devices,
        strategy=strategy,
        precision="64-true",
        limit_train_batches=3,
        callbacks=run_callbacks(RunFolder(folder)),
    )
    run.fit(task, data)
    memories = {name: memory.rows.tolist() for name, memory in task.memories.items()}
    state = {k: v.tolist() for k, v in task.state_dict().items() if not k.startswith(("val_", "test_"))}
    return memories, state, float(task.rho)


def test_two_processes_equal_one_with_the_joint_batch(tmp_path):
    ranks = on_two_ranks(fit_rank, 2, 16, str(tmp_path / "two"))
    assert ranks[0] == ranks[1]
    memories, state, rho = fit_rank(1, 32, str(tmp_path / "one"))
    for key, value in state.items():
        torch.testing.assert_close(torch.tensor(ranks[0][1][key]), torch.tensor(value), rtol=1e-6, atol=1e-9)
    for name, value in memories.items():
        torch.testing.assert_close(torch.tensor(ranks[0][0][name]), torch.tensor(value), rtol=1e-4, atol=1e-12)
    assert ranks[0][2] == pytest.approx(rho)
    files = [(tmp_path / run / "wrong_labels.csv").read_text() for run in ("one", "two")]
    assert len(files[0].splitlines()) == len(files[1].splitlines())


def test_terms_of_one_step_equal_their_definitions():
    """Which of the two passes, heads and views each term uses, written out again."""
    torch.manual_seed(0)
    task = small(agreement_weight=10.0).double()
    start = {name: value.clone() for name, value in task.state_dict().items()}
    seen, kept = {}, task.step_loss

    def watch(terms, *rest):
        seen.update({name: value.detach() for name, value in terms.items()})
        return kept(terms, *rest)

    task.step_loss = watch
    pairs = Pairs()
    trainer(max_epochs=1, limit_train_batches=1, precision="64-true").fit(task, DataLoader(pairs, len(pairs)))
    again = small(agreement_weight=10.0).double().train()
    again.load_state_dict(start)
    items = [pairs[i] for i in range(len(pairs))]
    weak, strong = (torch.stack([item[0][k] for item in items]).double() for k in range(2))
    target = torch.tensor([item[1] for item in items])

    def passed(image):
        network = again.network
        first = network.layer1(image)
        second = network.layer2(first)
        feature = network.layer3(second).mean((2, 3))
        pooled = [e.body(m).mean((2, 3)) for e, m in zip(again.exits.exits, (first, second), strict=True)]
        logits = [e.fc(f) for e, f in zip(again.exits.exits, pooled, strict=True)]
        return network.fc(feature), again.negative_head(feature), logits, feature, pooled

    positive, negative, exits, _, _ = passed(torch.cat([weak, strong]))
    positive_alone, negative_alone, exits_alone, feature, pooled = passed(weak)
    count, classes = len(target), 10

    def consistency(logits):
        one, two = logits.split(count)
        return 0.9 * F.kl_div(two.log_softmax(1), one.softmax(1), reduction="batchmean")

    def learned(logits):
        s = logits[:count].softmax(1).clamp_min(1e-4)
        s = s / s.sum(1, keepdim=True)
        wrong = (logits[:count].argmax(1) != target).double().mean()
        return F.nll_loss(s.log(), target) + 50 * 0.01 * 2 * wrong - 0.1 * s.mean(0).log().mean() + consistency(logits)

    allowed = torch.ones(count, classes).scatter(1, target[:, None], 0).scatter(1, negative_alone.argmax(1)[:, None], 0)
    p = negative[:count].softmax(1)
    unlearned = -(allowed * (1 - p).log()).sum(1).mean() - 0.1 * p.mean(0).log().mean() + consistency(negative)
    teacher = ((positive_alone + negative_alone) / 2 / 3).softmax(1)
    a, b = positive_alone.log_softmax(1), negative_alone.log_softmax(1)
    expected = {
        "positive": learned(positive),
        "exits": sum(learned(logits) for logits in exits),
        "negative": unlearned,
        "kd": 0.1 * sum(9 * -(teacher * (z / 3).log_softmax(1)).sum(1).mean() for z in exits_alone),
        "feature": 1e-6 * sum(((f - feature).square() * ((f > 0) | (feature > 0))).sum() for f in pooled),
        "agreement": 10 * (a.exp() * (a - b)).mean(),
    }
    assert seen.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(seen[name], value.detach(), atol=1e-6, rtol=1e-6, msg=name)


def test_classes_of_almost_no_weight_warn():
    task = small(warmup_epochs=0)
    given = torch.arange(40) % 10
    with pytest.warns(UserWarning, match=r"given classes \[1, 2, 3, 4, 5, 6, 7, 8, 9\] have almost no weight"):
        task._warn_of_lost_classes((given == 0).float(), given)
