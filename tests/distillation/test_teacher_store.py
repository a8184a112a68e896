"""Teacher stores: trainings that read a teacher's logits from a file equal those that run the teacher, or raise."""

import json
import os
import shutil
import signal
import warnings
from collections import namedtuple
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

from lightning_kd.cli.teach_command import teach
from lightning_kd.core import Classification
from lightning_kd.core.run_callbacks import run_callbacks
from lightning_kd.core.run_folder import RunFolder
from lightning_kd.core.view_keys import ViewKeys
from lightning_kd.data import DigitsDataModule, SymmetricNoise
from lightning_kd.distillation import (
    DHKD,
    DKD,
    KD,
    L2D,
    MEALV2,
    SSLD,
    Distillation,
    TeacherStore,
    store_filling,
    teach_store,
)
from lightning_kd.distillation.distillation_task import FrozenTeacher
from tests.distillation.noting_kd import NotingKD
from tests.forked import run_forked
from tests.two_processes import on_two_ranks

SHAPE = (1, 8, 8)
METHODS = {
    "kd": KD,
    "dkd": DKD,
    "dhkd": DHKD,
    "dhkd_aligned": lambda *a, **k: DHKD(*a, gradient_alignment="shared", **k),
}


def trainer(**options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return L.Trainer(**{**quiet, "enable_model_summary": False, "max_epochs": 2, "num_sanity_val_steps": 0, **options})


def digits(**options):
    return DigitsDataModule(**{"fake": True, "batch_size": 32, "augment": True, **options})


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Path to the weights of a teacher whose batch norm statistics differ from the initial ones."""
    torch.manual_seed(7)
    network = Classification("cnn", 10, input_shape=SHAPE).network
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(64, *SHAPE))
    path = tmp_path_factory.mktemp("teacher") / "network.pt"
    torch.save(network.state_dict(), path)
    return str(path)


def task(method="kd", weights=None, **options):
    torch.manual_seed(3)
    return METHODS[method]("cnn_tiny", "cnn", 10, input_shape=SHAPE, teacher_weights=weights, **options)


def taught(path, weights, data=None, **options):
    model, data = task(weights=weights), data or digits()
    run = trainer()
    run.validate(model, data, verbose=False)
    return teach_store(model, data, path, **{"dtype": "float32", "reached": {"acc": 0.625}, **options})


@pytest.fixture(scope="module")
def store(tmp_path_factory, weights):
    path = tmp_path_factory.mktemp("store") / "cnn.store"
    taught(path, weights)
    return str(path)


class Losses(L.Callback):
    def __init__(self):
        self.found = []

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch:  # the metrics of the epoch before
            self.on_fit_end(trainer, pl_module)

    def on_fit_end(self, trainer, pl_module):
        self.found.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/loss")})


def fitted(model, data=None, **options):
    losses = Losses()
    run = trainer(**{"callbacks": [losses], **options})
    run.fit(model, data or digits())
    return model, losses.found, run


@pytest.mark.parametrize("method", METHODS)
def test_training_with_the_store_equals_training_with_the_teacher(method, store, weights, monkeypatch):
    live, expected, beside = fitted(task(method, weights))
    monkeypatch.setattr(FrozenTeacher, "__init__", lambda *_: pytest.fail("the teacher was built"))
    model, found, run = fitted(task(method, "no such file", teacher_store=store))
    assert len(found) == 2
    for one, two in zip(expected, found, strict=True):
        assert one.keys() == two.keys() >= {"train/loss", "train/loss_ce", "train/loss_kd"}
        for name, value in one.items():
            assert two[name] == pytest.approx(value, rel=1e-5), name
    for one, two in zip(live.student.parameters(), model.student.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    assert float(run.callback_metrics["val/acc"]) == pytest.approx(float(beside.callback_metrics["val/acc"]), abs=0.021)


def copy_of(store, path, **changed):
    """A copy of a store with other values in its header."""
    shutil.copy(store, path)
    header = json.loads(Path(f"{store}.json").read_text())
    Path(f"{path}.json").write_text(json.dumps(header | changed))
    return str(path)


@pytest.mark.parametrize(("reached", "warned"), [(0.625, 0), (0.125, 1)])
def test_teacher_accuracy_in_the_store_is_logged_and_warned_of_once(reached, warned, store, tmp_path):
    path = copy_of(store, tmp_path / "a.store", reached={"acc": reached})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = NotingKD("cnn_tiny", "cnn", 10, input_shape=SHAPE, teacher_store=path)
        *_, run = fitted(model, max_epochs=3, limit_train_batches=1)
    assert model.teacher_acc == [(0, reached)]
    assert float(run.callback_metrics["val/teacher_acc"]) == reached
    said = [str(one.message) for one in caught if "the teacher's validation accuracy is" in str(one.message)]
    assert len(said) == warned
    assert all("accuracy is 12.5%, chance is 10.0%" in one for one in said)


@pytest.mark.parametrize("views", ["all", "plain", "5"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_store_holds_the_teachers_logits_of_each_view(views, dtype, tmp_path, weights):
    data = digits(augment=views != "plain")
    header = taught(tmp_path / "a.store", weights, data, views=views, dtype=dtype)
    found, model = TeacherStore(tmp_path / "a.store"), task(weights=weights)
    assert header["keys"] == {"all": 9, "plain": 1, "5": 5}[views]
    loader = data.loader("train", shuffle=True, augment=True, view_keys=found.view_keys)
    for batch in loader:
        logits = found.logits(batch.index, batch.extras["view"])
        assert logits.dtype == torch.float32
        tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == "float32" else {"atol": 1e-3, "rtol": 1e-3}
        torch.testing.assert_close(logits, model.teacher_logits(batch.image), **tolerance)
    size = len(data.train_indices) * header["keys"] * 10 * (2 if dtype == "float16" else 4)
    assert size < os.path.getsize(tmp_path / "a.store") < size + 200


@pytest.mark.parametrize("kind", ["hard", "smoothing", "marginal_smoothing_k3", "marginal_renorm_k3"])
def test_compressed_store_gives_the_compressed_probabilities(kind, tmp_path, weights):
    data = digits()
    taught(tmp_path / "a.store", weights, data, compress=kind, temperature=2.0)
    found, model = TeacherStore(tmp_path / "a.store"), task(weights=weights)
    batch = next(iter(data.loader("train", shuffle=True, augment=True, view_keys=ViewKeys())))
    p = (model.teacher_logits(batch.image) / 2).softmax(1)
    got = found.probabilities(batch.index, batch.extras["view"])
    logits = found.logits(batch.index, batch.extras["view"])
    assert logits.isfinite().all()
    torch.testing.assert_close((logits / 2).softmax(1), got)  # logits that give these probabilities
    torch.testing.assert_close(got.sum(1), torch.ones(len(got)))
    top = p.topk(3)
    if kind == "marginal_smoothing_k3":
        torch.testing.assert_close(got.gather(1, top.indices), top.values)
    if kind == "marginal_renorm_k3":
        torch.testing.assert_close(got.gather(1, top.indices), top.values / top.values.sum(1, keepdim=True))
    assert torch.equal(got.argmax(1), p.argmax(1))
    fitted(task("dkd", teacher_store=str(tmp_path / "a.store")), max_epochs=1)


def test_resumes_with_the_store_to_the_bit(tmp_path, store):
    def run(folder, epochs, ckpt_path=None):
        model = task("dhkd", teacher_store=store)
        callbacks = run_callbacks(RunFolder(folder))
        fitter = trainer(max_epochs=epochs, enable_checkpointing=True, callbacks=callbacks)
        fitter.fit(model, digits(), ckpt_path=ckpt_path, weights_only=True)
        return model, fitter

    whole, undisturbed = run(tmp_path / "whole", 3)
    _, first = run(tmp_path / "parts", 1)
    resumed, fitter = run(tmp_path / "parts", 3, tmp_path / "parts/checkpoints/last.ckpt")
    assert fitter.global_step == undisturbed.global_step == 3 * first.global_step > 0
    assert "val/teacher_acc" not in fitter.callback_metrics  # logged before the run was stopped
    for one, two in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)


def test_checkpoint_loads_and_tests_without_the_store_but_does_not_train(tmp_path, store):
    model = task("kd", teacher_store=store)
    run = trainer(max_epochs=1, enable_checkpointing=True, callbacks=run_callbacks(RunFolder(tmp_path)))
    run.fit(model, digits())
    path = tmp_path / "checkpoints/last.ckpt"
    again = KD.load_from_checkpoint(path, teacher_store="gone.store")
    trainer().test(again, digits(), verbose=False)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    with pytest.raises(FileNotFoundError, match=r"teacher_store 'gone.store': there is no gone.store.json"):
        trainer().fit(again, digits())


def other_teacher(path):
    torch.save(Classification("cnn", 10, input_shape=SHAPE).network.state_dict(), path)
    return str(path)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ({"augment": False}, {}, "views.padding was 1, here it is 0"),
        ({"mean": [0.5]}, {}, r"data.mean was \[0.305\], here it is \[0.5\]"),
        ({"seed": 3}, {}, r"it lacks \d+ of the \d+ training samples"),
        ({"fake": False}, {}, "data.count was"),
        ({}, {"teacher_weights": "other"}, "the weights differ"),
        ({}, {"teacher_weights": "random"}, "teacher.weights was .*network.pt', here it is 'random'"),
        ({}, {"teacher": "resnet8"}, "teacher.name was 'cnn', here it is 'resnet8'"),
        ({}, {"teacher_size": 16}, "teacher.size was None, here it is"),
        ({}, {"teacher_mean": [0.1], "teacher_std": [0.2]}, "teacher.mean was None"),
        ({"cutout": 3}, {}, "keys need a single view by crop and flip.*cutout=3"),
    ],
)
def test_store_of_other_data_or_teacher_raises_before_training(data, options, message, store, tmp_path, monkeypatch):
    monkeypatch.setattr(KD, "training_step", lambda *_: pytest.fail("it trained"))
    if options.get("teacher_weights") == "other":
        options = {"teacher_weights": other_teacher(tmp_path / "other.pt")}
    options = {"teacher": "cnn", **options}
    model = KD("cnn_tiny", options.pop("teacher"), 10, input_shape=SHAPE, teacher_store=store, **options)
    with pytest.raises(ValueError, match=message):
        trainer().fit(model, digits(**data))


def test_list_of_one_teacher_fits_the_store_of_a_single_teacher(store, weights, tmp_path):
    model = SSLD("cnn_tiny", ["cnn"], 10, input_shape=SHAPE, teacher_weights=[weights], teacher_store=store)
    fitted(model, max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    before, keys = TeacherStore(store).header["teacher"], ("name", "weights", "mean", "std", "size", "weights_sha256")
    listed = before | {key: [before[key]] for key in keys}  # as older versions wrote it
    assert TeacherStore(copy_of(store, tmp_path / "listed.store", teacher=listed)).header["teacher"] == before


@pytest.mark.parametrize("changed", ["order", "one pixel"])
def test_other_images_of_the_same_shape_raise(changed, store):
    data = digits()
    data.setup()
    if changed == "order":
        data.train_image = data.train_image.flip(0)
    else:
        data.train_image = data.train_image.clone()
        data.train_image[-1, 0, 3, 4] ^= 1
    with pytest.raises(ValueError, match="does not fit, the images differ: train with what it was made of"):
        trainer().fit(task("kd", teacher_store=store), data)


def test_store_serves_a_subset_or_other_labels_and_a_store_of_all_samples_any_split(tmp_path, weights, store):
    path = tmp_path / "all.store"
    taught(path, weights, samples="all")
    for file, options in (
        (store, {"train_fraction": 0.5}),
        (str(path), {"noise": SymmetricNoise(0.5)}),
        (str(path), {"seed": 3}),
    ):
        _, expected, _ = fitted(task("kd", weights), digits(**options), max_epochs=1)
        _, found, _ = fitted(task("kd", teacher_store=file), digits(**options), max_epochs=1)
        assert found[0] == pytest.approx(expected[0], rel=1e-5)
        assert expected[0]["train/loss_kd"] > 0


def test_batches_without_view_keys_raise(store):
    loader = torch.utils.data.DataLoader([(torch.zeros(SHAPE), 0)] * 4, 2)
    with pytest.raises(ValueError, match="is for a data module of this package whose batches tell their views"):
        trainer().fit(task("kd", teacher_store=store), loader)

    class Own(KD):
        def train_loader(self, data):
            return data.loader("train", shuffle=True, augment=True)

    with pytest.raises(ValueError, match="teacher_store needs batches that tell their views"):
        trainer().fit(Own("cnn_tiny", "cnn", 10, input_shape=SHAPE, teacher_store=store), digits())


class Features(Distillation):
    """Reads the teacher's features if the argument says so."""

    def __init__(self, *args, features, **kwargs):
        super().__init__(*args, **kwargs)
        self.tapped = [self.teacher.network] if features else []

    def distillation_loss(self, student_logits, teacher_logits, target):
        return (student_logits - teacher_logits).square().mean()


def test_methods_that_read_teacher_features_raise_with_a_store(store, weights):
    with pytest.raises(
        ValueError, match=r"L2D looks into the teacher, of which a teacher_store holds the logits alone"
    ):
        L2D("cnn_tiny", "cnn", 10, input_shape=SHAPE, teacher_store=store)
    own = {"input_shape": SHAPE, "teacher_store": store}
    with pytest.raises(ValueError, match="Features looks into the teacher"):
        Features("cnn_tiny", "cnn", 10, features=True, **own)
    fitted(Features("cnn_tiny", "cnn", 10, features=False, **own), max_epochs=1)
    with pytest.raises(ValueError, match="teach asks the teacher itself"):
        teach_store(task("kd", teacher_store=store), digits(), "a.store")
    with pytest.raises(ValueError, match="teach needs a distillation, whose teacher it asks, got Classification"):
        teach_store(Classification("cnn", 10, input_shape=SHAPE), digits(), "a.store")


# -- files -----------------------------------------------------------------------------------------------------------


class KillingTeacher(nn.Module):
    """A teacher that kills its process at call number ``at``."""

    def __init__(self, at=-1, gate=None):
        super().__init__()
        self.flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        with torch.no_grad():
            self.flat[1].weight.copy_(torch.arange(640).view(10, 64) / 640)
            self.flat[1].bias.zero_()
        self.calls, self.at = 0, at

    def forward(self, image):
        self.calls += 1
        if self.calls == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.flat(image)


def fill(path, at=-1, first=0.0, report=None):
    data = digits()
    data.setup()
    teacher = KillingTeacher(at)
    model = KD("cnn_tiny", teacher, 10, input_shape=SHAPE)
    model.trainer = trainer()
    seen = []
    teach_store(model, data, path, batch_size=64, first=first, progress=lambda done, total: seen.append((done, total)))
    if report is not None:
        report.write_text(json.dumps([teacher.calls, seen]))
    return teacher.calls, seen


def test_killed_teach_store_goes_on_with_the_missing_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_kd.distillation.teaching.ROWS_OF_PIECE", 90)
    calls, seen = fill(tmp_path / "whole.store")
    pieces = seen[-1][1]
    assert pieces > 5
    assert calls == 2 * pieces  # a piece has 90 views, a batch 64
    assert [done for done, _ in seen] == [*range(1, pieces + 1), pieces]
    with monkeypatch.context() as patch:
        patch.setattr(KillingTeacher, "forward", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fill(tmp_path / "parts.store")
    killed = run_forked(_fill_small, tmp_path / "parts.store", 8, folder=tmp_path)
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(ValueError, match=rf"is not finished, {pieces - 3} of {pieces} pieces are missing: run"):
        TeacherStore(tmp_path / "parts.store")
    calls, seen = fill(tmp_path / "parts.store")
    assert calls == 2 * (pieces - 3)
    assert (tmp_path / "parts.store").read_bytes() == (tmp_path / "whole.store").read_bytes()
    assert fill(tmp_path / "parts.store")[0] == 0  # there is nothing left to do


def _fill_small(path, at=-1, first=0.0, report=None):
    from lightning_kd.distillation import teaching

    teaching.ROWS_OF_PIECE = 90
    fill(path, at, first, report)


def test_two_processes_share_the_pieces_of_a_store(tmp_path, monkeypatch):
    from tests.forked import CONTEXT

    monkeypatch.setattr("lightning_kd.distillation.teaching.ROWS_OF_PIECE", 90)
    calls, _ = fill(tmp_path / "alone.store")
    reports = [tmp_path / f"{k}.json" for k in range(2)]
    children = [
        CONTEXT.Process(target=_fill_small, args=(tmp_path / "both.store", -1, k / 2, reports[k])) for k in range(2)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    counts = [json.loads(report.read_text())[0] for report in reports]
    assert sum(counts) == calls  # none is made twice
    assert (tmp_path / "both.store").read_bytes() == (tmp_path / "alone.store").read_bytes()


def test_teach_store_waits_for_a_piece_that_another_process_holds(tmp_path, monkeypatch):
    """A lock does not block the process that holds it, so a child process holds the piece."""
    monkeypatch.setattr("lightning_kd.distillation.teaching.ROWS_OF_PIECE", 90)
    monkeypatch.setattr(store_filling, "PAUSE", 0.01)
    calls, _ = fill(tmp_path / "alone.store")
    header = json.loads((tmp_path / "alone.store.json").read_text())
    path = tmp_path / "held.store"
    store_filling.begin_store(path, header)
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        writer = store_filling._Writer(path, store_filling.StoreLayout(header))
        with writer.claimed(2):
            os.write(ready[1], b"1")
            os.read(go[0], 1)
            os._exit(0)  # ends without writing the piece
    os.read(ready[0], 1)
    monkeypatch.setattr(store_filling.time, "sleep", lambda _: os.write(go[1], b"1"))
    assert fill(path)[0] == calls
    os.waitpid(child, 0)
    assert path.read_bytes() == (tmp_path / "alone.store").read_bytes()


def test_existing_store_of_other_content_raises_and_is_not_overwritten(tmp_path, weights, store):
    path = tmp_path / "a.store"
    taught(path, weights)
    before = path.read_bytes()
    for options, what in (
        ({"dtype": "float16"}, "dtype was 'float32', here it is 'float16'"),
        ({"views": "plain"}, "keys was 9, here it is 1"),
        ({"weights": other_teacher(tmp_path / "other.pt")}, "the weights differ"),
    ):
        with pytest.raises(FileExistsError, match=f"holds other answers, {what}.*delete them with --restart true"):
            taught(path, **{"weights": weights, **options})
    assert path.read_bytes() == before
    shutil.copy(weights, tmp_path / "same.pt")
    taught(path, str(tmp_path / "same.pt"))  # a copy of the same weights
    assert path.read_bytes() == before
    taught(path, weights, views="plain", restart=True)
    assert TeacherStore(path).header["keys"] == 1
    (tmp_path / "mine.store").write_text("somebody's")
    with pytest.raises(FileExistsError, match="needs a folder where there is a file: name another file with --out"):
        taught(tmp_path / "mine.store" / "a.store", weights)
    with pytest.raises(FileExistsError, match="exists and is no teacher store"):
        taught(tmp_path / "mine.store", weights)


def test_full_disk_raises_before_anything_is_written(tmp_path, weights, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 1000))
    with pytest.raises(OSError, match=r"takes 0.00 GB, and its disk has 0.00 GB left: make room, .*--dtype float16"):
        taught(tmp_path / "a.store", weights)
    assert not list(tmp_path.iterdir())


def test_missing_damaged_and_unfinished_files_raise(tmp_path, store):
    path = tmp_path / "a.store"
    shutil.copy(store, path)
    with pytest.raises(FileNotFoundError, match=r"there is no .*a.store.json"):
        TeacherStore(path)
    shutil.copy(f"{store}.json", f"{path}.json")
    TeacherStore(path)
    with path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"a.store is damaged, it has \d+ bytes of \d+"):
        TeacherStore(path)
    path.unlink()
    with pytest.raises(ValueError, match="is not finished"):
        TeacherStore(path)
    (tmp_path / "a.store.json").write_text('{"format": 2, "keys"')
    with pytest.raises(ValueError, match=r"a.store.json is damaged"):
        TeacherStore(path)
    (tmp_path / "a.store.json").write_text('{"format": 9}')
    with pytest.raises(ValueError, match="is of format 9, this version reads 2"):
        TeacherStore(path)


def test_logits_too_large_for_float16_raise(tmp_path):
    data = digits()
    data.setup()
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.constant_(teacher[1].bias, 1e5)
    model = KD("cnn_tiny", teacher, 10, input_shape=SHAPE)
    model.trainer = trainer()
    with pytest.raises(ValueError, match=r"the teacher's logits are not finite in float16.*--dtype float32"):
        teach_store(model, data, tmp_path / "a.store")
    teach_store(model, data, tmp_path / "b.store", dtype="float32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": "some"}, "views must be 'all', 'plain' or a number above 0, got 'some'"),
        ({"views": "0"}, "views must be 'all', 'plain' or a number above 0, got '0'"),
        ({"views": "30"}, "fixed must be 9 or fewer, the views of a sample, got 30"),
        ({"dtype": "bfloat16"}, "dtype must be 'float16' or 'float32', got 'bfloat16'"),
        ({"compress": "marginal_renorm"}, "compress must be 'hard'"),
        (
            {"compress": "marginal_renorm_k10"},
            "compress 'marginal_renorm_k10' keeps 10 classes, which must be fewer than the 10",
        ),
        ({"samples": "some"}, "samples must be 'used' or 'all'"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"temperature": 2.0}, r"temperature is of compress, got temperature=2.0 without it"),
    ],
)
def test_wrong_arguments_raise_before_anything_is_written(options, message, tmp_path, weights):
    with pytest.raises(ValueError, match=message):
        taught(tmp_path / "a.store", weights, **options)
    assert not list(tmp_path.iterdir())


