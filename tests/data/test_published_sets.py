"""Published data sets: their .npz, the official files, the cached .npz, and errors in the files."""

import hashlib
import os
import pickle
import warnings

import numpy as np
import pytest
import torch
import torchvision.datasets as tv

from lightning_kd.data import CIFAR10DataModule, CIFAR100DataModule, FashionMNISTDataModule, fashion_mnist

RNG = np.random.default_rng(0)


def md5(data):
    return hashlib.md5(data).hexdigest()


def random_images(n, num_classes=10):
    return RNG.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), np.arange(n) % num_classes


def save_npz(path, **changes):
    (train, train_target), (test, test_target) = random_images(40), random_images(20)
    arrays = {"train_image": train, "train_target": train_target, "test_image": test, "test_target": test_target}
    arrays = {**arrays, "noisy": np.arange(3), **changes}
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return arrays


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """A folder of official CIFAR-10 files with 20 + 10 images, and torchvision's checksums set to theirs."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    sums, parts = {}, []
    for name, n in [("data_batch_1", 10), ("data_batch_2", 10), ("test_batch", 10)]:
        image, target = random_images(n)
        parts.append(image)
        entry = {"data": image.transpose(0, 3, 1, 2).reshape(n, -1), "labels": target.tolist()}
        data = pickle.dumps(entry, protocol=2)
        (folder / name).write_bytes(data)
        sums[name] = md5(data)
    meta = pickle.dumps({"label_names": [str(c) for c in range(10)]}, protocol=2)
    (folder / "batches.meta").write_bytes(meta)
    monkeypatch.setattr(tv.CIFAR10, "train_list", [[k, sums[k]] for k in ("data_batch_1", "data_batch_2")])
    monkeypatch.setattr(tv.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(tv.CIFAR10, "meta", {**tv.CIFAR10.meta, "md5": md5(meta)})
    return tmp_path, np.concatenate(parts[:2]), parts[2]


def test_npz_is_used_directly(tmp_path):
    arrays = save_npz(tmp_path / "cifar10.npz")
    data = CIFAR10DataModule(str(tmp_path))
    data.prepare_data()
    data.setup()
    np.testing.assert_array_equal(data.train_image.permute(0, 2, 3, 1), arrays["train_image"])
    np.testing.assert_array_equal(data.test_target, arrays["test_target"])
    assert os.listdir(tmp_path) == ["cifar10.npz"]


def test_cifar100_coarse_labels_are_read_and_raise_if_missing(tmp_path):
    coarse = {"train_coarse": np.arange(40) % 20, "test_coarse": np.arange(20) % 20}
    save_npz(tmp_path / "cifar100.npz", **coarse)
    data = CIFAR100DataModule(str(tmp_path), labels="coarse", val_fraction=0)
    data.setup()
    assert data.num_classes == 20
    np.testing.assert_array_equal(data.train_target, coarse["train_coarse"])
    save_npz(tmp_path / "cifar100.npz")
    CIFAR100DataModule(str(tmp_path)).setup()
    with pytest.raises(ValueError, match="lacks train_coarse"):
        CIFAR100DataModule(str(tmp_path), labels="coarse").setup()


def test_official_files_are_read_and_cached(cifar10):
    root, train, test = cifar10
    data = CIFAR10DataModule(str(root))
    data.prepare_data()
    assert sorted(os.listdir(root)) == ["cifar-10-batches-py", "cifar10.npz"]
    (root / "cifar-10-batches-py" / "data_batch_1").unlink()  # from here on the cache is enough
    data.setup()
    np.testing.assert_array_equal(data.train_image.permute(0, 2, 3, 1), train)
    np.testing.assert_array_equal(data.test_image.permute(0, 2, 3, 1), test)
    assert data.train_size + data.val_size == 20


def test_sizes_can_be_read_without_prepare_data(cifar10):
    root, train, _ = cifar10
    data = CIFAR10DataModule(str(root), val_fraction=0)
    assert data.train_size == len(train)
    assert not data.path.exists()  # only prepare_data, in one process, writes


def test_official_cifar100_has_both_labels(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    sums = {}
    for name, n in [("train", 40), ("test", 20)]:
        image, target = random_images(n, 20)
        entry = {"data": image.transpose(0, 3, 1, 2).reshape(n, -1), "fine_labels": (target * 5).tolist()}
        data = pickle.dumps({**entry, "coarse_labels": target.tolist()}, protocol=2)
        (folder / name).write_bytes(data)
        sums[name] = md5(data)
    meta = pickle.dumps({"fine_label_names": [str(c) for c in range(100)]}, protocol=2)
    (folder / "meta").write_bytes(meta)
    monkeypatch.setattr(tv.CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(tv.CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(tv.CIFAR100, "meta", {**tv.CIFAR100.meta, "md5": md5(meta)})
    fine = CIFAR100DataModule(str(tmp_path))
    fine.prepare_data()
    fine.setup()
    coarse = CIFAR100DataModule(str(tmp_path), labels="coarse")
    coarse.setup()
    assert torch.equal(fine.train_target, coarse.train_target * 5)


def test_official_fashion_mnist_files_are_checked_and_read(tmp_path, monkeypatch):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    sums = {}
    for stem, n in [("train", 30), ("t10k", 10)]:
        image = RNG.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        target = (np.arange(n) % 10).astype(np.uint8)
        for name, array in [(f"{stem}-images-idx3-ubyte", image), (f"{stem}-labels-idx1-ubyte", target)]:
            dims = b"".join(d.to_bytes(4, "big") for d in array.shape)
            data = bytes([0, 0, 8, array.ndim]) + dims + array.tobytes()
            (raw / name).write_bytes(data)
            sums[name] = md5(data)
    with pytest.raises(ValueError, match="checksum"):
        FashionMNISTDataModule(str(tmp_path)).prepare_data()
    monkeypatch.setattr(fashion_mnist, "MD5", sums)
    legacy = tmp_path / "FashionMNIST" / "processed"  # files of early torchvision have no checksum: not read
    legacy.mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(5, 28, 28, dtype=torch.uint8), torch.zeros(5, dtype=torch.int64)), legacy / name)
    data = FashionMNISTDataModule(str(tmp_path), val_fraction=0)
    data.prepare_data()
    data.setup()
    assert data.train_image.shape == (30, 1, 28, 28)
    assert data.path.exists()
    np.testing.assert_array_equal(data.test_image[:, 0], image)
    np.testing.assert_array_equal(data.test_target, target)

    # also with download, which puts the files where they are read
    fetched = []
    monkeypatch.setattr(
        "torchvision.datasets.mnist.download_and_extract_archive",
        lambda url, download_root, **_: fetched.append(download_root),
    )
    data.path.unlink()
    (raw / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match="missing, damaged"):
        FashionMNISTDataModule(str(tmp_path), download=True).prepare_data()
    assert {*fetched} == {str(raw)}


def test_interrupted_write_leaves_no_file_that_is_read(cifar10, monkeypatch):
    root, _, _ = cifar10

    def savez(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", savez)
        with pytest.raises(KeyboardInterrupt):
            CIFAR10DataModule(str(root)).prepare_data()
    assert os.listdir(root) == ["cifar-10-batches-py"]
    left = root / f".cifar10.npz.{'0' * 32}.part"  # what a killed process leaves
    left.write_bytes(b"half")
    data = CIFAR10DataModule(str(root))
    data.prepare_data()
    data.setup()
    assert data.train_size + data.val_size == 20
    assert not left.exists()


def test_unwritable_folder_warns_and_data_is_read_without_cache(cifar10, monkeypatch):
    root, _, _ = cifar10

    def refuse(file, **arrays):
        raise PermissionError(13, "Permission denied", file.name)

    monkeypatch.setattr(np, "savez", refuse)
    data = CIFAR10DataModule(str(root))
    with pytest.warns(UserWarning, match=r"cifar10\.npz' could not be written"):
        data.prepare_data()
    data.setup()
    assert data.train_size + data.val_size == 20
    assert os.listdir(root) == ["cifar-10-batches-py"]


def test_official_files_are_not_read_if_the_npz_exists(cifar10):
    root, _, _ = cifar10
    save_npz(root / "cifar10.npz")
    (root / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"anything")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CIFAR10DataModule(str(root)).setup()


def test_wrong_checksum_raises(cifar10):
    root, _, _ = cifar10
    (root / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"something else")
    for step in ("prepare_data", "setup"):
        with pytest.raises(ValueError, match=r"cifar-10-batches-py.*checksum.*download=True"):
            getattr(CIFAR10DataModule(str(root)), step)()
    assert os.listdir(root) == ["cifar-10-batches-py"]


@pytest.mark.parametrize("module", [CIFAR10DataModule, CIFAR100DataModule, FashionMNISTDataModule])
def test_missing_files_raise(tmp_path, module):
    for root in (tmp_path, tmp_path / "nowhere"):
        for step in ("prepare_data", "setup"):
            with pytest.raises(FileNotFoundError, match=r"root='.*npz.*download=True"):
                getattr(module(str(root)), step)()
    assert os.listdir(tmp_path) == []


def test_download_without_a_network_raises(tmp_path, monkeypatch):
    from urllib.error import URLError

    def fail(*args, **kwargs):
        raise URLError("no route")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fail)
    with pytest.raises(ConnectionError, match="could not download"):
        CIFAR10DataModule(str(tmp_path), download=True).prepare_data()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_target": None}, "lacks train_target"),
        ({"train_image": np.zeros((40, 32, 32, 3), np.float32)}, r"uint8 .*float32"),
        ({"train_image": np.zeros((40, 28, 28, 3), np.uint8)}, r"\(32, 32, 3\).*28"),
        ({"test_image": np.zeros((20, 3, 32, 32), np.uint8)}, r"test_image.*\(32, 32, 3\)"),
        ({"train_target": np.zeros(39, np.int64)}, "39 labels, got 40"),
        ({"train_target": np.full(40, 10)}, "between 0 and 9, got 10"),
        ({"test_target": np.full(20, -1)}, "test_target.*between 0 and 9, got -1"),
        ({"train_target": np.zeros(40)}, "integers"),
        ({"train_target": np.array([None] * 40)}, "holds Python objects"),
        ({"test_image": np.zeros((0, 32, 32, 3), np.uint8), "test_target": np.zeros(0, np.int64)}, "empty"),
    ],
)
def test_invalid_arrays_in_npz_raise(tmp_path, changes, message):
    save_npz(tmp_path / "cifar10.npz", **changes)
    with pytest.raises(ValueError, match=message):
        CIFAR10DataModule(str(tmp_path)).setup()


def test_damaged_npz_raises(tmp_path):
    path = tmp_path / "cifar10.npz"
    save_npz(path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[5000] ^= 255  # inside the pixels: the checksum of the archive finds it
    for content in (whole[: len(whole) // 2], b"no archive", b"", bytes(flipped), pickle.dumps([1])):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"cifar10\.npz' is damaged"):
            CIFAR10DataModule(str(tmp_path)).setup()


def test_unreadable_npz_raises(tmp_path, monkeypatch):
    save_npz(tmp_path / "cifar10.npz")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(np, "load", refuse)
    with pytest.raises(PermissionError, match="may not be read"):
        CIFAR10DataModule(str(tmp_path)).setup()
