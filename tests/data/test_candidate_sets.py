"""Candidate labels of single-label data: generators, files, the meta set, the record of a run, published sets."""

import hashlib

import lightning as L
import numpy as np
import pytest
import torch
from scipy.io import savemat
from scipy.sparse import csc_matrix

from lightning_kd.core.run_callbacks import run_callbacks
from lightning_kd.core.run_folder import RunFolder
from lightning_kd.core.supervised import Classification
from lightning_kd.data import (
    ArrayDataModule,
    CandidateFile,
    CandidateLabels,
    DigitsDataModule,
    MosaicDataModule,
    OpenSetDataModule,
    PairwiseCandidates,
    PartialLabelDataModule,
    SymmetricNoise,
    UniformCandidates,
)
from lightning_kd.weak_labels import CandidateBaseline

COUNT, CLASSES = 3000, 6
TARGET = np.arange(COUNT) % CLASSES
WRONG = np.ones((COUNT, CLASSES), dtype=bool)
WRONG[range(COUNT), TARGET] = False


def candidates_of(sets, target=TARGET, classes=CLASSES):
    return sets.corrupt(target, classes)


def within_three_deviations(found, rate, count):
    return abs(found - rate) <= 3 * np.sqrt(rate * (1 - rate) / count)


@pytest.mark.parametrize("q", [0.1, 0.3, 0.5, 0.7])
def test_uniform_candidates_hold_the_label_and_others_at_rate_q(q):
    given = candidates_of(UniformCandidates(q))
    assert given.dtype == np.uint8
    assert given[range(COUNT), TARGET].all()
    assert within_three_deviations(given[WRONG].mean(), q, WRONG.sum())
    assert given.sum(1).mean() == pytest.approx(1 + (CLASSES - 1) * q, abs=0.1)
    assert np.array_equal(given, candidates_of(UniformCandidates(q)))
    assert not np.array_equal(given, candidates_of(UniformCandidates(q, seed=2)))
    # a higher rate only adds candidates
    assert (candidates_of(UniformCandidates(q + 0.2)) >= given).all()
    # each sample's wrong candidates depend on its position, not on the labels of others
    other = TARGET.copy()
    other[0] = 5
    assert np.array_equal(candidates_of(UniformCandidates(q), other)[1:], given[1:])


def test_reject_full_and_ensure_ambiguous_change_only_their_samples():
    plain = candidates_of(UniformCandidates(0.7))
    assert (plain.sum(1) == CLASSES).any()
    fewer = candidates_of(UniformCandidates(0.7, reject_full=True))
    assert (fewer.sum(1) < CLASSES).all()
    kept = plain.sum(1) < CLASSES
    assert np.array_equal(fewer[kept], plain[kept])
    plain, more = candidates_of(UniformCandidates(0.1)), candidates_of(UniformCandidates(0.1, ensure_ambiguous=True))
    single = plain.sum(1) == 1
    assert single.any()
    assert np.array_equal(more[~single], plain[~single])
    assert (more[single].sum(1) == 2).all()
    # every wrong label is added equally often
    added = (more - plain)[single & (TARGET == 2)].mean(0)
    assert added[2] == 0
    assert all(within_three_deviations(share, 0.2, (single & (TARGET == 2)).sum()) for share in np.delete(added, 2))


def test_rate_half_with_reject_full_draws_all_sets_equally_often():
    given = candidates_of(UniformCandidates(0.5, reject_full=True), np.zeros(COUNT, np.int64), 4)
    sets, counts = np.unique(given, axis=0, return_counts=True)
    assert len(sets) == 2**3 - 1
    assert all(within_three_deviations(n / COUNT, 1 / 7, COUNT) for n in counts)


