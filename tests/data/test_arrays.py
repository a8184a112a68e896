"""``ArrayDataModule``: a user's own arrays in .npz and .npy files."""

import numpy as np
import pytest
import torch

from lightning_kd.data import ArrayDataModule, array_files

RNG = np.random.default_rng(0)


def images(n=60, shape=(12, 10, 3)):
    return RNG.integers(0, 256, (n, *shape), dtype=np.uint8)


def labels(n=60, num_classes=3):
    return np.arange(n) % num_classes


def save(tmp_path, **arrays):
    np.savez(tmp_path / "own.npz", **arrays)
    return str(tmp_path / "own.npz")


def test_npz_with_splits_gives_shape_classes_statistics_and_sizes(tmp_path):
    train, test = images(), images(9)
    path = save(tmp_path, train_image=train, train_target=labels(), test_image=test, test_target=labels(9))
    data = ArrayDataModule(path)
    assert (data.num_classes, data.input_shape, data.class_names) == (3, (3, 12, 10), ["0", "1", "2"])
    assert data.mean == pytest.approx((train / 255).mean((0, 1, 2)).tolist())
    assert data.std == pytest.approx((train / 255).std((0, 1, 2)).tolist())
    assert (data.train_size, data.val_size, data.test_size) == (54, 6, 9)
    np.testing.assert_array_equal(data.test_image.permute(0, 2, 3, 1), test)


@pytest.mark.parametrize("form", ["npz", "npy", "train_only"])
def test_missing_test_split_is_drawn_per_class_whatever_the_seed(tmp_path, form):
    image, target = images(shape=(8, 8)), labels()
    if form == "npy":
        np.save(tmp_path / "image.npy", image)
        np.save(tmp_path / "target.npy", target.astype(np.uint8))
        paths = {"path": str(tmp_path / "image.npy"), "target_path": str(tmp_path / "target.npy")}
    else:
        prefix = "train_" if form == "train_only" else ""
        paths = {"path": save(tmp_path, **{f"{prefix}image": image, f"{prefix}target": target, "more": image})}
    first, second = (ArrayDataModule(**paths, seed=seed, test_fraction=0.3) for seed in (0, 1))
    assert first.input_shape == (1, 8, 8)
    assert (first.test_size, len(first.train_target)) == (18, 42)
    assert np.bincount(first.test_target).tolist() == [6, 6, 6]
    second.setup()
    assert torch.equal(first.test_image, second.test_image)


def test_features_are_scaled_only_by_given_mean_and_std(tmp_path):
    feature = RNG.normal(3, 2, (60, 7))
    path = save(tmp_path, train_feature=feature, train_target=labels(), test_image=feature[:6], test_target=labels(6))
    data = ArrayDataModule(path)
    assert data.input_shape == (7,)
    assert (data.mean, data.std) == ([0.0] * 7, [1.0] * 7)
    (batch,) = data.test_dataloader()
    torch.testing.assert_close(batch.image, torch.from_numpy(feature[:6]).float())
    data = ArrayDataModule(path, mean=[3.0] * 7, std=[2.0] * 7)
    (batch,) = data.test_dataloader()
    torch.testing.assert_close(batch.image, torch.from_numpy((feature[:6] - 3) / 2).float())
    with pytest.raises(ValueError, match="need images"):
        ArrayDataModule(path, augment=True)
    fake = ArrayDataModule(path, fake=True)
    assert (fake.input_shape, fake.num_classes, fake.train_image.shape if fake.train_size else 0) == ((7,), 3, (256, 7))


def test_fake_data_has_the_shape_of_the_file(tmp_path):
    path = save(tmp_path, image=images(), target=labels())
    data = ArrayDataModule(path, class_names=["a", "b", "c"], fake=True, augment=True, crop_padding=2, flip=False)
    assert (data.input_shape, data.class_names) == ((3, 12, 10), ["a", "b", "c"])
    assert data.train_size + data.val_size == 256
    assert next(iter(data.train_dataloader())).image.shape == (64, 3, 12, 10)


