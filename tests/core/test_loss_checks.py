"""Argument checks of all losses: shapes that would be broadcast, wrong targets and temperatures raise."""

import inspect
import math

import numpy as np
import pytest
import torch

import lightning_kd
from lightning_kd import distillation, noisy_labels, weak_labels
from lightning_kd.active_learning import dcfs, dcfs_selection, lfosa
from lightning_kd.active_learning.bual_score import complementary_labels
from lightning_kd.core import dirichlet, losses
from lightning_kd.core.registry import family_packages
from lightning_kd.noisy_labels import bldr_losses, dpc, mixmatch

B, C = 4, 3


def logits(seed, columns=C):
    return torch.randn(B, columns, generator=torch.Generator().manual_seed(seed))


A, Z, P = logits(0), logits(1), logits(2).softmax(1)
TARGET, OTHER = torch.tensor([0, 2, 1, 2]), torch.tensor([1, 1, 2, 0])
WEIGHT = torch.tensor([0.5, 1.0, 0.0, 2.0])
LABELS, E = (logits(5) > 0).float(), logits(6, 2 * C).unflatten(1, (C, 2))  # labels of an image, and their embeddings
PIXELS, OTHER_PIXELS = (logits(k, 2 * C * 4).view(2 * B, C, 2, 2) for k in (7, 8))
CLASSES = torch.arange(8 * B).view(2 * B, 2, 2) % (C + 1) - 1  # class of each pixel, -1 is ignored
ANNOTATIONS = torch.tensor([[0, -1], [2, 1], [-1, 1], [1, 1]])
U, V = logits(3).sigmoid() / 9, logits(4).sigmoid() / 9

# valid arguments of every loss
CASES = {
    distillation.kd_loss: (A, Z, 2.0),
    distillation.dkd_loss: (A, Z, TARGET, 1.0, 2.0, 2.0),
    distillation.dist_loss: (A, Z, 1.0, 2.0, 4.0),
    distillation.nkd_loss: (A, Z, TARGET, 2.0, 1.5),
    distillation.uskd_loss: (A, Z, TARGET, 1.0, 1.0, 1.0),
    distillation.binary_kl_loss: (A, Z, 2.0),
    distillation.binary_kl_norm_loss: (A, Z, 2.0),
    distillation.multi_label_logits_loss: (A, Z),
    distillation.partial_softmax_loss: (A, Z, LABELS),
    distillation.class_aware_loss: (E, E.flip(0), LABELS),
    distillation.instance_aware_loss: (E, E.flip(0), LABELS),
    distillation.distance_loss: (A, Z),
    distillation.angle_loss: (A, Z),
    distillation.pkt_loss: (A, Z),
    distillation.attention_loss: (PIXELS, OTHER_PIXELS),
    distillation.nst_loss: (PIXELS, OTHER_PIXELS),
    distillation.similarity_loss: (PIXELS, OTHER_PIXELS),
    distillation.hierarchical_context_loss: (PIXELS, OTHER_PIXELS),
    distillation.symmetric_kl_loss: (A, Z),
    distillation.jensen_shannon_loss: (A, Z),
    distillation.discriminator_loss: (lambda logits: logits[:, :2], A, Z),
    distillation.contrast_loss: (P, 10),
    distillation.norm_direction_loss: (A, Z, P[:C], TARGET),
    distillation.easy_first_loss: (PIXELS, PIXELS, CLASSES, torch.rand(2 * B, 2, 2)),
    distillation.disputed_loss: (PIXELS, PIXELS, OTHER_PIXELS, OTHER_PIXELS, CLASSES),
    distillation.pixel_kd_loss: (PIXELS, OTHER_PIXELS, 2.0),
    distillation.cwd_loss: (PIXELS, OTHER_PIXELS, 4.0),
    weak_labels.weighted_candidate_loss: (A, P),
    weak_labels.candidate_likelihood_loss: (A, torch.ones(B, C)),
    weak_labels.crowd_loss: (torch.stack([P, P], 2), ANNOTATIONS),
    losses.asymmetric_loss: (A, LABELS),
    losses.soft_cross_entropy: (A, P),
    losses.z_loss: (A, TARGET),
    losses.negative_learning_loss: (A, TARGET, 0.0, WEIGHT),
    noisy_labels.negative_learning_loss: (A, TARGET),
    dirichlet.calibrated_softmax: (A, 1.0),
    dirichlet.log_calibrated_softmax: (A, 1.0),
    dirichlet.dirichlet_nll: (A, TARGET, 1.0),
    dirichlet.dirichlet_kl: (A, TARGET, 1.0),
    noisy_labels.gce_loss: (A, TARGET, 0.7),
    noisy_labels.sce_loss: (A, TARGET, 1.0, 1.0),
    noisy_labels.mixup_loss: (A, TARGET, OTHER, 0.3),
    noisy_labels.coteaching_losses: (A, Z, TARGET, 0.25),
    noisy_labels.elr_regularizer: (A, P),
    mixmatch.sharpen: (P, 0.5),
    mixmatch.prior_penalty: (P,),
    dpc.consistency_loss: (A, Z, 1.0),
    bldr_losses.corrected_probabilities: (A, U, V, TARGET),
    bldr_losses.corrected_cross_entropy: (P, TARGET, WEIGHT),
    bldr_losses.separation_loss: (A, U, V, TARGET),
    bldr_losses.balance_loss: (P,),
    bldr_losses.consistency_loss: (A, Z),
    bldr_losses.complementary_loss: (A, TARGET, OTHER, WEIGHT),
    bldr_losses.positive_loss: (A, TARGET, U, V, WEIGHT, 0.1),
    bldr_losses.negative_loss: (A, TARGET, OTHER, WEIGHT),
    bldr_losses.exit_distillation_loss: (A, Z, 3.0),
    bldr_losses.exit_feature_loss: (A, Z),
    bldr_losses.agreement_loss: (A, Z),
    lfosa.temperature_cross_entropy: (A, TARGET, C - 1, 0.5, 0.5),
    dcfs.discrepancy_loss: (A, Z, TARGET),
    dcfs.evidential_nll: (A, TARGET),
    dcfs.evidential_kl: (A, TARGET),
    dcfs.head_discrepancy: (P, P.flip(0)),
    dcfs_selection.uncertainty_score: (WEIGHT, WEIGHT),
    dcfs_selection.coarse_to_fine: (WEIGHT, WEIGHT, 2),
}
TENSORS = [
    pytest.param(function, k, id=f"{function.__name__}-{k}")
    for function, args in CASES.items()
    for k, value in enumerate(args)
    if isinstance(value, torch.Tensor)
]
WITH_GAPS = (CLASSES, ANNOTATIONS)  # -1 where there is no label
TARGETS = [case for case in TENSORS if CASES[case.values[0]][case.values[1]].dtype == torch.int64]


