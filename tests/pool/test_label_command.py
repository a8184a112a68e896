"""A person's answers: taken all together, or not at all."""

import subprocess
import sys

import pytest

from lightning_kd.cli import main
from lightning_kd.pool import PoolRecord


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
