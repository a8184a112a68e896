"""RDD and its baselines as tasks: loss terms, the two stages, requirements on the networks, resume, two processes."""

from functools import partial

import lightning as L
import pytest
import torch
import torch.nn.functional as F

from lightning_kd.core import SemanticSegmentation
from lightning_kd.core.batch import Batch
from lightning_kd.core.polynomial import PolynomialDecay
from lightning_kd.distillation import RDD, SegmentationDistillation, cwd_loss
from lightning_kd.distillation.rdd import disputed_loss, easy_first_loss, pixel_kd_loss, relative_difficulty
from lightning_kd.nets import build_network
from tests.segmentation.runs import CLASSES, SHAPE, Pixels, TwoHeads, plain_batch, task_of, trainer_of
from tests.two_processes import on_two_ranks


class FakeTrainer:
    """Only the step counters that RDD reads from a Trainer; ``step`` counts from 1."""

    def __init__(self, step, total=40_000):
        self.global_step, self.max_steps, self.max_epochs = step - 1, total, -1


def terms_at_step(one, step=1, total=40_000):
    """The loss terms of one batch at ``step`` (from 1), the outputs of student and teacher, and the target."""
    found = {}
    one.step_loss = lambda terms, logits, target: found.update(terms)
    one.accumulate = lambda *args: None
    one._trainer = FakeTrainer(step, total)
    image, target = plain_batch()
    one.training_step(Batch(image, target), 0)
    return found, one.student(image), one.teacher and one.teacher.network(image), target


def task(**options):
    return task_of(RDD, **options)


def test_first_stage_uses_the_easy_first_loss_and_pixel_kd():
    found, student, teacher, target = terms_at_step(task(ce_weight=2.0, kd_weight=3.0, temperature=2.0))
    weight = relative_difficulty(*teacher, SHAPE[1:])
    torch.testing.assert_close(found["task"], 2 * easy_first_loss(*student, target, weight))
    torch.testing.assert_close(found["kd"], 3 * pixel_kd_loss(student[0], teacher[0], 2.0))
    found, *_ = terms_at_step(task(mean_over="valid", auxiliary_weight=0.0))
    expected = easy_first_loss(*student, target, weight, auxiliary_weight=0.0, mean_over="valid")
    torch.testing.assert_close(found["task"], expected)


def test_second_stage_uses_the_disputed_loss():
    options = {"rule": "or", "threshold": 0.4, "min_kept": 40, "class_weight": [1.0, 2.0, 3.0, 0.5]}
    found, student, teacher, target = terms_at_step(task(**options), step=4000)
    torch.testing.assert_close(found["task"], disputed_loss(*student, *teacher, target, *options.values()))
    assert found["task"] > 0
    default, *_ = terms_at_step(task(), step=4000)
    torch.testing.assert_close(default["task"], disputed_loss(*student, *teacher, target, min_kept=0.05))


@pytest.mark.parametrize(
    ("options", "last"),
    [({}, 3999), ({"warmup": 4000}, 3999), ({"warmup": 0.2}, 7999), ({"warmup": 1.0}, 39_999), ({"warmup": 2}, 1)],
)
def test_first_stage_ends_one_step_before_warmup(options, last):
    one = task(**options)
    one._trainer = FakeTrainer(1)
    assert [one.easy_share(step) for step in (1, last, last + 1, 40_000)] == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("warmup", [0, 1, 0.0])
def test_warmup_of_0_or_1_skips_the_first_stage(warmup):
    one = task(warmup=warmup)
    one._trainer = FakeTrainer(1)
    assert one.easy_share(1) == 0


def test_soft_handover_lowers_the_share_of_the_first_stage_linearly():
    one = task(warmup=4000, handover="soft")
    one._trainer = FakeTrainer(1)
    assert one.easy_share(10_000) == pytest.approx(0.833333, abs=5e-7)
    assert [one.easy_share(step) for step in (3999, 4000, 40_000)] == [1.0, 1.0, 0.0]
    found, student, teacher, target = terms_at_step(one, step=13_000)
    easy = easy_first_loss(*student, target, relative_difficulty(*teacher, SHAPE[1:]))
    disputed = disputed_loss(*student, *teacher, target, min_kept=0.05)
    torch.testing.assert_close(found["task"], 0.75 * easy + 0.25 * disputed)
    whole = task(warmup=1.0, handover="soft")
    whole._trainer = FakeTrainer(1)
    assert whole.easy_share(40_000) == 0


