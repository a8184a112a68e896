"""Lewis sampling in a pool: one query for several networks, and training with its sampling weights."""

import csv

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_kd.active_learning import (
    Lewis,
    PoolClassifier,
    draw_until,
    k_center_greedy,
    max_lewis_weights,
    run_rounds,
    select_query,
)
from lightning_kd.active_learning.queries import write_query
from lightning_kd.active_learning.representations import joined
from lightning_kd.cli import main
from lightning_kd.core.batch import Batch
from lightning_kd.core.seeding import numpy_generator, torch_generator
from lightning_kd.core.supervised import Classification
from lightning_kd.pool import PoolRecord, PoolView
from tests.active_learning.runs import pool_data, starter, trainer_of
from tests.two_processes import on_two_ranks

ALL_CLASSES = {"known_classes": 10, "initial_count": 60, "budget": 36, "rounds": 1}

WEIGHTS = np.arange(1, 37) / 4
AUGMENTED = {"score_with_train_augmentation": True}


def classifier(strategy="lewis", **kwargs):
    return PoolClassifier("mlp_8", 10, input_shape=(1, 8, 8), strategy=strategy, **kwargs)


def rows(count, width, seed=0):
    return torch.randn(count, width, generator=torch_generator(seed, "rows"))


def digits(**kwargs):
    data = pool_data(**{**ALL_CLASSES, **kwargs})
    data.setup()
    return data


def query_of(task, data=None, **kwargs):
    return select_query(trainer_of(**kwargs), task, data or digits())[0]


@pytest.fixture
def files():
    """Features of two networks of all 1,438 training samples."""
    count = len(digits().train_target)
    np.save("a.npy", rows(count, 5))
    np.save("b.npy", rows(count, 7, 1).relu())
    return ["a.npy", "b.npy"]


# -- the query -------------------------------------------------------------------------------------------------------


def test_query_is_a_draw_by_the_max_weights_over_all_networks(files):
    L.seed_everything(3, verbose=False)
    data = digits()
    query = query_of(classifier(feature_networks=files), data)
    pool = data.unlabelled_indices
    ones = torch.ones(len(pool), 1)
    parts = [torch.cat([torch.from_numpy(np.load(name))[pool], ones], 1) for name in files]
    largest = max_lewis_weights(parts)
    drawn = draw_until(largest, 36, numpy_generator(3, "query", 0))
    assert sorted(query.index.tolist()) == pool[drawn.distinct].tolist()
    place = np.searchsorted(pool, query.index)
    np.testing.assert_allclose(query.score, largest[place])
    np.testing.assert_allclose(query.loss_weight[np.argsort(query.index)], drawn.loss_weight)
    first = list(dict.fromkeys(pool[drawn.draws].tolist()))
    assert query.index.tolist() == first  # in the order drawn, so the first k are a query of k


def test_query_repeats_with_its_seed_and_differs_with_another(files):
    found = []
    for seed in (3, 3, 4):
        L.seed_everything(seed, verbose=False)
        found.append(query_of(classifier(feature_networks=files)))
    assert found[0].index.tolist() == found[1].index.tolist() != found[2].index.tolist()
    assert found[0].loss_weight.tolist() == found[1].loss_weight.tolist()


def test_feature_file_in_another_order_is_matched_by_its_index(files):
    L.seed_everything(3, verbose=False)
    before = query_of(classifier(feature_networks=files)).index.tolist()
    feature = np.load("a.npy")
    order = np.random.default_rng(0).permutation(len(feature))
    np.savez("a.npz", feature=feature[order], index=order)
    assert query_of(classifier(feature_networks=["a.npz", "b.npy"])).index.tolist() == before


def test_without_feature_networks_the_task_uses_its_own_features():
    L.seed_everything(3, verbose=False)
    task, data = classifier(), digits()
    query = query_of(task, data)
    outputs = trainer_of().predict(task, datamodule=data)
    feature = torch.cat([output["feature"] for output in outputs])
    largest = max_lewis_weights([torch.cat([feature, torch.ones(len(feature), 1)], 1)])
    np.testing.assert_allclose(query.score, largest[np.searchsorted(data.unlabelled_indices, query.index)], rtol=1e-6)