def test_deepcopy_shares_the_store_and_a_pickled_one_reads_the_same(store):
    import copy
    import pickle

    found = TeacherStore(store)
    assert copy.deepcopy(found) is found
    again = pickle.loads(pickle.dumps(found))
    index = torch.from_numpy(found.layout.samples[:3].copy())
    assert torch.equal(again.logits(index, index % 9), found.logits(index, index % 9))
    lacking = np.setdiff1d(np.arange(found.header["data"]["count"]), found.layout.samples)[:1]
    with pytest.raises(ValueError, match="has no answers for sample"):
        found.logits(torch.from_numpy(lacking), torch.tensor([0]))


def task_of_two_teachers(cls, weights, **options):
    """A task of two teachers that learns from no label."""
    torch.manual_seed(3)
    two = {"teacher": ["cnn", "cnn_tiny"], "teacher_weights": [weights, "random"], "teacher_size": [16, None]}
    return cls("cnn_tiny", num_classes=10, input_shape=SHAPE, **two, **options)


@pytest.mark.parametrize("cls", [SSLD, MEALV2])
def test_store_of_two_teachers_covers_unlabelled_samples(cls, tmp_path, weights):
    def data(**options):
        return digits(train_per_class=4, unlabelled="rest", **options)

    _, expected, _ = fitted(task_of_two_teachers(cls, weights), data(), max_epochs=1)
    model = task_of_two_teachers(cls, weights)
    trainer().validate(model, data(), verbose=False)
    header = teach_store(model, model.trainer.datamodule, tmp_path / "two.store", dtype="float32")
    assert header["teacher"]["name"] == ["cnn", "cnn_tiny"]
    assert sum(stop - start for start, stop in header["samples"]) == 230
    store = {"teacher_store": str(tmp_path / "two.store")}
    _, found, _ = fitted(task_of_two_teachers(cls, weights, **store), data(), max_epochs=1)
    assert found[0]["train/loss"] == pytest.approx(expected[0]["train/loss"], rel=1e-5)
    other = str(tmp_path / "other.pt")
    torch.save(Classification("cnn", 10, input_shape=SHAPE).network.state_dict(), other)
    with pytest.raises(ValueError, match="does not fit, the weights differ"):
        fitted(task_of_two_teachers(cls, other, **store), data(), max_epochs=1)
    with pytest.raises(ValueError, match="does not fit, it lacks 1 of the 231 training samples"):
        fitted(task_of_two_teachers(cls, weights, **store), with_one_more(data()), max_epochs=1)
    if cls is MEALV2:
        for option in ({"cutmix": 0.5}, {"discriminator": "cooperative"}):
            with pytest.raises(ValueError, match="MEALV2 looks into the teacher"):
                task_of_two_teachers(cls, weights, **option, **store)