def test_pairwise_candidates_add_the_next_class_at_rate_q():
    given = candidates_of(PairwiseCandidates(0.4))
    following = (TARGET + 1) % CLASSES
    assert within_three_deviations(given[range(COUNT), following].mean(), 0.4, COUNT)
    assert (given.sum(1) == 1 + given[range(COUNT), following]).all()
    assert given[range(COUNT), TARGET].all()
    assert (candidates_of(PairwiseCandidates(1.0)).sum(1) == 2).all()


def test_candidate_file_reads_npy_npz_and_csv(tmp_path, caplog):
    given = candidates_of(UniformCandidates(0.3))
    np.save(tmp_path / "a.npy", given.astype(bool))
    np.savez(tmp_path / "b.npz", given=given, clean=TARGET)
    np.savez(tmp_path / "c.npz", mine=given, other=given[:, ::-1])
    for sets in (
        CandidateFile(str(tmp_path / "a.npy")),
        CandidateFile(str(tmp_path / "b.npz")),
        CandidateFile(str(tmp_path / "c.npz"), "mine"),
    ):
        assert np.array_equal(candidates_of(sets), given)
    (tmp_path / "d.csv").write_text("index,label\n0,no\n0,yes\n2,no\n")
    found = CandidateFile(str(tmp_path / "d.csv")).corrupt([0, 1, 0], ["no", "yes"])
    assert found.tolist() == [[1, 1], [0, 1], [1, 0]]
    assert "has no line for 1 of 3 samples" in caplog.text
    # as a spreadsheet writes it: another name, whole numbers beside empty cells, lines without a label
    (tmp_path / "d.csv").write_text("\ufeffitem;class_name\r\n0.0;no\r\n0.0;yes\r\n1;\r\n002;no\r\n2;-1\r\n")
    assert np.array_equal(CandidateFile(str(tmp_path / "d.csv")).corrupt([0, 1, 0], ["no", "yes"]), found)
    (tmp_path / "d.csv").write_text("index,mine\n0,1\n0,0\n1,1\n2,0\n")
    assert np.array_equal(CandidateFile(str(tmp_path / "d.csv"), "mine").corrupt([0, 1, 0], ["no", "yes"]), found)


@pytest.mark.parametrize("folder", ["", "photos/", "/elsewhere/photos/"])
def test_candidate_csv_is_matched_to_image_files_by_path(tmp_path, folder):
    files = [f"/home/a/photos/{name}" for name in ("cat/0.png", "cat/1.png", "dog/0.png")]
    lines = ["cat/1.png,dog", "cat/1.png,cat", "dog/0.png,dog", "dog/0.png,owl", "dog/gone.png,owl"]
    (tmp_path / "d.csv").write_text("file,label\n" + "\n".join(folder + line for line in lines))
    found = CandidateFile(str(tmp_path / "d.csv")).corrupt([0, 0, 1], ["cat", "dog", "owl"], files)
    assert found.tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((3, 3)), r"must be \[3, 2\], a row for each sample .* got \[3, 3\]"),
        (np.array([[1, 0], [0, 2], [1, 0]]), r"must hold 0 and 1"),
        (np.array([[1, 0], [0, 0], [1, 0]]), r"got no candidate for sample 1: add it"),
        (np.array([[1, 0], [0, 1], [0, 1]]), r"got not its own label for sample 2: add it"),
    ],
)
def test_invalid_candidate_arrays_raise(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=message):
        CandidateFile(str(tmp_path / "a.npy")).corrupt([0, 1, 0], 2)


