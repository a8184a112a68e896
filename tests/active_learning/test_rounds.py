"""Rounds of train, test, query and answers; a broken run, started again, resumes where it stopped."""

import shutil
from functools import partial

import numpy as np
import pytest
import torch

from lightning_kd.active_learning import BUAL, DCFS, LfOSA, PoolClassifier, run_rounds, select_query, write_query
from lightning_kd.active_learning import rounds as module
from lightning_kd.pool import PoolRecord, Query
from tests.active_learning.runs import Greedy, pool_data, starter, trainer_of
from tests.two_processes import on_two_ranks


def outcome(folder):
    """What equal runs have in common: the pool record except times, and the metrics."""
    record = PoolRecord.load(folder / "pool.json")
    results = [{k: v for k, v in row.items() if k != "seconds"} for row in record.results]
    return record.settings, record.queries, results, (folder / "metrics.csv").read_text()


def test_run_records_labels_answers_precision_and_recall(tmp_path):
    said = []
    rows = run_rounds(starter(), tmp_path, say=said.append)
    assert [row["labels"] for row in rows] == [0, 30, 60]
    assert len(said) == 3
    assert "round 0 of 2: 0 labels bought" in said[0]
    assert (tmp_path / "curves.png").is_file()
    data = pool_data()
    data.setup()
    record = PoolRecord.load(tmp_path / "pool.json")
    for number, row in enumerate(rows):
        known, unknown = row["known"], row["unknown"]
        assert known + unknown == 40 + row["labels"]
        assert record.results[number]["unlabelled"] == len(data.source.train_indices) - known - unknown
        if number < 2:
            valid = round(row["query/precision"] * 30)
            assert rows[number + 1]["known"] == known + valid
            assert row["query/recall"] == (known + valid) / data.known_total
    truth = [data.oracle(np.array([row["index"]]))[0] for row in record.queries]
    names = [*data.class_names, "unknown"]
    assert [row["answer"] for row in record.queries] == [names[k] for k in truth]
    assert len({row["index"] for row in record.queries}) == 60


def test_queries_depend_on_the_seed_but_not_on_eval_batch_size(tmp_path):
    for name, seed, size in (("a", 0, 256), ("b", 0, 7), ("c", 1, 256)):
        run_rounds(starter(data={"eval_batch_size": size}), tmp_path / name, seed, say=str)
    chosen = [[row["index"] for row in PoolRecord.load(tmp_path / n / "pool.json").queries] for n in "abc"]
    assert chosen[0] == chosen[1]
    assert chosen[0] != chosen[2]


MLP = {"network": "mlp_8", "num_classes": 4, "input_shape": (1, 8, 8)}
TASKS = {
    "own": Greedy,
    "badge": partial(PoolClassifier, **MLP, strategy="badge"),
    "k_center": partial(PoolClassifier, **MLP, strategy="k_center"),
    "LfOSA": partial(LfOSA, **MLP),
    "DCFS": partial(DCFS, **MLP),
    "BUAL": partial(BUAL, **MLP, negative_epochs=1, snapshot_interval=1, subset_size=50),
}


@pytest.mark.parametrize("name", TASKS)
def test_query_does_not_depend_on_labels_of_unlabelled_samples(tmp_path, name):
    def noisy(number, folder):
        trainer, task, data = starter(TASKS[name], data={"rounds": 1})(number, folder)
        data.setup()
        data._truth = np.where(data.train_target.numpy() >= 0, data._truth, (data._truth * 3 + 1) % 5)
        return trainer, task, data

    for run, start in (("a", starter(TASKS[name], data={"rounds": 1})), ("b", noisy)):
        run_rounds(start, tmp_path / run, say=str)
    a, b = (PoolRecord.load(tmp_path / run / "pool.json").queries for run in "ab")
    assert [row["index"] for row in a] == [row["index"] for row in b]
    assert [row["score"] for row in a] == [row["score"] for row in b]
    assert [row["answer"] for row in a] != [row["answer"] for row in b]


