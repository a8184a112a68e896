"""Behaviour common to all data modules, on the digits and on fake data."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_kd.core.batch import Batch
from lightning_kd.data import (
    ArrayDataModule,
    CIFAR10DataModule,
    CIFAR100DataModule,
    DigitsDataModule,
    FashionMNISTDataModule,
    ImageFolderDataModule,
)

FAKES = {
    "cifar10": (lambda **k: CIFAR10DataModule("missing", fake=True, **k), (3, 32, 32), 10),
    "cifar100": (lambda **k: CIFAR100DataModule("missing", fake=True, **k), (3, 32, 32), 100),
    "cifar100_coarse": (lambda **k: CIFAR100DataModule("missing", labels="coarse", fake=True, **k), (3, 32, 32), 20),
    "fashion_mnist": (lambda **k: FashionMNISTDataModule("missing", fake=True, **k), (1, 28, 28), 10),
    "digits": (lambda **k: DigitsDataModule(fake=True, **k), (1, 8, 8), 10),
    "real_digits": (lambda **k: DigitsDataModule(**k), (1, 8, 8), 10),
    "array": (lambda **k: ArrayDataModule("missing.npz", fake=True, **k), (3, 32, 32), 10),
    "folder": (lambda **k: ImageFolderDataModule("missing", image_size=48, fake=True, **k), (3, 48, 48), 10),
}


@pytest.fixture(params=FAKES, name="case")
def _case(request):
    return FAKES[request.param]


def samples(loader):
    batches = list(loader)
    return [torch.cat([getattr(b, name) for b in batches]) for name in ("image", "target", "index")]


def test_shapes_classes_and_sizes_are_known_before_setup(case):
    make, shape, num_classes = case
    data = make()
    assert data.input_shape == shape
    assert data.num_classes == num_classes == len(data.class_names) == len(set(data.class_names))
    assert len(data.mean) == len(data.std) == shape[0]
    assert not data._ready
    assert data.train_size > data.val_size > 0
    assert data.test_size > 0
    assert not hasattr(data, "hparams") or not data.hparams
    assert data.class_names[0] in str(data.class_names) and str(num_classes) in str(data)  # noqa: PT018


def test_batches_of_each_split_have_shapes_targets_and_indices(case):
    make, shape, num_classes = case
    data = make(batch_size=32)
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    batch = next(iter(loader))
    assert isinstance(batch, Batch)
    assert batch.image.shape == (32, *shape)
    assert batch.image.dtype == torch.float32
    assert batch.image.is_contiguous()
    assert (data.train_target[batch.index] == batch.target).all()
    image, target, index = samples(data.val_dataloader())
    assert (data.train_target[index] == target).all()
    assert set(index.tolist()).isdisjoint(data.train_indices.tolist())
    assert abs(image.mean()) < 1.5
    image, target, index = samples(data.test_dataloader())
    assert index.tolist() == list(range(data.test_size))
    assert (data.test_target == target).all()
    assert torch.equal(samples(data.predict_dataloader())[0], image)
    assert set(target.tolist()) == set(range(num_classes))
    assert len(loader) == len(list(loader))


def test_fake_data_can_be_learned(case):
    make, shape, _ = case
    if shape[1] == 28:
        pytest.skip("as the other grey ones")
    data = make(augment=False)
    data.setup()
    image, target, _ = samples(data.loader("train"))
    test_image, test_target, _ = samples(data.test_dataloader())
    centres = torch.stack([image[target == c].mean(0) for c in range(data.num_classes)]).flatten(1)
    guess = torch.cdist(test_image.flatten(1), centres).argmin(1)
    assert (guess == test_target).float().mean() > 0.8


def test_same_seed_same_batches_and_epochs_differ(case):
    make, _, _ = case
    loader = make(seed=1).train_dataloader()
    loader.set_epoch(3)
    first = next(iter(loader))
    again = make(seed=1).train_dataloader()
    for epoch in range(3):  # an uninterrupted run passes through the earlier epochs
        again.set_epoch(epoch)
        next(iter(again))
    again.set_epoch(3)
    undisturbed = next(iter(again))
    assert torch.equal(first.index, undisturbed.index)
    assert torch.equal(first.image, undisturbed.image)
    loader.set_epoch(4)
    assert not torch.equal(first.index, next(iter(loader)).index)
    other = make(seed=2).train_dataloader()
    other.set_epoch(3)
    assert not torch.equal(first.index, next(iter(other)).index)


def test_iterators_draw_nothing_before_the_first_batch():
    loader = DigitsDataModule().train_dataloader()
    early = iter(loader)  # as Lightning does, before set_epoch
    loader.set_epoch(2)
    got = next(early)
    loader.set_epoch(2)
    assert torch.equal(got.index, next(iter(loader)).index)
    assert not torch.equal(got.index, next(iter(loader)).index)  # the second pass of epoch 2


def test_global_random_generators_are_not_used():
    data = ImageFolderDataModule("missing", image_size=16, fake=True, cutout=4)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    list(data.train_dataloader())
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()  # noqa: NPY002


@pytest.mark.parametrize("world_size", [2, 3])
def test_batches_of_all_ranks_join_to_those_of_one_process(world_size):
    def of_rank(rank, world_size, batch_size):
        data = CIFAR10DataModule(fake=True, cutout=6, batch_size=batch_size, eval_batch_size=batch_size)
        data.trainer = SimpleNamespace(
            global_rank=rank, world_size=world_size, strategy=SingleDeviceStrategy(device=torch.device("cpu"))
        )
        return list(data.train_dataloader()), list(data.test_dataloader())

    (whole, _) = of_rank(0, 1, 12 * world_size)
    ranks = [of_rank(rank, world_size, 12) for rank in range(world_size)]
    for k, parts in enumerate(zip(*[train for train, _ in ranks], strict=True)):
        n = len(whole[k].target)
        for name in ("image", "target", "index"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts])[:n], getattr(whole[k], name))
    index = torch.cat([batch.index for parts in zip(*[test for _, test in ranks], strict=True) for batch in parts])
    assert index.tolist() == list(range(128))


def test_splits_are_stratified_and_seeded():
    data, again, other = (DigitsDataModule(seed=seed, train_fraction=0.5) for seed in (0, 0, 1))
    for module in (data, again, other):
        module.setup()
    np.testing.assert_array_equal(data.val_indices, again.val_indices)
    np.testing.assert_array_equal(data.train_indices, again.train_indices)
    assert not np.array_equal(data.val_indices, other.val_indices)
    assert torch.equal(data.test_image, other.test_image)  # the test set is the same for every seed
    assert len(data.train_target) + len(data.test_target) == 1797
    whole = np.bincount(data.train_target)
    assert (np.abs(np.bincount(data.train_target[data.val_indices]) - whole * 0.1) < 1).all()
    assert (np.abs(np.bincount(data.train_target[data.train_indices]) - whole * 0.45) < 1.5).all()


def test_train_per_class_keeps_that_many_of_each():
    data = DigitsDataModule(train_per_class=7)
    assert data.train_size == 70
    assert (np.bincount(data.train_target[data.train_indices]) == 7).all()


def test_fake_data_takes_any_subset_option():
    for options in ({"train_per_class": 25}, {"train_fraction": 0.05}):
        data = CIFAR100DataModule(fake=True, **options)
        assert data.train_size == 360
    assert CIFAR100DataModule(fake=True, train_per_class=2).train_size == 200


def test_val_fraction_0_gives_no_validation_loader():
    data = DigitsDataModule(val_fraction=0)
    assert data.val_dataloader() == []
    assert data.val_size == 0
    assert data.train_size == 1438


def test_loader_takes_chosen_indices_and_refuses_invalid_arguments():
    data = DigitsDataModule()
    index = samples(data.loader("train", torch.tensor([9, 3, 700])))[2]
    assert index.tolist() == [9, 3, 700]
    assert len(data.loader("test", [1, 2], shuffle=True, batch_size=1)) == 2
    with pytest.raises(ValueError, match="indices"):
        data.loader("test", [5000])
    with pytest.raises(ValueError, match="batch_size"):
        data.loader("test", batch_size=0)
    with pytest.raises(ValueError, match="split"):
        data.loader("dev")


def test_mean_and_std_of_the_digits_are_those_of_the_data():
    data = DigitsDataModule()
    data.setup()
    value = data.train_image.double() / 255
    assert data.mean == pytest.approx([value.mean().item()], abs=5e-5)
    assert data.std == pytest.approx([value.std().item()], abs=5e-5)


def test_mean_and_std_can_be_given():
    data = DigitsDataModule(mean=[0.0], std=[1.0])
    assert samples(data.test_dataloader())[0].max() == 1.0


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"eval_batch_size": -1}, "eval_batch_size"),
        ({"val_fraction": 1.0}, "val_fraction"),
        ({"val_fraction": -0.1}, "val_fraction"),
        ({"train_fraction": 0.0}, "train_fraction"),
        ({"train_fraction": 1.5}, "train_fraction"),
        ({"train_per_class": 0}, "train_per_class"),
        ({"train_fraction": 0.5, "train_per_class": 3}, "train_fraction and train_per_class"),
        ({"mean": [0.1, 0.2]}, "mean"),
        ({"std": [0.1, 0.2]}, "std"),
        ({"std": [0.0]}, "std"),
        ({"seed": -1}, "seed"),
        ({"cutout": -1}, "cutout"),
    ],
)
def test_invalid_arguments_raise_at_construction(options, name):
    with pytest.raises(ValueError, match=rf"{name}.*got"):
        DigitsDataModule(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_per_class": 500}, r"train_per_class=500 .*class 0"),
        ({"train_fraction": 0.001}, r"train_fraction=0.001 .*without a sample"),
        ({"val_fraction": 0.0001}, r"val_fraction=0.0001 .*empty"),
    ],
)
def test_splits_without_enough_samples_raise(options, message):
    with pytest.raises(ValueError, match=message):
        DigitsDataModule(**options).setup()


def test_unknown_cifar100_labels_raise():
    with pytest.raises(ValueError, match="labels"):
        CIFAR100DataModule(labels="rough")
