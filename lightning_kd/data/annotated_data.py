"""The base class of data modules whose training samples may have labels by several annotators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_kd.core.annotations import majority_vote
from lightning_kd.core.notes import note
from lightning_kd.data.classification_data import ClassificationDataModule
from lightning_kd.data.crowd_labels import CrowdLabels
from lightning_kd.data.label_noise import CleanLabels
from lightning_kd.data.noise_record import digest, load_or_draw_labels

__all__ = ["AnnotatedDataModule"]


class AnnotatedDataModule(ClassificationDataModule):
    """A ``ClassificationDataModule`` whose training samples may have labels by several annotators.

    With ``annotations``, ``train_annotations`` (int16 ``[N, R]``, else ``None``) holds the class that each of ``R``
    annotators gave to each training sample in use, -1 where there is none. ``Batch.extras`` holds them as
    ``annotations`` (int64 ``[B, R]``). ``train_target`` of these samples is the majority vote, so that any task can be
    trained on it. ``train_clean`` is the data set's own labels, which no method learns from; validation and test labels
    stay the data set's own. ``train_indices`` are the samples with an annotation, ``unlabelled_indices`` (int64,
    ascending, else empty) those without; their target is -1.

    The run folder keeps the annotations in ``noise.npz``, with their sha256; a run that is resumed or evaluated reads
    them from there.

    Args:
        annotations: the source of the annotations.
        kwargs: see ``ClassificationDataModule``.

    Raises:
        ValueError: for annotations together with noise, candidates, a meta set or unlabelled samples, or for data with
            more than one class per sample.
    """

    train_annotations: Tensor | None

    def __init__(self, *, annotations: CrowdLabels | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if annotations is not None and not self.problem.one_class:
            raise ValueError(
                f"annotations are for one class per sample, the data has {self.problem.kind}: leave them out"
            )
        for name in ("noise", "candidates", "meta_per_class", "unlabelled"):
            if annotations is not None and getattr(self, name, None) is not None:
                raise ValueError(
                    f"annotations and {name} exclude each other, got {annotations} and {getattr(self, name)}: leave "
                    "one out"
                )
        self.annotations = annotations
        self.train_annotations = None
        self._annotation_digest: str | None = None

    @property
    def annotator_names(self) -> list[str]:
        """A name for each annotator; empty without annotations."""
        if self.train_annotations is None:
            return []
        crowd = self._crowd
        return crowd.annotator_names(self.train_annotations.shape[1])

    @property
    def _crowd(self) -> CrowdLabels:
        crowd = self.annotations
        assert crowd is not None
        if self.fake:
            substitute = crowd.without_files()
            assert isinstance(substitute, CrowdLabels)
            return substitute
        return crowd

    def setup(self, stage: str | None = None) -> None:
        """Load and split the data, once; for the stage ``"predict"`` with ``predict``, load the new samples only."""
        if self.annotations is None:
            super().setup(stage)
            return
        if self._only_new(stage):
            return
        folder = self._folder()
        # annotations drawn before the run folder was known may differ from those recorded in it
        if not self._ready or (folder is not None and folder.path != self._noise_folder):
            self._load()
        if stage == "fit" and self.trainer is not None:
            self._note_annotations()

    def _load(self) -> None:
        if self.annotations is None:
            super()._load()
            return
        self.train_clean = self.train_annotations = None
        super()._load()
        self._ready = False  # stays so if a step below fails
        crowd, own, folder = self._crowd, self.train_target, self._folder()
        used = crowd.keep(own.numpy(), self.train_indices, self.num_classes)
        path = getattr(self, "path", None)  # only modules that read a single file have one
        clean = CleanLabels(own.numpy(), self.class_names, self.train_image, None if path is None else Path(path))
        drawn = torch.from_numpy(load_or_draw_labels(crowd, clean, folder, self.trainer))
        given = torch.full_like(drawn, -1)  # samples that are not trained on have no annotations
        given[used] = drawn[used]
        there = (given[used] >= 0).any(1).numpy()
        if not there.any():
            raise ValueError(f"no training sample has an annotation by {crowd}: is it for this data set?")
        self.train_indices, self.unlabelled_indices = used[there], used[~there]
        target = own.clone()
        target[self.train_indices] = majority_vote(given[self.train_indices], self.num_classes).argmax(1)
        target[self.unlabelled_indices] = -1
        self.train_annotations, self.train_clean, self.train_target = given, own, target
        self._annotation_digest = digest(given.numpy())
        self._noise_folder = None if folder is None else folder.path
        self._ready = True

    def _note_annotations(self) -> None:
        given, clean = self.train_annotations, self.train_clean
        assert given is not None
        assert clean is not None
        used = len(self.train_indices) + len(self.unlabelled_indices)
        none = f", {len(self.unlabelled_indices)} have none" if len(self.unlabelled_indices) else ""
        wrong = (self.train_target[self.train_indices] != clean[self.train_indices]).double().mean()
        note(
            f"annotations: {int((given >= 0).sum())} of {used} training samples by {given.shape[1]} annotators{none}; "
            f"the majority differs from the data set's own label at {wrong:.2%}, by {self._crowd}"
        )

    def state_dict(self) -> dict[str, Any]:
        """State for checkpoints: a digest of the data and, with ``annotations``, the sha256 of the annotations."""
        given = self._annotation_digest if self._ready else None
        return super().state_dict() | ({} if given is None else {"annotations_sha256": given})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check, before a fit resumes, that the checkpoint was trained on these annotations and this data.

        Raises:
            ValueError: where it was trained on others.
        """
        fitting = self.trainer is not None and self.trainer.state.fn == "fit"
        if fitting and state_dict.get("annotations_sha256") != self._annotation_digest:
            raise ValueError(
                f"the checkpoint was trained on other labels than those of annotations={self.annotations}: give the "
                "data and the annotations of that run, or start anew without it"
            )
        super().load_state_dict(state_dict)

    def _extras(self, source: str) -> dict[str, Tensor]:
        """Further tensors for ``Batch.extras``, a row for each sample of a full array."""
        found = super()._extras(source)
        if source == "train" and self.train_annotations is not None:
            found["annotations"] = self.train_annotations
        return found
