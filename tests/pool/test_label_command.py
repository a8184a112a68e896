"""A person's answers: taken all together, or not at all."""

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


def answer(tmp_path, text):
    (tmp_path / "answers.csv").write_text(text)
    main(["label", str(tmp_path / "answers.csv")])


def answers(path):
    return {row["index"]: (row["answer"], row["by"]) for row in PoolRecord.load(path).queries}


def test_takes_answers(pool, tmp_path, capsys):
    answer(tmp_path, "index,label\n3,cat\n1,unknown\n8,\n")
    assert answers(pool) == {3: ("cat", "person"), 1: ("unknown", "person"), 8: (None, None)}
    assert "1 samples still wait" in capsys.readouterr().out
    answer(tmp_path, "index,path,label\n3,x/3.png,cat\n8,x/8.png,dog\n")  # the first one again
    assert answers(pool)[8] == ("dog", "person")
    assert "2 answers, 0 of them unknown, 1 of them known before; 1 new" in capsys.readouterr().out


def test_everything_wrong_is_told_at_once_and_nothing_taken(pool, tmp_path, capsys):
    answer(tmp_path, "index,label\n8,dog\n")
    before = pool.read_text()
    wrong = (
        "index,path,label\n3,x/3.png,cow\n1,x/1.png,dog\n1,x/1.png,dog\n5,,cat\nx,,cat\n8,x/8.png,cat\n3,x/4.png,cat\n"
    )
    with pytest.raises(SystemExit):
        answer(tmp_path, wrong)
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
def test_files_without_answers(pool, tmp_path, capsys, text, message):
    with pytest.raises(SystemExit):
        answer(tmp_path, text)
    assert message in capsys.readouterr().err


def test_missing_files(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["label", "none.csv"])
    assert "there is no pool.json: name the folder of the run with --run" in capsys.readouterr().err
    PoolRecord(tmp_path / "pool.json", {"classes": ["cat"]}).save()
    with pytest.raises(SystemExit):
        main(["label", "none.csv", "--run", str(tmp_path)])
    assert "none.csv does not exist" in capsys.readouterr().err


def test_as_a_spreadsheet_saves_it(pool, tmp_path):
    (tmp_path / "answers.csv").write_bytes("\ufeffindex,label\r\n3, cat \r\n".encode())
    main(["label", str(tmp_path / "answers.csv"), "--run", str(tmp_path)])
    assert answers(pool)[3] == ("cat", "person")


