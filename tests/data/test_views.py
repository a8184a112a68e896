"""Several views of each sample, streams, and the loader that ``train_dataloader`` gives to a task."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import AutoAugmentPolicy, v2

from lightning_kd.core.seeding import derive_seed
from lightning_kd.data import (
    ArrayDataModule,
    CIFAR10DataModule,
    DigitsDataModule,
    ImageFolderDataModule,
    Normalize,
    ResidentLoader,
    ShardedSampler,
    SymmetricNoise,
)
from lightning_kd.data import resident as resident_module
from lightning_kd.data.augment import CropFlip, cut_out_, draw_centres, view_seed
from lightning_kd.data.auto_augment import BatchedAutoAugment


def cifar(**options):
    return CIFAR10DataModule(fake=True, **{"batch_size": 16, "val_fraction": 0.2, **options})


def by_index(batches):
    """The views of each sample, by its index."""
    found = {}
    for batch in batches:
        views = batch.image if isinstance(batch.image, tuple) else (batch.image,)
        for k, i in enumerate(batch.index.tolist()):
            found[i] = torch.stack([view[k] for view in views])
    return found


def equal(one, other):
    return set(one) == set(other) and all(torch.equal(one[i], other[i]) for i in one)


# -- views in memory -----------------------------------------------------------------------------------------------


def test_first_of_two_weak_views_equals_a_single_view():
    data = cifar(cutout=4)
    single = list(data.loader("train", shuffle=True, augment=True))
    double = list(data.loader("train", shuffle=True, views=("weak", "weak")))
    assert len(single) == len(double) == len(data.loader("train", shuffle=True))
    for one, two in zip(single, double, strict=True):
        assert torch.equal(one.index, two.index)
        assert isinstance(two.image, tuple)
        assert torch.equal(one.image, two.image[0])
        assert not torch.equal(*two.image)
        assert torch.equal(one.target, two.target)
        assert two.extras == {}


def test_one_view_name_gives_a_tensor_and_a_sequence_a_tuple():
    data = cifar()
    alone, tuple_ = (next(iter(data.loader("train", views=views))) for views in ("plain", ("plain",)))
    assert torch.equal(alone.image, tuple_.image[0])
    assert torch.equal(alone.image, next(iter(data.loader("train"))).image)


def test_each_view_is_drawn_from_its_own_seed():
    data = cifar(seed=5)
    loader = data.loader("train", shuffle=True, views=("weak", "plain", "weak"))
    loader.set_epoch(3)
    got = by_index(loader)
    normalize = Normalize(data.mean, data.std, data.input_shape)
    views = [data.crop_flip.draw(len(data.train_target), view_seed(5, k), epoch=3) for k in (0, 2)]
    padded = data.crop_flip.pad(data.train_image)
    for i, images in got.items():
        index = torch.tensor([i])
        first, last = (normalize(data.crop_flip.gather(padded, index, view[index])) for view in views)
        assert torch.equal(images, torch.cat([first, normalize(data.train_image[index]), last]))


@pytest.mark.parametrize(
    ("channels", "size", "crop_flip"), [(3, 32, CropFlip()), (1, 8, CropFlip(1, False)), (3, 12, None)]
)
def test_strong_view_is_autoaugment_crop_flip_normalise_cutout(channels, size, crop_flip):
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (50, channels, size, size), dtype=np.uint8))
    normalize = Normalize([0.4] * channels, [0.3] * channels, (channels, size, size))
    sampler = ShardedSampler(np.arange(10, 50), 16, shuffle=True, seed=2)
    sampler.set_epoch(1)
    loader = ResidentLoader(image, torch.arange(50), sampler, normalize, augment=crop_flip, views="strong")
    policy = BatchedAutoAugment(AutoAugmentPolicy.CIFAR10)
    expected = policy.apply(image, policy.draw(50, 2, 1))
    if crop_flip:
        expected = crop_flip.gather(crop_flip.pad(expected), torch.arange(50), crop_flip.draw(50, 2, 1))
    expected = cut_out_(normalize(expected), draw_centres(50, (size, size), 2, 1), size // 2)
    for i, views in by_index(loader).items():
        assert torch.equal(views[0], expected[i])


def test_strong_views_do_not_depend_on_batch_size_rank_or_chunk_size(monkeypatch):
    def samples(batch_size, rank=0, world_size=1):
        sampler = ShardedSampler(np.arange(40), batch_size, shuffle=True, rank=rank, world_size=world_size)
        image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (40, 3, 32, 32), dtype=np.uint8))
        normalize = Normalize([0.5] * 3, [0.2] * 3, (3, 32, 32))
        views = ("weak", "strong", "strong")
        return by_index(
            ResidentLoader(image, torch.zeros(40), sampler, normalize, augment=CropFlip(), cutout=8, views=views)
        )

    whole = samples(16)
    assert equal(whole, samples(8, 0, 2) | samples(8, 1, 2))
    monkeypatch.setattr(resident_module, "STRONG_BYTES", 1)
    assert equal(whole, samples(16))
    assert all(not torch.equal(views[1], views[2]) for views in whole.values())


def test_unshuffled_loader_with_a_strong_view_keeps_the_order():
    data = cifar()
    index = torch.cat([batch.index for batch in data.loader("train", views=("plain", "strong"))])
    assert index.tolist() == data.train_indices.tolist()


@pytest.mark.parametrize("views", [(), ("weak", "odd"), "w", "weaker"])
def test_unknown_view_names_raise(views):
    with pytest.raises(ValueError, match="views must name"):
        cifar().loader("train", views=views)


def test_features_have_weak_and_plain_views_only(tmp_path):
    rng = np.random.default_rng(0)
    target = np.arange(40) % 2
    np.savez(tmp_path / "a.npz", feature=rng.normal(size=(40, 5)).astype(np.float32), target=target)
    data = ArrayDataModule(str(tmp_path / "a.npz"), mean=[0.0] * 5, std=[1.0] * 5)
    one, two = next(iter(data.loader("train", views=("weak", "plain")))).image
    assert torch.equal(one, two)
    with pytest.raises(ValueError, match="'strong'"):
        data.loader("train", views=("weak", "strong"))


def test_strong_view_of_images_with_2_channels_raises():
    image, normalize = torch.zeros(4, 2, 8, 8, dtype=torch.uint8), Normalize([0.0] * 2, [1.0] * 2, (2, 8, 8))
    sampler = ShardedSampler(np.arange(4), 2, shuffle=False)
    with pytest.raises(ValueError, match="1 or 3 channels"):
        ResidentLoader(image, torch.zeros(4), sampler, normalize, views=("strong",))


# -- streams, last batches, memory ---------------------------------------------------------------------------------


def test_streams_have_their_own_order_and_views():
    data = cifar()
    loaders = [
        data.loader("train", shuffle=True, views=("weak",), stream=stream) for stream in ("", "one", "two", "one")
    ]
    batches = [list(loader) for loader in loaders]
    orders = [torch.cat([batch.index for batch in part]).tolist() for part in batches]
    assert orders[1] == orders[3]
    assert len({tuple(order) for order in orders}) == 3
    images = [by_index(part) for part in batches]
    assert equal(images[1], images[3])
    common = set.intersection(*map(set, images))
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert np.mean([torch.equal(images[a][i], images[b][i]) for i in common]) < 0.1


@pytest.mark.parametrize(
    ("n", "batch_size", "world_size", "sizes"),
    [
        (20, 8, 1, [8, 8]),
        (16, 8, 1, [8, 8]),
        (5, 8, 1, [5]),
        (20, 4, 2, [4, 4]),
        (7, 4, 2, [4]),
        (3, 1, 2, [1]),
        (1, 8, 2, [1]),
    ],
)
def test_drop_last_keeps_full_batches_but_at_least_one_batch(n, batch_size, world_size, sizes):
    for rank in range(world_size):
        sampler = ShardedSampler(
            np.arange(n), batch_size, shuffle=True, rank=rank, world_size=world_size, drop_last=True
        )
        assert [len(batch) for batch in sampler.batches(0)] == sizes
        assert len(sampler) == len(sizes)


def test_drop_last_changes_nothing_without_shuffle():
    data = cifar()
    assert equal(by_index(data.loader("train", drop_last=True)), by_index(data.loader("train")))


def test_loader_with_drop_last_gives_full_batches_only():
    data = cifar()
    data.setup()
    indices = data.train_indices[:20]
    for drop_last, sizes in ((True, [16]), (False, [16, 4])):
        loader = data.loader("train", indices, shuffle=True, drop_last=drop_last)
        assert [len(batch.target) for batch in loader] == sizes


def test_loaders_of_one_array_share_its_memory():
    data = cifar()
    weak, strong = (data.loader("train", views=(name, "plain")) for name in ("weak", "strong"))
    val = data.loader("val")
    next(iter(weak)), next(iter(strong))
    assert weak._stored is strong._stored is val._stored
    assert weak._stored.get(data.crop_flip).data_ptr() == val._stored.get(data.crop_flip).data_ptr()
    assert weak._stored.get().data_ptr() == data.train_image.data_ptr()
    assert data.loader("test")._stored is not weak._stored
    data.train_image = data.train_image.flip(0)
    assert data.loader("train")._stored.source is data.train_image


def test_loader_has_lightnings_attributes_and_draws_nothing_early():
    data = cifar()
    loader = data.loader("train", shuffle=True, views=("weak", "strong"))
    assert loader.batch_sampler.sampler is loader.sampler
    assert len(loader) == len(list(loader))
    early = iter(loader)
    loader.set_epoch(4)
    again = data.loader("train", shuffle=True, views=("weak", "strong"))
    again.set_epoch(4)
    assert equal(by_index(early), by_index(again))


# -- labels and the task -------------------------------------------------------------------------------------------


def test_only_batches_of_the_training_array_have_clean_targets():
    data = DigitsDataModule(noise=SymmetricNoise(0.4), fake=True)
    for split in ("train", "val"):
        batch = next(iter(data.loader(split)))
        assert torch.equal(batch.extras["clean_target"], data.train_clean[batch.index])
        assert torch.equal(batch.target, data.train_target[batch.index])
        assert batch.extras["clean_target"].dtype == torch.int64
    assert next(iter(data.loader("test"))).extras == {}


def test_train_loader_of_the_task_replaces_the_default():
    data = cifar()
    seen = []
    task = SimpleNamespace(train_loader=lambda given: seen.append(given) or "its loader")
    data.trainer = SimpleNamespace(lightning_module=task)
    assert data.train_dataloader() == "its loader"
    assert seen == [data]
    data.trainer = None
    batch = next(iter(data.train_dataloader()))
    assert torch.equal(batch.image, next(iter(data.loader("train", shuffle=True, augment=True))).image)


# -- views from files ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(24):
        path = tmp_path / "set" / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 26, 3), dtype=np.uint8)).save(path)
    return str(tmp_path / "set")


def make(folder, **options):
    return ImageFolderDataModule(folder, image_size=16, batch_size=8, seed=3, **options)


def test_views_from_files_equal_torchvision_with_the_same_seed(folder):
    data = make(folder)
    loader = data.loader("train", shuffle=True, views=("weak", "strong", "plain"))
    loader.set_epoch(2)
    batch = next(iter(loader))
    crop = [v2.RandomResizedCrop(16, scale=(0.08, 1.0)), v2.RandomHorizontalFlip()]
    end = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.mean, data.std)]
    strong = v2.Compose([*crop, v2.AutoAugment(AutoAugmentPolicy.IMAGENET), *end])
    for k, i in enumerate(batch.index.tolist()):
        picture = Image.open(data.train_image[i])
        torch.manual_seed(derive_seed(3, "augment", 2, 0, i))
        assert torch.equal(batch.image[0][k], v2.Compose([*crop, *end])(picture))
        torch.manual_seed(derive_seed(view_seed(3, 1), "augment", 2, 0, i))
        expected, got = strong(picture), batch.image[1][k]
        centre = torch.stack([torch.randint(16, ()), torch.randint(16, ())])
        assert torch.equal(got, cut_out_(expected[None], centre[None], 8)[0])
        assert torch.equal(batch.image[2][k], data.transform("plain")(picture))


def test_views_from_files_do_not_depend_on_workers(folder):
    def batches(num_workers):
        data = make(folder, num_workers=num_workers, noise=SymmetricNoise(0.5))
        return list(data.loader("train", shuffle=True, views=("weak", "weak", "strong"), stream="net2", drop_last=True))

    alone, workers = batches(0), batches(1)
    assert equal(by_index(alone), by_index(workers))
    for one, two in zip(alone, workers, strict=True):
        assert len(one.image) == 3
        assert len(one.target) == 8
        assert not torch.equal(one.image[0], one.image[1])
        assert torch.equal(one.extras["clean_target"], two.extras["clean_target"])


def test_first_of_two_views_from_files_equals_a_single_view(folder):
    data = make(folder)
    one = by_index(data.loader("train", augment=True))
    two = by_index(data.loader("train", views=("weak", "weak")))
    assert all(torch.equal(one[i][0], two[i][0]) for i in one)


def test_strong_view_without_augmentation_starts_from_the_plain_view(folder):
    steps = make(folder, augment=False).transform("strong").transforms
    assert [type(step).__name__ for step in steps[:3]] == ["Resize", "CenterCrop", "AutoAugment"]
    assert type(steps[-1]).__name__ == "RandomCutout"


def test_fake_images_of_a_folder_use_the_imagenet_policy(folder):
    data = make(folder, fake=True)
    loader = data.loader("train", views=("weak", "strong"))
    assert loader._policy.policy == AutoAugmentPolicy.IMAGENET
    assert next(iter(loader)).image[1].shape == (len(next(iter(loader)).target), 3, 16, 16)
