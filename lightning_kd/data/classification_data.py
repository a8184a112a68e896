"""The base class of data modules with one class per sample that support label noise and candidate labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.notes import note
from lightning_kd.core.run_callbacks import run_folder_of
from lightning_kd.core.run_folder import RunFolder
from lightning_kd.core.seeding import numpy_generator
from lightning_kd.data.candidate_sets import CandidateSets
from lightning_kd.data.fake_data import fake_unlabelled
from lightning_kd.data.label_noise import CleanLabels, DrawnLabels, LabelNoise
from lightning_kd.data.labelled_data import LabelledDataModule
from lightning_kd.data.noise_record import check_no_noise, digest, load_or_draw_labels
from lightning_kd.data.splits import take_per_class, without
from lightning_kd.data.unlabelled_samples import further_samples

__all__ = ["ClassificationDataModule"]


class ClassificationDataModule(LabelledDataModule):
    """A ``LabelledDataModule`` with one class per sample that supports label noise, candidates and unlabelled samples.

    With ``noise``, ``train_target`` holds the given (noisy) labels of the whole training array, also of validation
    samples taken from it, and splits are stratified by them; ``train_clean`` (int64 ``[N]``, else ``None``) holds the
    data set's own labels. Separate validation and test labels are never changed. ``Batch.extras`` has ``clean_target``
    (int64 ``[B]``) for samples of the training array.

    With ``candidates``, ``train_target`` stays the data set's own labels, used for splits, metrics and the meta set;
    ``train_candidates`` (uint8 ``[N, K]``, else ``None``) holds the labels that a method may learn from, in
    ``Batch.extras`` as ``candidates`` (``[B, K]``). With ``meta_per_class``, ``meta_indices`` (int64, ascending, else
    empty) are samples held out of ``train_indices`` whose true ``train_target`` a method may use:
    ``loader("train", data.meta_indices)``.

    With ``unlabelled``, the full training array has samples without a label at the positions ``unlabelled_indices``
    (int64, ascending, else empty); their ``train_target`` is -1. ``train_indices``, validation and test contain only
    labelled samples, so a method that does not use unlabelled ones trains as before.

    The labels drawn do not depend on any split. Under a Trainer with a run folder they are kept there in ``noise.npz``,
    and read from it when a run is resumed or evaluated. Checkpoints hold their sha256, and a fit refuses to resume from
    a checkpoint trained on other labels. A fit prints how many labels are wrong, or how many candidates there are.

    Args:
        noise: label noise for the training samples. Default: the labels of the data set.
        candidates: gives each training sample a candidate set: several labels, of which one is true.
        meta_per_class: number of training samples of each class to hold out (at most all but one of a class).
        unlabelled: a folder, an image or a list (see ``files_to_predict``) where samples are image files; an ``.npy``
            or ``.npz`` with ``image`` or ``feature`` where they are in memory. They are appended to the training array,
            except samples that training, validation or test already contain. ``"rest"``: the training samples that
            ``train_fraction`` or ``train_per_class`` leaves out, with hidden labels. With ``fake``, synthetic samples
            stand for those of a file, which need not exist.
        kwargs: see ``LabelledDataModule``.

    Raises:
        ValueError: for any of these with more than one class per sample; for noise with any of the others; for
            candidates with ``balance``; for unlabelled samples with candidates, a meta set or ``balance``.
    """

    train_clean: Tensor | None
    train_candidates: Tensor | None
    meta_indices: np.ndarray
    unlabelled_indices: np.ndarray

    def __init__(
        self,
        *,
        noise: LabelNoise | None = None,
        candidates: CandidateSets | None = None,
        meta_per_class: int | None = None,
        unlabelled: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_numbers(least=1, whole=True, optional=True, meta_per_class=meta_per_class)
        given = {"noise": noise, "candidates": candidates, "meta_per_class": meta_per_class, "unlabelled": unlabelled}
        for name, value in given.items():
            if value is not None and not self.problem.one_class:
                raise ValueError(f"{name} is for one class per sample, the data has {self.problem.kind}: leave it out")
            if value is not None and noise is not None and name != "noise":
                raise ValueError(f"noise and {name} exclude each other, got {noise} and {value}: leave one out")
        if candidates is not None and self.balance:
            raise ValueError(
                f"balance needs the true classes, which are unknown with candidates={candidates}: leave balance out"
            )
        others = {"candidates": candidates, "meta_per_class": meta_per_class, "balance": self.balance or None}
        for name, value in others.items() if unlabelled is not None else ():
            if value is not None:
                raise ValueError(f"unlabelled and {name} exclude each other, got {unlabelled!r} and {value}: leave one")
        self.noise = noise
        self.candidates = candidates
        self.meta_per_class = meta_per_class
        self.train_clean = self.train_candidates = None
        self.meta_indices = self.unlabelled_indices = np.arange(0)
        self.unlabelled = unlabelled
        self._noise_folder: Path | None = None
        self._labels_digest: str | None = None

    def setup(self, stage: str | None = None) -> None:
        """Load and split the data, once; for the stage ``"predict"`` with ``predict``, load the new samples only."""
        if self._only_new(stage):
            return
        folder, drawn = self._folder(), self._drawn
        if drawn is None and stage == "fit":
            check_no_noise(folder, self.trainer)
        # labels drawn before the run folder was known may differ from those recorded in it
        unrecorded = drawn is not None and folder is not None and folder.path != self._noise_folder
        if not self._ready or unrecorded:
            self._load()
        if stage == "fit" and self.trainer is not None and self._process()[0] == 0:
            self._note_labels()

    def _load(self) -> None:
        super()._load()
        self._ready = False  # stays so if a step below fails
        if self.meta_per_class is not None:
            self._hold_out(self.meta_per_class)
        if self.unlabelled is not None:
            self._add_unlabelled(self.unlabelled)
        self._ready = True

    def _add_unlabelled(self, given: str) -> None:
        """Append samples without labels to the training array; with ``"rest"``, hide the labels of unused samples."""
        image, count = self.train_image, len(self.train_target)
        val_is_own = self._val_source == "val"
        if given == "rest":
            used = self.train_indices if val_is_own else np.union1d(self.train_indices, self.val_indices)
            self.unlabelled_indices = without(count, used)
            if not len(self.unlabelled_indices) and not self.fake:
                raise ValueError(
                    "unlabelled='rest' finds no training sample that is left out: give train_per_class or "
                    "train_fraction, or a file of unlabelled samples"
                )
            self.train_target = self.train_target.clone()  # the source may share its arrays with other modules
            self.train_target[self.unlabelled_indices] = -1
            return
        if self.fake:
            added = fake_unlabelled(self.input_shape, self.num_classes)
        else:
            source = self.val_image if val_is_own else image
            val = [source[i] for i in self.val_indices] if isinstance(source, list) else source[self.val_indices]
            added = further_samples(given, image, [val, self.test_image])
        self.train_image = [*image, *added] if isinstance(image, list) else torch.cat([image, added])
        self.train_target = torch.cat([self.train_target, torch.full((len(added),), -1)])
        self.unlabelled_indices = np.arange(count, count + len(added))

    def _hold_out(self, per_class: int) -> None:
        """Move the meta set out of the training samples."""
        chosen = self.train_indices
        target = self.train_target.numpy()
        count = np.bincount(target[chosen], minlength=self.num_classes)
        drawn = self._drawn
        if isinstance(drawn, CandidateSets) and drawn.meta_from_single:
            assert self.train_candidates is not None
            chosen = chosen[self.train_candidates[chosen].sum(1).numpy() == 1]
        there = np.bincount(target[chosen], minlength=self.num_classes)
        take = np.minimum(np.minimum(per_class, there), np.maximum(count - 1, 0))
        self.meta_indices = chosen[take_per_class(target[chosen], take, numpy_generator(self.seed, "meta_split"))]
        if not len(self.meta_indices):
            raise ValueError(
                f"meta_per_class={per_class} finds no sample with a certain label: give some samples a single candidate"
            )
        self.train_indices = np.setdiff1d(self.train_indices, self.meta_indices, assume_unique=True)

    def _folder(self) -> RunFolder | None:
        """The run folder that keeps the given labels; ``None`` without one, or in a ``fast_dev_run``."""
        return None if getattr(self.trainer, "fast_dev_run", 0) else run_folder_of(self.trainer)

    def _change_targets(self) -> None:
        folder, drawn = self._folder(), self._drawn
        if drawn is not None:
            given = torch.from_numpy(self._given_labels(drawn, folder))
            if self.noise is None:
                self.train_candidates = given
            else:
                self.train_clean, self.train_target = self.train_target, given
            self._noise_folder = None if folder is None else folder.path
        learnt = self.train_target if self.noise is not None else self.train_candidates
        self._labels_digest = None if learnt is None else digest(learnt.numpy())

    def _note_labels(self) -> None:
        if self.noise is not None:
            self._print_rate()
        if self.train_candidates is not None:
            sizes = self.train_candidates[self.train_indices].sum(1)
            by = "" if self._drawn is None else f", by {self._drawn}"
            note(
                f"candidates: {sizes.float().mean():.2f} labels per training sample, {int((sizes == 1).sum())} of "
                f"{len(sizes)} have a single one{by}"
            )
            task = self.trainer.lightning_module  # type: ignore[union-attr]
            if not hasattr(task, "candidates_of"):
                note(
                    f"{type(task).__name__} is not a method for candidates: unless it reads batch.extras['candidates'] "
                    "itself, it learns from the true labels"
                )
        if self.unlabelled is not None:
            labelled = f"{len(self.train_indices)} labelled ones"
            note(f"unlabelled: {len(self.unlabelled_indices)} training samples in addition to {labelled}")
        if self.meta_per_class is not None:
            found = np.bincount(self.train_target.numpy()[self.meta_indices], minlength=self.num_classes)
            counts = dict(zip(self.class_names, found.tolist(), strict=True))
            few = [name for name, n in counts.items() if 0 < n < self.meta_per_class]
            none = [name for name, n in counts.items() if not n]
            fewer = f"; fewer than {self.meta_per_class} of {', '.join(few)}" if few else ""
            fewer += f"; none of {', '.join(none)}, so it teaches nothing about them" if none else ""
            note(f"meta set: {len(self.meta_indices)} samples held out with their true labels{fewer}")

    def _print_rate(self) -> None:
        assert self.train_clean is not None
        is_wrong = (self.train_target != self.train_clean).numpy()
        wrong, count = int(is_wrong[self.train_indices].sum()), len(self.train_indices)
        whole = ""
        if count < len(is_wrong):
            whole = f"; in the whole array {is_wrong.sum()} of {len(is_wrong)}, {is_wrong.mean():.2%}"
        print(
            f"label noise: {wrong} of {count} training labels are wrong ({wrong / count:.2%}{whole}), by {self._drawn}"
        )

    def state_dict(self) -> dict[str, Any]:
        """State for checkpoints: a digest of the data and, with noise or candidates, the sha256 of the given labels."""
        given = self._labels_digest if self._ready else None
        return super().state_dict() | ({} if given is None else {"labels_sha256": given})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check, before a fit resumes, that the checkpoint was trained on these labels and this data.

        Raises:
            ValueError: where it was trained on others.
        """
        fitting = self.trainer is not None and self.trainer.state.fn == "fit"
        if fitting and state_dict.get("labels_sha256") != self._labels_digest:
            what = f"candidates={self.candidates}" if self.train_candidates is not None else f"noise={self.noise}"
            raise ValueError(
                f"the checkpoint was trained on other labels than those of {what}: give the data and the "
                "noise or candidates of that run, or start anew without it"
            )
        super().load_state_dict(state_dict)

    @property
    def _drawn(self) -> DrawnLabels | None:
        """The source of the given labels: noise or candidates, or its synthetic substitute with ``fake``."""
        drawn: DrawnLabels | None = self.candidates if self.noise is None else self.noise
        drawn = drawn if isinstance(drawn, DrawnLabels) else None  # multi-label candidates are drawn by the subclass
        return drawn.without_files() if self.fake and drawn is not None else drawn

    def _given_labels(self, drawn: DrawnLabels, folder: RunFolder | None) -> np.ndarray:
        path = getattr(self, "path", None)  # only modules that read a single file have one
        clean = CleanLabels(
            self.train_target.numpy(), self.class_names, self.train_image, None if path is None else Path(path)
        )
        return load_or_draw_labels(drawn, clean, folder, self.trainer)

    def _extras(self, source: str) -> dict[str, Tensor]:
        """Further tensors for ``Batch.extras``, a row for each sample of a full array."""
        known = {"clean_target": self.train_clean, "candidates": self.train_candidates}
        own = {name: value for name, value in known.items() if source == "train" and value is not None}
        return super()._extras(source) | own