def replaced(function, k, value):
    return (*CASES[function][:k], value, *CASES[function][k + 1 :])


def test_every_public_loss_has_a_case():
    words = ("loss", "losses", "regularizer", "nll", "kl", "penalty", "discrepancy", "cross_entropy")
    named = {getattr(package, name) for package in family_packages() for name in package.__all__}
    named |= {getattr(bldr_losses, name) for name in bldr_losses.__all__}
    found = {f for f in named if inspect.isfunction(f) and f.__name__.endswith(words)}
    assert len(found) > 15
    assert {f.__name__ for f in found} <= {f.__name__ for f in CASES}


@pytest.mark.parametrize("function", CASES, ids=lambda f: f.__name__)
def test_valid_arguments_give_finite_losses(function):
    out = function(*CASES[function])
    assert all(part.isfinite().all() for part in (out if isinstance(out, tuple) else (out,)))


SIZES = {"logits": 15, "feature": 50, "map": 50, "embedding": 50}  # factors: as large as networks make them


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("function", CASES, ids=lambda f: f.__name__)
def test_half_precision_is_computed_in_float32(function, dtype):
    def outcome(wide):
        leaves = []
        for name, value in zip(inspect.signature(function).parameters, CASES[function], strict=False):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                factor = max(factor if word in name else 1 for word, factor in SIZES.items())
                value = (factor * value).to(dtype)
                value = (value.float() if wide else value).requires_grad_()
            leaves.append(value)
        torch.set_default_dtype(torch.float32 if wide else dtype)  # as the Trainer does around a step
        try:
            out = function(*leaves)
        finally:
            torch.set_default_dtype(torch.float32)
        parts = [part for part in (out if isinstance(out, tuple) else (out,)) if part.is_floating_point()]
        if parts and parts[0].requires_grad:
            sum(part.sum() for part in parts).backward()
        return parts, [value.grad for value in leaves if isinstance(value, torch.Tensor) and value.grad is not None]

    (expected, slopes), (found, gradients) = outcome(wide=True), outcome(wide=False)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # compares the dtype too
    assert len(gradients) == len(slopes)
    for gradient, slope in zip(gradients, slopes, strict=True):
        worst = (gradient.float() - slope).abs().max()
        assert worst <= 0.01 * slope.abs().max() + 1e-6


@pytest.mark.parametrize(("function", "k"), TENSORS)
def test_tensor_of_another_shape_raises_instead_of_broadcasting(function, k):
    value = CASES[function][k]
    wrong = [value[..., None], value[:1], value[None]]
    name = list(inspect.signature(function).parameters)[k]
    if value.ndim == 2 and name not in ("student_feature", "teacher_feature"):  # their widths may differ
        wrong += [value[:, :1]]
    alone = sum(isinstance(other, torch.Tensor) for other in CASES[function]) == 1
    for tensor in wrong[:1] if alone else wrong:
        if function.__name__ == "negative_learning_loss" and k == 1 and len(tensor) == B:
            continue  # [B, M] is allowed: several classes for each sample
        with pytest.raises(ValueError, match=r"must (both )?be .*\["):
            function(*replaced(function, k, tensor))