POINTS = ["fit", "predict", "select", "save 1", "save 2", "save 3", "save 4", "metrics"]


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The outcome of an undisturbed run of two rounds."""
    folder = tmp_path_factory.mktemp("whole")
    run_rounds(starter(), folder, say=str)
    return outcome(folder)


@pytest.mark.parametrize(
    "point", [pytest.param(point, marks=[pytest.mark.slow] * point.endswith(("2", "3", "4"))) for point in POINTS]
)
def test_run_broken_at_any_point_and_started_again_equals_a_whole_one(tmp_path, monkeypatch, whole, point):
    with monkeypatch.context() as patch:
        calls = {"n": 0}

        def at(n, original, after=True):
            def broken(*args, **kwargs):
                calls["n"] += 1
                if calls["n"] == n and not after:
                    raise Stop
                value = original(*args, **kwargs)
                if calls["n"] == n:
                    raise Stop
                return value

            return broken

        if point == "fit":
            patch.setattr(Greedy, "training_step", at(9, Greedy.training_step))
        elif point == "predict":
            patch.setattr(Greedy, "predict_step", at(12, Greedy.predict_step))
        elif point == "select":
            patch.setattr(Greedy, "select", at(2, Greedy.select))
        elif point == "metrics":
            patch.setattr(module, "write_metrics", at(2, module.write_metrics, after=False))
        else:  # the saves of a round: its copy of the record, the query, the answers; then of the next
            patch.setattr(PoolRecord, "save", at(int(point[-1]) + 1, PoolRecord.save))
        with pytest.raises(Stop):
            run_rounds(starter(), tmp_path / "broken", say=str)
    run_rounds(starter(), tmp_path / "broken", say=str)
    assert outcome(tmp_path / "broken") == whole
    run_rounds(starter(), tmp_path / "broken", say=str)  # once more changes nothing
    assert outcome(tmp_path / "broken") == whole


def test_run_continued_with_more_rounds_equals_a_whole_one(tmp_path, whole):
    for rounds in (1, 2):
        run_rounds(starter(data={"rounds": rounds}), tmp_path / "grown", say=str)
    assert outcome(tmp_path / "grown") == whole


def test_bual_run_continued_with_more_rounds_retrains_its_last_round(tmp_path):
    """The last round trains the positive stage only, so it is trained again once another round follows."""
    started = []

    def start(rounds, number, folder):
        started.append(starter(TASKS["BUAL"], data={"rounds": rounds})(number, folder))
        return started[-1]

    for folder, rounds in (("whole", 2), ("grown", 1), ("grown", 2)):
        run_rounds(partial(start, rounds), tmp_path / folder, say=str)
    assert outcome(tmp_path / "grown") == outcome(tmp_path / "whole")
    trained = [(task.query_follows, trainer.current_epoch) for trainer, task, _ in started if trainer.current_epoch]
    epochs = trained[0][1]
    assert trained[:3] == [(True, epochs), (True, epochs), (False, epochs - 1)]
    assert trained[3:] == [(True, epochs), (False, epochs - 1), (True, epochs), (False, epochs - 1)]


def test_another_strategy_or_seed_in_the_same_folder_is_refused(tmp_path):
    class Other(Greedy):
        pass

    run_rounds(starter(data={"rounds": 1}), tmp_path, say=str)
    for start, seed in ((starter(Other), 0), (starter(), 1)):
        with pytest.raises(ValueError, match="name another --run folder"):
            run_rounds(start, tmp_path, seed, say=str)


def test_last_query_takes_what_is_left_of_the_pool(tmp_path):
    data = {"budget": 900, "rounds": 5}
    rows = run_rounds(starter(data=data, trainer={"max_epochs": 1}), tmp_path, say=str)
    assert rows[-1]["labels"] == len(PoolRecord.load(tmp_path / "pool.json").queries)
    assert rows[-1]["known"] + rows[-1]["unknown"] == 1438
    assert len(rows) == 3
    assert rows[1]["query/recall"] == 1


@pytest.mark.parametrize("classes", [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 1, 2, 3]])
def test_rounds_with_only_known_or_only_unknown_answers(tmp_path, classes):
    def of_one_kind(pool, budget):
        data = pool_data(known_classes=classes, initial_count=100)
        data.setup()
        kind = data.oracle(pool.unlabelled) == data.num_classes
        return pool.unlabelled[kind if len(classes) < 10 else ~kind][:budget]

    settings = {"chosen": of_one_kind, "num_classes": len(classes)}
    rows = run_rounds(starter(data={"known_classes": classes, "initial_count": 100}, **settings), tmp_path, say=str)
    assert {row["query/precision"] for row in rows[:-1]} == {0.0 if len(classes) < 10 else 1.0}


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (lambda pool, budget: pool.unlabelled[[0, 0]], "each index once"),
        (lambda pool, budget: pool.unlabelled[: budget + 1], "1 to 30 indices, got 31"),
        (lambda pool, budget: pool.unlabelled[:0], "got 0"),
        (lambda pool, budget: pool.known[:1], "indices of pool.unlabelled"),
        (lambda pool, budget: pool.unlabelled[:1] / 2, r"must return indices \[n\]"),
    ],
)
def test_strategy_returning_wrong_indices_raises(tmp_path, chosen, message):
    with pytest.raises(ValueError, match=message):
        run_rounds(starter(chosen=chosen), tmp_path, say=str)
    assert not (tmp_path / "pool.json").exists()


def test_strategy_may_return_bare_indices(tmp_path):
    trainer, task, data = starter(chosen=lambda pool, budget: torch.from_numpy(pool.unlabelled[5:8]))(0, tmp_path)
    query, predicted = select_query(trainer, task, data)
    assert query.index.tolist() == data.unlabelled_indices[5:8].tolist()
    assert np.isnan(query.score).all()
    assert list(predicted) == query.index.tolist()


def test_scores_come_in_the_order_of_the_pool_view(tmp_path):
    seen = {}

    class Looking(Greedy):
        needs_labelled = True

        def pool_scores(self, image, index):
            return self.scores_and_probabilities(image)[1], {"copy": index.float()[:, None].expand(-1, 3)}

        def select(self, scores, pool, budget, generator):
            seen.update(scores=scores, pool=pool)
            return Query(pool.unlabelled[:1], np.zeros(1))

    trainer, task, data = starter(Looking)(0, tmp_path)
    select_query(trainer, task, data)
    pool = seen["pool"]
    assert np.array_equal(seen["scores"]["copy"][:, 1].numpy(), pool.unlabelled)
    assert np.array_equal(pool.labelled_scores["copy"][:, 2].numpy(), pool.known)
    assert not hasattr(pool, "target")


def test_write_query_writes_a_sorted_file_and_refuses_a_second_query(tmp_path):
    trainer, task, data = starter()(0, tmp_path)
    path = write_query(trainer, task, data, tmp_path)
    lines = path.read_text().splitlines()
    assert path.name == "query_00.csv"
    assert lines[0] == "index,score,predicted,label"
    assert len(lines) == 31
    scores = [float(line.split(",")[1]) for line in lines[1:]]
    assert scores == sorted(scores, reverse=True)
    assert all(line.endswith(",") for line in lines[1:])
    assert len(PoolRecord.load(tmp_path / "pool.json").pending) == 30
    trainer, task, data = starter()(0, tmp_path)
    data.setup()
    data.set_record(PoolRecord.load(tmp_path / "pool.json"))
    with pytest.raises(ValueError, match=r"30 samples of query_00\.csv wait for an answer"):
        write_query(trainer, task, data, tmp_path)


def test_warm_start_begins_with_the_weights_of_the_round_before(tmp_path):
    started = []

    class Watching(Greedy):
        def on_fit_start(self):
            started.append(self.network.state_dict()["layers.0.weight"].clone() if hasattr(self.network, "layers")
                           else next(self.parameters()).detach().clone())  # fmt: skip

    ended = []

    def start(number, folder):
        trainer, task, data = starter(Watching, warm_start=True, trainer={"enable_checkpointing": True})(number, folder)
        trainer.callbacks[-1].dirpath = str(folder / "checkpoints")
        trainer.callbacks[-1].filename = "last"
        return trainer, task, data

    rows = run_rounds(start, tmp_path, say=str)
    assert len(rows) == 3
    for number in (0, 1):
        state = torch.load(tmp_path / f"round_0{number}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        ended.append(next(iter(state.values())))
    assert torch.equal(started[1], ended[0])
    assert torch.equal(started[2], ended[1])
    assert not torch.equal(started[0], started[1])


def _two_ranks(folder):
    def start(number, round_folder):
        trainer = trainer_of(round_folder, strategy="ddp", devices=2, num_sanity_val_steps=0)
        return trainer, Greedy(), pool_data(batch_size=16)

    run_rounds(start, folder, say=str)
    return [row["index"] for row in PoolRecord.load(f"{folder}/pool.json").queries]


def test_two_processes_query_what_one_queries(tmp_path):
    one, other = on_two_ranks(_two_ranks, str(tmp_path / "two"))
    assert one == other
    run_rounds(starter(), tmp_path / "one", say=str)
    alone = PoolRecord.load(tmp_path / "one/pool.json")
    two = PoolRecord.load(tmp_path / "two/pool.json")
    assert len(set(one)) == 60
    # the same joint batches: the weights differ by rounding alone
    assert [row["index"] for row in alone.queries] == one
    assert [row["known"] for row in alone.results] == [row["known"] for row in two.results]
    shutil.rmtree(tmp_path / "two")
