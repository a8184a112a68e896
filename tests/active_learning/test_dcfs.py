"""DCFS: uncertainties, losses and the query with worked numbers; training with unknown answers, two processes."""

import itertools

import lightning as L
import numpy as np
import pytest
import torch
from torch.distributions import Dirichlet, kl_divergence

from lightning_kd.active_learning import (
    DCFS,
    coarse_to_fine,
    dirichlet_uncertainties,
    discrepancy_loss,
    evidential_kl,
    evidential_nll,
    head_discrepancy,
    run_rounds,
)
from lightning_kd.active_learning.dcfs_selection import uncertainty_score
from lightning_kd.active_learning.evidential_uncertainty import dirichlet_mean, evidence_alpha
from lightning_kd.core.mixture import fit_mixture
from lightning_kd.data import DigitsDataModule
from lightning_kd.pool import PoolRecord, PoolView
from tests.active_learning.runs import pool_data, starter, trainer_of
from tests.active_learning.test_lfosa import with_answers
from tests.two_processes import on_two_ranks

# -- uncertainties ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        ((1, 1, 1, 1), (1.386294, 1.083333, 0.302961, -1.791759)),
        ((10, 1, 1, 1), (0.793730, 0.696312, 0.097418, -4.717205)),
        ((10, 10, 1, 1), (0.997783, 0.937206, 0.060578, -5.081456)),
        ((100, 1, 1, 1), (0.163690, 0.151376, 0.012314, -10.904477)),
        ((3, 2, 1.5, 1), (1.309526, 1.134565, 0.174960, -2.434946)),
    ],
)
def test_uncertainties_equal_worked_numbers(alpha, expected):
    found = dirichlet_uncertainties(torch.tensor([alpha]))
    assert all(part.dtype == torch.float64 and part.shape == (1,) for part in found)
    for name, value in zip(("total", "data", "distribution", "differential_entropy"), expected, strict=True):
        assert getattr(found, name).item() == pytest.approx(value, abs=1e-6)
    assert found.vacuity.item() == pytest.approx(4 / sum(alpha))
    entropy = Dirichlet(torch.tensor(alpha, dtype=torch.float64)).entropy()
    torch.testing.assert_close(found.differential_entropy[0], entropy)


def test_data_uncertainty_without_evidence_is_a_harmonic_sum():
    for classes in (2, 3, 7, 100):
        data = dirichlet_uncertainties(torch.ones(classes)).data.item()
        assert data == pytest.approx(sum(1 / j for j in range(2, classes + 1)))


def test_distribution_uncertainty_of_strong_evidence_is_exact_and_not_negative():
    found = dirichlet_uncertainties(torch.full((1, 4), 1e6))
    assert found.distribution.item() == pytest.approx(3.75e-7, rel=1e-5)
    for size in (1e8, 1e12, 1e15):
        assert dirichlet_uncertainties(torch.tensor([[size, 1.0, size, 3.0]])).distribution.item() >= 0


def test_data_uncertainty_is_the_mean_entropy_of_dirichlet_draws():
    alpha = torch.tensor([3.0, 2, 1.5, 1], dtype=torch.float64)
    draws = torch.from_numpy(np.random.default_rng(0).dirichlet(alpha.numpy(), 400_000))
    assert dirichlet_uncertainties(alpha).data.item() == pytest.approx(
        torch.special.entr(draws).sum(1).mean().item(), abs=1e-3
    )


def test_uncertainties_ignore_class_order_and_evidence_lowers_distribution():
    alpha = torch.tensor([3.0, 2, 1.5, 1])
    for order in itertools.permutations(range(4)):
        for mine, theirs in zip(
            dirichlet_uncertainties(alpha[list(order)]), dirichlet_uncertainties(alpha), strict=True
        ):
            torch.testing.assert_close(mine, theirs)
    for start in (alpha, torch.ones(4)):
        rising = dirichlet_uncertainties(start * torch.tensor([1.0, 2, 10, 1000])[:, None])
        assert (rising.distribution.diff() < 0).all()
    assert (rising.data.diff() > 0).all()  # of balanced evidence


