"""BUAL: queries uncertain samples of known classes, judged by a normally and a negatively trained network.

Chen-Chen Zong, Ye-Wen Wang, Kun-Peng Ning, Hai-Bo Ye, Sheng-Jun Huang. Bidirectional Uncertainty-Based Active Learning
for Open-Set Annotation. ECCV 2024, arXiv 2402.15198.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.active_learning.bual_score import (
    Combine,
    Uncertainty,
    bidirectional_score,
    complementary_labels,
    copy_backbone,
    not_unknown,
    rank,
    unknown_log_odds,
)
from lightning_kd.active_learning.negative_stage import NegativeStage, check_choices, check_fit
from lightning_kd.active_learning.sequential_training import SequentialTrainingTask
from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.batch import Batch
from lightning_kd.core.feature_hooks import find_classifier
from lightning_kd.core.inference_pass import ordered_pass
from lightning_kd.core.losses import at_least_float32, negative_learning_loss
from lightning_kd.core.outputs import class_logits
from lightning_kd.core.phased_loader import Phase, PhaseBatch
from lightning_kd.core.seeding import EpochSeeding, numpy_generator
from lightning_kd.pool import PoolView, Query

__all__ = ["BUAL", "bidirectional_score", "complementary_labels"]

POSITIVE, AUXILIARY, NEGATIVE = range(3)  # numbers of the networks


class BUAL(SequentialTrainingTask):
    """BUAL (Zong et al., ECCV 2024, arXiv 2402.15198, algorithm 1): queries uncertain samples of known classes.

    In an open set, uncertainty alone queries unknown classes. BUAL therefore trains a second network negatively, on
    classes that a sample does *not* have. This makes it confident about unknown classes, so that its uncertainty and
    that of the normally trained network together point to uncertain samples of known classes.

    A fit has two stages. Positive stage: the reported network learns the labelled samples of known classes; once there
    are answers "unknown", an auxiliary network with K+1 outputs learns known and unknown samples, in turn within each
    epoch. Negative stage, the last ``negative_epochs`` epochs: a copy of the reported network's backbone with a new
    classifier learns, by ``-log(1 - p)``, one complementary label a sample and epoch, for the labelled samples and a
    random subset of the pool. Its probabilities are averaged over snapshots; the reported network does not change.
    Optimizer and learning rate schedule start anew: a schedule counts the epochs of its stage. The last round of
    ``lightning-kd active`` makes no query and has no negative stage.

    The query: samples that the auxiliary network predicts as unknown are left out; of the others those with the
    smallest ``bidirectional_score`` (largest with ``combine="paper"``) are taken, ties by the lowest confidence of the
    positive network. If these are too few, samples with the smallest probability of being unknown follow (score NaN);
    if there are none, the whole pool is ordered by that probability, then by score. Labels of the pool are not read.

    Logged: ``train/loss`` and ``train/acc`` of the positive network, ``train/auxiliary_loss``, ``auxiliary_acc`` and
    ``negative_loss``. Several processes: see ``SequentialTrainingTask``; all use the same subset and complementary
    labels, and snapshots are gathered by index.

    Args:
        network: a network's name (``lightning-kd list``), built three times, or an ``nn.Module`` that gives logits
            ``[B, K]``; the others are then copies of it with new classifiers.
        num_classes: number of known classes ``K``. From the command line it comes from the data module.
        input_shape: see ``Task``.
        negative_epochs: epochs of the negative stage, 1 or more; the Trainer's ``max_epochs`` must be above it, and
            the difference is the length of the positive stage.
        subset_size: pool samples in the negative stage (the paper has 10000 for Tiny-ImageNet); all if there are fewer.
        snapshot_interval: epochs of the negative stage between snapshots, from 1 to ``negative_epochs``.
        include_initial_snapshot: also take a snapshot before the negative stage, with an untrained classifier, as the
            official code does.
        uncertainty: ``"least_confidence"``, ``"margin"`` or ``"entropy"``.
        combine: ``"code"`` or ``"paper"``, see ``bidirectional_score``.
        exact: compute ``-log(1 - p)`` exactly. False: clamp 1 - p to at least 1e-5 as the official code does, which
            leaves no gradient where p is nearly 1.
        subset: draw the subset from the ``"candidates"``, which the auxiliary network does not predict as unknown, or
            from the whole ``"pool"``, as the official code does.
        normalize_aux: see ``bidirectional_score``.
        auxiliary_batch_size: batch size of the auxiliary network, 1 or more (100 in the official code). Default: the
            batch size of the data.
        classifier: module path of the network's classifier. Default: the last ``nn.Linear``.
        kwargs: ``warm_start`` of ``PoolTask``; ``optimizer``, ``lr_scheduler``, ``lr_interval``, ``channels_last``,
            ``compile`` of ``Task``. The paper's optimizer is SGD with learning rate 0.01, momentum 0.9 and weight decay
            1e-4.

    Raises:
        ValueError: for an argument out of its range; at the start of a fit, for too few epochs, and for
            ``EarlyStopping``.
    """

    def __init__(
        self,
        network: str | nn.Module,
        num_classes: int,
        *,
        input_shape: Sequence[int] = (3, 32, 32),
        negative_epochs: int = 100,
        subset_size: int = 5000,
        snapshot_interval: int = 5,
        include_initial_snapshot: bool = True,
        uncertainty: Uncertainty = "least_confidence",
        combine: Combine = "code",
        exact: bool = True,
        subset: Literal["candidates", "pool"] = "candidates",
        normalize_aux: bool = True,
        auxiliary_batch_size: int | None = None,
        classifier: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, input_shape=input_shape, **kwargs)
        check_numbers(least=1, whole=True, negative_epochs=negative_epochs, subset_size=subset_size)
        remedy = "leave it out for the data's"
        check_numbers(least=1, whole=True, optional=True, remedy=remedy, auxiliary_batch_size=auxiliary_batch_size)
        remedy = "or there is no snapshot of a trained head"
        check_numbers(least=1, most=negative_epochs, whole=True, remedy=remedy, snapshot_interval=snapshot_interval)
        check_choices(uncertainty, combine, subset)
        self.negative_epochs, self.subset_size = negative_epochs, subset_size
        self.snapshot_interval, self.include_initial_snapshot = snapshot_interval, include_initial_snapshot
        self.uncertainty: Uncertainty = uncertainty
        self.combine: Combine = combine
        self.exact, self.subset, self.normalize_aux = exact, subset, normalize_aux
        self.auxiliary_batch_size = auxiliary_batch_size
        self.network = self.build(network)
        self.classifier_path, _ = find_classifier(self.network, classifier)
        self.auxiliary = self.build_for(network, num_classes + 1, classifier)
        self.negative = self.build_for(network, num_classes, classifier)
        self._dry_run = False
        self.stage = NegativeStage(num_classes, auxiliary_trained=False)

    @property
    def main_network(self) -> nn.Module:
        return self.network

    # -- training ----------------------------------------------------------------------------------------------------

    @property
    def scheduled_part(self) -> str:  # type: ignore[override]
        return "positive stage" if self.stage.start is None else "negative stage"

    def schedule_length(self, unit: str) -> int | None:
        last: Any = self.trainer.max_epochs
        epochs = max(last - (self.negative_epochs if self.stage.start is None else self.stage.start), 1)
        return epochs if unit == "epoch" else epochs * max(self.steps_of_epoch() or 0, 1)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        trainer: Any = self.trainer
        self._dry_run = bool(trainer.fast_dev_run)
        if stage != "fit":
            return
        check_fit(trainer, self.negative_epochs)
        self.stage = NegativeStage(self.num_classes, auxiliary_trained=len(self.pool.unknown_indices) > 0)
        trainer.reload_dataloaders_every_n_epochs = 1  # the two stages have different loaders

    def phases(self, data: Any) -> list[Phase]:
        known = data.known_indices
        if self.stage.start is not None:
            both = np.union1d(known, self.stage.subset)
            return [Phase(NEGATIVE, self.labelled_loader(data, both, "negative"))]
        phases = [Phase(POSITIVE, self.labelled_loader(data, known, ""))]
        if self.stage.auxiliary_trained:
            both = np.union1d(known, data.unknown_indices)
            loader = self.labelled_loader(data, both, "auxiliary", self.auxiliary_batch_size)
            phases.append(Phase(AUXILIARY, loader))
        return phases

    def _labels_of_epoch(self) -> Tensor:
        """The complementary labels of this epoch, int64 ``[N]``, by index."""
        stream = self._stream("complementary", self.current_epoch)
        known = self.pool.known_indices
        return self.stage.labels(self.current_epoch, self.pool.train_target, known, stream, self.device)

    def network_loss(self, batch: PhaseBatch) -> Tensor:
        image, target = batch.labelled.image, batch.labelled.target
        if batch.network == POSITIVE:
            (logits,) = at_least_float32(self(image))
            return self.step_loss({"positive": F.cross_entropy(logits, target)}, logits, target)
        if batch.network == AUXILIARY:
            logits = self._logits(self.auxiliary, image, self.num_classes + 1)
            terms = {"auxiliary": F.cross_entropy(logits, target)}
            return self.step_loss(terms, logits, target, prefix="auxiliary_")
        logits = self._logits(self.negative, image, self.num_classes)
        wrong = self._labels_of_epoch()[batch.labelled.index]
        loss = negative_learning_loss(logits, wrong, 0.0 if self.exact else 1e-5)
        names, values = ("negative_loss",), loss.detach()[None]
        self._finite.record(names, values, logits.detach(), self.trainer.global_step, self.current_epoch)
        self.accumulate(names, values, len(target))
        return loss

    def _logits(self, network: nn.Module, image: Tensor, outputs: int) -> Tensor:
        (logits,) = at_least_float32(class_logits(network, network(self.format_image(image)), outputs))
        return logits

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        done = self.current_epoch + 1
        if self.stage.start is not None:
            if (done - self.stage.start) % self.snapshot_interval == 0:
                self._take_snapshot()
        elif done >= (self.trainer.max_epochs or 0) - self.negative_epochs:
            if self.query_follows or not self._may_stop(done):
                # here, so that the next epoch's loader and this epoch's checkpoint belong to the negative stage
                self._begin_negative_stage(done)
            else:
                self.trainer.should_stop = True

    def _may_stop(self, epochs: int) -> bool:
        trainer: Any = self.trainer
        return epochs >= (trainer.min_epochs or 0) and trainer.global_step >= (trainer.min_steps or 0)

    def _begin_negative_stage(self, epoch: int) -> None:
        self.stage.start = epoch
        candidates = self.pool.unlabelled_indices
        if self.stage.auxiliary_trained and self.subset == "candidates" and len(candidates):
            index, is_candidate = self._over_pool(lambda batch: [not_unknown(self._unknown(batch.image).softmax(1))])
            # as in select: if all are predicted unknown, use the whole pool
            candidates = index[is_candidate].numpy() if bool(is_candidate.any()) else candidates
        size = min(self.subset_size, len(candidates))
        self.stage.subset = np.sort(self._stream("rlnl_subset").choice(candidates, size, replace=False))
        copy_backbone(self.network, self.negative, self.classifier_path)
        self._restart_optimizer()
        if self.include_initial_snapshot or self._dry_run:  # fast_dev_run ends here
            self._take_snapshot()

    def _take_snapshot(self) -> None:
        """Add the negative network's probabilities for the pool to the sum over snapshots."""
        if len(self.pool.unlabelled_indices):
            index, probabilities = self._over_pool(
                lambda batch: [self._logits(self.negative, batch.image, self.num_classes).softmax(1)]
            )
            self.stage.add_snapshot(index, probabilities, len(self.pool.train_target))

    def _over_pool(self, measure: Callable[[Batch], Sequence[Tensor]]) -> tuple[Tensor, ...]:
        data = self.pool
        loader = data.loader("train", data.unlabelled_indices, augment=data.score_with_train_augmentation)
        loader.set_epoch(self.current_epoch)
        return ordered_pass(self, loader, measure)

    def _stream(self, name: str, epoch: int = 0) -> np.random.Generator:
        """A random generator that draws the same numbers on every process."""
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        seed = next(c.seed for c in callbacks if isinstance(c, EpochSeeding) and c.seed is not None)
        return numpy_generator(seed, name, epoch)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["negative_stage"] = self.stage.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        state = checkpoint.get("negative_stage")
        if state is not None:
            self.stage.load_state_dict(state)

    # -- scoring and choosing ----------------------------------------------------------------------------------------

    def _unknown(self, image: Tensor) -> Tensor:
        return self._logits(self.auxiliary, image, self.num_classes + 1)

    def pool_scores(self, image: Tensor, index: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """``positive_probs`` ``[B, K]``, ``negative_probs`` ``[B, K]`` (mean over snapshots; -1 for a sample in none)
        and, if the auxiliary network was trained, ``unknown_probs`` ``[B, K+1]`` and ``unknown_log_odds`` float64
        ``[B]``.

        Raises:
            ValueError: before the last snapshot, and without ``index``.
        """
        due = 1 if self._dry_run else self.negative_epochs // self.snapshot_interval + self.include_initial_snapshot
        if self.stage.snapshots < due:
            raise ValueError(
                f"the negative head has {self.stage.snapshots} of {due} snapshots: train for all of the last "
                f"negative_epochs={self.negative_epochs} epochs, without max_time or max_steps; the last round of a "
                "finished run has none"
            )
        if index is None:
            raise ValueError("BUAL needs the index of each sample, got a batch without: use the data module")
        negative, positive = self.stage.mean(index, image.device), self.scores_and_probabilities(image)[1]
        scores = {"positive_probs": positive, "negative_probs": negative}
        if self.stage.auxiliary_trained:
            logits = self._unknown(image)
            scores |= {"unknown_probs": logits.softmax(1), "unknown_log_odds": unknown_log_odds(logits)}
        return positive, scores

    def select(
        self, scores: Mapping[str, Tensor], pool: PoolView, budget: int, generator: np.random.Generator
    ) -> Query:
        """See ``PoolTask.select``. Deterministic: ``generator`` is not used. A sample without a score has NaN."""
        order, value = rank(scores, pool.precision, self.uncertainty, self.combine, self.normalize_aux)
        return Query(pool.unlabelled[order[:budget]], value[order[:budget]])
