"""MoGD: of the candidate labels of a sample, those count that lower the loss on a few samples with clean labels.

Bo-Shi Zou, Ming-Kun Xie, Sheng-Jun Huang. Meta Objective Guided Disambiguation for Partial Label Learning. arXiv
2208.12459. No official code was found: what the abstract leaves open follows learning to reweight examples (Ren et al.,
ICML 2018, arXiv 1803.09050), applied to pairs of a sample and a candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.distributed import averaged, process_count
from lightning_kd.core.feature_hooks import Tap, find_classifier
from lightning_kd.core.losses import at_least_float32, check_shapes, check_target
from lightning_kd.core.precision import plain_attention
from lightning_kd.core.two_pass_step import second_pass
from lightning_kd.weak_labels.candidate_task import CandidateTask, Forward, MetaBatch
from lightning_kd.weak_labels.candidate_weights import (
    check_candidates,
    uniform_weights,
    updated_weights,
    weighted_candidate_loss,
)

__all__ = ["MoGD", "candidate_meta_gradient", "updated_weights"]


def candidate_meta_gradient(
    forward: Forward,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    candidates: Tensor,
    meta_x: Tensor,
    meta_target: Tensor,
    weights: Tensor | None,
    lr: float,
) -> Tensor:
    """How the meta loss after a virtual step changes with the weight of each candidate label.

    The virtual step goes by ``lr`` against the gradient of ``1/B sum_ij w_ij S_ij l_ij``, ``l_ij`` the cross-entropy
    of sample ``i`` with label ``j``. With ``u`` the gradient of the meta loss after it, the derivative in ``w_ij`` is
    ``-lr/B <u, grad l_ij>``. For all ``i`` and ``j`` at once that is one derivative of ``log softmax`` along ``u``, in
    forward mode: exact, also for batch norm in training mode, and without second derivatives.

    Several processes: each has a part of both batches, of one size, and gets what one process gets for these rows.

    Args:
        forward: from parameters by name and ``x`` to logits ``[B, K]``, as ``torch.func.functional_call`` does. It is
            called three times; random masks must be the same in each, and statistics of its own copies.
        parameters: those that the virtual step moves, by name.
        x: the samples.
        candidates: ``S``, ``[B, K]``, above 0 where a class is a candidate.
        meta_x: samples with clean labels.
        meta_target: int64 ``[M]``.
        weights: ``w``, ``[B, K]``, those of the virtual step; ``None`` for zeros, which spares a pass.
        lr: of the virtual step.

    Returns:
        ``[B, K]``, without gradient; 0 off the candidates, whose weights have no effect.

    Raises:
        ValueError: for shapes that do not belong together, a sample without candidates, meta labels out of range, and
            no meta sample.
        RuntimeError: where ``forward`` has an operation without a derivative in forward mode.

    Source: arXiv 2208.12459; the closed form of the derivative was derived for this package.
    """
    check_numbers(least=0, lr=lr)
    slope = meta_slopes(forward, parameters, x, candidates, meta_x, meta_target, weights, lr)
    return slope * (lr / (len(x) * process_count()))


@plain_attention()  # the fused one has no derivative in forward mode
def meta_slopes(
    forward: Forward,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    candidates: Tensor,
    meta_x: Tensor,
    meta_target: Tensor,
    weights: Tensor | None,
    lr: float,
) -> Tensor:
    """``-<u, grad l_ij>``, the meta gradient without its factor ``lr/B``; arguments as there."""
    if len(candidates) != len(x):
        raise ValueError(
            f"candidates must have a row for each of {len(x)} samples, got {len(candidates)}: give both of one batch"
        )
    there = check_candidates(candidates)
    start = {name: p.detach() for name, p in parameters.items()}
    moved = start
    if weights is not None:
        check_shapes(candidates=(candidates, "BK"), weights=(weights, "BK"))
        gradients = _gradients(lambda leaves: -_likelihood(forward(leaves, x), there, weights.detach()), start)
        moved = {name: p - lr * gradients[name] for name, p in start.items()}
    direction = _gradients(lambda leaves: _meta_loss(forward(leaves, meta_x), meta_target), moved)
    with torch.no_grad(), forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(p, direction[name]) for name, p in start.items()}
        try:
            logits = forward(duals, x)
        except (NotImplementedError, RuntimeError) as error:
            if "forward" not in str(error) and "jvp" not in str(error):
                raise
            raise RuntimeError(
                f"forward has an operation without a derivative in forward mode ({str(error).splitlines()[0]}): take "
                "another network, or meta_layer='head' of MoGD"
            ) from error
        check_shapes(logits=(logits, "BK"), candidates=(candidates, "BK"))
        slope = forward_ad.unpack_dual(at_least_float32(logits)[0].log_softmax(1)).tangent
        if slope is None:
            raise RuntimeError("forward must use the parameters it is given, got logits that do not depend on them")
        return slope.masked_fill(~there, 0.0)


def _likelihood(logits: Tensor, there: Tensor, weights: Tensor) -> Tensor:
    """The weighted log-likelihood of the candidates, the mean over samples."""
    check_shapes(logits=(logits, "BK"), candidates=(there, "BK"))
    (logits,) = at_least_float32(logits)
    return (logits.log_softmax(1) * (weights * there)).sum() / len(logits)


def _meta_loss(logits: Tensor, target: Tensor) -> Tensor:
    check_target(logits, target, "meta_target")
    if not len(target):
        raise ValueError("meta_target must be of one sample or more, got none: give samples with clean labels")
    (logits,) = at_least_float32(logits)
    return F.cross_entropy(logits, target)


def _gradients(loss: Callable[[dict[str, Tensor]], Tensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of ``loss`` at ``values``, by name, the mean over all processes."""
    with torch.enable_grad():
        leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
        found = torch.autograd.grad(loss(leaves), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, averaged(found), strict=True))


