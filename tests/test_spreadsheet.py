"""Names that a spreadsheet would take for formulas are written with a leading quote, and read back without it."""

import csv
import io
from pathlib import Path

import pytest
import torch

from lightning_kd import SingleLabel
from lightning_kd.data import LabelFile
from lightning_kd.noisy_labels.label_scores import LabelScores
from lightning_kd.pool import PoolRecord
from lightning_kd.pool.label_command import take_answers
from lightning_kd.spreadsheet import csv_text, read_rows

FORMULAS = [
    "=1+1",
    "+cmd",
    "-dog",
    "@SUM(A1)",
    "\tcat",
    "\rcat",
    "\ncat",
    "-",
    "'=x",
    "''-5",
    "-1a",
    '=HYPERLINK("a,b")',
]
PLAIN = ["cat", "'cat'", "'", "a=b", "c, d", 'say "x"', "é", "", "x\ry", "x\r\ny", "'1"]
NUMBERS = [-1, -0.5, "-1.5e-07", "+3", "-inf", "nan", "-0.5;-0.25;", "1"]


@pytest.mark.parametrize("text", FORMULAS + PLAIN)
def test_names_are_read_back_as_written(text, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(csv_text([["index", "label"], [0, text], [1, "other"]]), newline="")
    assert [cells for _, cells in read_rows(path)] == [["index", "label"], ["0", text], ["1", "other"]]


@pytest.mark.parametrize("text", FORMULAS)
def test_formulas_are_written_with_a_leading_quote(text):
    (row,) = csv.reader(io.StringIO(csv_text([[text]]), newline=""))
    assert row == [f"'{text}"]


def test_numbers_and_plain_text_are_written_unchanged():
    assert csv_text([NUMBERS]) == "-1,-0.5,-1.5e-07,+3,-inf,nan,-0.5;-0.25;,1\n"
    assert csv_text([["a", None, 'b "c"'], [1, "d,e", 0.25]]) == 'a,,"b ""c"""\n1,"d,e",0.25\n'


def test_label_file_takes_formula_like_names_with_and_without_a_quote(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("=dog\n'=dog\n-1cat\n")  # the first and the last without a leading quote
    assert LabelFile(str(path)).corrupt([0, 0, 0], ["=dog", "-1cat"]).tolist() == [0, 0, 1]
    path.write_text("-1\n")
    with pytest.raises(ValueError, match="must be between 0 and 1, got -1"):
        LabelFile(str(path)).corrupt([0], ["a", "b"])


def test_noisy_labels_csv_quotes_formula_like_file_names(tmp_path):
    n, index = 2, torch.arange(2)
    scores = LabelScores(index, index, index, torch.tensor([-0.5, 0.25]), torch.zeros(n), torch.ones(n).double())
    scores.write(tmp_path / "noisy_labels.csv", ["=a.png", "b.png"])
    lines = (tmp_path / "noisy_labels.csv").read_text().splitlines()
    assert lines[1:] == ["0,0,0,1,-0.5,'=a.png", "1,1,1,1,0.25,b.png"]


def test_predictions_quote_formula_like_class_names():
    outputs = {"prediction": torch.tensor([0]), "probabilities": torch.tensor([[0.75, 0.25]])}
    columns = SingleLabel(2).columns(outputs, ["=cat", "dog"])
    text = csv_text([list(columns), [values[0] for values in columns.values()]])
    assert text.splitlines()[1].split(",")[:2] == ["0", "'=cat"]


@pytest.mark.parametrize("written", ["-cat", "'-cat", "-CAT"])
def test_answers_with_formula_like_class_names_are_stored_unquoted(written, tmp_path):
    record = PoolRecord(tmp_path / "pool.json", {"classes": ["-cat", "dog"]})
    record.add_query([3], [0.9], ["-cat"], ["@x/3.png"])
    record.save()
    Path(tmp_path / "answers.csv").write_text(f"index,path,label\n3,'@x/3.png,{written}\n")
    take_answers(tmp_path / "answers.csv", tmp_path)
    assert [row["answer"] for row in PoolRecord.load(tmp_path / "pool.json").queries] == ["-cat"]