def with_one_more(data):
    """``data`` with one validation sample added to its unlabelled training samples."""
    data.setup()
    data.unlabelled_indices = np.sort(np.append(data.unlabelled_indices, data.val_indices[0]))
    return data


def taught_by_command(path, weights, **options):
    model, data = task(weights=weights), digits()
    run = trainer(**options)
    return str(teach(run, model, data, out=str(path), dtype="float32")), float(run.callback_metrics["val/teacher_acc"])


def taught_by_two(path, weights):
    return taught_by_command(path, weights, strategy="ddp", devices=2)


def test_two_ddp_processes_write_the_same_store_as_one(tmp_path, weights):
    _, reached = taught_by_command(tmp_path / "one.store", weights)
    found = on_two_ranks(taught_by_two, tmp_path / "two.store", weights)
    assert [value for _, value in found] == pytest.approx([reached, reached])
    assert (tmp_path / "two.store").read_bytes() == (tmp_path / "one.store").read_bytes()
    assert TeacherStore(tmp_path / "two.store").reached == pytest.approx({"acc": reached})


def taught_anew_by_two(path, weights):
    """The first process is delayed: without waiting for it, the other would find the old store."""
    import time

    from lightning_kd.distillation import teaching

    model, data, run = task(weights=weights), digits(), trainer(strategy="ddp", devices=2)
    run.validate(model, data, verbose=False)
    if run.is_global_zero:
        describe = teaching.weights_digest
        teaching.weights_digest = lambda network: time.sleep(0.5) or describe(network)
    return teach_store(model, data, path, dtype="float32", views="plain", restart=True)["keys"]


