"""Annotations by several people: simulated, read from files, used by a data module, and recorded with a run."""

import hashlib
import re
import tracemalloc

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from lightning_kd.core import Classification
from lightning_kd.core.run_callbacks import run_callbacks
from lightning_kd.core.run_folder import RunFolder
from lightning_kd.data import (
    CIFAR10H,
    CIFARN,
    ArrayDataModule,
    CIFAR10DataModule,
    CIFARNCrowd,
    CrowdAnnotations,
    DigitsDataModule,
    ImageFolderDataModule,
    MosaicDataModule,
    OpenSetDataModule,
    SimulatedCrowd,
)
from lightning_kd.data.noise_record import digest

TARGET = np.arange(4000) % 5


def test_simulated_annotators_are_right_at_their_reliability():
    given = SimulatedCrowd(20, (0.3, 0.9), 3).corrupt(TARGET, 5)
    assert (given.shape, given.dtype) == ((4000, 20), np.int16)
    assert ((given >= 0).sum(1) == 3).all()
    assert len({tuple(row) for row in (given >= 0).tolist()}) > 900  # any three annotators
    there = given >= 0
    right = [float((given[there[:, r], r] == TARGET[there[:, r]]).mean()) for r in range(20)]
    assert 0.25 < min(right) < 0.45
    assert 0.75 < max(right) < 0.95
    wrong = there & (given != TARGET[:, None])
    shift = ((given - TARGET[:, None]) % 5)[wrong]
    share = np.bincount(shift, minlength=5) / len(shift)
    assert share[0] == 0
    assert share[1:] == pytest.approx([0.25] * 4, abs=0.03)
    assert np.array_equal(SimulatedCrowd(20, (0.3, 0.9), 3).corrupt(TARGET, 5), given)
    assert not np.array_equal(SimulatedCrowd(20, (0.3, 0.9), 3, seed=1).corrupt(TARGET, 5), given)
    assert (SimulatedCrowd(4, 1.0, 4).corrupt(TARGET, 5) == TARGET[:, None]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"annotators": 0}, "annotators must be at least 1, got 0"),
        ({"annotators": 2, "per_item": 3}, "per_item must be at least 1 and at most 2, got 3"),
        ({"reliability": 1.5}, "reliability must be at least 0 and at most 1, got 1.5"),
        ({"reliability": (0.9, 0.3)}, r"reliability must be a minimum and a maximum, got \(0.9, 0.3\): swap them"),
        ({"reliability": (0.1, 0.2, 0.3)}, "reliability must be a number, or a minimum and a maximum"),
        ({"imbalance": 0.5}, "imbalance must be at least 1, got 0.5"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_invalid_arguments_raise(options, message):
    with pytest.raises(ValueError, match=message):
        SimulatedCrowd(**options)


def test_imbalance_lowers_class_sizes_geometrically():
    crowd = SimulatedCrowd(imbalance=10.0)
    kept = crowd.keep(TARGET, np.arange(4000), 5)
    assert np.bincount(TARGET[kept]).tolist() == [800, 450, 253, 142, 80]
    assert (np.diff(kept) > 0).all()
    some = np.flatnonzero(np.arange(4000) % 7 < 5)
    assert set(crowd.keep(TARGET, some, 5)) <= set(some)
    assert SimulatedCrowd().keep(TARGET, some, 5) is some


def digits_data(**options):
    return DigitsDataModule(**{"train_per_class": 20, "val_fraction": 0.2, **options})


def test_data_module_trains_on_the_majority_of_annotations():
    data, plain = digits_data(annotations=SimulatedCrowd(6, 0.7, 3)), digits_data()
    data.setup()
    plain.setup()
    assert np.array_equal(data.train_indices, plain.train_indices)
    assert len(data.unlabelled_indices) == 0
    given = data.train_annotations
    used = torch.zeros(len(given), dtype=torch.bool)
    used[data.train_indices] = True
    assert bool((given[~used] == -1).all())
    assert torch.equal(data.train_clean, plain.train_target)
    assert torch.equal(data.train_target[~used], plain.train_target[~used])  # includes validation samples
    votes = torch.stack([(given[used] == c).sum(1) for c in range(10)], 1)
    assert torch.equal(data.train_target[used], votes.argmax(1))
    assert not torch.equal(data.train_target[used], data.train_clean[used])
    assert data.annotator_names == ["0", "1", "2", "3", "4", "5"]
    batch = next(iter(data.loader("train", shuffle=True)))
    assert batch.extras["annotations"].dtype == torch.int64
    assert torch.equal(batch.extras["annotations"], given[batch.index].long())
    assert torch.equal(batch.extras["clean_target"], plain.train_target[batch.index])
    assert "annotations" not in next(iter(data.test_dataloader())).extras


def test_samples_without_annotation_become_unlabelled(tmp_path):
    given = np.full((1438, 3), -1)
    given[::2, 1] = np.arange(719) % 10
    np.savez(tmp_path / "crowd.npz", annotations=given)
    data = digits_data(annotations=CrowdAnnotations(str(tmp_path / "crowd.npz")))
    data.setup()
    both = np.sort(np.concatenate([data.train_indices, data.unlabelled_indices]))
    assert len(both) == 200
    assert (data.train_indices % 2 == 0).all()
    assert (data.unlabelled_indices % 2 == 1).all()
    assert bool((data.train_target[data.unlabelled_indices] == -1).all())
    assert data.train_target[data.train_indices].tolist() == (data.train_indices // 2 % 10).tolist()
    np.save(tmp_path / "crowd.npy", np.full((1438, 3), -1))
    with pytest.raises(ValueError, match="no training sample has an annotation by CrowdAnnotations"):
        digits_data(annotations=CrowdAnnotations(str(tmp_path / "crowd.npy"))).setup()


def test_imbalance_reduces_the_training_samples_of_a_data_module():
    data = digits_data(annotations=SimulatedCrowd(6, 0.7, 3, imbalance=4.0))
    data.setup()
    count = torch.bincount(data.train_clean[data.train_indices], minlength=10).tolist()
    assert (count[0], count[-1]) == (20, 5)
    assert count == sorted(count, reverse=True)
    assert data.test_size == digits_data().test_size


def save_arrays(tmp_path, count=40):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (count, 8, 8, 1)).astype(np.uint8)
    target = np.arange(count) % 3
    np.savez(tmp_path / "set.npz", train_image=image, train_target=target, test_image=image, test_target=target)
    return str(tmp_path / "set.npz")


def data_with_table(tmp_path, text, **options):
    (tmp_path / "crowd.csv").write_text(text)
    crowd = CrowdAnnotations(str(tmp_path / "crowd.csv"))
    names = ["cat", "dog", "owl"]
    return ArrayDataModule(save_arrays(tmp_path), class_names=names, annotations=crowd, val_fraction=0.0, **options)


@pytest.mark.parametrize("names", ["item,annotator,label", "index,worker,class_name"])
def test_csv_table_gives_annotations_by_sample_and_name(tmp_path, names):
    data = data_with_table(tmp_path, f"{names}\n3,ann,owl\n3,bob,dog\n0,bob,cat\n0.0,bob,cat\n5,ann,\n7,zoe,dog\n")
    data.setup()
    assert data.annotator_names == ["ann", "bob", "zoe"]
    expected = np.full((40, 3), -1)
    expected[3, 0], expected[3, 1], expected[0, 1], expected[7, 2] = 2, 1, 0, 1
    assert np.array_equal(data.train_annotations.numpy(), expected)
    assert data.train_indices.tolist() == [0, 3, 7]
    assert data.train_target[[0, 3, 7]].tolist() == [0, 1, 1]


def test_numeric_annotator_names_are_sorted_as_numbers(tmp_path):
    data = data_with_table(tmp_path, "item;annotator;label\n0;10;1\n1;9;2\n2;100;0\n")
    data.setup()
    assert data.annotator_names == ["9", "10", "100"]
    assert data.train_annotations[:3].tolist() == [[-1, 1, -1], [2, -1, -1], [-1, -1, 0]]


def test_csv_table_with_decimals_and_label_minus_1_is_read(tmp_path):
    # programs write 7 as 7.0 beside empty cells; -1 is no label, as in an array that was saved as a table
    data = data_with_table(
        tmp_path, "item;annotator;label\r\n0;10.0;1\r\n1;7;2\r\n2;7.0;0\r\n2;10;-1\r\n3;7.0;-1.0\r\n"
    )
    data.setup()
    assert data.annotator_names == ["7", "10"]
    assert data.train_annotations[:4].tolist() == [[-1, 1], [2, -1], [0, -1], [-1, -1]]
    names = data_with_table(tmp_path, "item,annotator,label\n0,ann 2.0,1\n1,bob,2\n")
    names.setup()
    assert names.annotator_names == ["ann 2.0", "bob"]


PHOTOS = [f"/home/a/photos/{name}" for name in ("cat/0001.png", "cat/0002.png", "dog/0003.png", "dog/b/0002.png")]


@pytest.mark.parametrize("folder", ["", "{}/", "photos\\{}\\", "C:\\photos\\{}\\"])
def test_table_paths_match_images_with_other_or_no_folders(tmp_path, folder, capsys):
    names = [("cat", "0001"), ("dog", "0003"), ("dog", "9999")]
    lines = [f"{folder.format(c)}{k}.png,ann,{k != '0001'}" for c, k in names]
    (tmp_path / "crowd.csv").write_text("\n".join(["file,annotator,label", *lines]))
    crowd = CrowdAnnotations(str(tmp_path / "crowd.csv"))
    given = crowd.corrupt([0, 0, 1, 1], ["False", "True"], PHOTOS)
    assert given.tolist() == [[0], [-1], [1], [-1]]
    assert "1 files of" in capsys.readouterr().err


def test_ambiguous_unknown_or_empty_paths_raise(tmp_path):
    for line, message in (
        ("0002.png,ann,0", r"'0002.png' in '.*' may be '.*cat/0002.png' or '.*dog/b/0002.png': put the folder before"),
        ("x.png,ann,0", r"no path in '.*' is one of the training images, such as 'x.png': is it for this data set\?$"),
        (",ann,1", r"the column file of '.*' is empty in 1 lines with a label, such as '1': fill it in"),
    ):
        (tmp_path / "crowd.csv").write_text(f"file,annotator,label\n{line}\n")
        with pytest.raises(ValueError, match=message):
            CrowdAnnotations(str(tmp_path / "crowd.csv")).corrupt([0, 0, 1, 1], 2, PHOTOS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "annotator,label\n0,1\n",
            "does not say which sample its lines are for: add the column item, because",
        ),
        ("file,annotator,label\na.png,0,1\n", "does not say which sample its lines are for: add the column item"),
        ("item,label\n0,1\n", "must have the column annotator, got item, label: add it"),
        ("item,annotator\n0,1\n", "must have the column label, got item, annotator: add it"),
        ("item,annotator,label\n0,ann,\n", "the column label of '.*' is empty: fill in the labels"),
        ("item,annotator,label\n40,ann,1\n", "the column item of '.*' must be from 0 to 39, got 40"),
        ("item,annotator,label\n-1,ann,1\n", "the column item of '.*' must be from 0 to 39, got -1"),
        ("item,annotator,label\nx,ann,1\n", "the column index of '.*' must hold whole numbers"),
        ("item,annotator,label\n0,ann,cow\n", "holds the label 'cow'"),
        ("item,annotator,label\n0,ann,3\n", "label of '.*' must be between 0 and 2, got 3"),
        ("item,annotator,label\n0,,1\n", "the column annotator of '.*' is empty in 1 lines with a label, such as '1'"),
        ("item,annotator,label\n0,ann,1\n0,ann,2\n", "holds two labels by annotator ann for sample 0, dog and owl"),
    ],
)
def test_invalid_tables_raise(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        data_with_table(tmp_path, text).setup()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((39, 2), np.int64), r"must be integers \[40, R\].*, got int64 \[39, 2\]"),
        (np.zeros((40, 2)), r"must be integers \[40, R\].*, got float64 \[40, 2\]"),
        (np.zeros((40, 0), np.int64), r"must be integers \[40, R\].*, got int64 \[40, 0\]"),
        (np.full((40, 2), 3), "annotations must be classes from 0 to 2, or -1 for none, got 3 to 3"),
        (np.full((40, 2), -2), "annotations must be classes from 0 to 2, or -1 for none, got -2 to -2"),
    ],
)
def test_invalid_annotation_arrays_raise(tmp_path, given, message):
    np.save(tmp_path / "crowd.npy", given)
    data = ArrayDataModule(save_arrays(tmp_path), annotations=CrowdAnnotations(str(tmp_path / "crowd.npy")))
    with pytest.raises(ValueError, match=message):
        data.setup()