class MoGD(CandidateTask):
    """MoGD (Zou et al., arXiv 2208.12459): candidate labels get weights by what they do for a small clean meta set.

    In every step the weights of a batch go against the gradient of the loss on meta samples after a virtual step (see
    ``candidate_meta_gradient``), then the network is trained with them. A reconstruction from the abstract: the step
    of the weights, the starts and normalisations are those of learning to reweight examples (arXiv 1803.09050). The
    virtual step is plain gradient descent, whatever optimizer trains. The data has ``meta_per_class``; meta samples do
    not enter the training loss.

    Logs and report are those of ``CandidateTask``. Several processes: both gradients are averaged, each has its part
    of the meta batches, and weights are shared at the end of an epoch; by ``"batch"`` each normalises its own batch.

    Args:
        network: see ``CandidateTask``.
        num_classes: see ``Task``.
        init: the weights that a step starts from: ``"confidence"``, those of the sample from its last step, at first
            equal ones; or ``"zero"``.
        normalization: ``"example"``, the weights of each sample sum to 1; or ``"batch"``, those of the batch do, so
            that a sample without a candidate that helps is left out; see ``updated_weights``.
        weight_step: how far the weights go, above 0: factor of ``<u, grad l_ij>``, the meta gradient without its
            factor ``lr/B``. Without effect with ``init="zero"``.
        virtual_lr: of the virtual step, 0 or more. Default: the learning rate of the optimizer (of its first group).
        meta_layer: what the virtual step moves: ``"all"`` that is trained, or ``"head"``, the classifier alone, which
            costs little.
        meta_batch_size: meta samples a step and process, at most the meta set.
        warmup_epochs: epochs with equal weights of the candidates.
        classifier: with ``"head"``, the module path of the classifier. Default: the last ``nn.Linear``.
        kwargs: ``input_shape``, ``weights`` of ``SupervisedTask``, and the arguments of ``FineTunedTask`` and ``Task``.

    Raises:
        ValueError: for an argument out of range; in a fit, for data without candidates, or without the meta set.
    """

    needs_meta_set = True

    def __init__(
        self,
        network: str | nn.Module,
        num_classes: int,
        *,
        init: Literal["confidence", "zero"] = "confidence",
        normalization: Literal["example", "batch"] = "example",
        weight_step: float = 1.0,
        virtual_lr: float | None = None,
        meta_layer: Literal["all", "head"] = "all",
        meta_batch_size: int = 64,
        warmup_epochs: int = 0,
        classifier: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, num_classes, **kwargs)
        for name, value, known in (
            ("init", init, ("confidence", "zero")),
            ("normalization", normalization, ("example", "batch")),
            ("meta_layer", meta_layer, ("all", "head")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be {known[0]!r} or {known[1]!r}, got {value!r}: give one of them")
        check_numbers(above=0, weight_step=weight_step)
        check_numbers(least=0, optional=True, virtual_lr=virtual_lr)
        check_numbers(least=1, whole=True, meta_batch_size=meta_batch_size)
        check_numbers(least=0, whole=True, warmup_epochs=warmup_epochs)
        self.init, self.normalization, self.weight_step, self.virtual_lr = init, normalization, weight_step, virtual_lr
        self.meta_layer, self.meta_batch_size, self.warmup_epochs = meta_layer, meta_batch_size, warmup_epochs
        self._head: tuple[str, Tap] | None = None
        if meta_layer == "head":
            path, _ = find_classifier(self.network, classifier)
            self._head = path, Tap(self.network, path, side="input")

    def train_loader(self, data: Any) -> Any:
        return self.meta_loader(data, self.meta_batch_size)

    def training_step(self, batch: MetaBatch, batch_idx: int) -> Tensor:
        labelled = batch.labelled
        if self._head is None and not second_pass():  # before the pass with a graph, which takes memory
            self._chosen = self.choose_weights(batch, None)
        logits = self.training_logits(labelled.image)
        if self._head is not None:
            feature = self._head[1].pop()
            if not second_pass():
                self._chosen = self.choose_weights(batch, feature.detach())
        weights, rows = self._chosen
        self.log_true_weight(rows, labelled.target)
        return self.step_loss({"loss": weighted_candidate_loss(logits, weights)}, logits, labelled.target)

    def choose_weights(self, batch: MetaBatch, feature: Tensor | None) -> tuple[Tensor, Tensor]:
        """The weights ``[B, K]`` that a batch is trained with, and those of each sample, which sum to 1.

        Args:
            batch: with the meta samples.
            feature: what enters the classifier for the batch, with ``meta_layer="head"``.
        """
        assert self.stored is not None
        labelled, meta = batch
        candidates = self.candidates_of(labelled)
        if self.current_epoch < self.warmup_epochs:
            return (uniform_weights(candidates),) * 2
        start = self.stored_weights(labelled) if self.init == "confidence" else None
        lr = float(self.trainer.optimizers[0].param_groups[0]["lr"]) if self.virtual_lr is None else self.virtual_lr
        with self.aside() as forward:
            call, parameters = forward, {n: p for n, p in self.network.named_parameters() if p.requires_grad}
            x, meta_x = labelled.image, meta.image
            if feature is not None:
                with torch.no_grad():
                    forward({}, meta.image)
                assert self._head is not None
                path, tap = self._head
                x, meta_x = at_least_float32(feature, tap.pop())
                call, parameters = _linear, dict(self.network.get_submodule(path).named_parameters())
            own = dict(zip(parameters, at_least_float32(*parameters.values()), strict=True))
            slope = meta_slopes(call, own, x, candidates, meta_x, meta.target, start, lr)
        start = torch.zeros_like(slope) if start is None else start
        rows = updated_weights(start, slope, candidates, self.weight_step)
        self.stored.write(self.index_of(labelled), rows)
        if self.normalization == "example":
            return rows, rows
        return updated_weights(start, slope, candidates, self.weight_step, "batch") * len(rows), rows


def _linear(parameters: Mapping[str, Tensor], feature: Tensor) -> Tensor:
    return F.linear(feature, parameters["weight"], parameters.get("bias"))
