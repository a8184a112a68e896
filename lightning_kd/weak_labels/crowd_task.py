"""What methods for several annotators share: the annotations, what is known of each annotator, and two reports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_kd.core.batch import Batch
from lightning_kd.core.inference_pass import ordered_pass
from lightning_kd.core.sample_memories import SampleMemories
from lightning_kd.core.supervised_task import SupervisedTask
from lightning_kd.file_writing import write_text
from lightning_kd.spreadsheet import csv_text
from lightning_kd.weak_labels.crowd_statistics import posterior_of

__all__ = ["CrowdTask"]

# the least probability of a class before annotations are heard
FLOOR = 1e-3


class CrowdTask(SampleMemories, SupervisedTask, ABC):
    """A method that trains one network on labels by several annotators; its data has ``annotations``.

    After ``fit`` the run folder holds ``annotators.csv``: of each annotator the number of annotations, the reliability
    (the mean over true classes of how probably it gives them) and the confusion matrix, row by row; the least reliable
    first, and those who gave nothing, of whom nothing is known, last. And ``aggregated.csv``: of each sample the class
    that is probably true, its probability, ``disagreement`` (the share of the annotations beside the most frequent
    class), their number and the probabilities of all classes; the most doubtful first. It is a table that ``LabelFile``
    takes.

    Without ``optimizer`` it is Adam with 1e-3, as in the code of the crowd layer; with given weights as
    ``optimizer_for``.

    Args:
        network: a network's name (``lightning-kd list``) or any ``nn.Module`` that gives logits ``[B, C]``.
        num_classes: see ``Task``.
        kwargs: ``input_shape``, ``weights`` of ``SupervisedTask``, and the arguments of ``FineTunedTask`` and ``Task``.

    Raises:
        ValueError: in a fit, where the data has no annotations.
    """

    loss_is_plain = False

    def default_optimizer(self, parameters: list[Any]) -> torch.optim.Optimizer:
        given = self.has_given_weights or self.freeze_part is not None
        return super().default_optimizer(parameters) if given else torch.optim.Adam(parameters, lr=1e-3)

    # -- annotators --------------------------------------------------------------------------------------------------

    def allocate(self, annotators: int) -> None:
        """Make room for what is learnt of each of ``annotators``, unless there is."""

    def annotators_in(self, state: dict[str, Tensor]) -> int:
        """How many annotators the ``state_dict`` of a checkpoint is of."""
        return 0

    @abstractmethod
    def annotator_confusion(self) -> Tensor:
        """What is known of each annotator, float64 ``[R, C, C]``: how probably it gives class ``l`` to one of class
        ``k``, at ``[r, k, l]``."""

    @property
    def annotations(self) -> Tensor:
        """Int16 ``[N, R]``, those of the samples in use, -1 elsewhere; not to be changed.

        Raises:
            ValueError: where the data has none.
        """
        data = self.data
        data.setup()
        given: Tensor | None = getattr(data, "train_annotations", None)
        if given is None:
            raise ValueError(
                f"{type(self).__name__} learns from several annotators, but {type(data).__name__} has no annotations: "
                "give it annotations, for example CrowdAnnotations(path)"
            )
        return given

    def used(self) -> np.ndarray:
        """The training samples in use, with and without annotation, int64, ascending."""
        return np.union1d(self.data.train_indices, self.data.unlabelled_indices)

    def annotations_of(self, batch: Batch) -> Tensor:
        """Those of a batch, int64 ``[B, R]``.

        Raises:
            ValueError: where it has none.
        """
        if "annotations" not in batch.extras:
            raise ValueError(
                f"{type(self).__name__} learns from several annotators, but the batch has no annotations: use one of "
                "our data modules with annotations, or let your loader put them into the extras"
            )
        return batch.extras["annotations"]

    def training_target(self, batch: Any) -> Tensor | None:
        return None  # samples without annotation have none; annotations are looked at by the loss

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            self.allocate(self.annotations.shape[1])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.allocate(self.annotators_in(checkpoint["state_dict"]))

    # -- results -----------------------------------------------------------------------------------------------------

    def probabilities_of(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Index ``[n]`` and probabilities ``[n, C]`` of training samples by the network as it is; collective."""

        def measure(batch: Batch) -> tuple[Tensor]:
            return (self.scores_and_probabilities(batch.image)[1],)

        index, probabilities = ordered_pass(self, self.data.loader("train", indices), measure)
        return index, probabilities

    def posterior(self) -> tuple[Tensor, Tensor]:
        """Index ``[n]`` and posteriors float64 ``[n, C]`` of the samples in use, from network and annotators;
        collective."""
        index, probabilities = self.probabilities_of(self.used())
        log_prior = probabilities.double().clamp(min=FLOOR).log()
        return index, posterior_of(log_prior, self.annotator_confusion().cpu(), self.annotations[index])

    def write_results(self, folder: Path) -> None:
        index, posterior = self.posterior()
        if not self.trainer.is_global_zero:
            return
        data = self.data
        confusion, given = self.annotator_confusion().cpu(), self.annotations
        write_text(folder / "annotators.csv", csv_text(annotator_rows(confusion, given, data.annotator_names)))
        files = data.train_image if isinstance(data.train_image, list) else None
        rows = aggregated_rows(index, posterior, given[index], data.class_names, files)
        write_text(folder / "aggregated.csv", csv_text(rows))


