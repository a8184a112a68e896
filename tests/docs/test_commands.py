"""Every command that README, a guide or a method's page shows is valid, and runs."""

import re

import pytest

from tests.conftest import ROOT
from tests.docs.command_order import TypedCommands
from tests.docs.option_check import check
from tests.docs.pages import METHOD_PAGES, WRITTEN_PAGES, commands_of, run_by_bash, without_repeats
from tests.docs.smoke_run import make_files, run

# placeholders in commands, and what replaces them
FILLED_IN = {"TEACHER": "resnet20", "RUN": "runs/mine"}
# runs that the reader is assumed to have
ASSUMED_RUNS = ["runs/mine", "runs/strong"]
EXTRAS = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)  # of pip, among other lists
OTHER_PAGES = [page for page in [*WRITTEN_PAGES, *METHOD_PAGES] if page != "README.md" and commands_of(page)]


def filled(words):
    return [re.sub("|".join(rf"\b{name}\b" for name in FILLED_IN), lambda found: FILLED_IN[found[0]], w) for w in words]


def wrong_commands(page):
    """The commands of a page that are wrong, with the reason."""
    typed, found = TypedCommands(ASSUMED_RUNS), []
    for command in without_repeats(commands_of(page)):
        words = filled(command.words)
        try:
            if command.program == "lightning-kd":
                typed.add(words)
            elif command.program == "make":
                assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), "no such target"
            elif command.program == "pip":
                for extra in re.findall(r"\[([\w,]+)\]", " ".join(words)):
                    assert {*extra.split(",")} <= {*EXTRAS}, "no such extra"
        except (ValueError, AssertionError, OSError) as error:
            found.append(f"{command}: {error}")
    return found


@pytest.mark.parametrize("page", [*WRITTEN_PAGES, *METHOD_PAGES])
def test_each_command_of_a_page_is_valid_and_has_what_it_needs(page):
    assert not wrong_commands(page)


@pytest.mark.parametrize("page", ["README.md", *(pytest.param(page, marks=pytest.mark.slow) for page in OTHER_PAGES)])
def test_each_command_of_a_page_runs(page, tmp_path):
    make_files(tmp_path)
    runs = {}
    for command in without_repeats(commands_of(page)):
        words = filled(command.words)
        if command.program == "lightning-kd":
            output = run(words, check(words, runs, ASSUMED_RUNS), tmp_path)
            assert not output, f"{command}\n{output}"


@pytest.mark.parametrize("word", FILLED_IN)
def test_each_placeholder_occurs_on_a_page(word):
    assert any(word in part for page in WRITTEN_PAGES for command in commands_of(page) for part in command.words)


@pytest.mark.parametrize("name", ASSUMED_RUNS)
def test_each_assumed_run_occurs_on_a_page(name):
    shown = [" ".join(filled(command.words)) for page in WRITTEN_PAGES for command in commands_of(page)]
    assert any(name in words for words in shown)


def test_commands_without_what_they_need_or_over_an_earlier_run_raise():
    typed, kd = TypedCommands(ASSUMED_RUNS), "fit --config distillation/kd_digits"
    with pytest.raises(ValueError, match="no earlier command of the page makes runs/teacher_digits"):
        typed.add(f"{kd} --run runs/early".split())
    typed.add(["fit", "--config", "distillation/teacher_digits"])
    typed.add(kd.split())
    with pytest.raises(ValueError, match="trained in this folder"):
        typed.add([*kd.split(), "--model.temperature", "2"])
    typed.add([*kd.split(), "--overwrite"])
    stored = [*kd.split(), "--model.teacher_store", "runs/teacher_digits/network.store", "--run"]
    with pytest.raises(ValueError, match="no teach of the page makes runs/teacher_digits"):
        typed.add([*stored, "runs/a"])
    typed.add(["teach", "--config", "distillation/kd_digits"])
    typed.add([*stored, "runs/b"])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("fitt --config distillation/kd_digits", "no verb 'fitt'"),
        ("fit --config distillation/kd_digit", "no config 'distillation/kd_digit'"),
        ("test --config runs/kd_digits/config.yaml --ckpt_path last", "no config 'runs/kd_digits/config.yaml'"),
        ("fit --config distillation/kd_digits --model.temprature 4", "KD has no 'temprature'"),
        ("fit --config distillation/kd_digits --model DHKD --model.hads 1", "DHKD has no 'hads'"),
        ("fit --config distillation/kd_digits --model.optimizer.init_args.rate 1", "SGD has no 'rate'"),
        ("fit --config noisy_labels/dpc_digits --data.noise.rates 0.2", "'rates'"),
        ("fit --config distillation/kd_digits --model.student cnn_small", "no network 'cnn_small'"),
        ("fit --config distillation/kd_digits --trainer.epochs 3", "Trainer has no trainer.epochs"),
        ("fit --config distillation/kd_digits --dtype float32", "fit has no option --dtype"),
        ("fit --model.help DHHKD", "DHHKD"),
        ("compare runs/a --metrics test/acc", "compare"),
        ("claim dhkdd", "no claim 'dhkdd'"),
        ("label runs/mine/query_00.csv --corect", "label"),
        ("list distillation/kd_digit", "distillation/kd_digit"),
    ],
)
def test_unknown_verbs_configs_options_and_names_raise(words, reason):
    with pytest.raises((ValueError, OSError), match=reason):
        check(words.split(), {}, ASSUMED_RUNS)


def test_predict_takes_data_predict_and_sort_and_test_does_not():
    check(["fit", "--help"], {}, [])
    check(["predict", "--config", "distillation/kd_digits", "--data.predict", "photos", "--sort", "confidence"], {}, [])
    with pytest.raises(ValueError, match="has no 'predict'"):
        check(["test", "--config", "distillation/kd_digits", "--data.predict", "photos"], {}, [])


def test_options_are_checked_against_the_model_of_an_earlier_run():
    runs = {}
    check(
        ["fit", "--config", "distillation/kd_digits", "--model", "DHKD", "--model.heads", "1", "--run", "runs/a"],
        runs,
        [],
    )
    check(["fit", "--config", "runs/a/config.yaml", "--model.heads", "2", "--overwrite"], runs, [])
    with pytest.raises(ValueError, match="DHKD has no 'alpha'"):
        check(["fit", "--config", "runs/a/config.yaml", "--model.alpha", "2", "--overwrite"], runs, [])


def test_bash_expands_variables_loops_and_patterns_to_commands(tmp_path):
    block = """
    small="--config a --x 1"   # two words
    for s in 0 1; do
      lightning-kd fit $small \\
        --run runs/s$s --name "two words"
    done; lightning-kd compare runs/s?  # and more
    head -n 2 runs/s0/metrics.csv > some.csv
    """
    fits = [("fit", "--config", "a", "--x", "1", "--run", f"runs/s{s}", "--name", "two words") for s in "01"]
    expected = [("lightning-kd", words) for words in [*fits, ("compare", "runs/s0", "runs/s1")]]
    assert run_by_bash(block, tmp_path) == [*expected, ("head", ("-n", "2", "runs/s0/metrics.csv"))]


@pytest.mark.parametrize("block", ["lightning-kd fit --run $nothing", "lightning_kd fit", "for s in 0; do"])
def test_blocks_that_bash_cannot_run_raise(tmp_path, block):
    with pytest.raises(AssertionError, match=r"nothing|lightning_kd|syntax"):
        run_by_bash(block, tmp_path)
