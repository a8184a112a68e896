"""Features of a pool's samples by several networks, read from files or computed by the networks of checkpoints."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_kd.core.checkpoint_files import read_checkpoint
from lightning_kd.core.feature_hooks import penultimate_tap
from lightning_kd.core.losses import at_least_float32
from lightning_kd.core.precision import no_tf32
from lightning_kd.core.weights import load_weights
from lightning_kd.nets import network_for

REMEDY = "give a checkpoint of lightning-kd fit, or a file of features"


def representations_in(scores: Mapping[str, Tensor]) -> list[Tensor]:
    """The feature matrices among the scores of a pool, ``[U, D_j]`` each.

    These are ``feature_0``, ``feature_1``, ... if there are any, else ``feature`` alone, else an empty list.
    """
    several = [scores[f"feature_{k}"] for k in range(sum(name.startswith("feature_") for name in scores))]
    return several or [scores[name] for name in ("feature",) if name in scores]


def open_representation(path: str, data: Any) -> Any:
    """A function from ``(image, index)`` of a batch to its features ``[B, D]``, for one entry of ``feature_networks``.

    Args:
        path: an ``.npy`` or ``.npz`` file of features, or a checkpoint of ``lightning-kd fit``.
        data: the ``OpenSetDataModule`` of the samples.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or does not fit the data.
    """
    if Path(path).suffix in (".npy", ".npz"):
        return StoredFeatures(path, len(data.train_target))
    return CheckpointFeatures(path, data)


class StoredFeatures:
    """Features stored in a file, looked up by the index of each sample.

    Args:
        path: an ``.npy`` ``[N, D]``, or an ``.npz`` with ``feature`` ``[n, D]`` and, if the rows are in another order
            or of some samples only, ``index`` int ``[n]``: positions in the full training array.
        count: ``N``, number of samples in the full training array.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or its arrays have wrong shapes.
    """

    def __init__(self, path: str, count: int) -> None:
        self.path = path
        try:
            loaded = np.load(path, allow_pickle=False)
            arrays = {"feature": loaded} if isinstance(loaded, np.ndarray) else {k: loaded[k] for k in loaded.files}
        except FileNotFoundError:
            raise FileNotFoundError(f"feature_networks: there is no {path!r}; {REMEDY}") from None
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(
                f"feature_networks: {path!r} is damaged, or holds objects ({error}): save it again"
            ) from error
        feature = arrays.get("feature")
        if feature is None or feature.ndim != 2 or feature.dtype.kind not in "fiu":
            got = f"the arrays {sorted(arrays)}" if feature is None else f"{feature.dtype} {list(feature.shape)}"
            raise ValueError(
                f"feature_networks: {path!r} must hold feature [n, D], got {got}: save one row for each sample"
            )
        index = arrays.get("index", np.arange(len(feature)))
        if "index" not in arrays and len(feature) != count:
            raise ValueError(
                f"feature_networks: {path!r} has {len(feature)} rows for the {count} samples of the full training "
                "array: give a row for each, or an .npz with their index too"
            )
        wrong = index.shape != (len(feature),) or index.dtype.kind not in "iu" or len(np.unique(index)) < len(index)
        if wrong or (len(index) and not 0 <= index.min() <= index.max() < count):
            raise ValueError(
                f"feature_networks: index in {path!r} must name a sample of 0 to {count - 1} for each of "
                f"{len(feature)} rows, and none twice: save it again"
            )
        self.feature = torch.from_numpy(np.ascontiguousarray(feature))
        self.row = torch.full((count,), -1)
        self.row[torch.from_numpy(index.astype(np.int64))] = torch.arange(len(index))

    def __call__(self, image: Tensor, index: Tensor | None) -> Tensor:
        """The features ``[B, D]`` of the samples ``index``, in the dtype of the file; ``image`` is not used."""
        if index is None:
            raise ValueError(
                f"feature_networks: {self.path!r} needs batches with an index, got one without: use a data module of "
                "lightning_kd"
            )
        row = self.row[index.cpu()]
        if bool((row < 0).any()):
            missing = int(index.cpu()[row < 0][0])
            raise ValueError(f"feature_networks: {self.path!r} has no row for sample {missing}: add its features")
        return self.feature[row]


class CheckpointFeatures:
    """Features computed by the network of a checkpoint: the input of its classifier.

    The network runs in eval mode and in float32, whatever the precision of the Trainer. If its own run normalised
    images with another mean and std than the data here, images are converted to that normalisation first.

    Args:
        path: the checkpoint of a task whose network was given by name.
        data: see ``open_representation``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the checkpoint names no network, or one for inputs of another shape.
    """

    def __init__(self, path: str, data: Any) -> None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"feature_networks: there is no {path!r}; {REMEDY}")
        checkpoint = read_checkpoint(path)
        arguments = checkpoint.get("hyper_parameters", {})
        name = arguments.get("network", arguments.get("student"))
        if not isinstance(name, str) or not isinstance(arguments.get("num_classes"), int):
            raise ValueError(
                f"feature_networks: {path!r} names no network: save its features [N, D] of all training samples as an "
                ".npy file and give that"
            )
        shape = tuple(arguments.get("input_shape", data.input_shape))
        if shape != tuple(data.input_shape):
            raise ValueError(
                f"feature_networks: the network of {path!r} takes inputs {shape}, the data has "
                f"{tuple(data.input_shape)}: give one that was trained on such data"
            )
        with torch.random.fork_rng(devices=[]):  # leaves the random state as it was; the initial weights are replaced
            self.network = network_for(name, arguments["num_classes"], shape)
        self.tap = penultimate_tap(self.network)[0]
        load_weights(self.network, path)
        self.network.requires_grad_(False).eval()
        own, here = checkpoint.get("data_description") or {}, {"mean": data.mean, "std": data.std}
        mean, std = (torch.tensor(own.get(k, here[k]), dtype=torch.float32) for k in ("mean", "std"))
        own_mean, own_std = (torch.tensor(here[k], dtype=torch.float32) for k in ("mean", "std"))
        self.scale, self.shift = own_std / std, (own_mean - mean) / std
        self.same = bool((self.scale == 1).all() and (self.shift == 0).all())

    @torch.no_grad()
    def __call__(self, image: Tensor, index: Tensor | None) -> Tensor:
        """The features ``[B, D]``, float32, of images ``[B, C, H, W]`` with the normalisation of the data."""
        shape = (-1, *[1] * (image.ndim - 2))
        with torch.autocast(image.device.type, enabled=False), no_tf32():
            image = image.float()
            if not self.same:
                image = image * self.scale.to(image).view(shape) + self.shift.to(image).view(shape)
            self.network.to(image.device)(image)
            return at_least_float32(self.tap.pop())[0]


def joined(parts: Sequence[Tensor], like: Sequence[Tensor]) -> Tensor:
    """Several feature matrices side by side, scaled so that each has the same weight in squared distances.

    Args:
        parts: ``[U, D_j]`` each; a single one is returned as it is.
        like: matrices ``[V, D_j]`` from which the scales are computed: scaled, their mean squared distance from their
            mean is 1.

    Returns:
        float64 ``[U, D_1 + D_2 + ...]``.
    """
    if len(parts) == 1:
        return parts[0]
    columns = []
    for part, other in zip(parts, like, strict=True):
        spread = (other.double() - other.double().mean(0)).square().sum(1).mean().sqrt()
        columns.append(part.double() / (spread if spread > 0 else 1))
    return torch.cat(columns, 1)
