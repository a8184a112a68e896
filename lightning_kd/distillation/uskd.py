"""USKD: no teacher; soft labels are made of the network's own answer and that of a weak head inside it.

Zhendong Yang, Ailing Zeng, Zhe Li, Tianke Zhang, Chun Yuan, Yu Li. From Knowledge Distillation to Self-Knowledge
Distillation: A Unified Approach with Normalized Loss and Customized Soft Labels. ICCV 2023, arXiv 2303.13005.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.feature_hooks import Tap
from lightning_kd.core.label_matrix import check_target_or_matrix, main_class
from lightning_kd.core.losses import at_least_float32, check_shapes, soft_cross_entropy
from lightning_kd.core.module_modes import eval_mode
from lightning_kd.core.random_state import same_random_state
from lightning_kd.core.stage_features import StageFeatures
from lightning_kd.core.supervised_task import SupervisedTask

__all__ = ["USKD", "uskd_loss"]


def uskd_loss(
    logits: Tensor,
    weak_logits: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    mu: float,
    ranking: Literal["log_probability", "probability"] = "log_probability",
) -> Tensor:
    """``alpha L_target + beta L_non + mu L_weak``, each a cross-entropy, sum over classes and mean over the batch.

    With ``p`` and ``w`` the softmax of ``logits`` and ``weak_logits`` and ``y`` the target class:

    - ``L_target = -(p_y^2 + 1 - m) log p_y`` with the mean ``m`` of ``p_y^2`` over the batch: easy samples count more.
    - ``L_weak`` is that of the weak head, whose target has 0.9 for the label and 0.1 shared by all classes.
    - ``L_non`` is over the classes other than the target. Its soft label is ``1 / rank``, normalised to sum 1: all
      classes, the target too, are ranked by ``w_k / (1 - w_y + 1e-6) + s_k / (1 - s_y + 1e-6)``.

    What is made of the predictions, the factor in ``L_target`` and the soft label, gets no gradient.

    Args:
        logits: ``[B, C]``, ``C >= 2``; half precision is computed in float32, float64 stays.
        weak_logits: ``[B, C]`` of the weak head.
        target: int64 ``[B]``, or a label matrix ``[B, C]`` of mixed images. In ``L_target`` and ``L_non`` its two
            largest entries are targets, with a factor ``p_c^2 + v_c - m`` for a share ``v_c``; ``m`` is that of the
            larger and that of the smaller ones, and 1 minus their sum stands in the ranking. A row with one entry above
            0 is as its class.
        alpha: weight of ``L_target``, at least 0.
        beta: weight of ``L_non``, at least 0.
        mu: weight of ``L_weak``, at least 0.
        ranking: what ``s`` is: ``"log_probability"``, ``log p`` as in the official code, where the network's own
            ranking decides almost alone, or ``"probability"``, ``p`` as in the paper.

    Returns:
        Scalar.

    Raises:
        ValueError: for other shapes, numbers out of range, another ``ranking``, a label matrix of two classes, and for
            a target out of range or rows that do not sum to 1 (which only a CPU is asked for).

    Source: arXiv 2303.13005, section 3.3.
    """
    check_shapes(logits=(logits, "BC"), weak_logits=(weak_logits, "BC"))
    check_target_or_matrix(logits, target)
    check_numbers(least=0, alpha=alpha, beta=beta, mu=mu)
    if ranking not in ("log_probability", "probability"):
        raise ValueError(f"ranking must be 'log_probability' or 'probability', got {ranking!r}: give one of them")
    logits, weak_logits = at_least_float32(logits, weak_logits)
    shares, label, share = _two_largest(target, logits)
    there = share > 0
    log_p, log_w = logits.log_softmax(1), weak_logits.log_softmax(1)

    squared = log_p.detach().gather(1, label).exp().square()
    mean = (squared * there).sum(0) / there.sum(0).clamp(min=1)
    factor = (squared + share - mean) * there
    of_target = -(factor * log_p.gather(1, label)).sum(1).mean()

    of_weak = soft_cross_entropy(weak_logits, 0.9 * shares + 0.1 / logits.shape[1])

    with torch.no_grad():
        w, s = log_w.exp(), log_p if ranking == "log_probability" else log_p.exp()
        score = _by_others(w, label, there) + _by_others(s, label, there)
        rank = score.argsort(dim=1, descending=True, stable=True).argsort(1)  # equal ones in the order of the classes
        is_target = torch.zeros_like(rank, dtype=torch.bool).scatter(1, label, there)
        soft = (1 / (rank + 1).to(logits.dtype)).masked_fill(is_target, 0)
        soft = soft / soft.sum(1, keepdim=True)
    log_others = logits - logits.masked_fill(is_target, -torch.inf).logsumexp(1, keepdim=True)
    of_others = -(soft * log_others).sum(1).mean()
    return alpha * of_target + beta * of_others + mu * of_weak


def _by_others(values: Tensor, label: Tensor, there: Tensor) -> Tensor:
    """``values`` by what the targets leave of 1."""
    return values / (1 - (values.gather(1, label) * there).sum(1, keepdim=True) + 1e-6)


def _two_largest(target: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The label matrix, the classes with the largest shares and these, ``[B, 2]``; ``[B, 1]`` of one class a sample."""
    if target.ndim == 1:
        shares = F.one_hot(target, logits.shape[1]).to(logits.dtype)
        return shares, target[:, None], shares.new_ones(len(target), 1)
    if logits.shape[1] < 3:
        raise ValueError(
            f"a label matrix must have at least 3 classes, got {list(target.shape)}: two targets leave no other class; "
            "give one class a sample"
        )
    shares = target.to(logits.dtype)
    share, label = shares.sort(dim=1, descending=True, stable=True)
    return shares, label[:, :2], share[:, :2]


