"""Arrays with several labels per sample or with masks: reading, errors, splits, views, fake data."""

import numpy as np
import pytest
import torch

from lightning_kd.core import MultiLabel, Segmentation, SingleLabel
from lightning_kd.data import ArrayDataModule, OpenSetDataModule, SymmetricNoise


def saved(tmp_path, **arrays):
    path = tmp_path / "some.npz"
    np.savez(path, **arrays)
    return str(path)


def images(count=40, size=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def label_matrix(count=40, classes=4):
    return np.random.default_rng(1).choice([0, 1, 255], (count, classes), p=[0.6, 0.3, 0.1]).astype(np.uint8)


def mask_array(count=40, size=8, classes=3):
    found = np.random.default_rng(2).integers(0, classes, (count, size, size), dtype=np.uint8)
    found[:, 0, 0] = 255
    return found


def test_label_matrix_makes_a_multi_label_problem(tmp_path):
    target = label_matrix()
    data = ArrayDataModule(saved(tmp_path, train_image=images(), train_target=target), batch_size=16)
    assert isinstance(data.problem, MultiLabel)
    assert (data.num_classes, data.class_names) == (4, ["0", "1", "2", "3"])
    assert (data.train_size, data.val_size, data.test_size) == (29, 3, 8)
    batch = next(iter(data.train_dataloader()))
    assert batch.target.dtype == torch.float32
    data.problem.check_target(batch.target)
    stored = torch.cat([data.train_target, data.test_target])
    assert sorted(stored.sum(1).tolist()) == sorted(np.where(target == 255, -1.0, target).sum(1).tolist())


def test_masks_are_cropped_and_flipped_with_their_images(tmp_path):
    """The channels of each image show its mask, so that a change of one without the other is noticed."""
    target = mask_array()
    picture = np.repeat(np.where(target == 255, 0, target + 1)[..., None], 3, 3).astype(np.uint8)
    data = ArrayDataModule(
        saved(tmp_path, train_image=picture, train_target=target),
        augment=True,
        crop_padding=2,
        mean=[0.0] * 3,
        std=[1.0] * 3,
        batch_size=16,
    )
    assert isinstance(data.problem, Segmentation)
    assert data.num_classes == 3
    loader = data.train_dataloader()
    moved = 0
    for epoch in range(2):
        loader.set_epoch(epoch)
        for batch in loader:
            assert batch.target.dtype == torch.int64
            shown = (batch.image[:, 0] * 255).round().long() - 1  # padding and ignored pixels are -1
            assert torch.equal(shown, batch.target)
            plain = data.train_target[batch.index].long()
            moved += int((batch.target != plain).flatten(1).any(1).sum())
    assert moved > 20
    for batch in data.val_dataloader():
        assert torch.equal(batch.target, data.train_target[batch.index].long())


def test_target_vector_makes_a_single_label_problem(tmp_path):
    assert isinstance(ArrayDataModule(saved(tmp_path, image=images(), target=np.arange(40) % 3)).problem, SingleLabel)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (label_matrix().astype(np.int64), "must hold uint8 labels"),
        (label_matrix() + np.uint8(3), "must hold 0, 1 and 255"),
        (label_matrix(39), "has 39 labels, got 40 samples"),
        (mask_array(size=7), "as large as the images"),
        (mask_array().astype(np.int64), "must hold uint8 masks"),
        (mask_array(39), "has 39 labels, got 40 samples"),
    ],
)
def test_invalid_targets_raise(tmp_path, target, message):
    with pytest.raises(ValueError, match=message):
        ArrayDataModule(saved(tmp_path, train_image=images(), train_target=target))


def test_mask_class_beyond_class_names_raises(tmp_path):
    path = saved(tmp_path, train_image=images(), train_target=mask_array())
    with pytest.raises(ValueError, match="between 0 and 1, or 255 to be ignored, got 2"):
        ArrayDataModule(path, class_names=["a", "b"])


