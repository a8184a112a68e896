"""Compressed soft labels: what compression keeps, what recovery gives, errors."""

import pytest
import torch
import torch.nn.functional as F

from lightning_kd.distillation import SoftLabels, compress, recover

KINDS = ["hard", "smoothing", "marginal_smoothing_k5", "marginal_renorm_k5"]


def probabilities(rows=7, classes=12, dtype=torch.float64):
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(0), dtype=dtype).mul(2).softmax(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_recovered_rows_sum_to_1_and_keep_their_best_class(kind, dtype):
    p = probabilities(dtype=dtype)
    back = recover(compress(p, kind), kind, 12)
    assert back.dtype == (torch.float64 if dtype == torch.float64 and kind != "hard" else torch.float32)
    torch.testing.assert_close(back.sum(1), torch.ones_like(back[:, 0]), rtol=0, atol=1e-6)
    assert torch.equal(back.argmax(1), p.argmax(1))
    assert (back >= 0).all()


def test_marginal_smoothing_keeps_the_top_five_and_spreads_the_rest_evenly():
    p = probabilities()
    stored = compress(p, "marginal_smoothing_k5")
    back = recover(stored, "marginal_smoothing_k5", 12)
    top = p.topk(5)
    assert torch.equal(stored.index, top.indices)
    assert torch.equal(back.gather(1, top.indices), top.values)
    others = torch.ones_like(p, dtype=torch.bool).scatter(1, top.indices, False)
    rest = back[others].view(len(p), 7)
    torch.testing.assert_close(rest, ((1 - top.values.sum(1)) / 7)[:, None].expand(-1, 7))
    assert (rest == rest[:, :1]).all()


def test_recovered_labels_of_each_kind_are_the_worked_numbers():
    p = torch.tensor([[0.1, 0.6, 0.05, 0.25]], dtype=torch.float64)
    expected = {
        "hard": [0, 1, 0, 0],
        "smoothing": [0.4 / 3, 0.6, 0.4 / 3, 0.4 / 3],
        "marginal_smoothing_k2": [0.075, 0.6, 0.075, 0.25],
        "marginal_renorm_k2": [0, 0.6 / 0.85, 0, 0.25 / 0.85],
        "marginal_smoothing_k3": [0.1, 0.6, 0.05, 0.25],  # all classes but one: nothing is lost
    }
    for kind, row in expected.items():
        back = recover(compress(p, kind), kind, 4).double()
        torch.testing.assert_close(back, torch.tensor([row], dtype=torch.float64), msg=kind)


def test_cross_entropy_is_exact_with_all_but_one_class_and_plain_for_hard():
    p, student = probabilities(), torch.randn(7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    back = recover(compress(p, "marginal_smoothing_k11"), "marginal_smoothing_k11", 12)
    torch.testing.assert_close(F.cross_entropy(student, back), F.cross_entropy(student, p))
    hard = recover(compress(p, "hard"), "hard", 12).double()
    torch.testing.assert_close(F.cross_entropy(student, hard), F.cross_entropy(student, p.argmax(1)))


def test_float16_sum_above_1_is_normalised():
    stored = SoftLabels(torch.tensor([[3, 0]]), torch.tensor([[0.9, 0.102]], dtype=torch.float16))
    back = recover(stored, "marginal_smoothing_k2", 5)
    assert back[0, [1, 2, 4]].tolist() == [0, 0, 0]
    assert float(back.sum()) == pytest.approx(1, abs=1e-6)


def test_class_indices_are_stored_as_integers():
    p = torch.zeros(1, 5000)
    p[0, 4097] = 1
    stored = compress(p, "marginal_renorm_k2")
    assert stored.index.dtype == torch.int64
    assert stored.index[0, 0] == 4097
    with pytest.raises(ValueError, match="with integers"):
        recover(stored._replace(index=stored.index.half()), "marginal_renorm_k2", 5000)


@pytest.mark.parametrize("kind", ["marginal_renorm", "marginal_smoothing", "marginal_smoothing_k0", "Hard", "", None])
def test_unknown_kind_raises_in_compress_and_recover(kind):
    for call in (lambda: compress(probabilities(), kind), lambda: recover(compress(probabilities(), "hard"), kind, 12)):
        with pytest.raises(ValueError, match="kind must be 'hard', 'smoothing'"):
            call()


def test_unfitting_kinds_classes_and_shapes_raise():
    p = probabilities()
    with pytest.raises(ValueError, match="keeps 12 classes, which must be fewer than the 12"):
        compress(p, "marginal_smoothing_k12")
    with pytest.raises(ValueError, match="stored must be of kind 'smoothing'"):
        recover(compress(p, "hard"), "smoothing", 12)
    with pytest.raises(ValueError, match="stored must be of kind 'marginal_renorm_k3'"):
        recover(compress(p, "marginal_renorm_k5"), "marginal_renorm_k3", 12)
    with pytest.raises(ValueError, match="must name classes from 0 to 5"):
        recover(compress(p, "hard"), "hard", 6)
    with pytest.raises(ValueError, match="probabilities must be"):
        compress(p[0], "hard")