def test_stage_option_keeps_one_stage_in_all_steps():
    assert [task(stage="easy").easy_share(step) for step in (1, 39_000)] == [1, 1]
    assert [task(stage="disputed").easy_share(step) for step in (1, 39_000)] == [0, 0]


def test_student_without_auxiliary_head_trains_on_the_main_head():
    student = TwoHeads(auxiliary=False)
    found, main, teacher, target = terms_at_step(task(student=student))
    weight = relative_difficulty(*teacher, SHAPE[1:])
    torch.testing.assert_close(found["task"], easy_first_loss(main, None, target, weight))
    found, main, teacher, target = terms_at_step(task(student=student), step=4000)
    torch.testing.assert_close(found["task"], disputed_loss(main, None, teacher[0], None, target, min_kept=0.05))


class FeatureAsSecondOutput(TwoHeads):
    def forward(self, image):
        return self.main(self.stem(image)), self.stem(image)


@pytest.mark.parametrize(
    "teacher", [TwoHeads(auxiliary=False), FeatureAsSecondOutput(), "torchvision/lraspp_mobilenet_v3_large"]
)
def test_teacher_without_auxiliary_head_raises_unless_stage_is_disputed(teacher):
    weights = {"teacher_weights": "random"} if isinstance(teacher, str) else {}
    with pytest.raises(ValueError, match=r"^the teacher must have an auxiliary head beside the main one, got"):
        task(teacher=teacher, **weights)
    one = task(teacher=teacher, stage="disputed", **weights)
    assert terms_at_step(one)[0]["task"].isfinite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup": 1.5}, "warmup must be at least 0 and at most 1, got 1.5: give a whole number, or a share"),
        ({"handover": "slow"}, "handover must be one of 'hard', 'soft', got 'slow'"),
        ({"stage": "third"}, "stage must be one of 'both', 'easy', 'disputed', got 'third'"),
        ({"rule": "nor"}, "rule must be one of"),
        ({"class_weight": [1.0, 1.0]}, "class_weight needs 4 numbers, one a class, got 2"),
        ({"class_weight": [1.0, 1.0, 1.0, -1.0]}, "class_weight must be at least 0, got -1.0"),
        ({"loss": "at"}, "loss must be 'kd', 'cwd' or 'none', got 'at'"),
    ],
)
def test_invalid_arguments_raise(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        task(**options)


def test_kd_compares_logits_at_the_head_size_of_a_torchvision_student():
    """torchvision enlarges its logits itself; the loss compares the outputs of its heads, a sixteenth of the size."""
    L.seed_everything(0, verbose=False)
    student = build_network("torchvision/deeplabv3_mobilenet_v3_large", CLASSES)
    one = task(student=student, teacher=TwoHeads())
    one.eval()
    image, target = plain_batch(2)
    image = F.interpolate(image, 64)
    target = target.repeat_interleave(4, 1).repeat_interleave(4, 2)
    found = {}
    one.step_loss = lambda terms, logits, target: found.update(terms, logits=logits)
    one.accumulate = lambda *args: None
    one._trainer = FakeTrainer(1)
    one.training_step(Batch(image, target), 0)
    student = one.student
    with torch.no_grad():
        feature = student.backbone(image)
        coarse = student.classifier(feature["out"])
        teacher = one.teacher.network(image)[0]
    assert coarse.shape == (2, CLASSES, 4, 4)
    assert found["logits"].shape == (2, CLASSES, 64, 64)
    taught = F.interpolate(teacher, (4, 4), mode="bilinear", align_corners=True)
    torch.testing.assert_close(found["kd"], pixel_kd_loss(coarse, taught, 1.0))


@pytest.mark.parametrize("kind", ["kd", "cwd", "none"])
def test_baseline_loss_is_cross_entropy_plus_the_chosen_distillation(kind):
    found, student, teacher, target = terms_at_step(task_of(SegmentationDistillation, loss=kind))
    large = [F.interpolate(z, SHAPE[1:], mode="bilinear", align_corners=True) for z in student]
    ce = [F.cross_entropy(z, target, ignore_index=-1) for z in large]
    torch.testing.assert_close(found.pop("task"), ce[0] + 0.4 * ce[1])
    assert [*found] == ([kind] if kind != "none" else [])
    if kind == "none":
        assert teacher is None
        return
    expected = {"kd": pixel_kd_loss(student[0], teacher[0], 1.0), "cwd": 3 * cwd_loss(student[0], teacher[0], 4.0)}
    torch.testing.assert_close(found[kind], expected[kind])


def test_loss_none_loads_no_teacher_except_for_rdd():
    alone = SegmentationDistillation(
        "fcn_tiny", "fcn_tiny", CLASSES, input_shape=SHAPE, teacher_weights="nowhere.pt", loss="none"
    )
    trainer = trainer_of(max_epochs=1, limit_train_batches=1, limit_val_batches=1)
    trainer.fit(alone, Pixels())
    assert float(trainer.callback_metrics["train/loss"]) > 0
    assert "val/teacher_pixel_acc" not in trainer.callback_metrics
    assert task(loss="none").teacher is not None


def poly_sgd():
    return {
        "optimizer": partial(torch.optim.SGD, lr=0.02, momentum=0.9),
        "lr_scheduler": PolynomialDecay,
        "lr_interval": "step",
    }


class RateRecorder(L.Callback):
    def __init__(self):
        self.rates = []

    def on_train_batch_start(self, trainer, *args):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_learning_rate_decays_polynomially_with_each_step():
    seen = RateRecorder()
    trainer_of(callbacks=[seen]).fit(task(**poly_sgd()), datamodule=Pixels())
    assert seen.rates[0] == 0.02
    assert seen.rates == pytest.approx([0.02 * (1 - t / 10) ** 0.9 for t in range(10)])  # 36 images in batches of 8


def fitted(data=None, ckpt_path=None, method=RDD, student=None, teacher=None, options=None, **trainer):
    one = task_of(method, student, teacher, **poly_sgd(), **(options or {}))
    trainer = trainer_of(**trainer)
    trainer.fit(one, datamodule=data or Pixels(), ckpt_path=ckpt_path)
    return one, trainer


@pytest.mark.parametrize("handover", ["hard", "soft"])
def test_resumes_to_the_bit_after_the_first_stage(tmp_path, handover):
    options = {"warmup": 8, "handover": handover, "min_kept": 0.2}  # the second epoch, steps 6 to 10, is in both stages
    networks = {"student": build_network("fcn_tiny", CLASSES), "teacher": TwoHeads()}
    start = {name: {k: v.clone() for k, v in net.state_dict().items()} for name, net in networks.items()}

    def networks_at_start():
        for name, net in networks.items():
            net.load_state_dict(start[name])
        return networks

    whole, _ = fitted(**networks_at_start(), options=options, max_epochs=3)
    ended = {k: v.clone() for k, v in whole.state_dict().items()}
    _, trainer = fitted(
        **networks_at_start(), options=options, max_epochs=3, limit_train_batches=5, callbacks=[StopAfter(2)]
    )
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    resumed, trainer = fitted(**networks_at_start(), options=options, ckpt_path=tmp_path / "two.ckpt", max_epochs=3)
    assert trainer.global_step == 15
    assert all(torch.equal(value, ended[key]) for key, value in resumed.state_dict().items())


class StopAfter(L.Callback):
    def __init__(self, epochs):
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, *args):
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


