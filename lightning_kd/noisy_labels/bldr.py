"""Bidirectional learning with dynamic sample reweighting (BLDR).

Chen-Chen Zong, Zheng-Tao Cao, Hong-Tao Guo, Yun Du, Ming-Kun Xie, Shao-Yuan Li, Sheng-Jun Huang. Noise-Robust
Bidirectional Learning with Dynamic Sample Reweighting. 2022, arXiv 2209.01334.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.averaging import averaged_copy, update_average
from lightning_kd.core.batch import Batch, as_batch
from lightning_kd.core.feature_hooks import penultimate_tap
from lightning_kd.core.fine_tuning import FineTunedTask
from lightning_kd.core.losses import at_least_float32
from lightning_kd.core.outputs import class_logits
from lightning_kd.core.two_pass_step import second_pass
from lightning_kd.noisy_labels.bldr_losses import average_decay, reweight
from lightning_kd.noisy_labels.bldr_terms import (
    HeadOutputs,
    SampleRows,
    TermWeights,
    bldr_terms,
    log_mean,
    weak_and_strong,
)
from lightning_kd.noisy_labels.early_exits import Exits
from lightning_kd.noisy_labels.epoch_scores import EpochScores, scores_of_probabilities
from lightning_kd.noisy_labels.label_scores import LabelScores, logit_margin
from lightning_kd.noisy_labels.noisy_label_task import NoisyLabelTask
from lightning_kd.noisy_labels.sample_noise_rows import check_rows, descend_rows, start_rows
from lightning_kd.noisy_labels.wrong_labels import lost_classes, write_wrong_labels, wrong_label_metrics

__all__ = ["BLDR"]


class BLDR(NoisyLabelTask, FineTunedTask):
    """BLDR (Zong et al., arXiv 2209.01334): noise-robust bidirectional learning with dynamic sample reweighting.

    Two heads on the same feature learn in opposite directions. The positive head learns the given labels, corrected by
    two trained values per sample and class (``u``, ``v``) that absorb wrong labels. The negative head learns which
    classes a sample does *not* have; wrong labels hardly disturb that. The probability that the negative head gives to
    a label becomes the weight of the sample. Small classifiers on earlier stages (exits) learn like the positive head
    and from both heads.

    Evaluated is a moving average of the weights, updated once per epoch; its probabilities are the mean of both heads'.
    A training batch holds a weakly and a strongly augmented view of each image.

    Logged each epoch: ``train/rho`` (estimated share of wrong labels; it scales the separation loss), the metrics of
    ``NoisyLabelTask`` from the negative head in the training steps, and, if the true labels are known,
    ``train/wrong_precision``, ``train/wrong_recall`` and ``train/wrong_f1`` of the labels reported as wrong.

    After ``fit`` the run folder holds ``noisy_labels.csv``, with the probability from the negative head (as trained,
    not averaged) as clean probability, and ``wrong_labels.csv`` for labels below ``detection_threshold``: index, given
    label, probability and suggested label (the most probable other class of the averaged network), the least probable
    first. ``network.pt`` is the averaged network with its positive head.

    Several processes: gradients of ``u`` and ``v`` are those of the joint batch, and their rows are exchanged at the
    end of each epoch; weights and ``rho`` come from the probabilities of all. The mean prediction in the balance loss
    is that of each process's batch. With gradient accumulation ``u`` and ``v`` are updated after each batch.

    Args:
        network: name of a network (``lightning-kd list``) or any ``nn.Module`` with stages and a linear classifier on a
            pooled feature. In the paper: ``resnet34``.
        num_classes: see ``Task``.
        input_shape: see ``Task``.
        weights: checkpoint or ``state_dict`` file to start from; ``"default"`` for the published weights of a ``timm/``
            or ``torchvision/`` network. Default: train from scratch.
        warmup_epochs: last epoch, counted from 0, without sample weights. In the paper 20 for CIFAR-10N and 40 for
            CIFAR-100N, with a constant learning rate until then. The negative head first predicts only one or two
            classes and needs some thousand steps to leave that state; earlier weights would exclude whole classes,
            which causes a warning.
        stages: module paths of the network's stages in order, including the last; exits are added after all but the
            last. Default: found by name.
        classifier: module path of the network's classifier. Default: its last ``nn.Linear``.
        row_lr: learning rate of ``u`` and ``v``, for plain gradient descent.
        consistency_weight: weight of the loss between weak and strong view; 0 uses no strong view.
        balance_weight: weight of the loss that spreads the mean prediction over the classes.
        separation_weight: weight of the loss that trains ``v`` on wrong labels, multiplied by ``rho^2``.
        kd_weight: weight of the distillation to the exits.
        feature_weight: weight of the squared difference between the features of exits and network, summed over the
            batch.
        temperature: temperature of the distillation.
        agreement_weight: weight of the divergence between both heads. Default: 10 with 100 classes, else 0, as in the
            paper.
        rho_threshold: ``rho`` is the share of labels with a probability below this.
        detection_threshold: labels with a probability below this are reported as wrong.
        reuse_forward: compute the terms that need only weak views from the pass over both views. It is a third cheaper,
            but changes the batch norm statistics. The official code passes the weak views twice.
        average_buffers: average running statistics too; ``False`` takes those of the last epoch, as in the official
            code.
        kwargs: ``new_classifier``, ``freeze``, ``backbone_lr`` of ``FineTunedTask``; ``optimizer`` (default: that of
            ``Task``, with weights that of ``optimizer_for``), ``lr_scheduler``, ``lr_interval``, ``channels_last``,
            ``compile`` of ``Task``.

    Raises:
        ValueError: if an argument is out of range, or the network has no stages or linear classifier.
    """

    needs_index = True
    plain_default = True
    rho: Tensor

    def __init__(
        self,
        network: str | nn.Module,
        num_classes: int,
        *,
        input_shape: Sequence[int] = (3, 32, 32),
        weights: str | None = None,
        warmup_epochs: int = 20,
        stages: list[str] | None = None,
        classifier: str | None = None,
        row_lr: float = 10.0,
        consistency_weight: float = 0.9,
        balance_weight: float = 0.1,
        separation_weight: float = 50.0,
        kd_weight: float = 0.1,
        feature_weight: float = 1e-6,
        temperature: float = 3.0,
        agreement_weight: float | None = None,
        rho_threshold: float = 0.3,
        detection_threshold: float = 0.05,
        reuse_forward: bool = False,
        average_buffers: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, input_shape=input_shape, **kwargs)
        check_numbers(above=0, temperature=temperature)
        check_numbers(least=0, whole=True, warmup_epochs=warmup_epochs)
        if agreement_weight is None:
            agreement_weight = 10.0 if num_classes == 100 else 0.0
        self.warmup_epochs, self.row_lr, self.temperature = warmup_epochs, row_lr, temperature
        self.consistency_weight, self.balance_weight = consistency_weight, balance_weight
        self.separation_weight, self.agreement_weight = separation_weight, agreement_weight
        self.kd_weight, self.feature_weight = kd_weight, feature_weight
        self.rho_threshold, self.detection_threshold = rho_threshold, detection_threshold
        self.reuse_forward, self.average_buffers = reuse_forward, average_buffers
        for name in ("row_lr", *(name for name in TermWeights._fields if name != "temperature")):
            check_numbers({name: getattr(self, name)}, least=0, remedy="give 0 to leave it out")
        thresholds = {"rho_threshold": rho_threshold, "detection_threshold": detection_threshold}
        check_numbers(thresholds, above=0, below=1, remedy="give a probability")
        self.network = self.build_to_train(network, weights)
        self._feature, linear = penultimate_tap(self.network, classifier)
        self.negative_head = nn.Linear(linear.in_features, num_classes)
        # copied before the exits are added: only training needs these, and their taps hold large feature maps
        self.average = averaged_copy(self._parts())
        self.exits = Exits(self.network, linear.in_features, num_classes, input_shape, stages)
        if self.channels_last:
            self.exits.to(memory_format=torch.channels_last)
        self.register_buffer("rho", torch.tensor(0.1))
        self.keep_precise("average", "rho")
        for name in ("u", "v"):
            self.add_sample_memory(name, (num_classes,))
        self.add_sample_memory("weight", fill=1.0)
        self._step_rows: tuple[Tensor, Tensor, Tensor] | None = None
        self._epoch_scores = EpochScores()
        self._averaged = self._checked = self._warned = False
        self._suggested = torch.empty(0)

    def _parts(self) -> nn.ModuleDict:
        return nn.ModuleDict({"network": self.network, "negative_head": self.negative_head})

    @property
    def main_network(self) -> nn.Module:
        return self.average["network"]

    def _heads(self, parts: nn.ModuleDict, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of both heads, and the feature that is their input."""
        logits = class_logits(parts["network"], parts["network"](self.format_image(image)), self.num_classes)
        feature = self._feature.pop()
        negative = parts["negative_head"](feature)
        return (*at_least_float32(logits, negative), feature)  # type: ignore[return-value]

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``[B, C]`` of the averaged network: the logarithm of the mean of both heads' probabilities."""
        positive, negative, _ = self._heads(self.average, image)
        return log_mean(positive, negative)

    def _outputs(self, image: Tensor) -> HeadOutputs:
        positive, negative, feature = self._heads(self._parts(), image)
        exits, features = self.exits()
        return HeadOutputs(positive, negative, list(at_least_float32(*exits)), feature, features)

    # -- training ----------------------------------------------------------------------------------------------------

    def train_loader(self, data: Any) -> Any:
        views = ("weak", "strong") if self.consistency_weight > 0 else ("weak",)
        overfit = self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        return data.loader("train", shuffle=not overfit, batch_size=data.batch_size, views=views)

    def on_train_start(self) -> None:
        fresh = [name for name in ("u", "v") if not len(self.memories[name].rows)]
        super().on_train_start()
        for name in fresh:
            start_rows(self.memories[name], self.generator(f"bldr_{name}"), self.trainer.strategy)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = as_batch(batch)
        weak, strong = weak_and_strong(batch, self.consistency_weight)
        index, target, count = self.index_of(batch), batch.target, len(batch.target)
        if not self._checked:  # in the first epoch only, because it stalls a GPU
            check_rows(len(self.memories["u"].rows), self.num_classes, index, target)
        joint = self._outputs(weak if strong is None else torch.cat([weak, strong]))
        alone = joint.first(count) if self.reuse_forward or strong is None else self._outputs(weak)
        u, v = (self.memories[name].rows[index].requires_grad_() for name in ("u", "v"))
        self._step_rows = (index, u, v)
        samples = SampleRows(u, v, self.memories["weight"].rows[index])
        settings = TermWeights(*(getattr(self, name) for name in TermWeights._fields))
        terms = bldr_terms(joint, alone, target, samples, self.rho, settings, self.trainer.world_size)
        # for the weights of the next epoch
        self._epoch_scores.record_batch(batch, index, alone.positive, alone.negative)
        return self.step_loss(terms, alone.positive, target)

    def on_after_backward(self) -> None:
        if self._step_rows is None or second_pass():
            return
        index, u, v = self._step_rows
        self._step_rows = None
        for name, rows in (("u", u), ("v", v)):
            descend_rows(self.memories[name], index, rows, self.row_lr, self.trainer)

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self._epoch_scores.clear()
        self._step_rows, self._averaged = None, False

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.is_last_batch:  # before the validation of this epoch
            self._update_average()

    def _update_average(self) -> None:
        if not self._averaged:
            self._averaged = True
            decay = average_decay(self.current_epoch) if self.current_epoch else 0.0
            update_average(self.average, self._parts(), decay, "average" if self.average_buffers else "copy")

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self._update_average()
        self._checked = True
        scores = self._epoch_scores.compute(self.detection_threshold)
        if scores is not None:
            self._log_label_scores(scores)
            if self.current_epoch >= self.warmup_epochs:
                weight, rho = reweight(scores.score, self.rho_threshold)
                self.rho.fill_(rho)
                rows = self.memories["weight"].rows
                if weight is None:
                    rank_zero_warn("the negative head gives all labels one probability: samples keep their weights")
                else:  # samples that were not trained on keep theirs
                    rows[scores.index.to(rows.device)] = weight.to(rows)
                    self._warn_of_lost_classes(weight, scores.given)
        self.log("train/rho", float(self.rho))

    def _warn_of_lost_classes(self, weight: Tensor, given: Tensor) -> None:
        lost = lost_classes(weight, given, self.num_classes)
        if lost and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"the samples of the given classes {lost} have almost no weight: the negative head predicts few "
                f"classes yet; train again with warmup_epochs above {self.warmup_epochs}"
            )

    def _log_label_scores(self, scores: LabelScores) -> None:
        values, found = scores.metrics(), wrong_label_metrics(scores, self.detection_threshold)
        values.update({f"wrong_{name}": value for name, value in found.items() if name != "auc"})
        self.log_dict({f"train/{name}": value for name, value in values.items()})

    # -- label scores ------------------------------------------------------------------------------------------------

    def score_training_set(self) -> LabelScores:
        def measure(batch: Batch) -> tuple[Tensor, ...]:
            scores, _ = self.scores_and_probabilities(batch.image)
            _, negative, _ = self._heads(self._parts(), batch.image)
            own = batch.target[:, None]
            suggested = scores.scatter(1, own, float("-inf")).argmax(1)
            probability = negative.softmax(1).gather(1, own).squeeze(1)
            return probability, logit_margin(scores, batch.target), scores.argmax(1), suggested

        *columns, self._suggested = self.over_training_set(measure)
        return scores_of_probabilities(*columns, threshold=self.detection_threshold)

    def write_results(self, folder: Path) -> None:
        super().write_results(folder)
        if not hasattr(getattr(self.trainer, "datamodule", None), "train_indices"):
            return
        scores = self.label_scores()
        if self.trainer.is_global_zero:
            write_wrong_labels(folder / "wrong_labels.csv", scores, self._suggested, self.detection_threshold)
