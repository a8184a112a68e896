"""A pool: few labels, many samples without, and some of these of classes that nobody asked for."""

from __future__ import annotations

import copy
import hashlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from torch import Tensor

from lightning_kd.core.run import run_folder_of
from lightning_kd.core.seeding import numpy_generator
from lightning_kd.data.array_files import read_arrays, to_feature, to_image
from lightning_kd.data.classification_data import ClassificationDataModule, check_at_least, train_loader_of
from lightning_kd.data.image_folder import images_below
from lightning_kd.data.sampling import BatchLoader
from lightning_kd.pool import UNKNOWN, PoolRecord, PoolView

UNLABELLED = -1


class OpenSetDataModule(L.LightningDataModule):
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

    The answers are in ``pool.json`` of the run folder (``PoolRecord``), which is read again at every ``setup``.
    Checkpoints hold the sha256 of the labels, and a fit does not go on from one that was trained on others. The
    prediction set are the samples without a label.

    Several processes: as with ``source``; all read the same record, and only process 0 writes it.

    Args:
        source: where the samples come from; its ``train_indices`` are all that the pool knows of. It is left as it is:
            the pool works on a shallow copy.
        known_classes: how many classes of the source are known, or which (numbers or names). Default with ``pool``:
            all.
        class_order: which ones, where ``known_classes`` is a number: the ``"first"``, ``"random"`` ones by
            ``split_seed``, or the first ones of a list of class numbers.
        initial_fraction: the share of the known classes' training samples that is labelled at the start, drawn
            regardless of class.
        initial_count: so many samples instead.
        budget: how many labels a round buys, 1 or more; the last round takes what is left.
        rounds: how many times labels are bought, 1 or more; ``lightning-kd active`` trains once more at the end.
        split_seed: fixes the initial labels, and which classes are known where that is left to chance; 0 or more.
        score_with_train_augmentation: score the pool on augmented samples, as the official implementations do.
        pool: a folder of images (for an image folder), or an ``.npy`` or ``.npz`` with the array ``image`` or
            ``feature`` (for other sources): samples without any label.
        fake: let ``source`` use its made-up data set, and no more budget than suits that.

    Raises:
        ValueError: for an argument out of its range, and for a set that lacks a class.
    """

    def __init__(
        self,
        source: ClassificationDataModule,
        known_classes: int | list[int | str] | None = None,
        class_order: Literal["first", "random"] | list[int] = "first",
        initial_fraction: float | None = None,
        initial_count: int | None = None,
        budget: int = 1500,
        rounds: int = 10,
        split_seed: int = 0,
        score_with_train_augmentation: bool = False,
        pool: str | None = None,
        fake: bool = False,
    ) -> None:
        super().__init__()
        check_at_least("budget", budget, 1)
        check_at_least("rounds", rounds, 1)
        check_at_least("split_seed", split_seed, 0)
        if source.noise is not None:
            raise ValueError("source must have no noise: an oracle answers with the data set's own labels")
        if pool is None and (initial_fraction is None) == (initial_count is None):
            raise ValueError(
                f"initial_fraction and initial_count: give one of them, got {initial_fraction} and {initial_count}: "
                "it says how many labels there are at the start"
            )
        if pool is not None and not (initial_fraction is None and initial_count is None):
            raise ValueError(
                "initial_fraction and initial_count go without pool: what source holds is labelled, got a pool "
                f"{pool!r} too: leave them out"
            )
        if initial_fraction is not None and not 0 < initial_fraction <= 1:
            raise ValueError(f"initial_fraction must be above 0 and at most 1, got {initial_fraction}: give a share")
        if initial_count is not None:
            check_at_least("initial_count", initial_count, 1)
        self.source = copy.copy(source)  # whose labels are hidden here, and nowhere else
        self.source._stored = {}
        self.known_classes = known_classes
        self.class_order = class_order
        self.initial_fraction = initial_fraction
        self.initial_count = initial_count
        self.budget = budget
        self.rounds = rounds
        self.split_seed = split_seed
        self.score_with_train_augmentation = score_with_train_augmentation
        self.pool_path = pool
        self.fake = fake
        self.known_ids = self._resolve_classes()
        self.class_names = [source.class_names[c] for c in self.known_ids]
        if UNKNOWN in self.class_names:
            raise ValueError(
                f"a known class may not be named {UNKNOWN!r}, which is the answer for all others, got "
                f"{self.class_names}: name the known_classes without it"
            )
        if fake:
            self.source.fake = True
        self.record: PoolRecord | None = None
        self._truth: np.ndarray | None = None  # 0..K of every training sample; only the oracle looks at it
        self._initial = self._universe = np.empty(0, np.int64)
        self._own_count = 0  # samples of the source; what comes after are those of ``pool``
        self._identity: dict[str, Any] = {}
        self.known_indices = self.unknown_indices = self.unlabelled_indices = np.empty(0, np.int64)
        self._ready = False

    # -- readable before setup ---------------------------------------------------------------------------------------

    @property
    def num_classes(self) -> int:
        """The number of known classes ``K``."""
        return len(self.known_ids)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.source.input_shape

    @property
    def mean(self) -> list[float]:
        return self.source.mean

    @property
    def std(self) -> list[float]:
        return self.source.std

    @property
    def batch_size(self) -> int:
        return self.source.batch_size

    @property
    def eval_batch_size(self) -> int:
        return self.source.eval_batch_size

    def __str__(self) -> str:
        return f"{type(self).__name__}: {self.num_classes} known classes of {self.source}"

    def _resolve_classes(self) -> list[int]:
        names, given = self.source.class_names, self.known_classes
        total = len(names)
        if isinstance(given, list):
            if self.class_order != "first":
                raise ValueError(
                    f"class_order goes with a number of known_classes, got the list {given} too: leave class_order out"
                )
            unheard = [c for c in given if isinstance(c, str) and c not in names]
            if unheard:
                raise ValueError(f"known_classes holds {unheard[0]!r}, which is no class of the source: it has {names}")
            chosen = [names.index(c) if isinstance(c, str) else c for c in given]
            self._check_ids("known_classes", chosen, total)
        else:
            if given is None and self.pool_path is None:
                raise ValueError("known_classes must be given, got None: say how many classes are known, or which")
            count = total if given is None else given
            if count > total:
                raise ValueError(f"known_classes must be at most the {total} classes of the source, got {count}")
            if isinstance(self.class_order, list):
                self._check_ids("class_order", self.class_order, total)
                order = self.class_order
                if len(order) < count:
                    raise ValueError(f"class_order names {len(order)} classes, known_classes={count} needs as many")
            elif self.class_order == "random":
                order = numpy_generator(self.split_seed, "known_classes").permutation(total).tolist()
            elif self.class_order == "first":
                order = list(range(total))
            else:
                raise ValueError(f"class_order must be 'first', 'random' or a list, got {self.class_order!r}")
            chosen = order[: max(count, 0)]
        if len(chosen) < 2:
            raise ValueError(f"known_classes must be at least 2, got {len(chosen)}: one class leaves nothing to tell")
        return sorted(chosen)

    @staticmethod
    def _check_ids(name: str, ids: Sequence[int], total: int) -> None:
        if len(set(ids)) < len(ids):
            twice = next(c for c in ids if list(ids).count(c) > 1)
            raise ValueError(f"{name} holds class {twice} more than once: name each class once")
        outside = [c for c in ids if not 0 <= c < total]
        if outside:
            raise ValueError(f"{name} holds {outside[0]}, but the source has classes 0 to {total - 1}: correct it")

    # -- the samples -------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        self.source.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Load and split the samples, once; take the answers given so far from the run folder, each time."""
        self.source.trainer = self.trainer
        self.source.setup(stage)
        if not self._ready:
            self._load()
        folder = run_folder_of(self.trainer)
        if folder is not None and not getattr(self.trainer, "fast_dev_run", 0):
            self.use(PoolRecord.load(folder.pool) if folder.pool.is_file() else PoolRecord(folder.pool))

    def _load(self) -> None:
        """Nothing is changed before all has been looked at."""
        source, k = self.source, self.num_classes
        internal = np.full(source.num_classes, k)
        internal[self.known_ids] = np.arange(k)
        truth = internal[source.train_target.numpy()]
        test_target = internal[source.test_target.numpy()]
        own_val = source._val_source == "val"
        val_target = internal[source.val_target.numpy()] if own_val else truth
        test_indices = _of_known(source.test_indices, test_target, k, "test")
        val_indices = source.val_indices[val_target[source.val_indices] < k]
        universe, image = source.train_indices, source.train_image
        label = np.full(len(truth), UNLABELLED)
        if self.pool_path is not None:
            label[universe] = truth[universe]
            initial = universe
            image, count = self._with_unlabelled(image)
            universe = np.concatenate([universe, np.arange(len(truth), len(truth) + count)])
            label = np.concatenate([label, np.full(count, UNLABELLED)])
        else:
            initial = self._draw_initial(universe, truth)
            label[initial] = truth[initial]
        missing = np.flatnonzero(np.bincount(label[initial], minlength=k + 1)[:k] == 0)
        if len(missing):
            raise ValueError(
                f"the initial set of {len(initial)} samples has none of class {self.class_names[missing[0]]!r}: "
                "raise initial_fraction or initial_count, or take another split_seed"
            )
        unlabelled = int((label[universe] == UNLABELLED).sum())
        if self.fake:
            self.budget = min(self.budget, max(1, unlabelled // (2 * self.rounds)))
        if self.budget > unlabelled:
            raise ValueError(f"budget={self.budget} is more than the {unlabelled} samples of the pool: lower it")
        if not own_val:
            label[val_indices] = truth[val_indices]
        source.train_image, source.test_target = image, torch.from_numpy(test_target)
        if own_val:
            source.val_target = torch.from_numpy(val_target)
        self.test_indices, self.val_indices = test_indices, val_indices
        self._truth = truth if self.pool_path is None else None
        self._own_count = len(truth)
        self._universe, self._initial, self._initial_label = universe, initial, label
        self._identity = self._settings()
        self._apply(label)
        self._ready = True

    def _draw_initial(self, universe: np.ndarray, truth: np.ndarray) -> np.ndarray:
        known = universe[truth[universe] < self.num_classes]
        order = numpy_generator(self.split_seed, "initial_labels").permutation(known)
        if self.fake:  # of so few samples, two of each class
            return np.sort(np.concatenate([order[truth[order] == c][:2] for c in range(self.num_classes)]))
        assert self.initial_fraction is not None or self.initial_count is not None
        count = self.initial_count
        if count is None:
            count = int(np.floor(self.initial_fraction * len(known) + 1e-9))  # type: ignore[operator]
        if not 1 <= count <= len(known):
            raise ValueError(
                f"initial_fraction={self.initial_fraction}, initial_count={self.initial_count} mean {count} of "
                f"{len(known)} samples of known classes: give 1 to {len(known)}"
            )
        return np.sort(order[:count])

    def _with_unlabelled(self, image: Any) -> tuple[Any, int]:
        """The training samples and after them those of the pool; how many these are."""
        assert self.pool_path is not None
        source = self.source
        if self.fake:  # as good as any
            return torch.cat([image, source.test_image]), len(source.test_image)
        if isinstance(image, list):
            paths = images_below(Path(self.pool_path))
            if not paths:
                raise ValueError(f"pool {self.pool_path!r} holds no image: name the folder of the unlabelled ones")
            val = source.val_image if source._val_source == "val" else []
            twice = {os.path.realpath(p) for p in paths} & {
                os.path.realpath(p) for p in [*image, *source.test_image, *val]
            }
            if twice:
                raise ValueError(
                    f"pool {self.pool_path!r} holds images that source takes for labelled ones, such as "
                    f"{min(twice)!r}: keep the pool outside of the class folders"
                )
            return [*image, *paths], len(paths)
        arrays = read_arrays(Path(self.pool_path))
        key = next((name for name in ("image", "feature", "") if name in arrays), None)
        if key is None:
            raise ValueError(f"pool {self.pool_path!r} must hold the array 'image' or 'feature', got {sorted(arrays)}")
        what = f"{key or 'the array'} of {self.pool_path!r}"
        pool = (to_feature if arrays[key].ndim == 2 else to_image)(arrays[key], what)
        if pool.shape[1:] != image.shape[1:] or pool.dtype != image.dtype:
            raise ValueError(
                f"samples of pool {self.pool_path!r} must be like those of the source {tuple(image.shape[1:])}, got "
                f"{tuple(pool.shape[1:])}: give both in one shape and dtype"
            )
        return torch.cat([image, pool]), len(pool)

    def _apply(self, label: np.ndarray) -> None:
        """Make ``label`` the labels known now."""
        self.source.train_target = torch.from_numpy(label)
        here = label[self._universe]
        k = self.num_classes
        self.known_indices = np.sort(self._universe[(here >= 0) & (here < k)])
        self.unknown_indices = np.sort(self._universe[here == k])
        self.unlabelled_indices = np.sort(self._universe[here == UNLABELLED])

    # -- the answers -------------------------------------------------------------------------------------------------

    def use(self, record: PoolRecord) -> None:
        """Take the answers of ``record``, and none else, for the labels beyond the initial ones.

        Raises:
            ValueError: where it is the record of another pool.
        """
        settings = self._identity
        for name in settings.keys() & record.settings.keys():
            if settings[name] != record.settings[name]:
                raise ValueError(
                    f"{record.path} was begun with {name}={record.settings[name]}, got {settings[name]}: keep the data "
                    "settings of that run, or name another --run folder"
                )
        record.settings = {**record.settings, **settings}
        if record.queries and self._has_files:
            place = {self.path_of(i): i for i in range(self._own_count, len(self.source.train_image))}
            gone = [row for row in record.queries if row.get("path") not in place]
            for row in record.queries:  # files may have come or gone since
                row["index"] = place.get(row.get("path"), UNLABELLED)
            if gone:
                warnings.warn(
                    f"{len(gone)} images asked for are no longer in {self.pool_path!r}, such as "
                    f"{gone[0].get('path')!r}: training goes on without them",
                    stacklevel=2,
                )
        number = {name: k for k, name in enumerate(self.class_names)} | {UNKNOWN: self.num_classes}
        label = self._initial_label.copy()
        answered = [(row["index"], number.get(row["answer"])) for row in record.queries if row["answer"] is not None]
        for index, answer in answered:
            if answer is None or index >= len(label):
                raise ValueError(f"{record.path} holds an answer for sample {index} that does not fit this pool")
            if index >= 0:
                label[index] = answer
        self.record = record
        self._apply(label)

    def _settings(self) -> dict[str, Any]:
        """What must not change as long as a record is in use."""
        if self._has_files:
            return {"classes": self.class_names}  # answers are found by the names of files
        if self.pool_path is not None:
            own, pool = self.source.train_target, self.source.train_image[self._own_count :]
            return {
                "classes": self.class_names,
                "labelled": self._own_count,
                "labelled_sha256": _sha256(own.numpy()),
                "pool_sha256": _sha256(pool.numpy()),
            }
        return {
            "classes": self.class_names,
            "samples": len(self._universe),
            "initial": len(self._initial),
            "initial_sha256": _sha256(self._initial),
            "split_seed": self.split_seed,
        }

    @property
    def _has_files(self) -> bool:
        """Whether the pool is a folder of images, known by their names."""
        return self.pool_path is not None and isinstance(self.source.train_image, list)

    def path_of(self, index: int) -> str | None:
        """The image file of a training sample, relative to ``pool`` where it is in there; ``None`` for arrays."""
        paths = self.source.train_image
        if not isinstance(paths, list):
            return None
        if self._has_files and index >= self._own_count:
            return str(paths[index])[len(str(Path(str(self.pool_path)))) :].lstrip(os.sep)
        return str(paths[index])

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
        return None if self._truth is None else int((self._truth[self._universe] < self.num_classes).sum())

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
        known = self.known_indices
        return PoolView(
            np.array(self.unlabelled_indices if unlabelled is None else unlabelled),
            known.copy(),
            self.source.train_target.numpy()[known].copy(),
            self.unknown_indices.copy(),
            self.num_classes,
            self.round,
            self.precision,
            labelled_scores or {},
        )

    # -- what tasks and the Trainer ask for --------------------------------------------------------------------------

    @property
    def train_indices(self) -> np.ndarray:
        """The labelled samples of known classes."""
        return self.known_indices

    @property
    def train_target(self) -> Tensor:
        return self.source.train_target

    @property
    def train_image(self) -> Any:
        return self.source.train_image

    @property
    def test_target(self) -> Tensor:
        return self.source.test_target

    def state_dict(self) -> dict[str, Any]:
        return {"labels_sha256": self._digest()} if self._ready else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Before a fit goes on from a checkpoint.

        Raises:
            ValueError: where that was trained on other labels.
        """
        same = state_dict.get("labels_sha256") == self._digest()
        stage = None if self.trainer is None else self.trainer.state.fn
        if stage == "fit" and not same:
            raise ValueError(
                "the checkpoint was trained on other labels than the pool has now: begin the round anew with "
                "--overwrite in place of --ckpt_path (the answers stay)"
            )
        if stage == "predict" and not same:
            warnings.warn("answers have come in since this checkpoint was trained: fit again first", stacklevel=2)

    def _digest(self) -> str:
        """Of the labels that there are, and what they belong to."""
        label = self.train_target.numpy()
        index = np.flatnonzero(label >= 0)
        if not self._has_files:
            return _sha256(np.stack([index, label[index]]))
        own, added = index[index < self._own_count], index[index >= self._own_count]
        names = "\n".join(f"{self.path_of(i)} {label[i]}" for i in added.tolist())
        return hashlib.sha256((_sha256(np.stack([own, label[own]])) + names).encode()).hexdigest()

    def loader(self, split: str = "train", indices: Any = None, **kwargs: Any) -> BatchLoader:
        """``ClassificationDataModule.loader`` with the targets of the pool; by default over ``known_indices`` for
        ``"train"``, and over the known classes of ``"val"`` and ``"test"``."""
        if not self._ready:
            self.setup()
        if indices is None and split in ("train", "val", "test"):
            indices = getattr(self, f"{split}_indices")
        return self.source.loader(split, indices, **kwargs)

    def train_dataloader(self) -> Any:
        return train_loader_of(self)

    def val_dataloader(self) -> BatchLoader | list[BatchLoader]:
        return self.loader("val") if len(self.val_indices) else []

    def test_dataloader(self) -> BatchLoader:
        return self.loader("test")

    def predict_dataloader(self) -> BatchLoader:
        """The samples without a label; with those labelled, where the task's choice needs them."""
        indices = self.unlabelled_indices
        if not len(indices):
            raise ValueError("nothing in the pool is left without a label: there is nothing to predict or to ask for")
        if getattr(getattr(self.trainer, "lightning_module", None), "needs_labelled", False):
            indices = np.union1d(indices, self.known_indices)
        return self.loader("train", indices, augment=self.score_with_train_augmentation)


def _of_known(indices: np.ndarray, target: np.ndarray, num_known: int, split: str) -> np.ndarray:
    kept = indices[target[indices] < num_known]
    if not len(kept):
        raise ValueError(f"the {split} set has no sample of the known classes: choose others")
    return kept


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes()).hexdigest()
