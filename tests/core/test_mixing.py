"""CutMix: the box and its pixels (MixUp's weights are tested with the method)."""

import numpy as np
import pytest
import torch

from lightning_kd.core.mixing import Box, cut_mix, draw_box


def test_cut_mix_takes_the_pixels_of_the_box_from_the_partner():
    image = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 2, 4, 5).contiguous()
    partner, box = torch.tensor([1, 2, 0]), Box(1, 3, 0, 4)
    mixed = cut_mix(image, partner, box)
    inside = torch.zeros(4, 5, dtype=torch.bool)
    inside[1:3, :4] = True
    assert box.area == inside.sum() == 8
    for k in range(3):
        assert (mixed[k][:, inside] == partner[k]).all()
        assert (mixed[k][:, ~inside] == k).all()
    assert (image == torch.arange(3.0).view(3, 1, 1, 1)).all()  # the input is unchanged


def test_boxes_lie_in_the_image_and_have_the_expected_mean_area():
    generator = np.random.default_rng(0)
    boxes = [draw_box(generator, 1.0, 32, 64) for _ in range(2000)]
    assert all(0 <= b.top <= b.bottom <= 32 and 0 <= b.left <= b.right <= 64 for b in boxes)
    whole = [b for b in boxes if b.top > 0 and b.left > 0 and b.bottom < 32 and b.right < 64]
    assert all(abs((b.right - b.left) - 2 * (b.bottom - b.top)) <= 4 for b in whole)  # proportions of the image
    # expected area of a uniform share: the border cuts a side s = sqrt(share) to s - s^2 / 4 on average
    share = np.linspace(0, 1, 1001) ** 0.5
    assert np.mean([b.area for b in boxes]) / (32 * 64) == pytest.approx(((share - share**2 / 4) ** 2).mean(), abs=0.03)
