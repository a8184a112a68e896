"""Self-Crowd: a crowd layer trained with pseudo-annotations, more of them for rare classes.

Ye Shi, Shao-Yuan Li, Sheng-Jun Huang. Learning from Crowds with Sparse and Imbalanced Annotations. 2021, arXiv
2107.05039. This is a RECONSTRUCTION: only the abstract was available, and there is no code. The abstract says that
confident pseudo-annotations are added step by step, that the confidence takes the distribution of the annotations into
account, and that annotations of rare classes are sampled more often. Every formula here is a simple choice of our own.
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
    """The pseudo-annotations of a training array, looked up by sample index.

    Args:
        rows: int64 ``[n, 3]``: item, annotator and class.
        count: number of samples ``N`` of the training array.
        device: device of the indices that are looked up.
    """

    def __init__(self, rows: Tensor, count: int, device: torch.device | str = "cpu") -> None:
        rows = rows[rows[:, 0].sort(stable=True).indices]
        self._annotator, self._label = rows[:, 1].to(device), rows[:, 2].to(device)
        self._count = torch.bincount(rows[:, 0], minlength=count).to(device)
        self._start = self._count.cumsum(0) - self._count

    def fill(self, annotations: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Add pseudo-annotations where there is no annotation.

        Args:
            annotations: int64 ``[B, R]``, -1 for a missing annotation.
            index: int64 ``[B]``, the samples they belong to.

        Returns:
            the filled annotations ``[B, R]``, and bool ``[B, R]``, where a pseudo-annotation was added.
        """
        count = self._count[index]
        row = torch.arange(len(index), device=index.device).repeat_interleave(count)
        within = torch.arange(len(row), device=index.device) - (count.cumsum(0) - count)[row]
        cell = self._start[index][row] + within
        added = torch.zeros_like(annotations, dtype=torch.bool)
        added[row, self._annotator[cell]] = True
        filled = annotations.clone()
        filled[row, self._annotator[cell]] = self._label[cell]
        added &= annotations < 0  # given annotations are kept
        return torch.where(added, filled, annotations), added


