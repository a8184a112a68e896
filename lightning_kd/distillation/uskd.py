"""USKD: self-distillation with soft labels from the network's own output and a weak head, without a teacher.

Zhendong Yang, Ailing Zeng, Zhe Li, Tianke Zhang, Chun Yuan, Yu Li. From Knowledge Distillation to Self-Knowledge
Distillation: A Unified Approach with Normalized Loss and Customized Soft Labels. ICCV 2023, arXiv 2303.13005.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers, naming_argument
from lightning_kd.core.feature_hooks import Tap
from lightning_kd.core.label_matrix import check_target_or_matrix, main_class
from lightning_kd.core.losses import at_least_float32, check_shapes, soft_cross_entropy
from lightning_kd.core.stage_features import StageFeatures
from lightning_kd.core.supervised_task import SupervisedTask
from lightning_kd.core.trial_pass import trial_pass

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

    With ``p`` and ``w`` the softmax of ``logits`` and ``weak_logits``, and ``y`` the target class:

    - ``L_target = -(p_y^2 + 1 - m) log p_y``, where ``m`` is the mean of ``p_y^2`` over the batch: samples that the
      network already classifies well count more.
    - ``L_weak`` is the cross-entropy of the weak head with the label smoothed by 0.1.
    - ``L_non`` is the cross-entropy over the non-target classes. The soft label is ``1 / rank``, divided by its sum.
      All classes, including the target, are ranked by ``w_k / (1 - w_y + 1e-6) + s_k / (1 - s_y + 1e-6)``, where ``s``
      depends on ``ranking``.

    The factor in ``L_target`` and the soft label are computed from predictions and get no gradient.

    Args:
        logits: ``[B, C]``, ``C >= 2``; half precision is computed in float32, float64 stays.
        weak_logits: ``[B, C]``, logits of the weak head.
        target: int64 ``[B]``, or a label matrix ``[B, C]`` of mixed images. For a matrix the two largest entries
            ``v_c`` of a row are targets in ``L_target`` and ``L_non``, each with the factor ``p_c^2 + v_c - m``; ``m``
            is computed for the larger and for the smaller entries separately, and the ranking uses 1 minus the sum of
            both targets. A row with a single entry above 0 is treated like a class index.
        alpha: weight of ``L_target``, at least 0.
        beta: weight of ``L_non``, at least 0.
        mu: weight of ``L_weak``, at least 0.
        ranking: definition of ``s``: ``"log_probability"``: ``log p``, as in the official code, where the network's own
            ranking nearly always decides; ``"probability"``: ``p``, as in the paper.

    Returns:
        Scalar.

    Raises:
        ValueError: if the shapes differ, an argument is out of range, a label matrix has only two classes, or a target
            is out of range or a row does not sum to 1 (values are checked on a CPU only).

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
        rank = score.argsort(dim=1, descending=True, stable=True).argsort(1)  # ties in the order of the classes
        is_target = torch.zeros_like(rank, dtype=torch.bool).scatter(1, label, there)
        soft = (1 / (rank + 1).to(logits.dtype)).masked_fill(is_target, 0)
        soft = soft / soft.sum(1, keepdim=True)
    log_others = logits - logits.masked_fill(is_target, -torch.inf).logsumexp(1, keepdim=True)
    of_others = -(soft * log_others).sum(1).mean()
    return alpha * of_target + beta * of_others + mu * of_weak


def _by_others(values: Tensor, label: Tensor, there: Tensor) -> Tensor:
    """``values`` divided by 1 minus the values of the targets."""
    return values / (1 - (values.gather(1, label) * there).sum(1, keepdim=True) + 1e-6)


def _two_largest(target: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The label matrix, the classes of its two largest entries, and these entries.

    The latter two are ``[B, 2]``, or ``[B, 1]`` for class indices.
    """
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

    The network makes its own soft labels. Those of the target class come from its probabilities, those of the other
    classes from the ranking by the network and by a weak head (see ``uskd_loss``). The weak head is a linear layer on
    an earlier stage, trained along with the network.

    The loss is cross-entropy plus ``uskd_loss``. The weak head gets the pooled output of the second-to-last stage. It
    is not part of the network: ``network.pt`` and exports do not contain it. Targets may be label matrices ``[B, C]``,
    for example from a loader that mixes images.

    Several processes: losses are means over each process's own batch, also the mean ``m`` in ``L_target``.

    Args:
        network: see ``SupervisedTask``.
        num_classes: see ``Task``.
        alpha: weight of ``L_target``, the soft label of the target: 0.1 on CIFAR-100, 1 on ImageNet.
        beta: weight of ``L_non``, the soft labels of the other classes: 0.1.
        mu: weight of ``L_weak``, the loss of the weak head: 0.1 on CIFAR-100, 0.005 on ImageNet.
        ranking: see ``uskd_loss``.
        feature_layer: module path whose output is the input of the weak head: a map ``[B, D, H, W]``, or
            ``[B, H, W, D]`` as of Swin, which is averaged over positions; tokens ``[B, T, D]``, of which the first is
            used (``blocks.2`` of a ViT with a class token); or ``[B, D]``. Default: the second-to-last stage, see
            ``StageFeatures``.
        ce_weight: weight of the cross-entropy.
        kwargs: ``input_shape``, ``weights`` of ``SupervisedTask``, and the arguments of ``FineTunedTask`` and ``Task``.

    Raises:
        ValueError: if an argument is out of range, the network has fewer than two stages, or ``feature_layer`` does not
            exist or gives another shape.
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
        with naming_argument("feature_layer"):
            self._tap = None if feature_layer is None else Tap(self.network, feature_layer)
        self._stages = self._found_stages() if feature_layer is None else None
        self._channels_last_map = False
        self.weak_head = nn.Linear(self._feature_width(), num_classes)

    def training_target(self, batch: Any) -> Tensor | None:
        target = super().training_target(batch)
        return None if target is None else main_class(target)  # the loss checks a matrix itself

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
        """The input ``[B, D]`` of the weak head from the latest forward pass."""
        if self._stages is not None:
            return self._stages.pop().maps[-2].mean((2, 3))
        assert self._tap is not None
        value = self._tap.pop()
        if value.ndim not in (2, 3, 4):
            raise ValueError(
                f"feature_layer {self._feature_layer!r} must give [B, D], [B, T, D] or [B, D, H, W], got "
                f"{list(value.shape)}: name another module"
            )
        places = (1, 2) if self._channels_last_map else (2, 3)
        return value if value.ndim == 2 else value[:, 0] if value.ndim == 3 else value.mean(places)

    def _feature_width(self) -> int:
        if self._stages is not None:
            return self._stages.shapes.maps[-2][0]
        calls = [call for call in trial_pass(self.network, self.input_shape) if call.path == self._feature_layer]
        self._channels_last_map = bool(calls) and calls[-1].output_last
        return self._pooled().shape[1]
