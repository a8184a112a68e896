"""Published data sets with real partial labels: a ``.mat`` file with features, candidates and true labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.seeding import numpy_generator
from lightning_kd.data.array_files import Arrays, check_keys, to_feature
from lightning_kd.data.candidate_sets import UniformCandidates, to_candidates
from lightning_kd.data.classification_data import ClassificationDataModule
from lightning_kd.data.fake_data import fake_arrays
from lightning_kd.data.splits import without

__all__ = ["PartialLabelDataModule"]


class PartialLabelDataModule(ClassificationDataModule):
    """Lost, BirdSong, MSRCv2, Soccer Player, Yahoo! News and similar data sets, from a ``.mat`` file.

    The file holds ``data``, the features ``[N, D]``, and two sparse or full matrices of 0 and 1, ``[K, N]`` or
    ``[N, K]``: ``partial_target``, the candidates, and ``target``, the true label of each sample. One of ``folds``
    parts of equal size is the test set; the parts are the same for every ``seed``. The file is read when the object is
    created. See ``ClassificationDataModule`` for ``train_candidates``, ``meta_indices`` and use with several processes.

    Args:
        path: the ``.mat`` file (not version 7.3). With ``fake`` it need not exist.
        folds: number of parts, 2 or more.
        fold: index of the test part, from 0.
        batch_size: training samples per step and process.
        eval_batch_size: largest number of samples per evaluation step and process.
        val_fraction: fraction of each class of the training samples that becomes the validation set, in [0, 1).
        meta_per_class: number of training samples of each class to hold out with their true labels (at most all but one
            of a class).
        class_names: a name for each class. Default: their numbers.
        mean: mean of each feature, to normalise samples. Default: that of the training samples.
        std: standard deviation of each feature. Default: that of the training samples.
        seed: fixes validation and meta set; together with ``seed_everything`` also the order of the batches.
        fake: use a small synthetic data set instead, shaped like the file if it exists.

    Raises:
        ValueError: for an argument out of its range, a damaged file, or arrays that do not match.
        FileNotFoundError: where the file does not exist.
    """

    def __init__(
        self,
        path: str,
        folds: int = 10,
        fold: int = 0,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        val_fraction: float = 0.0,
        meta_per_class: int | None = None,
        class_names: list[str] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        seed: int = 0,
        fake: bool = False,
    ) -> None:
        check_numbers(least=2, whole=True, folds=folds)
        check_numbers(least=0, below=folds, whole=True, fold=fold)
        self.path = path
        self.folds = folds
        self.fold = fold
        if fake:
            shape, count = ((16,), len(class_names or range(5)))
            if Path(path).exists():
                feature, _, candidates = read_mat(Path(path))
                shape, count = (feature.shape[1],), candidates.shape[1]
            arrays = fake_arrays(shape, count)
            self._arrays = arrays
            self._own = UniformCandidates(0.3).corrupt(arrays.train_target, count)
        else:
            feature, target, candidates = read_mat(Path(path))
            order = numpy_generator(0, "test_split").permutation(len(target))
            if len(order) < folds:
                raise ValueError(f"folds={folds} is more than the {len(order)} samples of {path!r}: lower it")
            test = np.sort(np.array_split(order, folds)[fold])
            train = without(len(target), test)
            image, label = to_feature(feature, f"data of {path!r}"), torch.from_numpy(target)
            self._arrays = Arrays(image[train], label[train], image[test], label[test])
            self._own, count = candidates[train], candidates.shape[1]
        if class_names is not None and len(class_names) != count:
            raise ValueError(f"class_names must be {count}, one for each class of {path!r}, got {len(class_names)}")
        samples = self._arrays.train_image.double()
        deviation = samples.std(0, correction=0)
        own_std = torch.where(deviation > 0, deviation, 1.0)  # a constant feature is not scaled
        super().__init__(
            class_names=[str(c) for c in range(count)] if class_names is None else class_names,
            input_shape=(samples.shape[1],),
            mean=samples.mean(0).tolist() if mean is None else mean,
            std=own_std.tolist() if std is None else std,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_fraction=val_fraction,
            seed=seed,
            fake=fake,
            meta_per_class=meta_per_class,
        )

    def load_arrays(self) -> Arrays:
        return self._arrays

    def fake_arrays(self) -> Arrays:
        return self._arrays

    def _change_targets(self) -> None:
        self.train_candidates = torch.from_numpy(self._own)
        super()._change_targets()


def read_mat(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features float64 ``[N, D]``, true labels int64 ``[N]`` and candidates uint8 ``[N, K]`` of a ``.mat`` file.

    Raises:
        FileNotFoundError: where the file does not exist.
        ValueError: where it is damaged, of version 7.3, or lacks an array, and for arrays that do not match.
    """
    from scipy.io import loadmat
    from scipy.sparse import issparse

    if not path.is_file():
        raise FileNotFoundError(f"path {str(path)!r} does not exist: give the path of a .mat file")
    try:
        arrays: dict[str, Any] = loadmat(path)
    except NotImplementedError:
        raise ValueError(
            f"path {str(path)!r} is in MATLAB's format 7.3, which cannot be read: save it again with the option -v7"
        ) from None
    except Exception as error:  # whatever a damaged file makes the reader raise
        raise ValueError(f"path {str(path)!r} is damaged, or not a .mat file ({error}): replace it") from error
    names = ["data", "partial_target", "target"]
    check_keys({name: value for name, value in arrays.items() if not name.startswith("__")}, names, repr(str(path)))
    feature, *labels = (arrays[name].toarray() if issparse(arrays[name]) else arrays[name] for name in names)
    if feature.ndim != 2 or not np.issubdtype(feature.dtype, np.number):
        raise ValueError(f"data of {str(path)!r} must be numbers [N, D], got {feature.dtype} {list(feature.shape)}")
    count = len(feature)
    if labels[0].shape != labels[1].shape or count not in labels[0].shape:
        raise ValueError(
            f"partial_target and target of {str(path)!r} must both be [K, {count}], a column for each sample, got "
            f"{list(labels[0].shape)} and {list(labels[1].shape)}: correct them"
        )
    if labels[0].shape[1] == count:
        labels = [matrix.T for matrix in labels]
    true = labels[1] == 1
    if (wrong := true.sum(1) != 1).any():
        raise ValueError(
            f"target of {str(path)!r} must name one class for each sample, got {true[wrong][0].sum()} for sample "
            f"{int(wrong.argmax())}: correct it"
        )
    target = true.argmax(1).astype(np.int64)
    candidates = to_candidates(labels[0], target, labels[0].shape[1], f"partial_target of {str(path)!r}")
    return feature.astype(np.float64), target, candidates
