"""PAT: multi-label classification of whole images and of the cells of a grid over them.

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
    """The weight of each patch for each class: a softmax over the patches, ``[G, B, C]``.

    The patch with the largest weight is the pivot patch of the class.

    Args:
        attention: logits ``[G, B, C]`` of ``G`` patches; half precision is computed in float32, float64 stays.
        temperature: temperature of the softmax, above 0; 1 in the official code.

    Raises:
        ValueError: if the shape is wrong, or ``temperature`` is not above 0.
    """
    check_shapes(attention=(attention, "GBC"))
    check_positive(temperature=temperature)
    (attention,) = at_least_float32(attention)
    return (attention / temperature).softmax(0)


def aggregate_patches(attention: Tensor, value: Tensor, temperature: float = 1.0) -> Tensor:
    """Combine the logits of the patches: ``sum_g patch_weights(attention)_g * value_g``, logits ``[B, C]``.

    Both arguments get gradient.

    Args:
        attention: logits ``[G, B, C]``, from which the weights of the patches are computed.
        value: logits ``[G, B, C]`` that are averaged; the same tensor if one head gives both.
        temperature: see ``patch_weights``.

    Raises:
        ValueError: if the shapes differ, or ``temperature`` is not above 0.

    Source: arXiv 2404.06287, the prediction from patches, as in the official code.
    """
    check_shapes(attention=(attention, "GBC"), value=(value, "GBC"))
    attention, value = at_least_float32(attention, value)
    return (patch_weights(attention, temperature) * value).sum(0)


def cut_patches(image: Tensor, n_grid: int = 2) -> Tensor:
    """Cut each image into the cells of a grid and enlarge each cell to the image's size: ``[G, B, C, H, W]``.

    Cells are ordered row by row. A cell has ``H // n_grid`` by ``W // n_grid`` pixels; remaining pixels at the lower
    and right border are dropped. Cells are enlarged by bilinear interpolation.

    Args:
        image: ``[B, C, H, W]``.
        n_grid: number of cells per side, at least 1; ``G = n_grid ** 2``.

    Raises:
        ValueError: if the shape is wrong, or an image has fewer pixels per side than ``n_grid``.
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
    """A network whose last linear layer is repeated ``heads`` times: logits ``[B, heads, C]``.

    The first head starts with the weights of the network's own layer.
    """

    def __init__(self, network: nn.Module, num_classes: int, heads: int) -> None:
        super().__init__()
        path, linear = find_classifier(network)
        if not path or linear.out_features != num_classes:
            raise ValueError(
                f"the last linear layer of {type(network).__name__}, {path!r}, must give {num_classes} logits, got "
                f"{linear.out_features}: give a network with a linear classifier, or set attention to null"
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
    """PAT (Xie et al., ICML 2024, arXiv 2404.06287): classify the whole image and its patches, and average both.

    A label is predicted from the whole image and from its patches, the cells of a grid. For each label an attention
    weights the patches, so that mostly the relevant one counts. A label that only the context suggests gets a lower
    score, because no single patch supports it.

    The logits are the mean of those of the whole image and those of ``aggregate_patches``. In training each of the two
    has its own asymmetric loss, summed over images and labels. The pivot patch of a predicted label, the cell with the
    largest weight, is written to ``predictions.csv`` as ``pivot_patch_K`` for class ``K``: cells are counted from 0,
    row by row; -1 means that the label is not predicted.

    If the data gives several views of an image, the first must be the whole image and the others its patches; otherwise
    patches are cut from the batch. A training step computes ``1 + n_grid ** 2`` images per sample; evaluation computes
    the views one after the other.

    Args:
        network: name of a network (``lightning-kd list``) or any ``nn.Module`` that returns logits ``[B, C]``. Unless
            ``attention`` is ``None`` its last layer must be an ``nn.Linear`` with ``C`` outputs; it is replaced by one
            with an output for each class and head.
        num_classes: see ``Task``.
        attention: number of heads. ``"cross"``: three, for the whole image, for the attention and for the values of the
            patches; ``"self"``: two, one for attention and values together; ``None``: one, trained on whole images
            only. ``None`` evaluates any network that was trained for multi-label classification with patches
            (``weights`` of ``MultiLabelClassification``, and ``test``).
        n_grid: number of cells per side.
        temperature: temperature of the softmax over the patches, above 0.
        gamma_negative: exponent for negative labels, see ``asymmetric_loss``.
        gamma_positive: exponent for positive labels, see ``asymmetric_loss``.
        margin: probability margin of negative labels, in [0, 1), see ``asymmetric_loss``.
        view: augmentation of the training images: ``"strong"`` or ``"weak"``, with patches cut from the augmented
            image; or ``"strong_patches"``, which augments the whole image and each cell separately, as in the paper. It
            needs a multi-label data module of this package with the same ``n_grid``.
        kwargs: ``average_decay``, ``answer_with`` of ``AveragedTask``; ``input_shape``, ``weights`` of
            ``SupervisedTask``; the arguments of ``FineTunedTask`` and ``Task``.

    Raises:
        ValueError: if an argument is out of range, or the last layer of ``network`` is not linear with ``C`` outputs.
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
        # without heads for the patches, only whole images are trained on
        self.view = "strong" if attention is None and view == "strong_patches" else view
        self.gamma_negative, self.gamma_positive, self.margin = gamma_negative, gamma_positive, margin
        if attention is not None:
            self.network = PatchHeads(self.network, num_classes, 3 if attention == "cross" else 2)
            self.start_average()

    def train_loader(self, data: Any) -> Any:
        if self.view == "strong_patches" and data.n_grid != self.n_grid:
            raise ValueError(f"data.n_grid must be {self.n_grid}, as n_grid of PAT, got {data.n_grid}: change one")
        return super().train_loader(data)

    # -- predictions -------------------------------------------------------------------------------------------------

    def views_of(self, image: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """The whole images and then their patches, each ``[B, C, H, W]``."""
        if isinstance(image, Tensor):
            return [image, *cut_patches(image, self.n_grid)]
        if len(image) < 2:
            raise ValueError("PAT needs the whole image and its patches, got one view: give all, or one tensor")
        return list(image)

    def head_logits(self, network: nn.Module, image: Tensor) -> Tensor:
        """Logits ``[B, heads, C]``, float32 or wider."""
        output = network(self.format_image(image))
        if self.attention is None:
            output = self.problem.logits(output, image, network)[:, None]
        (logits,) = at_least_float32(output)
        return logits

    def patch_answer(self, image: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean logits ``[B, C]`` of whole image and patches, and the weights ``[G, B, C]`` of the patches."""
        whole, *patches = (self.head_logits(self.main_network, view) for view in self.views_of(image))
        return self._mean_logits_and_weights(whole, torch.stack(patches))

    def _mean_logits_and_weights(self, whole: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        full, patch = self._logits(whole, patches)
        return (full + patch) / 2, patch_weights(self._attention(patches), self.temperature)

    def _attention(self, patches: Tensor) -> Tensor:
        return patches[:, :, min(1, patches.shape[2] - 1)]

    def _logits(self, whole: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the whole image and logits of the patches, each ``[B, C]``, from the outputs of the heads."""
        return whole[:, 0], aggregate_patches(self._attention(patches), patches[:, :, -1], self.temperature)

    def forward(self, image: Tensor | Sequence[Tensor]) -> Tensor:
        """Mean logits ``[B, C]`` of whole image and patches."""
        return self.patch_answer(image)[0]

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """As in ``Task``, with ``pivot_patch`` int64 ``[B, C]`` added: -1 where a label is not predicted."""
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
        # DDP averages gradients over the processes, but the loss is a sum over the joint batch
        return process_count() * asymmetric_loss(logits, target, self.gamma_negative, self.gamma_positive, self.margin)
