"""PAT: a label must be supported by one part of the image, too.

Ming-Kun Xie, Jia-Hao Xiao, Pei Peng, Gang Niu, Masashi Sugiyama, Sheng-Jun Huang. Counterfactual Reasoning for
Multi-Label Image Classification via Patching-Based Training. ICML 2024, arXiv 2404.06287.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.averaged_task import AveragedTask
from lightning_kd.core.batch import as_batch
from lightning_kd.core.distributed import process_count
from lightning_kd.core.feature_hooks import find_classifier
from lightning_kd.core.losses import asymmetric_loss, at_least_float32, check_positive, check_shapes
from lightning_kd.core.outputs import class_logits
from lightning_kd.core.problems import MultiLabel

__all__ = ["PAT", "aggregate_patches", "cut_patches", "patch_weights"]


def patch_weights(attention: Tensor, temperature: float = 1.0) -> Tensor:
    """How much each patch has to say about each class: a softmax over the patches, ``[G, B, C]``.

    The largest one is the pivot patch of the class.

    Args:
        attention: logits ``[G, B, C]`` of ``G`` patches; half precision is computed in float32, float64 stays.
        temperature: above 0; the official code has 1.

    Raises:
        ValueError: for another shape, and a temperature out of range.
    """
    check_shapes(attention=(attention, "GBC"))
    check_positive(temperature=temperature)
    (attention,) = at_least_float32(attention)
    return (attention / temperature).softmax(0)


def aggregate_patches(attention: Tensor, value: Tensor, temperature: float = 1.0) -> Tensor:
    """What the patches say together: ``sum_g patch_weights(attention)_g * value_g``, logits ``[B, C]``.

    Both get gradient.

    Args:
        attention: logits ``[G, B, C]``.
        value: logits ``[G, B, C]``; the same tensor where one head gives both.
        temperature: see ``patch_weights``.

    Raises:
        ValueError: for shapes that differ, and a temperature out of range.

    Source: arXiv 2404.06287, patch prediction, as in the official code.
    """
    check_shapes(attention=(attention, "GBC"), value=(value, "GBC"))
    attention, value = at_least_float32(attention, value)
    return (patch_weights(attention, temperature) * value).sum(0)


def cut_patches(image: Tensor, n_grid: int = 2) -> Tensor:
    """The cells of a grid over each image, row by row, each brought back to the image's size: ``[G, B, C, H, W]``.

    A cell has ``H // n_grid`` by ``W // n_grid`` pixels; what is left at the lower and right border is dropped.

    Args:
        image: ``[B, C, H, W]``.
        n_grid: cells a side, from 1 on; ``G`` is its square.

    Raises:
        ValueError: for another shape, and for images smaller than the grid.
    """
    check_numbers(least=1, whole=True, n_grid=n_grid)
    check_shapes(image=(image, "BCHW"))
    height, width = image.shape[2] // n_grid, image.shape[3] // n_grid
    if not min(height, width):
        raise ValueError(f"n_grid must be at most the {min(image.shape[2:])} pixels of a side, got {n_grid}: lower it")
    cells = [
        image[:, :, y * height : (y + 1) * height, x * width : (x + 1) * width]
        for y in range(n_grid)
        for x in range(n_grid)
    ]
    size = tuple(image.shape[2:])
    return torch.stack([F.interpolate(cell, size, mode="bilinear", align_corners=False) for cell in cells])


class PatchHeads(nn.Module):
    """A tagger whose last layer answers ``heads`` times: logits ``[B, heads, C]``, the first by the layer it has."""

    def __init__(self, network: nn.Module, num_classes: int, heads: int) -> None:
        super().__init__()
        path, linear = find_classifier(network)
        if not path or linear.out_features != num_classes:
            raise ValueError(
                f"the last linear layer of {type(network).__name__}, {path!r}, must give {num_classes} logits, got "
                f"{linear.out_features}: give a network whose classifier is linear, or attention null"
            )
        wide = nn.Linear(linear.in_features, heads * num_classes, bias=linear.bias is not None)
        with torch.no_grad():
            for name, values in linear.named_parameters():
                getattr(wide, name)[:num_classes].copy_(values)
        parent, _, name = path.rpartition(".")
        setattr(network.get_submodule(parent), name, wide)
        self.network, self.num_classes, self.heads = network, num_classes, heads

    def forward(self, image: Tensor) -> Tensor:
        logits = class_logits(self.network, self.network(image), self.heads * self.num_classes)
        return logits.unflatten(1, (self.heads, self.num_classes))


class PAT(AveragedTask):
    """PAT (Xie et al., ICML 2024, arXiv 2404.06287): half of a label's score must come from one part of the image.

    The logits are the mean of those of the whole image and of ``aggregate_patches`` over the cells of a grid. In
    training each of the two has its own asymmetric loss, summed over images and labels. The pivot patch of a predicted
    label, the cell that has most to say, is in ``predictions.csv`` as ``pivot_patch_K`` for class ``K`` (cells counted
    from 0 row by row, -1 where the label is not predicted).

    Where the data gives several views of an image, the first is the whole and the others are its patches; else they
    are cut from the batch. A step has ``1 + n_grid ** 2`` images for one; evaluation takes one view at a time.

    Several processes: the loss is the sum over the joint batch.

    Args:
        network: a network's name (``lightning-kd list``) or any ``nn.Module`` that gives logits ``[B, C]``; with an
            attention its last layer must be an ``nn.Linear`` of ``C`` outputs, which is made to answer several times.
        num_classes: see ``Task``.
        attention: ``"cross"``: one head for the whole image, one for the attention and one for the value of patches;
            ``"self"``: one for both of these; ``None``: one for everything, trained on whole images alone, so that any
            tagger is evaluated by its patches too (``weights`` of ``MultiLabelClassification``, and ``test``).
        n_grid: cells a side.
        temperature: of the softmax over the patches.
        gamma_negative: see ``asymmetric_loss``, as the next two.
        gamma_positive: exponent of positives.
        margin: in [0, 1).
        view: what is trained on: ``"strong"`` or ``"weak"``, and the cells of that; or ``"strong_patches"``, a strong
            view of the whole and one of each cell, as in the paper, where the data has several labels an image.
        kwargs: ``average_decay``, ``answer_with`` of ``AveragedTask``; ``input_shape``, ``weights`` of
            ``SupervisedTask``, and the arguments of ``FineTunedTask`` and ``Task``.
    """

    problem_class = MultiLabel
    loss_is_plain = False
    loss_is_sum = True

    def __init__(
        self,
        network: str | nn.Module,
        num_classes: int,
        *,
        attention: Literal["cross", "self"] | None = "cross",
        n_grid: int = 2,
        temperature: float = 1.0,
        gamma_negative: float = 4.0,
        gamma_positive: float = 0.0,
        margin: float = 0.05,
        view: Literal["strong_patches", "strong", "weak"] = "strong",
        **kwargs: Any,
    ) -> None:
        super().__init__(network, num_classes, **kwargs)
        if attention not in ("cross", "self", None):
            raise ValueError(f"attention must be 'cross', 'self' or None, got {attention!r}: give one of them")
        check_numbers(least=1, whole=True, n_grid=n_grid)
        check_numbers(above=0, temperature=temperature)
        check_numbers(least=0, gamma_negative=gamma_negative, gamma_positive=gamma_positive)
        check_numbers(least=0, below=1, margin=margin)
        self.attention, self.n_grid, self.temperature = attention, n_grid, temperature
        # without heads for the patches only the whole image is trained on
        self.view = "strong" if attention is None and view == "strong_patches" else view
        self.gamma_negative, self.gamma_positive, self.margin = gamma_negative, gamma_positive, margin
        if attention is not None:
            self.network = PatchHeads(self.network, num_classes, 3 if attention == "cross" else 2)
            self.start_average()

    def train_loader(self, data: Any) -> Any:
        if self.view == "strong_patches" and data.n_grid != self.n_grid:
            raise ValueError(f"n_grid of the data must be that of PAT, {self.n_grid}, got {data.n_grid}: give it so")
        return super().train_loader(data)

    # -- answers -----------------------------------------------------------------------------------------------------

    def views_of(self, image: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """The whole images and their patches, each ``[B, C, H, W]``."""
        if isinstance(image, Tensor):
            return [image, *cut_patches(image, self.n_grid)]
        if len(image) < 2:
            raise ValueError("PAT needs patches beside the whole image, got one view: give views, or a plain image")
        return list(image)

    def head_logits(self, network: nn.Module, image: Tensor) -> Tensor:
        """Logits ``[B, heads, C]``, float32 or wider."""
        output = network(self.format_image(image))
        if self.attention is None:
            output = self.problem.logits(output, image, network)[:, None]
        (logits,) = at_least_float32(output)
        return logits

    def patch_answer(self, image: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits ``[B, C]`` of whole and patches together, and the weights ``[G, B, C]`` of the patches."""
        whole, *patches = (self.head_logits(self.main_network, view) for view in self.views_of(image))
        return self._together(whole, torch.stack(patches))

    def _together(self, whole: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        full, patch = self._logits(whole, patches)
        return (full + patch) / 2, patch_weights(self._attention(patches), self.temperature)

    def _attention(self, patches: Tensor) -> Tensor:
        return patches[:, :, min(1, patches.shape[2] - 1)]

    def _logits(self, whole: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the whole image and of the patches, from what the heads say."""
        return whole[:, 0], aggregate_patches(self._attention(patches), patches[:, :, -1], self.temperature)

    def forward(self, image: Tensor | Sequence[Tensor]) -> Tensor:
        """Logits ``[B, C]`` of whole and patches together."""
        return self.patch_answer(image)[0]

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """As ``Task``, and ``pivot_patch`` int64 ``[B, C]``, -1 where a label is not predicted."""
        batch = as_batch(batch)
        index = {} if batch.index is None else {"index": batch.index}
        logits, weights = self.patch_answer(batch.image)
        found = self.problem.predict(logits.float(), self.problem.probabilities(logits.float()))
        return {**index, **found, "pivot_patch": weights.argmax(0).masked_fill(~found["prediction"], -1)}

    # -- training ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = as_batch(batch)
        if self.attention is None:
            image = batch.image if isinstance(batch.image, Tensor) else batch.image[0]
            logits = self.head_logits(self.network, image)[:, 0]
            return self.step_loss({"full": self._loss(logits, batch.target)}, logits, batch.target)
        views = self.views_of(batch.image)
        whole, *patches = self.head_logits(self.network, torch.cat(views)).unflatten(0, (len(views), -1))
        full, patch = self._logits(whole, torch.stack(patches))
        terms = {"full": self._loss(full, batch.target), "patch": self._loss(patch, batch.target)}
        return self.step_loss(terms, (full + patch) / 2, batch.target)

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        # gradients are averaged over the processes
        return process_count() * asymmetric_loss(logits, target, self.gamma_negative, self.gamma_positive, self.margin)
