"""``balance``: each class is drawn equally often for training, on one process and on several."""

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from lightning_kd.core import Classification
from lightning_kd.data import ArrayDataModule, ImageFolderDataModule, OpenSetDataModule, ShardedSampler
from lightning_kd.nets import build_network

SIZES = (50, 9, 1)
CLASSES = np.repeat([0, 1, 2], SIZES)


def sampler(batch_size=10, rank=0, world_size=1, **options):
    order = np.arange(60) + 100
    options = {"classes": CLASSES, "seed": 3, **options}
    return ShardedSampler(order, batch_size, shuffle=True, rank=rank, world_size=world_size, **options)


def test_classes_and_samples_within_a_class_are_drawn_equally_often():
    drawn = np.concatenate(sampler().batches(0)) - 100
    assert len(drawn) == 60
    assert np.bincount(CLASSES[drawn]).tolist() == [20, 20, 20]
    times = np.bincount(drawn, minlength=60)
    assert set(times[:50]) == {0, 1}
    assert set(times[50:59]) == {2, 3}
    assert times[59] == 20


def test_remaining_draws_go_to_different_classes_over_epochs():
    some = ShardedSampler(np.arange(61), 10, shuffle=True, classes=np.append(CLASSES, 0))
    orders = [np.bincount(some.classes[some._order(e, 0)]) for e in range(12)]
    assert {tuple(sorted(c)) for c in orders} == {(20, 20, 21)}
    assert len({tuple(c) for c in orders}) == 3


def test_frequent_class_draws_other_samples_each_epoch():
    seen = {epoch: set(np.concatenate(sampler().batches(epoch)).tolist()) for epoch in range(8)}
    assert seen[0] != seen[1]
    assert len(set.union(*seen.values())) > 55


def test_batches_of_ranks_join_to_those_of_one_process():
    whole, before = sampler(10).batches(2, 1), sampler(10).repeats(2, 1)
    ranks = [sampler(5, rank, 2) for rank in range(2)]
    for k, parts in enumerate(zip(*(rank.batches(2, 1) for rank in ranks), strict=True)):
        np.testing.assert_array_equal(np.concatenate(parts), whole[k])
        np.testing.assert_array_equal(np.concatenate([rank.repeats(2, 1)[k] for rank in ranks]), before[k])


def test_repeats_number_the_draws_of_a_sample():
    one = sampler()
    pairs = list(zip(np.concatenate(one.batches(0)), np.concatenate(one.repeats(0)), strict=True))
    assert len(set(pairs)) == 60
    assert sorted(times for sample, times in pairs if sample == 159) == list(range(20))
    assert sampler(classes=None).repeats(0) is None


@pytest.fixture
def arrays(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", train_image=image, train_target=CLASSES, test_image=image, test_target=CLASSES)
    return tmp_path / "a.npz"


@pytest.mark.parametrize("views", ["weak", "strong"])
def test_repeated_sample_has_another_view(arrays, views):
    data = ArrayDataModule(str(arrays), val_fraction=0.0, augment=True, cutout=2, balance=True, batch_size=60)
    (batch,) = data.loader("train", shuffle=True, views=views)
    assert torch.bincount(batch.target).tolist() == [20, 20, 20]
    rare = batch.image[batch.index == 59].flatten(1)
    assert len(rare) == 20
    assert len(torch.unique(rare, dim=0)) > 10
    assert not data.loader("train").sampler.shuffle
    assert torch.bincount(next(iter(data.loader("test"))).target).tolist() == list(SIZES)


def test_first_view_of_a_sample_is_the_one_without_balance(arrays):
    def images(balance):
        data = ArrayDataModule(str(arrays), val_fraction=0.0, augment=True, balance=balance, batch_size=60)
        loader = data.loader("train", shuffle=True, augment=True)
        (batch,) = loader
        before = loader.sampler.repeats(0)
        first = np.ones(60, bool) if before is None else np.concatenate(before) == 0
        return {int(i): image for i, image, own in zip(batch.index, batch.image, first, strict=True) if own}

    plain, balanced = images(False), images(True)
    assert len(plain) == 60
    assert all(torch.equal(image, plain[index]) for index, image in balanced.items())


def test_image_folder_is_balanced_with_different_views(tmp_path):
    for name, count in (("a", 12), ("b", 2)):
        for k in range(count):
            (tmp_path / name).mkdir(exist_ok=True)
            pixels = np.random.default_rng(k).integers(0, 256, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{k}.png")
    data = ImageFolderDataModule(str(tmp_path), 16, val_fraction=0.0, test_fraction=0.5, balance=True, batch_size=7)
    (batch,) = data.loader("train", shuffle=True, augment=True)
    counts = torch.bincount(batch.target).tolist()
    assert sorted(counts) == [3, 4]
    rare = batch.image[batch.target == 1].flatten(1)
    assert len(torch.unique(rare, dim=0)) == len(rare) >= 3


def test_pool_is_balanced_by_its_labelled_samples(arrays):
    source = ArrayDataModule(str(arrays), val_fraction=0.0, balance=True)
    pool = OpenSetDataModule(source, known_classes=2, initial_count=40, budget=2, rounds=1, split_seed=1)
    pool.setup()
    targets = torch.cat([batch.target for batch in pool.loader("train", shuffle=True)])
    counts = torch.bincount(targets).tolist()
    assert max(counts) - min(counts) <= 1
    hidden = torch.cat([b.target for b in pool.loader("train", pool.unlabelled_indices, shuffle=True)])
    assert set(hidden.tolist()) == {-1}


def test_balance_of_multi_label_data_raises(tmp_path):
    with pytest.raises(ValueError, match=r"^balance is for one class per sample, the data has several labels"):
        ArrayDataModule(str(tmp_path / "none.npz"), fake=True, kind="multi_label", balance=True)


def test_resumed_fit_equals_an_uninterrupted_one(arrays, tmp_path):
    def fit(epochs, ckpt_path=None):
        L.seed_everything(0)
        task = Classification(build_network("cnn_tiny", 3), 3, input_shape=(3, 8, 8))
        data = ArrayDataModule(str(arrays), augment=True, balance=True, batch_size=16)
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", default_root_dir=tmp_path, **quiet)
        trainer.fit(task, data, ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return task.state_dict()

    whole = fit(2)
    fit(1)
    again = fit(2, tmp_path / "1.ckpt")
    assert all(torch.equal(value, again[key]) for key, value in whole.items())
