"""Supervised training for each kind of problem: for teachers, and for the baselines of methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.averaged_task import AveragedTask
from lightning_kd.core.batch import Batch, as_batch
from lightning_kd.core.class_metrics import class_sizes
from lightning_kd.core.distributed import process_count
from lightning_kd.core.losses import asymmetric_loss, at_least_float32, z_loss
from lightning_kd.core.outputs import auxiliary_logits
from lightning_kd.core.problems import MultiLabel, Problem, Segmentation
from lightning_kd.core.supervised_task import SupervisedTask

__all__ = ["Classification", "MultiLabelClassification", "SemanticSegmentation", "Supervised", "SupervisedTask"]


class Supervised(SupervisedTask):
    """Train one network with the loss of the data's problem, also one of a kind of your own.

    For the kinds of this package there are ``Classification``, ``MultiLabelClassification`` and
    ``SemanticSegmentation``.

    Args:
        network: a network's name (``lightning-kd list``) or any ``nn.Module`` that gives the logits of the problem.
        num_classes: see ``Task``.
        problem: the problem. From the command line it comes from the data module. Like a network that is given as a
            module it is not in the checkpoint's hyperparameters.
        kwargs: ``input_shape``, ``weights`` of ``SupervisedTask``, and the arguments of ``FineTunedTask`` and ``Task``.

    Raises:
        ValueError: without a problem, or for ``num_classes`` other than the problem's.
    """

    def __init__(
        self, network: str | nn.Module, num_classes: int, *, problem: Problem | None = None, **kwargs: Any
    ) -> None:
        self._given_problem = problem
        super().__init__(network, num_classes, **kwargs)

    def make_problem(self, num_classes: int) -> Problem:
        if self._given_problem is None:
            raise ValueError("problem must be a Problem, got None: give data.problem")
        if self._given_problem.num_classes != num_classes:
            raise ValueError(
                f"num_classes must be that of the problem, {self._given_problem.num_classes}, got {num_classes!r}: "
                "give problem.num_classes"
            )
        return self._given_problem


class Classification(SupervisedTask):
    """Train one network for single-label classification, with cross-entropy or the Z-loss.

    Use it for teachers and baselines. After ``fit`` the run folder holds ``network.pt``, a plain ``state_dict``; a
    distillation task takes it, or the checkpoint, as ``teacher_weights``.

    Args:
        network: a network's name (``lightning-kd list``) or any ``nn.Module`` that gives logits ``[B, C]``.
        num_classes: see ``Task``.
        input_shape: see ``Task``.
        weights: checkpoint or ``state_dict`` file to start from; ``"default"`` for the published weights of a ``timm/``
            or ``torchvision/`` network. Default: train from scratch.
        label_smoothing: label smoothing of the cross-entropy, in [0, 1).
        class_weights: weights of the classes in the training's cross-entropy, which is then torch's weighted mean: a
            number above 0 for each class, or ``"balanced"`` for ``n / (C n_c)`` with ``n_c`` training samples of class
            ``c`` (1 for a class without samples). Validation and test are not weighted. Several processes: the weighted
            mean is over each process's batch.
        use_sampling_weights: multiply the loss of each sample by ``sampling_weight`` in the batch's extras, which a
            pool has after a query by the strategy ``lewis``; its mean over the query is 1, and initial labels have 1.
            The loss is the sum divided by the batch size. Validation and test are not weighted.
        loss: ``"ce"``, or ``"z"`` for ``z_loss``, which does not change when the logits of an image are scaled or
            shifted. Use weight decay with it, since nothing else limits the size of the logits; evaluation still takes
            their softmax. It needs three classes or more, and no ``label_smoothing`` or weights.
        z_a: ``a`` of ``z_loss``, above 0.
        z_b: ``b`` of ``z_loss``.
        kwargs: ``new_classifier``, ``freeze``, ``backbone_lr`` of ``FineTunedTask``; ``optimizer``, ``lr_scheduler``,
            ``lr_interval``, ``channels_last``, ``compile`` of ``Task``.
    """

    def __init__(
        self,
        network: str | nn.Module,
        num_classes: int,
        *,
        input_shape: Sequence[int] = (3, 32, 32),
        weights: str | None = None,
        label_smoothing: float = 0.0,
        class_weights: Literal["balanced"] | list[float] | None = None,
        use_sampling_weights: bool = False,
        loss: Literal["ce", "z"] = "ce",
        z_a: float = 1.0,
        z_b: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, num_classes, input_shape=input_shape, weights=weights, **kwargs)
        check_numbers(least=0, below=1, label_smoothing=label_smoothing)
        if loss not in ("ce", "z"):
            raise ValueError(f"loss must be 'ce' or 'z', got {loss!r}: give one of them")
        check_numbers(above=0, z_a=z_a)
        check_numbers(z_b=z_b)
        if loss == "z":
            check_numbers(least=3, remedy="the Z-loss of two classes has no gradient", num_classes=num_classes)
            others = (label_smoothing, class_weights, use_sampling_weights)
            for name, value in zip(("label_smoothing", "class_weights", "use_sampling_weights"), others, strict=True):
                if value:
                    raise ValueError(f"{name} is for loss='ce' only, got {value!r} with loss='z': leave one out")
        self.loss_name, self.z_a, self.z_b = loss, z_a, z_b
        self.loss_is_plain = loss == "ce"
        self._first_logits = True
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights
        if isinstance(class_weights, str) and class_weights != "balanced":
            raise ValueError(f"class_weights must be 'balanced' or a list of numbers, got {class_weights!r}")
        given = None if class_weights is None or isinstance(class_weights, str) else list(class_weights)
        for weight in given or []:
            check_numbers(above=0, class_weights=weight)
        if given is not None and len(given) != num_classes:
            raise ValueError(f"class_weights needs {num_classes} numbers, one for each class, got {len(given)}")
        self._weight = None if given is None else torch.tensor(given)
        if use_sampling_weights and class_weights is not None:
            raise ValueError(
                "use_sampling_weights and class_weights cannot be combined, got class_weights="
                f"{class_weights!r}: leave one of them out"
            )
        self.use_sampling_weights = use_sampling_weights
        self._sampling_weight: Tensor | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = as_batch(batch)
        if self.use_sampling_weights:
            self._sampling_weight = sampling_weight_of(batch)
        return super().training_step(batch, batch_idx)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.class_weights != "balanced" or stage != "fit":
            return
        data: Any = getattr(self.trainer, "datamodule", None)
        sizes = class_sizes(data, self.num_classes)
        if sizes is None:
            raise ValueError(
                f"class_weights='balanced' counts the classes of a data module of this package, got "
                f"{type(data).__name__}: give a number for each class"
            )
        if getattr(data, "balance", False):
            raise ValueError(
                "class_weights='balanced' and balance=True of the data both correct for the sizes of the classes: "
                "leave one of them out"
            )
        weight = sizes.sum() / (self.num_classes * sizes.clamp(min=1))
        self._weight = torch.where(sizes > 0, weight, 1.0)

    def on_train_start(self) -> None:
        super().on_train_start()
        self._first_logits = True

    def loss(self, output: Any, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        if self.loss_name == "z":
            if self._first_logits:  # only once in a fit, as the check makes a GPU wait
                self._first_logits = False
                warn_of_equal_logits(logits)
            return {"z": z_loss(logits, target, self.z_a, self.z_b)}
        if self._weight is not None:
            self._weight = self._weight.to(logits)
        if self._sampling_weight is not None:
            each = self.problem.loss(logits, target, label_smoothing=self.label_smoothing, reduction="none")
            return {"ce": (self._sampling_weight * each).mean()}
        options = {"label_smoothing": self.label_smoothing, "weight": self._weight}
        return {"ce": self.problem.loss(logits, target, **options)}


def sampling_weight_of(batch: Batch) -> Tensor:
    """``sampling_weight`` in the extras of a batch, float32 ``[B]``.

    Raises:
        ValueError: if there is none.
    """
    weight = batch.extras.get("sampling_weight")
    if weight is None:
        raise ValueError(
            "use_sampling_weights needs batches with sampling_weight, got none: use an OpenSetDataModule on the "
            "answers to a query by the strategy lewis (data.answers, or pool.json of the run folder)"
        )
    return weight


def warn_of_equal_logits(logits: Tensor) -> None:
    """Warn if the logits ``[B, C]`` of each sample are all equal, because the Z-loss then has no gradient."""
    if bool((logits == logits[:, :1]).all()):
        rank_zero_warn(
            "the logits of the first batch are all equal, as those of a classifier with zero weights: the Z-loss has "
            "no gradient there, so nothing is learnt; start the last layer from random weights"
        )


class MultiLabelClassification(AveragedTask):
    """Train one network for multi-label classification, with binary cross-entropy or the asymmetric loss.

    Labels that are not known (-1) are ignored. The asymmetric loss (Ridnik et al., ICCV 2021, arXiv 2009.14119) is the
    sum over all labels of the batch (of the joint batch of several processes), as in the papers that use it.

    Args:
        network: a network's name (``lightning-kd list``) or any ``nn.Module`` that gives logits ``[B, C]``.
        num_classes: see ``Task``.
        loss: ``"bce"``, the mean over all labels, or ``"asymmetric"``.
        gamma_negative: exponent of negatives in the asymmetric loss, 0 or more.
        gamma_positive: exponent of positives, 0 or more.
        margin: by how much the asymmetric loss lowers the probabilities of negatives, in [0, 1).
        answer_with: ``"live"``, ``"average"`` or ``"better"``, see ``AveragedTask``.
        view: augmentation of the training images, ``"weak"`` or ``"strong"``.
        kwargs: ``average_decay`` of ``AveragedTask``; ``input_shape``, ``weights`` of ``SupervisedTask``, and the
            arguments of ``FineTunedTask`` and ``Task``.
    """

    problem_class = MultiLabel

    def __init__(
        self,
        network: str | nn.Module,
        num_classes: int,
        *,
        loss: Literal["bce", "asymmetric"] = "bce",
        gamma_negative: float = 4.0,
        gamma_positive: float = 0.0,
        margin: float = 0.05,
        answer_with: Literal["average", "live", "better"] = "live",
        view: Literal["weak", "strong"] = "weak",
        **kwargs: Any,
    ) -> None:
        super().__init__(network, num_classes, answer_with=answer_with, **kwargs)
        if loss not in ("bce", "asymmetric"):
            raise ValueError(f"loss must be 'bce' or 'asymmetric', got {loss!r}: give one of them")
        check_numbers(least=0, gamma_negative=gamma_negative, gamma_positive=gamma_positive)
        check_numbers(least=0, below=1, margin=margin)
        self.loss_name, self.view = loss, view
        self.loss_is_plain, self.loss_is_sum = loss == "bce", loss != "bce"
        self.gamma_negative, self.gamma_positive, self.margin = gamma_negative, gamma_positive, margin

    def loss(self, output: Any, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        if self.loss_name == "bce":
            return super().loss(output, logits, target)
        loss = asymmetric_loss(logits, target, self.gamma_negative, self.gamma_positive, self.margin)
        return {"asymmetric": process_count() * loss}  # DDP averages gradients over processes


class SemanticSegmentation(SupervisedTask):
    """Train one network for semantic segmentation, with cross-entropy over the pixels.

    Args:
        network: ``fcn_tiny``, ``torchvision/deeplabv3_resnet50`` and the like, or any ``nn.Module`` that gives logits
            ``[B, C, h, w]``.
        num_classes: see ``Task``.
        input_shape: see ``Task``.
        weights: checkpoint or ``state_dict`` file to start from; ``"default"`` for the published weights of a ``timm/``
            or ``torchvision/`` network. Default: train from scratch.
        auxiliary_weight: weight of the same loss for the auxiliary head (``aux`` in the network's output, or second
            logits in a tuple or list), if there is one; 0 turns it off.
        aux_weight: the old name of ``auxiliary_weight``; if given, it counts.
        kwargs: ``new_classifier``, ``freeze``, ``backbone_lr`` of ``FineTunedTask``; ``optimizer``, ``lr_scheduler``,
            ``lr_interval``, ``channels_last``, ``compile`` of ``Task``.
    """

    problem_class = Segmentation

    def __init__(
        self,
        network: str | nn.Module,
        num_classes: int,
        *,
        input_shape: Sequence[int] = (3, 32, 32),
        weights: str | None = None,
        auxiliary_weight: float = 0.4,
        aux_weight: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, num_classes, input_shape=input_shape, weights=weights, **kwargs)
        check_numbers(least=0, auxiliary_weight=auxiliary_weight)
        check_numbers(least=0, optional=True, aux_weight=aux_weight)
        self.auxiliary_weight = auxiliary_weight if aux_weight is None else aux_weight

    def loss(self, output: Any, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        terms = {"ce": self.problem.loss(logits, target)}
        auxiliary = auxiliary_logits(output)
        if self.auxiliary_weight and auxiliary is not None:
            (auxiliary,) = at_least_float32(auxiliary)
            terms["aux"] = self.auxiliary_weight * self.problem.loss(auxiliary, target)
        elif auxiliary is not None and process_count() > 1:  # DDP waits for the gradient of every parameter
            terms["ce"] = terms["ce"] + 0.0 * auxiliary.sum()
        return terms
