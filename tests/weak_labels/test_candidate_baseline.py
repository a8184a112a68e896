"""The baseline rules for candidate labels: their losses, stored weights and training samples."""

import pytest
import torch
import torch.nn.functional as F

from lightning_kd.data import DigitsDataModule
from lightning_kd.weak_labels import (
    CandidateBaseline,
    candidate_likelihood_loss,
    likely_weights,
    weighted_candidate_loss,
)
from tests.weak_labels.runs import built, data_module, fitted, resumes_to_the_bit, trainer_of


class Recording(CandidateBaseline):
    """Keeps batches, logits and losses."""

    def on_fit_start(self):
        super().on_fit_start()
        self.steps = []

    def training_step(self, batch, batch_idx):
        self.steps.append([getattr(batch, "meta", batch)])
        return super().training_step(batch, batch_idx)

    def step_loss(self, terms, logits, target):
        self.steps[-1] += [logits.detach(), terms["loss"].detach()]
        return super().step_loss(terms, logits, target)


def recorded(rule, batches=2, epochs=2):
    trainer = trainer_of(max_epochs=epochs, limit_train_batches=batches)
    return fitted(Recording, trainer=trainer, rule=rule)


def test_candidate_losses_equal_a_plain_computation():
    logits = torch.tensor([[0.3, -1.0, 2.0], [0.0, 1.0, 0.5]], dtype=torch.float64, requires_grad=True)
    candidates = torch.tensor([[1, 1, 0], [0, 1, 0]])
    p = logits.softmax(1)
    inside = candidate_likelihood_loss(logits, candidates)
    torch.testing.assert_close(inside, -(p * candidates).sum(1).log().mean())
    torch.testing.assert_close(weighted_candidate_loss(logits, candidates), -(candidates * p.log()).sum() / 2)
    # the likelihood has the gradient of the loss weighted by the candidates' own probabilities
    weighted = weighted_candidate_loss(logits, likely_weights(logits, candidates))
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (inside, weighted)))


def test_uniform_and_cc_losses_equal_a_plain_computation():
    for rule in ("uniform", "cc"):
        task, trainer = recorded(rule)
        assert task.stored is None
        for batch, logits, loss in task.steps:
            there = batch.extras["candidates"].float()
            log_p = logits.log_softmax(1)
            equal = -(log_p * there / there.sum(1, keepdim=True)).sum(1).mean()
            torch.testing.assert_close(loss, equal if rule == "uniform" else -(log_p.exp() * there).sum(1).log().mean())
        assert 0 < trainer.callback_metrics["train/true_weight"] < 1


def test_proden_stores_the_probabilities_of_each_step():
    task, _ = recorded("proden", batches=8)
    memory = {}
    for batch, logits, loss in task.steps:
        there = batch.extras["candidates"].float()
        equal = there / there.sum(1, keepdim=True)
        index = batch.index.tolist()
        weights = torch.stack([memory.get(i, equal[k]) for k, i in enumerate(index)])
        torch.testing.assert_close(loss, -(weights * logits.log_softmax(1)).sum(1).mean())
        likely = likely_weights(logits, there)
        memory.update({i: likely[k] for k, i in enumerate(index)})
    assert len(memory) < sum(len(batch.index) for batch, *_ in task.steps)
    for i, row in memory.items():
        torch.testing.assert_close(task.stored.rows[i], row)


def test_rc_stores_the_probabilities_after_the_step():
    task, _ = recorded("rc")
    batch, logits, _ = task.steps[-1]
    with torch.no_grad():
        after = likely_weights(task.network(batch.image), batch.extras["candidates"])
    torch.testing.assert_close(task.stored.rows[batch.index], after)
    assert not torch.allclose(after, likely_weights(logits, batch.extras["candidates"]))


def test_meta_and_oracle_train_on_true_labels_of_their_own_samples():
    for rule in ("meta", "oracle"):
        task, trainer = recorded(rule, batches=8)
        data = trainer.datamodule
        assert trainer.global_step == 16
        index = torch.cat([batch.index for batch, *_ in task.steps])
        own = data.meta_indices if rule == "meta" else data.train_indices
        assert {*index.tolist()} == {*own.tolist()}
        for batch, logits, loss in task.steps:
            torch.testing.assert_close(loss, F.cross_entropy(logits, data.train_target[batch.index]))


def test_wrong_rule_and_missing_candidates_or_meta_set_raise():
    with pytest.raises(ValueError, match=r"^rule must be one of uniform, proden, rc, cc, meta, oracle, got 'em'"):
        built(CandidateBaseline, rule="em")
    with pytest.raises(ValueError, match=r"^CandidateBaseline learns from candidates, and DigitsDataModule has none"):
        fitted(CandidateBaseline, DigitsDataModule(fake=True))
    with pytest.raises(ValueError, match=r"^CandidateBaseline needs a few samples with true labels"):
        fitted(CandidateBaseline, data_module(meta_per_class=None), rule="meta")


def test_resumes_to_the_bit(tmp_path):
    assert resumes_to_the_bit(CandidateBaseline, tmp_path, rule="rc")