def test_fit_logs_loss_terms_and_the_mean_weight_of_the_first_stage():
    _, trainer = fitted(options={"warmup": 5}, max_epochs=1)
    assert {"train/loss", "train/loss_task", "train/loss_kd", "train/easy_weight", "val/miou"} <= {
        *trainer.callback_metrics
    }
    assert 0 < trainer.callback_metrics["train/easy_weight"] <= 1
    _, trainer = fitted(options={"warmup": 0}, max_epochs=1)
    assert "train/easy_weight" not in trainer.callback_metrics


def test_stages_count_optimizer_steps():
    shares = []

    class Counting(RDD):
        def easy_share(self, step):
            shares.append(step)
            return super().easy_share(step)

    fitted(method=Counting, accumulate_grad_batches=2, max_epochs=1)
    assert shares == [1, 1, 2, 2, 3]


def test_warmup_longer_than_the_training_warns():
    with pytest.warns(UserWarning, match="^warmup=99 is more than the 10 steps of the training"):
        fitted(options={"warmup": 99})


def test_teacher_stays_fixed_and_only_the_student_is_exported():
    one = task(**poly_sgd())
    frozen = {k: v.clone() for k, v in one.teacher.network.state_dict().items()}
    trainer_of().fit(one, datamodule=Pixels())
    assert all(torch.equal(v, one.teacher.network.state_dict()[k]) for k, v in frozen.items())
    assert one.exports() == {"student": one.student}


