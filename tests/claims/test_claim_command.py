"""``lightning-kd claim`` with fake runs."""

import json
from pathlib import Path

import pytest
from matplotlib.image import imread

from lightning_kd.cli import claim_command, main
from tests.claims.fake_runs import CLAIM, FakeRunner, value_of

RUNS = Path("runs/claims/mine")


@pytest.fixture
def runner(monkeypatch):
    Path("mine.yaml").write_text(CLAIM)
    runner = FakeRunner()
    monkeypatch.setattr(claim_command, "run_jobs", runner)
    return runner


def error_of(capsys, *words, code=1):
    with pytest.raises(SystemExit) as end:
        main(["claim", *words])
    assert end.value.code == code
    return capsys.readouterr().err


def test_the_claims_are_listed(capsys):
    main(["claim"])
    out = capsys.readouterr().out
    main(["claim", "list"])
    assert capsys.readouterr().out == out
    assert "  dhkd " in out
    assert "min  A student" in out


def test_claim_prints_and_writes_its_results(runner, capsys):
    main(["claim", "mine.yaml"])
    out = capsys.readouterr().out
    names = [f"{setting}_seed{seed}" for seed in range(3) for setting in ("teacher", "plain", "taught")]
    assert list(dict.fromkeys(Path(words[words.index("--run") + 1]).name for words in runner.done)) == names
    assert (RUNS / "claim.md").read_text() in out
    assert "| taught > plain | +10.10       | +9.85 to +10.35 | holds   |" in out  # of 10, 10.1, 10.2: +- 0.248
    assert "| plain   | 3   | 51.00  | 1.00  | 50, 51, 52" in out
    result = json.loads((RUNS / "claim.json").read_text())
    assert result["settings"]["taught"]["values"] == pytest.approx(
        [value_of(Path(f"taught_seed{s}")) for s in range(3)]
    )
    assert result["expected"][0]["interval"] == pytest.approx([0.0985159, 0.1034841], abs=1e-6)
    assert result["expected"][0]["verdict"] == "holds"
    assert result["versions"]["torch"] == "2.6.0"
    assert "cores" in result["machine"]
    assert imread(RUNS / "claim.png").shape[1] > 500


def test_finished_runs_are_not_repeated(runner, capsys):
    main(["claim", "mine.yaml", "--seeds", "2"])
    count = len(runner.done)
    main(["claim", "mine.yaml", "--seeds", "2"])
    assert len(runner.done) == count
    main(["claim", "mine.yaml", "--seeds", "1", "4"])
    assert {words[words.index("--run") + 1] for words in runner.done[count:]} == {
        f"{RUNS}/{name}_seed4" for name in ("teacher", "plain", "taught")
    }
    assert json.loads((RUNS / "claim.json").read_text())["seeds"] == [1, 4]


def rewrite_record(name, **entry):
    """Leave only the fit in the record of a run, with these entries."""
    file = RUNS / name / "run.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record["history"][0], "history": [], **entry}))


@pytest.mark.parametrize(
    ("checkpoint", "end"), [(True, ["--ckpt_path", "last"]), (False, ["--overwrite"])], ids=["with", "without"]
)
def test_interrupted_run_is_resumed_or_begun_anew(runner, checkpoint, end):
    main(["claim", "mine.yaml", "--seeds", "2"])
    runner.done.clear()
    rewrite_record("plain_seed1", outcome="running")
    if not checkpoint:
        (RUNS / "plain_seed1/checkpoints/last.ckpt").unlink()
    main(["claim", "mine.yaml", "--seeds", "2"])
    assert [words[0] for words in runner.done] == ["fit", "test"]
    assert runner.done[0][-len(end) :] == end
    main(["claim", "mine.yaml", "--seeds", "2"])  # the options that resumed it do not make it another command
    assert len(runner.done) == 2


def test_run_without_its_test_is_only_tested(runner):
    main(["claim", "mine.yaml", "--seeds", "1"])
    runner.done.clear()
    rewrite_record("taught_seed0")
    main(["claim", "mine.yaml", "--seeds", "1"])
    assert [words[0] for words in runner.done] == ["test"]


def test_runs_of_another_command_raise_unless_overwritten(runner, capsys):
    main(["claim", "mine.yaml", "--seeds", "1"])
    count = len(runner.done)
    err = error_of(capsys, "mine.yaml", "--seeds", "1", "--data.batch_size", "8")
    assert f"{RUNS}/teacher_seed0 was made by another command" in err
    assert len(runner.done) == count
    main(["claim", "mine.yaml", "--seeds", "1", "--data.batch_size", "8", "--overwrite"])
    fits = [words for words in runner.done[count:] if words[0] == "fit"]
    assert all(words[-1] == "--overwrite" and "--data.batch_size" in words for words in fits)
    assert len(fits) == 3


def test_failed_run_ends_the_claim_and_finished_runs_are_kept(runner, capsys):
    RUNS.mkdir(parents=True)
    (RUNS / "fail").write_text("plain_seed1")
    err = error_of(capsys, "mine.yaml")
    assert "plain_seed1 failed: it diverged; the runs that are done are kept" in err
    assert not (RUNS / "claim.json").exists()
    assert (RUNS / "taught_seed0/run.json").is_file()


def test_claim_that_does_not_hold_is_no_error(runner, capsys):
    Path("mine.yaml").write_text(CLAIM.replace("taught > plain", "taught < plain"))
    main(["claim", "mine.yaml"])
    assert "does not hold" in capsys.readouterr().out


def test_metric_that_no_run_has_is_an_error(runner, capsys):
    Path("mine.yaml").write_text(CLAIM.replace("metric: test/acc", "metric: test/map"))
    assert "plain_seed0 has no test/map; recorded are test/acc, val/acc" in error_of(capsys, "mine.yaml")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["dhdk"], "there is no claim 'dhdk': did you mean dhkd?"),
        (["mine.yaml", "--jobs", "0"], "jobs must be at least 1, got 0"),
        (["mine.yaml", "--seeds", "0"], "seeds must be at least 1, got 0"),
        (["list", "--data.root", "d"], "claim list takes no options"),
    ],
)
def test_wrong_options_are_refused_before_any_run(runner, capsys, words, sentence):
    assert sentence in error_of(capsys, *words)
    assert not runner.done
    assert not RUNS.exists() or not list(RUNS.iterdir())


def test_unknown_config_is_refused_before_any_run(runner, capsys):
    Path("mine.yaml").write_text(CLAIM.replace("kd_digits", "kd_digit"))
    assert "did you mean distillation/kd_digits" in error_of(capsys, "mine.yaml")
    assert not runner.done


@pytest.mark.slow
def test_real_claim_runs_after_a_wrong_option_was_refused(capsys):
    Path("mine.yaml").write_text(CLAIM)
    smoke = ["--config", "_overlay/smoke", "--seeds", "2", "--jobs", "2"]
    assert "nothing was run, as the command of teacher failed" in error_of(capsys, "mine.yaml", *smoke, "--data.x", "1")
    main(["claim", "mine.yaml", *smoke])
    assert "| taught > plain |" in capsys.readouterr().out
    records = [json.loads(path.read_text()) for path in RUNS.glob("*/run.json")]
    assert len(records) == 6
    assert all(record["outcome"] == "finished" for record in records)
