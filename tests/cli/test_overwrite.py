"""``--overwrite`` removes the files that a run wrote, and no others."""

import json
from pathlib import Path

import pytest
import torch

from lightning_kd.cli import main
from lightning_kd.core.run_folder import RunFolder

QUIET = ["--trainer.enable_progress_bar", "false"]
FIT = ["fit", "--config", "distillation/teacher_digits", "--config", "_overlay/smoke", *QUIET, "--run", "x"]
ACTIVE = ["active", "--config", "active_learning/entropy_digits", *QUIET, "--trainer.enable_model_summary", "false"]
ACTIVE += ["--trainer.max_epochs", "1", "--data.rounds", "1", "--run", "x", "--overwrite"]
USER_FILES = ["mine.pt", "notes.txt", "checkpoints/theirs.ckpt", "pictures/holiday.png", "predictions/mine.png"]


def put(folder, *names):
    for name in names:
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("precious")


def content(folder):
    return {
        str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file() and path.name != ".pool.lock"
    }


def refusal(words, capsys):
    """The one line that a command fails with; checks that it leaves all files alone."""
    before = content(".")
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 1
    assert content(".") == before
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("name", ["network.pt", "checkpoints/last.ckpt", "metrics.csv", "pictures/reliability.png"])
def test_overwrite_refuses_a_folder_without_run_json(name, capsys):
    put("x", name)
    error = refusal([*FIT, "--overwrite"], capsys)
    assert f"x holds {name} but no run.json" in error
    assert "move them elsewhere, or name another --run folder" in error


@pytest.mark.parametrize("text", ["[]", '{"distance": 10}', "{"])
def test_run_json_of_another_program_is_refused(text, capsys):
    put("x", "network.pt")
    Path("x/run.json").write_text(text)
    for words in (FIT, [*FIT, "--overwrite"]):
        assert "x/run.json is " in refusal(words, capsys)


def test_overwrite_keeps_files_that_no_run_wrote(tmp_path, capsys):
    own = tmp_path / "own.yaml"
    own.write_text(
        "trainer:\n  callbacks:\n  - class_path: lightning.pytorch.callbacks.ModelCheckpoint\n"
        "    init_args: {monitor: val/acc, mode: max, filename: 'own_{epoch}', save_top_k: -1}\n"
    )
    put("x", *USER_FILES)
    main([*FIT, "--overwrite", "--config", str(own)])
    assert [*Path("x").rglob("own_epoch=*.ckpt")]
    main(["predict", "--config", "x/config.yaml", "--ckpt_path", "last", *QUIET])
    with pytest.raises(SystemExit):  # the learning rate makes it fail
        main([*FIT, "--overwrite", "--model.network", "mlp_32", "--model.optimizer.lr", "1e30"])
    assert {*content("x")} == {
        *(f"x/{name}" for name in USER_FILES),
        *("x/run.json", "x/config.yaml", "x/traceback.txt", "x/checkpoints/last.ckpt"),
    }
    assert all(Path("x", name).read_text() == "precious" for name in USER_FILES)
    main([*FIT, "--overwrite"])
    assert not Path("x/traceback.txt").exists()
    assert torch.load("x/network.pt", weights_only=True)


def test_clear_removes_files_named_by_the_task(capsys):
    noisy = ["fit", "--config", "noisy_labels/coteaching_digits", *FIT[3:]]
    main(noisy)
    listed = json.loads(Path("x/run.json").read_text())["files"]
    assert {"network_1.pt", "network_2.pt"} <= {*listed}
    RunFolder("x").clear()
    assert {*content("x")} == {"x/run.json", "x/config.yaml"}
    assert [path.name for path in Path("x").iterdir() if path.is_dir()] == []


def test_active_overwrite_keeps_files_that_no_run_wrote(capsys):
    put("x", "round_0_notes.txt", "round_0_mine/a.txt", "round_99/b.txt", "notes.txt")
    main(ACTIVE)
    put("x", "round_00/c.txt")
    foreign = {name: text for name, text in content("x").items() if text == b"precious"}
    assert len(foreign) == 5
    main([*ACTIVE, "--seed_everything", "4"])
    assert foreign.items() <= content("x").items()
    assert json.loads(Path("x/round_00/run.json").read_text())["seed"] == 4


def test_active_refuses_folders_of_no_run_or_round(capsys):
    put("x", "metrics.csv")
    assert "x holds metrics.csv but no run.json" in refusal(ACTIVE, capsys)
    Path("x/metrics.csv").unlink()
    put("x", "round_00/network.pt")
    assert "x/round_00 is not the folder of a round: move it elsewhere" in refusal(ACTIVE, capsys)


def test_overwrite_deletes_nothing_behind_links_out_of_the_folder(tmp_path, capsys):
    main(FIT)
    put("elsewhere", "some.pt", "network.pt")
    Path("x/mine").symlink_to(tmp_path / "elsewhere")
    Path("x/loop").symlink_to(tmp_path / "x")
    Path("x/network.pt").unlink()
    Path("x/network.pt").symlink_to(tmp_path / "elsewhere/network.pt")
    main([*FIT, "--overwrite"])
    assert {*content("elsewhere").values()} == {b"precious"}
    assert not Path("x/network.pt").is_symlink()
    assert Path("x/mine").is_symlink()