def test_shifted_logits_change_evidential_values_but_not_softmax():
    logits = torch.tensor([[2.0, 0, 0, 0], [0, -2, -2, -2], [6, 4, 4, 4]], dtype=torch.float64)
    assert logits.softmax(1)[:, 0].tolist() == pytest.approx([0.711235] * 3, abs=1e-6)
    alpha = evidence_alpha(logits)
    assert dirichlet_mean(alpha)[:, 0].tolist() == pytest.approx([0.583016, 0.369959, 0.708005], abs=1e-6)
    distribution = dirichlet_uncertainties(alpha).distribution
    assert distribution.tolist() == pytest.approx([0.095468, 0.234491, 0.002618], abs=1e-6)


def test_wrong_alpha_raises():
    for alpha in ([1.0, 0], [1.0, -1], [1.0, float("nan")], [1.0, float("inf")]):
        with pytest.raises(ValueError, match=r"^alpha must be above 0 and finite, got "):
            dirichlet_uncertainties(torch.tensor([alpha]))
    with pytest.raises(ValueError, match=r"^alpha must be \[..., K\] with K at least 2, got \[3, 1\]"):
        dirichlet_uncertainties(torch.ones(3, 1))


# -- the losses ------------------------------------------------------------------------------------------------------

EXAMPLE = torch.tensor([[2.0, 0, -1]], dtype=torch.float64)
FIRST = torch.tensor([0])


def test_evidential_losses_equal_worked_numbers():
    alpha = evidence_alpha(EXAMPLE)
    assert alpha[0].tolist() == pytest.approx([8.389056, 2, 1.367879], abs=1e-6)
    assert dirichlet_mean(alpha)[0].tolist() == pytest.approx([0.713541, 0.170112, 0.116347], abs=1e-6)
    assert evidential_nll(EXAMPLE, FIRST).item() == pytest.approx(0.337515, abs=1e-6)
    assert evidential_kl(EXAMPLE, FIRST).item() == pytest.approx(0.230181, abs=1e-6)
    for gamma in (0.3, 1.0, 5.0):  # the calibrated softmax
        calibrated = (EXAMPLE.exp() + gamma) / (EXAMPLE.exp() + gamma).sum()
        torch.testing.assert_close(dirichlet_mean(evidence_alpha(EXAMPLE, gamma)), calibrated)


def test_evidential_kl_equals_the_kl_of_torch_distributions():
    logits = 3 * torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = torch.arange(50) % 6
    for gamma in (0.1, 1.0, 3.0):
        alpha = evidence_alpha(logits, gamma)
        uniform = Dirichlet(torch.ones_like(alpha))
        torch.testing.assert_close(evidential_kl(logits, None, gamma), kl_divergence(Dirichlet(alpha), uniform))
        expected = kl_divergence(Dirichlet(alpha.scatter(1, target[:, None], 1.0)), uniform)
        torch.testing.assert_close(evidential_kl(logits, target, gamma), expected)


def test_evidential_kl_ignores_the_logit_of_the_target():
    other = EXAMPLE.clone()
    other[0, 0] = -4
    logits = other.requires_grad_()
    kl = evidential_kl(logits, FIRST)
    assert kl.item() == pytest.approx(0.230181, abs=1e-6)
    (gradient,) = torch.autograd.grad(kl, logits)
    assert gradient[0, 0] == 0
    assert (gradient[0, 1:] > 0).all()
    # without evidence for the other classes it is 0, up to the clamp of the logits
    assert evidential_kl(torch.tensor([[3.0, -99, -99]]), FIRST).item() == pytest.approx(0, abs=1e-8)


def test_loss_gradients_equal_finite_differences_and_the_written_out_one():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 5, dtype=torch.float64, generator=generator).requires_grad_()
    other = torch.randn(4, 5, dtype=torch.float64, generator=generator).requires_grad_()
    target = torch.tensor([0, 4, 5, 2])
    known = target.clamp(max=4)
    for function in (evidential_nll, evidential_kl):
        assert torch.autograd.gradcheck(lambda z, f=function: f(z, known, 0.7), [logits])
    for measure in ("l1", "js"):
        assert torch.autograd.gradcheck(lambda a, b, m=measure: discrepancy_loss(a, b, target, 0.7, m), [logits, other])
    (gradient,) = torch.autograd.grad(evidential_nll(EXAMPLE.requires_grad_(), FIRST).sum(), EXAMPLE)
    evidence, alpha = EXAMPLE.detach().exp(), evidence_alpha(EXAMPLE.detach())
    expected = evidence / alpha.sum()
    expected[0, 0] -= evidence[0, 0] / alpha[0, 0]
    torch.testing.assert_close(gradient, expected)


