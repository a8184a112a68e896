"""DPC, killed in its semi-supervised stage and resumed by the real command, ends as an undisturbed run."""

import signal

import numpy as np
import torch

from tests.killing import fit_dropping

ARGUMENTS = (
    "--config noisy_labels/dpc_digits --model.head_width 16 --model.warmup_epochs 1"
    " --data.train_per_class 30 --data.batch_size 25 --trainer.max_epochs 3"
)


def test_resumes_to_the_bit_after_sigkill_in_the_semi_supervised_stage(tmp_path):
    whole = fit_dropping(tmp_path, "whole", ARGUMENTS)
    assert whole.returncode == 0, whole.stderr
    # 12 training passes are the warm-up epoch; a semi-supervised step has 5 and an epoch of each network several
    killed = fit_dropping(tmp_path, "broken", ARGUMENTS, kill_at=90)
    assert killed.returncode == -signal.SIGKILL
    reached = torch.load(tmp_path / "broken/checkpoints/last.ckpt", weights_only=True)
    assert 0 <= reached["epoch"] < 2
    assert (reached["memories"]["clean_probability"]["rows"] != 1).any()
    resumed = fit_dropping(tmp_path, "broken", ARGUMENTS, "--ckpt_path", "last")
    assert resumed.returncode == 0, resumed.stderr
    a, b = (torch.load(tmp_path / run / "checkpoints/last.ckpt", weights_only=True) for run in ("whole", "broken"))
    assert a["global_step"] == b["global_step"]
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for key, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][key]), key
    for one, two in zip(a["optimizer_states"], b["optimizer_states"], strict=True):
        for x, y in zip(one["state"].values(), two["state"].values(), strict=True):
            assert torch.equal(x["momentum_buffer"], y["momentum_buffer"])
    rows = [c["memories"]["clean_probability"]["rows"] for c in (a, b)]
    assert torch.equal(*rows)
    for name in ("metrics.csv", "noisy_labels.csv"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "broken" / name).read_text(), name
    given = [np.load(tmp_path / run / "noise.npz")["given"] for run in ("whole", "broken")]
    assert np.array_equal(*given)
    assert (tmp_path / "whole/pictures/label_scores.png").is_file()
