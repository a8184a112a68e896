"""Multi-label runs that are killed in mid-epoch and resumed on the command line equal undisturbed ones."""

import signal

import pytest
import torch
import yaml

from tests.kill_anywhere import _plain, differences
from tests.killing import fit_dropping

DATA = {
    "class_path": "lightning_kd.data.MosaicDataModule",
    "init_args": {
        "source": {"class_path": "lightning_kd.data.DigitsDataModule"},
        "train_mosaics": 64,
        "val_mosaics": 16,
        "test_mosaics": 16,
        "batch_size": 16,
    },
}
AVERAGED = {"average_decay": 0.7, "answer_with": "better", "view": "strong"}
METHODS = {
    "CAP": ("multi_label", {**AVERAGED, "warmup_epochs": 1}, {"labelled_fraction": 0.25}),
    "CDCR": ("multi_label", {**AVERAGED, "warmup_epochs": 1, "alpha": 0.3}, {"candidates": {"rate": 0.2}}),
    "PAT": ("multi_label", {**AVERAGED, "attention": "cross"}, {}),
    "L2D": ("distillation", {"teacher": "cnn_tiny", "teacher_weights": "random", "lambda_le": 0.0}, {}),
}


def write_config(folder, method):
    package, model, data = METHODS[method]
    adam = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}}
    config = {
        "seed_everything": 0,
        "model": {"class_path": f"lightning_kd.{package}.{method}", "init_args": {**model, "optimizer": adam}},
        "data": {**DATA, "init_args": {**DATA["init_args"], **data}},
        "trainer": {"max_epochs": 3},
    }
    (folder / "one.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.parametrize(
    ("method", "kill_at"),  # a step of the last epoch of three
    [("CAP", 9), *(pytest.param(method, 11, marks=pytest.mark.slow) for method in ("CDCR", "PAT", "L2D"))],
)
def test_run_killed_in_mid_epoch_and_resumed_equals_an_undisturbed_one(tmp_path, method, kill_at):
    write_config(tmp_path, method)
    argument = "student" if method == "L2D" else "network"

    def fit(run, *options, kill_at=-1):
        return fit_dropping(tmp_path, run, "--config one.yaml", *options, kill_at=kill_at, argument=argument)

    whole = fit("whole")
    assert whole.returncode == 0, whole.stderr
    killed = fit("broken", kill_at=kill_at)
    assert killed.returncode == -signal.SIGKILL
    reached = torch.load(tmp_path / "broken/checkpoints/last.ckpt", weights_only=True)
    assert reached["epoch"] == 1
    resumed = fit("broken", "--ckpt_path", "last")
    assert resumed.returncode == 0, resumed.stderr
    a, b = (torch.load(tmp_path / run / "checkpoints/last.ckpt", weights_only=True) for run in ("whole", "broken"))
    assert not differences(*(_plain({k: v for k, v in c.items() if k != "callbacks"}) for c in (a, b)))
    assert a["epoch"] == 2
    assert method not in ("CAP", "CDCR") or all(len(m["rows"].unique()) > 1 for m in a["memories"].values())
    results = {"CAP": ["pseudo_labels.csv"], "CDCR": ["wrong_labels.csv"]}.get(method, [])
    for name in ("metrics.csv", *results):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "broken" / name).read_text(), name
    nets = [torch.load(next((tmp_path / run).glob("*.pt")), weights_only=True) for run in ("whole", "broken")]
    assert not differences(*map(_plain, nets))
