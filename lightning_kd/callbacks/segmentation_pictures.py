"""A callback that draws the predictions of a segmentation network during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_kd.argument_checks import check_numbers
from lightning_kd.callbacks.label_pictures import _keep
from lightning_kd.core.batch import as_batch
from lightning_kd.core.inference_pass import evaluating
from lightning_kd.core.prediction_files import colours

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class SegmentationPictures(L.Callback):
    """Draw some images with their true classes, their predicted classes and further maps of a method.

    It writes ``pictures/pixels.png`` in the run folder at the end of the fit, and files such as
    ``pixels_epoch010.png`` in between. A task with ``pixel_maps(image, target)`` adds columns; ``RDD`` shows the
    difficulty weight of its first stage and the disputed pixels of its second. Ignored pixels are white. A picture that
    cannot be drawn gives a warning and does not stop the training.

    Several processes: process 0 draws images of its own share.

    Args:
        count: number of images, evenly spaced in the split (the first ones, if the data module is not of
            lightning_kd). Without ``mean`` and ``std`` of the data, images are shown as the network gets them.
        every: also draw every so many epochs. Default: only at the end.
        split: ``"val"`` or ``"test"``.

    Raises:
        ValueError: for an argument out of range.
    """

    def __init__(self, count: int = 4, every: int | None = None, split: Literal["val", "test"] = "val") -> None:
        check_numbers(least=1, whole=True, count=count)
        check_numbers(least=1, whole=True, optional=True, every=every)
        if split not in ("val", "test"):
            raise ValueError(f"split must be 'val' or 'test', got {split!r}: give one of them")
        self.count = count
        self.every = every
        self.split = split

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epochs = trainer.current_epoch + 1
        if self.every is not None and epochs % self.every == 0:
            self._draw(trainer, pl_module, epochs, f"_epoch{epochs:03d}")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # not in on_fit_end: there the module is no longer on its device
        self._draw(trainer, pl_module, trainer.current_epoch, "")

    def _draw(self, trainer: L.Trainer, task: Any, epochs: int, suffix: str) -> None:
        if getattr(trainer, "fast_dev_run", 0) or not trainer.is_global_zero:
            return
        when = f"after {epochs} epoch{'' if epochs == 1 else 's'}"
        try:
            image, columns = self._columns(trainer, task)
            figure = pixel_figure(image, columns, task.num_classes, f"{type(task).__name__} {when} ({self.split} set)")
            _keep(trainer, "pixels", suffix, figure)
        except Exception as error:  # a training must not fail because of a picture
            rank_zero_warn(f"no picture of pixels {when} ({type(error).__name__}: {error}); the training goes on")

    def _loader(self, trainer: L.Trainer, data: Any) -> Any:
        indices = getattr(data, f"{self.split}_indices", None)
        if data is None:  # a fit with loaders
            loader = trainer.val_dataloaders if self.split == "val" else trainer.test_dataloaders
            if loader is None:
                raise ValueError(f"there is no loader of the {self.split} set: give a data module, or another split")
            return loader
        if indices is None or not hasattr(data, "loader"):
            return getattr(data, f"{self.split}_dataloader")()
        count = min(max(self.count, trainer.world_size), len(indices))
        return data.loader(self.split, indices[np.linspace(0, len(indices) - 1, count).round().astype(int)])

    def _columns(self, trainer: L.Trainer, task: Any) -> tuple[list[np.ndarray], dict[str, list[Tensor]]]:
        """The images, ``[H, W, 3]`` of 0 to 1, and by name the maps of each image, ``[H, W]``."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        strategy, convert = trainer.strategy, trainer.precision_plugin.convert_input
        columns: dict[str, list[Tensor]] = {}  # images may differ in size
        with evaluating(task):
            for batch in self._loader(trainer, data):
                batch = as_batch(strategy.batch_to_device(convert(batch)))
                image, target = batch.image[: self.count], batch.target[: self.count]
                found = {"true classes": target, "predicted classes": task.problem.prediction(task(image))}
                if hasattr(task, "pixel_maps"):
                    found |= task.pixel_maps(image, target)
                for name, values in {"image": image.float(), **found}.items():
                    columns[name] = [*columns.get(name, []), *values.cpu()][: self.count]
                if len(columns["image"]) >= self.count:
                    break
        given = getattr(data, "mean", [0.0]), getattr(data, "std", [1.0])
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in given)
        shown = [(image * std + mean).clamp(0, 1).expand(3, -1, -1) for image in columns.pop("image")]
        return [image.permute(1, 2, 0).numpy() for image in shown], columns


def pixel_figure(
    image: Sequence[np.ndarray], columns: Mapping[str, Sequence[Tensor]], num_classes: int, title: str
) -> Figure:
    """A figure with a row for each image: the image and its maps.

    Args:
        image: ``[H, W, 3]`` each, of 0 to 1.
        columns: by name, a map ``[H, W]`` for each image: integers are classes, with -1 for none; bools and numbers
            from 0 to 1 are shown from dark to light.
        num_classes: number of classes.
        title: title of the figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    side = 2.4
    size = (side * (1 + len(columns)), side * sum(one.shape[0] / one.shape[1] for one in image) + 0.8)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(image), 1 + len(columns), squeeze=False)
    table = np.concatenate([colours(num_classes), [[255, 255, 255]]])  # the last one for -1
    for row, axes in enumerate(grid):
        _show(axes[0], image[row], "image" if row == 0 else "")
        for place, (name, values) in zip(axes[1:], columns.items(), strict=True):
            one = values[row].numpy()
            options: dict[str, Any] = {"cmap": "viridis", "vmin": 0, "vmax": 1}
            if one.dtype != bool and np.issubdtype(one.dtype, np.integer):
                one, options = table[one], {}
            _show(place, one, name if row == 0 else "", **options)
    figure.suptitle(title)
    return figure


def _show(axes: Any, values: np.ndarray, title: str, **options: Any) -> None:
    axes.imshow(values, interpolation="nearest", **options)
    axes.set_title(title, fontsize="medium")
    axes.set_axis_off()
