"""FKD and FerKD: stored crops are cut again bit for bit, and the student learns their stored labels."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lightning_kd.core.run_callbacks import run_callbacks
from lightning_kd.core.run_folder import RunFolder
from lightning_kd.core.view_keys import ViewKeys
from lightning_kd.data import DigitsDataModule, ImageFolderDataModule
from lightning_kd.data.crop_files import CropFiles
from lightning_kd.data.image_files import read_image
from lightning_kd.data.streaming import sample_generator
from lightning_kd.distillation import FKD, FerKD, TeacherStore, adapt_labels, compress, recover, teach_store
from lightning_kd.distillation.fkd import mix_crops
from tests.distillation.test_teacher_store import trainer

DIGITS = {"input_shape": (1, 8, 8), "classes": 10}


@pytest.fixture
def root(tmp_path):
    """Six lossless images in each of two classes, of many sizes; one in each class is rotated by its EXIF tag."""
    generator = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for k in range(6):
            shape = (int(generator.integers(17, 90)), int(generator.integers(17, 90)), 3)
            image = Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8))
            exif = Image.Exif()
            exif[274] = 6 if k == 2 else 1
            image.save(tmp_path / "photos" / name / f"{k}.png", exif=exif)
    return tmp_path / "photos"


def folder(root, **options):
    settings = {"image_size": 16, "batch_size": 4, "val_fraction": 0.25, "test_fraction": 0.2, **options}
    return ImageFolderDataModule(root=str(root), **settings)


def task(cls=FKD, **options):
    torch.manual_seed(1)
    shape = options.pop("input_shape", (3, 16, 16))
    weights = {"teacher_weights": "random"} if "teacher_store" not in options else {}
    return cls("cnn_tiny", "cnn", options.pop("classes", 2), input_shape=shape, **weights, **options)


def taught(root, path, **options):
    model, data = task(), folder(root)
    trainer().validate(model, data, verbose=False)
    teach_store(model, data, path, **{"views": "7", "dtype": "float32", **options})
    return model, data


def test_stored_crops_equal_those_of_the_augmentation_bit_for_bit(root, tmp_path):
    model, data = taught(root, tmp_path / "a.store")
    store = TeacherStore(tmp_path / "a.store")
    drawn = data.loader("train", augment=True, view_keys=ViewKeys(7))
    stored = data.loader("train", augment=True, view_keys=store.view_keys)
    assert drawn.key_count == stored.key_count == 7
    augment, flips = data.transform("weak"), []
    for index in data.train_indices.tolist():
        image = read_image(data.train_image[index])
        boxes, flip = store.crops_of(index)
        assert boxes.dtype == np.float32
        assert (boxes >= 0).all()
        assert (boxes[:, :2] + boxes[:, 2:] <= 1 + 1e-6).all()
        flips += flip.tolist()
        for key in range(7):
            with sample_generator(0, key, 0, index):
                expected = augment(image)
            one, two = torch.tensor([index]), torch.tensor([key])
            assert torch.equal(drawn.images(one, two)[0], expected)
            assert torch.equal(stored.images(one, two)[0], expected)
            logits = model.teacher_logits(expected[None])
            torch.testing.assert_close(store.logits(one, two), logits, rtol=1e-5, atol=1e-5)
    assert 0.2 < np.mean(flips) < 0.8


@pytest.mark.parametrize("workers", [0, 1])
def test_batch_holds_several_crops_of_each_image_side_by_side(workers, root, tmp_path):
    taught(root, tmp_path / "a.store")
    store, data = TeacherStore(tmp_path / "a.store"), folder(root, num_workers=workers)
    data.setup()
    keys = ViewKeys(7, per_visit=3, crops=store)
    loader = data.loader("train", shuffle=True, augment=True, view_keys=keys)
    seen = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        for batch in loader:
            index, key = batch.index.view(-1, 3), batch.extras["view"].view(-1, 3)
            assert (index == index[:, :1]).all()
            assert all(len(set(row)) == 3 for row in key.tolist())
            assert torch.equal(batch.target, data.train_target[batch.index])
            assert torch.equal(loader.images(batch.index, batch.extras["view"]), batch.image)
            seen.append(key)
        assert len(loader) == 2
    assert not torch.equal(torch.cat(seen[:2]), torch.cat(seen[2:]))
    again = data.loader("train", shuffle=True, augment=True, batch_size=3, view_keys=keys)  # other batches, same crops
    found = {int(i): k.tolist() for b in again for i, k in zip(b.index[::3], b.extras["view"].view(-1, 3), strict=True)}
    loader.set_epoch(0)
    for batch in loader:
        for i, k in zip(batch.index[::3].tolist(), batch.extras["view"].view(-1, 3).tolist(), strict=True):
            assert found.get(i, k) == k


@pytest.mark.parametrize("cls", [FKD, FerKD])
def test_loss_is_cross_entropy_with_the_stored_labels(cls, root, tmp_path):
    path = tmp_path / "a.store"
    taught(root, path, compress="smoothing")
    model = task(cls, teacher_store=str(path), crops=3, temperature=2.0)
    found, data = [], folder(root)
    model.step_loss = lambda terms, *_: found.append(terms["kd"]) or terms["kd"]
    trainer(max_epochs=1).fit(model, data)
    assert len(found) == 2
    store = TeacherStore(path)
    loader = data.loader("train", shuffle=True, augment=True, view_keys=ViewKeys(7, per_visit=3, crops=store))
    fresh = task(cls, teacher_store=str(path), crops=3, temperature=2.0)
    batch = next(iter(loader))
    q = store.probabilities(batch.index, batch.extras["view"])
    if cls is FerKD:
        q = adapt_labels(q, batch.target, 0.3, 0.1)
    logits = fresh.train()(batch.image)
    expected = -(q * (logits / 2).log_softmax(1)).sum(1).mean()
    assert float(found[0].detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_crops_cut_by_workers_give_the_same_store(root, tmp_path, monkeypatch):
    cut = CropFiles.cut

    def recorded(files, index, keys):
        with open(tmp_path / "processes.txt", "a") as file:
            file.write(f"{os.getpid()} {index}\n")
        return cut(files, index, keys)

    monkeypatch.setattr(CropFiles, "cut", recorded)
    stores = []
    for workers in (0, 2):
        path = tmp_path / f"{workers}.store"
        model, data = task(), folder(root, num_workers=workers)
        trainer().validate(model, data, verbose=False)
        monkeypatch.setattr("lightning_kd.distillation.teaching.ROWS_OF_PIECE", 21)  # pieces of 3 images
        teach_store(model, data, path, views="7", dtype="float32", batch_size=5)
        stores.append(path.read_bytes())
    assert stores[0] == stores[1]
    lines = [line.split() for line in (tmp_path / "processes.txt").read_text().splitlines()]
    processes = [process for process, _ in lines]
    assert len(set(processes)) == 3
    assert processes[: len(processes) // 2] == [str(os.getpid())] * (len(processes) // 2)
    assert {image for process, image in lines if process != str(os.getpid())} == set(map(str, data.train_indices))


@pytest.mark.parametrize("workers", [0, 1])
def test_store_of_plain_views_fits_only_training_without_augmentation(workers, root, tmp_path):
    path = tmp_path / "plain.store"
    model, data = task(), folder(root, num_workers=workers)
    trainer().validate(model, data, verbose=False)
    header = teach_store(model, data, path, views="plain", dtype="float32")
    assert (header["keys"], header["views"]["resize"]) == (1, 18)
    store = TeacherStore(path)
    index = torch.from_numpy(data.train_indices)
    images = torch.stack([data.transform("plain")(read_image(data.train_image[k])) for k in data.train_indices])
    torch.testing.assert_close(store.logits(index, torch.zeros_like(index)), model.teacher_logits(images))
    sizes = []

    class Sized(FKD):
        def training_step(self, batch, batch_idx):
            sizes.append(len(batch.image))
            return super().training_step(batch, batch_idx)

    trained = task(Sized, teacher_store=str(path), crops=1)
    trainer(max_epochs=1).fit(trained, folder(root, augment=False, num_workers=workers))
    assert sum(sizes) == len(index)
    with pytest.raises(ValueError, match=r"many random crops of image files: .* train with data.augment false"):
        trainer(max_epochs=1).fit(task(teacher_store=str(path), crops=1), folder(root))
    with pytest.raises(ValueError, match=r"does not fit, views.resize was 18, here it is 17: train with what it was"):
        trainer(max_epochs=1).fit(task(teacher_store=str(path), crops=1), folder(root, augment=False, resize=17))


def test_adapt_labels_gives_worked_numbers():
    q = torch.tensor([[0.9, 0.1, 0.0], [0.4, 0.35, 0.25], [0.5, 0.25, 0.25]], dtype=torch.float64)
    target = torch.tensor([1, 2, 1])
    got = adapt_labels(q, target, 0.5, 0.3)
    expected = torch.tensor([[0.9, 0.1, 0.0], [0.1, 0.1, 0.8], [0.5, 0.25, 0.25]], dtype=torch.float64)
    torch.testing.assert_close(got, expected)
    assert torch.equal(adapt_labels(q, target, 0.0), q)
    torch.testing.assert_close(adapt_labels(q, target, 1.0, 0.0), F.one_hot(target, 3).double())
    with pytest.raises(ValueError, match="adapt_below must be at least 0 and at most 1, got 2"):
        adapt_labels(q, target, 2)


def test_labels_of_all_classes_but_one_give_the_uncompressed_cross_entropy():
    p = torch.randn(5, 4, dtype=torch.float64).softmax(1)
    kept = recover(compress(p, "marginal_smoothing_k3"), "marginal_smoothing_k3", 4)
    model = task(classes=4)
    logits = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(model.distillation_loss(logits, kept.log(), None), F.cross_entropy(logits, p))


def test_self_mix_mixes_crops_of_one_image_and_labels_by_area():
    torch.manual_seed(0)
    image = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 2, 10, 10).contiguous()
    q = torch.eye(6)
    for _ in range(20):
        mixed, soft = mix_crops(image, q, 3)
        assert torch.equal(image[:, 0, 0, 0], torch.arange(6.0))  # the input is unchanged
        for k, other in enumerate([1, 2, 0, 4, 5, 3]):
            share = float((mixed[k] == other).float().mean())
            assert set(mixed[k].unique().tolist()) <= {float(k), float(other)}
            assert 0 < share <= 1
            assert float(soft[k, other]) == pytest.approx(share)
            assert float(soft[k].sum()) == pytest.approx(1)


def test_images_in_memory_train_with_and_without_a_store(tmp_path):
    digits = {"input_shape": (1, 8, 8), "classes": 10}
    data = DigitsDataModule(fake=True, augment=True)
    model = task(**digits)
    trainer().validate(model, data, verbose=False)
    teach_store(model, data, tmp_path / "d.store", views="4", compress="marginal_renorm_k3")
    sizes = []

    class Sized(FerKD):
        def training_step(self, batch, batch_idx):
            sizes.append((len(batch.image), len(set(batch.index.tolist()))))
            return super().training_step(batch, batch_idx)

    trained = task(Sized, teacher_store=str(tmp_path / "d.store"), crops=2, self_mix=1.0, **digits)
    trainer(max_epochs=1).fit(trained, DigitsDataModule(fake=True, augment=True, batch_size=16))
    assert sizes[0] == (32, 16)
    trainer(max_epochs=1, limit_train_batches=2).fit(task(**digits), data)
    with pytest.raises(
        ValueError, match=r"crops must be 4 or fewer, the views of an image in teacher_store '.*d.store', got 5"
    ):
        trainer(max_epochs=1).fit(task(teacher_store=str(tmp_path / "d.store"), crops=5, **digits), data)


@pytest.fixture
def digits_store(tmp_path):
    model = task(**DIGITS)
    trainer().validate(model, DigitsDataModule(fake=True, augment=True), verbose=False)
    teach_store(model, DigitsDataModule(fake=True, augment=True), tmp_path / "d.store", views="4")
    return str(tmp_path / "d.store")


class RecordingFKD(FKD):
    """Records for each step the epoch, the number of images, of distinct images, and the (image, view) pairs."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.recorded = []

    def training_step(self, batch, batch_idx):
        index, key = batch.index.tolist(), batch.extras["view"].tolist()
        self.recorded.append((self.current_epoch, len(index), len(set(index)), tuple(zip(index, key, strict=True))))
        return super().training_step(batch, batch_idx)