def test_single_label_options_with_masks_raise(tmp_path):
    path = saved(tmp_path, train_image=images(), train_target=mask_array())
    with pytest.raises(ValueError, match="noise is for one class per sample"):
        ArrayDataModule(path, noise=SymmetricNoise(0.2))
    with pytest.raises(ValueError, match="train_per_class=3 is for one class per sample"):
        ArrayDataModule(path, train_per_class=3)
    with pytest.raises(ValueError, match="does not go with masks"):
        ArrayDataModule(path, cutout=2)
    with pytest.raises(ValueError, match="cannot go with masks"):
        ArrayDataModule(path).loader("train", views=["weak", "weak"])


@pytest.mark.parametrize("kind", ["multi_label", "segmentation"])
def test_fake_data_is_the_same_every_time(kind):
    first, second = (ArrayDataModule("none.npz", kind=kind, fake=True, class_names=list("abcd")) for _ in range(2))
    first.setup()
    second.setup()
    assert torch.equal(first.train_image, second.train_image)
    assert torch.equal(first.train_target, second.train_target)
    first.problem.check_target(next(iter(first.train_dataloader())).target)


def test_last_axis_of_length_1_is_dropped(tmp_path):
    target = np.arange(40)[:, None] % 3
    data = ArrayDataModule(saved(tmp_path, train_image=images(), train_target=target))
    assert isinstance(data.problem, SingleLabel)
    assert data.num_classes == 3
    data = ArrayDataModule(saved(tmp_path, train_image=images(), train_target=mask_array()[..., None]))
    assert isinstance(data.problem, Segmentation)
    data.setup()
    assert data.train_target.shape == (32, 8, 8)


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (np.full((40, 8, 8), 255, np.uint8), {}, "must hold at least 2 classes, got no labelled pixel"),
        (np.zeros((40, 8, 8), np.uint8), {}, "must hold at least 2 classes, got class 0 alone"),
        (np.zeros(40, np.int64), {}, "must hold at least 2 classes, got class 0 alone"),
        (np.full(40, 3), {}, "must hold at least 2 classes, got class 3 alone"),
        (np.full(40, "ant"), {}, "must hold at least 2 classes, got class ant alone"),
        (label_matrix(), {"class_names": ["a"]}, "a name for each of the 4 columns .* got 1 names"),
        (label_matrix(), {"kind": "tags"}, "kind must be one of single_label, multi_label, segmentation, or None, got"),
    ],
)
def test_single_class_wrong_names_and_unknown_kind_raise(tmp_path, target, options, message, capsys):
    with pytest.raises(ValueError, match=message):
        ArrayDataModule(saved(tmp_path, train_image=images(), train_target=target), **options)
    assert capsys.readouterr().err == ""


def test_masks_with_features_raise(tmp_path):
    feature = np.zeros((40, 6), np.float32)
    with pytest.raises(ValueError, match="masks only for images, got features"):
        ArrayDataModule(saved(tmp_path, train_feature=feature, train_target=mask_array()))


def test_fake_features_have_several_labels(tmp_path):
    path = saved(tmp_path, train_feature=np.zeros((40, 6), np.float32), train_target=label_matrix())
    data = ArrayDataModule(path, fake=True)
    batch = next(iter(data.train_dataloader()))
    assert batch.image.shape == (64, 6)
    data.problem.check_target(batch.target)


def test_train_fraction_without_a_sample_raises(tmp_path):
    path = saved(tmp_path, train_image=images(), train_target=mask_array())
    with pytest.raises(ValueError, match=r"train_fraction=0\.01 of 29 samples leaves none: raise it"):
        ArrayDataModule(path, train_fraction=0.01).setup()


def test_loaders_share_masks(tmp_path):
    data = ArrayDataModule(saved(tmp_path, train_image=images(), train_target=mask_array()), augment=True)
    loaders = [data.loader("train", augment=True) for _ in range(3)]
    assert len({id(loader._masks) for loader in loaders}) == 1


@pytest.mark.parametrize("kind", ["multi_label", "segmentation"])
def test_pool_of_multi_label_or_mask_data_raises(kind):
    with pytest.raises(ValueError, match="source must have one class per sample, ArrayDataModule has"):
        OpenSetDataModule(ArrayDataModule("none.npz", kind=kind, fake=True))
