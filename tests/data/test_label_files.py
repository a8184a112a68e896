"""Labels from files, and the record of a run's labels."""

import hashlib
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch

from lightning_kd.cli import main
from lightning_kd.core.run_callbacks import RunRecorder, run_folder_of
from lightning_kd.core.run_folder import RunFolder
from lightning_kd.data import (
    CIFARN,
    ArrayDataModule,
    CIFAR10DataModule,
    CIFAR100DataModule,
    DigitsDataModule,
    LabelFile,
    LabelNoise,
    SymmetricNoise,
    label_files,
)
from lightning_kd.data.cifar import CIFAR10_CLASSES, CIFAR100_COARSE
from lightning_kd.noisy_labels.label_scores import LabelScores
from tests.data.test_fit import Recorder
from tests.two_processes import on_two_ranks

NAMES = ["ant", "bee", "cow"]
CLEAN = np.array([0, 1, 2, 0, 1])
GIVEN = np.array([0, 2, 2, 1, 1])
TEXTS = {
    "plain": "0\n2\n2\n1\n1\n",
    "names": "ant\ncow\ncow\nbee\nbee\n",
    "headed": "label\n0\n2\n2\n1\n1\n",
    "indexed": "index,label\n3,1\n0,0\n1,2\n4,1\n2,2\n",
    "one_of_many": "index,given,predicted,clean_probability\n3,1,0,.9\n0,0,1,.8\n1,2,2,.7\n4,1,1,.6\n2,2,2,.5\n",
    "relabelled": "index,given,label\n0,1,ant\n1,1,cow\n2,1,cow\n3,1,bee\n4,1,bee\n",
    "empty_lines": "index;label;;\n;;;\n3;1;;\n0;0;;\n1;2;;\n4;1;;\n2;2;;\n;;;\n;;;\n",
    "some_empty": "index,given,label\n0,1,\n1,1,cow\n2,1, \n3,1,bee\n4,1,\n",
    "floats": "index,label\n0,\n1,2.0\n2.0,2.00\n3,1.0\n4,1\n",
    "plain_floats": "0.0\n2.0\n2.0\n1.0\n1.0\n",
    "of_windows": "\ufefflabel\r\n0\r\n2\r\n2\r\n1\r\n1\r\n",
}


@pytest.mark.parametrize("name", TEXTS)
def test_csv_labels_are_read_in_every_layout(name):
    Path("labels.csv").write_text(TEXTS[name], newline="")
    given = LabelFile("labels.csv").corrupt(CLEAN, NAMES)
    assert given.dtype == np.int64
    assert given.tolist() == GIVEN.tolist()


def test_class_index_columns_hold_indices_despite_numeric_names():
    names = sorted(str(c) for c in range(12))  # folders: 0, 1, 10, 11, 2, ...
    clean = torch.arange(48) % 12
    scores = LabelScores(torch.arange(48), clean, clean, torch.zeros(48), torch.zeros(48), torch.ones(48).double())
    scores.write(Path("noisy_labels.csv"))
    np.savez("labels.npz", class_index=clean.numpy().astype(str))
    for path in ("noisy_labels.csv", "labels.npz"):
        assert LabelFile(path).corrupt((clean + 1) % 12, names).tolist() == clean.tolist()
    Path("names.csv").write_text("11\nten\n11\n")
    assert LabelFile("names.csv").corrupt([0, 0, 0], ["0", "11", "ten"]).tolist() == [1, 2, 1]


@pytest.mark.parametrize(
    ("column", "expected"), [("class_name", [0, 2, 1]), ("class_index", [1, 2, 0]), ("given", [1, 2, 0])]
)
def test_csv_numbers_with_numeric_class_names_need_a_clear_column(column, expected):
    names, clean = ["1", "10", "2"], [0, 0, 0]
    labels = {"class_name": "1\n2\n10\n"}.get(column, "1\n2\n0\n")
    Path("labels.csv").write_text(f"{column}\n{labels}")
    assert LabelFile("labels.csv").corrupt(clean, names).tolist() == expected
    Path("labels.csv").write_text(f"label\n{labels}")
    with pytest.raises(ValueError, match=r"may be class indices or class names.* class_name or class_index"):
        LabelFile("labels.csv").corrupt(clean, names)


