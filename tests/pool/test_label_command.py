"""``lightning-kd label``: the answers of a file are recorded all together, or none of them."""

import subprocess
import sys

import pytest

from lightning_kd.cli import main
from lightning_kd.file_writing import write_text
from lightning_kd.pool import PoolRecord
from lightning_kd.spreadsheet import csv_text


@pytest.fixture
def pool(tmp_path):
    record = PoolRecord(tmp_path / "pool.json", {"classes": ["cat", "dog"]})
    record.add_query([3, 1, 8], [0.9, 0.5, 0.1], ["cat", "dog", "cat"], ["x/3.png", "x/1.png", "x/8.png"])
    record.save()
    return tmp_path / "pool.json"


def run_label(tmp_path, text):
    (tmp_path / "answers.csv").write_text(text)
    main(["label", str(tmp_path / "answers.csv")])


def recorded_answers(path):
    return {row["index"]: (row["answer"], row["by"]) for row in PoolRecord.load(path).queries}


def test_answers_are_recorded_and_counted(pool, tmp_path, capsys):
    run_label(tmp_path, "index,label\n3,cat\n1,unknown\n8,\n")
    assert recorded_answers(pool) == {3: ("cat", "person"), 1: ("unknown", "person"), 8: (None, None)}
    assert "1 samples still wait" in capsys.readouterr().out
    run_label(tmp_path, "index,path,label\n3,x/3.png,cat\n8,x/8.png,dog\n")  # 3 was answered before
    assert recorded_answers(pool)[8] == ("dog", "person")
    assert "2 answers, 0 of them unknown, 1 of them known before; 1 new" in capsys.readouterr().out


def test_all_errors_are_listed_together_and_nothing_is_recorded(pool, tmp_path, capsys):
    run_label(tmp_path, "index,label\n8,dog\n")
    before = pool.read_text()
    wrong = (
        "index,path,label\n3,x/3.png,cow\n1,x/1.png,dog\n1,x/1.png,dog\n5,,cat\nx,,cat\n8,x/8.png,cat\n3,x/4.png,cat\n"
    )
    with pytest.raises(SystemExit):
        run_label(tmp_path, wrong)
    error = capsys.readouterr().err
    expected = ["line 2: 'cow' is none of cat, dog, unknown", "line 4: index 1 comes twice", "line 5: index 5 was not"]
    expected += [
        "line 6: index 'x' is no whole",
        "line 7: index 8 was answered 'dog' before, now 'cat'",
        "line 8: index 3",
    ]
    for part in expected:
        assert part in error
    assert pool.read_text() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [("a,b\n1,2\n", "no column 'index'"), ("index,label\n3,\n", "holds no answer"), ("", "no column")],
)
def test_file_without_columns_or_answers_is_refused(pool, tmp_path, capsys, text, message):
    with pytest.raises(SystemExit):
        run_label(tmp_path, text)
    assert message in capsys.readouterr().err


def test_missing_pool_record_or_answer_file_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["label", "none.csv"])
    assert "answers 'none.csv' is no file: name the CSV file with the answers" in capsys.readouterr().err
    (tmp_path / "a.csv").write_text("index,label\n")
    with pytest.raises(SystemExit):
        main(["label", str(tmp_path / "a.csv")])
    assert "pool.json: name the folder of the run with --run" in capsys.readouterr().err
    PoolRecord(tmp_path / "pool.json", {"classes": ["cat"]}).save()
    with pytest.raises(SystemExit):
        main(["label", "none.csv", "--run", str(tmp_path)])
    assert "'none.csv' is no file" in capsys.readouterr().err


def test_reads_csv_with_byte_order_mark_and_windows_line_ends(pool, tmp_path):
    (tmp_path / "answers.csv").write_bytes("\ufeffindex,label\r\n3, cat \r\n".encode())
    main(["label", str(tmp_path / "answers.csv"), "--run", str(tmp_path)])
    assert recorded_answers(pool)[3] == ("cat", "person")


