"""CAP: pseudo-labels for untagged images, as many of each class as the tagged ones have.

Ming-Kun Xie, Jia-Hao Xiao, Hao-Zhe Liu, Gang Niu, Masashi Sugiyama, Sheng-Jun Huang. Class-Distribution-Aware
Pseudo-Labeling for Semi-Supervised Multi-Label Learning. NeurIPS 2023, arXiv 2305.02795.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.averaged_task import AveragedTask
from lightning_kd.core.batch import Batch
from lightning_kd.core.distributed import process_count
from lightning_kd.core.inference_pass import ordered_pass
from lightning_kd.core.losses import asymmetric_loss, at_least_float32, check_shapes
from lightning_kd.core.notes import note
from lightning_kd.core.phased_loader import Phase, PhaseBatch, PhasedLoader
from lightning_kd.core.problems import MultiLabel
from lightning_kd.core.sample_memories import SampleMemories
from lightning_kd.file_writing import write_text
from lightning_kd.spreadsheet import csv_text

__all__ = ["CAP", "PseudoLabels", "pseudo_labels"]

# the official code never keeps more of the negatives: the likeliest of them are left out
MOST_NEGATIVES = 0.998


class PseudoLabels(NamedTuple):
    """``label`` float32 ``[n, C]`` of 1 and 0; ``mask`` bool ``[n, C]``, which of them count; and ``threshold``
    ``[C]``, the least score of a positive (infinite where there is none)."""

    label: Tensor
    mask: Tensor
    threshold: Tensor


def pseudo_labels(
    scores: Tensor, proportions: Tensor, keep_positive: float = 1.0, keep_negative: float = 1.0
) -> PseudoLabels:
    """Labels by one threshold a class, so that ``floor(proportion * n)`` images have it.

    With equal scores there may be more. Of the positives the ``keep_positive`` with the highest scores count, of the
    negatives the ``keep_negative`` (at most 0.998) with the lowest. A class with no positive among the tagged images
    gets none.

    Args:
        scores: ``[n, C]`` of all untagged images: logits, or probabilities in float32, of which many are equal.
        proportions: ``[C]`` in [0, 1], of the tagged images that have each class.
        keep_positive: share in [0, 1].
        keep_negative: share in [0, 1].

    Raises:
        ValueError: for shapes that do not belong together, scores that are not finite, and shares out of range.

    Source: arXiv 2305.02795, class-distribution-aware thresholds and reliability masks, as in the official code.
    """
    check_shapes(scores=(scores, "nC"), proportions=(proportions, "C"))
    check_numbers(least=0, most=1, keep_positive=keep_positive, keep_negative=keep_negative)
    if not bool(((proportions >= 0) & (proportions <= 1)).all()):
        raise ValueError(
            f"proportions must be in [0, 1], got {float(proportions.min()):g} to {float(proportions.max()):g}: give "
            "shares of images"
        )
    if not bool(scores.isfinite().all()):
        raise ValueError("scores must be finite, got NaN or infinity: look at the network")
    n, found = len(scores), scores.detach().cpu().numpy()
    threshold, positive_cut, negative_cut = (
        np.full(scores.shape[1], fill, found.dtype) for fill in (np.inf, np.inf, -np.inf)
    )
    for c, share in enumerate(proportions.tolist()):
        positives = _floor(share * n)
        kept = _floor(keep_positive * share * n)
        negatives = _floor(min(keep_negative, MOST_NEGATIVES) * (1 - share) * n)
        ranks = {"threshold": n - positives, "positive": n - kept, "negative": negatives - 1}
        inside = {name: rank for name, rank in ranks.items() if 0 <= rank < n}
        if not inside:
            continue
        ordered = np.partition(found[:, c], sorted(set(inside.values())))  # three ranks, not an order of all
        threshold[c] = ordered[inside["threshold"]] if "threshold" in inside else np.inf
        positive_cut[c] = ordered[inside["positive"]] if "positive" in inside else np.inf
        negative_cut[c] = ordered[inside["negative"]] if "negative" in inside else -np.inf
    least, sure, surely_not = (torch.from_numpy(x).to(scores.device) for x in (threshold, positive_cut, negative_cut))
    return PseudoLabels((scores >= least).float(), (scores >= sure) | (scores <= surely_not), least)


def _floor(value: float) -> int:
    return math.floor(value * (1 + 2e-7) + 1e-9)  # in single precision 0.29 * 1000 is a little below 290


class CAP(SampleMemories, AveragedTask):
    """CAP (Xie et al., NeurIPS 2023, arXiv 2305.02795): untagged images get labels in the shares of the tagged ones.

    In the warm-up only tagged images are learnt, with the asymmetric loss summed over images and labels. Then, at the
    start of every epoch, the averaged copy scores the untagged images (eval mode, plain images), ``pseudo_labels``
    makes labels of the scores, and the epoch is a pass over these, each batch with one of tagged images beside it.

    Untagged are the ``unlabelled_indices`` of the data module, where it has them (``labelled_fraction``), and the
    images none of whose labels is known. Without any, only the tagged ones are learnt.

    Logged after the warm-up: ``train/pseudo_positives`` (labels an untagged image gets) and, where the true ones are
    known, ``train/pseudo_precision`` and ``pseudo_recall``. After ``fit`` the run folder holds ``pseudo_labels.csv``:
    index and labels of every untagged image, by the averaged copy as it then is.

    Several processes: scores are gathered by index, so that all have the same thresholds; the loss is the sum over the
    joint batch.

    Args:
        network: a network's name (``lightning-kd list``) or any ``nn.Module`` that gives logits ``[B, C]``.
        num_classes: see ``Task``.
        warmup_epochs: epochs on tagged images alone.
        pseudo: ``"by_class"`` as in the paper; ``"fixed"``, a label from a probability of ``threshold`` on; ``"none"``,
            tagged images alone, to compare with.
        threshold: of ``"fixed"``, in (0, 1).
        keep_positive: share of the pseudo-positives that count, the likeliest ones.
        keep_negative: likewise of the negatives; above 0.998 it is that.
        labelled_batch_size: tagged images in a batch of ``data.batch_size``. Default: 1.25 times their share of all
            images, as in the paper; the warm-up has four times as many.
        gamma_negative: see ``asymmetric_loss``, as the next two.
        gamma_positive: exponent of positives.
        margin: in [0, 1).
        view: what is trained on: ``"strong"`` as in the paper, or ``"weak"``.
        kwargs: ``average_decay``, ``answer_with`` of ``AveragedTask``; ``input_shape``, ``weights`` of
            ``SupervisedTask``, and the arguments of ``FineTunedTask`` and ``Task``.

    Raises:
        ValueError: in a fit, where no image is tagged.
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
        check_numbers(least=0, whole=True, warmup_epochs=warmup_epochs)
        check_numbers(above=0, below=1, threshold=threshold)
        check_numbers(least=0, most=1, keep_positive=keep_positive, keep_negative=keep_negative)
        check_numbers(least=1, whole=True, optional=True, labelled_batch_size=labelled_batch_size)
        check_numbers(least=0, gamma_negative=gamma_negative, gamma_positive=gamma_positive)
        check_numbers(least=0, below=1, margin=margin)
        self.warmup_epochs, self.pseudo, self.threshold = warmup_epochs, pseudo, threshold
        self.keep_positive, self.keep_negative = keep_positive, keep_negative
        self.labelled_batch_size, self.view = labelled_batch_size, view
        self.gamma_negative, self.gamma_positive, self.margin = gamma_negative, gamma_positive, margin
        # 1 and 0, and -1 for labels that do not count
        self.given = self.add_sample_memory("pseudo_labels", (num_classes,), -1, dtype=torch.int8)

    # -- the two parts -----------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            self.trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]  # another stream follows
            labelled, unlabelled = self.parts()
            if not len(labelled):
                raise ValueError(
                    "no training image has a known label: tag some (raise data.labelled_fraction where the data has it)"
                )
            share = self.proportions(labelled)
            missing = [name for name, value in zip(self.data.class_names, share.tolist(), strict=True) if value == 0]
            if missing and len(unlabelled):
                note(f"no tagged image has {', '.join(missing)}: no untagged image gets such a label")
            if not len(unlabelled):
                note("CAP has no untagged images: it learns the tagged ones alone")

    def parts(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the tagged and of the untagged training images in the full array."""
        data = self.data
        data.setup()
        known = (data.train_target[data.train_indices] >= 0).any(1).numpy()
        others = getattr(data, "unlabelled_indices", data.train_indices[:0])
        return data.train_indices[known], np.sort(np.concatenate([data.train_indices[~known], others]))

    def proportions(self, labelled: np.ndarray) -> Tensor:
        """The share of the tagged images that have each class, ``[C]``, of those of which it is known."""
        target = self.data.train_target[labelled]
        return (target > 0).sum(0).double() / (target >= 0).sum(0).clamp(min=1)

    def _uses_pseudo_labels(self, epoch: int) -> bool:
        return self.pseudo != "none" and epoch >= self.warmup_epochs and len(self.parts()[1]) > 0

    def phase(self, data: Any, epoch: int) -> Phase:
        """What an epoch trains on."""
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
        batches = [len(self.phase(self.data, epoch).leading) for epoch in (0, self.warmup_epochs)]
        steps = [math.ceil(count / trainer.accumulate_grad_batches) for count in batches]
        warm = min(self.warmup_epochs, trainer.max_epochs)
        return max(1, warm * steps[0] + (trainer.max_epochs - warm) * steps[1])

    # -- training ----------------------------------------------------------------------------------------------------

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if self._uses_pseudo_labels(self.current_epoch):
            index, _, found = self.label_the_rest()
            rows = torch.where(found.mask, found.label, -1.0)
            self.given.write(index.to(self.device), rows.to(self.device))
            self._log_pseudo_labels(index, rows)

    def label_the_rest(self) -> tuple[Tensor, Tensor, PseudoLabels]:
        """Index ``[n]``, logits ``[n, C]`` and labels of the untagged images, by the averaged copy; collective."""
        labelled, unlabelled = self.parts()

        def measure(batch: Batch) -> tuple[Tensor]:
            return (self(batch.image).float(),)

        with self.answering(by_average=True):
            index, scores = ordered_pass(self, self.data.loader("train", unlabelled), measure)
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
        # gradients are averaged over the processes
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
        index, scores, found = self.label_the_rest()
        if not self.trainer.is_global_zero:
            return
        files, columns = self.data.train_image, {"index": index.tolist()}
        outputs = {"prediction": found.label > 0, "probabilities": scores.sigmoid()}
        if isinstance(files, list):
            columns["path"] = [str(files[i]) for i in index.tolist()]
        columns["labels"] = self.problem.columns(outputs, self.data.class_names)["labels"]
        write_text(folder / "pseudo_labels.csv", csv_text([list(columns), *zip(*columns.values(), strict=True)]))
