"""USKD: the loss against a loop over samples, label matrices, and the weak head."""

from functools import partial

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from lightning_kd.core.run_callbacks import run_callbacks
from lightning_kd.core.run_folder import RunFolder
from lightning_kd.data import DigitsDataModule
from lightning_kd.distillation import USKD, uskd_loss

SHAPE = (1, 8, 8)
RANKINGS = ["log_probability", "probability"]
TARGET = torch.tensor([0, 5, 2, 2, 3])
MAP_5D = nn.Sequential(nn.Flatten(), nn.Unflatten(1, (2, 2, 2, 8)), nn.Flatten(), nn.Linear(64, 10))


def values(seed, rows=5, columns=6):
    return 2 * torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mixed(share=0.7):
    return share * F.one_hot(TARGET, 6).double() + (1 - share) * F.one_hot(TARGET.flip(0), 6)


def terms_by_loop(logits, weak, labels, ranking):
    """The three terms of the loss; ``labels`` has for each sample its (class, share) pairs, the larger first."""
    count, classes = logits.shape
    p, w = logits.softmax(1), weak.softmax(1)
    parts = [0.0, 0.0, 0.0]
    for i, label in enumerate(labels):
        for place, (c, share) in enumerate(label):
            peers = [p[j, other[place][0]] ** 2 for j, other in enumerate(labels) if len(other) > place]
            factor = p[i, c] ** 2 + share - sum(peers) / len(peers)
            parts[0] -= float(factor * p[i, c].log()) / count
        own = [c for c, _ in label]
        s = p[i].log() if ranking == "log_probability" else p[i]
        score = w[i] / (1 - sum(w[i, c] for c in own) + 1e-6) + s / (1 - sum(s[c] for c in own) + 1e-6)
        rank = {k: r + 1 for r, k in enumerate(sorted(range(classes), key=lambda k: -float(score[k])))}
        others = [k for k in range(classes) if k not in own]
        total = sum(1 / rank[k] for k in others)
        log_q = logits[i, others].log_softmax(0)
        parts[1] -= sum(1 / rank[k] / total * float(log_q[j]) for j, k in enumerate(others)) / count
        soft = [0.1 / classes + 0.9 * sum(share for c, share in label if c == k) for k in range(classes)]
        parts[2] -= float((torch.tensor(soft).double() * w[i].log()).sum()) / count
    return parts


def terms_of(*args, **options):
    weights = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    return [uskd_loss(*args, *weight, **options).item() for weight in weights]


@pytest.mark.parametrize("ranking", RANKINGS)
def test_each_term_equals_a_loop_over_samples(ranking):
    logits, weak = values(0), values(1)
    expected = terms_by_loop(logits, weak, [[(y, 1.0)] for y in TARGET.tolist()], ranking)
    assert terms_of(logits, weak, TARGET, ranking=ranking) == pytest.approx(expected)
    whole = uskd_loss(logits, weak, TARGET, 0.5, 0.2, 3.0, ranking).item()
    assert whole == pytest.approx(0.5 * expected[0] + 0.2 * expected[1] + 3 * expected[2])


def test_uskd_loss_gives_worked_numbers():
    """The target ranks first: the other classes weigh 1/2 and 1/3, normalised 0.6 and 0.4."""
    logits = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64)
    of_target, of_others, of_weak = terms_of(logits, logits, torch.tensor([0]))
    assert of_target == pytest.approx(0.407606, abs=1e-6)  # the factor of a single sample is 1
    assert of_others == pytest.approx(0.6 * 0.313262 + 0.4 * 1.313262, abs=1e-6)
    assert of_weak == pytest.approx(0.9 * 0.407606 + 0.1 / 3 * (0.407606 + 1.407606 + 2.407606), abs=1e-6)
    # the target ranks last: the other classes weigh 1 and 1/2
    of_others = terms_of(logits, logits, torch.tensor([2]))[1]
    assert of_others == pytest.approx((2 * 0.313262 + 1.313262) / 3, abs=1e-6)


def test_ranking_changes_the_non_target_term_alone():
    logits, weak = values(2, 8), values(3, 8)
    target = torch.arange(8) % 6
    by_log, by_p = (terms_of(logits, weak, target, ranking=ranking) for ranking in RANKINGS)
    assert (by_log[0], by_log[2]) == (by_p[0], by_p[2])
    assert by_log[1] != pytest.approx(by_p[1], rel=1e-3)