@pytest.mark.parametrize("separator", [";", "\t", ","])
def test_reads_other_separators_upper_case_blanks_and_more_columns(pool, tmp_path, separator):
    rows = [" Index ", "Path", "LABEL", "remark"], ["3", "x/3.png", "Cat", ""], ["1", "x/1.png", " UNKNOWN "]
    text = "\r\n".join(separator.join(row) for row in rows)
    (tmp_path / "answers.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    main(["label", str(tmp_path / "answers.csv")])
    assert recorded_answers(pool) == {3: ("cat", "person"), 1: ("unknown", "person"), 8: (None, None)}


def test_label_command_does_not_import_torch():
    code = "import sys, lightning_kd.cli, lightning_kd.pool.label_command; print(int('torch' in sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "0\n"


def recorded_rows(path):
    return {row["index"]: row for row in PoolRecord.load(path).queries}


def test_prints_the_number_of_answers_per_class(pool, tmp_path, capsys):
    run_label(tmp_path, "index,label\n3,cat\n1,unknown\n8,\n")
    assert "by class: cat 1, unknown 1; open: 1\n" in capsys.readouterr().out


def test_prints_how_an_unusual_file_was_read(pool, tmp_path, capsys):
    text = 'Label;remark;INDEX\r\nC at;x;3\r\n"CAT  ";;1\r\ndog;;8\r\n'
    (tmp_path / "answers.csv").write_bytes(b"\xef\xbb\xbf" + text.replace("C at", "cAt").encode())
    main(["label", str(tmp_path / "answers.csv")])
    out = capsys.readouterr().out
    assert (
        "read: cells separated by semicolons; a byte order mark; Windows line ends; columns not looked at: rem" in out
    )
    assert "; 2 labels spelled with other case or spaces than the class\n" in out
    run_label(tmp_path, "index,label\n3,cat\n")
    assert "read:" not in capsys.readouterr().out


def test_repeated_column_is_refused(pool, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_label(tmp_path, "index,label,Label\n3,cat,dog\n")
    assert "names the column 'label' twice" in capsys.readouterr().err


def run_label_correct(tmp_path, text):
    (tmp_path / "answers.csv").write_text(text)
    main(["label", str(tmp_path / "answers.csv"), "--correct"])


def test_correct_replaces_answers_and_keeps_the_old_ones_as_history(pool, tmp_path, capsys):
    run_label(tmp_path, "index,label\n3,cat\n1,dog\n")
    capsys.readouterr()
    run_label_correct(tmp_path, "index,label\n3,dog\n1,\n8,cat\n")
    assert "2 answers, 0 of them unknown; 1 new, 1 changed, 1 removed" in capsys.readouterr().out
    assert recorded_answers(pool) == {3: ("dog", "person"), 1: (None, None), 8: ("cat", "person")}
    run_label_correct(tmp_path, "index,label\n3,cat\n1,unknown\n")
    found = recorded_rows(pool)
    assert found[3]["history"] == [{"answer": "cat", "by": "person"}, {"answer": "dog", "by": "person"}]
    assert (found[1]["history"], found[1]["answer"]) == ([{"answer": "dog", "by": "person"}], "unknown")
    assert "history" not in found[8]
    before = pool.read_text()
    run_label_correct(tmp_path, "index,label\n3,cat\n1,unknown\n")  # a repeated correction changes nothing
    assert pool.read_text() == before


def test_another_answer_without_correct_is_refused(pool, tmp_path, capsys):
    run_label(tmp_path, "index,label\n3,cat\n")
    before = pool.read_text()
    with pytest.raises(SystemExit):
        run_label(tmp_path, "index,label\n3,dog\n")
    assert "(--correct changes it)" in capsys.readouterr().err
    run_label(tmp_path, "index,label\n3,cat\n8,\n")
    assert pool.read_text() == before


def test_correcting_an_answer_of_the_oracle_is_refused(pool, tmp_path, capsys):
    record = PoolRecord.load(pool)
    record.add_answers({3: "cat"}, "oracle")
    record.save()
    with pytest.raises(SystemExit):
        run_label_correct(tmp_path, "index,label\n3,dog\n1,dog\n")
    assert "index 3 was answered 'cat' by the oracle" in capsys.readouterr().err
    assert recorded_answers(pool)[1] == (None, None)


def test_saving_a_record_loaded_before_a_correction_raises(pool, tmp_path):
    run_label(tmp_path, "index,label\n3,cat\n")
    old = PoolRecord.load(pool)
    run_label_correct(tmp_path, "index,label\n3,\n")
    with pytest.raises(ValueError, match="would be lost"):
        old.save()


def run_label_new_class(tmp_path, text, *names):
    (tmp_path / "answers.csv").write_text(text)
    main(["label", str(tmp_path / "answers.csv"), *(word for name in names for word in ("--new_class", name))])


def test_new_class_is_added_once_and_can_be_labelled(pool, tmp_path, capsys):
    for _ in range(2):  # the command may be repeated
        run_label_new_class(tmp_path, "index,label\n3,bird\n1,dog\n", "bird")
        assert PoolRecord.load(pool).settings == {"classes": ["cat", "dog", "bird"], "new_classes": ["bird"]}
    assert "'bird': known from now on. The next fit has 3 classes" in capsys.readouterr().out
    run_label(tmp_path, "index,label\n8,Bird\n")
    assert recorded_answers(pool) == {3: ("bird", "person"), 1: ("dog", "person"), 8: ("bird", "person")}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["bird", "cow"], "no line is labelled 'cow', the new class"),
        (["Dog"], "--new_class 'Dog' must be a new name"),
        (["unknown"], "--new_class 'unknown' must be a new name"),
        ([" "], "--new_class '' must be a new name"),
        (["horse"], "--new_class 'horse' must be a new name"),  # a class of the source that is not known
    ],
)
def test_invalid_new_class_names_are_refused(pool, tmp_path, capsys, names, message):
    record = PoolRecord.load(pool)
    record.settings["others"] = ["horse"]
    record.save()
    before = pool.read_text()
    with pytest.raises(SystemExit):
        run_label_new_class(tmp_path, "index,label\n3,bird\n1,dog\n", *names)
    assert message in capsys.readouterr().err
    assert pool.read_text() == before