def test_restart_in_two_ddp_processes_replaces_the_old_store(tmp_path, weights, store):
    for file in ("", ".json"):
        shutil.copy(f"{store}{file}", f"{tmp_path / 'a.store'}{file}")
    assert on_two_ranks(taught_anew_by_two, tmp_path / "a.store", weights) == [1, 1]
    assert TeacherStore(tmp_path / "a.store").header["keys"] == 1


def test_tilde_in_paths_is_the_home_folder(tmp_path, weights, store, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copy(weights, tmp_path / "n.pt")
    path = teach(trainer(), task(weights="~/n.pt"), digits())
    assert path == tmp_path / "n.store"
    assert TeacherStore("~/n.store").path == path
    assert not (tmp_path / "~").exists()
    fitted(task("kd", teacher_store="~/n.store"), max_epochs=1, limit_train_batches=1)


def fitted_by_two(store):
    _, losses, _ = fitted(task("kd", teacher_store=store), strategy="ddp", devices=2, max_epochs=1)
    return losses[0]["train/loss_kd"]


def test_two_processes_read_the_store_for_their_part_of_the_batch(store, weights):
    *_, live = fitted(task("kd", weights), digits(batch_size=64), max_epochs=1)
    found = on_two_ranks(fitted_by_two, store)
    assert found[0] == found[1]
    assert found[0] == pytest.approx(float(live.callback_metrics["train/loss_kd"]), rel=0.1)  # other batch norm
