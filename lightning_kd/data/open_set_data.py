"""A data set as a pool: few labels, many samples without, and some of these of classes that nobody asked for."""

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

    Two ways to use it:

    - as a benchmark: ``source`` is a labelled data set, of whose classes some are ``known_classes``. A few of their
      training samples start out labelled, all other training samples are the pool, and their labels are hidden: an
      oracle gives them for the samples that are asked for, and nobody else. ``lightning-kd active`` runs it all.
    - for a project of your own: ``source`` holds what is labelled already (one folder or number a class) and ``pool``
      the samples without labels. ``lightning-kd query`` says what to label, ``lightning-kd label`` takes the answers.

    Tasks see ``K`` classes: class ``k`` is the ``k``-th smallest known class of the source. ``train_target`` (int64
    ``[N]``) is that number where a label is known, ``K`` where the answer was "none of these", and -1 where nobody
    asked. ``known_indices`` (also ``train_indices``), ``unknown_indices`` and ``unlabelled_indices`` (int64, ascending)
    are the positions of each kind in the full training array. Test and validation samples are those of known classes.

    The answers are in ``pool.json`` of the run folder (``PoolRecord``), which is read again at every ``setup``. Where a
    query has loss weights, ``Batch.extras`` of training samples has ``sampling_weight`` (float32 ``[B]``). Checkpoints
    hold the sha256 of the labels, and a fit does not go on from one that was trained on others. The prediction set are
    the samples without a label.

    Several processes: as with ``source``; all read the same record, and only process 0 writes it.

    Args:
        source: where the samples come from; its ``train_indices`` are all that the pool knows of. It is left as it is:
            the pool works on a shallow copy.
        known_classes: how many classes of the source are known, or which (numbers or names). Default with ``pool``:
            all.
        class_order: which ones, where ``known_classes`` is a number: the ``"first"``, ``"random"`` ones by
            ``split_seed``, or the first ones of a list of class numbers or names, or of a text file of names, one a
            line, which is looked for in the ``root`` of the source first (``wnids.txt`` of Tiny-ImageNet). Such a file
            is not looked at where ``known_classes`` says which.
        initial_fraction: the share of the known classes' training samples that is labelled at the start, drawn
            regardless of class.
        initial_count: so many samples instead.
        budget: how many labels a round buys, 1 or more; the last round takes what is left.
        rounds: how many times labels are bought, 1 or more; ``lightning-kd active`` trains once more at the end.
        split_seed: fixes the initial labels, and which classes are known where that is left to chance; 0 or more.
        score_with_train_augmentation: score the pool on augmented samples, as the official implementations do.
        pool: a folder of images (for an image folder), or an ``.npy`` or ``.npz`` with the array ``image`` or
            ``feature`` (for other sources): samples without any label.
        new_classes: names of further known classes, after those of the source, of which only answers give samples. The
            commands take them from ``pool.json`` of the run folder, where ``lightning-kd label --new_class`` puts them.
        answers: the ``pool.json`` of another run, or its folder: train on the answers given there, and ask nothing.
        fake: let ``source`` use its made-up data set, and no more budget than suits that.

    Raises:
        ValueError: for an argument out of its range, and for a set that lacks a class.
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
        super().__init__(source)  # labels are hidden in its copy, and nowhere else
        check_numbers(least=1, whole=True, budget=budget, rounds=rounds)
        check_numbers(least=0, whole=True, split_seed=split_seed)
        if source.noise is not None:
            raise ValueError("source must have no noise: an oracle answers with the data set's own labels")
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
                f"a known class may not be named {UNKNOWN!r}, which is the answer for all others, got "
                f"{self.class_names}: name the known_classes without it"
            )
        self.source.fake |= fake
        self.record: PoolRecord | None = None
        self._truth: np.ndarray | None = None  # 0..K of every training sample; only the oracle looks at it
        self.known_indices = self.unknown_indices = self.unlabelled_indices = np.empty(0, np.int64)
        self._ready = False

    # -- readable before setup ---------------------------------------------------------------------------------------

    @property
    def num_classes(self) -> int:
        """The number of known classes ``K``."""
        return len(self.class_names)

    def __str__(self) -> str:
        return f"{type(self).__name__}: {self.num_classes} known classes of {self.source}"

    # -- the samples -------------------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Load and split the samples, once; take the answers given so far from the run folder, each time."""
        self.source.trainer = self.trainer
        self.source.check_files("train", "val", "test")  # the pool is made of all of them, whatever the stage
        self.source.setup(stage)
        if not self._ready:
            self._load()
        record = record_of(self.trainer, None if self.fake else self.answers)
        if record is not None:
            self.set_record(record)

    def _load(self) -> None:
        """Nothing is changed before all has been looked at."""
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
        """Make ``label`` the labels known now."""
        self.source.train_target = torch.from_numpy(label)
        universe, k = self._split.universe, self.num_classes
        here = label[universe]
        self.known_indices = np.sort(universe[(here >= 0) & (here < k)])
        self.unknown_indices = np.sort(universe[here == k])
        self.unlabelled_indices = np.sort(universe[here == UNLABELLED])

    # -- the answers -------------------------------------------------------------------------------------------------

    def set_record(self, record: PoolRecord) -> None:
        """Take the answers of ``record``, and none else, for the labels beyond the initial ones.

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
        """The image file of a training sample, relative to ``pool`` where it is in there; ``None`` for arrays."""
        return self._samples.path_of(index)

    def oracle(self, indices: np.ndarray) -> np.ndarray:
        """The hidden labels of some samples, 0 to ``K``. For ``lightning-kd active`` alone.

        Raises:
            ValueError: where nobody knows them.
        """
        if self._truth is None:
            raise ValueError(
                f"the samples of pool={self.pool_path!r} have no labels that an oracle could give: use lightning-kd "
                "query and lightning-kd label instead of active"
            )
        return self._truth[np.asarray(indices, dtype=np.int64)]

    @property
    def known_total(self) -> int | None:
        """How many training samples are of known classes, where that can be known."""
        return None if self._truth is None else int((self._truth[self._split.universe] < self.num_classes).sum())

    @property
    def round(self) -> int:
        """Queries made so far."""
        return 0 if self.record is None else self.record.round

    @property
    def precision(self) -> float:
        """Share of known classes among the answers of the latest query; 0 before the first."""
        return 0.0 if self.record is None else self.record.precision

    def view(self, unlabelled: np.ndarray | None = None, labelled_scores: dict[str, Any] | None = None) -> PoolView:
        """The pool as a strategy may see it, with copies of all arrays."""
        known, target = self.known_indices, self.source.train_target.numpy()
        indices = np.array(self.unlabelled_indices if unlabelled is None else unlabelled)
        arrays = (indices, known.copy(), target[known].copy(), self.unknown_indices.copy())
        return PoolView(*arrays, self.num_classes, self.round, self.precision, labelled_scores or {})

    # -- what tasks and the Trainer ask for --------------------------------------------------------------------------

    @property
    def train_indices(self) -> np.ndarray:
        """The labelled samples of known classes."""
        return self.known_indices

    def state_dict(self) -> dict[str, Any]:
        return {"labels_sha256": self._digest()} if self._ready else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Before a fit goes on from a checkpoint.

        Raises:
            ValueError: where that was trained on other labels.
        """
        stage = None if self.trainer is None else self.trainer.state.fn
        check_same_labels(state_dict.get("labels_sha256") == self._digest(), stage)

    def _digest(self) -> str:
        return labels_digest(self._samples, self.train_target.numpy())

    def loader(self, split: str = "train", indices: Any = None, **kwargs: Any) -> BatchLoader:
        """``ClassificationDataModule.loader`` with the targets of the pool; by default over ``known_indices`` for
        ``"train"``, and over the known classes of ``"val"`` and ``"test"``."""
        if not self._ready:
            self.setup()
        if indices is None and split in ("train", "val", "test"):
            indices = getattr(self, f"{split}_indices")
        return self.source.loader(split, indices, **kwargs)

    def predict_dataloader(self) -> BatchLoader:
        """The samples without a label; with those labelled, where the task's choice needs them."""
        indices = self.unlabelled_indices
        if not len(indices):
            raise ValueError("nothing in the pool is left without a label: there is nothing to predict or to ask for")
        if getattr(getattr(self.trainer, "lightning_module", None), "needs_labelled", False):
            indices = np.union1d(indices, self.known_indices)
        return self.loader("train", indices, augment=self.score_with_train_augmentation)