def test_constant_channel_does_not_divide_by_zero(tmp_path):
    data = ArrayDataModule(save(tmp_path, image=np.full((30, 4, 4), 51, np.uint8), target=labels(30)))
    assert (data.mean, data.std) == ([0.2], [1.0])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"image": images()}, "lacks target"),
        ({"target": labels()}, "lacks image"),
        ({"other": labels()}, "lacks image, target, it holds other"),
        ({"image": images(), "target": labels(59)}, "59 labels, got 60"),
        ({"image": images().astype(np.float32), "target": labels()}, "uint8 images .*float32"),
        ({"image": images(shape=(3, 8, 8)), "target": labels()}, "channels last"),
        ({"image": images(shape=(8,)), "target": labels()}, "float features .*uint8"),
        ({"image": images(shape=(2, 2, 2, 2)), "target": labels()}, "uint8 images"),
        ({"image": np.full((60, 4), np.nan), "target": labels()}, "finite"),
        ({"image": images(), "target": labels() - 1}, "0 or more, got -1"),
        ({"image": images(), "target": labels() * 0.5}, r"integers \[N\], got float64 \(60,\): convert it"),
        ({"image": images(), "target": labels().astype("S")}, r"integers .*: save names by array.astype\(str\)"),
        ({"image": images(0), "target": labels(0)}, "empty"),
        ({"image": images(3), "target": labels(3)}, "test_fraction=0.2 of 3 samples"),
        (
            {"train_image": images(), "train_target": labels(), "test_image": images(9), "test_target": labels(9) + 1},
            "test_target .*between 0 and 2, got 3",
        ),
        (
            {
                "train_image": images(),
                "train_target": labels(),
                "test_image": images(9, (8, 8, 3)),
                "test_target": labels(9),
            },
            "like the training samples",
        ),
        ({"train_image": images(), "train_target": labels(), "test_image": images(9)}, "lacks test_target"),
    ],
)
def test_invalid_files_raise(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=message):
        ArrayDataModule(save(tmp_path, **arrays))


def test_invalid_arguments_raise(tmp_path):
    path = save(tmp_path, image=images(), target=labels())
    np.save(tmp_path / "image.npy", images())
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ArrayDataModule(str(tmp_path / "none.npz"))
    with pytest.raises(ValueError, match="target_path"):
        ArrayDataModule(str(tmp_path / "image.npy"))
    with pytest.raises(ValueError, match="integers"):
        ArrayDataModule(str(tmp_path / "image.npy"), target_path=path)
    with pytest.raises(ValueError, match="test_fraction"):
        ArrayDataModule(path, test_fraction=0.0)
    with pytest.raises(ValueError, match="between 0 and 1, got 2"):
        ArrayDataModule(path, class_names=["a", "b"])
    with pytest.raises(ValueError, match="crop_padding"):
        ArrayDataModule(path, crop_padding=-1)
    with pytest.raises(ValueError, match="mean"):
        ArrayDataModule(path, mean=[0.5])
    (tmp_path / "own.npz").write_bytes((tmp_path / "own.npz").read_bytes()[:500])
    with pytest.raises(ValueError, match="damaged"):
        ArrayDataModule(path)


@pytest.mark.parametrize(
    ("labels", "names"), [([1, 2, 3], ["1", "2", "3"]), ([7, 1001, 100000], ["7", "1001", "100000"])]
)
def test_labels_with_gaps_or_from_1_are_numbered_in_order(tmp_path, labels, names, monkeypatch):
    said = []
    monkeypatch.setattr(array_files, "note", said.append)
    image = np.zeros((60, 8, 8, 3), np.uint8)
    target = np.array(labels)[np.arange(60) % 3]
    np.savez(tmp_path / "some.npz", train_image=image, train_target=target, test_image=image, test_target=target[::-1])
    data = ArrayDataModule(str(tmp_path / "some.npz"))
    assert (data.num_classes, data.class_names) == (3, names)
    data.setup()
    assert data.train_target.tolist() == [k % 3 for k in range(60)]
    assert data.test_target.tolist() == [k % 3 for k in range(60)][::-1]
    assert "3 labels that occur" in said[0]


def test_class_without_samples_in_the_middle_counts(tmp_path):
    target = np.array([0, 1, 3])[np.arange(60) % 3]
    np.savez(tmp_path / "some.npz", train_image=np.zeros((60, 8, 8, 3), np.uint8), train_target=target)
    assert ArrayDataModule(str(tmp_path / "some.npz")).num_classes == 4