def test_class_names_that_end_in_zeros_are_matched():
    Path("labels.csv").write_text("2.0\n1.0\n1.10\n")
    assert LabelFile("labels.csv").corrupt([0, 0, 0], ["1.0", "1.10", "2.0"]).tolist() == [2, 0, 1]
    Path("labels.csv").write_text("class_name\n2.0\n10\n")
    assert LabelFile("labels.csv").corrupt([0, 0], ["10", "2"]).tolist() == [1, 0]


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, str])
def test_array_numbers_with_numeric_class_names_need_a_clear_key(dtype):
    names, clean, given = ["1", "2", "3"], np.array([0, 1, 2]), np.array([2, 1, 2]).astype(dtype)
    np.save("labels.npy", given)
    np.savez("labels.npz", label=given)
    for path in ("labels.npy", "labels.npz"):
        with pytest.raises(ValueError, match=r"may be class indices or class names.* the key of an .npz, to class"):
            LabelFile(path).corrupt(clean, names)
    np.savez("labels.npz", class_name=given, clean=clean + 1)
    assert LabelFile("labels.npz").corrupt(clean, names).tolist() == [1, 0, 1]
    for key in ("class_index", "given"):
        np.savez("labels.npz", **{key: given, "clean": clean})
        assert LabelFile("labels.npz").corrupt(clean, names).tolist() == [2, 1, 2]
    np.savez("labels.npz", class_name=np.array([4, 1, 2]))
    with pytest.raises(ValueError, match="holds the label '4'"):
        LabelFile("labels.npz").corrupt(clean, names)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_csv_of_any_separator_and_encoding_is_read(separator, encoding):
    rows = [["Index", " Label "], ["3", "bee "], ["1", "cow"]]
    text = "\r\n".join(separator.join(row) for row in rows) + "\r\n"
    Path("labels.CSV").write_text(text, encoding=encoding, newline="")
    assert LabelFile("labels.CSV").corrupt(CLEAN, NAMES)[[3, 1]].tolist() == [NAMES.index("bee"), NAMES.index("cow")]


def test_csv_of_some_samples_keeps_the_labels_of_the_others(monkeypatch):
    lines = []
    monkeypatch.setattr(label_files, "note", lines.append)
    Path("labels.csv").write_text("index,given,label\n3,0,bee\n1,1,cow\n")
    assert LabelFile("labels.csv").corrupt(CLEAN, NAMES).tolist() == [0, 2, 2, 1, 1]
    assert lines == ["'labels.csv' holds 2 of 5 labels: the other samples keep the data set's own labels"]
    Path("labels.csv").write_text(TEXTS["indexed"])
    LabelFile("labels.csv").corrupt(CLEAN, NAMES)
    assert len(lines) == 1


def test_unusual_header_of_one_column_is_read_by_key_only():
    Path("labels.csv").write_text("target\n0\n2\n2\n1\n1\n")
    assert LabelFile("labels.csv", "target").corrupt(CLEAN, NAMES).tolist() == GIVEN.tolist()
    with pytest.raises(ValueError, match="holds the label 'target': all labels must be"):
        LabelFile("labels.csv").corrupt(CLEAN, NAMES)


def test_key_chooses_the_column_or_array():
    Path("labels.csv").write_text("index,one,two\n0,1,0\n1,1,2\n2,1,2\n3,1,1\n4,1,1\n")
    np.savez("labels.npz", one=np.ones(5, int), two=GIVEN)
    for path in ("labels.csv", "labels.npz"):
        assert LabelFile(path, "two").corrupt(CLEAN, NAMES).tolist() == GIVEN.tolist()
        with pytest.raises(ValueError, match=f"key=None is not in '{path}', which holds one, two: give one"):
            LabelFile(path).corrupt(CLEAN, NAMES)
        with pytest.raises(ValueError, match="key='three' is not in"):
            LabelFile(path, "three").corrupt(CLEAN, NAMES)