def test_invalid_candidate_files_raise(tmp_path):
    np.savez(tmp_path / "c.npz", mine=np.eye(3), other=np.eye(3))
    for key in (None, "third"):
        with pytest.raises(ValueError, match=rf"key={key!r} is not in .* which holds mine, other"):
            CandidateFile(str(tmp_path / "c.npz"), key).corrupt([0, 1, 0], 2)
    for text, message in (
        ("label,sure\n1,0\n", "does not say which sample its lines are for: add the column item"),
        (
            "path,label\na.png,1\n",
            "does not say which sample its lines are for: add the column item, because",
        ),
        ("item,given_by\n0,1\n", "must have the column label, got item, given_by: add it"),
        ("index,label\n0,1\n,0\n", "the column index of .* is empty in 1 lines with a label, such as '0': fill it in"),
        ("index,label\n0,1\n7,0\n", "must be from 0 to 2, got 7"),
        ("index,label\n0,1\nx,0\n", "must hold whole numbers"),
        ("index,label\n0,2\n", "must be between 0 and 1, got 2"),
    ):
        (tmp_path / "d.csv").write_text(text)
        with pytest.raises(ValueError, match=message):
            CandidateFile(str(tmp_path / "d.csv")).corrupt([0, 1, 0], 2)
    with pytest.raises(ValueError, match=r"^path must end in"):
        CandidateFile("a.txt")


def test_invalid_arguments_and_combinations_raise():
    for make in (lambda: UniformCandidates(1.0), lambda: UniformCandidates(-0.1), lambda: PairwiseCandidates(1.1)):
        with pytest.raises(ValueError, match=r"^q must be at least 0 and"):
            make()
    with pytest.raises(ValueError, match=r"^ensure_ambiguous and reject_full exclude each other with 2 classes"):
        candidates_of(UniformCandidates(0.5, True, True), np.zeros(4, np.int64), 2)
    with pytest.raises(ValueError, match=r"^noise and candidates exclude each other"):
        DigitsDataModule(noise=SymmetricNoise(0.2), candidates=UniformCandidates(0.2))
    with pytest.raises(ValueError, match=r"^noise and meta_per_class exclude each other"):
        DigitsDataModule(noise=SymmetricNoise(0.2), meta_per_class=2)
    with pytest.raises(ValueError, match=r"^meta_per_class must be at least 1, got 0"):
        DigitsDataModule(meta_per_class=0)
    with pytest.raises(ValueError, match=r"^candidates is for one class per sample, the data has"):
        ArrayDataModule("none.npz", fake=True, kind="multi_label", candidates=UniformCandidates(0.2))
    with pytest.raises(ValueError, match=r"^candidates is for several labels per sample, the data has"):
        ArrayDataModule("none.npz", fake=True, candidates=CandidateLabels(0.2))
    with pytest.raises(ValueError, match=r"^the source of a pool may have no candidates"):
        OpenSetDataModule(DigitsDataModule(candidates=UniformCandidates(0.2)), known_classes=4)
    with pytest.raises(ValueError, match=r"^source may have no candidates"):
        MosaicDataModule(DigitsDataModule(candidates=UniformCandidates(0.2)))


def test_data_module_gives_candidates_and_holds_out_a_meta_set():
    data = DigitsDataModule(candidates=UniformCandidates(0.3), meta_per_class=3, val_fraction=0.2)
    plain = DigitsDataModule(val_fraction=0.2)
    data.setup()
    plain.setup()
    assert torch.equal(data.train_target, plain.train_target)
    assert np.array_equal(data.val_indices, plain.val_indices)
    assert np.array_equal(np.union1d(data.train_indices, data.meta_indices), plain.train_indices)
    assert len(np.intersect1d(data.train_indices, data.meta_indices)) == 0
    assert np.bincount(data.train_target[data.meta_indices]).tolist() == [3] * 10
    expected = UniformCandidates(0.3).corrupt(data.train_target, 10)
    assert np.array_equal(data.train_candidates.numpy(), expected)
    batch = next(iter(data.loader("train", shuffle=True)))
    assert torch.equal(batch.extras["candidates"], data.train_candidates[batch.index])
    assert batch.extras["candidates"].shape == (64, 10)
    assert "candidates" in next(iter(data.loader("val"))).extras
    assert next(iter(data.loader("test"))).extras == {}
    other = DigitsDataModule(meta_per_class=3, val_fraction=0.2, seed=1)
    other.setup()
    assert other.train_candidates is None
    assert not np.array_equal(other.meta_indices, data.meta_indices)


