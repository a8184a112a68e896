"""Weak labels of multi-label images: what is drawn, its record in the run folder, and which labels stay clean."""

import lightning as L
import numpy as np
import pytest
import torch

from lightning_kd.core import MultiLabelClassification
from lightning_kd.core.run_callbacks import run_callbacks
from lightning_kd.core.run_folder import RunFolder
from lightning_kd.data import ArrayDataModule, CandidateLabels, DigitsDataModule, MosaicDataModule, SinglePositive
from lightning_kd.data.weak_labels import labelled_split
from tests.two_processes import on_two_ranks


def mosaics(**options):
    source = DigitsDataModule(fake=True, val_fraction=0.2)
    return MosaicDataModule(source, train_mosaics=400, val_mosaics=50, test_mosaics=50, batch_size=32, **options)


def test_labelled_split_equals_that_of_the_papers():
    labelled, others = labelled_split(5717, 0.05, seed=1)
    assert len(labelled) == 285
    assert labelled[:5].tolist() == [3343, 3639, 1412, 1528, 3906]
    assert sorted([*labelled, *others]) == list(range(5717))
    with pytest.raises(ValueError, match=r"labelled_fraction=0\.05 of 19 images leaves no labelled image"):
        labelled_split(19, 0.05)


def test_candidates_add_false_labels_to_training_samples_only():
    data, clean = mosaics(candidates=CandidateLabels(0.3)), mosaics()
    data.setup(), clean.setup()
    assert torch.equal(data.train_clean, clean.train_target)
    assert (data.train_target >= data.train_clean).all()
    zeros = data.train_clean == 0
    rate = float(data.train_target[zeros].mean())
    assert abs(rate - 0.3) < 3 * (0.21 / int(zeros.sum())) ** 0.5
    assert torch.equal(data.val_target, clean.val_target)
    assert torch.equal(data.test_target, clean.test_target)
    assert data.train_target.dtype == torch.float32
    batch = next(iter(data.train_dataloader()))
    assert torch.equal(batch.extras["clean_target"], data.train_clean[batch.index])
    again, other = mosaics(candidates=CandidateLabels(0.3), seed=9), mosaics(candidates=CandidateLabels(0.3, seed=2))
    again.setup(), other.setup()
    assert torch.equal(again.train_target, data.train_target)
    assert not torch.equal(other.train_target, data.train_target)


@pytest.mark.parametrize(("others", "value"), [("unknown", -1), ("negative", 0)])
def test_single_positive_keeps_one_label_per_image(others, value):
    data = mosaics(single_positive=SinglePositive(others))
    data.setup()
    assert ((data.train_target == 1).sum(1) == 1).all()
    assert (data.train_clean[data.train_target == 1] == 1).all()
    assert set(data.train_target.unique().tolist()) == {1.0, value}
    # each of an image's labels is kept equally often
    several = data.train_clean.sum(1) == 2
    first = data.train_clean[several].argmax(1) == data.train_target[several].argmax(1)
    assert 0.35 < float(first.float().mean()) < 0.65


def test_labelled_fraction_hides_the_labels_of_the_others():
    data, clean = mosaics(labelled_fraction=0.1), mosaics()
    data.setup(), clean.setup()
    expected = np.sort(np.random.RandomState(1).permutation(400)[:40])
    assert data.train_indices.tolist() == expected.tolist()
    assert data.train_size == 40
    assert sorted([*data.train_indices, *data.unlabelled_indices]) == list(range(400))
    assert (data.train_target[data.unlabelled_indices] == -1).all()
    assert torch.equal(data.train_target[data.train_indices], clean.train_target[data.train_indices])
    seen = torch.cat([batch.index for batch in data.loader("train", data.unlabelled_indices)])
    assert len(seen) == 360


def test_labelled_fraction_and_candidates_go_together():
    data = mosaics(labelled_fraction=0.1, candidates=CandidateLabels(0.5))
    data.setup()
    whole = mosaics(candidates=CandidateLabels(0.5))
    whole.setup()
    assert torch.equal(data.train_target[data.train_indices], whole.train_target[data.train_indices])