def annotator_rows(confusion: Tensor, annotations: Tensor, names: Sequence[str]) -> list[list[Any]]:
    """The lines of ``annotators.csv``, see ``CrowdTask``.

    Args:
        confusion: ``[R, C, C]``.
        annotations: ``[N, R]``, -1 where there is none.
        names: ``R``.
    """
    reliability = confusion.diagonal(dim1=1, dim2=2).mean(1).tolist()
    rows: list[list[Any]] = []
    for r, count in enumerate((annotations >= 0).sum(0).tolist()):
        known: list[Any] = [None, None]
        if count:
            known = [f"{reliability[r]:.6g}", _numbers(confusion[r].flatten())]
        rows.append([names[r], count, *known])
    order = sorted(range(len(rows)), key=lambda r: (not rows[r][1], reliability[r]))
    return [["annotator", "count", "reliability", "confusion"], *(rows[r] for r in order)]


def aggregated_rows(
    index: Tensor, posterior: Tensor, annotations: Tensor, class_names: Sequence[str], files: Sequence[str] | None
) -> list[list[Any]]:
    """The lines of ``aggregated.csv``, see ``CrowdTask``.

    Args:
        index: int64 ``[n]``.
        posterior: ``[n, C]``.
        annotations: int64 ``[n, R]`` of these samples, -1 where there is none.
        class_names: ``C``.
        files: of the whole training array, for one more column.
    """
    count = (annotations >= 0).sum(1)
    votes = torch.stack([(annotations == c).sum(1) for c in range(posterior.shape[1])], 1)
    disagreement = 1 - votes.amax(1) / count.clamp(min=1)
    disagreement[count == 0] = 0
    probability, label = posterior.max(1)
    order = np.lexsort((index.numpy(), -disagreement.numpy(), probability.numpy())).tolist()
    # not "label": names of classes may be whole numbers other than their own
    head = ["index", *([] if files is None else ["path"]), "class_name", "probability", "disagreement", "count"]
    rows: list[list[Any]] = [[*head, "posterior"]]
    for i in order:
        file = [] if files is None else [files[int(index[i])]]
        numbers = [f"{float(probability[i]):.6g}", f"{float(disagreement[i]):.6g}", int(count[i])]
        rows.append([int(index[i]), *file, class_names[int(label[i])], *numbers, _numbers(posterior[i])])
    return rows


def _numbers(values: Tensor) -> str:
    return ";".join(f"{value:.6g}" for value in values.tolist())
