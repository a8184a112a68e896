"""Self-Crowd: a crowd layer that adds annotations nobody gave, so many of each class that rare ones catch up.

Ye Shi, Shao-Yuan Li, Sheng-Jun Huang. Learning from Crowds with Sparse and Imbalanced Annotations. 2021,
arXiv 2107.05039. A RECONSTRUCTION: only the abstract was at hand, and there is no code. It says that confident
pseudo-annotations are added step by step, with a confidence that knows the distribution of the annotations, and that
annotations of rare classes are sampled more often. Every formula here is a simple choice of our own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.batch import Batch
from lightning_kd.core.notes import note
from lightning_kd.file_writing import write_text
from lightning_kd.spreadsheet import csv_text
from lightning_kd.weak_labels.crowds import CrowdLayer
from lightning_kd.weak_labels.pseudo_annotations import (
    BLOCK,
    annotation_balance,
    annotation_weights,
    select_cells,
    select_pseudo_annotations,
)

__all__ = ["PseudoCells", "SelfCrowd", "select_pseudo_annotations"]


class PseudoCells:
    """Pseudo-annotations of the samples of a training array, found by their index.

    Args:
        rows: int64 ``[n, 3]``, item, annotator and class.
        count: N, the size of the training array.
        device: where it is asked.
    """

    def __init__(self, rows: Tensor, count: int, device: torch.device | str = "cpu") -> None:
        rows = rows[rows[:, 0].sort(stable=True).indices]
        self._annotator, self._label = rows[:, 1].to(device), rows[:, 2].to(device)
        self._count = torch.bincount(rows[:, 0], minlength=count).to(device)
        self._start = self._count.cumsum(0) - self._count

    def fill(self, annotations: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """``annotations`` int64 ``[B, R]`` of the samples ``index``, with the pseudo-annotations of these in free
        cells; and bool ``[B, R]``, where they are."""
        count = self._count[index]
        row = torch.arange(len(index), device=index.device).repeat_interleave(count)
        within = torch.arange(len(row), device=index.device) - (count.cumsum(0) - count)[row]
        cell = self._start[index][row] + within
        added = torch.zeros_like(annotations, dtype=torch.bool)
        added[row, self._annotator[cell]] = True
        filled = annotations.clone()
        filled[row, self._annotator[cell]] = self._label[cell]
        added &= annotations < 0  # what somebody gave stays
        return torch.where(added, filled, annotations), added


class SelfCrowd(CrowdLayer):
    """Self-Crowd (Shi, Li and Huang, 2021, arXiv 2107.05039), reconstructed from the abstract: see the module.

    The crowd layer is trained for ``start_epochs`` on the annotations that there are. Then come ``rounds`` of
    ``round_epochs`` each. Before a round the network scores all training samples as an evaluation sees them, also those
    without annotation, and ``select_pseudo_annotations`` takes the most confident free cells of each class, the more of
    a class the fewer annotations it has. With ``refresh`` those of earlier rounds are dropped first and round ``t``
    takes ``t`` times as many, so that early mistakes can be undone. In the rounds an annotation of a class counts
    ``annotation_weights``, in the place of being sampled so often. Epochs beyond the last round go on with its set.

    Samples without annotation are trained on once they have one, so that epochs become longer: where there are any, a
    schedule as long as the training must step by the epoch.

    The control to compare with, ``selection="confident"``, takes the most confident cells of all classes together and
    weighs all annotations alike.

    Logged each epoch: ``train/pseudo_annotations`` (how many there are), ``train/annotation_ratio`` and
    ``annotation_distance`` (how unequal the classes of all annotations are, see ``AnnotationBalance``) and, where the
    true labels are known, ``train/pseudo_correct``, the share of pseudo-annotations that are true. After ``fit`` the
    run folder also holds ``pseudo_annotations.csv``: index, annotator and class. They are in checkpoints as
    ``pseudo_annotations`` and never used to choose one.

    Several processes: the probabilities of all samples are gathered, and all select the same.

    Args:
        network: see ``CrowdTask``.
        num_classes: see ``Task``.
        selection: ``"balanced"``, or ``"confident"``, the control.
        start_epochs: before the first round, 1 or more.
        rounds: how often annotations are added.
        round_epochs: of a round.
        budget: annotations added a round, as a share of those that there are, above 0.
        balance: how strongly rare classes are preferred, see ``class_quotas``.
        resample: exponent of ``annotation_weights``; 0 for all alike.
        threshold: the least probability of a pseudo-annotation, see ``select_pseudo_annotations``.
        pseudo_weight: what a pseudo-annotation counts beside others.
        refresh: select all anew in every round.
        restart: begin every round with the weights of the first epoch, and an optimizer that has forgotten; a schedule
            goes on.
        kwargs: ``variant``, ``per_annotation``, ``kernel_lr`` of ``CrowdLayer``; ``input_shape``, ``weights`` of
            ``CrowdTask``, and the arguments of ``FineTunedTask`` and ``Task``.

    Raises:
        ValueError: for arguments out of range.
    """

    def __init__(
        self,
        network: str | nn.Module,
        num_classes: int,
        *,
        selection: Literal["balanced", "confident"] = "balanced",
        start_epochs: int = 20,
        rounds: int = 5,
        round_epochs: int = 10,
        budget: float = 0.1,
        balance: float = 1.0,
        resample: float = 0.5,
        threshold: float = 0.0,
        pseudo_weight: float = 1.0,
        refresh: bool = True,
        restart: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, num_classes, **kwargs)
        if selection not in ("balanced", "confident"):
            raise ValueError(f"selection must be 'balanced' or 'confident', got {selection!r}: give one of them")
        check_numbers(least=1, whole=True, start_epochs=start_epochs, round_epochs=round_epochs)
        check_numbers(least=0, whole=True, rounds=rounds)
        check_numbers(above=0, remedy="give a share of the annotations", budget=budget)
        check_numbers(least=0, balance=balance, resample=resample, pseudo_weight=pseudo_weight)
        check_numbers(least=0, most=1, remedy="give a probability", threshold=threshold)
        self.selection = selection
        self.start_epochs, self.rounds, self.round_epochs = start_epochs, rounds, round_epochs
        self.budget, self.balance, self.resample, self.threshold = budget, balance, resample, threshold
        self.pseudo_weight, self.refresh, self.restart = pseudo_weight, refresh, restart
        self.pseudo = torch.zeros(0, 3, dtype=torch.int64)
        self._initial: dict[str, Tensor] | None = None
        self._cells: PseudoCells | None = None
        self._class_weight: Tensor | None = None
        self._added: Tensor | None = None

    def steps_of_epoch(self) -> int | None:
        joining = self.rounds > 0 and len(self.data.unlabelled_indices) > 0
        return None if joining else super().steps_of_epoch()

    # -- rounds ------------------------------------------------------------------------------------------------------

    def round_before(self, epoch: int) -> int:
        """The number of the round that begins with ``epoch``, from 1 on; 0 where none does."""
        later = epoch - self.start_epochs
        number = later // self.round_epochs + 1
        return number if later >= 0 and later % self.round_epochs == 0 and number <= self.rounds else 0

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "fit":
            return
        trainer: Any = self.trainer
        if len(self.data.unlabelled_indices):
            trainer.reload_dataloaders_every_n_epochs = 1  # samples join when they get an annotation
        epochs = trainer.max_epochs
        if epochs is not None and 0 <= epochs < self.start_epochs + self.rounds * self.round_epochs:
            begun = max(0, -(-(epochs - self.start_epochs) // self.round_epochs))
            note(f"max_epochs={epochs} has room for {begun} of {self.rounds} rounds of {self.round_epochs} epochs")

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.trainer.ckpt_path is None:
            self.pseudo = self.pseudo[:0]  # a second fit begins anew
            self._initial = None
        if self.restart and self._initial is None:
            self._initial = {name: value.detach().cpu().clone() for name, value in self._restarted().items()}

    def _restarted(self) -> dict[str, Tensor]:
        parts = {"network": self.network, "annotators": self.annotators}
        return {f"{name}.{key}": v for name, part in parts.items() for key, v in part.state_dict().items()}

    def train_loader(self, data: Any) -> Any:
        items = np.union1d(data.train_indices, self.pseudo[:, 0].unique().numpy())
        overfit = self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        return data.loader("train", items, shuffle=not overfit, augment=True, batch_size=data.batch_size)

    def counts(self) -> Tensor:
        """Annotations of each class, int64 ``[C]``, those that were given and those that were added."""
        given = self.annotations
        both = torch.cat([given[given >= 0].long(), self.pseudo[:, 2]])
        return torch.bincount(both, minlength=self.num_classes)

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self._cells = PseudoCells(self.pseudo, self.sample_count(), self.device) if len(self.pseudo) else None
        weighs = self.selection == "balanced" and self.current_epoch >= self.start_epochs
        weight = annotation_weights(self.counts(), self.resample if weighs else 0.0)
        self._class_weight = weight.float().to(self.device)

    def annotations_of(self, batch: Batch) -> Tensor:
        annotations, self._added = super().annotations_of(batch), None
        if self._cells is not None:
            annotations, self._added = self._cells.fill(annotations, self.index_of(batch))
        return annotations

    def weights_of(self, annotations: Tensor, batch: Batch) -> Tensor | None:
        assert self._class_weight is not None
        weight = self._class_weight[annotations.clamp(min=0)]  # cells without annotation have no loss
        return weight if self._added is None else torch.where(self._added, self.pseudo_weight * weight, weight)

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self._log_annotations()
        number = self.round_before(self.current_epoch + 1)
        if number:  # now, so that the checkpoint of this epoch holds them
            self.pseudo = self.select(number)
            if self.restart:
                self._begin_anew()

    def select(self, number: int) -> Tensor:
        """The pseudo-annotations of a round, int64 ``[n, 3]``, rows of item, annotator and class; collective."""
        index, probabilities = self.probabilities_of(self.used())
        given = self.annotations[index]
        kept = self.pseudo[:0] if self.refresh else self.pseudo
        given[torch.searchsorted(index, kept[:, 0].contiguous()), kept[:, 1]] = kept[:, 2].to(given.dtype)
        step = int(self.budget * int((self.annotations >= 0).sum()) + 1e-9)
        budget = step * number if self.refresh else step
        balance = self.balance if self.selection == "balanced" else None
        rows = select_cells(self._predicted(probabilities), given, budget, balance, self.threshold)
        rows[:, 0] = index[rows[:, 0]]
        return torch.cat([kept, rows])

    def _predicted(self, probabilities: Tensor) -> Iterator[Tensor]:
        """What annotators would give, ``[n, R, C]``, a block of samples after the other."""
        cells = self.num_classes * max(1, self.annotations.shape[1])
        with torch.no_grad():
            for part in probabilities.split(max(1, BLOCK // cells)):
                yield self.annotators(part.to(self.device)).transpose(1, 2)

    def _begin_anew(self) -> None:
        assert self._initial is not None
        for name, part in (("network", self.network), ("annotators", self.annotators)):
            start = {key.partition(".")[2]: v for key, v in self._initial.items() if key.partition(".")[0] == name}
            part.load_state_dict(start)
        for optimizer in self.trainer.optimizers:
            optimizer.state.clear()

    def _log_annotations(self) -> None:
        balance = annotation_balance(self.counts())
        found = {
            "pseudo_annotations": float(len(self.pseudo)),
            "annotation_ratio": balance.ratio,
            "annotation_distance": balance.distance,
        }
        clean = getattr(self.data, "train_clean", None)
        if clean is not None and len(self.pseudo):
            found["pseudo_correct"] = float((clean[self.pseudo[:, 0]] == self.pseudo[:, 2]).double().mean())
        self.log_dict({f"train/{name}": value for name, value in found.items()})

    # -- checkpoints and results -------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["pseudo_annotations"] = self.pseudo.clone()
        if self._initial is not None:
            checkpoint["initial_weights"] = self._initial

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.pseudo = checkpoint["pseudo_annotations"].cpu()
        self._initial = checkpoint.get("initial_weights")

    def write_results(self, folder: Path) -> None:
        super().write_results(folder)
        if self.trainer.is_global_zero:
            people, classes = self.data.annotator_names, self.data.class_names
            rows = [[item, people[r], classes[label]] for item, r, label in self.pseudo.tolist()]
            write_text(folder / "pseudo_annotations.csv", csv_text([["index", "annotator", "class_name"], *rows]))
