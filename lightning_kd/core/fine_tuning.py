"""Fine-tuning: training from given weights, with a new classifier, a frozen backbone or one that learns slowly."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from typing_extensions import Self

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.feature_hooks import find_classifier
from lightning_kd.core.optimization import optimizer_for
from lightning_kd.core.starting_weights import network_with_weights
from lightning_kd.core.task import Task
from lightning_kd.nets.ml_decoder import MLDecoderNetwork

__all__ = ["FineTunedTask", "backbone_parameters"]


class FineTunedTask(Task):
    """A task that trains one network, from scratch or from given weights.

    The backbone is all of the network but its classifier, the last ``nn.Linear``. In a segmentation network of
    torchvision it is the module ``backbone``, and with ``NAME+ml_decoder`` all but that head. Modules that a method
    adds to the network do not belong to the backbone.

    A subclass builds the network by ``self.build_to_train(...)``.

    Args:
        num_classes: see ``Task``.
        new_classifier: take all weights but the classifier's from the file. Published weights get a new classifier
            automatically if the data have another number of classes.
        freeze: ``"backbone"`` trains the classifier alone: the backbone gets no gradient, is not given to the
            optimizer, and its batch normalisation keeps its running statistics. Default: train all.
        backbone_lr: factor of the learning rate of the backbone. Schedules scale both rates alike, except for an
            ``eta_min``, at which both end.
        decay_weights_only: apply weight decay only to tensors of two or more dimensions, not to biases and
            normalisation layers, as in papers on multi-label classification.
        kwargs: ``input_shape``, ``optimizer``, ``lr_scheduler``, ``lr_interval``, ``channels_last``, ``compile`` of
            ``Task``.

    Raises:
        ValueError: for ``new_classifier`` or ``freeze`` without weights, ``freeze`` or ``decay_weights_only`` with
            ``backbone_lr``, and a network whose backbone is not known because it has no classifier.
    """

    #: whether the loss is a sum over images and labels, not a mean
    loss_is_sum = False
    #: without given weights, use the default optimizer of ``Task`` for any network, not ``optimizer_for``
    plain_default = False

    def __init__(
        self,
        num_classes: int,
        *,
        new_classifier: bool = False,
        freeze: Literal["backbone"] | None = None,
        backbone_lr: float = 1.0,
        decay_weights_only: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, **kwargs)
        if freeze not in (None, "backbone"):
            raise ValueError(f"freeze must be 'backbone' or None, got {freeze!r}: give one of them")
        check_numbers(above=0, remedy="give freeze: backbone to keep it as it is", backbone_lr=backbone_lr)
        if freeze is not None and backbone_lr != 1:
            raise ValueError(f"freeze leaves no backbone to train, got backbone_lr={backbone_lr}: give one of them")
        if decay_weights_only and backbone_lr != 1:
            raise ValueError(f"decay_weights_only excludes backbone_lr={backbone_lr}: leave one of them out")
        self.new_classifier = new_classifier
        self.decay_weights_only = decay_weights_only
        self.freeze_part = freeze
        self.backbone_lr = backbone_lr
        self.has_given_weights = False
        self._trained: list[nn.Module] = []  # in a list, so that it is not registered as a submodule twice
        self._resting: list[nn.Module] = []

    def build_to_train(
        self,
        network: str | nn.Module,
        weights: str | None,
        argument: str = "weights",
        outputs: int | None = None,
    ) -> nn.Module:
        """Build the network that is trained, as ``Task.build``, load its weights and freeze its backbone if asked.

        Args:
            network: a network's name, or a module.
            weights: see ``network_with_weights``.
            argument: name of the argument ``weights`` in messages.
            outputs: number of logits. Default: that of the problem.
        """
        if weights is None and (self.new_classifier or (self.freeze_part and isinstance(network, str))):
            name, value = ("new_classifier", True) if self.new_classifier else ("freeze", self.freeze_part)
            raise ValueError(
                f"{name}={value!r} needs {argument} to start from, got none: give them, or leave {name} out"
            )
        built = network_with_weights(
            network,
            weights,
            outputs or self.num_classes,
            partial(self.build, outputs=outputs),
            new_classifier=self.new_classifier,
            input_shape=self.input_shape,
            argument=argument,
        )
        self.has_given_weights = weights is not None
        self._trained = [built]
        backbone = backbone_parameters(built) if self.freeze_part or self.backbone_lr != 1 else []
        if self.freeze_part:
            own = {id(p) for p in backbone}
            self._resting = [m for m in built.modules() if _has_statistics(m, own)]
            for parameter in backbone:
                parameter.requires_grad_(False)
            self.train(self.training)
        return built

    # -- frozen modules ----------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self._resting:
            module.eval()
        return self

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        for module in self._resting:  # a callback may have called train() on the network
            if module.training:
                module.eval()

    def modules_at_rest(self) -> list[nn.Module]:
        """The modules that stay in eval mode while the task is trained."""
        return list(self._resting)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        resting = self.modules_at_rest()
        if stage == "fit" and resting and {m for m in self.modules() if not m.training} == set(resting):
            warnings.filterwarnings("ignore", "Found \\d+ module\\(s\\) in eval mode")

    # -- optimizer ---------------------------------------------------------------------------------------------------

    def default_optimizer(self, parameters: list[Any]) -> torch.optim.Optimizer:
        if self.plain_default and not (self.has_given_weights or self.freeze_part):
            return super().default_optimizer(parameters)
        if self.freeze_part:  # a single layer on fixed features
            return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
        return optimizer_for(self._trained[0], parameters, self.has_given_weights, self.loss_is_sum)

    def build_optimizer(self, parameters: Iterable[Any]) -> torch.optim.Optimizer:
        if self.decay_weights_only:
            parameters = list(parameters)
            wide, narrow = ([p for p in parameters if (p.ndim > 1) == which] for which in (True, False))
            both = (wide, {"params": wide}), (narrow, {"params": narrow, "weight_decay": 0.0})
            return super().build_optimizer([group for own, group in both if own])
        if self.backbone_lr == 1:
            return super().build_optimizer(parameters)
        backbone = {id(p) for p in backbone_parameters(self._trained[0])}
        parameters = list(parameters)
        groups: list[Any] = [
            {"params": [p for p in parameters if (id(p) in backbone) == slow]} for slow in (False, True)
        ]
        optimizer = super().build_optimizer(groups)
        optimizer.param_groups[1]["lr"] = optimizer.param_groups[1]["lr"] * self.backbone_lr
        return optimizer

    def optimizer_and_scheduler(self, parameters: list[nn.Parameter]) -> Any:
        configured = super().optimizer_and_scheduler(parameters)
        if self.backbone_lr != 1 and isinstance(configured, dict) and "lr_scheduler" in configured:
            schedule = configured["lr_scheduler"]["scheduler"]
            fast, slow = (group["lr"] for group in configured["optimizer"].param_groups)
            if abs(slow - fast * self.backbone_lr) > 1e-6 * abs(fast):
                rank_zero_warn(
                    f"{type(schedule).__name__} sets learning rates of its own, so backbone_lr={self.backbone_lr} has "
                    "no effect: give the schedule a list of two rates, that of the classifier first"
                )
        return configured


def backbone_parameters(network: nn.Module) -> list[nn.Parameter]:
    """The parameters of the backbone: all but the classifier's, see ``FineTunedTask``.

    Raises:
        ValueError: if the network has no ``nn.Linear`` and no module named ``backbone``.
    """
    if isinstance(network, MLDecoderNetwork):
        return list(network.network.parameters())
    try:
        classifier = find_classifier(network)[1]
    except ValueError:
        if isinstance(getattr(network, "backbone", None), nn.Module):  # torchvision's segmentation networks
            return list(network.backbone.parameters())  # type: ignore[union-attr]
        raise ValueError(
            f"freeze and backbone_lr need a network with an nn.Linear as classifier, {type(network).__name__} has "
            "none: leave them out, or take another network"
        ) from None
    own = {id(p) for p in classifier.parameters()}
    return [p for p in network.parameters() if id(p) not in own]


def _has_statistics(module: nn.Module, backbone: set[int]) -> bool:
    """Whether ``module`` has running statistics, and no parameter outside of the backbone."""
    return getattr(module, "running_mean", None) is not None and all(id(p) in backbone for p in module.parameters())
