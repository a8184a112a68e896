"""CIFAR-10N and CIFAR-100N: human labels of the CIFAR training images."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from lightning_kd.data.array_files import check_keys, read_arrays, to_target
from lightning_kd.data.cifar import CIFAR10_CLASSES, CIFAR100_CLASSES, CIFAR100_COARSE, CIFAR100_COARSE_CLASSES
from lightning_kd.data.label_files import StoredNoise
from lightning_kd.data.label_noise import CleanLabels


class _Set(NamedTuple):
    key: str
    official: str
    rate: float
    class_names: list[str]


CIFARN_SETS = {
    "aggre": _Set("aggre", "aggre_label", 0.0901, CIFAR10_CLASSES),
    "worst": _Set("worse", "worse_label", 0.40208, CIFAR10_CLASSES),
    "random1": _Set("random1", "random_label1", 0.17234, CIFAR10_CLASSES),
    "random2": _Set("random2", "random_label2", 0.18122, CIFAR10_CLASSES),
    "random3": _Set("random3", "random_label3", 0.1764, CIFAR10_CLASSES),
    "noisy100": _Set("noisy", "noisy_label", 0.402, CIFAR100_CLASSES),
    "noisy100_coarse": _Set("noisy_coarse", "noisy_coarse_label", 0.26404, CIFAR100_COARSE_CLASSES),
}


class CIFARN(StoredNoise):
    """Human labels of the training images of CIFAR-10 and CIFAR-100 (Wei et al., ICLR 2022, arXiv 2110.12088).

    For CIFAR-10, ``random1`` to ``random3`` are the labels of one annotator each, ``aggre`` is their majority (9 %
    wrong), and ``worst`` has a wrong label wherever one of the three is wrong (40 %). For CIFAR-100, ``noisy100`` are
    the labels of one annotator (40 %), and ``noisy100_coarse`` the superclasses of these (26 %), computed from the fine
    labels where the file holds them. Two checks make sure that labels and images match: the clean labels in the file
    must equal the data set's, and among 50,000 labels the fraction of wrong ones must be the published one.

    Args:
        labels: which set of labels.
        path: the official ``CIFAR-10_human.pt`` or ``CIFAR-100_human.pt``, or an ``.npz`` with ``train_target`` and
            ``aggre``, ``worse``, ``random1`` to ``random3``, or ``noisy`` and ``noisy_coarse``. Default: the ``.npz``
            of the data set. (The files published in "ordered" form are for another order of the images.)
        synthetic: draw the labels from the transition matrix of the human labels instead.
        seed: of the labels with ``synthetic``; 0 or more.

    Raises:
        ValueError: for an argument out of its range; when read, for another data set, a damaged file, missing labels,
            clean labels that are not the data set's, and labels in another order than the clean ones.
        FileNotFoundError: when read, where the file does not exist.
    """

    def __init__(
        self,
        labels: Literal["aggre", "worst", "random1", "random2", "random3", "noisy100", "noisy100_coarse"],
        path: str | None = None,
        synthetic: bool = False,
        seed: int = 0,
    ) -> None:
        if labels not in CIFARN_SETS:
            raise ValueError(f"labels must be one of {', '.join(CIFARN_SETS)}, got {labels!r}: choose one")
        if path is not None and Path(path).suffix not in (".pt", ".npz"):
            raise ValueError(
                f"path must be the official .pt or an .npz, got {path!r}: other forms are in another order"
            )
        self.labels = labels
        self.path = path
        super().__init__(synthetic, seed)

    @property
    def nominal_rate(self) -> float:
        return CIFARN_SETS[self.labels].rate

    def read(self, clean: CleanLabels) -> tuple[np.ndarray, np.ndarray | None]:
        wanted = CIFARN_SETS[self.labels]
        if list(clean.class_names) != wanted.class_names:
            raise ValueError(
                f"labels={self.labels!r} are for the {len(wanted.class_names)} classes {wanted.class_names[0]}, "
                f"{wanted.class_names[1]}, ..., got a data set of {clean.num_classes}, {clean.class_names[0]}, ...: "
                "use the data set that the labels are for"
            )
        path = clean.file if self.path is None else Path(self.path)
        if path is None or (self.path is None and not path.is_file()):
            raise FileNotFoundError(
                f"labels={self.labels!r} are read from a file, got path=None and a data set without an .npz: give the "
                "path of CIFAR-*_human.pt"
            )
        official = path.suffix == ".pt"
        arrays = read_human(path) if official else read_arrays(path)
        fine_key, clean_key = ("noisy_label", "clean_label") if official else ("noisy", "train_target")
        key = wanted.official if official else wanted.key
        coarse = self.labels == "noisy100_coarse"
        fine = coarse and fine_key in arrays  # some copies of the file hold wrong coarse labels
        try:
            check_keys(arrays, [fine_key if fine else key, clean_key], repr(str(path)))
        except ValueError as error:
            raise ValueError(f"labels={self.labels!r}: {error}; or give the path of CIFAR-*_human.pt") from None
        given, stored = arrays[fine_key if fine else key], arrays[clean_key]
        if coarse:
            stored = arrays["train_coarse"] if "train_coarse" in arrays else coarse_labels(stored, path)
            given = coarse_labels(given, path) if fine else given
        if len(given) == len(stored) == 50_000:
            # an .npz of the data set always has its clean labels, so only the rate shows labels in another order
            rate = float((given != stored).mean())
            if abs(rate - wanted.rate) > 1e-3:
                raise ValueError(
                    f"labels={self.labels!r} of {str(path)!r} differ from the clean ones at {rate:.2%} of 50000 "
                    f"samples, but {wanted.rate:.2%} is published: they are probably in another order, give the path "
                    "of CIFAR-*_human.pt"
                )
        return given, stored


def coarse_labels(fine: np.ndarray, path: Path) -> np.ndarray:
    """The superclasses, int64 ``[N]``, of fine CIFAR-100 labels ``[N]``; ``path`` is for error messages."""
    return np.asarray(CIFAR100_COARSE)[to_target(fine, len(fine), 100, f"fine labels of {str(path)!r}").numpy()]


def read_human(path: Path) -> dict[str, np.ndarray]:
    """The integer arrays and lists in an official ``.pt`` file of CIFAR-N, by name. Nothing else is unpickled.

    Raises:
        FileNotFoundError: where the file does not exist.
        ValueError: where it is damaged, or holds other objects.
    """
    # pickled arrays name the function that rebuilds them, which differs between NumPy 1 and 2
    rebuild = np.empty(0).__reduce__()[0]
    names = [f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")]
    allowed: list[Any] = [np.ndarray, np.dtype, type(np.dtype(np.int64)), *((rebuild, name) for name in names)]
    try:
        with torch.serialization.safe_globals(allowed):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"path {str(path)!r} does not exist: give the path of CIFAR-*_human.pt") from None
    except PermissionError:
        raise PermissionError(f"path {str(path)!r} may not be read: check the permissions of the file") from None
    except (UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        # torch's message begins with advice to disable weights_only, which is left out
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0]
        raise ValueError(
            f"path {str(path)!r} is damaged, or holds more than integer arrays ({reason}): download CIFAR-*_human.pt "
            "again"
        ) from error
    if not isinstance(loaded, dict):
        raise ValueError(
            f"{str(path)!r} must hold a dict of labels, got {type(loaded).__name__}: is this the right file?"
        )
    return {str(name): np.asarray(value) for name, value in loaded.items()}
