"""Loaders that say by a key which view each image is, and otherwise give the same batches."""

import numpy as np
import pytest
import torch

from lightning_kd.core.view_keys import ViewKeys
from lightning_kd.data import DigitsDataModule


def digits(**options):
    return DigitsDataModule(fake=True, batch_size=16, **{"augment": True, **options})


def loader(data, **options):
    return data.loader("train", shuffle=True, augment=True, batch_size=16, **options)


@pytest.mark.parametrize("options", [{}, {"augment": False}, {"balance": True}])
def test_keys_name_the_view_and_leave_batches_unchanged(options):
    data = digits(**options)
    plain, keyed = loader(data), loader(data, view_keys=ViewKeys())
    seen = set()
    for epoch in (0, 3):
        for each in (plain, keyed):
            each.set_epoch(epoch)
        for one, two in zip(plain, keyed, strict=True):
            assert one.extras == {}
            assert torch.equal(one.image, two.image)
            assert torch.equal(one.index, two.index)
            assert two.extras["view"].dtype == torch.int64
            assert torch.equal(keyed.images(two.index, two.extras["view"]), two.image)
            seen |= set(two.extras["view"].tolist())
    assert keyed.key_count == (1 if options == {"augment": False} else 9)
    assert seen == set(range(keyed.key_count))


def test_loader_without_augmentation_has_one_key():
    data = digits()
    keyed = data.loader("train", view_keys=ViewKeys())
    batch = next(iter(keyed))
    assert keyed.key_count == 1
    assert not batch.extras["view"].any()
    assert torch.equal(keyed.images(batch.index, batch.extras["view"]), batch.image)
    assert keyed.describe_keys() == {"padding": 0, "flip": False, "fixed": None, "seed": 0}


def test_fixed_views_are_reused_and_come_equally_often():
    data = digits()
    keyed = loader(data, view_keys=ViewKeys(fixed=3, seed=5))
    assert keyed.key_count == 3
    assert keyed.describe_keys() == {"padding": 1, "flip": False, "fixed": 3, "seed": 5}
    images, count = {}, np.zeros(3)
    for epoch in range(12):
        keyed.set_epoch(epoch)
        for batch in keyed:
            keys = batch.extras["view"]
            assert torch.equal(keyed.images(batch.index, keys), batch.image)
            count += np.bincount(keys, minlength=3)
            for index, key, image in zip(batch.index.tolist(), keys.tolist(), batch.image, strict=True):
                first = images.setdefault((index, key), image)
                assert torch.equal(first, image)
    shares = count / count.sum()
    assert abs(shares - 1 / 3).max() < 0.05
    assert {key for _, key in images} == {0, 1, 2}


def test_fixed_views_of_a_sample_differ_and_depend_on_the_seed():
    table = ViewKeys(fixed=20, seed=1).table(5000, 162)
    assert table.shape == (5000, 20)
    assert all(len(set(row)) == 20 for row in table[::250].tolist())
    assert len({tuple(row) for row in table.tolist()}) == 5000  # also across blocks of rows that are drawn at once
    assert 0 <= table.min() <= table.max() < 162
    assert np.array_equal(table, ViewKeys(fixed=20, seed=1).table(5000, 162))
    assert not np.array_equal(table, ViewKeys(fixed=20, seed=2).table(5000, 162))
    with pytest.raises(ValueError, match=r"fixed must be 162 or fewer, the views of a sample, got 200"):
        ViewKeys(fixed=200).table(3, 162)
    with pytest.raises(ValueError, match="fixed must be at least 1"):
        ViewKeys(fixed=0)


def test_keys_for_views_other_than_crop_and_flip_raise():
    with pytest.raises(ValueError, match=r"views=\('weak',\) and cutout=3"):
        loader(digits(cutout=3), view_keys=ViewKeys())
    with pytest.raises(ValueError, match=r"keys need a single view by crop and flip, got views=\('weak', 'plain'\)"):
        loader(digits(), views=("weak", "plain"), view_keys=ViewKeys())
    with pytest.raises(ValueError, match=r"got views=\('strong',\)"):
        loader(digits(), views="strong", view_keys=ViewKeys())


def test_repeated_sample_in_a_pass_has_other_views():
    data = digits(balance=True)
    data.setup()
    rare = [int((data.train_target[data.train_indices] == c).nonzero()[0]) for c in range(9)]
    indices = np.append(data.train_indices[rare], data.train_indices[data.train_target[data.train_indices] == 9])
    keyed = data.loader("train", indices, shuffle=True, augment=True, view_keys=ViewKeys(per_visit=2))

    def two(batch):
        return batch.extras["view"].view(-1, 2).T.tolist()

    visits = [row for b in keyed for row in zip(b.index[::2].tolist(), *two(b), strict=True)]
    assert len(set(visits)) > 0.8 * len(visits) > len({row[0] for row in visits})
