"""The losses of RDD and of its baselines: numbers worked out by hand, and properties that must hold."""

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_kd.core.outputs import auxiliary_logits
from lightning_kd.distillation import cwd_loss, kd_loss
from lightning_kd.distillation.rdd import (
    disputed_loss,
    disputed_pixels,
    easy_first_loss,
    hard_pixels,
    pixel_kd_loss,
    relative_difficulty,
)


def noise(*shape, seed=0, scale=2.0, dtype=torch.float32):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def labels(classes=4, shape=(2, 6, 8), seed=1):
    target = torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(seed))
    target[:, 0] = -1
    return target


def logits_of(probabilities):
    """Logits ``[1, C, 1, N]`` with the given probabilities, a list for each pixel."""
    return torch.tensor(probabilities, dtype=torch.float64).log().T[None, :, None]


def logits_with_true_probability(probability, target, classes=3):
    """Logits whose true class has the probability given for each pixel ``[B, H, W]``."""
    rest = (1 - probability) / (classes - 1)
    truth = F.one_hot(target.clamp(min=0), classes).movedim(-1, 1).bool()
    return torch.where(truth, probability[:, None], rest[:, None]).log()


# -- the first stage -------------------------------------------------------------------------------------------------


def test_difficulty_weight_of_one_pixel_equals_worked_numbers():
    main, auxiliary = logits_of([[0.7, 0.2, 0.1]]), logits_of([[0.5, 0.3, 0.2]])
    weight = relative_difficulty(main, auxiliary, (1, 1))
    assert weight.shape == (1, 1, 1)
    assert -weight.log().item() == pytest.approx(0.092033, abs=5e-7)
    assert weight.item() == pytest.approx(0.912075, abs=5e-7)
    assert -relative_difficulty(auxiliary, main, (1, 1)).log().item() == pytest.approx(0.085123, abs=5e-7)


def test_difficulty_weight_is_enlarged_with_aligned_corners():
    main, auxiliary = logits_of([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2]]), logits_of([[0.5, 0.3, 0.2]] * 2)
    weight = relative_difficulty(main, auxiliary, (2, 5))
    expected = torch.linspace(0.912075, 1.0, 5, dtype=torch.float64)
    torch.testing.assert_close(weight, expected.expand(1, 2, 5), atol=1e-6, rtol=0)


def test_difficulty_weight_is_in_0_to_1_and_ignores_shifts_of_logits():
    main, auxiliary = noise(2, 4, 3, 4), noise(2, 4, 3, 4, seed=1)
    weight = relative_difficulty(main, auxiliary, (6, 8))
    assert weight.shape == (2, 6, 8)
    assert 0 < weight.min() < weight.max() <= 1
    shifted = relative_difficulty(main + noise(2, 1, 3, 4, seed=2), auxiliary + 7, (6, 8))
    torch.testing.assert_close(shifted, weight)
    assert relative_difficulty(main, main.clone(), (6, 8)).eq(1).all()
    far = relative_difficulty(torch.tensor([[[[1e4]], [[-1e4]]]]), torch.tensor([[[[-1e4]], [[1e4]]]]), (1, 1))
    assert far.isfinite().all()
    half = relative_difficulty(main.half(), auxiliary.half(), (6, 8))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, weight, atol=5e-3, rtol=0)


def test_easy_first_loss_counts_ignored_pixels_unless_mean_over_valid():
    student, auxiliary, target = noise(2, 4, 6, 8), noise(2, 4, 6, 8, seed=3), labels()
    each = [F.cross_entropy(z, target, ignore_index=-1, reduction="none") for z in (student, auxiliary)]
    ones = torch.ones(2, 6, 8)
    plain = (each[0] + 0.4 * each[1]).mean()
    torch.testing.assert_close(easy_first_loss(student, auxiliary, target, ones), plain)
    torch.testing.assert_close(easy_first_loss(student, None, target, ones / 2), each[0].mean() / 2)
    valid = easy_first_loss(student, auxiliary, target, ones, mean_over="valid")
    torch.testing.assert_close(valid, plain * 6 / 5)  # one row of six is ignored
    with pytest.raises(ValueError, match=r"^mean_over must be 'all' or 'valid', got 'some'"):
        easy_first_loss(student, None, target, ones, mean_over="some")


