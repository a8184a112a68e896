"""DivideMix and DPC as tasks: the split, the step, splits of one side alone, resuming, two processes."""

import warnings
from itertools import pairwise

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lightning_kd.core.batch import Batch
from lightning_kd.core.phased_loader import Phase, PhasedLoader
from lightning_kd.data import DigitsDataModule, SymmetricNoise
from lightning_kd.noisy_labels import DPC, DivideMix, linear_ramp, prior_penalty, sharpen
from lightning_kd.noisy_labels.dpc import calibrated_softmax, dirichlet_kl, dirichlet_nll
from tests.two_processes import on_two_ranks

METHODS = [DivideMix, DPC]


def data_module(**kwargs):
    return DigitsDataModule(
        **{"fake": True, "batch_size": 32, "val_fraction": 0.0, "noise": SymmetricNoise(0.4, "exclusive"), **kwargs}
    )


def task_of(method, **kwargs):
    arguments = {"warmup_epochs": 1, "lambda_u": 5.0, "ramp_epochs": 2.0, "channels_last": False, **kwargs}
    if method is DPC:
        arguments.setdefault("head_width", 16)
    return method("cnn_tiny", 10, input_shape=(1, 8, 8), **arguments)


def trainer_of(**kwargs):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(**{**quiet, "enable_checkpointing": False, "max_epochs": 2, **kwargs})


def fitted(method, epochs=2, data=None, seed=0, trainer=None, **kwargs):
    L.seed_everything(seed, verbose=False)
    task = task_of(method, **kwargs)
    trainer = trainer or trainer_of(max_epochs=epochs)
    trainer.fit(task, datamodule=data or data_module())
    return task, trainer


# -- functions -------------------------------------------------------------------------------------------------------