@pytest.mark.parametrize(("function", "k"), TARGETS)
def test_target_out_of_range_or_of_another_dtype_raises(function, k):
    name = list(inspect.signature(function).parameters)[k]
    gaps = any(CASES[function][k] is value for value in WITH_GAPS)
    for bad in (9, -2, -100) if gaps else (9, -1, -100):
        values = r"(between -1 .*|classes from 0 to 2, or -1 .*)" if gaps else "between 0 and ."
        with pytest.raises(ValueError, match=f"{name} must be {values}, got .*: .*correct"):
            function(*replaced(function, k, CASES[function][k].clone().fill_(bad)))
    with pytest.raises(ValueError, match=f"{name} must be (int64|integers)"):
        function(*replaced(function, k, CASES[function][k].float()))


TEMPERATURES = [
    pytest.param(function, name, id=f"{function.__name__}-{name}")
    for function in CASES
    for name in inspect.signature(function).parameters
    if name.endswith("temperature")
    or name == "tau"
    or (name == "gamma" and function not in (distillation.dist_loss, distillation.nkd_loss))  # a weight in these
]


@pytest.mark.parametrize("bad", [0, -1.0, math.nan, math.inf, None, "2", torch.tensor(-1.0)])
@pytest.mark.parametrize(("function", "name"), TEMPERATURES)
def test_temperature_that_is_not_above_0_raises(function, name, bad):
    bound = inspect.signature(function).bind(*CASES[function])
    with pytest.raises(ValueError, match=f"{name} must be above 0, got "):
        function(**{**bound.arguments, name: bad})


def test_learnable_temperature_gets_a_gradient():
    temperature = torch.tensor(2.0, requires_grad=True)
    distillation.kd_loss(A, Z, temperature).backward()
    assert temperature.grad.isfinite()


@pytest.mark.parametrize(
    "function",
    [f for f in CASES if "teacher_logits" in inspect.signature(f).parameters],
    ids=lambda f: f.__name__,
)
def test_no_gradient_reaches_the_teacher(function):
    bound = inspect.signature(function).bind(*CASES[function])
    student = next(name for name, value in bound.arguments.items() if isinstance(value, torch.Tensor))
    leaves = {name: bound.arguments[name].clone().requires_grad_() for name in (student, "teacher_logits")}
    function(**{**bound.arguments, **leaves}).backward()
    assert leaves[student].grad.abs().sum() > 0
    assert leaves["teacher_logits"].grad is None


def test_align_gradients_of_different_shapes_raises():
    with pytest.raises(ValueError, match=r"primary and auxiliary .* at 1"):
        lightning_kd.align_gradients([A, torch.zeros(3)], [Z, torch.zeros(1)])


def test_bldr_losses_with_wrong_views_rows_or_no_samples_raise():
    with pytest.raises(ValueError, match=r"logits must be \[B, C\], or \[2B, C\]"):
        bldr_losses.positive_loss(A.repeat(3, 1), TARGET, U, V, WEIGHT, 0.1)
    with pytest.raises(ValueError, match=r"gradient must be \[2, 3\], got \[1, 3\]"):
        bldr_losses.update_rows(torch.zeros(5, 3), torch.tensor([0, 1]), torch.ones(1, 3), 1.0)
    with pytest.raises(ValueError, match=r"probability must be \[n\]"):
        bldr_losses.reweight(torch.zeros(0))


def test_unknown_dcfs_options_and_float_bual_targets_raise():
    with pytest.raises(ValueError, match="measure must be one of l1, js, got 'l2'"):
        dcfs.head_discrepancy(P, P, "l2")
    with pytest.raises(ValueError, match="how must be one of sum"):
        dcfs_selection.uncertainty_score(WEIGHT, WEIGHT, "total")
    with pytest.raises(ValueError, match="target must be int64"):
        complementary_labels(WEIGHT, 3, np.random.default_rng(0))
    assert dcfs.discrepancy_loss(A, Z, torch.full((B,), C)) <= 0  # K, the unknown class, is a valid target


@pytest.mark.parametrize(
    "function", [distillation.dkd_loss, distillation.nkd_loss, bldr_losses.complementary_loss, noisy_labels.gce_loss]
)
def test_losses_run_on_the_meta_device_without_reading_values(function):
    args = [value.to("meta") if isinstance(value, torch.Tensor) else value for value in CASES[function]]
    assert function(*args).shape == ()  # reading a value would raise there
