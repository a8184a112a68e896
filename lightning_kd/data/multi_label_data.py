"""The base class of data modules that may have several labels per sample."""

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
    """A data module with several labels per sample, some of which may be made false, scarce or unknown.

    Targets are float32 ``[N, C]`` of 1, 0 and -1 (unknown). With ``candidates``, ``single_positive`` or
    ``labelled_fraction``, ``train_target`` holds the given labels of the training samples in use, and ``train_clean``
    the data set's own; validation and test labels are never changed. The run folder keeps the given labels in
    ``noise.npz``, with their sha256; a run that is resumed or evaluated reads them from there. ``Batch.extras`` has
    ``clean_target`` (float32 ``[B, C]``) for samples of the training array. With one class per sample it is an
    ``AnnotatedDataModule``.

    With ``labelled_fraction``, ``train_indices`` are the labelled samples and ``unlabelled_indices`` (int64, ascending,
    else empty) the others, whose labels are all -1; ``loader("train", data.unlabelled_indices)`` iterates over them.

    Args:
        candidates: adds false labels to the true ones (with one class per sample see ``ClassificationDataModule``).
        single_positive: keeps one positive label of each sample.
        labelled_fraction: fraction of the training samples that keep their labels, in (0, 1]. Default: all.
        labelled_seed: seed of ``numpy.random.RandomState``, which chooses them as in the papers' code.
        n_grid: cells per row and per column of an image, for the views ``"patches"`` and ``"strong_patches"``.
        normalize: normalise channels to mean 0 and standard deviation 1; else they stay from 0 to 1, as in most of the
            papers on these methods.
        kwargs: see ``AnnotatedDataModule``.

    Raises:
        ValueError: for these with data that does not have several labels per sample, and for ``candidates`` together
            with ``single_positive``.
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
            raise ValueError(f"{name} is for several labels per sample, the data has {self.problem.kind}: leave it out")
        self.n_grid = n_grid if isinstance(self.problem, MultiLabel) else None
        self._added = added
        self.candidates = candidates  # type: ignore[assignment]  # of either kind
        self.single_positive = single_positive
        self.labelled_fraction = labelled_fraction
        self.labelled_seed = labelled_seed
        self.normalize = normalize
        self.unlabelled_indices = np.arange(0)
        if self._is_weak:
            self._weak_labels(np.arange(0))  # raises for wrong arguments before any file is read

    def _weak_labels(self, indices: np.ndarray) -> WeakLabels:
        return WeakLabels(self._added, self.single_positive, self.labelled_fraction, self.labelled_seed, indices)

    def setup(self, stage: str | None = None) -> None:
        """Load and split the data, once."""
        if not self._is_weak:
            super().setup(stage)
            return
        folder = self._folder()
        # labels drawn before the run folder was known may differ from those recorded in it
        if not self._ready or (folder is not None and folder.path != self._noise_folder):
            self._load()
        if stage == "fit" and self.trainer is not None:
            self._note_weak_labels()

    def _load(self) -> None:
        self.train_clean, self.unlabelled_indices = None, np.arange(0)
        super()._load()
        if not self._is_weak:
            return
        self._ready = False  # stays so if a step below fails
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

    def _note_weak_labels(self) -> None:
        assert self.train_clean is not None
        given, clean = self.train_target[self.train_indices], self.train_clean[self.train_indices]
        images = (
            f"{len(self.train_indices)} of {len(self.train_indices) + len(self.unlabelled_indices)} training images"
        )
        wrong = int(((given == 1) & (clean == 0)).sum())
        known = int((given >= 0).sum())
        note(
            f"labels: {images} have labels, {int((given == 1).sum())} of them positive, of which {wrong} are false; "
            f"{known} of {given.numel()} labels are known"
        )