@pytest.mark.parametrize("ranking", RANKINGS)
def test_label_matrices_equal_a_loop_and_one_hot_rows_equal_labels(ranking):
    logits, weak = values(4), values(5)
    pairs = zip(TARGET.tolist(), TARGET.flip(0).tolist(), strict=True)
    labels = [[(a, 0.7), (b, 0.3)] for a, b in pairs]
    labels[2] = [(2, 1.0)]  # mixed with an image of its own class
    expected = terms_by_loop(logits, weak, labels, ranking)
    assert terms_of(logits, weak, mixed(), ranking=ranking) == pytest.approx(expected)
    hard = terms_of(logits, weak, TARGET, ranking=ranking)
    assert terms_of(logits, weak, F.one_hot(TARGET, 6).double(), ranking=ranking) == pytest.approx(hard, rel=1e-12)
    assert expected[1] != pytest.approx(hard[1], rel=1e-3)


@pytest.mark.parametrize("ranking", RANKINGS)
def test_loss_ignores_logit_shifts_and_its_terms_have_their_gradients(ranking):
    logits, weak = values(6), values(7)
    args = (TARGET, 1.0, 2.0, 3.0, ranking)
    whole = uskd_loss(logits, weak, *args).item()
    assert uskd_loss(logits + 5, weak - 3, *args).item() == pytest.approx(whole)
    # equal predictions for all samples: the factor is 1, and the target term is cross-entropy
    same, other = logits[:1].expand(5, 6), torch.full((5,), 3)
    assert uskd_loss(same, weak, other, 1.0, 0.0, 0.0).item() == pytest.approx(F.cross_entropy(same, other).item())
    free = logits.clone().requires_grad_()
    uskd_loss(free, weak, TARGET, 1.0, 0.0, 0.0).backward()
    p = logits.softmax(1)
    squared = p.gather(1, TARGET[:, None]) ** 2
    factor = squared + 1 - squared.mean()
    assert factor.mean().item() == pytest.approx(1)
    torch.testing.assert_close(free.grad, factor * (p - F.one_hot(TARGET, 6)) / 5)
    # the non-target term gives no gradient to the target logit and to the weak head
    free, head = logits.clone().requires_grad_(), weak.clone().requires_grad_()
    uskd_loss(free, head, TARGET, 0.0, 1.0, 0.0).backward()
    assert free.grad.gather(1, TARGET[:, None]).abs().max() == 0
    assert free.grad.abs().max() > 0.01
    assert not head.grad.any()


def test_loss_is_float32_and_finite_for_zero_and_extreme_logits():
    logits, weak = values(8), values(9)
    half = logits.bfloat16(), weak.bfloat16()
    value = uskd_loss(*half, TARGET, 1.0, 1.0, 1.0)
    assert value.dtype == torch.float32
    assert value.item() == uskd_loss(half[0].float(), half[1].float(), TARGET, 1.0, 1.0, 1.0).item()
    for scale in (0.0, 1e4):
        free = (scale * logits).float().requires_grad_()
        loss = uskd_loss(free, scale * weak.float(), TARGET, 1.0, 1.0, 1.0, "probability")
        loss.backward()
        assert loss.isfinite()
        assert free.grad.isfinite().all()
    # equal scores are ranked in the order of the classes
    flat = torch.zeros(1, 4)
    assert terms_of(flat, flat, torch.tensor([0]))[1] == pytest.approx(torch.tensor(3.0).log().item())


def test_two_classes_have_no_non_target_term_and_no_label_matrix():
    logits, weak = values(10, 4, 2), values(11, 4, 2)
    assert terms_of(logits, weak, torch.tensor([0, 1, 1, 0]))[1] == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="a label matrix must have at least 3 classes"):
        uskd_loss(logits, weak, torch.full((4, 2), 0.5), 1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1.0}, "alpha must be at least 0, got -1"),
        ({"ranking": "logit"}, "ranking must be 'log_probability' or 'probability', got 'logit'"),
        ({"feature_layer": "layer9"}, "feature_layer: no module 'layer9' in CNN"),
        ({"network": "mlp"}, "no second-to-last stage of MLP is found: name what the weak head sees by feature_layer"),
        ({"network": MAP_5D, "feature_layer": "1"}, r"feature_layer '1' must give \[B, D\], .*, got \[1, 2, 2, 2, 8\]"),
    ],
)
def test_wrong_arguments_and_feature_layers_raise(options, message):
    with pytest.raises(ValueError, match=message):
        USKD(**{"network": "cnn_tiny", "num_classes": 10, "input_shape": SHAPE, **options})


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.block, self.head = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 10)

    def forward(self, image):
        return self.head(self.block(self.embed(image[:, 0])).mean(1))