def test_easy_first_loss_has_the_gradient_of_weighted_cross_entropy():
    student, target = noise(2, 4, 6, 8, dtype=torch.float64).requires_grad_(), labels()
    weight = torch.rand(2, 6, 8, dtype=torch.float64).requires_grad_()
    easy_first_loss(student, None, target, weight).backward()
    expected = student.detach().softmax(1) - F.one_hot(target.clamp(min=0), 4).movedim(-1, 1)
    expected = expected * (weight * (target >= 0))[:, None].detach() / target.numel()
    torch.testing.assert_close(student.grad, expected)
    assert weight.grad is None


def test_losses_enlarge_logits_with_aligned_corners():
    student, target = noise(2, 4, 3, 4), labels()
    large = F.interpolate(student, (6, 8), mode="bilinear", align_corners=True)
    weight = torch.rand(2, 6, 8)
    torch.testing.assert_close(
        easy_first_loss(student, student, target, weight), easy_first_loss(large, large, target, weight)
    )
    other = noise(2, 4, 6, 8, seed=5)
    torch.testing.assert_close(
        disputed_loss(student, None, other, None, target, min_kept=9),
        disputed_loss(large, None, other, None, target, min_kept=9),
    )


# -- which pixels are hard -------------------------------------------------------------------------------------------

TARGET = torch.zeros(1, 1, 6, dtype=torch.int64)
PROBABILITY = torch.tensor([[[0.1, 0.95, 0.6, 0.8, 0.75, 0.99]]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("min_kept", "expected"),
    [
        (0, [1, 0, 1, 0, 0, 0]),
        (1, [1, 0, 1, 0, 0, 0]),
        (2, [1, 0, 1, 0, 0, 0]),
        (3, [1, 0, 1, 0, 1, 0]),
        (4, [1, 0, 1, 1, 1, 0]),
        (6, [1, 1, 1, 1, 1, 1]),
        (100_000, [1, 1, 1, 1, 1, 1]),
        (0.0, [1, 0, 1, 0, 0, 0]),
        (0.5, [1, 0, 1, 0, 1, 0]),
        (0.6, [1, 0, 1, 0, 1, 0]),  # 3.6 pixels, rounded down to 3
        (1.0, [1, 1, 1, 1, 1, 1]),
    ],
)
def test_threshold_rises_until_min_kept_pixels_are_hard(min_kept, expected):
    found = hard_pixels(logits_with_true_probability(PROBABILITY, TARGET), TARGET, 0.7, min_kept)
    assert found.dtype == torch.bool
    assert found.tolist() == [[list(map(bool, expected))]]


def test_threshold_is_for_the_whole_batch_and_ties_are_kept():
    target = torch.zeros(2, 1, 3, dtype=torch.int64)
    probability = torch.tensor([[[0.9, 0.9, 0.95]], [[0.8, 0.9, 0.97]]], dtype=torch.float64)
    found = hard_pixels(logits_with_true_probability(probability, target), target, 0.7, 2)
    assert found.tolist() == [[[True, True, False]], [[True, True, False]]]


def test_ignored_pixels_are_never_hard_and_are_ranked_with_probability_1():
    target = TARGET.clone()
    target[..., :2] = -1
    logits = logits_with_true_probability(PROBABILITY, TARGET)
    assert hard_pixels(logits, target, 0.7, 1).tolist() == [[[False, False, True, False, False, False]]]
    for enough in (4, 5, 6, 1.0):  # the fifth smallest probability is that of an ignored pixel
        assert hard_pixels(logits, target, 0.7, enough).tolist() == [[[False, False, True, True, True, True]]]
    assert not hard_pixels(logits, torch.full_like(target, -1)).any()
    assert hard_pixels(logits, target, 0.7, 3).tolist() == [[[False, False, True, True, True, False]]]


def test_shifts_of_logits_do_not_change_the_pixel_masks():
    logits, other, target = noise(2, 4, 6, 8), noise(2, 4, 6, 8, seed=4), labels()
    shift = 8 * noise(2, 1, 6, 8, seed=6).round()  # exact in float32
    for min_kept in (0, 10):
        assert hard_pixels(logits.double() + shift, target, 0.4, min_kept).equal(
            hard_pixels(logits.double(), target, 0.4, min_kept)
        )
    assert disputed_pixels(logits.double() + shift, other.double(), target, "xor", 0.4, 0).equal(
        disputed_pixels(logits.double(), other.double(), target, "xor", 0.4, 0)
    )


# -- the second stage ------------------------------------------------------------------------------------------------


def test_pixels_of_and_plus_those_of_xor_are_those_of_or():
    student, teacher, target = noise(2, 4, 6, 8), noise(2, 4, 6, 8, seed=4), labels()

    def where(rule, one=student, other=teacher):
        return disputed_pixels(one, other, target, rule, 0.4, 5)

    assert (where("and") | where("xor")).equal(where("or"))
    assert not (where("and") & where("xor")).any()
    assert where("xor").equal(where("xor", teacher, student))
    assert where("student").equal(hard_pixels(student, target, 0.4, 5))
    assert where("student").equal(where("student", student, student))
    assert min(where(rule).sum() for rule in ("xor", "or", "and", "student")) > 3
    with pytest.raises(ValueError, match=r"^rule must be one of 'xor', 'or', 'and', 'student', got 'nor'"):
        where("nor")


def test_disputed_loss_is_the_class_weighted_mean_over_disputed_pixels():
    student, auxiliary, target = noise(2, 4, 6, 8), noise(2, 4, 6, 8, seed=3), labels()
    teacher, other = noise(2, 4, 6, 8, seed=4), noise(2, 4, 6, 8, seed=5)
    weight = torch.tensor([0.5, 1.0, 2.0, 4.0])
    expected = 0.0
    for share, own, taught in ((1.0, student, teacher), (0.4, auxiliary, other)):
        where = hard_pixels(own, target, 0.4, 5) ^ hard_pixels(taught, target, 0.4, 5)
        nll, own_weight = -own.log_softmax(1).movedim(1, -1)[where], weight[target[where]]
        each = nll.gather(1, target[where][:, None])[:, 0]
        expected += share * (each * own_weight).sum() / own_weight.sum()
    found = disputed_loss(student, auxiliary, teacher, other, target, "xor", 0.4, 5, weight)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        disputed_loss(student, auxiliary, teacher, other, target, "xor", 0.4, 5, weight.tolist()), found
    )
    unweighted = disputed_loss(student, None, teacher, None, target, "xor", 0.4, 5)
    where = hard_pixels(student, target, 0.4, 5) ^ hard_pixels(teacher, target, 0.4, 5)
    torch.testing.assert_close(unweighted, F.cross_entropy(student, target.masked_fill(~where, -1), ignore_index=-1))


