"""CDCR: learn from candidate labels, some of them false, by trusting those that the network is confident of.

Feng Sun, Ming-Kun Xie, Sheng-Jun Huang. A Deep Model for Partial Multi-Label Image Classification with
Curriculum Based Disambiguation. arXiv 2207.02410.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.averaged_task import AveragedTask
from lightning_kd.core.batch import Batch, as_batch
from lightning_kd.core.distributed import process_count
from lightning_kd.core.inference_pass import ordered_pass
from lightning_kd.core.losses import at_least_float32, check_label_values, check_shapes
from lightning_kd.core.notes import note
from lightning_kd.core.problems import MultiLabel
from lightning_kd.core.sample_memories import SampleMemories
from lightning_kd.core.two_stages import TwoStages
from lightning_kd.file_writing import write_text
from lightning_kd.spreadsheet import csv_text

CLIPPED_TO = (0.05, 0.95)

__all__ = ["CDCR", "candidate_thresholds", "select_candidates"]


def candidate_thresholds(
    confidence: Tensor, candidates: Tensor, alpha: float, by_difficulty: bool = False, clip: bool = False
) -> Tensor:
    """The confidence from which a candidate label of each class is trusted, float64 ``[C]``.

    The threshold is ``alpha`` for every class. With ``by_difficulty`` it is ``alpha + mean_c - mean``: ``mean_c`` is
    the mean confidence of the candidates of class ``c``, ``mean`` that of all candidates. Classes that the network is
    confident of in general so need a higher confidence.

    Args:
        confidence: ``[n, C]``, probabilities in [0, 1].
        candidates: ``[n, C]`` of 1 (candidate) and 0.
        alpha: base threshold, in (0, 1).
        by_difficulty: shift the threshold of each class, see above. A class without candidates keeps ``alpha``.
        clip: clamp thresholds to [0.05, 0.95]. With ``by_difficulty`` they may leave (0, 1); then all candidates of the
            class are trusted, or none.

    Raises:
        ValueError: see ``select_candidates``.
    """
    check_numbers(above=0, below=1, alpha=alpha)
    check_shapes(confidence=(confidence, "nC"), candidates=(candidates, "nC"))
    check_label_values(candidates, (0, 1), "candidates")
    classes = confidence.shape[1]
    if not by_difficulty:
        return torch.full((classes,), alpha, dtype=torch.float64, device=confidence.device)
    there = candidates > 0
    sums, counts = (confidence.double() * there).sum(0), there.sum(0)
    own = sums / counts.clamp(min=1)
    mean = sums.sum() / counts.sum().clamp(min=1)
    found = torch.where(counts > 0, alpha + own - mean, alpha)
    return found.clamp(*CLIPPED_TO) if clip else found


def select_candidates(
    confidence: Tensor, candidates: Tensor, alpha: float, by_difficulty: bool = False, clip: bool = False
) -> Tensor:
    """Which labels enter the loss, bool ``[n, C]``: all labels that are no candidates, and the trusted candidates.

    Args:
        confidence: ``[n, C]``, the network's probabilities for the weakly augmented images.
        candidates: ``[n, C]``: 1 for a candidate, 0 for a label that is certainly absent.
        alpha: a candidate is trusted if its confidence is at least this, in (0, 1).
        by_difficulty: shift ``alpha`` for each class, see ``candidate_thresholds``.
        clip: clamp the thresholds, see ``candidate_thresholds``.

    Raises:
        ValueError: if the shapes differ, ``alpha`` is out of range, a confidence is NaN, or ``candidates`` has other
            values than 0 and 1.

    Source: arXiv 2207.02410, as in the official code.
    """
    threshold = candidate_thresholds(confidence, candidates, alpha, by_difficulty, clip)
    if confidence.isnan().any():
        raise ValueError("confidence must be a number for each sample, got NaN: compute it for all samples")
    # compared in one dtype: 0.7 in float32 is below 0.7 in float64
    return (candidates == 0) | (confidence >= threshold.to(confidence.dtype))


class CDCR(TwoStages, SampleMemories, AveragedTask):
    """CDCR (Sun et al., 2022, arXiv 2207.02410): partial multi-label training on the confident candidate labels.

    Every image comes with candidate labels; all its true labels are among them, but some candidates are false. The
    network first learns all candidates, then only those it is confident of. Whether a candidate counts is decided anew
    before each epoch.

    Targets are 1 for a candidate and 0 for a label that is certainly absent. In the warm-up all candidates are treated
    as true. The second stage starts from the averaged copy of the weights with a new optimizer. At the start of each of
    its epochs a pass over the training set (eval mode, weak augmentation) selects the trusted candidates
    (``select_candidates``). The other candidates are left out of the loss, which is binary cross-entropy summed over
    images and labels.

    Logged each epoch: ``train/trusted``, the share of the candidates that are trusted, and, if the data module knows
    the true labels (``train_clean``), ``train/purity``, the share of the trusted candidates that are true. After
    ``fit`` the run folder holds ``wrong_labels.csv``: every candidate with its confidence and whether it would be
    trusted, the least confident first. The confidence is that of the network that is evaluated (``answer_with``).

    Several processes: they share the pass and gather its results by index; the loss is the sum over the joint batch.

    Args:
        network: name of a network (``lightning-kd list``) or any ``nn.Module`` that returns logits ``[B, C]``.
        num_classes: see ``Task``.
        warmup_epochs: number of epochs in which all candidates are learnt.
        alpha: a candidate is trusted if its confidence is at least this, in (0, 1).
        by_difficulty: require a higher confidence for classes that the network is confident of in general, see
            ``candidate_thresholds``.
        clip_thresholds: clamp the thresholds to [0.05, 0.95]; ``train/clipped`` is the number of classes this changes.
        confidence_from: network whose confidence is used: ``"live"``, the one that is trained, or ``"average"``.
        view: augmentation of the training images: ``"strong"`` as in the paper, or ``"weak"``.
        kwargs: ``average_decay``, ``answer_with`` of ``AveragedTask``; ``input_shape``, ``weights`` of
            ``SupervisedTask``; the arguments of ``FineTunedTask`` and ``Task``.

    Raises:
        ValueError: if an argument is out of range; in a fit, if a target is not 1 or 0, or a true label is no
            candidate.
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
        warmup_epochs: int = 16,
        alpha: float = 0.6,
        by_difficulty: bool = True,
        clip_thresholds: bool = False,
        confidence_from: Literal["live", "average"] = "live",
        view: Literal["strong", "weak"] = "strong",
        **kwargs: Any,
    ) -> None:
        super().__init__(network, num_classes, **kwargs)
        check_numbers(least=0, whole=True, warmup_epochs=warmup_epochs)
        check_numbers(above=0, below=1, alpha=alpha)
        if confidence_from not in ("live", "average"):
            raise ValueError(f"confidence_from must be 'live' or 'average', got {confidence_from!r}: give one of them")
        self.warmup_epochs, self.alpha, self.by_difficulty = warmup_epochs, alpha, by_difficulty
        self.confidence_from, self.view, self.clip_thresholds = confidence_from, view, clip_thresholds
        self.trusted = self.add_sample_memory("trusted", (num_classes,), 1, dtype=torch.bool)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "fit":
            return
        data = self.data
        data.setup()
        target, clean = data.train_target[data.train_indices], getattr(data, "train_clean", None)
        check_label_values(target, (0, 1), "candidates")
        if clean is not None and bool((clean[data.train_indices] > target).any()):
            raise ValueError("candidates must include all true labels, got an image that lacks one: correct them")

    # -- training ----------------------------------------------------------------------------------------------------

    def begin_second_stage(self) -> None:
        super().begin_second_stage()
        assert self.average is not None
        self.network.load_state_dict(self.average.state_dict())

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if self.current_epoch >= self.warmup_epochs:
            with self.answering(self.confidence_from == "average"):
                index, candidates, confidence, trusted = self.disambiguate("weak")
            self.trusted.write(index.to(self.device), trusted.to(self.device))
            self._log_trusted(index, candidates > 0, trusted)
            if self.clip_thresholds:
                asked = candidate_thresholds(confidence, candidates, self.alpha, self.by_difficulty)
                clipped = ((asked < CLIPPED_TO[0]) | (asked > CLIPPED_TO[1])).sum()
                self.log("train/clipped", clipped.float().to(self.device))

    def disambiguate(self, view: str = "plain") -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Which candidates are trusted, from a pass of the evaluated network over the training set.

        All processes must call it together.

        Args:
            view: augmentation of the images: ``"plain"`` (none), ``"weak"`` or ``"strong"``.

        Returns:
            index ``[n]``, and candidates, confidence and trusted labels, each ``[n, C]``, all on the CPU.
        """

        def measure(batch: Batch) -> tuple[Tensor, Tensor]:
            return batch.target, self(batch.image).float().sigmoid()

        loader = self.data.loader("train", views=view, stream="confidence")
        loader.set_epoch(self.current_epoch)
        index, candidates, confidence = ordered_pass(self, loader, measure)
        options = (self.alpha, self.by_difficulty, self.clip_thresholds)
        return index, candidates, confidence, select_candidates(confidence, candidates, *options)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = as_batch(batch)
        output = self.network(self.format_image(batch.image))
        (logits,) = at_least_float32(self.problem.logits(output, batch.image, self.network))
        loss = F.binary_cross_entropy_with_logits(logits, batch.target.to(logits.dtype), reduction="none")
        if self.current_epoch >= self.warmup_epochs:
            loss = loss * self.trusted.rows[self.index_of(batch)]
        # DDP averages gradients over the processes, but the loss is a sum over the joint batch
        return self.step_loss({"loss": process_count() * loss.sum()}, logits, batch.target)

    def _log_trusted(self, index: Tensor, candidates: Tensor, trusted: Tensor) -> None:
        chosen = trusted & candidates
        found, clean = (
            {"trusted": chosen.sum() / candidates.sum().clamp(min=1)},
            getattr(self.data, "train_clean", None),
        )
        if clean is not None:
            found["purity"] = (chosen & (clean[index] > 0)).sum() / chosen.sum()
        if not bool(chosen.any()):
            rank_zero_warn(
                f"no candidate is trusted with alpha={self.alpha:g} in epoch {self.current_epoch}, so the network "
                "learns that all labels are absent: lower alpha, or raise warmup_epochs"
            )
        self.log_dict({f"train/{name}": value.float().to(self.device) for name, value in found.items()})

    # -- results -----------------------------------------------------------------------------------------------------

    def write_results(self, folder: Path) -> None:
        index, candidates, confidence, trusted = self.disambiguate()
        if not self.trainer.is_global_zero:
            return
        names, files = self.data.class_names, self.data.train_image
        paths = files if isinstance(files, list) else None
        row, label = (candidates > 0).nonzero(as_tuple=True)
        order = confidence[row, label].argsort(stable=True)
        rows: list[list[Any]] = [["index", *(["path"] if paths else []), "label", "confidence", "trusted"]]
        for i, c in zip(row[order].tolist(), label[order].tolist(), strict=True):
            where = [str(paths[int(index[i])])] if paths else []
            rows.append([int(index[i]), *where, names[c], f"{float(confidence[i, c]):.6g}", int(trusted[i, c])])
        write_text(folder / "wrong_labels.csv", csv_text(rows))
        doubted = int((~trusted & (candidates > 0)).sum())
        note(f"{doubted} of {len(row)} candidate labels are not trusted: see the first lines of wrong_labels.csv")
