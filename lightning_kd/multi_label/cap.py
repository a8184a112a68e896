"""CAP: pseudo-labels for unlabelled images, with each class as frequent as among the labelled ones.

Ming-Kun Xie, Jia-Hao Xiao, Hao-Zhe Liu, Gang Niu, Masashi Sugiyama, Sheng-Jun Huang. Class-Distribution-Aware
Pseudo-Labeling for Semi-Supervised Multi-Label Learning. NeurIPS 2023, arXiv 2305.02795.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.averaged_task import AveragedTask
from lightning_kd.core.batch import Batch
from lightning_kd.core.distributed import process_count
from lightning_kd.core.inference_pass import ordered_pass
from lightning_kd.core.losses import asymmetric_loss, at_least_float32
from lightning_kd.core.notes import note
from lightning_kd.core.optimization import steps_of
from lightning_kd.core.phased_loader import Phase, PhaseBatch, PhasedLoader
from lightning_kd.core.problems import MultiLabel
from lightning_kd.core.sample_memories import SampleMemories
from lightning_kd.core.two_stages import TwoStages
from lightning_kd.file_writing import write_text
from lightning_kd.multi_label._pseudo_labels import PseudoLabels, pseudo_labels
from lightning_kd.spreadsheet import csv_text

__all__ = ["CAP", "PseudoLabels", "pseudo_labels"]


class CAP(TwoStages, SampleMemories, AveragedTask):
    """CAP (Xie et al., NeurIPS 2023, arXiv 2305.02795): multi-label training with few labelled, many unlabelled images.

    The network labels the unlabelled images itself and learns from these pseudo-labels too. A separate threshold for
    each class makes the class as frequent among the pseudo-labels as it is among the labelled images (see
    ``pseudo_labels``).

    Training has two stages. In the warm-up the network learns from the labelled images only, with the asymmetric loss
    summed over images and labels. The second stage starts with a new optimizer. At the start of each of its epochs the
    averaged copy of the network computes logits of all unlabelled images (eval mode, weak augmentation) and
    ``pseudo_labels`` turns them into labels. The epoch is one pass over the unlabelled images; every batch also has
    some labelled images.

    An image is unlabelled if it is among the data module's ``unlabelled_indices`` (see its ``labelled_fraction``) or if
    none of its labels is known. Without such images the method trains on the labelled ones only.

    Logged after the warm-up: ``train/pseudo_positives`` (mean number of positive pseudo-labels of an image) and, if the
    true labels are known, ``train/pseudo_precision`` and ``train/pseudo_recall``. After ``fit`` the run folder holds
    ``pseudo_labels.csv``: index and pseudo-labels of every unlabelled image, from the final averaged copy.

    Several processes: the logits of all processes are gathered, so that all use the same thresholds; the loss is the
    sum over the joint batch.

    Args:
        network: name of a network (``lightning-kd list``) or any ``nn.Module`` that returns logits ``[B, C]``.
        num_classes: see ``Task``.
        warmup_epochs: number of epochs on labelled images only.
        second_stage_from: weights that the second stage starts from: ``"live"``, those that were trained, or
            ``"average"``, their moving average, as in the paper on NUS-WIDE.
        pseudo: how pseudo-labels are made: ``"by_class"`` as in the paper; ``"fixed"``: a label is positive if its
            probability is at least ``threshold``; ``"none"``: no pseudo-labels, as a baseline.
        threshold: probability threshold of ``"fixed"``, in (0, 1).
        keep_positive: share of the positive pseudo-labels that enter the loss, those with the highest scores, in [0,
            1].
        keep_negative: share of the negative pseudo-labels that enter the loss, those with the lowest scores, in [0, 1];
            values above 0.998 count as 0.998.
        labelled_batch_size: number of labelled images in a batch of ``data.batch_size``. Default: 1.25 times the share
            of labelled images, as in the paper. Batches of the warm-up have four times as many.
        gamma_negative: exponent for negative labels, see ``asymmetric_loss``.
        gamma_positive: exponent for positive labels, see ``asymmetric_loss``.
        margin: probability margin of negative labels, in [0, 1), see ``asymmetric_loss``.
        view: augmentation of the training images: ``"strong"`` as in the paper, or ``"weak"``.
        kwargs: ``average_decay``, ``answer_with`` of ``AveragedTask``; ``input_shape``, ``weights`` of
            ``SupervisedTask``; the arguments of ``FineTunedTask`` and ``Task``.

    Raises:
        ValueError: if an argument is out of range; in a fit, if no training image has a known label.
    """

    problem_class = MultiLabel
    loss_is_plain = False
    loss_is_sum = True
    needs_average = True

    def __init__(
        self,
        network: str | nn.Module,
        num_classes: int,
        *,
        warmup_epochs: int = 12,
        second_stage_from: Literal["live", "average"] = "live",
        pseudo: Literal["by_class", "fixed", "none"] = "by_class",
        threshold: float = 0.5,
        keep_positive: float = 1.0,
        keep_negative: float = 1.0,
        labelled_batch_size: int | None = None,
        gamma_negative: float = 4.0,
        gamma_positive: float = 0.0,
        margin: float = 0.05,
        view: Literal["strong", "weak"] = "strong",
        **kwargs: Any,
    ) -> None:
        super().__init__(network, num_classes, **kwargs)
        if pseudo not in ("by_class", "fixed", "none"):
            raise ValueError(f"pseudo must be 'by_class', 'fixed' or 'none', got {pseudo!r}: give one of them")
        if second_stage_from not in ("live", "average"):
            raise ValueError(f"second_stage_from must be 'live' or 'average', got {second_stage_from!r}: give one")
        check_numbers(least=0, whole=True, warmup_epochs=warmup_epochs)
        self.second_stage_from = second_stage_from
        check_numbers(above=0, below=1, threshold=threshold)
        check_numbers(least=0, most=1, keep_positive=keep_positive, keep_negative=keep_negative)
        check_numbers(least=1, whole=True, optional=True, labelled_batch_size=labelled_batch_size)
        check_numbers(least=0, gamma_negative=gamma_negative, gamma_positive=gamma_positive)
        check_numbers(least=0, below=1, margin=margin)
        self.warmup_epochs, self.pseudo, self.threshold = warmup_epochs, pseudo, threshold
        self.keep_positive, self.keep_negative = keep_positive, keep_negative
        self.labelled_batch_size, self.view = labelled_batch_size, view
        self.gamma_negative, self.gamma_positive, self.margin = gamma_negative, gamma_positive, margin
        # 1 and 0, and -1 for labels that do not enter the loss
        self.given = self.add_sample_memory("pseudo_labels", (num_classes,), -1, dtype=torch.int8)

    # -- labelled and unlabelled images ------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            self.trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]  # the streams change after the warm-up
            labelled, unlabelled = self.parts()
            if not len(labelled):
                raise ValueError("no training image has a known label: label some, or raise data.labelled_fraction")
            share = self.proportions(labelled)
            missing = [name for name, value in zip(self.data.class_names, share.tolist(), strict=True) if value == 0]
            if missing and len(unlabelled):
                note(f"no labelled image has the class {', '.join(missing)}: no pseudo-label will have it either")
            if not len(unlabelled):
                note("CAP has no unlabelled images and trains on the labelled ones only: set data.labelled_fraction")

    def parts(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the labelled and of the unlabelled training images in the full array, int64, ascending."""
        data = self.data
        data.setup()
        known = (data.train_target[data.train_indices] >= 0).any(1).numpy()
        others = getattr(data, "unlabelled_indices", data.train_indices[:0])
        return data.train_indices[known], np.sort(np.concatenate([data.train_indices[~known], others]))

    def proportions(self, labelled: np.ndarray) -> Tensor:
        """For each class, its share of the labelled images that have a known label for it, float64 ``[C]``."""
        target = self.data.train_target[labelled]
        return (target > 0).sum(0).double() / (target >= 0).sum(0).clamp(min=1)

    def _uses_pseudo_labels(self, epoch: int) -> bool:
        return self.pseudo != "none" and epoch >= self.warmup_epochs and len(self.parts()[1]) > 0

    def phase(self, data: Any, epoch: int) -> Phase:
        """The data streams of one epoch."""
        labelled, unlabelled = self.parts()
        share = len(labelled) / (len(labelled) + len(unlabelled))
        few = self.labelled_batch_size or max(1, round(1.25 * share * data.batch_size))
        few = min(few, max(1, data.batch_size - 1))
        given = {"shuffle": True, "views": self.view}
        if not self._uses_pseudo_labels(epoch):
            return Phase(0, data.loader("train", labelled, batch_size=min(4 * few, data.batch_size), **given))
        rest = max(1, data.batch_size - few)
        others = data.loader("train", unlabelled, batch_size=rest, stream="unlabelled", **given)
        return Phase(0, data.loader("train", labelled, batch_size=few, **given), others, by_unlabelled=True)

    def train_loader(self, data: Any) -> Any:
        return PhasedLoader([self.phase(data, self.current_epoch)])

    def schedule_length(self, unit: str) -> int | None:
        trainer: Any = self.trainer
        if unit == "epoch" or trainer.max_steps != -1 or trainer.max_epochs in (None, -1):
            return super().schedule_length(unit)
        warm = min(self.warmup_epochs, trainer.max_epochs)
        rest = trainer.max_epochs - warm
        return max(1, warm * self._steps(0) + (rest * self._steps(self.warmup_epochs) if rest else 0))

    def warmup_steps(self) -> int:
        return self._steps(0)

    def _steps(self, epoch: int) -> int:
        return steps_of(self.trainer, len(self.phase(self.data, epoch).leading))  # type: ignore[arg-type]

    # -- training ----------------------------------------------------------------------------------------------------

    def begin_second_stage(self) -> None:
        super().begin_second_stage()
        if self.second_stage_from == "average":
            assert self.average is not None
            self.network.load_state_dict(self.average.state_dict())

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if self._uses_pseudo_labels(self.current_epoch):
            index, _, found = self.assign_pseudo_labels("weak")
            rows = torch.where(found.mask, found.label, -1.0)
            self.given.write(index.to(self.device), rows.to(self.device))
            self._log_pseudo_labels(index, rows)

    def assign_pseudo_labels(self, view: str = "plain") -> tuple[Tensor, Tensor, PseudoLabels]:
        """Pseudo-label the unlabelled images with the averaged copy; all processes must call it together.

        Returns:
            index ``[n]``, logits ``[n, C]`` and the ``PseudoLabels``.
        """
        labelled, unlabelled = self.parts()

        def measure(batch: Batch) -> tuple[Tensor]:
            return (self(batch.image).float(),)

        loader = self.data.loader("train", unlabelled, views=view, stream="scores")
        loader.set_epoch(self.current_epoch)
        with self.answering(by_average=True):
            index, scores = ordered_pass(self, loader, measure)
        if self.pseudo == "by_class":
            share = self.proportions(labelled)
            return index, scores, pseudo_labels(scores, share, self.keep_positive, self.keep_negative)
        least = math.log(self.threshold / (1 - self.threshold))
        label = (scores >= least).float()
        return index, scores, PseudoLabels(label, label >= 0, scores.new_full((self.num_classes,), least))

    def training_step(self, batch: PhaseBatch, batch_idx: int) -> Tensor:
        labelled, unlabelled = batch.labelled, batch.unlabelled
        image = labelled.image if unlabelled is None else torch.cat([labelled.image, unlabelled.image])
        (logits,) = at_least_float32(self.problem.logits(self.network(self.format_image(image)), image, self.network))
        count = len(labelled.target)
        terms = {"labelled": self._loss(logits[:count], labelled.target)}
        if unlabelled is not None:
            target = self.given.rows[self.index_of(unlabelled)].to(logits.dtype)
            terms["unlabelled"] = self._loss(logits[count:], target)
        return self.step_loss(terms, logits[:count], labelled.target)

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        # DDP averages gradients over the processes, but the loss is a sum over the joint batch
        return process_count() * asymmetric_loss(logits, target, self.gamma_negative, self.gamma_positive, self.margin)

    def _log_pseudo_labels(self, index: Tensor, rows: Tensor) -> None:
        clean = getattr(self.data, "train_clean", None)
        truth = (self.data.train_target if clean is None else clean)[index]
        positive = rows > 0
        found = {"positives": positive.sum() / len(index)}
        if bool((truth >= 0).all()):
            hits = (positive & (truth > 0)).sum()
            found |= {"precision": hits / positive.sum(), "recall": hits / (truth > 0).sum()}
        self.log_dict({f"train/pseudo_{name}": value.float().to(self.device) for name, value in found.items()})

    # -- results -----------------------------------------------------------------------------------------------------

    def write_results(self, folder: Path) -> None:
        if self.pseudo == "none" or not len(self.parts()[1]):
            return
        index, scores, found = self.assign_pseudo_labels()
        if not self.trainer.is_global_zero:
            return
        files, columns = self.data.train_image, {"index": index.tolist()}
        outputs = {"prediction": found.label > 0, "probabilities": scores.sigmoid()}
        if isinstance(files, list):
            columns["path"] = [str(files[i]) for i in index.tolist()]
        columns["labels"] = self.problem.columns(outputs, self.data.class_names)["labels"]
        write_text(folder / "pseudo_labels.csv", csv_text([list(columns), *zip(*columns.values(), strict=True)]))
