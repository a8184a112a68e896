import json
from pathlib import Path

from lightning_kd.quickstart import quickstart


def test_quickstart_trains_compares_and_goes_on(capsys):
    smoke = ["--trainer.max_epochs", "2", "--trainer.limit_train_batches", "2", "--trainer.accelerator", "cpu"]
    folder = Path("runs/quickstart")
    quickstart(folder, seeds=(0,), extra=smoke)
    out = capsys.readouterr().out
    for name in ("teacher", "student_alone", "student_dhkd"):
        assert json.loads((folder / f"{name}_seed0/run.json").read_text())["outcome"] == "finished"
        assert f"| {name}" in out
    assert (folder / "compare/compare.png").stat().st_size > 5000
    assert "$ lightning-kd fit --config distillation/dhkd_digits" in out
    quickstart(folder, seeds=(0,), extra=smoke)
    assert "$ lightning-kd fit" not in capsys.readouterr().out  # nothing is trained twice
    record = json.loads((folder / "student_dhkd_seed0/run.json").read_text())
    (folder / "student_dhkd_seed0/run.json").write_text(json.dumps({**record["history"][0], "history": [record]}))
    quickstart(folder, seeds=(0,), extra=smoke)
    out = capsys.readouterr().out
    assert "$ lightning-kd test" in out  # a test of an earlier fit does not count
    assert "$ lightning-kd fit" not in out
