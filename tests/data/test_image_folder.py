"""Images in folders, streamed through workers."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from lightning_kd.core.seeding import derive_seed
from lightning_kd.data import ImageFolderDataModule

RNG = np.random.default_rng(0)
SIZES = {"cat": 10, "dog": 15, "eel": 20}


def tree(root, sizes=SIZES):
    for name, n in sizes.items():
        for i in range(n):
            path = root / name / ("deep" if i % 2 else "") / f"{i:02d}.{'PNG' if i % 3 else 'png'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            shape = (20 + i % 4, 26) if i == 5 else (20 + i % 4, 26, 3)  # one is grey
            Image.fromarray(RNG.integers(0, 256, shape, dtype=np.uint8)).save(path)
    (root / "notes.txt").write_text("no image")
    (root / ".hidden").mkdir(exist_ok=True)


@pytest.fixture
def root(tmp_path):
    tree(tmp_path / "set")
    return tmp_path / "set"


def make(root, **options):
    return ImageFolderDataModule(str(root), image_size=16, batch_size=8, **options)


def test_folder_without_splits_is_split_per_class_whatever_the_seed(root):
    data = make(root)
    assert (data.num_classes, data.class_names, data.input_shape) == (3, ["cat", "dog", "eel"], (3, 16, 16))
    assert (data.train_size, data.val_size, data.test_size) == (32, 4, 9)
    assert np.bincount(data.test_target).tolist() == [2, 3, 4]
    assert {os.path.basename(os.path.dirname(p)) for p in data.train_image} <= {"cat", "dog", "eel", "deep"}
    assert len(set(data.train_image) | set(data.test_image)) == 45
    again = make(root, seed=5)
    again.setup()
    assert again.test_image == data.test_image


@pytest.mark.parametrize(
    ("splits", "sizes"),
    [
        ({"train": 1}, (32, 4, 9)),
        ({"train": 1, "val": 1}, (41, 4, 45)),
        ({"train": 1, "test": 1}, (41, 4, 45)),
        ({"train": 1, "val": 1, "test": 1}, (45, 45, 45)),
    ],
)
def test_train_val_and_test_folders_are_used_as_splits(tmp_path, splits, sizes):
    for split in splits:
        tree(tmp_path / split)
    data = make(tmp_path)
    assert (data.train_size, data.val_size, data.test_size) == sizes
    batch = next(iter(data.val_dataloader()))
    if len(splits) == 3:
        assert f"{os.sep}val{os.sep}" in data.val_image[0]
        assert (data.val_target[batch.index] == batch.target).all()
    else:
        assert (data.train_target[batch.index] == batch.target).all()
    assert all(f"{os.sep}train{os.sep}" in path for path in data.train_image)


def test_training_images_equal_torchvision_with_the_same_seed(root):
    data = make(root, scale=(0.3, 1.0), seed=3)
    loader = data.train_dataloader()
    loader.set_epoch(2)
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(16, scale=(0.3, 1.0)),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    batch = next(iter(loader))
    for image, i in zip(batch.image, batch.index.tolist(), strict=True):
        torch.manual_seed(derive_seed(3, "augment", 2, 0, i))
        expected = transform(Image.open(data.train_image[i]).convert("RGB"))
        torch.testing.assert_close(image, expected.as_subclass(torch.Tensor))


def test_evaluation_images_are_resized_and_centre_cropped(root):
    data = make(root)
    batch = next(iter(data.test_dataloader()))
    pil = Image.open(data.test_image[0]).convert("RGB")
    expected = v2.functional.center_crop(v2.functional.resize(pil, 18), 16)
    image = torch.from_numpy(np.array(expected)).permute(2, 0, 1) / 255
    mean, std = torch.tensor(data.mean).view(3, 1, 1), torch.tensor(data.std).view(3, 1, 1)
    torch.testing.assert_close(batch.image[0], (image - mean) / std)
    plain = make(root, augment=False).loader("train", shuffle=True, augment=True)
    same = make(root).loader("train", shuffle=True)
    assert torch.equal(next(iter(plain)).image, next(iter(same)).image[:8])


def test_resize_strong_crop_and_strong_cutout_set_the_transforms(root):
    data = make(root, resize=19, strong_crop="fixed", strong_cutout=0, mean=[0.0] * 3, std=[1.0] * 3)
    batch = next(iter(data.test_dataloader()))
    pil = Image.open(data.test_image[0]).convert("RGB")
    expected = np.array(v2.functional.center_crop(v2.functional.resize(pil, 19), 16))
    torch.testing.assert_close(batch.image[0], torch.from_numpy(expected).permute(2, 0, 1) / 255)
    strong = data.transform("strong").transforms
    assert [type(step).__name__ for step in strong[:4]] == [
        "Resize",
        "RandomCrop",
        "RandomHorizontalFlip",
        "AutoAugment",
    ]
    assert strong[0].size == [19]
    assert strong[1].size == (16, 16)
    assert type(strong[-1]).__name__ == "Normalize"  # no cutout
    assert type(data.transform("weak").transforms[0]).__name__ == "RandomResizedCrop"
    assert make(root).transform("strong").transforms[-1].side == 8


def test_workers_give_the_same_batches_and_follow_the_epoch(root):
    def epochs(num_workers):
        data = make(root, num_workers=num_workers, cutout=4)
        loader = data.train_dataloader()
        out = []
        for epoch in (0, 3, 3):
            early = iter(loader)  # as Lightning does: the workers must not start on the old epoch
            loader.set_epoch(epoch)
            out.append(list(early))
        return out

    alone, workers = epochs(0), epochs(2)
    for a, b in zip(alone, workers, strict=True):
        assert len(a) == len(b) == 4
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x.index, y.index)
            assert torch.equal(x.image, y.image)
            assert (x.image == 0).all(1).flatten(1).any(1).all()  # the cutout
    assert torch.equal(alone[1][0].image, alone[2][0].image)
    assert not torch.equal(alone[0][0].index, alone[1][0].index)


def test_global_random_generator_is_not_used(root):
    before = torch.get_rng_state()
    list(make(root).train_dataloader())
    assert torch.equal(before, torch.get_rng_state())


def test_train_per_class_keeps_that_many_of_each(root):
    data = make(root, train_per_class=3)
    assert data.train_size == 9
    assert np.bincount(data.train_target[data.train_indices]).tolist() == [3, 3, 3]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_corrupt_image_raises_with_its_name(root, num_workers):
    (root / "cat" / "00.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    data = make(root, num_workers=num_workers, val_fraction=0)
    loaders = (data.train_dataloader(), data.test_dataloader())
    with pytest.raises(ValueError, match=r"00\.png' cannot be read"):
        [list(loader) for loader in loaders]


def test_invalid_root_folders_raise(tmp_path, root, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        make(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"notes\.txt"):
        make(root / "notes.txt")
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="no class folders"):
        make(tmp_path / "bare")
    (root / "fox").mkdir()
    with pytest.raises(ValueError, match=r"fox' holds no image"):
        make(root).setup()

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="may not be read"):
        make(root)


def test_unknown_class_in_the_test_folder_raises(tmp_path):
    tree(tmp_path / "train")
    tree(tmp_path / "test", {"cat": 2, "gnu": 2})
    with pytest.raises(ValueError, match="gnu"):
        make(tmp_path).setup()


@pytest.mark.parametrize(
    "options",
    [{"image_size": 0}, {"num_workers": -1}, {"test_fraction": 1.0}, {"scale": (1.0, 0.5)}, {"mean": [0.5]}],
)
def test_invalid_arguments_raise(root, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ImageFolderDataModule(str(root), **options)


def test_fake_data_has_the_classes_of_the_folder(root):
    data = make(root, fake=True)
    assert data.class_names == ["cat", "dog", "eel"]
    assert next(iter(data.train_dataloader())).image.shape == (8, 3, 16, 16)
