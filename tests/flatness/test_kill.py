"""SAM with a shift after every epoch, killed in the second evaluation of a step and resumed by the real command."""

import json
import signal

import torch

from tests.killing import fit_dropping

ARGUMENTS = (
    "--config flatness/sam_digits --data.train_per_class 20 --data.batch_size 25 --trainer.max_epochs 4"
    " --trainer.callbacks+ lightning_kd.flatness.OptimumShifting --trainer.callbacks.every 1"
    " --trainer.callbacks.start 0 --trainer.callbacks.guard null --trainer.callbacks.held_out 40"
)


def test_resumes_to_the_bit_after_sigkill_between_two_sam_evaluations(tmp_path):
    whole = fit_dropping(tmp_path, "whole", ARGUMENTS)
    assert whole.returncode == 0, whole.stderr
    # 8 steps of two passes an epoch: the 40th is the second one of a step in the third epoch
    killed = fit_dropping(tmp_path, "broken", ARGUMENTS, kill_at=40)
    assert killed.returncode == -signal.SIGKILL
    assert torch.load(tmp_path / "broken/checkpoints/last.ckpt", weights_only=True)["epoch"] == 1
    resumed = fit_dropping(tmp_path, "broken", ARGUMENTS, "--ckpt_path", "last")
    assert resumed.returncode == 0, resumed.stderr
    a, b = (torch.load(tmp_path / run / "checkpoints/last.ckpt", weights_only=True) for run in ("whole", "broken"))
    assert a["global_step"] == b["global_step"] == 32
    for key, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][key]), key
    for x, y in zip(*(c["optimizer_states"][0]["state"].values() for c in (a, b)), strict=True):
        assert torch.equal(x["momentum_buffer"], y["momentum_buffer"])
    shifts = [json.loads((tmp_path / run / "shifts.json").read_text()) for run in ("whole", "broken")]
    assert shifts[0] == shifts[1]
    assert [shift["epoch"] for shift in shifts[0]] == [0, 1, 2, 3]
    assert all(shift["layers"][0]["status"] == "shifted" for shift in shifts[0])
    assert (tmp_path / "whole/metrics.csv").read_text() == (tmp_path / "broken/metrics.csv").read_text()