def test_unknown_file_ending_or_missing_key_raises(tmp_path):
    with pytest.raises(ValueError, match=r"path must end in .npy, .npz or .csv, got 'crowd.txt'"):
        CrowdAnnotations("crowd.txt")
    np.savez(tmp_path / "crowd.npz", a=np.zeros(3), b=np.zeros(3))
    data = ArrayDataModule(save_arrays(tmp_path), annotations=CrowdAnnotations(str(tmp_path / "crowd.npz")))
    with pytest.raises(ValueError, match=r"key=None is not in '.*', which holds a, b"):
        data.setup()


@pytest.mark.parametrize("folder", ["", "train/", "/elsewhere/photos/train/"])
def test_table_of_image_paths_annotates_an_image_folder(folder, tmp_path):
    for split, count in (("train", 6), ("test", 2)):
        for name in ("cat", "dog"):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for k in range(count):
                pixels = np.full((8, 8, 3), 30 * k, np.uint8)
                Image.fromarray(pixels).save(tmp_path / "photos" / split / name / f"{k}.png")
    lines = ["dog/1.png,ann,dog", "dog/1.png,bob,cat", "cat/0.png,bob,cat", "dog/gone.png,ann,dog"]
    table = ["file,annotator,label", *(folder + line for line in lines)]
    (tmp_path / "crowd.csv").write_text("\n".join(table))
    crowd = CrowdAnnotations(str(tmp_path / "crowd.csv"))
    data = ImageFolderDataModule(str(tmp_path / "photos"), image_size=8, val_fraction=0.0, annotations=crowd)
    data.setup()
    found = {data.train_image[i].partition("train/")[2]: data.train_annotations[i].tolist() for i in data.train_indices}
    assert found == {"dog/1.png": [1, 0], "cat/0.png": [-1, 0]}
    batch = next(iter(data.loader("train")))
    assert batch.extras["annotations"].dtype == torch.int64
    assert batch.extras["annotations"].tolist() == [[-1, 0], [1, 0]]