def test_text_labels_become_class_names(tmp_path):
    target = np.array(["dog", "cat", "eel"])[np.arange(60) % 3]
    np.savez(tmp_path / "some.npz", train_image=np.zeros((60, 8, 8, 3), np.uint8), train_target=target)
    data = ArrayDataModule(str(tmp_path / "some.npz"))
    assert data.class_names == ["cat", "dog", "eel"]
    data.setup()
    assert {*data.train_target.tolist()} == {0, 1, 2}
    ordered = ArrayDataModule(str(tmp_path / "some.npz"), class_names=["eel", "dog", "cat"])
    ordered.setup()
    assert torch.equal(ordered.train_target[data.train_target == 2], torch.zeros(16, dtype=torch.int64))
    with pytest.raises(ValueError, match="holds the label 'eel', which is not in class_names"):
        ArrayDataModule(str(tmp_path / "some.npz"), class_names=["dog", "cat"])


def test_boolean_labels_are_two_classes(tmp_path):
    target = np.arange(30) % 3 == 1
    for given, names in ((target, ["0", "1"]), (target[:, None], ["no", "yes"])):
        path = save(tmp_path, train_image=images(30), train_target=given, test_image=images(30), test_target=given)
        data = ArrayDataModule(path, class_names=names if given.ndim == 2 else None)
        data.setup()
        assert data.class_names == names
        assert data.train_target.tolist() == data.test_target.tolist() == target.astype(int).tolist()


def test_python_objects_raise_their_own_message(tmp_path):
    np.savez(tmp_path / "some.npz", train_image=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="holds Python objects, which are never unpickled: save arrays of numbers"):
        ArrayDataModule(str(tmp_path / "some.npz"))


def class_numbers_in_splits(tmp_path, labels, class_names):
    target = np.array(labels)[np.arange(30) % len(labels)]
    np.savez(tmp_path / "some.npz", image=np.zeros((30, 4, 4), np.uint8), target=target)
    data = ArrayDataModule(str(tmp_path / "some.npz"), class_names=class_names)
    data.setup()
    assert data.class_names == class_names
    return [sorted({*target.tolist()}) for target in (data.train_target, data.test_target)]


@pytest.mark.parametrize(
    ("labels", "names", "numbers", "said"),
    [
        ([1, 2], "1 2 3", [0, 1], "class names, which are 1, 2, 3"),
        ([2, 3], "1 2 3", [1, 2], "class names"),
        ([7, 1001], "7 20 1001", [0, 2], "class names"),
        ([10, 2], "1 10 2", [1, 2], "class names"),
        ([0, 2], "1 2 3", [0, 2], "class indices, 0 for '1'"),
        ([1, 2, 3], "a b c", [0, 1, 2], "the labels 1 to 3 are the classes a, b, c"),
        ([1, 2], "a b c", [1, 2], ""),
        ([0, 2], "0 1 2", [0, 2], ""),
    ],
)
def test_integer_labels_are_matched_to_given_class_names(tmp_path, labels, names, numbers, said, capsys):
    assert class_numbers_in_splits(tmp_path, labels, names.split()) == [numbers, numbers]
    out = capsys.readouterr().err
    assert said in out
    assert bool(out) == bool(said)


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([1, 4], "1 2 3", "holds the label 4, which is not in class_names"),
        ([-1, 2], "1 2 3", "holds the label -1, which is not in class_names"),
        ([1, 2], "1 10 2", "may be class indices or class names, which are 1, 10, 2: save the names as text"),
        ([2, 3], "a b c", "must be between 0 and 2, got 3"),
    ],
)
def test_unknown_or_ambiguous_integer_labels_raise(tmp_path, labels, names, message):
    with pytest.raises(ValueError, match=message):
        class_numbers_in_splits(tmp_path, labels, names.split())


def test_check_classes_raises_for_fewer_classes_unless_named(tmp_path):
    image, whole = np.zeros((30, 4, 4), np.uint8), ["1", "2", "3"]
    np.savez(tmp_path / "some.npz", image=image, target=np.arange(30) % 2 + 2)
    with pytest.raises(ValueError, match=r"or class_names=\['1', '2', '3'\] for arrays that lack some of its classes"):
        ArrayDataModule(str(tmp_path / "some.npz")).check_classes(whole)
    for names in (whole, [1, 2, 3]):
        ArrayDataModule(str(tmp_path / "some.npz"), class_names=names).check_classes(whole)