def test_single_label_arrays_take_candidates_and_a_meta_set():
    data = ArrayDataModule("none.npz", fake=True, candidates=PairwiseCandidates(0.5), meta_per_class=1)
    data.setup()
    assert data.train_candidates.sum(1).float().mean() == pytest.approx(1.5, abs=0.1)
    assert len(data.meta_indices) == 10


def test_meta_from_single_takes_only_samples_with_one_candidate(tmp_path, caplog):
    plain = DigitsDataModule()
    plain.setup()
    given = UniformCandidates(0.15).corrupt(plain.train_target, 10)
    given[plain.train_target == 4, 5] = 1
    np.save(tmp_path / "a.npy", given)
    candidates = CandidateFile(str(tmp_path / "a.npy"), meta_from_single=True)
    data = DigitsDataModule(candidates=candidates, meta_per_class=3)
    trainer_of(tmp_path / "run", max_epochs=1).fit(Classification("mlp_8", 10, input_shape=(1, 8, 8)), data)
    assert bool((data.train_candidates[data.meta_indices].sum(1) == 1).all())
    assert np.bincount(data.train_target[data.meta_indices], minlength=10).tolist() == [3] * 4 + [0] + [3] * 5
    assert "meta set: 27 samples held out with their true labels; none of 4" in caplog.text
    assert "labels per training sample" in caplog.text


def trainer_of(folder, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "logger": False}
    return L.Trainer(callbacks=run_callbacks(RunFolder(folder)), default_root_dir=folder, **quiet, **options)


