"""MoGD: weight candidate labels by whether they lower the loss on a few samples with true labels.

Bo-Shi Zou, Ming-Kun Xie, Sheng-Jun Huang. Meta Objective Guided Disambiguation for Partial Label Learning. arXiv
2208.12459. No official code was found. What the abstract leaves open follows learning to reweight examples (Ren et al.,
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
    """Gradient of the meta loss after a virtual step with respect to the weight of each candidate label.

    The virtual step is one step of gradient descent with learning rate ``lr`` on ``1/B sum_ij w_ij S_ij l_ij``, where
    ``l_ij`` is the cross-entropy of sample ``i`` with label ``j``. With ``u`` the gradient of the meta loss after that
    step, the derivative with respect to ``w_ij`` is ``-lr/B <u, grad l_ij>``. For all ``i`` and ``j`` together this is
    one directional derivative of ``log softmax`` along ``u``, computed in forward mode. It is exact, also for batch
    norm in training mode, and needs no second derivatives.

    Several processes: each has a part, of equal size, of both batches, and gets the same values for its rows as a
    single process would.

    Args:
        forward: function from parameters by name and ``x`` to logits ``[B, K]``, like ``torch.func.functional_call``.
            It is called three times and must use the same random masks each time; running statistics must be copies.
        parameters: the parameters that the virtual step changes, by name.
        x: the samples, ``[B, ...]``.
        candidates: ``S``, ``[B, K]``, above 0 where a class is a candidate.
        meta_x: samples with true labels, ``[M, ...]``.
        meta_target: int64 ``[M]``, their labels.
        weights: ``w``, ``[B, K]``, the weights in the virtual step; ``None`` for zeros, which saves a pass.
        lr: learning rate of the virtual step, at least 0.

    Returns:
        ``[B, K]``, without gradient; 0 for labels that are no candidates, as their weights have no effect.

    Raises:
        ValueError: if the shapes do not match, a sample has no candidate, a meta label is out of range, or there is no
            meta sample.
        RuntimeError: if ``forward`` uses an operation that has no derivative in forward mode.

    Source: arXiv 2208.12459; the closed form of the derivative was derived for this package.
    """
    check_numbers(least=0, lr=lr)
    slope = meta_slopes(forward, parameters, x, candidates, meta_x, meta_target, weights, lr)
    return slope * (lr / (len(x) * process_count()))


@plain_attention()  # fused attention has no derivative in forward mode
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
    """``-<u, grad l_ij>``, the ``candidate_meta_gradient`` without its factor ``lr/B``; arguments as there."""
    if len(candidates) != len(x):
        raise ValueError(
            f"candidates must have a row for each of {len(x)} samples, got {len(candidates)}: take both from one batch"
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
                f"forward has an operation without a derivative in forward mode ({str(error).splitlines()[0]}): use "
                "another network, or MoGD with meta_layer='head'"
            ) from error
        check_shapes(logits=(logits, "BK"), candidates=(candidates, "BK"))
        slope = forward_ad.unpack_dual(at_least_float32(logits)[0].log_softmax(1)).tangent
        if slope is None:
            raise RuntimeError(
                "forward must use the parameters it gets, but its logits do not depend on them: pass them on"
            )
        return slope.masked_fill(~there, 0.0)


def _likelihood(logits: Tensor, there: Tensor, weights: Tensor) -> Tensor:
    """The weighted log-likelihood of the candidates, the mean over samples."""
    check_shapes(logits=(logits, "BK"), candidates=(there, "BK"))
    (logits,) = at_least_float32(logits)
    return (logits.log_softmax(1) * (weights * there)).sum() / len(logits)


def _meta_loss(logits: Tensor, target: Tensor) -> Tensor:
    check_target(logits, target, "meta_target")
    if not len(target):
        raise ValueError("meta_target must be of one sample or more, got none: give samples with true labels")
    (logits,) = at_least_float32(logits)
    return F.cross_entropy(logits, target)


def _gradients(loss: Callable[[dict[str, Tensor]], Tensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of ``loss`` at ``values``, by name, averaged over all processes."""
    with torch.enable_grad():
        leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
        found = torch.autograd.grad(loss(leaves), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, averaged(found), strict=True))


class MoGD(CandidateTask):
    """MoGD (Zou et al., arXiv 2208.12459): learn from candidates, weighted with the help of a small clean meta set.

    Each sample comes with several candidate labels, of which one is true. A few further samples, the meta set, have
    true labels. In every step the method computes which candidates of the batch, if learnt, would lower the loss on the
    meta set, raises their weights, and then trains the network with the new weights.

    In detail, the weights of the batch make one gradient step on the loss of meta samples after a virtual step of the
    network (see ``candidate_meta_gradient``). The virtual step is plain gradient descent, whatever the optimizer.

    This is a reconstruction from the abstract: the step of the weights, their start and their normalisation are those
    of learning to reweight examples (arXiv 1803.09050).

    The data module needs ``meta_per_class``; meta samples do not enter the training loss. Metrics and the report are
    those of ``CandidateTask``.

    Several processes: both gradients are averaged, every process has its part of the meta batch, and weights are
    exchanged at the end of an epoch. With ``normalization="batch"`` each process normalises its own batch.

    Args:
        network: see ``CandidateTask``.
        num_classes: see ``Task``.
        init: weights before the step. ``"confidence"``: those from the sample's previous step, equal ones at first;
            ``"zero"``: zeros.
        normalization: ``"example"``: the weights of each sample sum to 1; ``"batch"``: those of the batch do, so that a
            sample without a helpful candidate is left out; see ``updated_weights``.
        weight_step: step size of the weights, above 0, for the gradient ``-<u, grad l_ij>`` without its factor
            ``lr/B``. It has no effect with ``init="zero"``.
        virtual_lr: learning rate of the virtual step, at least 0. Default: the current one of the optimizer's first
            group.
        meta_layer: parameters that the virtual step changes: ``"all"`` trained ones, or ``"head"``, only the
            classifier, which is much faster.
        meta_batch_size: meta samples per step and process, at most the size of the meta set.
        warmup_epochs: number of epochs with equal weights of the candidates.
        classifier: module path of the classifier, used by ``"head"``. Default: the last ``nn.Linear``.
        kwargs: ``input_shape``, ``weights`` of ``SupervisedTask``, and the arguments of ``FineTunedTask`` and ``Task``.

    Raises:
        ValueError: if an argument is out of range; in a fit, if the data has no candidates or no meta set.
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
        if self._head is None and not second_pass():  # before the pass that builds a graph, to save memory
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
        """The weights ``[B, K]`` for the loss of a batch, and the weights ``[B, K]`` normalised for each sample.

        Args:
            batch: the samples with candidates and the meta samples.
            feature: input of the classifier for the batch, if ``meta_layer="head"``, else ``None``.
        """
        assert self.stored is not None
        labelled, meta = batch
        candidates = self.candidates_of(labelled)
        if self.current_epoch < self.warmup_epochs:
            return (uniform_weights(candidates),) * 2
        start = self.stored_weights(labelled) if self.init == "confidence" else None
        lr = float(self.trainer.optimizers[0].param_groups[0]["lr"]) if self.virtual_lr is None else self.virtual_lr
        with self.stateless_forward() as forward:
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