def test_permuting_classes_permutes_gradients():
    order = torch.tensor([2, 0, 1])
    place = order.argsort()
    for function in (evidential_nll, evidential_kl):
        plain = EXAMPLE.detach().clone().requires_grad_()
        moved = EXAMPLE.detach()[:, order].clone().requires_grad_()
        function(plain, torch.tensor([1])).sum().backward()
        function(moved, place[1:2]).sum().backward()
        torch.testing.assert_close(moved.grad, plain.grad[:, order])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_logits_give_finite_losses_and_no_gradient(dtype):
    logits = torch.tensor([[200.0, -200, 3], [9, 20, -8]]).to(dtype).requires_grad_()
    target = torch.tensor([1, 0])
    for values in (evidential_nll(logits, target), evidential_kl(logits, target), evidential_kl(logits, None)):
        assert values.dtype == torch.float32
        assert values.isfinite().all()
        (gradient,) = torch.autograd.grad(values.sum(), logits)
        assert gradient.isfinite().all()
        assert (gradient[logits.abs() > 10] == 0).all()


def test_float32_losses_agree_with_float64():
    logits = 40 * torch.rand(500, 10, generator=torch.Generator().manual_seed(0)) - 20
    target = torch.arange(500) % 10
    for function in (evidential_nll, evidential_kl):
        torch.testing.assert_close(function(logits, target), function(logits.double(), target).float())


def test_head_discrepancy_values_bounds_and_symmetry():
    a, b = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.1, 0.2, 0.7]])
    assert head_discrepancy(a, b).item() == pytest.approx(0.4)
    for measure, most in (("l1", 2 / 3), ("js", np.log(2))):
        assert head_discrepancy(a, a, measure).item() == 0
        assert 0 < head_discrepancy(a, b, measure).item() < most
        torch.testing.assert_close(head_discrepancy(a, b, measure), head_discrepancy(b, a, measure))
    extreme = torch.tensor([[1.0, 1e-9, 1e-9]]), torch.tensor([[1e-9, 1e-9, 1.0]])
    assert head_discrepancy(*extreme).item() == pytest.approx(2 / 3)