@pytest.mark.parametrize(
    ("network", "layer", "feature"),
    [
        ("cnn_tiny", None, lambda n, x: n.layer2(n.layer1(x)).mean((2, 3))),
        ("cnn_tiny", "layer1", lambda n, x: n.layer1(x).mean((2, 3))),
        (Tokens(), "block", lambda n, x: n.block(n.embed(x[:, 0]))[:, 0]),
        ("mlp", "hidden.1", lambda n, x: n.hidden[:2](x.flatten(1))),
    ],
)
def test_weak_head_gets_the_pooled_feature_of_its_layer(network, layer, feature):
    torch.manual_seed(0)
    task = USKD(network, 10, input_shape=SHAPE, feature_layer=layer, channels_last=False)
    x, target = torch.randn(4, *SHAPE), torch.arange(4)
    output = task.network(x)
    terms = task.loss(output, output, target)
    expected = uskd_loss(output, task.weak_head(feature(task.network, x)), target, 0.1, 0.1, 0.1)
    torch.testing.assert_close(terms["uskd"], expected, rtol=1e-4, atol=1e-6)
    terms["uskd"].backward()
    assert task.weak_head.weight.grad.abs().max() > 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in task.parameters())


def test_loss_is_plain_only_with_ce_weight_1():
    assert USKD("cnn_tiny", 10, input_shape=SHAPE).loss_is_plain
    assert not USKD("cnn_tiny", 10, input_shape=SHAPE, ce_weight=3.0).loss_is_plain


def trainer_of(**options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(**{**quiet, "enable_checkpointing": False, "max_epochs": 1, "num_sanity_val_steps": 0, **options})


def test_weak_head_is_trained_and_not_exported(tmp_path):
    task = USKD("cnn_tiny", 10, input_shape=SHAPE, mu=1.0)
    before = task.weak_head.weight.clone()
    trainer = trainer_of(enable_checkpointing=True, callbacks=run_callbacks(RunFolder(tmp_path)))
    trainer.fit(task, DigitsDataModule(fake=True, batch_size=32))
    assert not torch.equal(task.weak_head.weight, before)
    plain = torch.load(tmp_path / "network.pt", weights_only=True)
    assert plain.keys() == task.network.state_dict().keys()
    assert "weak_head.weight" in torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert {"train/loss", "train/loss_ce", "train/loss_uskd"} <= trainer.callback_metrics.keys()


def test_trains_on_mixed_images():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(5)
    image = torch.randn(5, *SHAPE, generator=generator)
    loader = DataLoader(list(zip(image, mixed().float(), strict=True)), 5)
    task = USKD("cnn_tiny", 6, input_shape=SHAPE, optimizer=partial(torch.optim.SGD, lr=0.0), channels_last=False)
    trainer = trainer_of()
    trainer.fit(task, loader)
    logits = task.network(image)  # still in train mode, on the same images
    terms = task.loss(logits, logits, mixed().float())
    assert float(trainer.callback_metrics["train/loss_uskd"]) == pytest.approx(terms["uskd"].item(), rel=1e-5)
    assert float(trainer.callback_metrics["train/loss_ce"]) == pytest.approx(
        -(mixed() * logits.log_softmax(1)).sum(1).mean().item(), rel=1e-5
    )


class ChannelsLast(nn.Module):
    """As Swin: a block whose map has its channels in the last dimension."""

    def __init__(self):
        super().__init__()
        self.block, self.head = nn.Sequential(nn.Linear(1, 6), nn.ReLU(), nn.Linear(6, 6)), nn.Linear(6, 10)

    def forward(self, image):
        return self.head(self.block(image.permute(0, 2, 3, 1)).mean((1, 2)))


def test_channels_last_map_is_averaged_over_its_positions():
    network = ChannelsLast()
    task = USKD(network, 10, input_shape=SHAPE, feature_layer="block", channels_last=False)
    assert task.weak_head.in_features == 6
    image = torch.rand(3, *SHAPE)
    task(image)
    torch.testing.assert_close(task._pooled(), network.block(image.permute(0, 2, 3, 1)).mean((1, 2)))