@pytest.mark.parametrize("separator", [";", "\t", ","])
def test_as_somebody_typed_it(pool, tmp_path, separator):
    rows = [" Index ", "Path", "LABEL", "remark"], ["3", "x/3.png", "Cat", ""], ["1", "x/1.png", " UNKNOWN "]
    text = "\r\n".join(separator.join(row) for row in rows)
    (tmp_path / "answers.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    main(["label", str(tmp_path / "answers.csv")])
    assert answers(pool) == {3: ("cat", "person"), 1: ("unknown", "person"), 8: (None, None)}


def test_does_not_wait_for_torch():
    code = "import sys, lightning_kd.cli, lightning_kd.pool.label_command; print(int('torch' in sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "0\n"


def rows_of(path):
    return {row["index"]: row for row in PoolRecord.load(path).queries}


def test_what_came_in_is_told_by_class(pool, tmp_path, capsys):
    answer(tmp_path, "index,label\n3,cat\n1,unknown\n8,\n")
    assert "by class: cat 1, unknown 1; open: 1\n" in capsys.readouterr().out


def test_what_is_unusual_in_a_file_is_told(pool, tmp_path, capsys):
    text = 'Label;remark;INDEX\r\nC at;x;3\r\n"CAT  ";;1\r\ndog;;8\r\n'
    (tmp_path / "answers.csv").write_bytes(b"\xef\xbb\xbf" + text.replace("C at", "cAt").encode())
    main(["label", str(tmp_path / "answers.csv")])
    out = capsys.readouterr().out
    assert (
        "read: cells separated by semicolons; a byte order mark; Windows line ends; columns not looked at: rem" in out
    )
    assert "; 2 labels spelled with other case or spaces than the class\n" in out
    answer(tmp_path, "index,label\n3,cat\n")
    assert "read:" not in capsys.readouterr().out


def test_a_column_that_comes_twice_is_refused(pool, tmp_path, capsys):
    with pytest.raises(SystemExit):
        answer(tmp_path, "index,label,Label\n3,cat,dog\n")
    assert "names the column 'label' twice" in capsys.readouterr().err


def correct(tmp_path, text):
    (tmp_path / "answers.csv").write_text(text)
    main(["label", str(tmp_path / "answers.csv"), "--correct"])


def test_answers_are_corrected_and_the_old_ones_kept(pool, tmp_path, capsys):
    answer(tmp_path, "index,label\n3,cat\n1,dog\n")
    capsys.readouterr()
    correct(tmp_path, "index,label\n3,dog\n1,\n8,cat\n")
    assert "2 answers, 0 of them unknown; 1 new, 1 changed, 1 removed" in capsys.readouterr().out
    assert answers(pool) == {3: ("dog", "person"), 1: (None, None), 8: ("cat", "person")}
    correct(tmp_path, "index,label\n3,cat\n1,unknown\n")
    found = rows_of(pool)
    assert found[3]["history"] == [{"answer": "cat", "by": "person"}, {"answer": "dog", "by": "person"}]
    assert (found[1]["history"], found[1]["answer"]) == ([{"answer": "dog", "by": "person"}], "unknown")
    assert "history" not in found[8]
    before = pool.read_text()
    correct(tmp_path, "index,label\n3,cat\n1,unknown\n")  # again
    assert pool.read_text() == before


def test_only_correct_changes_an_answer(pool, tmp_path, capsys):
    answer(tmp_path, "index,label\n3,cat\n")
    before = pool.read_text()
    with pytest.raises(SystemExit):
        answer(tmp_path, "index,label\n3,dog\n")
    assert "(--correct changes it)" in capsys.readouterr().err
    answer(tmp_path, "index,label\n3,cat\n8,\n")
    assert pool.read_text() == before


def test_an_oracle_is_not_corrected(pool, tmp_path, capsys):
    record = PoolRecord.load(pool)
    record.add_answers({3: "cat"}, "oracle")
    record.save()
    with pytest.raises(SystemExit):
        correct(tmp_path, "index,label\n3,dog\n1,dog\n")
    assert "index 3 was answered 'cat' by the oracle" in capsys.readouterr().err
    assert answers(pool)[1] == (None, None)


def test_a_record_from_before_a_correction_is_not_written(pool, tmp_path):
    answer(tmp_path, "index,label\n3,cat\n")
    old = PoolRecord.load(pool)
    correct(tmp_path, "index,label\n3,\n")
    with pytest.raises(ValueError, match="would be lost"):
        old.save()


def with_new_class(tmp_path, text, *names):
    (tmp_path / "answers.csv").write_text(text)
    main(["label", str(tmp_path / "answers.csv"), *(word for name in names for word in ("--new_class", name))])


def test_a_new_class(pool, tmp_path, capsys):
    for _ in range(2):  # a command may be given again
        with_new_class(tmp_path, "index,label\n3,bird\n1,dog\n", "bird")
        assert PoolRecord.load(pool).settings == {"classes": ["cat", "dog", "bird"], "new_classes": ["bird"]}
    assert "'bird': known from now on. The next fit has 3 classes" in capsys.readouterr().out
    answer(tmp_path, "index,label\n8,Bird\n")
    assert answers(pool) == {3: ("bird", "person"), 1: ("dog", "person"), 8: ("bird", "person")}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["bird", "cow"], "no line is labelled 'cow', the new class"),
        (["Dog"], "--new_class 'Dog' must be a new name"),
        (["unknown"], "--new_class 'unknown' must be a new name"),
        ([" "], "--new_class '' must be a new name"),
        (["horse"], "--new_class 'horse' must be a new name"),  # another class of the source
    ],
)
def test_no_new_class(pool, tmp_path, capsys, names, message):
    record = PoolRecord.load(pool)
    record.settings["others"] = ["horse"]
    record.save()
    before = pool.read_text()
    with pytest.raises(SystemExit):
        with_new_class(tmp_path, "index,label\n3,bird\n1,dog\n", *names)
    assert message in capsys.readouterr().err
    assert pool.read_text() == before


def test_a_benchmark_has_no_new_class(pool, tmp_path, capsys):
    record = PoolRecord.load(pool)
    record.settings["samples"] = 10
    record.save()
    with pytest.raises(SystemExit):
        with_new_class(tmp_path, "index,label\n3,bird\n", "bird")
    assert "name the known_classes of the data instead" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        answer(tmp_path, "index,label\n3,bird\n")
    assert "'bird' is none of cat, dog, unknown\n" in capsys.readouterr().err