def test_many_annotators_take_little_memory(tmp_path):
    lines = [f"{i},w{i % 1000},{i % 3}" for i in range(2000)]
    (tmp_path / "crowd.csv").write_text("\n".join(["item,annotator,label", *lines]))
    tracemalloc.start()
    given = CrowdAnnotations(str(tmp_path / "crowd.csv")).corrupt(np.arange(2000) % 3, 3)
    assert (given.shape, given.dtype) == ((2000, 1000), np.int16)
    assert tracemalloc.get_traced_memory()[1] < 3 * given.nbytes
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    found = digest(given)
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert peak < 5 * given.nbytes  # 8 times as int64 at once
    assert found == hashlib.sha256(given.astype("<i8").tobytes()).hexdigest()


def test_unsigned_annotation_arrays_are_read(tmp_path):
    np.save(tmp_path / "crowd.npy", np.ones((4, 2), np.uint16))
    assert CrowdAnnotations(str(tmp_path / "crowd.npy")).corrupt([0, 1, 2, 0], 3).tolist() == [[1, 1]] * 4


def test_annotations_with_noise_pool_or_multi_label_data_raise(tmp_path):
    crowd = SimulatedCrowd(6, 0.7, 3)
    with pytest.raises(ValueError, match="annotations are for one class per sample, the data has several labels"):
        ArrayDataModule("none.npz", fake=True, kind="multi_label", annotations=crowd)
    noise = CIFARN("worst", "CIFAR-10_human.pt")
    with pytest.raises(ValueError, match=r"annotations and noise exclude each other, got SimulatedCrowd.*CIFARN"):
        CIFAR10DataModule("none", annotations=crowd, noise=noise)
    with pytest.raises(ValueError, match="the source of a pool may have no annotations"):
        OpenSetDataModule(digits_data(annotations=crowd))
    with pytest.raises(ValueError, match="source must have no annotations"):
        MosaicDataModule(digits_data(annotations=crowd))


