"""The order of samples, their shards for the ranks, and splits."""

import numpy as np
import pytest

from lightning_kd.data import ShardedSampler
from lightning_kd.data.splits import take_fraction, take_per_class, without


def batches_of_ranks(n, batch_size, world_size, epoch=0, pass_=0, shuffle=True, seed=3):
    """The batches of each rank."""
    return [
        ShardedSampler(
            np.arange(n) + 100, batch_size, shuffle=shuffle, seed=seed, rank=rank, world_size=world_size
        ).batches(epoch, pass_)
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("n", [64, 60, 67, 3])
@pytest.mark.parametrize("world_size", [2, 3])
def test_batches_of_ranks_join_to_those_of_one_process(n, world_size):
    (whole,) = batches_of_ranks(n, 4 * world_size, 1)
    ranks = batches_of_ranks(n, 4, world_size)
    assert len({len(batches) for batches in ranks}) == 1
    for k, parts in enumerate(zip(*ranks, strict=True)):
        assert len({len(part) for part in parts}) == 1
        together = np.concatenate(parts)
        assert len(together) - len(whole[k]) in range(world_size)
        np.testing.assert_array_equal(together[: len(whole[k])], whole[k])
        if len(together) > len(whole[k]):  # filled up from the start of the order
            np.testing.assert_array_equal(together[len(whole[k]) :], whole[0][: len(together) - len(whole[k])])


def test_training_covers_every_sample_once():
    (batches,) = batches_of_ranks(67, 8, 1)
    assert sorted(np.concatenate(batches)) == list(range(100, 167))
    assert [len(b) for b in batches] == [8] * 8 + [3]


@pytest.mark.parametrize(
    ("n", "batch_size", "world_size", "sizes"),
    [
        (17, 8, 1, [8, 8]),  # one left over: dropped, BatchNorm cannot train on it
        (18, 8, 1, [8, 8, 2]),
        (18, 8, 2, [8]),  # two left over, one for each rank
        (19, 8, 2, [8, 2]),
        (1, 8, 1, [1]),  # at least one batch
        (5, 8, 1, [5]),
        (2, 8, 4, [1]),
        (5, 1, 1, [1] * 5),  # batch size 1 was asked for
        (5, 1, 2, [1] * 3),
    ],
)
def test_last_batch_of_one_sample_is_dropped_if_there_are_others(n, batch_size, world_size, sizes):
    for rank in range(world_size):
        sampler = ShardedSampler(np.arange(n), batch_size, shuffle=True, rank=rank, world_size=world_size)
        assert [len(b) for b in sampler.batches(0)] == sizes
        assert len(sampler) == len(sizes)


@pytest.mark.parametrize("n", [2, 5, 7, 64, 65, 66, 127, 200])
@pytest.mark.parametrize("batch_size", [1, 2, 32])
@pytest.mark.parametrize("world_size", [1, 2])
def test_evaluation_shards_cover_all_samples_in_order(n, batch_size, world_size):
    ranks = batches_of_ranks(n, batch_size, world_size, shuffle=False)
    assert len({len(batches) for batches in ranks}) == 1
    sampler = ShardedSampler(np.arange(n), batch_size, shuffle=False, world_size=world_size)
    assert len(sampler) == len(ranks[0])
    in_order = np.concatenate([batch for parts in zip(*ranks, strict=True) for batch in parts])
    np.testing.assert_array_equal(in_order, np.arange(n) + 100)  # no duplicates, none missing, as stored
    sizes = [len(batch) for batches in ranks for batch in batches]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= max(batch_size, 2 if world_size > 1 else 1)


def test_evaluation_set_smaller_than_the_number_of_processes_raises():
    with pytest.raises(ValueError, match="world_size=4"):
        ShardedSampler(np.arange(3), 8, shuffle=False, world_size=4)


def test_order_depends_only_on_seed_epoch_and_pass():
    first = np.concatenate(batches_of_ranks(50, 8, 1)[0])
    for change in ({"epoch": 1}, {"pass_": 1}, {"seed": 4}):
        assert not np.array_equal(first, np.concatenate(batches_of_ranks(50, 8, 1, **change)[0]))
    np.random.seed(1)  # noqa: NPY002
    np.testing.assert_array_equal(first, np.concatenate(batches_of_ranks(50, 8, 1)[0]))
    np.testing.assert_array_equal(first, np.concatenate(batches_of_ranks(50, 5, 1)[0]))  # nor on the batch size


def test_pass_number_grows_until_set_epoch():
    sampler = ShardedSampler(np.arange(20), 8, shuffle=True)
    first, second = list(sampler), list(sampler)
    assert first != second
    sampler.set_epoch(0)
    assert list(sampler) == first
    sampler.set_epoch(5)
    assert sampler.next_pass()[:2] == (5, 0)
    assert sampler.next_pass()[:2] == (5, 1)


@pytest.mark.parametrize(("indices", "batch_size", "name"), [([], 4, "indices"), ([1, 2], 0, "batch_size")])
def test_invalid_sampler_arguments_raise(indices, batch_size, name):
    with pytest.raises(ValueError, match=name):
        ShardedSampler(indices, batch_size, shuffle=True)


def test_take_fraction_is_stratified_with_the_right_total():
    target = np.repeat(np.arange(5), [100, 50, 30, 7, 3])
    chosen = take_fraction(target, 5, 0.15, np.random.default_rng(0))
    count = np.bincount(target[chosen], minlength=5)
    assert len(chosen) == round(190 * 0.15)
    assert (np.abs(count - np.array([15, 7.5, 4.5, 1.05, 0.45])) < 1).all()
    assert (np.diff(chosen) > 0).all()


def test_take_fraction_leaves_one_of_each_class():
    target = np.repeat(np.arange(4), [1, 1, 1, 20])
    chosen = take_fraction(target, 4, 0.5, np.random.default_rng(0), leave=1)
    assert set(target[without(len(target), chosen)]) == {0, 1, 2, 3}


def test_larger_take_per_class_contains_the_smaller_one():
    target = np.random.default_rng(0).integers(0, 3, 90)
    small, large = (take_per_class(target, np.full(3, k), np.random.default_rng(1)) for k in (4, 9))
    assert set(small) < set(large)
    assert (np.bincount(target[large]) == 9).all()