def test_names_of_files_that_are_no_utf8_or_end_in_blanks(tmp_path):
    paths = ["caf\udce9.png", " b .png "]
    record = PoolRecord(tmp_path / "pool.json", {"classes": ["cat", "dog"]})
    record.add_query([0, 1], [0.9, 0.5], ["cat", "dog"], paths)
    record.save()
    rows = [["index", "path", "label"], *([k, path, "cat"] for k, path in enumerate(paths))]
    write_text(tmp_path / "answers.csv", csv_text(rows))
    main(["label", str(tmp_path / "answers.csv")])
    assert {row["answer"] for row in PoolRecord.load(tmp_path / "pool.json").queries} == {"cat"}


@pytest.mark.parametrize("line", ["3,x/3.png,0.9,cat,cat, big", "3,x/3.png,0,9,cat,"])
def test_a_line_of_more_cells_than_columns_is_refused(pool, tmp_path, capsys, line):
    with pytest.raises(SystemExit):
        answer(tmp_path, f"index,path,score,predicted,label\n{line}\n")
    assert "line 2 has 6 cells, the first line 5: put a cell with separators in quotes" in capsys.readouterr().err
    assert answers(pool)[3] == (None, None)


def test_whole_numbers_as_programs_write_them_beside_empty_cells(tmp_path):
    record = PoolRecord(tmp_path / "pool.json", {"classes": ["1", "2", "3.0"]})
    record.add_query([3, 1, 8], [0.9, 0.5, 0.1], ["1"] * 3)
    record.save()
    answer(tmp_path, "index,label\n3.0,1.0\n1.0,2.00\n8,3.0\n")
    assert [row["answer"] for row in record.load(record.path).queries] == ["1", "2", "3.0"]


def test_letters_with_marks_in_one_piece_or_two(tmp_path):
    record = PoolRecord(tmp_path / "pool.json", {"classes": ["d\u00f6g", "ne\u0301"]})
    record.add_query([3, 1], [0.9, 0.5], ["ne\u0301"] * 2)
    record.save()
    answer(tmp_path, "index,label\n3,do\u0308g\n1,N\u00e9\n")
    assert [row["answer"] for row in record.load(record.path).queries] == ["d\u00f6g", "ne\u0301"]


@pytest.mark.parametrize(
    ("label", "hint"), [("catt", "did you mean 'cat'?"), ("Big bird", "is it a new one, --new_class 'Big bird'?")]
)
def test_what_a_wrong_name_may_mean_is_told(pool, tmp_path, capsys, label, hint):
    with pytest.raises(SystemExit):
        answer(tmp_path, f"index,label\n3,{label}\n")
    assert f"line 2: {label!r} is none of cat, dog, unknown: {hint}" in capsys.readouterr().err


def test_many_classes_are_not_all_told(tmp_path, capsys):
    record = PoolRecord(tmp_path / "pool.json", {"classes": [f"class {k}" for k in range(1000)]})
    record.add_query([3], [0.9], ["class 1"])
    record.save()
    with pytest.raises(SystemExit):
        answer(tmp_path, "index,label\n3,cow\n")
    assert "class 19 and 981 more: is it a new one" in capsys.readouterr().err


def test_an_index_that_was_that_of_two_files_needs_the_path(tmp_path, capsys):
    record = PoolRecord(tmp_path / "pool.json", {"classes": ["cat", "dog"]})
    record.add_query([3, 4, 5], [0.9, 0.5, 0.1], ["cat"] * 3, ["a.png", "b.png", "c.png"])
    record.queries[0]["asked_as"] = [2]
    record.queries[1]["asked_as"] = [3]
    record.save()
    with pytest.raises(SystemExit):
        answer(tmp_path, "index,label\n3,cat\n")
    assert "index 3 was that of 'a.png' and 'b.png', as files were added or removed: keep the column path" in (
        capsys.readouterr().err
    )
    answer(tmp_path, "index,label\n2,cat\n4,dog\n")
    answer(tmp_path, "index,path,label\n3,b.png,dog\n3,a.png,cat\n5,c.png,unknown\n")
    assert [row["answer"] for row in record.load(record.path).queries] == ["cat", "dog", "unknown"]