def test_candidates_are_recorded_reused_on_resume_and_checked(tmp_path, monkeypatch):
    def task():
        return Classification("mlp_8", 10, input_shape=(1, 8, 8))

    data = DigitsDataModule(candidates=UniformCandidates(0.3), fake=True, meta_per_class=2)
    trainer_of(tmp_path, max_epochs=1).fit(task(), data)
    record = np.load(tmp_path / "noise.npz")
    given = record["given"]
    assert np.array_equal(given, data.train_candidates.numpy())
    assert str(record["sha256"]) == hashlib.sha256(given.astype("<i8").tobytes()).hexdigest()
    assert "UniformCandidates(q=0.3" in str(record["generator"])
    last = tmp_path / "checkpoints/last.ckpt"

    def fail_if_drawn(*args):
        raise AssertionError("drawn again")

    with monkeypatch.context() as patch:
        patch.setattr(UniformCandidates, "draw", fail_if_drawn)
        again = DigitsDataModule(candidates=UniformCandidates(0.3), fake=True, meta_per_class=2)
        trainer_of(tmp_path, max_epochs=2).fit(task(), again, ckpt_path=last, weights_only=True)
    assert torch.equal(again.train_candidates, data.train_candidates)
    assert np.array_equal(again.meta_indices, data.meta_indices)
    for other, message in (
        ({"candidates": UniformCandidates(0.5), "meta_per_class": 2}, "belongs to the checkpoint in that folder"),
        ({"meta_per_class": 2}, "would train on clean labels"),
        ({"candidates": UniformCandidates(0.3), "meta_per_class": 3}, "trained on other data"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer_of(tmp_path, max_epochs=3).fit(
                task(), DigitsDataModule(**other, fake=True), ckpt_path=last, weights_only=True
            )
    with pytest.raises(ValueError, match=r"trained on other labels than those of candidates=Uniform"):
        trainer_of(tmp_path / "b", max_epochs=3).fit(
            task(),
            DigitsDataModule(candidates=UniformCandidates(0.5), fake=True, meta_per_class=2),
            ckpt_path=last,
            weights_only=True,
        )


def mat_file(path, count=40, classes=4, **changes):
    draw = np.random.default_rng(0)
    target = np.arange(count) % classes
    true = np.eye(classes)[target].T
    partial = np.maximum(true, draw.random((classes, count)) < 0.3)
    arrays = {"data": draw.normal(3, 2, (count, 5)), "partial_target": csc_matrix(partial), "target": csc_matrix(true)}
    savemat(path, {**arrays, **changes})
    return partial.T, target


def test_mat_file_gives_folds_candidates_and_standardised_features(tmp_path):
    partial, target = mat_file(tmp_path / "lost.mat")
    seen = []
    for fold in range(10):
        data = PartialLabelDataModule(str(tmp_path / "lost.mat"), fold=fold, meta_per_class=2)
        data.setup()
        assert (data.num_classes, data.input_shape) == (4, (5,))
        assert len(data.test_target) == 4
        assert len(data.train_indices) == 36 - 8
        seen += data.test_target.tolist()
        assert bool(data.train_candidates[range(36), data.train_target].all())
    assert sorted(seen) == sorted(target.tolist())
    assert (
        data.train_candidates.sum() + partial[np.setdiff1d(range(40), rows_of(data, tmp_path))].sum() == partial.sum()
    )
    batch = next(iter(data.loader("train", batch_size=100)))
    assert batch.extras["candidates"].shape == (28, 4)
    everyone = next(iter(data.loader("train", np.arange(36)))).image
    torch.testing.assert_close(everyone.mean(0), torch.zeros(5), rtol=0, atol=1e-5)
    torch.testing.assert_close(everyone.std(0, correction=0), torch.ones(5))
    assert data.train_target.tolist() == target[rows_of(data, tmp_path)].tolist()


def rows_of(data, folder):
    """The rows of the file that are the training samples."""
    from scipy.io import loadmat

    feature = torch.from_numpy(loadmat(folder / "lost.mat")["data"]).float()
    return [int((feature == sample).all(1).nonzero()) for sample in data.train_image]


def test_invalid_mat_files_raise(tmp_path):
    path = tmp_path / "a.mat"
    with pytest.raises(FileNotFoundError, match=r"^path '.*' does not exist: give the path of a \.mat file"):
        PartialLabelDataModule(str(path))
    assert PartialLabelDataModule(str(path), fake=True).num_classes == 5
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"is damaged, or not a \.mat file"):
        PartialLabelDataModule(str(path))
    for change, message in (
        ({"target": np.eye(4)}, r"must both be \[K, 40\], a column for each sample, got \[4, 40\] and \[4, 4\]"),
        ({"target": np.ones((4, 40))}, r"target .* must name one class for each sample, got 4 for sample 0"),
        ({"partial_target": np.zeros((4, 40))}, r"partial_target .* got no candidate for sample 0"),
        ({"data": np.full((40, 5), np.nan)}, r"data .* must be finite"),
    ):
        mat_file(path, **change)
        with pytest.raises(ValueError, match=message):
            PartialLabelDataModule(str(path))
    savemat(path, {"data": np.zeros((3, 2))})
    with pytest.raises(ValueError, match=r"lacks partial_target, target, it holds data"):
        PartialLabelDataModule(str(path))
    with pytest.raises(ValueError, match=r"^fold must be at least 0 and below 10, got 10"):
        PartialLabelDataModule(str(path), fold=10)


def test_balance_with_candidates_raises():
    with pytest.raises(ValueError, match=r"^balance needs the true classes, which are unknown"):
        DigitsDataModule(candidates=UniformCandidates(0.3), balance=True)


def test_task_that_ignores_candidates_prints_a_note(capsys):
    def prints_note(method, **options):
        data = DigitsDataModule(fake=True, candidates=UniformCandidates(0.3))
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = L.Trainer(fast_dev_run=True, accelerator="cpu", **quiet)
        trainer.fit(method("mlp_16", 10, input_shape=(1, 8, 8), **options), datamodule=data)
        return "is not a method for candidates: unless it reads" in capsys.readouterr().err

    assert prints_note(Classification)
    assert not prints_note(CandidateBaseline)