def save_cifar10n(path, target, count=60):
    """Saves images with three annotators as CIFAR-10N has; annotator n is wrong at every (n + 2)nd image."""
    wrong = {f"random{n}": np.where(np.arange(count) % (n + 2) == 0, (target + n) % 10, target) for n in (1, 2, 3)}
    image = np.zeros((count, 32, 32, 3), np.uint8)
    np.savez(path, train_image=image, train_target=target, test_image=image, test_target=target, **wrong)
    return np.stack([*wrong.values()], 1)


def test_cifar10n_crowd_reads_three_annotators(tmp_path):
    target = np.arange(60) % 10
    given = save_cifar10n(tmp_path / "cifar10.npz", target)
    data = CIFAR10DataModule(str(tmp_path), annotations=CIFARNCrowd(), val_fraction=0.0)
    data.setup()
    assert np.array_equal(data.train_annotations.numpy(), given)
    assert data.annotator_names == ["random1", "random2", "random3"]
    some = CIFAR10DataModule(str(tmp_path), annotations=CIFARNCrowd(per_item=1), val_fraction=0.0)
    some.setup()
    there = some.train_annotations.numpy() >= 0
    assert (there.sum(1) == 1).all()
    assert there.any(0).all()
    assert np.array_equal(some.train_annotations.numpy()[there], given[there])
    with pytest.raises(ValueError, match="per_item must be at least 1 and at most 3, got 4"):
        CIFARNCrowd(per_item=4)
    fake = CIFAR10DataModule("none", annotations=CIFARNCrowd(per_item=2), fake=True)
    fake.setup()
    assert fake.train_annotations.shape[1] == 3


