"""The base of the methods for several annotators: access to the annotations, and two reports."""

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

# lower bound of the network's probabilities when they serve as prior: else no annotation could outweigh a 0
FLOOR = 1e-3


class CrowdTask(SampleMemories, SupervisedTask, ABC):
    """Base of methods that train one network on labels from several annotators; the data must have ``annotations``.

    After ``fit`` the run folder holds two tables. ``annotators.csv`` has one row per annotator: number of annotations,
    reliability (probability of giving the true class, mean over the true classes) and confusion matrix, row by row. The
    least reliable come first, annotators without annotations last.

    ``aggregated.csv`` has one row per sample: the most probable true class, its probability, ``disagreement`` (share of
    the annotations that differ from the most frequent class), the number of annotations and the probabilities of all
    classes. The least probable come first. ``LabelFile`` can read this table.

    The default optimizer is Adam with learning rate 1e-3, as in the code of the crowd layer; for a network with given
    weights see ``optimizer_for``.

    The arguments are those of ``SupervisedTask``. ``network`` returns logits ``[B, C]``.

    Raises:
        ValueError: in a fit, if the data has no annotations.
    """

    loss_is_plain = False

    def default_optimizer(self, parameters: list[Any]) -> torch.optim.Optimizer:
        given = self.has_given_weights or self.freeze_part is not None
        return super().default_optimizer(parameters) if given else torch.optim.Adam(parameters, lr=1e-3)

    # -- annotators --------------------------------------------------------------------------------------------------

    def allocate(self, annotators: int) -> None:
        """Create the parameters of ``annotators`` annotators, unless they exist."""

    def annotators_in(self, state: dict[str, Tensor]) -> int:
        """The number of annotators in the ``state_dict`` of a checkpoint."""
        return 0

    @abstractmethod
    def annotator_confusion(self) -> Tensor:
        """The estimated confusion matrices of all annotators, float64 ``[R, C, C]``.

        ``[r, k, l]`` is the probability that annotator ``r`` gives class ``l`` to a sample of true class ``k``.
        """

    @property
    def annotations(self) -> Tensor:
        """Annotations of the training samples in use, int16 ``[N, R]``, -1 elsewhere; must not be modified.

        Raises:
            ValueError: if the data has none.
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

    def used_indices(self) -> np.ndarray:
        """Indices of the training samples in use, with or without annotations, int64, ascending."""
        return np.union1d(self.data.train_indices, self.data.unlabelled_indices)

    def annotations_of(self, batch: Batch) -> Tensor:
        """The annotations of a batch, int64 ``[B, R]``, -1 where one is missing.

        Raises:
            ValueError: if the batch has none.
        """
        if "annotations" not in batch.extras:
            raise ValueError(
                f"{type(self).__name__} learns from several annotators, but the batch has no annotations: use one of "
                "our data modules with annotations, or let your loader put them into the extras"
            )
        return batch.extras["annotations"]

    def training_target(self, batch: Any) -> Tensor | None:
        return None  # the loss uses annotations, and samples without any have no target

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            self.allocate(self.annotations.shape[1])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.allocate(self.annotators_in(checkpoint["state_dict"]))

    # -- results -----------------------------------------------------------------------------------------------------

    def probabilities_of(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Index ``[n]`` and the network's probabilities ``[n, C]`` of training samples.

        All processes must call it together.
        """

        def measure(batch: Batch) -> tuple[Tensor]:
            return (self.scores_and_probabilities(batch.image)[1],)

        index, probabilities = ordered_pass(self, self.data.loader("train", indices), measure)
        return index, probabilities

    def posterior(self) -> tuple[Tensor, Tensor]:
        """Index ``[n]`` and posteriors float64 ``[n, C]`` of the samples in use, from the network and the annotations.

        All processes must call it together.
        """
        index, probabilities = self.probabilities_of(self.used_indices())
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
    """The rows of ``annotators.csv``, header first, see ``CrowdTask``.

    Args:
        confusion: ``[R, C, C]``.
        annotations: integers ``[N, R]``, -1 for a missing annotation.
        names: names of the ``R`` annotators.
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
    """The rows of ``aggregated.csv``, header first, see ``CrowdTask``.

    Args:
        index: int64 ``[n]``, positions in the training array.
        posterior: ``[n, C]``.
        annotations: integers ``[n, R]`` of these samples, -1 for a missing annotation.
        class_names: names of the ``C`` classes.
        files: paths of all training images, for a column ``path``; ``None`` for no such column.
    """
    count = (annotations >= 0).sum(1)
    votes = torch.stack([(annotations == c).sum(1) for c in range(posterior.shape[1])], 1)
    disagreement = 1 - votes.amax(1) / count.clamp(min=1)
    disagreement[count == 0] = 0
    probability, label = posterior.max(1)
    order = np.lexsort((index.numpy(), -disagreement.numpy(), probability.numpy())).tolist()
    # the column is not "label", which holds class indices: a class name may be a number, but not its own index
    head = ["index", *([] if files is None else ["path"]), "class_name", "probability", "disagreement", "count"]
    rows: list[list[Any]] = [[*head, "posterior"]]
    for i in order:
        file = [] if files is None else [files[int(index[i])]]
        numbers = [f"{float(probability[i]):.6g}", f"{float(disagreement[i]):.6g}", int(count[i])]
        rows.append([int(index[i]), *file, class_names[int(label[i])], *numbers, _numbers(posterior[i])])
    return rows


def _numbers(values: Tensor) -> str:
    return ";".join(f"{value:.6g}" for value in values.tolist())
