"""Batched crop, flip, normalisation and cutout, compared with PIL and torchvision image by image."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import functional as F

from lightning_kd.data import CropFlip, Normalize, ResidentLoader, ShardedSampler
from lightning_kd.data.augment import cut_out_, draw_centres

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def images(n=40, channels=3, height=32, width=32):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, channels, height, width), dtype=np.uint8))


def test_crop_flip_draws_its_162_views_equally_often():
    crop_flip = CropFlip(4, True)
    assert crop_flip.views == 162
    position = torch.arange(32 * 32, dtype=torch.int32).view(1, 1, 32, 32) + 1
    padded = crop_flip.pad(position)
    seen = {}
    for view in range(162):
        crop = crop_flip.gather(padded, torch.zeros(1, dtype=torch.int64), torch.tensor([view]))
        seen[crop.numpy().tobytes()] = view
    assert len(seen) == 162  # all different
    count = np.bincount(crop_flip.draw(162 * 200, seed=0), minlength=162)
    chi_square = ((count - 200) ** 2 / 200).sum()
    assert len(count) == 162
    assert chi_square < 210  # 161 degrees of freedom: above it in 0.6 % of all seeds


def test_offsets_and_flips_differ_within_a_batch():
    y, x, flip = CropFlip().decode(CropFlip().draw(64, seed=0))
    for part in (y, x):
        assert set(part.tolist()) == set(range(9))
    assert set(flip.tolist()) == {True, False}


@pytest.mark.parametrize(
    ("shape", "crop_flip"),
    [((3, 32, 32), CropFlip()), ((1, 28, 28), CropFlip()), ((1, 8, 8), CropFlip(1, False)), ((3, 9, 14), CropFlip(2))],
)
def test_loader_equals_pil_image_by_image(shape, crop_flip):
    image = images(40, *shape)
    mean, std = MEAN[: shape[0]], STD[: shape[0]]
    sampler = ShardedSampler(np.arange(5, 40), 16, shuffle=True, seed=7)
    sampler.set_epoch(2)
    loader = ResidentLoader(image, torch.arange(40), sampler, Normalize(mean, std, shape), augment=crop_flip)
    views = crop_flip.draw(40, seed=7, epoch=2)
    seen = 0
    for batch in loader:
        assert batch.image.dtype == torch.float32
        assert batch.target.dtype == batch.index.dtype == torch.int64
        assert batch.target.tolist() == batch.index.tolist()
        assert batch.extras == {}
        for sample, i in zip(batch.image, batch.index.tolist(), strict=True):
            y, x, flip = (int(part) for part in crop_flip.decode(views[i]))
            pil = Image.fromarray(image[i].permute(1, 2, 0).numpy().squeeze())
            pil = ImageOps.expand(pil, crop_flip.padding, 0).crop((x, y, x + shape[2], y + shape[1]))
            pil = ImageOps.mirror(pil) if flip else pil
            torch.testing.assert_close(sample, F.normalize(F.to_tensor(pil), mean, std), atol=2e-6, rtol=1e-6)
            seen += 1
    assert seen == 35


def test_without_augmentation_images_are_only_normalised():
    image = images(10)
    sampler = ShardedSampler(np.arange(10), 4, shuffle=False)
    loader = ResidentLoader(image, torch.zeros(10, dtype=torch.int64), sampler, Normalize(MEAN, STD, (3, 32, 32)))
    got = torch.cat([batch.image for batch in loader])
    torch.testing.assert_close(got, F.normalize(image / 255, MEAN, STD), atol=2e-6, rtol=1e-6)


def test_views_do_not_depend_on_batch_size_or_rank():
    def samples(batch_size, rank, world_size):
        sampler = ShardedSampler(np.arange(40), batch_size, shuffle=True, rank=rank, world_size=world_size)
        normalize = Normalize(MEAN, STD, (3, 32, 32))
        loader = ResidentLoader(images(), torch.zeros(40), sampler, normalize, augment=CropFlip(), cutout=8)
        return {int(i): image for batch in loader for image, i in zip(batch.image, batch.index, strict=True)}

    whole = samples(16, 0, 1)
    parts = samples(8, 0, 2) | samples(8, 1, 2)
    assert set(whole) == set(parts) == set(range(40))
    for i in whole:
        torch.testing.assert_close(whole[i], parts[i], atol=0, rtol=0)


def test_features_are_normalised_too():
    feature = torch.randn(12, 5)
    loader = ResidentLoader(
        feature,
        torch.zeros(12),
        ShardedSampler(np.arange(12), 5, shuffle=False),
        Normalize([1.0] * 5, [2.0] * 5, (5,), full_scale=1.0),
    )
    got = torch.cat([batch.image for batch in loader])
    torch.testing.assert_close(got, (feature - 1) / 2)
    assert feature.data_ptr() != got.data_ptr()


@pytest.mark.parametrize("side", [1, 4, 5, 40])
def test_cutout_box_is_clipped_at_the_borders(side):
    centre = torch.tensor([[0, 0], [5, 9], [9, 11], [3, 0]])
    image = cut_out_(torch.ones(4, 2, 10, 12), centre, side)
    for sample, (y, x) in zip(image, centre.tolist(), strict=True):
        expected = torch.ones(2, 10, 12)
        top, left = y - side // 2, x - side // 2
        expected[:, max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = 0
        assert torch.equal(sample, expected)


def test_cutout_centres_are_uniform():
    centre = draw_centres(20_000, (8, 6), seed=1)
    count = np.bincount(centre[:, 0] * 6 + centre[:, 1], minlength=48)
    expected = 20_000 / 48
    assert ((count - expected) ** 2 / expected).sum() < 80  # 47 degrees of freedom


def test_cutout_comes_after_normalisation_and_is_the_mean_colour():
    sampler = ShardedSampler(np.arange(6), 6, shuffle=False)
    image = torch.full((6, 3, 32, 32), 200, dtype=torch.uint8)
    loader = ResidentLoader(image, torch.zeros(6), sampler, Normalize(MEAN, STD, (3, 32, 32)), cutout=16)
    (batch,) = loader
    cut = (batch.image == 0).all(1).flatten(1).sum(1)
    assert ((cut >= 64) & (cut <= 256)).all()  # a quarter of the box is always inside