def test_validation_samples_of_the_training_array_stay_clean(tmp_path):
    target = np.random.default_rng(0).choice([0, 1, 255], (200, 4), p=[0.6, 0.3, 0.1]).astype(np.uint8)
    image = np.random.default_rng(1).integers(0, 256, (200, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", train_image=image, train_target=target)
    path = str(tmp_path / "a.npz")
    data = ArrayDataModule(path, val_fraction=0.3, candidates=CandidateLabels(0.9), normalize=False)
    data.setup()
    val, train = data.val_indices, data.train_indices
    assert torch.equal(data.train_target[val], data.train_clean[val])
    assert (data.train_target[train] != data.train_clean[train]).float().mean() > 0.3
    assert ((data.train_target == -1) == (data.train_clean == -1)).all()  # unknown labels stay unknown
    assert (data.mean, data.std) == ([0.0] * 3, [1.0] * 3)


def test_invalid_options_raise(tmp_path):
    np.savez(tmp_path / "a.npz", image=np.zeros((40, 8, 8), np.uint8), target=np.arange(40) % 2)
    with pytest.raises(ValueError, match="candidates is for several labels per sample, the data has one class"):
        ArrayDataModule(str(tmp_path / "a.npz"), candidates=CandidateLabels(0.1))
    with pytest.raises(ValueError, match="candidates and single_positive exclude each other"):
        mosaics(candidates=CandidateLabels(0.1), single_positive=SinglePositive())
    with pytest.raises(ValueError, match="labelled_fraction must be above 0 and at most 1, got 0"):
        mosaics(labelled_fraction=0)
    with pytest.raises(ValueError, match="rate must be at least 0 and below 1, got 1"):
        CandidateLabels(1.0)
    with pytest.raises(ValueError, match="others must be 'unknown' or 'negative'"):
        SinglePositive("zero")


def fit(data, folder, epochs=1, ckpt_path=None, **options):
    task = MultiLabelClassification("cnn_tiny", data.num_classes, input_shape=data.input_shape)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=epochs, **options, callbacks=run_callbacks(RunFolder(folder), "val/map"),
        logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(task, data, ckpt_path=ckpt_path, weights_only=False)
    return trainer


def test_drawn_labels_are_recorded_reused_on_resume_and_checked(tmp_path):
    options = {"candidates": CandidateLabels(0.2), "labelled_fraction": 0.5}
    data = mosaics(**options)
    fit(data, tmp_path)
    record = np.load(tmp_path / "noise.npz")
    assert np.array_equal(record["given"], data.train_target.numpy())
    assert len(str(record["sha256"])) == 64
    again = mosaics(**options)
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    assert fit(again, tmp_path, epochs=2, ckpt_path=last).current_epoch == 2
    assert torch.equal(again.train_target, data.train_target)
    for other in ({"candidates": CandidateLabels(0.3), "labelled_fraction": 0.5}, {**options, "labelled_seed": 2}, {}):
        with pytest.raises(ValueError, match=r"belongs to the checkpoint|would train on clean labels"):
            fit(mosaics(**other), tmp_path, epochs=3, ckpt_path=last)


def _labels_of_a_rank(folder):
    data = mosaics(candidates=CandidateLabels(0.2), labelled_fraction=0.5)
    fit(data, folder, strategy="ddp", devices=2)
    return data.train_target.tolist(), data.train_indices.tolist(), data.unlabelled_indices.tolist()


def test_two_processes_train_on_the_same_labels(tmp_path):
    one, two = on_two_ranks(_labels_of_a_rank, str(tmp_path / "run"))
    assert one == two
    assert np.array_equal(np.load(tmp_path / "run" / "noise.npz")["given"], np.array(one[0]))
    alone = mosaics(candidates=CandidateLabels(0.2), labelled_fraction=0.5)
    alone.setup()
    assert alone.train_target.tolist() == one[0]