class SelfCrowd(CrowdLayer):
    """Self-Crowd (Shi et al., 2021, arXiv 2107.05039): the crowd layer with pseudo-annotations for rare classes.

    With few annotations, rare classes get hardly any. The method trains the crowd layer, lets it predict annotations
    that nobody gave, adds the most confident ones, more of them for rare classes, and trains on. It is a reconstruction
    from the abstract, see the module.

    The crowd layer is trained for ``start_epochs`` on the given annotations. Then follow ``rounds`` of ``round_epochs``
    each. Before each round the network is evaluated on all training samples (eval mode, no augmentation), and
    ``select_pseudo_annotations`` adds the most confident cells. With ``refresh`` those of earlier rounds are dropped
    first and round ``t`` adds ``t`` times as many, so that early mistakes can be undone. During the rounds annotations
    are weighted by ``annotation_weights``, in place of sampling those of rare classes more often. Epochs after the last
    round keep its pseudo-annotations.

    Samples without annotation join the training once they have a pseudo-annotation, so epochs become longer. If there
    are such samples, a learning rate schedule over the whole training must step per epoch.

    Logged each epoch: ``train/pseudo_annotations`` (their number), ``train/annotation_ratio`` and
    ``train/annotation_distance`` (imbalance of all annotations, see ``AnnotationBalance``) and, if the true labels are
    known, ``train/pseudo_correct``, the share of the pseudo-annotations that are true; true labels are used for nothing
    else. After ``fit`` the run folder also holds ``pseudo_annotations.csv``: index, annotator and class. Checkpoints
    hold them as ``pseudo_annotations``.

    Several processes: the probabilities of all samples are gathered, and all processes select the same cells.

    Args:
        network: see ``CrowdTask``.
        num_classes: see ``Task``.
        selection: ``"balanced"``, or as a baseline ``"confident"``: the most confident cells of all classes together,
            and equal weights of all annotations.
        start_epochs: number of epochs before the first round, at least 1.
        rounds: number of rounds.
        round_epochs: number of epochs of a round.
        budget: pseudo-annotations that are added per round, as a share of the given annotations, above 0.
        balance: how strongly rare classes are preferred, see ``class_quotas``.
        resample: exponent of ``annotation_weights``; 0 for equal weights.
        threshold: lowest probability of a pseudo-annotation, see ``select_pseudo_annotations``.
        pseudo_weight: weight of a pseudo-annotation relative to a given one.
        refresh: select all pseudo-annotations anew in every round.
        restart: start every round with the weights from the start of training and a new optimizer state; the learning
            rate schedule continues.
        kwargs: ``variant``, ``per_annotation``, ``kernel_lr`` of ``CrowdLayer``; ``input_shape``, ``weights`` of
            ``CrowdTask``, and the arguments of ``FineTunedTask`` and ``Task``.

    Raises:
        ValueError: if an argument is out of range.
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
        self._start_state: dict[str, Tensor] | None = None
        self._cells: PseudoCells | None = None
        self._class_weight: Tensor | None = None
        self._added: Tensor | None = None

    def steps_of_epoch(self) -> int | None:
        joining = self.rounds > 0 and len(self.data.unlabelled_indices) > 0
        return None if joining else super().steps_of_epoch()

    # -- rounds ------------------------------------------------------------------------------------------------------

    def round_before(self, epoch: int) -> int:
        """The number of the round that begins with ``epoch``, counted from 1; 0 if none does."""
        later = epoch - self.start_epochs
        number = later // self.round_epochs + 1
        return number if later >= 0 and later % self.round_epochs == 0 and number <= self.rounds else 0

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "fit":
            return
        trainer: Any = self.trainer
        if len(self.data.unlabelled_indices):
            trainer.reload_dataloaders_every_n_epochs = 1  # samples join when they get a pseudo-annotation
        epochs = trainer.max_epochs
        if epochs is not None and 0 <= epochs < self.start_epochs + self.rounds * self.round_epochs:
            begun = max(0, -(-(epochs - self.start_epochs) // self.round_epochs))
            note(
                f"max_epochs={epochs} is enough for {begun} of {self.rounds} rounds of {self.round_epochs} epochs only"
            )

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.trainer.ckpt_path is None:
            self.pseudo = self.pseudo[:0]  # a second fit starts without any
            self._start_state = None
        if self.restart and self._start_state is None:
            self._start_state = {name: value.detach().cpu().clone() for name, value in self._resettable_state().items()}

    def _resettable_state(self) -> dict[str, Tensor]:
        parts = {"network": self.network, "annotators": self.annotators}
        return {f"{name}.{key}": v for name, part in parts.items() for key, v in part.state_dict().items()}

    def train_loader(self, data: Any) -> Any:
        items = np.union1d(data.train_indices, self.pseudo[:, 0].unique().numpy())
        overfit = self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        return data.loader("train", items, shuffle=not overfit, augment=True, batch_size=data.batch_size)

    def counts(self) -> Tensor:
        """Number of annotations of each class, given ones and pseudo-annotations together, int64 ``[C]``."""
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
        # the value for missing annotations does not matter: their loss is 0
        weight = self._class_weight[annotations.clamp(min=0)]
        return weight if self._added is None else torch.where(self._added, self.pseudo_weight * weight, weight)

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self._log_annotations()
        number = self.round_before(self.current_epoch + 1)
        if number:  # at the end of the epoch before, so that its checkpoint holds them
            self.pseudo = self.select(number)
            if self.restart:
                self._reset_to_start()

    def select(self, number: int) -> Tensor:
        """Select the pseudo-annotations of round ``number``: int64 ``[n, 3]``, rows of item, annotator and class.

        All processes must call it together.
        """
        index, probabilities = self.probabilities_of(self.used_indices())
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
        """Probabilities ``[n, R, C]`` of what each annotator would give, one block of samples after the other."""
        cells = self.num_classes * max(1, self.annotations.shape[1])
        with torch.no_grad():
            for part in probabilities.split(max(1, BLOCK // cells)):
                yield self.annotators(part.to(self.device)).transpose(1, 2)

    def _reset_to_start(self) -> None:
        assert self._start_state is not None
        for name, part in (("network", self.network), ("annotators", self.annotators)):
            start = {key.partition(".")[2]: v for key, v in self._start_state.items() if key.partition(".")[0] == name}
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
        if self._start_state is not None:
            checkpoint["initial_weights"] = self._start_state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.pseudo = checkpoint["pseudo_annotations"].cpu()
        self._start_state = checkpoint.get("initial_weights")

    def write_results(self, folder: Path) -> None:
        super().write_results(folder)
        if self.trainer.is_global_zero:
            people, classes = self.data.annotator_names, self.data.class_names
            rows = [[item, people[r], classes[label]] for item, r, label in self.pseudo.tolist()]
            write_text(folder / "pseudo_annotations.csv", csv_text([["index", "annotator", "class_name"], *rows]))
