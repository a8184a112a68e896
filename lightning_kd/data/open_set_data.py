"""A data set as a pool for open-set active learning: few labels, and unlabelled samples, some of unknown classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lightning_kd.argument_checks import check_numbers
from lightning_kd.data.classification_data import ClassificationDataModule
from lightning_kd.data.derived_data import DerivedDataModule
from lightning_kd.data.known_classes import choose_known_classes
from lightning_kd.data.pool_answers import (
    adopt_settings,
    answered_labels,
    check_new_classes,
    check_same_labels,
    find_files,
    labels_digest,
    pool_settings,
    record_of,
    sampling_weights,
)
from lightning_kd.data.pool_samples import PoolSamples, add_unlabelled, readable
from lightning_kd.data.pool_split import (
    UNLABELLED,
    PoolSplit,
    check_every_class,
    check_initial,
    checked_budget,
    draw_initial,
    label_all,
    label_some,
    number_known,
)
from lightning_kd.data.sampling import BatchLoader
from lightning_kd.pool import UNKNOWN, PoolRecord, PoolView


class OpenSetDataModule(DerivedDataModule):
    """A pool for open-set active learning, on top of any classification data module.

    It serves two purposes:

    - a benchmark: ``source`` is a labelled data set, some of whose classes are ``known_classes``. A few of their
      training samples are labelled at the start. All other training samples are unlabelled; their labels are hidden,
      and the oracle reveals them only for queried samples. ``lightning-kd active`` runs all rounds.
    - a project of your own: ``source`` holds the labelled samples (a folder or number per class) and ``pool`` the
      unlabelled ones. ``lightning-kd query`` chooses samples to label, ``lightning-kd label`` reads the answers.

    Tasks see ``K`` classes: class ``k`` is the ``k``-th known class of the source, in ascending order. ``train_target``
    (int64 ``[N]``) is that number where the label is known, ``K`` where the answer was "none of these", and -1 where no
    query has asked. ``known_indices`` (also ``train_indices``), ``unknown_indices`` and ``unlabelled_indices`` (int64,
    ascending) are the positions of the three kinds in the full training array. Test and validation sets contain only
    known classes.

    The answers are in ``pool.json`` of the run folder (``PoolRecord``), which is read at every ``setup``. If a query
    has loss weights, ``Batch.extras`` of training samples has ``sampling_weight`` (float32 ``[B]``). Checkpoints hold
    the sha256 of the labels, and a fit refuses to resume from a checkpoint trained on others. The prediction set is the
    unlabelled samples.

    Several processes divide the samples as with ``source``. All read the same record, and only process 0 writes it.

    Args:
        source: the data set; the pool uses its ``train_indices``. It stays unchanged: the pool works on a shallow copy.
        known_classes: number of known classes of the source, or a list of them (indices or names). Default with
            ``pool``: all.
        class_order: which classes are known, where ``known_classes`` is a number: the ``"first"`` ones; ``"random"``
            ones drawn with ``split_seed``; or the first of a list of class indices or names, or of a text file with one
            name per line, which is looked for in the ``root`` of the source first (``wnids.txt`` of Tiny-ImageNet).
            Such a file is ignored where ``known_classes`` is a list.
        initial_fraction: fraction of the training samples of known classes that is labelled at the start, drawn
            regardless of class.
        initial_count: number of these samples, instead of a fraction.
        budget: labels per query, 1 or more; the last query takes what is left.
        rounds: number of queries, 1 or more; ``lightning-kd active`` trains once more after the last.
        split_seed: of the initial labels, and of ``"random"`` known classes; 0 or more.
        score_with_train_augmentation: score the pool on augmented samples, as the official implementations do.
        pool: unlabelled samples: a folder of images (for an image folder), or an ``.npy`` or ``.npz`` with the array
            ``image`` or ``feature`` (for other sources).
        new_classes: names of known classes, after those of the source, that have samples only through answers. The
            commands read them from ``pool.json`` of the run folder, where ``lightning-kd label --new_class`` writes
            them.
        answers: the ``pool.json`` of another run, or its folder: train on the answers there, and query nothing.
        fake: let ``source`` use its synthetic data set, and lower the budget to suit its size.

    Raises:
        ValueError: for an argument out of its range, and for an initial or test set that lacks a known class.
    """

    _samples: PoolSamples
    _split: PoolSplit
    _identity: dict[str, Any]

    def __init__(
        self,
        source: ClassificationDataModule,
        known_classes: int | list[int | str] | None = None,
        class_order: str | list[int | str] = "first",
        initial_fraction: float | None = None,
        initial_count: int | None = None,
        budget: int = 1500,
        rounds: int = 10,
        split_seed: int = 0,
        score_with_train_augmentation: bool = False,
        pool: str | None = None,
        new_classes: list[str] | None = None,
        answers: str | None = None,
        fake: bool = False,
    ) -> None:
        super().__init__(source)  # labels are hidden in its copy of the source only
        check_numbers(least=1, whole=True, budget=budget, rounds=rounds)
        check_numbers(least=0, whole=True, split_seed=split_seed)
        if source.noise is not None:
            raise ValueError("source must have no noise, because the oracle answers with its labels: leave noise out")
        check_initial(initial_fraction, initial_count, pool)
        self.known_classes = known_classes
        self.class_order = class_order
        self.initial_fraction = initial_fraction
        self.initial_count = initial_count
        self.budget = budget
        self.rounds = rounds
        self.split_seed = split_seed
        self.score_with_train_augmentation = score_with_train_augmentation
        self.pool_path, self.answers = pool, answers
        self.fake = fake
        given = len(source.class_names) if known_classes is None and pool is not None else known_classes
        root = getattr(source, "root", None)
        self.known_ids = choose_known_classes(source.class_names, given, class_order, split_seed, root, fake)
        self.new_classes = list(new_classes or [])
        check_new_classes(self.new_classes, source.class_names, pool)
        self.class_names = [*(source.class_names[c] for c in self.known_ids), *self.new_classes]
        if UNKNOWN in self.class_names:
            raise ValueError(
                f"a known class may not be named {UNKNOWN!r}, which is the answer for all other classes, got "
                f"{self.class_names}: leave it out of known_classes"
            )
        self.source.fake |= fake
        self.record: PoolRecord | None = None
        self._truth: np.ndarray | None = None  # true label, 0..K, of every training sample; only for the oracle
        self.known_indices = self.unknown_indices = self.unlabelled_indices = np.empty(0, np.int64)
        self._ready = False

    # -- readable before setup ---------------------------------------------------------------------------------------

    @property
    def num_classes(self) -> int:
        """Number of known classes ``K``."""
        return len(self.class_names)

    def __str__(self) -> str:
        return f"{type(self).__name__}: {self.num_classes} known classes of {self.source}"

    # -- the samples -------------------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Load and split the samples, once; read the answers given so far from the run folder, every time."""
        self.source.trainer = self.trainer
        self.source.check_files("train", "val", "test")  # in every stage, because the pool must not depend on it
        self.source.setup(stage)
        if not self._ready:
            self._load()
        record = record_of(self.trainer, None if self.fake else self.answers)
        if record is not None:
            self.set_record(record)

    def _load(self) -> None:
        """All checks come before the first change of state."""
        source = self.source
        targets = number_known(source, self.known_ids, self.num_classes)
        if self.pool_path is not None:
            samples = add_unlabelled(source, self.pool_path, self.fake)
            split = label_all(source.train_indices, targets.train, len(samples.image) - samples.own_count)
            if not self.fake:
                split = split._replace(universe=readable(samples, split.universe, source, self.trainer))
        else:
            samples = PoolSamples(source.train_image, len(targets.train))
            wanted = (self.initial_fraction, self.initial_count)
            initial = draw_initial(
                source.train_indices, targets.train, self.num_classes, *wanted, self.split_seed, self.fake
            )
            split = label_some(source.train_indices, targets.train, initial)
        check_every_class(split, self.class_names[: len(self.known_ids)])
        self.budget = checked_budget(self.budget, split, self.rounds if self.fake else None)
        source.train_image, source.test_target = samples.image, torch.from_numpy(targets.test)
        if source._val_source == "val":
            source.val_target = torch.from_numpy(targets.val)
        else:
            split.label[targets.val_indices] = targets.train[targets.val_indices]
        self.test_indices, self.val_indices = targets.test_indices, targets.val_indices
        self._truth = targets.train if self.pool_path is None else None
        self._samples, self._split = samples, split
        names = self.class_names, [name for name in source.class_names if name not in self.class_names]
        self._identity = pool_settings(*names, samples, split, source.train_target.numpy(), self.split_seed)
        self._apply(split.label)
        self._ready = True

    def _apply(self, label: np.ndarray) -> None:
        """Make ``label``, int64 ``[N]``, the known labels."""
        self.source.train_target = torch.from_numpy(label)
        universe, k = self._split.universe, self.num_classes
        here = label[universe]
        self.known_indices = np.sort(universe[(here >= 0) & (here < k)])
        self.unknown_indices = np.sort(universe[here == k])
        self.unlabelled_indices = np.sort(universe[here == UNLABELLED])

    # -- the answers -------------------------------------------------------------------------------------------------

    def set_record(self, record: PoolRecord) -> None:
        """Replace all labels but the initial ones by the answers in ``record``.

        Raises:
            ValueError: where it is the record of another pool.
        """
        adopt_settings(record, self._identity)
        if record.queries and self._samples.has_files:
            find_files(record, self._samples)
        label = answered_labels(record, self._split.label, self.class_names, self.new_classes)
        self.record = record
        self.source.train_extras = sampling_weights(record, len(label))
        self._apply(label)

    def path_of(self, index: int) -> str | None:
        """The image file of a training sample, relative to ``pool`` if it is in there; ``None`` for arrays."""
        return self._samples.path_of(index)

    def oracle(self, indices: np.ndarray) -> np.ndarray:
        """The true labels of some samples, 0 to ``K``, for simulated annotation by ``lightning-kd active`` only.

        Raises:
            ValueError: where the true labels are not available.
        """
        if self._truth is None:
            raise ValueError(
                f"the samples of pool={self.pool_path!r} have no true labels for an oracle: use lightning-kd query and "
                "lightning-kd label instead of active"
            )
        return self._truth[np.asarray(indices, dtype=np.int64)]

    @property
    def known_total(self) -> int | None:
        """Number of training samples of known classes; ``None`` where the true labels are not available."""
        return None if self._truth is None else int((self._truth[self._split.universe] < self.num_classes).sum())

    @property
    def round(self) -> int:
        """Number of queries so far."""
        return 0 if self.record is None else self.record.round

    @property
    def precision(self) -> float:
        """Fraction of known classes among the answers of the latest query; 0 before the first."""
        return 0.0 if self.record is None else self.record.precision

    def view(self, unlabelled: np.ndarray | None = None, labelled_scores: dict[str, Any] | None = None) -> PoolView:
        """What a query strategy may see of the pool, with copies of all arrays."""
        known, target = self.known_indices, self.source.train_target.numpy()
        indices = np.array(self.unlabelled_indices if unlabelled is None else unlabelled)
        arrays = (indices, known.copy(), target[known].copy(), self.unknown_indices.copy())
        return PoolView(*arrays, self.num_classes, self.round, self.precision, labelled_scores or {})

    # -- for tasks and the Trainer -----------------------------------------------------------------------------------

    @property
    def train_indices(self) -> np.ndarray:
        """The labelled samples of known classes."""
        return self.known_indices

    def state_dict(self) -> dict[str, Any]:
        return {"labels_sha256": self._digest()} if self._ready else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check, before a fit resumes, that the checkpoint was trained on these labels.

        Raises:
            ValueError: where it was trained on others.
        """
        stage = None if self.trainer is None else self.trainer.state.fn
        check_same_labels(state_dict.get("labels_sha256") == self._digest(), stage)

    def _digest(self) -> str:
        return labels_digest(self._samples, self.train_target.numpy())

    def loader(self, split: str = "train", indices: Any = None, **kwargs: Any) -> BatchLoader:
        """As ``ClassificationDataModule.loader``, with the pool's targets and only known classes by default."""
        if not self._ready:
            self.setup()
        if indices is None and split in ("train", "val", "test"):
            indices = getattr(self, f"{split}_indices")
        return self.source.loader(split, indices, **kwargs)

    def predict_dataloader(self) -> BatchLoader:
        """The unlabelled samples, and the labelled ones of known classes where the task's query strategy needs them."""
        indices = self.unlabelled_indices
        if not len(indices):
            raise ValueError("all samples of the pool are labelled: there is nothing left to predict or to query")
        if getattr(getattr(self.trainer, "lightning_module", None), "needs_labelled", False):
            indices = np.union1d(indices, self.known_indices)
        return self.loader("train", indices, augment=self.score_with_train_augmentation)
