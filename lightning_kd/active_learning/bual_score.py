"""The parts of BUAL that work without Lightning: complementary labels, copying a backbone, and the query's score."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from lightning_kd.active_learning.evidential_uncertainty import wide
from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.scaling import min_max

Uncertainty = Literal["least_confidence", "margin", "entropy"]
Combine = Literal["code", "paper"]


def complementary_labels(target: Tensor, num_known: int, generator: np.random.Generator) -> Tensor:
    """A complementary label for each sample: one class that the sample is told not to have.

    Args:
        target: int64 ``[B]``: 0 to K-1 for a labelled sample, whose class is drawn uniformly from the K-1 others; -1
            for a sample of the pool, whose class is drawn uniformly from all K.
        num_known: K, 2 or more.
        generator: source of random numbers; one draw for each sample, in their order.

    Returns:
        int64 ``[B]`` on the device of ``target``.

    Raises:
        ValueError: for fewer than 2 classes, and for a target out of range.

    Source: arXiv 2402.15198, section 3.2 (random label negative learning).
    """
    check_numbers(least=2, whole=True, remedy="with one class no label is complementary", num_known=num_known)
    if target.ndim != 1 or target.dtype != torch.int64:
        raise ValueError(f"target must be int64 [B], got {target.dtype} {list(target.shape)}: give one class for each")
    given = target.cpu().numpy()
    if len(given) and not -1 <= given.min() <= given.max() < num_known:
        raise ValueError(
            f"target must be between -1 (no label) and {num_known - 1}, got {given.min()} to {given.max()}: leave out "
            "samples of unknown classes"
        )
    hidden = given == -1
    draw = generator.integers(0, np.where(hidden, num_known, num_known - 1))
    return torch.from_numpy(np.where(hidden, draw, (given + 1 + draw) % num_known)).to(target)


def copy_backbone(source: nn.Module, target: nn.Module, classifier: str) -> None:
    """Copy the weights and buffers of ``source`` into ``target``, except those of the module ``classifier``.

    Raises:
        ValueError: if the two networks differ in more than the classifier.
    """
    head = f"{classifier}."
    backbone = {name: value for name, value in source.state_dict().items() if not name.startswith(head)}
    missing, unexpected = target.load_state_dict(backbone, strict=False)
    strange = [name for name in missing if not name.startswith(head)] + unexpected
    if strange:
        raise ValueError(
            f"the networks must differ in classifier {classifier!r} only, got a difference in {strange[:4]}: build "
            "both from the same network"
        )


def unknown_log_odds(logits: Tensor) -> Tensor:
    """Log-odds float64 ``[B]`` of the last class from logits ``[B, K+1]``.

    They still order samples whose probability is rounded to 1.
    """
    logits = wide(logits)
    return logits[:, -1] - logits[:, :-1].logsumexp(1)


def check_finite(**values: Tensor) -> None:
    """Raise a ``ValueError`` that names the first of ``values``, ``[N, ...]`` each, with NaN or infinite entries."""
    for name, value in values.items():
        bad = int((~value.isfinite()).reshape(len(value), -1).any(1).sum()) if len(value) else 0
        if bad:
            raise ValueError(
                f"{name} must be finite, got {bad} of {len(value)} samples that are not: train with a lower learning "
                "rate"
            )


def confidence(probabilities: Tensor, uncertainty: Uncertainty) -> Tensor:
    """The confidence of predictions, float64 ``[N]`` from probabilities ``[N, K]``: the largest probability, the margin
    (largest minus second largest), or the negative entropy in nats."""
    p = probabilities.double()
    if uncertainty == "least_confidence":
        return p.amax(1)
    if uncertainty == "margin":
        first, second = p.topk(2, dim=1).values.unbind(1)
        return first - second
    if uncertainty == "entropy":
        return torch.special.xlogy(p, p).sum(1)
    raise ValueError(f"uncertainty must be 'least_confidence', 'margin' or 'entropy', got {uncertainty!r}")


def bidirectional_score(
    negative_probs: Tensor,
    positive_probs: Tensor,
    unknown_probability: Tensor | None = None,
    balance: float = 0.0,
    uncertainty: Uncertainty = "least_confidence",
    combine: Combine = "code",
    normalize_aux: bool = True,
) -> Tensor:
    """BUAL's score of each sample, from the probabilities of a negatively and of a positively trained head.

    With ``combine="code"``, as in the official code, the LOWEST scores are queried:
    ``w n(c(P-)) + r (1 - w) n(c(p+))``. ``P-`` and ``p+`` are the probabilities of the negative and of the positive
    head, ``c`` is the confidence (largest probability, margin, or negative entropy), ``n`` min-max scaling over the
    given samples (0 if all are equal) and ``w = n(a)``. Without ``unknown_probability``: ``n(c(P-)) + r n(c(p+))``.

    With ``combine="paper"``, as in equation 3, the HIGHEST scores are queried: ``a u(P-) + r (1 - a) u(p+)``, not
    scaled. ``u`` is the uncertainty: 1 - largest probability, 1 - margin, or the entropy. Without
    ``unknown_probability``: ``u(P-) + r u(p+)``. The two rules give different queries.

    Args:
        negative_probs: ``[N, K]``, probabilities of the negative head, averaged over snapshots.
        positive_probs: ``[N, K]``, probabilities of the positive head.
        unknown_probability: ``a`` ``[N]``, probability of belonging to no known class. Default: ``None``, as in the
            first round.
        balance: ``r``, the share of known classes in the latest answers, in [0, 1]; with 0 the positive head has no
            influence.
        uncertainty: ``"least_confidence"``, ``"margin"`` or ``"entropy"``.
        combine: ``"code"`` or ``"paper"``, see above.
        normalize_aux: scale ``a`` with ``combine="code"``. Without it, a pool without unknown classes (``a`` near 0,
            ``r`` = 1) is ordered by the positive head alone.

    Returns:
        float64 ``[N]``. Because of the scaling it depends on all samples given: give all candidates at once.

    Raises:
        ValueError: for wrong shapes, values that are not finite, or an argument out of range.

    Source: arXiv 2402.15198, equations 3 to 6.
    """
    if negative_probs.shape != positive_probs.shape or negative_probs.ndim != 2 or negative_probs.shape[1] < 2:
        raise ValueError(
            f"negative_probs {list(negative_probs.shape)} and positive_probs {list(positive_probs.shape)} must both be "
            "[N, K] with K at least 2: give both heads the same samples and classes"
        )
    if unknown_probability is not None and unknown_probability.shape != negative_probs.shape[:1]:
        raise ValueError(
            f"unknown_probability must be [{len(negative_probs)}], got {list(unknown_probability.shape)}: give one "
            "number for each sample"
        )
    check_numbers(least=0, most=1, remedy="give the share of known classes in the answers", balance=balance)
    if combine not in ("code", "paper"):
        raise ValueError(f"combine must be 'code' or 'paper', got {combine!r}")
    check_finite(negative_probs=negative_probs, positive_probs=positive_probs)  # one NaN would turn all scores into 0
    if unknown_probability is not None:
        check_finite(unknown_probability=unknown_probability)
    negative, positive = confidence(negative_probs, uncertainty), confidence(positive_probs, uncertainty)
    a = None if unknown_probability is None else unknown_probability.double()
    if combine == "code":
        negative, positive = min_max(negative), min_max(positive)
        if a is not None and normalize_aux:
            a = min_max(a)
    else:
        whole = 0.0 if uncertainty == "entropy" else 1.0
        negative, positive = whole - negative, whole - positive
    if a is None:
        return negative + balance * positive
    return a * negative + balance * (1 - a) * positive


def not_unknown(probabilities: Tensor) -> Tensor:
    """Whether a known class is predicted, bool ``[N]`` from probabilities ``[N, K+1]``; a tie counts as known."""
    return probabilities[:, :-1].amax(1) >= probabilities[:, -1]


def rank(
    scores: Mapping[str, Tensor], balance: float, uncertainty: Uncertainty, combine: Combine, normalize_aux: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The samples in the order to query them, int64 ``[U]``, and their ``bidirectional_score``, float64 ``[U]``.

    First come the samples that ``unknown_probs`` does not predict as unknown, by score; then the others, without a
    score (NaN), by ``unknown_log_odds``. If all are predicted unknown, all get a score and are ordered by
    ``unknown_log_odds``, then by score. Ties: the lower confidence of ``positive_probs``, then the earlier sample.

    Args:
        scores: ``positive_probs`` and ``negative_probs`` ``[U, K]``; if the auxiliary network was trained,
            ``unknown_probs`` ``[U, K+1]`` and ``unknown_log_odds`` ``[U]``.
        balance: see ``bidirectional_score``, as the others.
        uncertainty: likewise.
        combine: likewise.
        normalize_aux: likewise.

    Raises:
        ValueError: for a sample without ``negative_probs`` (-1), and for values that are not finite.
    """
    negative, positive = scores["negative_probs"], scores["positive_probs"]
    missing = int((negative < 0).any(1).sum())
    if missing:
        raise ValueError(
            f"negative_probs is missing for {missing} of {len(negative)} samples: they were not in the pool when this "
            "round was trained, so train it again"
        )
    candidate, log_odds = torch.ones(len(negative), dtype=torch.bool), None
    if "unknown_probs" in scores:
        candidate, log_odds = not_unknown(scores["unknown_probs"]), scores["unknown_log_odds"].double()
        check_finite(unknown_probs=scores["unknown_probs"], unknown_log_odds=log_odds)
    all_unknown = not bool(candidate.any())
    scored = ~candidate if all_unknown else candidate
    a = None if log_odds is None else log_odds[scored].sigmoid()
    value = torch.full((len(negative),), torch.nan, dtype=torch.float64)
    value[scored] = bidirectional_score(
        negative[scored], positive[scored], a, balance, uncertainty, combine, normalize_aux
    )
    keys = [value if combine == "code" else -value, confidence(positive, uncertainty)]
    if log_odds is not None and all_unknown:
        keys = [log_odds, *keys]
    elif log_odds is not None:
        keys = [(~candidate).double(), torch.where(candidate, keys[0], log_odds), keys[1]]
    return np.lexsort([key.numpy() for key in reversed(keys)]), value.numpy()