def trained(name, run, data=None, **kwargs):
    """A trained task and the path of its checkpoint."""
    trainer = trainer_of(run, enable_checkpointing=True, max_epochs=1)
    task = Classification(name, 10, input_shape=(1, 8, 8), **kwargs)
    trainer.fit(task, datamodule=data or digits())
    trainer.save_checkpoint(f"{run}.ckpt")
    return task.eval(), f"{run}.ckpt"


def test_features_of_checkpoints_are_the_inputs_of_their_classifiers():
    L.seed_everything(0, verbose=False)
    tasks, paths = zip(trained("mlp_12_6", "a"), trained("cnn_tiny", "b"), strict=True)
    data = digits(eval_batch_size=500)
    task = classifier(feature_networks=list(paths)).train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    outputs = trainer_of(precision="bf16-mixed").predict(task, datamodule=data)
    assert torch.equal(torch.get_rng_state(), before)  # building the networks draws no random number
    image = next(iter(data.loader("train", outputs[0]["index"], batch_size=500))).image
    for k, one in enumerate(tasks):
        found = {}
        last = [m for m in one.network.modules() if isinstance(m, nn.Linear)][-1]
        last.register_forward_pre_hook(lambda module, args, found=found: found.update(x=args[0]))
        with torch.no_grad():
            one.network(image)
        assert outputs[0][f"feature_{k}"].dtype == torch.float32
        torch.testing.assert_close(outputs[0][f"feature_{k}"], found["x"], rtol=1e-4, atol=1e-5)
    assert not any("epresentation" in key for key in task.state_dict())
    assert len(list(task.parameters())) == 4


def test_feature_network_gets_images_normalised_as_in_its_training():
    L.seed_everything(0, verbose=False)
    data = digits()
    data.source.mean, data.source.std = [0.2], [0.5]
    _, path = trained("mlp_8", "a", data)
    found = []
    for mean, std in (([0.2], [0.5]), ([0.7], [0.1])):
        data = digits()
        data.source.mean, data.source.std = mean, std
        outputs = trainer_of().predict(classifier(feature_networks=[path]), datamodule=data)
        found.append(torch.cat([output["feature_0"] for output in outputs]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_k_center_concatenates_the_scaled_features_of_all_networks(files):
    data = digits()
    query = query_of(classifier("k_center", feature_networks=files), data)
    parts = [torch.from_numpy(np.load(name)).double() for name in files]
    pool, known = data.unlabelled_indices, data.known_indices
    like = [part[pool] for part in parts]
    scaled = [part / (part[pool] - part[pool].mean(0)).square().sum(1).mean().sqrt() for part in parts]
    both = torch.cat(scaled, 1)
    assert query.index.tolist() == pool[k_center_greedy(both[pool], both[known], 36)].tolist()
    torch.testing.assert_close(joined([part[known] for part in parts], like), both[known])


def test_random_needs_no_features():
    query = query_of(classifier("random", feature_networks=["nowhere.npy"]))
    assert len(query.index) == 36


def queried_and_weights(devices):
    torch.manual_seed(0)
    L.seed_everything(0, verbose=False)
    kwargs = {"devices": devices, "strategy": "ddp" if devices > 1 else "auto"}
    query = query_of(classifier(feature_networks=["a.npy", "b.npy"]), **kwargs)
    return query.index.tolist(), query.loss_weight.tolist()


def test_two_processes_query_what_one_queries(files):
    assert on_two_ranks(queried_and_weights, 2) == [queried_and_weights(1)] * 2


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (np.ones((9, 2)), "has 9 rows for the 1438 samples"),
        (np.ones(1438), r"must hold feature \[n, D\], got float64 \[1438\]"),
        ({"x": np.ones((1438, 2))}, r"got the arrays \['x'\]"),
        ({"feature": np.ones((2, 2)), "index": np.array([0, 0])}, "none twice"),
        ({"feature": np.ones((2, 2)), "index": np.array([0, 1438])}, "of 0 to 1437"),
        ({"feature": np.ones((2, 2)), "index": np.array([0])}, "for each of 2 rows"),
        ({"feature": np.ones((2, 2)), "index": np.array([0, 1])}, "has no row for sample"),
        (np.full((1438, 2), np.nan), "features must be finite"),
    ],
)
def test_feature_files_that_do_not_match_the_pool_raise(arrays, message):
    np.savez("f.npz", **arrays) if isinstance(arrays, dict) else np.save("f.npy", arrays)
    name = "f.npz" if isinstance(arrays, dict) else "f.npy"
    with pytest.raises(ValueError, match=message):
        query_of(classifier(feature_networks=[name]))