def test_cifar10h_turns_label_counts_into_annotations(tmp_path):
    target = np.arange(60) % 10
    counts = np.zeros((60, 10), np.int64)
    counts[range(60), target], counts[range(60), (target + 1) % 10] = 8, 2
    np.save(tmp_path / "counts.npy", counts)
    crowd = CIFAR10H(str(tmp_path / "counts.npy"), per_item=10)
    given = crowd.corrupt(target, 10)
    assert np.array_equal(np.stack([(given == c).sum(1) for c in range(10)], 1), counts)
    assert 0.1 < (given[:, 0] != target).mean() < 0.35  # shuffled over the annotators
    few = CIFAR10H(str(tmp_path / "counts.npy"), per_item=12).corrupt(target, 10)
    assert (few[:, 10:] == -1).all()
    for own, message in (
        (target[:50], re.escape("must hold counts [50, 10], one row for each image trained on, got int64 [60, 10]")),
        ((target + 1) % 10, "agrees with the data set's label for 0.0% of the images"),
    ):
        with pytest.raises(ValueError, match=message):
            crowd.corrupt(own, 10)
    with pytest.raises(ValueError, match=r"path must end in \.npy"):
        CIFAR10H("counts.csv")


def fit(folder, data, epochs=1, **options):
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=run_callbacks(RunFolder(folder)),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(Classification("mlp_16", 10, input_shape=(1, 8, 8)), datamodule=data, **options)
    return data


def test_annotations_are_recorded_and_a_changed_record_raises(tmp_path, capsys):
    crowd = SimulatedCrowd(6, 0.7, 3)
    first = fit(tmp_path, digits_data(annotations=crowd))
    record = dict(np.load(tmp_path / "noise.npz"))
    assert record["given"].shape == (1438, 6)
    used = first.train_indices
    assert np.array_equal(record["given"][used], first.train_annotations[used].numpy())
    assert "annotations: 600 of 200 training samples by 6 annotators; the majority differs" in capsys.readouterr().err
    # the record is used, not drawn again: other annotations in it do not fit the checkpoint
    record["given"] = np.roll(record["given"], 1, axis=1)
    np.savez(tmp_path / "noise.npz", **{**record, "sha256": digest(record["given"])})
    last = str(tmp_path / "checkpoints/last.ckpt")
    with pytest.raises(ValueError, match="the checkpoint was trained on other labels than those of annotations=Simul"):
        fit(tmp_path, digits_data(annotations=crowd), epochs=2, ckpt_path=last, weights_only=True)
    np.savez(tmp_path / "noise.npz", **{**record, "sha256": "0"})
    with pytest.raises(ValueError, match="its labels do not match its sha256"):
        fit(tmp_path, digits_data(annotations=crowd), epochs=2, ckpt_path=last, weights_only=True)


def test_resume_with_other_or_no_annotations_raises(tmp_path):
    fit(tmp_path, digits_data(annotations=SimulatedCrowd(6, 0.7, 3)))
    last = {"ckpt_path": str(tmp_path / "checkpoints/last.ckpt"), "weights_only": True}
    fit(tmp_path, digits_data(annotations=SimulatedCrowd(6, 0.7, 3)), epochs=2, **last)
    with pytest.raises(ValueError, match=r"was drawn by SimulatedCrowd\(.*per_item=3.*not by .*per_item=2"):
        fit(tmp_path, digits_data(annotations=SimulatedCrowd(6, 0.7, 2)), epochs=3, **last)
    with pytest.raises(ValueError, match="holds a checkpoint trained on others"):
        fit(tmp_path, digits_data(), epochs=3, **last)
