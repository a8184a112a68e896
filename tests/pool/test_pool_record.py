"""The record of queries and answers, and the learning curves computed from it."""

import json

import numpy as np
import pytest

from lightning_kd.pool import PoolRecord
from lightning_kd.pool.label_curves import curves, draw_curves, table, write_metrics

CLASSES = ["a", "b", "c", "d"]


def record_of(path, queries=((3, "b"), (7, "unknown"), (5, None))):
    record = PoolRecord(path, {"classes": CLASSES})
    record.add_query([i for i, _ in queries], np.arange(len(queries)) / 4, ["a"] * len(queries))
    record.add_answers({i: a for i, a in queries if a is not None}, "oracle")
    return record


def test_record_is_read_back_equal_with_one_line_per_sample(tmp_path):
    record = record_of(tmp_path / "pool.json")
    record.results.append({"round": 0, "known": 3})
    record.save()
    read = PoolRecord.load(tmp_path / "pool.json")
    assert (read.settings, read.queries, read.results) == (record.settings, record.queries, record.results)
    lines = (tmp_path / "pool.json").read_text().splitlines()
    assert sum('"index"' in line for line in lines) == 3
    assert {"index": 3, "answer": "b", "by": "oracle", "score": 0.0}.items() <= json.loads(lines[7].rstrip(",")).items()


def test_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    record = record_of(tmp_path / "pool.json")
    record.save()
    before = (tmp_path / "pool.json").read_text()
    record.add_answers({5: "c"}, "person")

    def broken(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(OSError, match="disk full"):
        record.save()
    assert (tmp_path / "pool.json").read_text() == before


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": 1}', '{"version": 9, "settings": {}, "queries": [], "results": []}']
)
def test_damaged_record_file_raises(tmp_path, text):
    (tmp_path / "pool.json").write_text(text)
    with pytest.raises(ValueError, match="damaged"):
        PoolRecord.load(tmp_path / "pool.json")


def test_saving_a_record_that_lacks_stored_answers_raises(tmp_path):
    record_of(tmp_path / "pool.json").save()
    before = (tmp_path / "pool.json").read_text()
    for forgetful in (
        PoolRecord(tmp_path / "pool.json"),
        record_of(tmp_path / "pool.json", [(3, "c"), (7, "unknown")]),
    ):
        with pytest.raises(ValueError, match="would be lost"):
            forgetful.save()
    assert (tmp_path / "pool.json").read_text() == before


def test_querying_a_sample_again_raises(tmp_path):
    record = record_of(tmp_path / "pool.json")
    with pytest.raises(ValueError, match="index 7 was queried before"):
        record.add_query([9, 7], [0.0, 0.0], ["a", "a"])
    assert record.round == 1
    assert [row["index"] for row in record.pending] == [5]


def test_precision_is_that_of_the_latest_answered_query(tmp_path):
    record = PoolRecord(tmp_path / "pool.json", {"classes": CLASSES})
    assert record.precision == 0
    record.add_query([1, 2], [0, 0], ["a", "a"])
    record.add_answers({1: "a", 2: "a"}, "oracle")
    assert record.precision == 1
    record.add_query([3, 4], [0, 0], ["a", "a"])
    assert record.precision == 1
    record.add_answers({3: "unknown", 4: "unknown"}, "oracle")
    assert record.precision == 0


def record_of_worked_example(tmp_path):
    """12 known labelled, a pool of 20 with 10 known, and the answers 0, 3, 4, 4, 1, 2, 4, 0 of 4 known classes."""
    answers = [[*CLASSES, "unknown"][k] for k in (0, 3, 4, 4, 1, 2, 4, 0)]
    record = record_of(tmp_path / "pool.json", list(enumerate(answers)))
    record.results = [
        {"round": 0, "known": 12, "unknown": 0, "known_total": 22, "test/acc": 0.5, "final": False},
        {"round": 1, "known": 17, "unknown": 3, "known_total": 22, "test/acc": 0.75, "final": True},
    ]
    return record


def test_precision_and_recall_equal_the_worked_example(tmp_path):
    first, last = curves(record_of_worked_example(tmp_path))
    assert first["query/precision"] == 0.625
    assert first["query/recall"] == pytest.approx(0.772727, abs=1e-6)
    assert (first["labels"], last["labels"]) == (0, 8)
    assert "query/precision" not in last


def test_metrics_file_table_and_picture_of_the_curves_are_written(tmp_path):
    record = record_of_worked_example(tmp_path)
    write_metrics(record, tmp_path / "metrics.csv")
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert (
        lines[0] == "epoch,step,curve/acc,pool/known,pool/unknown,query/precision,query/recall,test/acc,test/acc_mean"
    )
    assert lines[2].split(",") == ["1", "8", "0.75", "17", "3", "", "", "0.75", "0.625"]
    assert table(curves(record)).splitlines()[1].split() == ["0", "0", "12", "0", "50.00%", "62.50%", "77.27%"]
    draw_curves(curves(record), tmp_path / "curves.png", "test")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