def test_unusable_feature_networks_raise(tmp_path):
    (tmp_path / "text.npy").write_text("no array")
    with pytest.raises(ValueError, match=r"feature_networks: 'text.npy' is damaged"):
        query_of(classifier(feature_networks=["text.npy"]))
    for name in ("gone.npy", "gone.ckpt"):
        with pytest.raises(FileNotFoundError, match=f"feature_networks: there is no '{name}'; give a checkpoint"):
            trainer_of().fit(classifier(feature_networks=[name]), datamodule=digits())  # before any training
    torch.save({"state_dict": {}, "hyper_parameters": {}}, "nameless.ckpt")
    with pytest.raises(ValueError, match=r"'nameless.ckpt' names no network: save its features"):
        query_of(classifier(feature_networks=["nameless.ckpt"]))
    arguments = {"network": "mlp_8", "num_classes": 10, "input_shape": (3, 4, 4)}
    torch.save({"state_dict": {}, "hyper_parameters": arguments}, "other.ckpt")
    with pytest.raises(ValueError, match=r"takes inputs \(3, 4, 4\), the data has \(1, 8, 8\)"):
        query_of(classifier(feature_networks=["other.ckpt"]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: classifier("entropy", feature_networks=["a.npy"]), "for the strategies lewis, k_center, random"),
        (lambda: classifier(feature_networks=[]), r"names one file or more, got \[\]"),
        (lambda: Lewis(p=0.5), "p must be at least 1, got 0.5"),
        (lambda: query_of(classifier(), digits(budget=700)), "budget=700 is more than half of the 1378 samples"),
        (
            lambda: query_of(classifier(feature_networks=["a.npy"]), digits(**AUGMENTED)),
            "without augmentation, got score",
        ),
    ],
)
def test_wrong_strategies_budgets_and_augmentation_raise(files, make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bias_changes_the_query_and_missing_features_raise(files):
    query = query_of(classifier(Lewis(p=1.0, bias=False), feature_networks=files))
    other = query_of(classifier(Lewis(p=1.0), feature_networks=files))
    assert query.index.tolist() != other.index.tolist()
    pool = PoolView(np.arange(20), *[np.empty(0, np.int64)] * 3, 3)
    with pytest.raises(ValueError, match="scores must hold 'feature'"):
        Lewis().select({}, pool, 3, np.random.default_rng(0))


# -- the record ------------------------------------------------------------------------------------------------------


def test_query_records_its_weights_and_a_second_lewis_query_raises(files, tmp_path):
    task, data = classifier(feature_networks=files), digits()
    path = write_query(trainer_of(), task, data, tmp_path)
    record = PoolRecord.load(tmp_path / "pool.json")
    with open(path, newline="") as file:
        written = list(csv.DictReader(file))
    assert list(written[0]) == ["index", "score", "loss_weight", "predicted", "label"]
    weights = [row["loss_weight"] for row in record.queries]
    assert [float(row["loss_weight"]) for row in written] == pytest.approx(weights, rel=1e-5)
    assert len(weights) == 36
    record.add_answers({row["index"]: "1" for row in record.queries}, "person")
    record.save()
    with pytest.raises(ValueError, match=r"lewis makes one query, .* holds that query of 36 samples"):
        write_query(trainer_of(), task, data, tmp_path)
    assert len(PoolRecord.load(tmp_path / "pool.json").queries) == 36
    write_query(trainer_of(), classifier("random"), data, tmp_path)  # other strategies may query again
    assert "loss_weight" not in PoolRecord.load(tmp_path / "pool.json").queries[-1]


def test_rounds_make_one_query_and_two_rounds_raise(tmp_path):
    for name in "ab":
        run_rounds(starter(classifier, ALL_CLASSES), tmp_path / name, say=str)
    first, second = (PoolRecord.load(tmp_path / name / "pool.json") for name in "ab")
    assert first.queries == second.queries
    assert all(row["loss_weight"] > 0 and row["answer"] for row in first.queries)
    with pytest.raises(ValueError, match=r"lewis makes one query, .* got data.rounds=2: set it to 1"):
        run_rounds(starter(classifier, {**ALL_CLASSES, "rounds": 2}), tmp_path / "c", say=str)
    assert not (tmp_path / "c" / "pool.json").exists()


def test_strategy_returning_zero_loss_weights_raises():
    class Wrong(Lewis):
        def select(self, *args):
            return super().select(*args)._replace(loss_weight=np.zeros(36))

    with pytest.raises(ValueError, match="strategy Wrong must return a loss weight above 0 for each of 36 indices"):
        query_of(classifier(Wrong()))


# -- training with the weights ---------------------------------------------------------------------------------------


def answered(folder, loss_weight=WEIGHTS, **kwargs):
    """Data of a pool with 60 initial labels and the answers to a query of 36 with ``loss_weight``."""
    file = folder / "asked" / "pool.json"
    if not file.is_file():
        data = digits()
        record = PoolRecord(file)
        data.set_record(record)
        index = data.unlabelled_indices[np.arange(36) * 7]
        record.add_query(index, np.ones(36), ["0"] * 36, loss_weight=loss_weight)
        answers = data.oracle(index)
        record.add_answers({int(i): data.class_names[a] for i, a in zip(index, answers, strict=True)}, "oracle")
        record.save()
    return digits(answers=str(file.parent), **kwargs)


def plain_task(**kwargs):
    kwargs = {"use_sampling_weights": True, **kwargs}
    return Classification("mlp_8", 10, input_shape=(1, 8, 8), **kwargs)


def test_batches_have_sampling_weights_of_mean_one_over_the_query(tmp_path):
    data = answered(tmp_path)
    record = data.record
    batch = next(iter(data.loader("train", batch_size=96)))
    weight = dict(zip(batch.index.tolist(), batch.extras["sampling_weight"].tolist(), strict=True))
    assert len(weight) == 96
    query = [row["index"] for row in record.queries]
    assert [weight[i] for i in query] == pytest.approx([k / 18.5 for k in range(1, 37)])
    assert [weight[i] for i in data.known_indices if i not in query] == [1.0] * 60
    assert batch.extras["sampling_weight"].dtype == torch.float32
    assert "sampling_weight" not in next(iter(digits().loader("train"))).extras


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_the_weighted_mean(smoothing):
    task = plain_task(label_smoothing=smoothing, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    image, target, weight = torch.randn(6, 1, 8, 8), torch.arange(6), torch.tensor([0.5, 2, 1, 0, 3, 1])
    terms = []
    task.step_loss = lambda parts, logits, target: terms.append(parts) or parts["ce"]
    task.training_step(Batch(image, target, None, {"sampling_weight": weight}), 0)
    each = F.cross_entropy(task(image), target, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(terms[0]["ce"], (weight * each).sum() / 6)


def test_equal_weights_train_like_no_weights(tmp_path):
    found = []
    for given in (False, True):
        L.seed_everything(0, verbose=False)
        task, data = plain_task(use_sampling_weights=given), answered(tmp_path, np.full(36, 0.3))
        trainer_of(limit_val_batches=0).fit(task, datamodule=data)
        found.append(task.network.state_dict())
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda folder: trainer_of().fit(plain_task(), datamodule=digits()),
            ValueError,
            "needs batches with sampling_weight",
        ),
        (lambda folder: plain_task(class_weights="balanced"), ValueError, "leave one of them out"),
        (lambda folder: digits(answers="nowhere"), FileNotFoundError, "nowhere does not exist"),
        (lambda folder: answered(folder, initial_count=61), ValueError, "was begun with initial"),
    ],
)
def test_missing_weights_or_answers_and_conflicting_settings_raise(tmp_path, make, error, message):
    answered(tmp_path)
    with pytest.raises(error, match=message):
        make(tmp_path)