def test_npy_and_npz_labels_are_read():
    np.save("labels.npy", GIVEN.astype(np.uint8))
    np.save("names.npy", np.array(NAMES)[GIVEN])
    np.savez("labels.npz", given=GIVEN, clean=CLEAN, other=np.arange(3))
    for path in ("labels.npy", "names.npy", "labels.npz"):
        assert LabelFile(path).corrupt(CLEAN, NAMES).tolist() == GIVEN.tolist()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no label"),
        ("label\n", "holds no label"),
        ("0\n1\n2\n", "has 3 labels, got 5 samples"),
        ("0\n1\n2\n3\n0\n", "between 0 and 2, got 3 at position 3"),
        ("0\n1\n-1\n0\n0\n", "between 0 and 2, got -1 at position 2"),
        ("ant\nbee\ndog\nant\nant\n", "holds the label 'dog': all labels must be class indices, or all class names"),
        ("0\n1\n1.5\n0\n0\n", "holds the label '1.5': all labels must be"),
        ("ant\nbee\n1\nant\nant\n", "holds the label '1': all labels must be"),
        ("0\n" * 4 + "9" * 30 + "\n", "holds the label '9+': all labels must be"),
        ("0\n" * 4 + "9" * 5000 + "\n", "holds the label '9+': all labels must be"),
        ("label,label\n0,1\n", "names the column 'label' twice"),
        ("index,label\n0,0\n1\n", "must have 2 cells in each line, got"),
        ("index,label\n0,0\n1,0\n1,0\n2,0\n3,0\n", "holds 1 more than once: keep one line"),
        ("index,label\n1,0\n5,0\n", "must be from 0 to 4, got 5"),
        ("index,label\n1,0\n-1,0\n", "must be from 0 to 4, got -1"),
        ("index,label\n1,0\n2,3\n", "between 0 and 2, got 3 at position 2"),
        ("index,label\n1,\n2,\n", "the column label of 'labels.csv' is empty: fill in"),
        ("label,note\n0,\n,x\n", "holds the label ''"),
        ("index,label\na,0\n", "must hold whole numbers"),
        ("index,label\n" + "9" * 30 + ",0\n", "must hold whole numbers"),
    ],
)
def test_invalid_csv_labels_raise(text, message):
    Path("labels.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        LabelFile("labels.csv").corrupt(CLEAN, NAMES)


def test_invalid_label_files_raise():
    np.savez("labels.npz", given=GIVEN, clean=np.array([0, 1, 2, 1, 0]))
    with pytest.raises(ValueError, match="differ from those of the data set at 2 of 5 samples"):
        LabelFile("labels.npz").corrupt(CLEAN, NAMES)
    np.save("float.npy", GIVEN / 2)
    with pytest.raises(ValueError, match="must hold integers"):
        LabelFile("float.npy").corrupt(CLEAN, NAMES)
    np.save("objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="holds Python objects, which are never unpickled"):
        LabelFile("objects.npy").corrupt(CLEAN, NAMES)
    Path("bytes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"no .csv file in UTF-8"):
        LabelFile("bytes.csv").corrupt(CLEAN, NAMES)
    for path in ("none.csv", "none.npy"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            LabelFile(path).corrupt(CLEAN, NAMES)
    with pytest.raises(ValueError, match=r"must end in .npy, .npz or .csv, got 'labels.txt'"):
        LabelFile("labels.txt")


def test_synthetic_labels_follow_the_transition_of_the_file():
    clean = np.arange(20_000) % 4
    given = np.where((clean == 1) & (np.arange(20_000) < 8_000), 3, clean)  # 40 % of class 1, all in the first part
    np.save("labels.npy", given)
    drawn = LabelFile("labels.npy", synthetic=True).corrupt(clean, 5)  # the fifth class has no sample
    assert (drawn[clean != 1] == clean[clean != 1]).all()
    assert (drawn[clean == 1] == 3).mean() == pytest.approx(0.4, abs=0.03)
    assert (drawn[12_000:][clean[12_000:] == 1] == 3).mean() == pytest.approx(0.4, abs=0.05)
    assert (drawn == LabelFile("labels.npy", synthetic=True).corrupt(clean, 5)).all()
    assert (drawn != LabelFile("labels.npy", synthetic=True, seed=1).corrupt(clean, 5)).any()


# -- human labels ------------------------------------------------------------------------------------------------------

FINE = np.arange(300) % 100
NOISY = (FINE * 7 + 3) % 100
MAP = np.array(CIFAR100_COARSE)
HUMAN = {k: (np.arange(300) * i) % 10 for i, k in enumerate(("aggre", "worse", "random1", "random2", "random3"), 3)}
TEN = np.arange(300) % 10


def save_cifar(root, name, target, **more):
    image = np.zeros((len(target), 32, 32, 3), dtype=np.uint8)
    arrays = {"train_image": image, "train_target": target, "test_image": image[:40], "test_target": target[:40]}
    np.savez(Path(root) / f"{name}.npz", **arrays, **more)


def save_old_pt(path, entries):
    """Saves a file like the official one, whose pickled arrays name NumPy's function as NumPy 1 did."""
    torch.save(entries, "new.pt")
    with zipfile.ZipFile("new.pt") as source, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as out:
        for info in source.infolist():
            content = source.read(info)
            if info.filename.endswith("data.pkl"):
                content = content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
                assert b"numpy.core.multiarray\n_reconstruct" in content
            out.writestr(info.filename, content)


@pytest.fixture
def cifar(tmp_path):
    save_cifar(tmp_path, "cifar10", TEN, **HUMAN)
    coarse = {"train_coarse": MAP[FINE], "test_coarse": MAP[FINE[:40]]}
    save_cifar(tmp_path, "cifar100", FINE, noisy=NOISY, noisy_coarse=MAP[NOISY], **coarse)
    keys = ("aggre_label", "worse_label", "random_label1", "random_label2", "random_label3")
    save_old_pt("ten.pt", {"clean_label": TEN, **dict(zip(keys, HUMAN.values(), strict=True))})
    wrong = (MAP[NOISY] + 1) % 20  # some copies of the file have wrong coarse labels
    lists = {"clean_coarse_label": ((MAP[FINE] + 1) % 20).tolist(), "noisy_coarse_label": wrong.tolist()}
    save_old_pt("hundred.pt", {"clean_label": FINE, "noisy_label": NOISY, **lists})
    return str(tmp_path)


@pytest.mark.parametrize("path", [None, "ten.pt", "cifar10.npz"])
@pytest.mark.parametrize(
    ("labels", "key"), [("aggre", "aggre"), ("worst", "worse"), *((f"random{k}", f"random{k}") for k in (1, 2, 3))]
)
def test_human_labels_of_cifar10_are_read(cifar, labels, key, path):
    data = CIFAR10DataModule(cifar, noise=CIFARN(labels, path))
    data.setup()
    assert data.train_target.tolist() == HUMAN[key].tolist()
    assert data.train_clean.tolist() == TEN.tolist()


@pytest.mark.parametrize("path", [None, "hundred.pt"])
def test_human_labels_of_cifar100_are_read_fine_and_coarse(cifar, path):
    fine = CIFAR100DataModule(cifar, noise=CIFARN("noisy100", path))
    fine.setup()
    assert fine.train_target.tolist() == NOISY.tolist()
    coarse = CIFAR100DataModule(cifar, "coarse", noise=CIFARN("noisy100_coarse", path))
    coarse.setup()
    assert coarse.train_target.tolist() == MAP[NOISY].tolist()
    assert coarse.train_clean.tolist() == MAP[FINE].tolist()


def test_human_labels_pickled_by_new_numpy_are_read(cifar):
    torch.save({"clean_label": TEN, "worse_label": HUMAN["worse"]}, "mine.pt")
    data = CIFAR10DataModule(cifar, noise=CIFARN("worst", "mine.pt"))
    data.setup()
    assert data.train_target.tolist() == HUMAN["worse"].tolist()


def test_human_labels_whose_clean_labels_differ_raise(cifar):
    save_old_pt("other.pt", {"clean_label": np.roll(TEN, 1), "worse_label": TEN})
    with pytest.raises(ValueError, match="differ from those of the data set at 300 of 300 samples"):
        CIFAR10DataModule(cifar, noise=CIFARN("worst", "other.pt")).setup()
    save_old_pt("short.pt", {"clean_label": TEN[:100], "worse_label": TEN})
    with pytest.raises(ValueError, match="at 300 of 300 samples"):
        CIFAR10DataModule(cifar, noise=CIFARN("worst", "short.pt")).setup()
    swapped = FINE.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    save_old_pt("hundred.pt", {"clean_label": swapped, "noisy_label": NOISY})
    with pytest.raises(ValueError, match="at 2 of 300 samples"):
        CIFAR100DataModule(cifar, "coarse", noise=CIFARN("noisy100_coarse", "hundred.pt")).setup()


def test_human_labels_far_from_the_published_noise_rate_raise():
    rng = np.random.default_rng(0)
    clean = rng.permutation(np.arange(50_000) % 10)
    worse = clean.copy()
    worse[: int(0.40208 * 50_000)] += 1
    worse %= 10
    np.savez("human.npz", train_target=clean, worse=worse)
    assert CIFARN("worst", "human.npz").corrupt(clean, CIFAR10_CLASSES).tolist() == worse.tolist()
    np.savez("human.npz", train_target=clean, worse=rng.permutation(worse))
    with pytest.raises(
        ValueError, match=r"differ from the clean ones at (89|90).\d+% of 50000 samples, but 40.21% is published"
    ):
        CIFARN("worst", "human.npz").corrupt(clean, CIFAR10_CLASSES)
    save_old_pt("human.pt", {"clean_label": clean, "worse_label": np.roll(worse, 1)})
    with pytest.raises(ValueError, match="probably in another order"):
        CIFARN("worst", "human.pt", synthetic=True).corrupt(clean, CIFAR10_CLASSES)


def test_missing_or_unfitting_human_labels_raise(cifar, tmp_path):
    save_cifar(tmp_path, "cifar10", TEN)
    with pytest.raises(ValueError, match=r"lacks worse.*CIFAR-\*_human.pt"):
        CIFAR10DataModule(cifar, noise=CIFARN("worst")).setup()
    with pytest.raises(FileNotFoundError, match=r"^path 'none.pt' does not exist"):
        CIFAR10DataModule(cifar, noise=CIFARN("worst", "none.pt")).setup()
    with pytest.raises(FileNotFoundError, match="got path=None and a data set without an"):
        CIFARN("worst").corrupt(TEN, CIFAR10DataModule("x", fake=True).class_names)
    with pytest.raises(
        ValueError, match=r"are for the 10 classes airplane, automobile, .*got a data set of 100, apple"
    ):
        CIFAR100DataModule(cifar, noise=CIFARN("worst", "ten.pt")).setup()
    with pytest.raises(ValueError, match="labels='noisy100' are for the 100 classes"):
        CIFAR100DataModule(cifar, "coarse", noise=CIFARN("noisy100")).setup()
    with pytest.raises(ValueError, match="labels must be one of aggre, worst"):
        CIFARN("clean")
    with pytest.raises(ValueError, match="other forms are in another order"):
        CIFARN("worst", "CIFAR-10_human_ordered.npy")


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("touched"),)


def test_only_integer_arrays_are_unpickled(cifar):
    torch.save({"clean_label": TEN, "worse_label": Evil()}, "evil.pt")
    Path("plain.pt").write_bytes(pickle.dumps({"clean_label": TEN, "worse_label": Evil()}, protocol=2))
    Path("text.pt").write_text("no")
    Path("empty.pt").write_bytes(b"")
    for path in ("evil.pt", "plain.pt", "text.pt", "empty.pt"):
        with pytest.raises(ValueError, match=f"'{path}' is damaged, or holds more than integer arrays") as caught:
            CIFAR10DataModule(cifar, noise=CIFARN("worst", path)).setup()
        assert "weights_only" not in str(caught.value)
    assert not Path("touched").exists()
    torch.save([TEN], "list.pt")
    with pytest.raises(ValueError, match="must hold a dict of labels, got list"):
        CIFAR10DataModule(cifar, noise=CIFARN("worst", "list.pt")).setup()


# -- the record --------------------------------------------------------------------------------------------------------


class NewLabelsAtEachCall(LabelNoise):
    """Draws other labels at each call, so that equal labels must come from a record."""

    calls = 0

    def draw(self, clean, generator):
        NewLabelsAtEachCall.calls += 1
        return (clean.target + NewLabelsAtEachCall.calls) % clean.num_classes


def fit(data, folder="run", **options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    recorder = [RunRecorder(RunFolder(folder))]
    run = L.Trainer(**{**quiet, "enable_model_summary": False, "max_epochs": 1, "callbacks": recorder, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(Recorder(64), data)
    return data


def read_record(path="run/noise.npz"):
    with np.load(path) as arrays:
        return dict(arrays)


def write_empty_checkpoint(folder="run"):
    RunFolder(folder).last.parent.mkdir(parents=True, exist_ok=True)
    RunFolder(folder).last.write_bytes(b"")


def test_record_stores_labels_that_another_run_can_use(capsys):
    data = fit(DigitsDataModule(noise=SymmetricNoise(0.5, "exclusive", seed=3)))
    record = read_record()
    assert record["given"].tolist() == data.train_target.tolist()
    assert record["clean"].tolist() == data.train_clean.tolist()
    assert record["given"].dtype == record["clean"].dtype == np.int64
    assert str(record["generator"]) == "SymmetricNoise(rate=0.5, kind='exclusive', seed=3)"
    assert record["rate"] == 0.5
    assert record["seed"] == 3
    assert str(record["sha256"]) == hashlib.sha256(data.train_target.numpy().astype("<i8").tobytes()).hexdigest()
    wrong = int((data.train_target != data.train_clean).sum())
    used = data.train_indices
    wrong_used = int((data.train_target[used] != data.train_clean[used]).sum())
    line = f"label noise: {wrong_used} of {len(used)} training labels are wrong ({wrong_used / len(used):.2%}; "
    line += f"in the whole array {wrong} of 1438, {wrong / 1438:.2%}), by SymmetricNoise(rate=0.5, "
    assert len(used) == 1294
    assert capsys.readouterr().out.count(line) == 1
    # another run can use the recorded labels, but only on the same data
    other = DigitsDataModule(noise=LabelFile("run/noise.npz"), val_fraction=0)
    other.setup()
    assert torch.equal(other.train_target, data.train_target)
    fit(other, "other")
    line = f"label noise: {wrong} of 1438 training labels are wrong ({wrong / 1438:.2%}), by LabelFile("
    assert capsys.readouterr().out.count(line) == 1
    with pytest.raises(ValueError, match="has 1438 labels, got 1000 samples"):
        LabelFile("run/noise.npz").corrupt(data.train_clean[:1000], 10)
    moved = data.train_clean.clone()
    moved[[0, 1]] = moved[[1, 0]]
    assert moved[0] != moved[1]
    with pytest.raises(ValueError, match="clean labels of its file differ from those of the data set at 2 of 1438"):
        LabelFile("run/noise.npz").corrupt(moved, 10)


def test_recorded_labels_are_reused_where_a_checkpoint_exists():
    first = fit(DigitsDataModule(noise=NewLabelsAtEachCall()))
    write_empty_checkpoint()
    again = DigitsDataModule(noise=NewLabelsAtEachCall())
    again.setup()
    assert not torch.equal(again.train_target, first.train_target)
    fit(again)  # it drew labels before it had a run folder
    assert torch.equal(again.train_target, first.train_target)
    assert fit(again).train_target is again.train_target
    elsewhere = fit(DigitsDataModule(noise=NewLabelsAtEachCall()), "elsewhere")
    assert not torch.equal(elsewhere.train_target, first.train_target)


def test_a_new_fit_without_a_checkpoint_draws_new_labels():
    first = fit(DigitsDataModule(noise=NewLabelsAtEachCall()))
    tested = DigitsDataModule(noise=NewLabelsAtEachCall())
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    L.Trainer(**quiet, callbacks=[RunRecorder(RunFolder("run"))]).test(Recorder(64), tested, verbose=False)
    assert torch.equal(tested.train_target, first.train_target)
    second = fit(DigitsDataModule(noise=NewLabelsAtEachCall()))
    assert not torch.equal(second.train_target, first.train_target)
    assert read_record()["given"].tolist() == second.train_target.tolist()


def digit_labels():
    data = DigitsDataModule()
    data.setup()
    return data.train_target.numpy()


class Fixed(LabelNoise):
    """A user's noise that returns a stored array; its repr shows only the ends of the array."""

    def __init__(self, given):
        self.given = given
        super().__init__()

    def draw(self, clean, generator):
        return self.given


def test_recorded_labels_are_compared_by_content_not_by_path():
    given = digit_labels()
    np.save("one.npy", given)
    assert fit(DigitsDataModule(noise=LabelFile("one.npy"))).train_target.tolist() == given.tolist()
    other = given.copy()
    other[700] = (other[700] + 1) % 10
    np.save("one.npy", other)
    assert fit(DigitsDataModule(noise=LabelFile("one.npy"))).train_target.tolist() == other.tolist()
    assert read_record()["given"].tolist() == other.tolist()
    write_empty_checkpoint()
    Path("one.npy").rename("two.npy")
    for same in (LabelFile("two.npy"), LabelFile("run/noise.npz"), Fixed(other)):
        assert fit(DigitsDataModule(noise=same)).train_target.tolist() == other.tolist()
    np.save("one.npy", given)
    with pytest.raises(ValueError, match=r"labels are no longer those of LabelFile\(path='one.npy'"):
        fit(DigitsDataModule(noise=LabelFile("one.npy")))
    with pytest.raises(ValueError, match=r"was drawn by LabelFile\(path='one.npy'.* not by Fixed"):
        fit(DigitsDataModule(noise=Fixed(given)))
    assert read_record()["given"].tolist() == other.tolist()


def test_arrays_of_a_users_noise_are_compared_in_full():
    given = digit_labels()
    other = given.copy()
    other[700] = (other[700] + 1) % 10
    assert repr(Fixed(given)) == repr(Fixed(other))
    fit(DigitsDataModule(noise=Fixed(given)))
    write_empty_checkpoint()
    fit(DigitsDataModule(noise=Fixed(given.copy())))
    with pytest.raises(ValueError, match="labels are no longer those of Fixed"):
        fit(DigitsDataModule(noise=Fixed(other)))


def test_checkpoint_stores_a_label_digest_and_refuses_other_labels(tmp_path):
    noise = SymmetricNoise(0.4)
    data = DigitsDataModule(noise=noise)
    assert data.state_dict() == {}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    quiet |= {"default_root_dir": tmp_path, "enable_checkpointing": False}
    run = L.Trainer(**quiet, max_epochs=1)
    run.fit(Recorder(64), data)
    run.save_checkpoint("one.ckpt")
    stored = torch.load("one.ckpt", weights_only=True)["DigitsDataModule"]
    assert stored.pop("data_sha256") == data.state_dict()["data_sha256"]
    assert stored == {"labels_sha256": hashlib.sha256(data.train_target.numpy().astype("<i8").tobytes()).hexdigest()}

    def resume(data):
        L.Trainer(**quiet, max_epochs=2).fit(Recorder(64), data, ckpt_path="one.ckpt", weights_only=True)

    resume(DigitsDataModule(noise=SymmetricNoise(0.4)))
    for other in (None, SymmetricNoise(0.4, seed=1)):
        with pytest.raises(ValueError, match=r"the checkpoint was trained on other labels than those of noise="):
            resume(DigitsDataModule(noise=other))
        evaluation = L.Trainer(**quiet)
        evaluation.test(Recorder(64), DigitsDataModule(noise=other), ckpt_path="one.ckpt", verbose=False)
        evaluation.predict(Recorder(64), DigitsDataModule(noise=other), ckpt_path="one.ckpt")
    run = L.Trainer(**quiet, max_epochs=1)
    run.fit(Recorder(64), DigitsDataModule())
    run.save_checkpoint("clean.ckpt")
    assert list(torch.load("clean.ckpt", weights_only=True)["DigitsDataModule"]) == ["data_sha256"]


def test_other_labels_raise_only_where_a_checkpoint_exists():
    first = fit(DigitsDataModule(noise=SymmetricNoise(0.2)))
    RunFolder("run").last.unlink(missing_ok=True)
    second = fit(DigitsDataModule(noise=SymmetricNoise(0.4)))
    assert read_record()["rate"] == 0.4
    assert not torch.equal(first.train_target, second.train_target)
    write_empty_checkpoint()
    with pytest.raises(ValueError, match=r"belongs to the checkpoint .*was drawn by SymmetricNoise\(rate=0.4"):
        fit(DigitsDataModule(noise=SymmetricNoise(0.2)))
    with pytest.raises(ValueError, match="its clean labels are not those of the data set"):
        fit(DigitsDataModule(noise=SymmetricNoise(0.4), fake=True))
    with pytest.raises(ValueError, match="noise=None would train on clean labels"):
        fit(DigitsDataModule())
    np.savez("run/noise.npz", **{**read_record(), "given": first.train_target.numpy()})
    with pytest.raises(ValueError, match="its labels do not match its sha256"):
        fit(DigitsDataModule(noise=SymmetricNoise(0.4)))
    assert read_record()["given"].tolist() == first.train_target.tolist()


def test_a_fit_on_clean_labels_leaves_no_record():
    fit(DigitsDataModule(noise=SymmetricNoise(0.2)))
    RunFolder("run").clear()
    assert not Path("run/noise.npz").exists()
    fit(DigitsDataModule(noise=SymmetricNoise(0.2)))
    RunFolder("run").last.unlink(missing_ok=True)
    fit(DigitsDataModule())
    assert not Path("run/noise.npz").exists()
    fit(DigitsDataModule(noise=SymmetricNoise(0.2)), fast_dev_run=True)
    assert not Path("run/noise.npz").exists()


def test_trainer_without_recorder_has_no_run_folder():
    assert run_folder_of(None) is None
    assert run_folder_of(L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")) is None


def test_fake_data_record_the_noise_drawn_for_a_missing_file(capsys):
    fit(DigitsDataModule(fake=True, noise=LabelFile("missing.npy")))
    assert str(read_record()["generator"]) == "SymmetricNoise(rate=0.4, kind='exclusive', seed=0)"
    assert "by SymmetricNoise(rate=0.4, kind='exclusive'" in capsys.readouterr().out


def test_noise_does_not_change_own_validation_and_test_labels(tmp_path):
    from PIL import Image

    from lightning_kd.data import ImageFolderDataModule

    for split, count in (("train", 20), ("val", 5), ("test", 5)):
        for name in "ab":
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8)).save(folder / f"{i}.png")
    data = ImageFolderDataModule(str(tmp_path), 8, noise=SymmetricNoise(1.0, "exclusive"))
    data.setup()
    assert data.train_target.tolist() == [1] * 20 + [0] * 20
    assert data.val_target.tolist() == data.test_target.tolist() == [0] * 5 + [1] * 5


def test_given_labels_may_lack_a_class():
    given = np.arange(300) % 3
    image = np.zeros((300, 4, 4), dtype=np.uint8)
    np.savez("mine.npz", train_image=image, train_target=np.arange(300) % 4, test_image=image, test_target=given)
    np.save("given.npy", given)
    for options in ({}, {"train_fraction": 0.5}, {"train_per_class": 5}):
        data = ArrayDataModule("mine.npz", noise=LabelFile("given.npy"), **options)
        data.setup()
        assert data.num_classes == 4
        assert set(data.train_target[data.train_indices].tolist()) == {0, 1, 2}


def _labels_of_a_rank(folder, refuse):
    NewLabelsAtEachCall.calls = int(os.environ["LOCAL_RANK"])  # each would draw labels of its own
    data = DigitsDataModule(noise=SymmetricNoise(0.1) if refuse else NewLabelsAtEachCall())
    try:
        fit(data, folder, strategy="ddp", devices=2)
    except ValueError as error:
        return str(error)
    return data.train_target.tolist()


def test_two_processes_train_on_the_same_labels(tmp_path):
    one, two = on_two_ranks(_labels_of_a_rank, str(tmp_path / "run"), False)
    assert one == ((digit_labels() + 1) % 10).tolist()  # those of the first process
    assert one == two == read_record(tmp_path / "run" / "noise.npz")["given"].tolist()


def test_two_processes_raise_the_same_error(tmp_path):
    folder = tmp_path / "run"
    fit(DigitsDataModule(noise=SymmetricNoise(0.2)), str(folder))
    write_empty_checkpoint(folder)
    one, two = on_two_ranks(_labels_of_a_rank, str(folder), True)
    assert one == two
    assert "was drawn by SymmetricNoise(rate=0.2" in one


def test_command_line_keeps_the_recorded_labels_until_overwrite(capsys):
    args = ["--model", "Classification", "--model.network", "mlp", "--data", "DigitsDataModule", "--run", "out"]
    args += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    noise = ["--data.noise", "SymmetricNoise", "--data.noise.rate", "0.5"]
    main(["fit", *args, *noise, "--trainer.max_epochs", "1"])
    drawn = read_record("out/noise.npz")
    assert "label noise: " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["fit", *args, *noise, "--data.noise.seed", "1", "--trainer.max_epochs", "3", "--ckpt_path", "last"])
    assert "was made with data.init_args.noise.init_args.seed=0, got 1: keep it" in capsys.readouterr().err
    assert str(read_record("out/noise.npz")["sha256"]) == str(drawn["sha256"])
    main(["test", "--config", "out/config.yaml", "--ckpt_path", "last", "--trainer.enable_progress_bar", "false"])
    main(["fit", *args, *noise, "--data.noise.seed", "1", "--trainer.max_epochs", "1", "--overwrite"])
    assert str(read_record("out/noise.npz")["sha256"]) != str(drawn["sha256"])


PHOTOS = [
    f"/home/a/photos/{name}" for name in ("ant/0.png", "ant/1.png", "bee/0.png", "cow/ 2.png", "cow/caf\udce9.png")
]


@pytest.mark.parametrize("root", ["/home/a/photos/", "photos/", "/mnt/other/", ""])
def test_csv_lines_follow_their_files_when_indices_change(root, capsys):
    lines = [(1, "ant/1.png", "cow"), (3, "cow/ 2.png", "ant"), (4, "cow/caf\\udce9.png", "bee")]
    Path("c.csv").write_text("index,path,class_name\n" + "".join(f"{k},{root}{p},{c}\n" for k, p, c in lines))
    clean = [0, 0, 1, 2, 2]
    assert LabelFile("c.csv").corrupt(clean, NAMES, PHOTOS).tolist() == [0, 2, 1, 0, 1]
    assert "another index" not in capsys.readouterr().err
    come = ["/home/a/photos/ant/00.png", *PHOTOS]
    assert LabelFile("c.csv").corrupt([0, *clean], NAMES, come).tolist() == [0, 0, 2, 1, 0, 1]
    assert "3 files of 'c.csv' have another index now" in capsys.readouterr().err
    gone = [PHOTOS[k] for k in (0, 2, 3, 4)]
    assert LabelFile("c.csv").corrupt([0, 1, 2, 2], NAMES, gone).tolist() == [0, 1, 0, 1]
    assert f"1 files of 'c.csv' are not training images, such as '{root}ant/1.png': left out" in capsys.readouterr().err


@pytest.mark.parametrize("root", ["/home/a/photos/", "/mnt/other/", ""])
def test_removed_file_is_not_matched_to_the_same_name_elsewhere(root, capsys):
    Path("c.csv").write_text(f"index,path,class_name\n0,{root}ant/0.png,cow\n3,{root}cow/bee/0.png,ant\n")
    assert LabelFile("c.csv").corrupt([0, 0, 1, 2, 2], NAMES, PHOTOS).tolist() == [2, 0, 1, 2, 2]
    assert f"1 files of 'c.csv' are not training images, such as '{root}cow/bee/0.png'" in capsys.readouterr().err


def test_path_without_folder_is_matched_with_its_index():
    Path("c.csv").write_text("index,path,label\n1,1.png,bee\n2,,cow\n")
    assert LabelFile("c.csv").corrupt([0, 0, 1, 2, 2], NAMES, PHOTOS).tolist() == [0, 1, 2, 2, 2]
    Path("c.csv").write_text("index,path,label\n3,x.png,ant\n")
    with pytest.raises(ValueError, match=r"no path in 'c\.csv' is one of the training images, such as 'x\.png'"):
        LabelFile("c.csv").corrupt([0, 0, 1, 2, 2], NAMES, PHOTOS)
    assert LabelFile("c.csv").corrupt([0, 0, 1, 2], NAMES).tolist() == [0, 0, 1, 0]  # arrays have no paths


def test_class_names_with_outer_blanks_are_matched():
    Path("c.csv").write_text("index,class_name\n0,cow \n1,caf\\udce9\n")
    assert LabelFile("c.csv").corrupt([0, 0], ["ant", " cow", "caf\udce9"]).tolist() == [1, 2]