def test_new_class_for_a_benchmark_is_refused(pool, tmp_path, capsys):
    record = PoolRecord.load(pool)
    record.settings["samples"] = 10
    record.save()
    with pytest.raises(SystemExit):
        run_label_new_class(tmp_path, "index,label\n3,bird\n", "bird")
    assert "name the known_classes of the data instead" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_label(tmp_path, "index,label\n3,bird\n")
    assert "'bird' is none of cat, dog, unknown\n" in capsys.readouterr().err


def test_paths_that_are_not_utf8_or_have_outer_blanks_are_found(tmp_path):
    paths = ["caf\udce9.png", " b .png "]
    record = PoolRecord(tmp_path / "pool.json", {"classes": ["cat", "dog"]})
    record.add_query([0, 1], [0.9, 0.5], ["cat", "dog"], paths)
    record.save()
    rows = [["index", "path", "label"], *([k, path, "cat"] for k, path in enumerate(paths))]
    write_text(tmp_path / "answers.csv", csv_text(rows))
    main(["label", str(tmp_path / "answers.csv")])
    assert {row["answer"] for row in PoolRecord.load(tmp_path / "pool.json").queries} == {"cat"}


@pytest.mark.parametrize("line", ["3,x/3.png,0.9,cat,cat, big", "3,x/3.png,0,9,cat,"])
def test_line_with_more_cells_than_columns_is_refused(pool, tmp_path, capsys, line):
    with pytest.raises(SystemExit):
        run_label(tmp_path, f"index,path,score,predicted,label\n{line}\n")
    assert "line 2 has 6 cells, the first line 5: put a cell with separators in quotes" in capsys.readouterr().err
    assert recorded_answers(pool)[3] == (None, None)


def test_whole_numbers_written_as_decimals_are_read(tmp_path):
    record = PoolRecord(tmp_path / "pool.json", {"classes": ["1", "2", "3.0"]})
    record.add_query([3, 1, 8], [0.9, 0.5, 0.1], ["1"] * 3)
    record.save()
    run_label(tmp_path, "index,label\n3.0,1.0\n1.0,2.00\n8,3.0\n")
    assert [row["answer"] for row in record.load(record.path).queries] == ["1", "2", "3.0"]


def test_composed_and_decomposed_accents_are_the_same_class(tmp_path):
    record = PoolRecord(tmp_path / "pool.json", {"classes": ["d\u00f6g", "ne\u0301"]})
    record.add_query([3, 1], [0.9, 0.5], ["ne\u0301"] * 2)
    record.save()
    run_label(tmp_path, "index,label\n3,do\u0308g\n1,N\u00e9\n")
    assert [row["answer"] for row in record.load(record.path).queries] == ["d\u00f6g", "ne\u0301"]


@pytest.mark.parametrize(
    ("label", "hint"), [("catt", "did you mean 'cat'?"), ("Big bird", "is it a new one, --new_class 'Big bird'?")]
)
def test_unknown_class_name_gets_a_suggestion(pool, tmp_path, capsys, label, hint):
    with pytest.raises(SystemExit):
        run_label(tmp_path, f"index,label\n3,{label}\n")
    assert f"line 2: {label!r} is none of cat, dog, unknown: {hint}" in capsys.readouterr().err


def test_error_lists_only_the_first_of_many_classes(tmp_path, capsys):
    record = PoolRecord(tmp_path / "pool.json", {"classes": [f"class {k}" for k in range(1000)]})
    record.add_query([3], [0.9], ["class 1"])
    record.save()
    with pytest.raises(SystemExit):
        run_label(tmp_path, "index,label\n3,cow\n")
    assert "class 19 and 981 more: is it a new one" in capsys.readouterr().err


def test_index_shared_by_two_files_is_refused_without_the_path(tmp_path, capsys):
    record = PoolRecord(tmp_path / "pool.json", {"classes": ["cat", "dog"]})
    record.add_query([3, 4, 5], [0.9, 0.5, 0.1], ["cat"] * 3, ["a.png", "b.png", "c.png"])
    record.queries[0]["asked_as"] = [2]
    record.queries[1]["asked_as"] = [3]
    record.save()
    with pytest.raises(SystemExit):
        run_label(tmp_path, "index,label\n3,cat\n")
    assert "index 3 was that of 'a.png' and 'b.png', as files were added or removed: keep the column path" in (
        capsys.readouterr().err
    )
    run_label(tmp_path, "index,label\n2,cat\n4,dog\n")
    run_label(tmp_path, "index,path,label\n3,b.png,dog\n3,a.png,cat\n5,c.png,unknown\n")
    assert [row["answer"] for row in record.load(record.path).queries] == ["cat", "dog", "unknown"]
