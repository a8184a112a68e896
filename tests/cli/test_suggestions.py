"""A misspelt verb, option or name gives one sentence with what was probably meant."""

import pytest

from lightning_kd.cli import main
from lightning_kd.cli.suggestions import one_sentence

TEACHER = ["--config", "distillation/teacher_digits"]
DHKD = ["--config", "distillation/dhkd_digits"]


@pytest.mark.parametrize(
    ("words", "status", "expected"),
    [
        (["fitt", *TEACHER], 2, "there is no verb 'fitt': did you mean fit?"),
        (["frobnicate"], 2, "the verbs are fit, validate"),
        (["fit", "--config", "distillation/teacher_digit"], 1, "did you mean distillation/teacher_digits"),
        (["fit", *TEACHER, "--model", "DHKDD"], 2, "--model 'DHKDD' is not known: did you mean DHKD"),
        (["fit", *TEACHER, "--model", "torch.nn.Linearr"], 2, "torch.nn.Linearr"),
        (["fit", *TEACHER, "--data", "DigitDataModule"], 2, "did you mean DigitsDataModule"),
        (["fit", *DHKD, "--model.temperatur", "3"], 2, "did you mean --model.temperature? --model.help DHKD shows"),
        (["fit", *DHKD, "--model.temperature", "hot"], 2, "--model.temperature must be of type float, got hot"),
        (["fit", *TEACHER, "--data.batchsize", "3"], 2, "did you mean --data.batch_size, --data.eval_batch_size?"),
        (["fit", *TEACHER, "--model.optimizer", "SDG"], 2, "--model.optimizer 'SDG' is not known: did you mean SGD?"),
        (["fit", *TEACHER, "--model.optimizer.lrr", "1"], 2, "did you mean --model.optimizer.lr?"),
        (["fit", *TEACHER, "--trainer.callbacks", "SharpnesReport"], 2, "did you mean SharpnessReport?"),
        (["fit", *TEACHER, "--max_epochs", "3"], 2, "did you mean --trainer.max_epochs?"),
        (["fit", *TEACHER, "--batch_size", "3"], 2, "did you mean --data.batch_size?"),
        (["fit", *TEACHER, "--lr", "3"], 2, "did you mean --model.optimizer.lr?"),
        (["fit", *TEACHER, "--modle.temperature", "3"], 2, "did you mean --model.temperature?"),
        (["fit", *TEACHER, "--model.network", "resnet8x5"], 1, "did you mean resnet8x4"),
        (
            ["fit", *TEACHER, "--trainer.max_epochs", "many"],
            2,
            "--trainer.max_epochs must be of type int or null, got m",
        ),
        (["fit", *TEACHER, "--trainer.precision", "17"], 2, "'64', '32', '16', 'bf16' or null, got 17"),
        (["fit", *TEACHER, "--model.loss", "nll"], 2, "--model.loss must be one of 'ce', 'z', got nll\n"),
        (["fit", *TEACHER, "--model.optimizer.lr", "big"], 2, "--model.optimizer.lr must be of type float, got big\n"),
        (
            ["fit", *TEACHER, "--data.noise", "SymmetricNoise"],
            2,
            "--data.noise SymmetricNoise needs rate: give it as --d",
        ),
        (["fit", *TEACHER, "--data.noise", "SymmetricNoise"], 2, "give it as --data.noise.rate, or use a config\n"),
        (
            ["fit", *TEACHER, "--model.network", "resnet8x5", "--trainer.fast_dev_run", "1"],
            1,
            "error: network 'resnet8x",
        ),
        (["fit", "--config", "dkd_digit"], 1, "did you mean distillation/dkd_digits, "),
        (["fit", "--config", "runs/gone/config.yaml"], 1, "nor a shipped config: `lightning-kd list` shows all"),
        (["predict", *TEACHER, "--ckpt_path", "best"], 1, "name the folder of an earlier fit with --run"),
        (["fit", *TEACHER, "extra"], 2, "'extra' belongs to no option"),
        (["fit"], 2, "name a config with --config"),
        (["fit", "--model", "DHKD"], 2, "DHKD needs student, teacher"),
        (["fit", "--config", "distillation/kd_digits", "--model.student", "null"], 2, "KD needs student: give it as"),
        (
            ["fit", "--config", "distillation/kd_digits", "--model.teacher", "[cnn,cnn]"],
            2,
            "--model.teacher must be one name, or a class_path with init_args, got the list ['cnn', 'cnn']: give one",
        ),
    ],
)
def test_misspelling_gives_one_sentence_with_a_suggestion(words, status, expected, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == status
    error = capsys.readouterr().err
    assert expected in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["lr", "learning_rate"])
def test_learning_rate_of_the_model_suggests_that_of_the_optimizer(name, capsys):
    with pytest.raises(SystemExit):
        main(["fit", *TEACHER, f"--model.{name}", "0.01"])
    error = capsys.readouterr().err
    assert f"--model.{name} does not exist" in error
    assert "--model.optimizer SGD --model.optimizer.lr 0.01" in error


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: {class_path: DHKD, init_args: {temperatur: 3}}", "did you mean --model.temperature?"),
        ("modle: {class_path: DHKD}", "--modle.class_path does not exist: did you mean --model.class_path?"),
        ("trainer: {max_epoch: 3}", "--trainer.max_epoch does not exist: did you mean --trainer.max_epochs"),
        ("compose: [distillation/kd_digits]\nmodel: {init_args: {temperature: hot}}", "must be of type float, got hot"),
    ],
)
def test_misspelling_in_a_config_file_gives_a_suggestion(text, expected, capsys, tmp_path):
    (tmp_path / "mine.yaml").write_text(text + "\n")
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "mine.yaml", "--data", "DigitsDataModule"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.endswith(" (in mine.yaml)\n")
    assert error.count("\n") == 1


def test_a_run_folder_that_is_a_file(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        main(["fit", *TEACHER, "--run", "notes.txt"])
    assert capsys.readouterr().err == "error: --run 'notes.txt' is a file: name a folder\n"
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_unrecognised_error_is_kept_on_one_line():
    assert one_sentence("something new\n  and more") == "something new; and more"
