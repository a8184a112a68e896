"""Mosaics: their tiles and labels, the class frequencies, and that no split uses images of another."""

import numpy as np
import pytest
import torch

from lightning_kd.core import MultiLabel
from lightning_kd.data import (
    CIFAR100DataModule,
    DigitsDataModule,
    ImageFolderDataModule,
    MosaicDataModule,
    SymmetricNoise,
)
from lightning_kd.data.cifar import CIFAR100_COARSE, CIFAR100_COARSE_CLASSES
from tests.data.image_trees import write_image_folders


def digits(**options):
    return DigitsDataModule(fake=True, val_fraction=0.2, **options)


def tiles_of(data, image):
    side = data.input_shape[1] // data.grid
    cut = image.unfold(2, side, side).unfold(3, side, side)  # [N, C, g, g, h, w]
    return cut.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)


@pytest.mark.parametrize("grid", [1, 2, 3])
def test_labels_are_the_classes_of_tiles_from_the_same_split(grid):
    source = digits()
    data = MosaicDataModule(source, grid=grid, train_mosaics=50, val_mosaics=30, test_mosaics=40)
    data.setup()
    source.setup()
    assert data.input_shape == (1, 8 * grid, 8 * grid)
    assert isinstance(data.problem, MultiLabel)
    assert (data.train_size, data.val_size, data.test_size) == (50, 30, 40)
    for split, array in (("train", "train"), ("val", "train"), ("test", "test")):
        indices = getattr(source, f"{split}_indices")
        known = {
            image.numpy().tobytes(): int(c)
            for image, c in zip(
                getattr(source, f"{array}_image")[indices], getattr(source, f"{array}_target")[indices], strict=True
            )
        }
        image, target = getattr(data, f"{split}_image"), getattr(data, f"{split}_target")
        for tiles, labels in zip(tiles_of(data, image), target, strict=True):
            # images of other splits are not in `known`
            assert {known[tile.contiguous().numpy().tobytes()] for tile in tiles} == {*labels.nonzero()[:, 0].tolist()}
        assert set(target.unique().tolist()) <= {0.0, 1.0}


def test_mosaics_depend_on_mosaic_seed_only():
    one, same, other = (MosaicDataModule(digits(), mosaic_seed=k, seed=s) for k, s in ((3, 0), (3, 7), (4, 0)))
    for data in (one, same, other):
        data.setup()
    assert torch.equal(one.train_image, same.train_image)
    assert torch.equal(one.test_target, same.test_target)
    assert not torch.equal(one.train_image, other.train_image)
    assert len(one.train_target) == one.source.train_size // 4


def test_imbalance_sets_the_class_frequencies():
    data = MosaicDataModule(digits(), grid=1, imbalance=20.0, train_mosaics=20_000)
    data.setup()
    share = data.train_target.mean(0).numpy()
    expected = 20.0 ** -np.linspace(0, 1, 10)
    expected /= expected.sum()
    assert np.abs(share - expected).max() < 5 * np.sqrt(0.25 / 20_000)
    assert share[0] / share[-1] > 10


def test_co_occurrence_sets_which_classes_appear_together():
    pairs = np.eye(10)[:, ::-1]  # class c appears only with 9 - c
    data = MosaicDataModule(digits(), co_occurrence=pairs.tolist(), train_mosaics=300)
    data.setup()
    assert torch.equal(data.train_target, data.train_target.flip(1))
    assert (data.train_target.sum(1) == 2).all()
    source = data.source
    known = {image.numpy().tobytes(): int(c) for image, c in zip(source.train_image, source.train_target, strict=True)}
    for tiles in tiles_of(data, data.train_image):
        found = [known[tile.contiguous().numpy().tobytes()] for tile in tiles]
        assert sorted({*found}) == [min(found), 9 - min(found)]
        # the tile drawn first is alone, and the three others are drawn beside it
        assert sorted(found.count(c) for c in {*found}) == [1, 3]


def test_first_drawn_tile_is_at_any_position():
    beside = np.zeros((10, 10))
    beside[:, 9] = 1  # only the tile drawn first can be a digit other than 9
    source = digits()
    data = MosaicDataModule(source, co_occurrence=beside.tolist(), train_mosaics=400)
    data.setup()
    nine = {image.numpy().tobytes() for image in data.source.train_image[data.source.train_target == 9]}
    places = [
        [tile.contiguous().numpy().tobytes() in nine for tile in tiles] for tiles in tiles_of(data, data.train_image)
    ]
    other = (~np.array(places)).mean(0)
    assert (np.abs(other - 0.225) < 0.1).all()


def test_coarse_classes_of_cifar100_become_labels():
    source = CIFAR100DataModule(fake=True, val_fraction=0)
    data = MosaicDataModule(source, classes="coarse", grid=1, train_mosaics=100)
    data.setup()
    assert data.class_names == CIFAR100_COARSE_CLASSES
    assert data.input_shape == (3, 32, 32)
    source.setup()
    known = {image.numpy().tobytes(): int(c) for image, c in zip(source.train_image, source.train_target, strict=True)}
    for image, target in zip(data.train_image, data.train_target, strict=True):
        assert target.argmax() == CIFAR100_COARSE[known[image.numpy().tobytes()]]
    assert data.val_dataloader() == []


def test_mosaics_take_the_augmentation_of_the_source():
    data = MosaicDataModule(digits(augment=True), batch_size=8)
    assert data.crop_flip.padding == 1
    batch = next(iter(data.train_dataloader()))
    assert batch.image.shape == (8, 1, 16, 16)
    data.problem.check_target(batch.target)


def test_fake_reaches_the_source_and_normalize_false_keeps_pixels():
    data = MosaicDataModule(DigitsDataModule(), fake=True, normalize=False)
    data.setup()
    assert data.source.fake
    image = next(iter(data.loader("test"))).image
    assert torch.allclose(image * 255, data.test_image[: len(image)].float(), atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": 0}, "grid must be at least 1"),
        ({"imbalance": 0.5}, "imbalance must be at least 1"),
        ({"classes": "coarse"}, "classes='coarse' is for CIFAR-100, got DigitsDataModule"),
        ({"classes": "other"}, "classes must be 'fine' or 'coarse'"),
        ({"co_occurrence": [[1.0]]}, "co_occurrence must be 10 rows of 10 numbers"),
        ({"co_occurrence": np.zeros((10, 10)).tolist()}, "only zeros for '0'"),
        ({"test_mosaics": 0}, "test_mosaics must be at least 1"),
    ],
)
def test_invalid_arguments_raise(options, message):
    with pytest.raises(ValueError, match=message):
        MosaicDataModule(digits(), **options)


def test_invalid_sources_raise(tmp_path):
    with pytest.raises(ValueError, match="images with one class each and no noise"):
        MosaicDataModule(digits(noise=SymmetricNoise(0.2)))
    data = MosaicDataModule(ImageFolderDataModule(str(write_image_folders(tmp_path)), image_size=8))
    with pytest.raises(ValueError, match="give arrays instead of files"):
        data.setup()
