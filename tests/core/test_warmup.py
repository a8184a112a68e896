"""The warm-up by steps against torch's own SequentialLR, alone and from the command line."""

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from lightning_kd.cli import main
from lightning_kd.core.checkpoint_files import read_checkpoint
from lightning_kd.core.schedules import length_warnings
from lightning_kd.core.warmup import WarmupCosine

QUIET = ["--trainer.enable_progress_bar", "false"]


def rates(make, count, resume_at=None):
    def build():
        weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
        optimizer = torch.optim.SGD([{"params": weights[:1], "lr": 0.1}, {"params": weights[1:], "lr": 0.01}])
        return optimizer, make(optimizer)

    optimizer, scheduler = build()
    values = []
    for step in range(count):
        if step == resume_at:
            kept = optimizer.state_dict(), scheduler.state_dict()
            optimizer, scheduler = build()
            optimizer.load_state_dict(kept[0])
            scheduler.load_state_dict(kept[1])
        values.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return values


def torchs_sequence(optimizer):
    parts = [LinearLR(optimizer, 0.01, total_iters=5), CosineAnnealingLR(optimizer, T_max=20)]
    return SequentialLR(optimizer, parts, milestones=[5])


@pytest.mark.filterwarnings("ignore:The epoch parameter")
def test_warmup_cosine_equals_torchs_sequence_of_two_schedules():
    own = rates(lambda optimizer: WarmupCosine(optimizer, 5, 25), 25)
    assert [value for pair in own for value in pair] == pytest.approx(
        [value for pair in rates(torchs_sequence, 25) for value in pair], rel=1e-9, abs=1e-15
    )
    assert own[0] == pytest.approx([0.001, 0.0001])
    assert own[5] == pytest.approx([0.1, 0.01])


def of_length(schedule, length):
    schedule.set_length(length)
    return schedule


@pytest.mark.parametrize("resume_at", [3, 5, 12])
def test_resume_continues_and_the_last_rate_stays(resume_at):
    def make(optimizer):
        return of_length(WarmupCosine(optimizer, 5, eta_min=1e-3), 15)

    whole = rates(make, 20)
    assert rates(make, 20, resume_at) == whole
    assert whole[15:] == [pytest.approx([1e-3, 1e-3])] * 5


@pytest.mark.parametrize(("resume_at", "rises"), [(3, False), (5, False), (14, True)])
def test_resume_of_a_longer_training_has_the_rates_of_that_length(resume_at, rises):
    lengths, made = iter([15, 40]), []

    def make(optimizer):
        made.append(of_length(WarmupCosine(optimizer, 5), next(lengths)))
        return made[-1]

    resumed = rates(make, 40, resume_at)
    assert resumed[resume_at:] == rates(lambda optimizer: WarmupCosine(optimizer, 5, 40), 40)[resume_at:]
    assert (made[-1].raised is not None) == rises  # a rise within the warm-up is not reported


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"warmup_steps": -1}, "^warmup_steps must be at least 0, got -1"),
        ({"warmup_steps": 5, "total_steps": 5}, "^total_steps must be above 5, got 5"),
        ({"start_factor": 0.0}, "^start_factor must be above 0 and at most 1, got 0.0"),
    ],
)
def test_wrong_numbers_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        rates(lambda optimizer: WarmupCosine(optimizer, **arguments), 1)


def test_training_shorter_than_the_warmup_warns():
    with pytest.warns(UserWarning, match="warmup_steps=500 is not less than the length of the training, 6"):
        rates(lambda optimizer: of_length(WarmupCosine(optimizer), 6), 1)


@pytest.mark.parametrize(("total", "told"), [(100, True), (12, False), (8, False)])
def test_total_steps_warn_only_beyond_the_training(total, told):
    found = length_warnings(WarmupCosine(torch.optim.SGD([torch.zeros(1)], 0.1), 5, total), 12, "training", "step")
    sentence = "WarmupCosine has total_steps 100, the training has 12 steps, so it ends at a high learning rate"
    assert [text.partition(":")[0] for text in found] == [sentence] * told


def test_warmup_overlay_works_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--config", "distillation/teacher_digits", "--config", "_overlay/smoke", "--config", "_overlay/warmup"]
    words += ["--model.network", "cnn_tiny", "--model.lr_scheduler.warmup_steps", "4"]
    with pytest.warns(
        UserWarning, match="total_steps 90, the training has 6 steps, so it ends at a high learning rate"
    ):
        main(["fit", *words, "--model.lr_scheduler.total_steps", "90", *QUIET, "--run", "long"])
    main(["fit", *words, *QUIET, "--run", "r"])
    assert schedule_state() == (4, 6, 6, [0.0])
    main(["fit", "--config", "r/config.yaml", "--ckpt_path", "last", "--trainer.max_epochs", "3"])
    assert schedule_state() == (4, 9, 9, [0.0])


def schedule_state():
    (state,) = read_checkpoint("r/checkpoints/last.ckpt")["lr_schedulers"]
    rates = [round(rate, 6) for rate in state["_last_lr"]]
    return state["warmup_steps"], state["total_steps"], state["last_epoch"], rates
