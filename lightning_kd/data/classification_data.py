"""The base of the data modules whose samples may be given wrong labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_kd.core.run_callbacks import run_folder_of
from lightning_kd.core.run_folder import RunFolder
from lightning_kd.data.label_noise import CleanLabels, LabelNoise
from lightning_kd.data.labelled_data import LabelledDataModule
from lightning_kd.data.noise_record import check_no_noise, digest, load_or_draw_labels

__all__ = ["ClassificationDataModule"]


class ClassificationDataModule(LabelledDataModule):
    """A ``LabelledDataModule`` that may be given wrong labels, where each sample has one class.

    With ``noise``, ``train_target`` are the given labels, splits and validation samples of the training array
    included, and ``train_clean`` (int64 ``[N]``, else ``None``) the data set's own; its own validation and test labels
    are never changed. The labels are drawn before anything is split. Under a Trainer with a run folder they are kept
    there in ``noise.npz``, and taken from it where a run is resumed or evaluated. Checkpoints hold their sha256, and a
    fit does not go on from one that was trained on other labels. A fit prints how many are wrong. ``Batch.extras``
    then holds ``clean_target`` (int64 ``[B]``) for samples of the training array.

    Args:
        noise: gives the training samples wrong labels; ``None`` keeps the data set's own.
        kwargs: see ``LabelledDataModule``.

    Raises:
        ValueError: for noise where samples have more than one class.
    """

    train_clean: Tensor | None

    def __init__(self, *, noise: LabelNoise | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if noise is not None and not self.problem.one_class:
            raise ValueError(f"noise is for one class a sample, the data has {self.problem.kind}: leave it out")
        self.noise = noise
        self.train_clean = None
        self._noise_folder: Path | None = None

    def setup(self, stage: str | None = None) -> None:
        """Load and split the data, once; to predict new samples, load those alone."""
        if self._only_new(stage):
            return
        folder = self._folder()
        if self.noise is None and stage == "fit":
            check_no_noise(folder, self.trainer)
        # labels drawn before there was a run folder must be those recorded in it
        unrecorded = self.noise is not None and folder is not None and folder.path != self._noise_folder
        if not self._ready or unrecorded:
            self._load()
        if self.noise is not None and stage == "fit" and self.trainer is not None and self._process()[0] == 0:
            self._print_rate()

    def _folder(self) -> RunFolder | None:
        """Where the given labels are kept."""
        return None if getattr(self.trainer, "fast_dev_run", 0) else run_folder_of(self.trainer)

    def _change_targets(self) -> None:
        if self.noise is not None:
            folder = self._folder()
            self.train_clean = self.train_target
            self.train_target = self._given_labels(folder)
            self._noise_folder = None if folder is None else folder.path

    def _print_rate(self) -> None:
        assert self.train_clean is not None
        is_wrong = (self.train_target != self.train_clean).numpy()
        wrong, count = int(is_wrong[self.train_indices].sum()), len(self.train_indices)
        whole = ""
        if count < len(is_wrong):
            whole = f"; in the whole array {is_wrong.sum()} of {len(is_wrong)}, {is_wrong.mean():.2%}"
        print(
            f"label noise: {wrong} of {count} training labels are wrong ({wrong / count:.2%}{whole}), by {self._noise}"
        )

    def state_dict(self) -> dict[str, Any]:
        """What checkpoints remember the data by and, with ``noise``, the given labels: their sha256."""
        noisy = self.noise is not None and self._ready
        return super().state_dict() | ({"labels_sha256": digest(self.train_target.numpy())} if noisy else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Before a fit goes on from a checkpoint.

        Raises:
            ValueError: where that was trained on other labels, or other data.
        """
        fitting = self.trainer is not None and self.trainer.state.fn == "fit"
        stored = state_dict.get("labels_sha256")
        noisy = stored is not None or self.noise is not None
        if fitting and noisy and stored != digest(self.train_target.numpy()):
            raise ValueError(
                f"the checkpoint was trained on other labels than those of noise={self._noise}: give the data and the "
                "noise of that run, or start anew without it"
            )
        super().load_state_dict(state_dict)

    @property
    def _noise(self) -> LabelNoise | None:
        return self.noise.without_files() if self.fake and self.noise is not None else self.noise

    def _given_labels(self, folder: RunFolder | None) -> Tensor:
        noise = self._noise
        assert noise is not None
        path = getattr(self, "path", None)  # of those modules that read one file
        clean = CleanLabels(
            self.train_target.numpy(), self.class_names, self.train_image, None if path is None else Path(path)
        )
        return torch.from_numpy(load_or_draw_labels(noise, clean, folder, self.trainer))

    def _extras(self, source: str) -> dict[str, Tensor]:
        """What else is known about each sample of a full array."""
        clean = {"clean_target": self.train_clean} if source == "train" and self.train_clean is not None else {}
        return super()._extras(source) | clean