class USKD(SupervisedTask):
    """USKD (Yang et al., ICCV 2023, arXiv 2303.13005): universal self-knowledge distillation, without a teacher.

    The loss is cross-entropy plus ``uskd_loss``. The weak head, a linear layer on the pooled output of the stage
    before the last, is trained along and is no part of the network: ``network.pt`` and exports are without it. Targets
    may be label matrices ``[B, C]``, as of a loader that mixes images.

    Several processes: losses are means over each process's own batch, also inside the factor of the target.

    Args:
        network: see ``SupervisedTask``.
        num_classes: see ``Task``.
        alpha: weight of the soft label of the target: 0.1 on CIFAR-100, 1 on ImageNet.
        beta: weight of the soft labels of the other classes: 0.1.
        mu: weight of the weak head: 0.1 on CIFAR-100, 0.005 on ImageNet.
        ranking: see ``uskd_loss``.
        feature_layer: module path of what the weak head sees: a map ``[B, D, H, W]``, which is averaged, tokens
            ``[B, T, D]``, of which the first is taken (``blocks.2`` of a ViT with a class token), or ``[B, D]``.
            Default: the second-to-last stage, as ``StageFeatures`` finds it.
        ce_weight: weight of the cross-entropy.
        kwargs: ``input_shape``, ``weights`` of ``SupervisedTask``, and the arguments of ``FineTunedTask`` and ``Task``.

    Raises:
        ValueError: for a network of fewer than two stages, and a ``feature_layer`` that it does not have or that gives
            something else.
    """

    def __init__(
        self,
        network: str | nn.Module,
        num_classes: int,
        *,
        alpha: float = 0.1,
        beta: float = 0.1,
        mu: float = 0.1,
        ranking: Literal["log_probability", "probability"] = "log_probability",
        feature_layer: str | None = None,
        ce_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, num_classes, **kwargs)
        check_numbers(least=0, alpha=alpha, beta=beta, mu=mu, ce_weight=ce_weight)
        if ranking not in ("log_probability", "probability"):
            raise ValueError(f"ranking must be 'log_probability' or 'probability', got {ranking!r}: give one of them")
        self.alpha, self.beta, self.mu, self.ranking, self.ce_weight = alpha, beta, mu, ranking, ce_weight
        self.loss_is_plain = ce_weight == 1
        self._feature_layer = feature_layer
        self._tap = None if feature_layer is None else Tap(self.network, feature_layer)
        self._stages = self._found_stages() if feature_layer is None else None
        self.weak_head = nn.Linear(self._feature_width(), num_classes)

    def training_target(self, batch: Any) -> Tensor | None:
        target = super().training_target(batch)
        return None if target is None else main_class(target)  # the loss looks at a matrix

    def loss(self, output: Any, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        weak_logits = self.weak_head(self._pooled())
        own = uskd_loss(logits, weak_logits, target, self.alpha, self.beta, self.mu, self.ranking)
        return {"ce": self.ce_weight * self.problem.loss(logits, target), "uskd": own}

    def _found_stages(self) -> StageFeatures:
        name = type(self.network).__name__
        try:
            stages = StageFeatures(self.network, self.input_shape)
        except ValueError as error:
            raise ValueError(
                f"no second-to-last stage of {name} is found: name what the weak head sees by feature_layer ({error})"
            ) from error
        if len(stages.paths) < 2:
            raise ValueError(
                f"{name} must have at least 2 stages, got {stages.paths}: name what the weak head sees by feature_layer"
            )
        return stages

    def _pooled(self) -> Tensor:
        """``[B, D]`` of the latest forward pass."""
        if self._stages is not None:
            return self._stages.pop().maps[-2].mean((2, 3))
        assert self._tap is not None
        value = self._tap.pop()
        if value.ndim not in (2, 3, 4):
            raise ValueError(
                f"feature_layer {self._feature_layer!r} must give [B, D], [B, T, D] or [B, D, H, W], got "
                f"{list(value.shape)}: name another module"
            )
        return value if value.ndim == 2 else value[:, 0] if value.ndim == 3 else value.mean((2, 3))

    def _feature_width(self) -> int:
        if self._stages is not None:
            return self._stages.shapes.maps[-2][0]
        example = next(self.network.parameters())
        image = torch.zeros(1, *self.input_shape).to(example)
        with eval_mode(self.network), torch.no_grad(), same_random_state(example.device):
            self.network(image)
        return self._pooled().shape[1]
