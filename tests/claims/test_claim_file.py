"""Reading the file of a claim, and the errors in it."""

from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from lightning_kd.claims.claim_file import read_claim, seeds_of
from lightning_kd.cli import main
from lightning_kd.cli.config_names import config_folder, config_names
from tests.claims.fake_runs import CLAIM

SHIPPED = sorted((config_folder() / "claims").glob("*.yaml"))


def written(tmp_path, **changes):
    content = yaml.safe_load(CLAIM)
    for key, value in changes.items():
        content[key] = value
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}, sort_keys=False))
    return path


def test_commands_of_a_setting_have_seed_folder_and_options(tmp_path):
    claim = read_claim(written(tmp_path, shared="--data.seed {seed}"))
    fit, test = claim.commands("taught", 2, Path("r"), ["--data.root", "d"])
    assert fit[:3] == ["fit", "--config", "distillation/kd_digits"]
    assert fit[3:7] == ["--model.teacher_weights", "r/teacher_seed2/network.pt", "--data.seed", "2"]
    assert fit[7:] == ["--run", "r/taught_seed2", "--seed_everything", "2", "--data.root", "d"]
    assert test == ["test", "--config", "r/taught_seed2/config.yaml", "--ckpt_path", "last", "--run", "r/taught_seed2"]
    assert claim.needs("taught") == ["teacher"]
    assert claim.needs("plain") == []
    assert (claim.seeds, str(claim.expected[0])) == ((0, 1, 2), "taught > plain")


FIT = "fit --config distillation/student_digits"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metric": None}, "there is no metric"),
        ({"metrics": "test/acc"}, "'metrics' is not a key of a claim"),
        ({"claim": ""}, "claim must be a text, got ''"),
        ({"minutes": -1}, "minutes must be above 0, got -1"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"seeds": [1, 1]}, r"seeds must be different numbers, got \[1, 1\]"),
        ({"settings": {}}, "settings must be names with commands"),
        ({"settings": {"a-b": FIT}}, "'a-b' cannot be the name of a setting"),
        ({"settings": {"a": []}}, r"a must be a command or a list of them, got \[\]"),
        ({"settings": {"a": "test --ckpt_path last"}}, "a begins with 'test': take fit, active"),
        ({"settings": {"a": [FIT, FIT]}}, "a goes on with 'fit'"),
        ({"settings": {"a": "fit --model DHKD"}}, "a names no --config"),
        ({"settings": {"a": f"{FIT} --run r"}}, "a gives --run, which is set for each run"),
        (
            {"settings": {"a": f"{FIT} --model.weights {{b}}/network.pt", "b": FIT}},
            r"a names \{b\}, .* take seed or run",
        ),
        ({"settings": {"a": f"{FIT} 'open"}}, "is no command"),
        ({"expected": ["taught >= plain"]}, "is no comparison"),
        ({"expected": ["taught > plane"]}, "'plane' is no setting: they are teacher, plain, taught"),
        ({"expected": ["taught > taught"]}, "compares a setting with itself"),
        ({"expected": []}, "expected must be a list of comparisons"),
    ],
)
def test_wrong_claim_file_raises_one_sentence(tmp_path, changes, words):
    with pytest.raises(ValueError, match=f"^{tmp_path}/mine.yaml: .*{words}") as told:
        read_claim(written(tmp_path, **changes))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(("text", "words"), [("a: [", "is no YAML"), ("- a", "holds no claim")])
def test_file_that_is_no_claim_raises(tmp_path, text, words):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_claim(tmp_path / "mine.yaml")


def test_seeds_are_given_by_their_number_or_as_a_list():
    assert seeds_of(3) == (0, 1, 2)
    assert seeds_of([5, 7]) == (5, 7)


def test_claims_of_these_methods_are_shipped():
    assert {path.stem for path in SHIPPED} >= {
        *("dhkd", "dkd", "dpc", "bldr", "dividemix", "elr", "coteaching", "gce", "lfosa", "bual", "dcfs", "k_center"),
        *("sam", "asam", "sos"),
    }
    assert not [name for name in config_names() if name.startswith("claims/")]  # claims are not listed as configs


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_claim_is_short_and_its_commands_parse(path, capsys):
    claim = read_claim(path)
    assert path.read_text().startswith("# ")
    assert claim.minutes <= 15
    assert len(claim.seeds) >= 5
    assert len(claim.sentence) <= 130
    for setting in claim.settings:
        first, *further = claim.commands(setting, 1, Path("r"))
        configs = [word for pair in pairwise(first) if pair[0] == "--config" for word in pair]
        for words in further:  # the config that they name is written by the first: take its configs
            place = words.index("--config")
            words[place : place + 2] = configs
        for words in (first, *further):
            with pytest.raises(SystemExit) as end:
                main([*words, "--print_config"])
            assert end.value.code == 0, capsys.readouterr().err
        assert f"run: r/{setting}_seed1\n" in capsys.readouterr().out
