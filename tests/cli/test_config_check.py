"""A config file with a doubled key or invalid YAML is refused with its name and line."""

import pytest

from lightning_kd.cli import get_cli, main
from lightning_kd.cli.config_check import check_config
from lightning_kd.cli.config_names import config_names, config_path

TWICE = "trainer:\n  max_epochs: 3\nmodel: {a: 1}\ntrainer:\n  devices: 1\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TWICE, "names trainer twice, in lines 1 and 4, and YAML takes the last alone"),
        ("a:\n  b: 1\n  c: 2\n  b: 3\n", "names a.b twice, in lines 2 and 4"),
        ("a: {b: 1, c: 2, b: 1}\n", "names a.b twice, in lines 1 and 1"),
        ("a:\n- b: 1\n- b: 1\n  b: 2\n", "names a.b twice, in lines 3 and 4"),
        ("a: 1\nb: c: d\n", "is no YAML, in line 2: mapping values are not allowed"),
        ("a: {b: 1\nc: 2\n", "is no YAML, in line [23]: while parsing a flow mapping, "),
        ("a: *b\n", "is no YAML, in line 1: found undefined alias"),
        ("a: \x01\n", r"is no YAML \(.*control characters are not allowed\)|is no YAML \(special characters"),
        ("a: 1\n---\nb: 1\n", "is no YAML, in line 2: expected a single document"),
        ("", "holds no settings"),
        ("- a\n", "holds no settings"),
    ],
)
def test_wrong_config_raises_with_file_and_line(text, message, tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        check_config(str(path))
    assert str(caught.value).startswith(f"{path} ")
    assert "\n" not in str(caught.value)
    assert "string>" not in str(caught.value)


def test_config_in_another_encoding_raises(tmp_path):
    (tmp_path / "my.yaml").write_bytes("a: é\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"my.yaml is no text in UTF-8 \(.*\): save it as UTF-8"):
        check_config(str(tmp_path / "my.yaml"))


def test_valid_and_shipped_configs_pass(tmp_path):
    text = "a: &x {b: 1, c: {b: 2}}\nd: {<<: *x, b: 3}\n1: 2\n'1': 3\ne: [{b: 1}, {b: 2}, *x]\n"
    (tmp_path / "my.yaml").write_text(text)
    check_config(str(tmp_path / "my.yaml"))
    for name in config_names():
        check_config(config_path(name))


def test_num_classes_other_than_that_of_the_data_raises():
    words = ["--config", "distillation/student_digits", "--data.fake", "true", "--model.num_classes"]
    with pytest.raises(ValueError, match=r"model\.num_classes=7, but the data has 10 classes: leave it out"):
        get_cli([*words, "7"])
    assert get_cli([*words, "10"]).model.num_classes == 10


@pytest.mark.parametrize("option", [["--config", "my.yaml"], ["--config=my.yaml"], ["-c", "my.yaml"]])
def test_fit_refuses_a_config_with_a_doubled_key(option, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(TWICE)
    with pytest.raises(SystemExit):
        main(["fit", "--config", "distillation/teacher_digits", *option])
    error = capsys.readouterr().err
    assert error.startswith("error: my.yaml names trainer twice, in lines 1 and 4")
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["my.yaml"]
    with pytest.raises(ValueError, match="names trainer twice"):
        get_cli(["--config", "my.yaml"])