def fitted(store, folder, epochs=3, ckpt_path=None, **options):
    model = task(RecordingFKD, teacher_store=store, crops=2, **DIGITS, **options)
    run = trainer(max_epochs=epochs, enable_checkpointing=True, callbacks=run_callbacks(RunFolder(folder)))
    run.fit(model, DigitsDataModule(fake=True, augment=True, batch_size=16), ckpt_path=ckpt_path, weights_only=True)
    return model


def test_fine_epochs_use_one_crop_per_image_and_resume_to_the_bit(digits_store, tmp_path):
    options = {"fine_epochs": 2, "mixup": 0.8, "cutmix": 1.0}
    whole = fitted(digits_store, tmp_path / "whole", **options)
    steps = len(whole.recorded) // 3
    assert [step[0] for step in whole.recorded] == [0] * steps + [1] * steps + [2] * steps
    assert {step[1:3] for step in whole.recorded[: steps - 1]} == {(32, 16)}
    fine = whole.recorded[steps : steps + steps // 2]  # the first of two passes over the images in this epoch
    assert {step[1:3] for step in fine[:-1]} == {(32, 32)}
    seen = [index for step in fine for index, _ in step[3]]
    assert len(set(seen)) == len(seen)
    assert whole.recorded[steps][3] != whole.recorded[2 * steps - steps // 2][3]
    fitted(digits_store, tmp_path / "parts", **options | {"fine_epochs": 0}, epochs=1)  # epoch 0 is the same without
    resumed = fitted(digits_store, tmp_path / "parts", 3, tmp_path / "parts/checkpoints/last.ckpt", **options)
    assert resumed.recorded == whole.recorded[steps:]
    assert all(torch.equal(*both) for both in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixup_and_cutmix_mix_crops_and_labels_by_the_same_share(kind):
    model = task(**{kind: 1.0}, input_shape=(1, 10, 10), classes=6)
    model.trainer = SimpleNamespace(global_step=0, callbacks=[], global_rank=0)
    image, q = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 10, 10).contiguous(), torch.eye(6)
    shares = set()
    for step in range(8):
        model.trainer.global_step = step
        mixed, soft = model._mixed(image, q)
        assert torch.equal(soft, model._mixed(image, q)[1])  # the mixture depends on the step alone
        torch.testing.assert_close(soft.sum(1), torch.ones(6))
        torch.testing.assert_close(mixed.mean((1, 2, 3)), soft @ torch.arange(6.0))
        shares.add(round(float(soft.max()), 6))
    assert len(shares) > 2


def test_fine_epochs_without_a_store_or_max_epochs_raise(digits_store):
    with pytest.raises(ValueError, match="fine_epochs=1 needs a teacher_store, got none: give a store"):
        task(fine_epochs=1)
    model = task(teacher_store=digits_store, fine_epochs=1, crops=2, **DIGITS)
    with pytest.raises(ValueError, match=r"fine_epochs=1 needs trainer\.max_epochs, got -1: set it"):
        trainer(max_epochs=-1, max_steps=2).fit(model, DigitsDataModule(fake=True, augment=True))
    with pytest.raises(ValueError, match="mixup must be at least 0, got -1"):
        task(mixup=-1)


def test_changed_image_file_of_the_same_size_raises(root, tmp_path):
    file = root / "ant" / "0.png"
    image = Image.open(file).convert("RGB")
    image.save(file, compress_level=0)
    size = file.stat().st_size
    taught(root, tmp_path / "a.store")
    image.putpixel((3, 3), (1, 2, 3))
    image.save(file, compress_level=0)
    assert file.stat().st_size == size
    data = folder(root)
    data.setup()
    assert str(file) in map(str, data.train_image)
    with pytest.raises(ValueError, match="does not fit, the images differ"):
        trainer().fit(task(teacher_store=str(tmp_path / "a.store")), data)


def test_wrong_arguments_and_data_unlike_the_store_raise(root, tmp_path):
    with pytest.raises(ValueError, match=r"self_mix=0.5 mixes crops of one image, got crops=1: give 2 or more"):
        task(FerKD, crops=1, self_mix=0.5)
    with pytest.raises(ValueError, match="ce_weight must be 0"):
        task(ce_weight=0.5)
    with pytest.raises(ValueError, match="there are infinitely many random crops of image files: give a number"):
        taught(root, tmp_path / "a.store", views="all")
    path = tmp_path / "b.store"
    taught(root, path)
    for options, message in (
        ({"scale": (0.5, 1.0)}, r"views.scale was \[0.08, 1.0\], here it is \[0.5, 1.0\]"),
        ({"image_size": 20}, "data.input_shape was"),
        ({"cutout": 4}, "a teacher store needs views by crop and flip alone, got cutout=4: set data.cutout to 0"),
        ({"augment": False}, "without augmentation an image has 1 view, got 7: teach --views plain, or set data.aug"),
    ):
        data = folder(root, **options)
        with pytest.raises(ValueError, match=message):
            trainer().fit(task(teacher_store=str(path), input_shape=data.input_shape), data)
