"""The crowd layer: a network under the probabilities with which each annotator gives each class.

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

# what an annotator has of its own, by the paper's names
_PARTS = {"MW": ("kernel",), "VW": ("scale",), "VB": ("bias",), "VW+B": ("scale", "bias"), "SW": ("scale",)}


def annotator_probabilities(probabilities: Tensor, kernel: Tensor) -> Tensor:
    """How probably each annotator gives each class: the softmax of the probabilities through the annotator's matrix.

    As it is one of probabilities, not of logits, it is flat: with identities the largest is ``e / (e + C - 1)``.

    Args:
        probabilities: of the network, ``[B, C]``; half precision is computed in float32.
        kernel: ``[C, C, R]``, at ``[k, c, r]`` what true class ``k`` adds to the score of class ``c`` by ``r``.

    Returns:
        ``[B, C, R]``, summing to 1 over the second dimension.

    Raises:
        ValueError: for shapes that do not belong together.

    Source: arXiv 1709.01779, the crowd layer with a matrix for each annotator ("MW"), as in its code.
    """
    check_shapes(probabilities=(probabilities, "BC"), kernel=(kernel, "CCR"))
    probabilities, kernel = at_least_float32(probabilities, kernel)
    wider = torch.promote_types(probabilities.dtype, kernel.dtype)
    probabilities, kernel = probabilities.to(wider), kernel.to(wider)
    with torch.autocast(probabilities.device.type, enabled=False):
        return torch.einsum("bk,kcr->bcr", probabilities, kernel).softmax(1)


def crowd_loss(predicted: Tensor, annotations: Tensor, per_annotation: bool = True) -> Tensor:
    """Cross-entropy of what was predicted for every annotator against what they gave; missing ones count nothing.

    Args:
        predicted: probabilities ``[B, C, R]``, see ``annotator_probabilities``; half precision is computed in float32.
        annotations: int64 ``[B, R]``, -1 where there is none.
        per_annotation: the mean over the annotations that there are; without, over all ``B * R`` cells, as in the
            paper's code, so that the loss shrinks with the number of annotators who gave nothing.

    Returns:
        A scalar; 0 with a graph where there is no annotation.

    Raises:
        ValueError: for shapes that do not belong together, and for classes out of range (which only a CPU is asked
            for).

    Source: arXiv 1709.01779, the masked cross-entropy.
    """
    each = annotation_losses(predicted, annotations)
    return each.sum() / ((annotations >= 0).sum().clamp(min=1) if per_annotation else each.numel())


def annotation_losses(predicted: Tensor, annotations: Tensor) -> Tensor:
    """The terms ``[B, R]`` of ``crowd_loss``, 0 where there is no annotation; the same checks."""
    check_shapes(predicted=(predicted, "BCR"), annotations=(annotations, "BR"))
    if annotations.device.type == "cpu":
        annotations = check_annotations(annotations, predicted.shape[1])
    (predicted,) = at_least_float32(predicted)
    given = annotations.long()
    chosen = predicted.gather(1, given.clamp(min=0)[:, None]).squeeze(1)  # -1 would be the last class
    return -chosen.clamp_min(torch.finfo(chosen.dtype).tiny).log().masked_fill(given < 0, 0.0)


class AnnotatorLayer(nn.Module):
    """What each annotator makes of the probabilities of the true classes.

    Scores are the probabilities times a matrix of each annotator (``"MW"``), times a number for each class (``"VW"``)
    or for each annotator (``"SW"``), and with a number for each class added (``"VB"``, ``"VW+B"``). All start as
    annotators who say what is true. It has no parameters before ``allocate``.

    Args:
        num_classes: C.
        variant: one of these.

    Raises:
        ValueError: for another variant.
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
        """Make room for ``annotators`` R, unless there is."""
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
        """``[B, C]`` to ``[B, C, R]``, see ``annotator_probabilities``."""
        if self.variant == "MW":
            return annotator_probabilities(probabilities, self.kernel)
        (probabilities,) = at_least_float32(probabilities)
        score = probabilities[..., None]
        score = score * self.scale if "scale" in _PARTS[self.variant] else score
        return (score + self.bias if "bias" in _PARTS[self.variant] else score).softmax(1)

    def confusion(self) -> Tensor:
        """``[R, C, C]``, what each annotator gives to a sample that is surely of class ``k``, at ``[r, k]``."""
        parameter = next(self.parameters())
        eye = torch.eye(self.num_classes, dtype=parameter.dtype, device=parameter.device)
        return self(eye).permute(2, 0, 1)


class CrowdLayer(CrowdTask):
    """The crowd layer (Rodrigues and Pereira, AAAI 2018, arXiv 1709.01779): annotators are learnt with the network.

    The probabilities of the network go through a layer with a part for each annotator, and what comes out is compared
    with what these gave. The layer is left out when the network answers. It may exchange classes (a large learning rate
    for it does), so ``train/kernel_trace`` is logged: the mean probability that annotators (who gave any) give the
    true class, by their layer. It is flat: ``e / (e + C - 1)`` for annotators who are always right.

    Several processes: the loss is the mean over the annotations of the joint batch.

    Args:
        network: see ``CrowdTask``.
        num_classes: see ``Task``.
        variant: of the layer, see ``AnnotatorLayer``.
        per_annotation: the loss is the mean over annotations; without, over all cells, see ``crowd_loss``.
        kernel_lr: what the learning rate of the layer is multiplied by.
        kwargs: ``input_shape``, ``weights`` of ``SupervisedTask``, and the arguments of ``FineTunedTask`` and ``Task``.

    Raises:
        ValueError: for arguments out of range, and for ``kernel_lr`` with ``backbone_lr``.
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
                f"kernel_lr={kernel_lr} and backbone_lr={self.backbone_lr} exclude each other: leave one out"
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
        """What each annotation ``[B, R]`` counts in the loss; ``None`` for all alike."""
        return None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = as_batch(batch)
        annotations = self.annotations_of(batch)
        (logits,) = at_least_float32(self(batch.image))
        each = annotation_losses(self.annotators(logits.softmax(1)), annotations)
        weight = self.weights_of(annotations, batch)
        total = (each if weight is None else each * weight.to(each.dtype)).sum()
        if self.per_annotation:  # of the joint batch, as gradients are averaged over the processes
            count = summed((annotations >= 0).sum()) / process_count()
            loss = total / count.clamp(min=1)
        else:
            loss = total / each.numel()
        return self.step_loss({"crowd": loss}, logits, batch.target, counted=batch.target >= 0)

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        trace = self.annotator_confusion().diagonal(dim1=1, dim2=2)
        known = (self.annotations >= 0).any(0)  # the others would seem to be always right
        self.log("train/kernel_trace", trace[known.to(trace.device)].mean().float())

    def annotator_confusion(self) -> Tensor:
        with torch.no_grad():
            return self.annotators.confusion().double()