def test_pixel_maps_show_difficulty_weight_and_disputed_pixels():
    one, (image, target) = task(min_kept=0.2), plain_batch()
    maps = one.pixel_maps(image, target)
    assert [*maps] == ["difficulty weight", "disputed pixels"]
    torch.testing.assert_close(maps["difficulty weight"], relative_difficulty(*one.teacher.network(image), SHAPE[1:]))
    assert maps["disputed pixels"].dtype == torch.bool
    assert not maps["disputed pixels"][target < 0].any()


def test_semantic_segmentation_trains_the_auxiliary_head_too():
    found = {}
    one = SemanticSegmentation(TwoHeads(), CLASSES, input_shape=SHAPE, auxiliary_weight=0.5)
    one.step_loss = lambda terms, logits, target: found.update(terms)
    image, target = plain_batch()
    one.training_step(Batch(image, target), 0)
    torch.testing.assert_close(found["aux"], 0.5 * one.problem.loss(one.network(image)[1], target))
    older = SemanticSegmentation("fcn_tiny", CLASSES, input_shape=SHAPE, aux_weight=0.1)
    assert older.auxiliary_weight == 0.1


def _student_weights_of_a_rank(warmup):
    """The student's weights after 3 steps with joint batches of 16, shared by two processes, in float64."""
    one = task_of(RDD, warmup=warmup, min_kept=0, stage="both", **poly_sgd()).double()
    data = Pixels(batch_size=8, val_fraction=0.0)
    trainer_of(
        devices=2, strategy="ddp", max_steps=3, max_epochs=1, limit_val_batches=0, use_distributed_sampler=False,
        precision="64-true",
    ).fit(one, datamodule=data)  # fmt: skip
    return [value.tolist() for value in one.student.state_dict().values()]


@pytest.mark.filterwarnings("ignore:warmup=99 is more")
def test_two_processes_equal_one_in_the_first_stage():
    """The first stage's loss is a mean over all pixels; the second selects pixels within each process's own batch."""
    both = on_two_ranks(_student_weights_of_a_rank, 99)
    assert both[0] == both[1]
    one = task_of(RDD, warmup=99, min_kept=0, **poly_sgd()).double()
    trainer_of(max_steps=3, max_epochs=1, limit_val_batches=0, precision="64-true").fit(
        one, datamodule=Pixels(batch_size=16, val_fraction=0.0)
    )
    for value, other in zip(one.student.state_dict().values(), both[0], strict=True):
        torch.testing.assert_close(value, torch.tensor(other, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_two_processes_keep_equal_weights_in_the_second_stage():
    first, second = on_two_ranks(_student_weights_of_a_rank, 2)
    assert first == second


def _steps_without_auxiliary_head_of_a_rank(method):
    one = (
        task_of(method, auxiliary_weight=0.0)
        if method is RDD
        else SemanticSegmentation(TwoHeads(), CLASSES, input_shape=SHAPE, auxiliary_weight=0.0)
    )
    trainer = trainer_of(devices=2, strategy="ddp", max_epochs=1, use_distributed_sampler=False)
    trainer.fit(one, datamodule=Pixels(val_fraction=0.0))
    return trainer.global_step


@pytest.mark.parametrize("method", [RDD, SemanticSegmentation])
def test_two_processes_train_with_auxiliary_weight_0(method):
    assert on_two_ranks(_steps_without_auxiliary_head_of_a_rank, method) == [3, 3]
