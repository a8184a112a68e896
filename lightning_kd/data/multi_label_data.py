"""The base of the data modules whose images may have several labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.notes import note
from lightning_kd.core.problems import MultiLabel
from lightning_kd.data.annotated_data import AnnotatedDataModule
from lightning_kd.data.auto_augment import BatchedAutoAugment
from lightning_kd.data.candidate_sets import CandidateSets
from lightning_kd.data.label_noise import CleanLabels
from lightning_kd.data.noise_record import load_or_draw_labels
from lightning_kd.data.rand_augment import BatchedRandAugment
from lightning_kd.data.weak_labels import CandidateLabels, SinglePositive, WeakLabels

__all__ = ["MultiLabelDataModule"]


class MultiLabelDataModule(AnnotatedDataModule):
    """A ``ClassificationDataModule`` that, where each sample has several labels, may be given false or few of them.

    Targets are float32 ``[N, C]`` of 1, 0 and -1 (not known). With ``candidates``, ``single_positive`` or
    ``labelled_fraction``, ``train_target`` are the given labels of the training samples in use, and ``train_clean``
    the data set's own; labels of validation and test samples stay as they are. What was drawn is kept in the run folder
    in ``noise.npz``, with its sha256, and taken from it where a run is resumed or evaluated. ``Batch.extras`` then
    holds ``clean_target`` (float32 ``[B, C]``) for samples of the training array.

    With ``labelled_fraction``, ``train_indices`` are the labelled samples and ``unlabelled_indices`` (int64, ascending,
    else empty) the others, whose labels are all -1: ``loader("train", data.unlabelled_indices)`` goes over them.

    Args:
        candidates: adds false labels to the true ones (with one class a sample see ``ClassificationDataModule``).
        single_positive: keeps one label of each sample.
        labelled_fraction: the share of the training samples that keep their labels, above 0 to 1; ``None`` for all.
        labelled_seed: fixes which; those of ``RandomState(labelled_seed)``, as in the papers.
        n_grid: cells of an image in a row and in a column, for the views ``"patches"`` and ``"strong_patches"``.
        normalize: bring channels to mean 0 and deviation 1; else they stay from 0 to 1, as in most of these papers.
        kwargs: see ``ClassificationDataModule``.

    Raises:
        ValueError: for these where samples have no several labels, and for candidates and single positives at once.
    """

    unlabelled_indices: np.ndarray

    def __init__(
        self,
        *,
        candidates: CandidateLabels | CandidateSets | None = None,
        single_positive: SinglePositive | None = None,
        labelled_fraction: float | None = None,
        labelled_seed: int = 1,
        normalize: bool = True,
        n_grid: int = 2,
        **kwargs: Any,
    ) -> None:
        check_numbers(least=1, whole=True, n_grid=n_grid)
        check_numbers(least=0, whole=True, labelled_seed=labelled_seed)
        check_numbers(above=0, most=1, optional=True, labelled_fraction=labelled_fraction)
        if not normalize:
            channels = kwargs["input_shape"][0]
            kwargs.update(mean=[0.0] * channels, std=[1.0] * channels)
        sets = candidates if isinstance(candidates, CandidateSets) else None
        super().__init__(candidates=sets, **kwargs)
        added = None if isinstance(candidates, CandidateSets) else candidates
        given = {
            "candidates": added,
            "single_positive": single_positive,
            "labelled_fraction": labelled_fraction,
        }
        self._is_weak = any(value is not None for value in given.values())
        if self._is_weak and not isinstance(self.problem, MultiLabel):
            name = next(name for name, value in given.items() if value is not None)
            raise ValueError(f"{name} is for several labels a sample, the data has {self.problem.kind}: leave it out")
        self.n_grid = n_grid if isinstance(self.problem, MultiLabel) else None
        self._added = added
        self.candidates = candidates  # type: ignore[assignment]  # of either kind
        self.single_positive = single_positive
        self.labelled_fraction = labelled_fraction
        self.labelled_seed = labelled_seed
        self.normalize = normalize
        self.unlabelled_indices = np.arange(0)
        if self._is_weak:
            self._weak_labels(np.arange(0))  # says what is wrong with them before anything is read

    def _weak_labels(self, indices: np.ndarray) -> WeakLabels:
        return WeakLabels(self._added, self.single_positive, self.labelled_fraction, self.labelled_seed, indices)

    def setup(self, stage: str | None = None) -> None:
        """Load and split the data, once, whatever the stage."""
        if not self._is_weak:
            super().setup(stage)
            return
        folder = self._folder()
        # labels drawn before there was a run folder must be those recorded in it
        if not self._ready or (folder is not None and folder.path != self._noise_folder):
            self._load()
        if stage == "fit" and self.trainer is not None:
            self._tell()

    def _load(self) -> None:
        self.train_clean, self.unlabelled_indices = None, np.arange(0)
        super()._load()
        if not self._is_weak:
            return
        self._ready = False  # until all of it has worked
        folder = self._folder()
        weak = self._weak_labels(self.train_indices)
        clean = CleanLabels(self.train_target.numpy().astype(np.int8), self.class_names)
        given = load_or_draw_labels(weak, clean, folder, self.trainer)
        labelled = weak.labelled()
        self.unlabelled_indices = np.setdiff1d(self.train_indices, labelled, assume_unique=True)
        self.train_indices = labelled
        self.train_clean, self.train_target = self.train_target, torch.from_numpy(given).float()
        self._noise_folder = None if folder is None else folder.path
        self._ready = True

    def _policy(self) -> BatchedAutoAugment:
        return BatchedRandAugment() if isinstance(self.problem, MultiLabel) else super()._policy()

    def _tell(self) -> None:
        assert self.train_clean is not None
        given, clean = self.train_target[self.train_indices], self.train_clean[self.train_indices]
        images = (
            f"{len(self.train_indices)} of {len(self.train_indices) + len(self.unlabelled_indices)} training images"
        )
        wrong = int(((given == 1) & (clean == 0)).sum())
        known = int((given >= 0).sum())
        note(
            f"labels: {images} have some, {int((given == 1).sum())} positive ones, of which {wrong} are false, and "
            f"{known} of {given.numel()} known"
        )