def test_sharpen_gives_worked_numbers():
    p = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    expected = torch.tensor([[0.657895, 0.236842, 0.105263]], dtype=torch.float64)
    torch.testing.assert_close(sharpen(p, 0.5), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(sharpen(p, 1.0), p)
    assert sharpen(torch.tensor([[1.0, 0.0]]), 0.1).tolist() == [[1.0, 0.0]]


def test_prior_penalty_is_the_kl_divergence_from_the_uniform_prior():
    assert prior_penalty(torch.eye(4)).item() == pytest.approx(0, abs=1e-7)
    p = torch.tensor([[0.7, 0.1, 0.2]], dtype=torch.float64)
    expected = sum(1 / 3 * np.log(1 / 3 / q) for q in (0.7, 0.1, 0.2))
    assert prior_penalty(p).item() == pytest.approx(expected)
    assert prior_penalty(torch.tensor([[1.0, 0.0]])).isfinite()


def test_linear_ramp_gives_worked_numbers():
    values = [25 * linear_ramp(t, 10, 16) for t in (3, 10, 10.25, 14, 18, 26, 40)]
    assert values == [0, 0, 0.390625, 6.25, 12.5, 25, 25]
    assert linear_ramp(10, 10, 0) == 1.0


def test_phased_loader_cycles_the_unlabelled_stream():
    class Loader(list):
        epoch = None

        def set_epoch(self, epoch):
            self.epoch = epoch

    first, second, other = Loader("abcd"), Loader("xy"), Loader("12")
    loader = PhasedLoader([Phase(0, first, other), Phase(1, second)])
    assert len(loader) == 6
    loader.set_epoch(3)
    assert (first.epoch, second.epoch, other.epoch) == (3, 3, 3)
    assert [tuple(b) for b in loader] == [
        (0, "a", "1", 0.0),
        (0, "b", "2", 0.25),
        (0, "c", "1", 0.5),
        (0, "d", "2", 0.75),
        (1, "x", None, 0.0),
        (1, "y", None, 0.5),
    ]


# -- one step --------------------------------------------------------------------------------------------------------


class FixedGenerator:
    """A random generator that always mixes with weight 0.8 and the partners in reverse order."""

    def beta(self, a, b):
        return 0.2

    def permutation(self, count):
        return np.arange(count)[::-1].copy()


@pytest.mark.parametrize("method", METHODS)
def test_semi_supervised_step_equals_its_definition(method):
    """In eval mode (no dropout, no batch statistics), with every part written out again."""
    torch.manual_seed(0)
    task = task_of(method).double().eval()
    task._draws = [FixedGenerator(), FixedGenerator()]
    images = torch.randn(4, 6, 1, 8, 8, dtype=torch.float64)
    target = torch.randint(0, 10, (6,))
    task.clean.allocate(20, torch.device("cpu"))
    task.clean.rows[:, 0] = torch.linspace(0, 1, 20)
    index = torch.arange(6) + 7
    labelled = Batch((images[0], images[1]), target, index, {})
    unlabelled = Batch((images[2], images[3]), target, index, {})
    terms, logits, shown = task.semi_supervised_step(1, labelled, unlabelled, 2.0)

    probability = (lambda z: z.softmax(1)) if method is DivideMix else (lambda z: calibrated_softmax(z, 1.0))
    p = [[probability(net(x)) for x in images] for net in task.networks]
    guess = ((p[0][2] + p[0][3] + p[1][2] + p[1][3]) / 4).square()
    guess = guess / guess.sum(1, keepdim=True)
    w = torch.linspace(0, 1, 20)[index].double()[:, None]
    refined = (w * F.one_hot(target, 10) + (1 - w) * (p[1][0] + p[1][1]) / 2).square()
    refined = refined / refined.sum(1, keepdim=True)
    all_targets = torch.cat([refined, refined, guess, guess])
    all_images = images.flatten(0, 1)
    mixed_image = 0.8 * all_images + 0.2 * all_images.flip(0)
    mixed_target = 0.8 * all_targets + 0.2 * all_targets.flip(0)
    z = task.networks[1](mixed_image)
    torch.testing.assert_close(logits, z[:12])
    assert shown.tolist() == all_targets[:12].argmax(1).tolist()
    if method is DivideMix:
        torch.testing.assert_close(terms["x"], F.cross_entropy(z[:12], mixed_target[:12]))
        second = z.softmax(1)
    else:
        a, b = all_targets.argmax(1)[:12], all_targets.flip(0).argmax(1)[:12]
        nll = 0.8 * dirichlet_nll(z[:12], a, 1.0) + 0.2 * dirichlet_nll(z[:12], b, 1.0)
        kl = 0.8 * dirichlet_kl(z[:12], a, 1.0) + 0.2 * dirichlet_kl(z[:12], b, 1.0)
        torch.testing.assert_close(terms["nll"], nll.mean())
        torch.testing.assert_close(terms["kl"], 0.05 * kl.mean())
        feature = []
        task.networks[1].fc.register_forward_pre_hook(lambda m, x: feature.append(x[0]))
        task.networks[1](mixed_image)
        second = calibrated_softmax(task.heads[1](feature[0]), 1.0)
    weight = 5.0 * 0.5  # half-way up the ramp of 2 epochs that starts after epoch 1
    torch.testing.assert_close(terms["u"], weight * F.mse_loss(second[12:], mixed_target[12:]))
    mean = probability(z).mean(0)
    torch.testing.assert_close(terms["prior"], (0.1 * torch.log(0.1 / mean)).sum())
    assert sum(terms.values()).isfinite()


def test_head_2_learns_only_from_the_unsupervised_loss():
    torch.manual_seed(0)
    index = torch.arange(4)
    image = torch.randn(4, 4, 1, 8, 8)
    batch = Batch((image[0], image[1]), torch.tensor([0, 1, 2, 3]), index, {})
    gradients = {}
    task = task_of(DPC)
    for weight in (0.0, 5.0):
        task.lambda_u = weight
        task.eval()
        task.zero_grad()
        task._draws = [FixedGenerator(), FixedGenerator()]
        task.clean.allocate(4, torch.device("cpu"))
        terms, _, _ = task.semi_supervised_step(0, batch, batch, 9.0)
        torch.stack([v for k, v in terms.items() if k != "u"]).sum().backward(retain_graph=weight > 0)
        assert all(p.grad is None for p in task.heads.parameters())
        gradients[weight] = task.networks[0].fc.weight.grad.clone()
        if weight:
            terms["u"].backward()
            assert all(p.grad is not None for p in task.heads[0].parameters())
            torch.testing.assert_close(task.networks[0].fc.weight.grad, gradients[weight])  # no gradient in head 1
    torch.testing.assert_close(gradients[0.0], gradients[5.0])


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_fit_logs_metrics_and_writes_noisy_labels_csv(method, tmp_path):
    data = data_module()
    task, trainer = fitted(method, 3, data)
    logged = {k.removeprefix("train/"): float(v) for k, v in trainer.callback_metrics.items()}
    names = {"loss", "acc", "clean_fraction", "clean_precision", "clean_recall", "clean_auc", "pure_ratio"}
    names |= {"memorised_wrong", "fitted_clean", "mixture_mean_low", "mixture_mean_high", "loss_u", "loss_prior"}
    assert names <= logged.keys()
    assert logged["clean_auc"] > 0.8
    task.write_results(tmp_path)
    lines = (tmp_path / "noisy_labels.csv").read_text().splitlines()
    assert lines[0] == "index,given,predicted,clean_probability,margin"
    rows = np.array([[float(v) for v in line.split(",")] for line in lines[1:]])
    assert sorted(rows[:, 0]) == data.train_indices.tolist()
    assert (np.diff(rows[:, 3]) >= -1e-6).all()  # most probably wrong first
    given = data.train_target.numpy()[rows[:, 0].astype(int)]
    assert (rows[:, 1] == given).all()
    wrong = given != data.train_clean.numpy()[rows[:, 0].astype(int)]
    assert wrong[: len(wrong) // 4].mean() > wrong[-len(wrong) // 4 :].mean() + 0.3
    scores = task.label_scores()
    assert 0 <= float(scores.score.min()) <= float(scores.score.max()) <= 1


def test_each_network_uses_the_split_of_the_other():
    data = data_module()
    task = task_of(DPC)
    trainer = trainer_of(max_epochs=1)
    trainer.fit(task, datamodule=data)
    task.clean.rows[:, 0], task.clean.rows[:, 1] = 0.9, 0.1
    task.clean.rows[data.train_indices[:80], 0] = 0.2  # as network 1 sees them
    task.clean.rows[data.train_indices[:50], 1] = 0.7
    first, second = task.phases(data)
    assert sorted(first.labelled.sampler.indices) == data.train_indices[:50].tolist()
    assert sorted(second.unlabelled.sampler.indices) == data.train_indices[:80].tolist()


@pytest.mark.parametrize(
    ("method", "options", "labelled", "unlabelled"),
    [
        (DPC, {}, [8] * 5, [8, 8, 8, 8, 8]),  # the unlabelled stream begins anew after two whole batches
        (DPC, {"drop_last": False}, [8] * 5, [8, 8, 4, 8, 8]),
        (DivideMix, {}, [8] * 5, [8, 8, 4, 8, 8]),
    ],
)
def test_partial_unlabelled_batches_are_dropped_by_default_in_dpc_alone(method, options, labelled, unlabelled):
    assert sizes_of_streams(method, 40, 20, **options) == (labelled, unlabelled)


def test_drop_last_false_keeps_the_last_labelled_batch():
    assert sizes_of_streams(DPC, 20, 40, drop_last=False)[0] == [8, 8, 4]
    assert sizes_of_streams(DPC, 20, 40)[0] == [8, 8]


def sizes_of_streams(method, clean, others, **options):
    data = data_module(batch_size=8, train_per_class=6)  # 60 samples
    task = task_of(method, **options)
    trainer_of(max_epochs=1).fit(task, datamodule=data)
    assert len(data.train_indices) == clean + others
    task.clean.rows.fill_(0.1)
    task.clean.rows[data.train_indices[:clean]] = 0.9
    batches = list(PhasedLoader(task.phases(data)[:1]))
    return [len(b.labelled.target) for b in batches], [len(b.unlabelled.target) for b in batches]


@pytest.mark.parametrize("at_start", [False, True])
def test_partner_of_network_2_is_the_latest_or_that_of_the_epoch_start(at_start):
    task = task_of(DPC, partner_at_epoch_start=at_start)
    before, guesses = [], []

    class Watch(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            before.append([p.clone() for p in pl_module.networks[0].parameters()])

    guess = task.partner_logits

    def watched(k, image):
        network = task._earlier[0] if task._earlier and k == 1 else task.networks[1 - k]
        assert not network.training
        found = guess(k, image)
        assert torch.equal(found, network(image))
        if k == 1:
            guesses.append(all(map(torch.equal, network.parameters(), before[-1])))
        return found

    task.partner_logits = watched
    trainer_of(max_epochs=2, callbacks=[Watch()]).fit(task, datamodule=data_module())
    assert guesses
    assert all(same == at_start for same in guesses)
    assert not task._earlier
    assert not any("_earlier" in name for name in task.state_dict())


def test_head_2_decays_after_the_warmup_although_its_loss_has_no_weight():
    task = task_of(DPC, lambda_u=0.0, optimizer=lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=5e-4))
    seen = []

    class Watch(L.Callback):
        def on_train_start(self, trainer, pl_module):
            with torch.no_grad():
                pl_module.heads[0][0].weight.fill_(1.0)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch.network == 0:
                seen.append((batch.unlabelled is not None, float(pl_module.heads[0][0].weight[0, 0].detach())))

    trainer_of(max_epochs=2, callbacks=[Watch()]).fit(task, datamodule=data_module())
    warmup = [value for semi, value in seen if not semi]
    assert warmup == [1.0] * len(warmup)
    semi = [value for semi, value in seen if semi]
    assert semi[0] == pytest.approx(0.99999, abs=1e-7)
    assert semi[1] == pytest.approx(semi[0] - (0.9 * 1e-5 + 1e-5), abs=2e-7)  # with momentum


@pytest.mark.parametrize(
    ("low", "clean", "unlabelled"), [(0.0, 0, False), (1.0, 256, False), (0.0, 1, False), (0.0, 5, True)]
)
def test_splits_of_none_one_or_all_clean_train_without_unlabelled_batches(low, clean, unlabelled):
    data = data_module(noise=None)
    task = task_of(DivideMix)

    def planted(scores):
        probability = torch.full_like(scores, low)
        probability[:clean] = 1.0
        return probability, None

    task.split = planted
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append((trainer.current_epoch, batch.unlabelled is not None))

    trainer = trainer_of(max_epochs=3, callbacks=[Watch()])
    trainer.fit(task, datamodule=data)
    assert {epoch for epoch, _ in seen} == {0, 1, 2}
    assert {mixed for epoch, mixed in seen if epoch} == {unlabelled}
    assert all(parameter.isfinite().all() for parameter in task.parameters())
    assert (task.clean.rows == 1).sum() == 2 * (clean if low == 0 else len(task.clean.rows))


def test_strong_weight_one_head_and_margin_split_take_effect():
    task, trainer = fitted(DPC, 2, strong_weight=1.0, heads=1, split="margin")
    assert "train/loss_strong" in trainer.callback_metrics
    assert not task.heads
    verdict = task._network_scores[0]
    assert verdict.mixture is None
    torch.testing.assert_close(verdict.clean_probability, verdict.score)


def test_loss_history_averages_the_scores():
    task, _ = fitted(DivideMix, 3, loss_history=2)
    rows = task.memories["scores"].rows[task._network_scores[0].index]
    assert (rows >= 0).all()
    torch.testing.assert_close(task._network_scores[1].score, rows[:, 1].double().mean(1), atol=1e-6, rtol=0)


def test_loss_history_begins_with_the_first_split(monkeypatch):
    """As the official code, which keeps no scores of the warm-up before its last epoch."""
    ends = torch.tensor([[0, 0.2, 0.4, 0.6, 0.8, 1], [1, 0.8, 0.6, 0.4, 0.2, 0], [0, 0.1, 0.3, 0.7, 0.9, 1]]).double()
    found, kept = [], []

    class Watch(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            def fixed(scores, clip=0.0):
                return ends[trainer.current_epoch].repeat(len(scores) // 6 + 1)[: len(scores)]

            monkeypatch.setattr("lightning_kd.noisy_labels.dividemix.unit_scores", fixed)
            if trainer.current_epoch:
                found.append(pl_module._network_scores[0].score[:6])
                kept.append((pl_module.memories["scores"].rows >= 0).any())

    task = task_of(DivideMix, warmup_epochs=2, loss_history=5)
    trainer = trainer_of(max_epochs=3, callbacks=[Watch()])
    trainer.fit(task, datamodule=data_module())
    found.append(task._network_scores[0].score[:6])
    expected = [ends[0], ends[1], torch.tensor([0.5, 0.45, 0.45, 0.55, 0.55, 0.5]).double()]
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), atol=1e-6, rtol=0)
    assert [bool(any_) for any_ in kept] == [False, True]


def test_training_one_network_keeps_the_running_statistics_of_the_other():
    task = task_of(DPC)
    statistics = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            statistics.append((batch.network, [net.layer1[1].running_mean.clone() for net in pl_module.networks]))

    trainer_of(max_epochs=2, callbacks=[Watch()]).fit(task, datamodule=data_module())
    for (before, old), (now, new) in pairwise(statistics):
        if before == now:
            assert (old[now] != new[now]).any()
            assert (old[1 - now] == new[1 - now]).all()


def test_unsupported_trainer_settings_and_wrong_arguments_raise():
    with pytest.raises(ValueError, match=r"model\.gradient_clip_val"):
        trainer_of(gradient_clip_val=1.0).fit(task_of(DPC), datamodule=data_module())
    with pytest.raises(ValueError, match=r"raise data\.batch_size"):
        trainer_of(accumulate_grad_batches=2).fit(task_of(DPC), datamodule=data_module())
    loader = [(torch.randn(4, 1, 8, 8), torch.arange(4))]
    with pytest.raises(ValueError, match="data module"):
        trainer_of().fit(task_of(DPC), loader)
    for arguments in ({"warmup_epochs": 0}, {"threshold": 1.0}, {"clip": 0.5}, {"temperature": 0.0}, {"lambda_u": -1}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            task_of(DPC, **arguments)
    for arguments in ({"split": "x"}, {"heads": 3}, {"gamma": 0.0}, {"beta": -1.0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            task_of(DPC, **arguments)


def test_clipping_bounds_the_step():
    moved = []
    for clip in (None, 1e-3):
        L.seed_everything(0, verbose=False)
        task = task_of(DPC, gradient_clip_val=clip, optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
        before = [p.detach().clone() for p in task.parameters()]
        trainer_of(max_epochs=1, limit_train_batches=1).fit(task, datamodule=data_module())
        change = [(p.detach() - q).square().sum() for p, q in zip(task.parameters(), before, strict=True)]
        moved.append(float(torch.stack(change).sum().sqrt()))
    assert moved[0] > 0.01
    assert moved[1] == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_trains_in_other_precisions(precision):
    _, trainer = fitted(DPC, 2, trainer=trainer_of(precision=precision))
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


@pytest.mark.parametrize("method", METHODS)
def test_resumes_to_the_bit(method, tmp_path):
    def run(epochs, folder, resume=None):
        L.seed_everything(1, verbose=False)
        task = task_of(method, lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5))
        trainer = trainer_of(max_epochs=epochs)
        trainer.fit(task, datamodule=data_module(augment=True), ckpt_path=resume, weights_only=True)
        trainer.save_checkpoint(folder / "end.ckpt")
        return task

    whole = run(4, tmp_path)
    run(2, tmp_path)
    torch.manual_seed(99)
    again = run(4, tmp_path, tmp_path / "end.ckpt")
    assert torch.load(tmp_path / "end.ckpt", weights_only=True)["epoch"] == 4
    for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(whole.clean.rows, again.clean.rows)
    for a, b in zip(whole.optimizers(), again.optimizers(), strict=True):
        assert a.param_groups[0]["lr"] == b.param_groups[0]["lr"] == 0.0125


def _split_on_two(state):
    warnings.simplefilter("ignore")
    L.seed_everything(0, verbose=False)
    task = task_of(DPC)
    task.load_state_dict(state)
    trainer = trainer_of(max_epochs=1, strategy="ddp", devices=2, limit_train_batches=1)
    task.optimize = lambda *args: None  # the weights stay as they are
    for network in task.networks:
        network.eval()
        network.train = lambda mode=True: None
    trainer.fit(task, datamodule=data_module())
    return task.clean.rows.tolist()


def _train_on_two():
    warnings.simplefilter("ignore")
    L.seed_everything(0, verbose=False)
    task = task_of(DPC)
    trainer = trainer_of(max_epochs=3, strategy="ddp", devices=2)
    trainer.fit(task, datamodule=data_module(batch_size=16))
    return trainer.global_step, [p.double().sum().item() for p in task.parameters()], task.clean.rows.tolist()


def test_two_processes_make_the_split_of_one():
    task, _ = fitted(DPC, 1)
    state = {name: value.clone() for name, value in task.state_dict().items()}
    ranks = on_two_ranks(_split_on_two, state)
    assert ranks[0] == ranks[1]
    torch.testing.assert_close(torch.tensor(ranks[0]), task.clean.rows, atol=1e-5, rtol=0)


def test_two_processes_have_equal_weights_and_splits():
    first, second = on_two_ranks(_train_on_two)
    assert first == second


def test_a_limited_epoch_trains_both_networks():
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(batch.network)

    trainer_of(max_epochs=1, limit_train_batches=4, callbacks=[Watch()]).fit(task_of(DPC), datamodule=data_module())
    assert seen == [0, 1, 0, 1]
    with pytest.raises(ValueError, match=r"overfit_batches=2: train on a few samples with data\.train_per_class"):
        trainer_of(overfit_batches=2).fit(task_of(DPC), datamodule=data_module())


def test_second_fit_scores_labels_anew_and_label_scores_change_no_memory():
    task = task_of(DivideMix, loss_history=3)
    for noise in (None, SymmetricNoise(0.4, "exclusive")):
        data = data_module(noise=noise)
        trainer_of(max_epochs=1).fit(task, datamodule=data)
        scores = task.label_scores()
        assert torch.equal(scores.given, data.train_target[scores.index])
    rows = [memory.rows.clone() for memory in task.memories.values()]
    task._cached_scores = None
    task.label_scores()
    assert all(torch.equal(a, memory.rows) for a, memory in zip(rows, task.memories.values(), strict=True))


def test_clean_probability_and_fraction_follow_mixture_and_threshold():
    task, trainer = fitted(DPC, 2, threshold=0.9)
    scores = task.label_scores()
    torch.testing.assert_close(scores.clean_probability, scores.mixture.posterior(scores.score)[:, 1])
    used = torch.stack([(v.clean_probability > 0.9).double().mean() for v in task._network_scores]).mean()
    assert float(trainer.callback_metrics["train/clean_fraction"]) == pytest.approx(float(used), abs=1e-6)


def test_logged_loss_is_the_mean_over_the_samples_of_all_steps():
    """Also where some steps lack a term, as the unsupervised one at the start of its ramp."""
    L.seed_everything(0, verbose=False)
    task, values = task_of(DPC), []
    real = task.step_loss

    def noted(terms, logits, target):
        values.append((sum(term.item() for term in terms.values()), len(target)))
        return real(terms, logits, target)

    task.step_loss = noted
    trainer = trainer_of(max_epochs=2)
    trainer.fit(task, datamodule=data_module())
    second = values[-trainer.num_training_batches :]
    expected = sum(loss * count for loss, count in second) / sum(count for _, count in second)
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(expected, rel=1e-5)


def test_plateau_gets_its_metric_and_labelled_anchors_halve_the_batch():
    def plateau(optimizer):
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
        scheduler.monitor = "train/loss"
        return scheduler

    task, _ = fitted(DPC, 4, lr_scheduler=plateau)
    assert task.optimizers()[0].param_groups[0]["lr"] < 0.05
    task = task_of(DPC, lambda_u=0.0, labelled_anchors=True)
    sizes = []
    task.networks[0].register_forward_pre_hook(
        lambda m, x: sizes.append(len(x[0])) if torch.is_grad_enabled() else None
    )
    trainer_of(max_epochs=2).fit(task, datamodule=data_module())
    assert sizes[-1] == 2 * 32
    with pytest.raises(ValueError, match="labelled_anchors needs lambda_u=0, got 5"):
        task_of(DPC, labelled_anchors=True)


def test_second_network_starts_with_other_weights_or_a_warning():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))
    task = DivideMix(network, 10, input_shape=(1, 8, 8))
    first, second = (net[1].weight for net in task.networks)
    assert (first != second).float().mean() > 0.99

    class Bare(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.fc = torch.nn.Parameter(torch.randn(64)), torch.nn.Linear(64, 10)

        def forward(self, x):
            return self.fc(x.flatten(1) * self.scale)

    with pytest.warns(UserWarning, match="both networks start with the same scale"):
        DivideMix(Bare(), 10, input_shape=(1, 8, 8))