def test_discrepancy_loss_is_the_mean_of_known_minus_that_of_unknown():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(6, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    target = torch.tensor([0, 1, 2, 3, 0, 3])
    apart = head_discrepancy(*(dirichlet_mean(evidence_alpha(z)) for z in (a, b)))
    expected = apart[target < 3].mean() - apart[target == 3].mean()
    torch.testing.assert_close(discrepancy_loss(a, b, target), expected)
    assert discrepancy_loss(a, a, target) == 0
    gradients = []
    for first, second in ((a, b), (b, a)):
        logits = [first.clone().requires_grad_(), second.clone().requires_grad_()]
        value = discrepancy_loss(*logits, target)
        torch.testing.assert_close(value, expected)
        gradients.append(torch.autograd.grad(value, logits))
    torch.testing.assert_close(gradients[0], gradients[1][::-1])
    # a part without samples counts as 0, as do unknown samples on which the heads agree
    torch.testing.assert_close(discrepancy_loss(a[:3], b[:3], target[:3]), apart[:3].mean())
    torch.testing.assert_close(discrepancy_loss(a[3:4], b[3:4], target[3:4]), -apart[3])
    same = torch.cat([a[:3], a[:2]]), torch.cat([b[:3], a[:2]])
    torch.testing.assert_close(discrepancy_loss(*same, torch.tensor([0, 1, 2, 3, 3])), apart[:3].mean())


# -- the query -------------------------------------------------------------------------------------------------------


def test_coarse_to_fine_takes_the_highest_fine_of_the_lowest_coarse_scores():
    generator = torch.Generator().manual_seed(0)
    coarse, fine = torch.rand(50, generator=generator), torch.rand(50, generator=generator)
    assert set(coarse_to_fine(coarse, fine, 7, 1).tolist()) == set(coarse.argsort()[:7].tolist())
    for factor in (50 / 7, 100, np.inf):
        assert coarse_to_fine(coarse, fine, 7, factor).tolist() == fine.argsort(descending=True)[:7].tolist()
    candidates = coarse.argsort()[:21]
    expected = candidates[fine[candidates].argsort(descending=True)][:7]
    assert coarse_to_fine(coarse, fine, 7, 3).tolist() == expected.tolist()
    assert len(coarse_to_fine(coarse, fine, 80, 3)) == 50
    assert coarse_to_fine(torch.zeros(6), torch.zeros(6), 2, 1.4).tolist() == [0, 1]
    assert coarse_to_fine(torch.tensor([3.0, 1, 2, 1]), torch.zeros(4), 3, 2).tolist() == [1, 3, 2]
    assert coarse_to_fine(torch.zeros(0), torch.zeros(0), 2).tolist() == []


def test_number_of_coarse_candidates_is_rounded_up_exactly():
    coarse = torch.arange(150.0)
    assert coarse_to_fine(coarse, coarse, 100, 1.1).tolist() == list(range(109, 9, -1))  # 1.1 * 100 > 110
    assert coarse_to_fine(coarse, coarse, 5, 1.1).tolist() == [5, 4, 3, 2, 1]  # 5.5 is rounded up


def test_uncertainty_score_is_the_sum_of_the_scaled_parts():
    data, distribution = torch.tensor([1.0, 2, 3, 5]), torch.tensor([0.3, 0.1, 0.2, 0.2])
    assert uncertainty_score(data, distribution).tolist() == pytest.approx([1.0, 0.25, 1.0, 1.5])
    assert uncertainty_score(data, distribution, "data").tolist() == [0, 0.25, 0.5, 1]
    assert uncertainty_score(data, distribution, "distribution").tolist() == pytest.approx([1, 0, 0.5, 0.5])
    assert uncertainty_score(data, distribution, "none").tolist() == [0] * 4
    assert uncertainty_score(data, torch.full((4,), 0.3)).tolist() == [0, 0.25, 0.5, 1]  # equal ones count as 0
    assert uncertainty_score(torch.zeros(0), torch.zeros(0), "mixture").shape == (0,)


def test_mixture_uncertainty_score_is_made_of_both_posteriors():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.rand(200, generator=generator).double() + torch.arange(200) % m for m in (2, 3)]
    scaled = [(part - part.min()) / (part.max() - part.min()) for part in parts]
    posteriors = [fit_mixture(part).posterior(part)[:, 0] for part in scaled]
    torch.testing.assert_close(uncertainty_score(*parts, "mixture"), -(posteriors[0] * posteriors[1]).log())


def pool_of(count):
    empty = np.empty(0, np.int64)
    return PoolView(np.arange(count) + 100, empty, empty, empty, 4)


def task_of(**kwargs):
    return DCFS("mlp_8", 4, input_shape=(1, 8, 8), **kwargs)


