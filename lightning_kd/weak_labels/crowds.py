"""The crowd layer: a layer on top of the network's probabilities that models each annotator.

Filipe Rodrigues, Francisco Pereira. Deep Learning from Crowds. AAAI 2018, arXiv 1709.01779, and its code.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.annotations import check_annotations, majority_vote
from lightning_kd.core.batch import Batch, as_batch
from lightning_kd.core.distributed import process_count, summed
from lightning_kd.core.losses import at_least_float32, check_shapes
from lightning_kd.weak_labels.crowd_statistics import dawid_skene
from lightning_kd.weak_labels.crowd_task import CrowdTask

__all__ = [
    "AnnotatorLayer",
    "CrowdLayer",
    "annotator_probabilities",
    "crowd_loss",
    "dawid_skene",
    "majority_vote",
]

# the parameters of each annotator, by the paper's names of the variants
_PARTS = {"MW": ("kernel",), "VW": ("scale",), "VB": ("bias",), "VW+B": ("scale", "bias"), "SW": ("scale",)}


def annotator_probabilities(probabilities: Tensor, kernel: Tensor) -> Tensor:
    """The probability of each class from each annotator: softmax of the network's probabilities times a matrix.

    The input of the softmax are probabilities, not logits, so the output is flat: with identity matrices the largest
    value is ``e / (e + C - 1)``.

    Args:
        probabilities: ``[B, C]``, the network's probabilities; half precision is computed in float32.
        kernel: ``[C, C, R]``; ``[k, c, r]`` is what true class ``k`` adds to the score of class ``c`` for annotator
            ``r``.

    Returns:
        ``[B, C, R]``, sum 1 over the second dimension.

    Raises:
        ValueError: if the shapes do not match.

    Source: arXiv 1709.01779, the crowd layer with one matrix per annotator ("MW"), as in its code.
    """
    check_shapes(probabilities=(probabilities, "BC"), kernel=(kernel, "CCR"))
    probabilities, kernel = at_least_float32(probabilities, kernel)
    wider = torch.promote_types(probabilities.dtype, kernel.dtype)
    probabilities, kernel = probabilities.to(wider), kernel.to(wider)
    with torch.autocast(probabilities.device.type, enabled=False):
        return torch.einsum("bk,kcr->bcr", probabilities, kernel).softmax(1)


def crowd_loss(predicted: Tensor, annotations: Tensor, per_annotation: bool = True) -> Tensor:
    """Cross-entropy between the predicted and the given annotations; missing annotations are ignored.

    Args:
        predicted: probabilities ``[B, C, R]``, see ``annotator_probabilities``; half precision is computed in float32.
        annotations: int64 ``[B, R]``, -1 for a missing annotation.
        per_annotation: take the mean over the given annotations; if ``False``, divide by all ``B * R`` cells, as in the
            paper's code. The loss is then smaller the more annotations are missing.

    Returns:
        Scalar; 0 (with a graph) without any annotation.

    Raises:
        ValueError: if the shapes do not match, or a class is out of range (checked on a CPU only).

    Source: arXiv 1709.01779, the masked cross-entropy.
    """
    each = annotation_losses(predicted, annotations)
    return each.sum() / ((annotations >= 0).sum().clamp(min=1) if per_annotation else each.numel())


def annotation_losses(predicted: Tensor, annotations: Tensor) -> Tensor:
    """The terms ``[B, R]`` of ``crowd_loss``, 0 for missing annotations; arguments and errors as there."""
    check_shapes(predicted=(predicted, "BCR"), annotations=(annotations, "BR"))
    if annotations.device.type == "cpu":
        annotations = check_annotations(annotations, predicted.shape[1])
    (predicted,) = at_least_float32(predicted)
    given = annotations.long()
    chosen = predicted.gather(1, given.clamp(min=0)[:, None]).squeeze(1)  # index -1 would select the last class
    return -chosen.clamp_min(torch.finfo(chosen.dtype).tiny).log().masked_fill(given < 0, 0.0)


class AnnotatorLayer(nn.Module):
    """Model of the annotators: turns probabilities of the true classes into probabilities of their annotations.

    The scores of an annotation are the probabilities times a matrix (``"MW"``), times one factor per class (``"VW"``)
    or one factor in all (``"SW"``), or plus one bias per class (``"VB"``); ``"VW+B"`` has factor and bias per class. A
    softmax follows. Initially all annotators give the true class. Parameters exist only after ``allocate``.

    Args:
        num_classes: number of classes ``C``.
        variant: ``"MW"``, ``"VW"``, ``"VB"``, ``"VW+B"`` or ``"SW"``, see above.

    Raises:
        ValueError: if ``variant`` is unknown.
    """

    kernel: nn.Parameter
    scale: nn.Parameter
    bias: nn.Parameter

    def __init__(self, num_classes: int, variant: str = "MW") -> None:
        super().__init__()
        if variant not in _PARTS:
            raise ValueError(f"variant must be one of {', '.join(_PARTS)}, got {variant!r}: give one of them")
        self.num_classes = num_classes
        self.variant = variant
        for name in _PARTS[variant]:
            self.register_parameter(name, nn.Parameter(torch.empty(0)))

    def allocate(self, annotators: int) -> None:
        """Create the parameters of ``annotators`` annotators (``R``), unless they exist."""
        classes = self.num_classes
        start = {
            "kernel": torch.eye(classes)[..., None].repeat(1, 1, annotators),
            "scale": torch.ones(annotators) if self.variant == "SW" else torch.ones(classes, annotators),
            "bias": torch.zeros(classes, annotators),
        }
        for name in _PARTS[self.variant]:
            if getattr(self, name).shape != start[name].shape:
                setattr(self, name, nn.Parameter(start[name].to(getattr(self, name).device)))

    def forward(self, probabilities: Tensor) -> Tensor:
        """From probabilities ``[B, C]`` to ``[B, C, R]``, see ``annotator_probabilities``."""
        if self.variant == "MW":
            return annotator_probabilities(probabilities, self.kernel)
        (probabilities,) = at_least_float32(probabilities)
        score = probabilities[..., None]
        score = score * self.scale if "scale" in _PARTS[self.variant] else score
        return (score + self.bias if "bias" in _PARTS[self.variant] else score).softmax(1)

    def confusion(self) -> Tensor:
        """``[R, C, C]``: ``[r, k]`` is what annotator ``r`` gives, by probability, to a sample certain to be ``k``."""
        parameter = next(self.parameters())
        eye = torch.eye(self.num_classes, dtype=parameter.dtype, device=parameter.device)
        return self(eye).permute(2, 0, 1)


class CrowdLayer(CrowdTask):
    """The crowd layer (Rodrigues and Pereira, AAAI 2018, arXiv 1709.01779): learn a network and its annotators at once.

    Several annotators label the samples and make different mistakes. A layer on top of the network predicts from its
    probabilities what each annotator would give, and this prediction is compared with the annotations. Network and
    layer are trained together. For evaluation and prediction the layer is left out.

    The layer may learn to swap classes, in particular with a large learning rate. To notice it, ``train/kernel_trace``
    is logged: the probability of the true class according to the layer, mean over the annotators with annotations. It
    is ``e / (e + C - 1)`` for annotators who are always right.

    Several processes: the loss is the mean over the annotations of the joint batch.

    Args:
        network: see ``CrowdTask``.
        num_classes: see ``Task``.
        variant: parameters of an annotator, see ``AnnotatorLayer``.
        per_annotation: take the mean of the loss over the given annotations; if ``False``, over all cells, see
            ``crowd_loss``.
        kernel_lr: factor for the learning rate of the layer.
        kwargs: ``input_shape``, ``weights`` of ``SupervisedTask``, and the arguments of ``FineTunedTask`` and ``Task``.

    Raises:
        ValueError: if an argument is out of range, or both ``kernel_lr`` and ``backbone_lr`` are set.
    """

    def __init__(
        self,
        network: str | nn.Module,
        num_classes: int,
        *,
        variant: Literal["MW", "VW", "VB", "VW+B", "SW"] = "MW",
        per_annotation: bool = True,
        kernel_lr: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, num_classes, **kwargs)
        check_numbers(above=0, kernel_lr=kernel_lr)
        if kernel_lr != 1 and self.backbone_lr != 1:
            raise ValueError(
                f"kernel_lr={kernel_lr} and backbone_lr={self.backbone_lr} exclude each other: set only one"
            )
        self.variant = variant
        self.per_annotation, self.kernel_lr = per_annotation, kernel_lr
        self.annotators = AnnotatorLayer(num_classes, variant)

    def allocate(self, annotators: int) -> None:
        self.annotators.allocate(annotators)

    def annotators_in(self, state: dict[str, Tensor]) -> int:
        found = state.get(f"annotators.{_PARTS[self.variant][0]}")
        return 0 if found is None else found.shape[-1]

    def build_optimizer(self, parameters: Iterable[Any]) -> torch.optim.Optimizer:
        if self.kernel_lr == 1:
            return super().build_optimizer(parameters)
        own = {id(p) for p in self.annotators.parameters()}
        parameters = list(parameters)
        optimizer = super().build_optimizer([p for p in parameters if id(p) not in own])
        rate = optimizer.param_groups[0]["lr"] * self.kernel_lr
        optimizer.add_param_group({"params": [p for p in parameters if id(p) in own], "lr": rate})
        return optimizer

    def weights_of(self, annotations: Tensor, batch: Batch) -> Tensor | None:
        """The weight of each annotation ``[B, R]`` in the loss; ``None`` for equal weights."""
        return None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = as_batch(batch)
        annotations = self.annotations_of(batch)
        (logits,) = at_least_float32(self(batch.image))
        each = annotation_losses(self.annotators(logits.softmax(1)), annotations)
        weight = self.weights_of(annotations, batch)
        total = (each if weight is None else each * weight.to(each.dtype)).sum()
        if self.per_annotation:  # mean over the joint batch: DDP averages gradients over the processes
            count = summed((annotations >= 0).sum()) / process_count()
            loss = total / count.clamp(min=1)
        else:
            loss = total / each.numel()
        return self.step_loss({"crowd": loss}, logits, batch.target, counted=batch.target >= 0)

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        trace = self.annotator_confusion().diagonal(dim1=1, dim2=2)
        known = (self.annotations >= 0).any(0)  # the others stay at their start: always right
        self.log("train/kernel_trace", trace[known.to(trace.device)].mean().float())

    def annotator_confusion(self) -> Tensor:
        with torch.no_grad():
            return self.annotators.confusion().double()