def test_disputed_loss_has_gradient_only_in_the_student_at_disputed_pixels():
    probability = torch.tensor([[[0.9, 0.9, 0.2, 0.2]]], dtype=torch.float64)
    target = torch.zeros(1, 1, 4, dtype=torch.int64)
    student = logits_with_true_probability(probability, target).requires_grad_()
    teacher = logits_with_true_probability(probability[..., [0, 2, 1, 3]], target).requires_grad_()
    disputed_loss(student, None, teacher, None, target, min_kept=0).backward()
    assert student.grad.abs().sum(1).ne(0).tolist() == [[[False, True, True, False]]]
    assert teacher.grad is None


@pytest.mark.parametrize("weight", [None, [1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
def test_losses_without_any_pixel_are_0(weight):
    student, target = noise(2, 4, 6, 8).requires_grad_(), labels()
    auxiliary = noise(2, 4, 6, 8, seed=1).requires_grad_()
    same = student.detach(), auxiliary.detach()
    loss = disputed_loss(student, auxiliary, *same, target, class_weight=weight)
    assert loss.item() == 0
    loss.backward()
    assert student.grad.eq(0).all()
    assert auxiliary.grad.eq(0).all()
    nothing = torch.full_like(target, -1)
    assert disputed_loss(student, None, noise(2, 4, 6, 8, seed=9), None, nothing, "or", class_weight=weight).item() == 0
    assert easy_first_loss(student, None, nothing, torch.ones(2, 6, 8), mean_over="valid").item() == 0


def test_without_teacher_auxiliary_head_only_rule_student_uses_the_auxiliary():
    student, auxiliary, target = noise(2, 4, 6, 8), noise(2, 4, 6, 8, seed=3).requires_grad_(), labels()
    teacher = noise(2, 4, 6, 8, seed=4)
    found = disputed_loss(student, auxiliary, teacher, None, target, min_kept=5)
    assert found.item() == disputed_loss(student, None, teacher, None, target, min_kept=5).item()
    assert found.requires_grad  # DDP waits for a gradient of every parameter
    own = disputed_loss(student, auxiliary, teacher, None, target, "student", min_kept=5)
    assert own.item() == disputed_loss(student, auxiliary, teacher, teacher, target, "student", min_kept=5).item()
    assert own.item() > found.item()


# -- distillation from the teacher's logits --------------------------------------------------------------------------


def test_pixel_kd_is_the_mean_over_pixels():
    student, teacher = logits_of([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]]), logits_of([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3]])
    kl = 0.5 * math.log(0.5 / 0.6) + 0.2 * math.log(0.2 / 0.1)
    assert pixel_kd_loss(student, teacher, 1.0).item() == pytest.approx(kl / 2)
    student, teacher = noise(2, 4, 3, 5), noise(2, 4, 3, 5, seed=1)
    rows = [z.movedim(1, -1).reshape(-1, 4) for z in (student, teacher)]
    torch.testing.assert_close(pixel_kd_loss(student, teacher, 3.0), kd_loss(*rows, 3.0))


def test_cwd_uses_a_softmax_over_pixels():
    student, teacher = noise(2, 4, 3, 5), noise(2, 4, 3, 5, seed=1)
    rows = [(z.reshape(2, 4, 15) / 4).log_softmax(-1) for z in (student, teacher)]
    expected = 16 * (rows[1].exp() * (rows[1] - rows[0])).sum() / 8
    torch.testing.assert_close(cwd_loss(student, teacher), expected)
    torch.testing.assert_close(cwd_loss(student + 3, teacher, 4.0), expected)


# -- bad input -------------------------------------------------------------------------------------------------------

GOOD = noise(2, 4, 6, 8), labels()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z, t: relative_difficulty(z, z[:, :3], (6, 8)), r"auxiliary_logits must be \[2, 4, 6, 8\]"),
        (lambda z, t: easy_first_loss(z, None, t, t[:, 0].float()), r"weight must be \[2, 6, 8\], got \[2, 8\]"),
        (lambda z, t: easy_first_loss(z, z[:1], t, t.float()), r"target must be \[1, H, W\]"),
        (lambda z, t: easy_first_loss(z, None, t.float(), t.float()), "target must be int64, got torch.float32"),
        (lambda z, t: hard_pixels(z[..., :4], t), r"target must be \[2, 6, 4\], got \[2, 6, 8\]"),
        (lambda z, t: hard_pixels(z, t + 1), "between -1 .ignored. and 3, got 0 to 4: map what is to be ignored"),
        (lambda z, t: hard_pixels(z, t.masked_fill(t < 0, 255)), "got 0 to 255"),
        (lambda z, t: hard_pixels(z, t, 70), "threshold must be at least 0 and at most 1, got 70"),
        (lambda z, t: hard_pixels(z, t, 0.7, 1.5), "min_kept must be .* got 1.5: give a whole number, or a share"),
        (lambda z, t: hard_pixels(z, t, 0.7, -1), "min_kept must be at least 0, got -1"),
        (lambda z, t: hard_pixels(z, t, 0.7, True), "min_kept must be .* got True"),
        (lambda z, t: disputed_loss(z, None, z, None, t, class_weight=[1.0]), "class_weight needs 4 numbers, one a"),
        (lambda z, t: pixel_kd_loss(z, z[..., :2], 1.0), r"teacher must be \[2, 4, 6, 8\]"),
        (lambda z, t: pixel_kd_loss(z, z, 0.0), "temperature must be above 0, got 0.0"),
        (lambda z, t: cwd_loss(z, z, -1.0), "temperature must be above 0, got -1.0"),
    ],
)
def test_invalid_input_raises_a_message_of_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(*GOOD)
    assert "\n" not in str(caught.value)


def test_second_output_is_an_auxiliary_head_only_with_a_channel_per_class():
    main, feature = noise(1, 4, 2, 2), noise(1, 9, 2, 2)
    assert auxiliary_logits((main, main)) is main
    assert auxiliary_logits([main, main, feature])[0].shape == main[0].shape
    assert auxiliary_logits((main, feature)) is None
    assert auxiliary_logits((main,)) is None
    assert auxiliary_logits(main) is None
    assert auxiliary_logits({"out": main, "aux": main}) is main
