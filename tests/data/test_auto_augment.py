"""AutoAugment of whole batches, compared with torchvision's image by image."""

import itertools

import numpy as np
import pytest
import torch
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, v2

from lightning_kd.data.auto_augment import UNSIGNED, BatchedAutoAugment

POLICIES = [AutoAugmentPolicy.CIFAR10, AutoAugmentPolicy.IMAGENET]


def images(n, shape=(3, 32, 32)):
    return torch.from_numpy(np.random.default_rng(0).integers(20, 150, (n, *shape), dtype=np.uint8))


def operation_codes(policy, happens, negative):
    """The two operations of each sub-policy, as positions in ``BatchedAutoAugment.operations``; 0 does nothing."""
    numbers = BatchedAutoAugment(policy).operations
    return np.array(
        [
            [
                numbers.index((name, bin_ or 0, -1 if minus and name not in UNSIGNED else 1)) if does else 0
                for (name, _, bin_), does, minus in zip(pair, happens, negative, strict=True)
            ]
            for pair in AutoAugment(policy).policies
        ]
    )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 17, 24)])
def test_equals_torchvision_to_the_bit(policy, shape, monkeypatch):
    reference = v2.AutoAugment(policy)
    for happens, negative in itertools.product([(1, 1), (0, 1)], [(0, 1), (1, 0)]):
        choice = operation_codes(policy, happens, negative)
        image = images(len(choice), shape)
        got = BatchedAutoAugment(policy).apply(image, choice)
        for k, pair in enumerate(AutoAugment(policy).policies):
            draws = []
            for (name, _, _), does, minus in zip(pair, happens, negative, strict=True):
                draws += [0.0 if does else 2.0] + [0.1 if minus else 0.9] * (does and name not in UNSIGNED)
            drawn = iter(draws)
            with monkeypatch.context() as patch:
                patch.setattr(torch, "randint", lambda *_, k=k: torch.tensor(k))
                patch.setattr(torch, "rand", lambda *_, drawn=drawn: torch.tensor(next(drawn)))
                expected = reference(image[k])
            assert torch.equal(got[k], expected), (pair, happens, negative)


def test_operations_are_drawn_with_the_probabilities_of_the_policy():
    policy, count = AutoAugmentPolicy.CIFAR10, 50_000
    choice = BatchedAutoAugment(policy).draw(count, seed=0)
    assert choice.shape == (count, 2)
    operations = BatchedAutoAugment(policy).operations
    for step in (0, 1):
        expected = np.zeros(len(operations))
        for pair in AutoAugment(policy).policies:
            name, probability, bin_ = pair[step]
            expected[0] += (1 - probability) / 25
            for sign in (1, -1):
                expected[operations.index((name, bin_ or 0, 1 if name in UNSIGNED else sign))] += probability / 50
        seen = np.bincount(choice[:, step], minlength=len(operations)) / count
        assert np.abs(seen - expected).max() < 0.008  # 4 standard deviations of the most frequent one
        assert (seen[expected == 0] == 0).all()


def test_draws_depend_only_on_seed_epoch_and_pass():
    policy = BatchedAutoAugment()
    first = policy.draw(100, 3, 1, 2)
    assert (first == BatchedAutoAugment().draw(100, 3, 1, 2)).all()
    for other in ((4, 1, 2), (3, 2, 2), (3, 1, 3)):
        assert (first != policy.draw(100, *other)).any()


def test_given_images_are_not_changed():
    image = images(64)
    before = image.clone()
    got = BatchedAutoAugment().apply(image, BatchedAutoAugment().draw(64, 0))
    assert torch.equal(image, before)
    assert got.dtype == torch.uint8
    assert not torch.equal(got, image)
