"""Strong views and patches of multi-label images, in memory and from files."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from lightning_kd.data import ArrayDataModule, DigitsDataModule, MosaicDataModule, MultiLabelFolderDataModule
from lightning_kd.data.augment import cut_cell
from lightning_kd.data.auto_augment import OPERATIONS, UNSIGNED
from lightning_kd.data.rand_augment import BatchedRandAugment


def images(n, shape=(3, 16, 20)):
    return torch.from_numpy(np.random.default_rng(0).integers(20, 150, (n, *shape), dtype=np.uint8))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 17, 24)])
def test_rand_augment_equals_torchvision_to_the_bit(shape, monkeypatch):
    policy, reference = BatchedRandAugment(), v2.RandAugment()
    names = list(reference._AUGMENTATION_SPACE)
    assert {*names} == {"Identity", *OPERATIONS} - {"Invert"}
    image = images(1, shape)
    for k, name in enumerate(names):
        for negative in (0, 1):
            sign = -1 if negative and name not in UNSIGNED else 1
            code = 0 if name == "Identity" else policy.operations.index((name, 9, sign))
            drawn = torch.where(torch.tensor([True, False]), code, 0)
            with monkeypatch.context() as patch:
                picks = iter([k, names.index("Identity")])
                patch.setattr(torch, "randint", lambda *_, picks=picks, **__: torch.tensor(next(picks)))
                patch.setattr(torch, "rand", lambda *_, negative=negative, **__: torch.tensor(0.1 if negative else 0.9))
                expected = reference(image[0])
            got = super(BatchedRandAugment, policy).apply(image, drawn[None].numpy())
            assert torch.equal(got[0], expected), (name, negative)


def test_rand_augment_box_has_one_colour_and_is_clipped():
    policy = BatchedRandAugment()
    choice = policy.draw(3000, seed=1)
    assert choice.shape == (3000, 7)
    choice[:, :2] = 0  # only the box
    image = torch.zeros(3000, 3, 8, 8, dtype=torch.uint8)
    choice[:, 2:5] = np.maximum(choice[:, 2:5], 1)
    got = policy.apply(image, choice)
    box = (got > 0).all(1)
    assert torch.equal((got > 0).any(1), box)
    colour = torch.from_numpy(choice[:, 2:5])[:, :, None, None]
    assert torch.equal(got.long(), colour * box[:, None])
    sizes = box.flatten(1).sum(1)
    assert sizes.max() == 16
    assert sizes.min() == 4  # centred in a corner
    shares = box.float().mean(0)
    assert shares[4, 4] > shares[0, 0] > 0


def test_rand_augment_draws_identity_once_in_14_and_uniform_colours():
    choice = BatchedRandAugment().draw(28_000, seed=0)
    nothing = (choice[:, :2] == 0).mean(0)
    assert np.abs(nothing - 1 / 14).max() < 0.01
    assert np.abs((choice[:, 2:5] / 255).mean(0) - 0.5).max() < 0.01


def mosaics(**options):
    return MosaicDataModule(DigitsDataModule(fake=True), train_mosaics=40, batch_size=8, normalize=False, **options)


def test_patches_of_a_mosaic_are_its_tiles():
    data = mosaics()
    batch = next(iter(data.loader("train", views="patches")))
    assert len(batch.image) == 5
    whole = batch.image[0]
    assert torch.equal(whole, next(iter(data.loader("train"))).image)
    for g, patch in enumerate(batch.image[1:]):
        row, column = divmod(g, 2)
        tile = whole[:, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
        assert patch.shape == whole.shape
        small = torch.nn.functional.interpolate(patch, size=(8, 8), mode="area")
        assert (small - tile).abs().mean() < 0.15 < (small - tile.flip(-1)).abs().mean()


def test_cut_cell_enlarges_the_chosen_quadrant():
    image = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).repeat_interleave(6, 0).repeat_interleave(6, 1)
    for cell in range(4):
        got = cut_cell(image[None, None], cell, 2)
        assert torch.equal(got, torch.full((1, 1, 12, 12), cell + 1, dtype=torch.uint8))
    assert torch.equal(cut_cell(image[None, None], 0, 1)[0, 0], image)


def test_strong_patches_differ_from_plain_ones_and_are_reproducible():
    data = mosaics(n_grid=4)
    one, two = (next(iter(data.loader("train", views=("weak", "strong_patches")))) for _ in range(2))
    assert len(one.image) == 18
    assert all(torch.equal(a, b) for a, b in zip(one.image, two.image, strict=True))
    plain = next(iter(data.loader("train", views="patches"))).image
    assert all(not torch.equal(a, b) for a, b in zip(one.image[1:], plain, strict=True))
    assert all(0 <= view.min() <= view.max() <= 1 for view in one.image)


def test_patches_of_files_are_their_quadrants(tmp_path):
    colours = np.array([[[200, 0, 0], [0, 200, 0]], [[0, 0, 200], [200, 200, 0]]], dtype=np.uint8)
    picture = colours.repeat(16, 0).repeat(16, 1)
    for name in "abc":
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    (tmp_path / "labels.csv").write_text("file,labels\na.png,x\nb.png,y\nc.png,x\n")
    data = MultiLabelFolderDataModule(str(tmp_path), image_size=32, test_fraction=0.34, val_fraction=0, normalize=False)
    batch = next(iter(data.loader("train", views="patches")))
    assert torch.equal((batch.image[0][0] * 255).round().byte(), torch.from_numpy(picture).permute(2, 0, 1))
    for g, patch in enumerate(batch.image[1:]):
        expected = torch.from_numpy(colours.reshape(4, 3)[g] / np.float32(255))[:, None, None].expand(3, 32, 32)
        assert torch.allclose(patch[0], expected, atol=1e-6)
    assert len(next(iter(data.loader("train", views=("weak", "strong_patches")))).image) == 6


def test_invalid_patch_options_and_data_raise(tmp_path):
    with pytest.raises(ValueError, match="n_grid=3 must divide height and width of the images, 16 x 16"):
        mosaics(n_grid=3).loader("train", views="patches")
    with pytest.raises(ValueError, match="n_grid must be at least 1"):
        mosaics(n_grid=0)
    with pytest.raises(ValueError, match="views must name at least one of 'plain', 'weak' and 'strong', got"):
        DigitsDataModule(fake=True).loader("train", views="patches")
    target = np.random.default_rng(0).integers(0, 2, (40, 3)).astype(np.uint8)
    np.savez(tmp_path / "a.npz", train_feature=np.zeros((40, 5), np.float32), train_target=target)
    with pytest.raises(ValueError, match="needs images of 1 or 3 channels"):
        ArrayDataModule(str(tmp_path / "a.npz")).loader("train", views="patches")