def weighted_fit(folder, devices, batch_size):
    L.seed_everything(0, verbose=False)
    torch.manual_seed(0)
    parallel = {"strategy": "ddp", "devices": 2} if devices > 1 else {}
    trainer = trainer_of(precision="64-true", num_sanity_val_steps=0, limit_val_batches=0, **parallel)
    task = plain_task()
    trainer.fit(task, datamodule=answered(folder, batch_size=batch_size))
    return {name: value.tolist() for name, value in task.network.state_dict().items()}


def test_two_processes_train_as_one(tmp_path):
    answered(tmp_path)
    first, second = on_two_ranks(weighted_fit, tmp_path, 2, 6)
    assert first == second
    for name, value in weighted_fit(tmp_path, 1, 12).items():
        np.testing.assert_allclose(first[name], value, rtol=1e-9, atol=1e-9)


def test_resume_to_the_bit(tmp_path):
    L.seed_everything(0, verbose=False)
    straight = plain_task()
    start = {key: value.clone() for key, value in straight.state_dict().items()}
    trainer_of(max_epochs=3).fit(straight, datamodule=answered(tmp_path))
    half = plain_task()
    half.load_state_dict(start)
    trainer = trainer_of(max_epochs=2)
    trainer.fit(half, datamodule=answered(tmp_path))
    trainer.save_checkpoint("half.ckpt")
    resumed = plain_task()
    trainer = trainer_of(max_epochs=3)
    trainer.fit(resumed, datamodule=answered(tmp_path), ckpt_path="half.ckpt")
    assert trainer.current_epoch == 3
    for key, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key])


QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
SHORT = [*QUIET, "--trainer.max_epochs", "2", "--trainer.accelerator", "cpu"]
CONFIG = ["--config", "active_learning/lewis_digits"]
PLAIN = ["--config", "active_learning/plain_digits"]


def test_the_commands_from_networks_to_weighted_training(capsys):
    main(["fit", *PLAIN, *SHORT, "--model.network", "mlp_16", "--run", "other"])
    main(["fit", *CONFIG, *SHORT, "--model.network", "mlp_24", "--run", "first"])
    networks = "[first/checkpoints/last.ckpt, other/checkpoints/last.ckpt]"
    main(["query", "--config", "first/config.yaml", *QUIET, "--model.feature_networks", networks])
    assert "2 representations sum to" in capsys.readouterr().err
    with open("first/query_00.csv", newline="") as file:
        written = list(csv.DictReader(file))
    with open("first/query_00.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, written[0])
        writer.writeheader()
        writer.writerows([{**row, "label": row["predicted"]} for row in written])
    main(["label", "first/query_00.csv"])
    assert "not looked at" not in capsys.readouterr().out
    weighted = ["--data.answers", "first", "--model.use_sampling_weights", "true"]
    main(["fit", *PLAIN, *weighted, *SHORT, "--model.network", "mlp_24", "--run", "after"])
    main(["test", "--config", "after/config.yaml", "--ckpt_path", "last"])
    for verb in ("query", "active"):
        with pytest.raises(SystemExit):
            main([verb, *CONFIG, *QUIET, "--data.answers", "first", "--run", "again"])
    assert "uses the answers of its own run" in capsys.readouterr().err