def test_select_follows_the_coarse_and_fine_score_options():
    rows = torch.rand(4, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = dict(zip(("total", "data", "distribution", "discrepancy"), rows, strict=True))
    coarse = uncertainty_score(scores["data"], scores["distribution"])

    def chosen(**kwargs):
        query = task_of(**kwargs).select(scores, pool_of(40), 5, np.random.default_rng(0))
        return (query.index - 100).tolist(), query.score

    index, score = chosen()
    assert index == coarse_to_fine(coarse, scores["discrepancy"], 5, 3).tolist()
    assert score.tolist() == scores["discrepancy"][index].tolist()
    assert chosen(coarse_score="none")[0] == scores["discrepancy"].argsort(descending=True)[:5].tolist()
    assert chosen(fine_score="none")[0] == coarse.argsort()[:5].tolist()
    assert chosen(coarse_score="data", fine_score="none")[0] == scores["data"].argsort()[:5].tolist()
    assert chosen(coarse_score="none", fine_score="total")[0] == scores["total"].argsort(descending=True)[:5].tolist()
    assert set(chosen(coarse_factor=1)[0]) == set(coarse.argsort()[:5].tolist())


def test_select_can_take_the_whole_pool_and_ignores_its_order():
    rows = torch.rand(3, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = dict(zip(("data", "distribution", "discrepancy"), rows, strict=True))
    whole = task_of().select(scores, pool_of(40), 40, np.random.default_rng(0))
    assert sorted(whole.index) == list(range(100, 140))
    again = task_of().select({k: v.flip(0) for k, v in scores.items()}, pool_of(40), 9, np.random.default_rng(0))
    first = task_of().select(scores, pool_of(40), 9, np.random.default_rng(0))
    assert (239 - again.index).tolist() == first.index.tolist()


# -- the task --------------------------------------------------------------------------------------------------------


def fitted(trainer=None, data=None, ckpt_path=None, **kwargs):
    L.seed_everything(0, verbose=False)
    task = task_of(**kwargs)
    trainer = trainer or trainer_of()
    trainer.fit(task, datamodule=data or pool_data(), ckpt_path=ckpt_path)
    return task, trainer


def test_predictions_and_uncertainties_are_means_of_two_different_heads():
    task = task_of(gamma=0.5).eval()
    assert not torch.equal(task.network.fc.weight, task.second_head.weight)
    image = torch.rand(6, 1, 8, 8)
    first, second = task.heads(image)
    torch.testing.assert_close(first, task.network(image))
    torch.testing.assert_close(second, task.second_head(task.network.hidden(image.flatten(1))))
    p = [(z.exp() + 0.5) / (z.exp() + 0.5).sum(1, keepdim=True) for z in (first, second)]
    torch.testing.assert_close(task.scores_and_probabilities(image)[1], (p[0] + p[1]) / 2)
    probabilities, scores = task.pool_scores(image, None)
    torch.testing.assert_close(probabilities, (p[0] + p[1]) / 2)
    torch.testing.assert_close(scores["discrepancy"].float(), (p[0] - p[1]).abs().mean(1))
    for name in ("total", "data", "distribution"):
        each = [getattr(dirichlet_uncertainties(z.detach().exp() / 0.5 + 1), name) for z in (first, second)]
        torch.testing.assert_close(scores[name], (each[0] + each[1]) / 2, atol=1e-6, rtol=1e-6)
    assert all(value.dtype == torch.float64 for value in scores.values())


@pytest.mark.parametrize(("epoch", "rise"), [(0, 0.0), (1, 0.5), (2, 1.0), (7, 1.0)])
def test_loss_terms_of_a_step_equal_a_plain_computation(epoch, rise, monkeypatch):
    task = task_of(annealing_epochs=2, kl_weight=0.8, discrepancy_weight=0.7, unknown_evidence_weight=0.3).double()
    image = torch.rand(6, 1, 8, 8, dtype=torch.float64)
    target = torch.tensor([0, 4, 3, 1, 4, 2])
    seen = {}
    monkeypatch.setattr(DCFS, "current_epoch", epoch)
    monkeypatch.setattr(task, "step_loss", lambda terms, *rest, **more: seen.update(terms))
    task.training_step((image, target), 0)
    known, unknown = target < 4, target == 4
    alphas = [z.exp() + 1 for z in task.heads(image)]
    p = [alpha / alpha.sum(1, keepdim=True) for alpha in alphas]
    apart = (p[0] - p[1]).abs().mean(1)
    nll = sum(-q[known].gather(1, target[known, None]).log().mean() for q in p)
    kl = sum(evidential_kl(z[known], target[known]).mean() for z in task.heads(image))
    uniform = Dirichlet(torch.ones(4, dtype=torch.float64))
    evidence = sum(kl_divergence(Dirichlet(alpha[unknown]), uniform).mean() for alpha in alphas)
    torch.testing.assert_close(seen["nll"], nll)
    torch.testing.assert_close(seen["kl"], 0.8 * rise / 4 * kl)
    torch.testing.assert_close(seen["discrepancy"], 0.7 * (apart[known].mean() - apart[unknown].mean()))
    torch.testing.assert_close(seen["evidence"], 0.3 / 4 * evidence)


def test_extra_output_for_unknown_classes_in_scores_and_losses(monkeypatch):
    task = task_of(num_outputs="K+1", annealing_epochs=0, kl_weight=0.8, discrepancy_weight=0.7).double()
    assert task.network.fc.out_features == task.second_head.out_features == 5
    image = torch.rand(6, 1, 8, 8, dtype=torch.float64)
    target = torch.tensor([0, 4, 3, 1, 4, 2])
    heads = task.heads(image)
    p = [(z.exp() + 1) / (z.exp() + 1).sum(1, keepdim=True) for z in heads]
    known = (p[0] + p[1])[:, :4]
    probabilities, scores = task.pool_scores(image, None)
    expected = known / known.sum(1, keepdim=True)
    torch.testing.assert_close(probabilities, expected.float())
    torch.testing.assert_close(task(image), expected.log())
    assert task.scores_and_probabilities(image)[1].shape == (6, 4)
    apart = (p[0] - p[1]).abs().mean(1)
    torch.testing.assert_close(scores["discrepancy"], apart)
    data = [dirichlet_uncertainties(z.detach().exp() + 1).data for z in heads]
    torch.testing.assert_close(scores["data"], (data[0] + data[1]) / 2)

    seen = {}
    monkeypatch.setattr(DCFS, "current_epoch", 3)
    monkeypatch.setattr(task, "step_loss", lambda terms, logits, *rest, **more: seen.update(terms, logits=logits))
    task.training_step((image, target), 0)
    torch.testing.assert_close(seen["nll"], sum(-q.gather(1, target[:, None]).log().mean() for q in p))
    torch.testing.assert_close(seen["kl"], 0.8 / 5 * sum(evidential_kl(z, target).mean() for z in heads))
    torch.testing.assert_close(seen["discrepancy"], 0.7 * (apart[target < 4].mean() - apart[target == 4].mean()))
    assert seen["logits"].shape == (6, 4)


def test_fit_with_an_extra_output_learns_to_predict_unknown(tmp_path):
    data = with_answers(tmp_path)
    task, trainer = fitted(trainer_of(max_epochs=20), data=data, num_outputs="K+1")
    batch = next(iter(data.loader("train", data.unknown_indices)))
    with torch.no_grad():
        assert (task.heads(batch.image)[0].argmax(1) == 4).float().mean() > 0.7
    assert trainer.predict(task, datamodule=data)[0]["probabilities"].shape[1] == 4


def test_fit_logs_its_losses_and_predict_gives_the_pool_scores(tmp_path):
    data = with_answers(tmp_path)
    task, trainer = fitted(data=data, unknown_evidence_weight=0.1)
    assert {"train/loss", "train/acc", "train/loss_nll", "train/loss_kl", "train/loss_discrepancy"} <= set(
        trainer.callback_metrics
    )
    out = trainer.predict(task, datamodule=data)[0]
    assert set(out) == {"index", "prediction", "probabilities", "total", "data", "distribution", "discrepancy"}
    assert set(task.exports()) == {"network", "second_head"}


def test_train_accuracy_counts_only_known_samples(tmp_path):
    data = with_answers(tmp_path)
    task, trainer = fitted(trainer_of(max_epochs=1, limit_train_batches=1), data=data, optimizer=None)
    loader = data.loader(
        "train", np.union1d(data.known_indices, data.unknown_indices), shuffle=True, augment=True, batch_size=32
    )
    batch = next(iter(loader))
    L.seed_everything(0, verbose=False)
    fresh = task_of()
    right = fresh.scores_and_probabilities(batch.image)[1].argmax(1) == batch.target
    known = batch.target < 4
    assert 0 < known.sum() < len(known)
    assert trainer.callback_metrics["train/acc"].item() == pytest.approx(right[known].float().mean().item())
    assert task.network is task.main_network


def test_discrepancy_is_higher_for_unknown_samples_after_training(tmp_path):
    data = with_answers(tmp_path)
    task, _ = fitted(trainer_of(max_epochs=30), data=data)
    task.eval()
    apart = [
        task.pool_scores(next(iter(data.loader("train", index))).image, None)[1]["discrepancy"].mean()
        for index in (data.known_indices, data.unknown_indices)
    ]
    assert apart[1] > 2 * apart[0]


def test_resume_to_the_bit(tmp_path):
    whole, _ = fitted(trainer_of(max_epochs=3))
    _, trainer = fitted(trainer_of(max_epochs=1))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    again, _ = fitted(trainer_of(max_epochs=3), ckpt_path=tmp_path / "one.ckpt")
    assert again.loaded_progress[1] > 0
    assert all(map(torch.equal, whole.state_dict().values(), again.state_dict().values()))
    assert DCFS.load_from_checkpoint(tmp_path / "one.ckpt").num_classes == 4


def test_bf16_fit_without_unknown_answers_has_a_finite_loss():
    _, trainer = fitted(trainer_of(precision="bf16-mixed"), unknown_evidence_weight=0.1)
    assert trainer.callback_metrics["train/loss_evidence"] == 0
    assert trainer.callback_metrics["train/loss"].isfinite()


def test_wrong_arguments_raise():
    with pytest.raises(ValueError, match=r"^gamma must be above 0, got 0"):
        task_of(gamma=0)
    for name in ("kl_weight", "annealing_epochs", "discrepancy_weight", "unknown_evidence_weight"):
        with pytest.raises(ValueError, match=f"^{name} must be at least 0, got -1"):
            task_of(**{name: -1})
    with pytest.raises(ValueError, match=r"^coarse_factor must be at least 1, got 0.5"):
        task_of(coarse_factor=0.5)
    for name in ("discrepancy", "coarse_score", "fine_score", "num_outputs"):
        with pytest.raises(ValueError, match=rf"^{name} must be one of \[.*\], got 'x'"):
            task_of(**{name: "x"})
    with pytest.raises(ValueError, match=r"^coarse_score and fine_score must not both be 'none'"):
        task_of(coarse_score="none", fine_score="none")
    with pytest.raises(ValueError, match=r"^unknown_evidence_weight must be 0 with num_outputs='K\+1', got 0.2"):
        task_of(num_outputs="K+1", unknown_evidence_weight=0.2)
    with pytest.raises(ValueError, match=r"^MLP gives \[2, 4\], expected \[B, 5\]: give a network"):
        DCFS(task_of().network, 4, input_shape=(1, 8, 8), num_outputs="K+1")(torch.rand(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"DCFS needs a pool, got DigitsDataModule: wrap your data module"):
        trainer_of().fit(DCFS("mlp_8", 10, input_shape=(1, 8, 8)), datamodule=DigitsDataModule(fake=True))


def test_two_rounds_query_60_different_samples(tmp_path):
    start = starter(DCFS, network="mlp_16", num_classes=4, input_shape=(1, 8, 8))
    rows = run_rounds(start, tmp_path, say=str)
    assert rows[-1]["labels"] == 60
    assert len({row["index"] for row in PoolRecord.load(tmp_path / "pool.json").queries}) == 60


# -- several processes -----------------------------------------------------------------------------------------------

SETTINGS = (
    {"unknown_evidence_weight": 0.5, "annealing_epochs": 0},
    {"num_outputs": "K+1", "annealing_epochs": 0},
)


def _two_ranks(folder):
    data = with_answers(folder, batch_size=3)  # so few that a process often has no unknown or only unknown samples
    results = []
    for settings in SETTINGS:
        trainer = trainer_of(strategy="ddp", devices=2, precision="64-true", num_sanity_val_steps=0)
        task, _ = fitted(trainer, data, **settings)
        logged = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("train/")}
        results.append(({name: value.tolist() for name, value in task.state_dict().items()}, logged))
    return results


def test_two_processes_train_as_one(tmp_path):
    for (first, logged), (second, _), settings in zip(*on_two_ranks(_two_ranks, tmp_path), SETTINGS, strict=True):
        assert first == second
        task, trainer = fitted(trainer_of(precision="64-true"), with_answers(tmp_path, batch_size=6), **settings)
        for name, value in task.state_dict().items():
            torch.testing.assert_close(torch.tensor(first[name], dtype=value.dtype), value, atol=1e-9, rtol=1e-9)
        for name, value in logged.items():
            assert trainer.callback_metrics[name].item() == pytest.approx(value, rel=1e-5)
