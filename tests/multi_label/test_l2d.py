"""L2D as a task: its loss terms, what it needs of student and teacher, resume."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F

from lightning_kd.core.batch import Batch
from lightning_kd.distillation import (
    L2D,
    angle_loss,
    class_aware_loss,
    distance_loss,
    instance_aware_loss,
    multi_label_logits_loss,
    pkt_loss,
)
from lightning_kd.distillation.l2d import partial_softmax_loss
from tests.multi_label.runs import CLASSES, SHAPE, Labels, fitted, resumes_to_the_bit, trainer_of

WITH_ML_DECODER = "cnn_tiny+ml_decoder_16"


def task(student=WITH_ML_DECODER, teacher="cnn_tiny+ml_decoder_24", **options):
    L.seed_everything(0, verbose=False)
    return L2D(student, teacher, CLASSES, input_shape=SHAPE, teacher_weights="random", **options)


def method(network, classes, input_shape, channels_last, **options):
    """``L2D`` with the arguments that ``built`` passes."""
    return task(**options)


def terms_of(one):
    """The loss terms of a batch, without a Trainer; the student is in eval mode."""
    found = {}

    def step_loss(terms, logits, target):
        found.update(terms)
        return sum(terms.values())

    one.step_loss = step_loss
    one.eval()
    image, target, *_ = Labels().load_arrays()
    image, target = image[:12].float() / 255, target[:12]
    one.training_step(Batch(image, target), 0)
    student, teacher = one.student(image), one.teacher.network(image)
    return found, student, teacher, target


def test_weighted_loss_terms_equal_the_loss_functions():
    found, student, teacher, target = terms_of(task())
    bce = F.binary_cross_entropy_with_logits(student.logits, target, reduction="sum")
    torch.testing.assert_close(found["ce"], bce)
    torch.testing.assert_close(found["mld"], 10 * multi_label_logits_loss(student.logits, teacher.logits))
    pair = student.embeddings, teacher.embeddings
    torch.testing.assert_close(found["cd"], 100 * class_aware_loss(*pair, target))
    torch.testing.assert_close(found["id"], 1000 * instance_aware_loss(*pair, target))
    assert min(value.item() for value in found.values()) > 0


def test_logits_loss_and_weight_options_set_the_loss_terms():
    found, student, teacher, target = terms_of(task(logits_loss="ps", lambda_le=0.0, lambda_mld=2.0, ce_weight=0.5))
    assert found.keys() == {"ce", "ps"}
    torch.testing.assert_close(found["ps"], 2 * partial_softmax_loss(student.logits, teacher.logits, target))
    found, student, teacher, _ = terms_of(task(logits_loss="mse", lambda_le=0.0, kd_weight=3.0))
    torch.testing.assert_close(found["mse"], 30 * (student.logits - teacher.logits).square().sum() / 12)
    assert terms_of(task(logits_loss=None))[0].keys() == {"ce", "cd", "id"}
    with pytest.raises(ValueError, match=r"^logits_loss must be 'mld', 'ps', 'mse' or None, got 'kl'"):
        task(logits_loss="kl")


@pytest.mark.parametrize("student", [WITH_ML_DECODER, "cnn_tiny"])
def test_feature_losses_compare_pooled_features_of_student_and_teacher(student):
    options = {"student": student, "lambda_le": 0.0, "logits_loss": None, "kd_weight": 2.0, "lambda_feature": 0.5}
    seen = {}

    class Looking(L2D):
        def _feature_loss(self, *features):
            seen["student"], seen["teacher"] = features
            return super()._feature_loss(*features)

    for name in ("rkd", "pkt"):
        one = task(**options, feature_loss=name)
        one.__class__ = Looking
        found, *_ = terms_of(one)
        assert found.keys() == {"ce", name}
        s, t = seen["student"], seen["teacher"]
        assert s.shape == t.shape == (12, 32)
        both = {"rkd": 25 * distance_loss(s, t) + 50 * angle_loss(s, t), "pkt": 30_000 * pkt_loss(s, t)}
        torch.testing.assert_close(found[name], both[name])
        (gradient,) = torch.autograd.grad(found[name], [next(one.student.parameters())])
        assert gradient.abs().sum() > 0
    image = Labels().load_arrays()[0][:12].float() / 255
    maps = []
    network = one.teacher.network
    network.network.get_submodule(network.feature_map).register_forward_hook(lambda m, a, out: maps.append(out))
    one.teacher.output(image)
    torch.testing.assert_close(seen["teacher"], maps[0].mean((2, 3)))
    with pytest.raises(ValueError, match=r"^feature_loss must be 'rkd', 'pkt' or None, got 'crd'"):
        task(feature_loss="crd")


def test_feature_loss_fits_with_a_last_batch_of_one_image():
    fitted(method, Labels(batch_size=47), student=WITH_ML_DECODER, feature_loss="pkt")


def test_networks_without_label_embeddings_raise_unless_lambda_le_is_0():
    trainer = trainer_of(max_epochs=1)
    with pytest.raises(ValueError, match=r"^the student must give an embedding of each label .*set lambda_le to 0"):
        trainer.fit(task(student="cnn_tiny"), datamodule=Labels())
    with pytest.raises(ValueError, match=r"^the teacher must give an embedding of each label"):
        trainer_of(max_epochs=1).fit(task(teacher="cnn_tiny"), datamodule=Labels())
    trainer_of(max_epochs=1).fit(task(student="cnn_tiny", teacher="cnn_tiny", lambda_le=0.0), datamodule=Labels())


def test_unknown_labels_raise():
    def hide(target):
        return torch.where(torch.arange(len(target))[:, None] == 3, -1.0, target)

    with pytest.raises(ValueError, match=r"^target must hold 0 and 1, got values from -1"):
        trainer_of().fit(task(), datamodule=Labels(hide, val_fraction=0.0))


def test_training_leaves_the_teacher_and_the_label_queries_unchanged():
    one = task()
    frozen = {k: v.clone() for k, v in one.teacher.network.state_dict().items()}
    queries, weight = one.student.head.queries.clone(), one.student.head.weight.clone()
    trainer_of().fit(one, datamodule=Labels())
    assert all(torch.equal(v, one.teacher.network.state_dict()[k]) for k, v in frozen.items())
    assert torch.equal(queries, one.student.head.queries)
    assert not torch.equal(weight, one.student.head.weight)
    assert not one.teacher.network.training
    assert one.exports()["student"] is one.student


def test_resumes_to_the_bit(tmp_path):
    assert resumes_to_the_bit(method, tmp_path, student=WITH_ML_DECODER)


def test_fit_logs_each_loss_term():
    _, trainer = fitted(method)
    assert {"train/loss_ce", "train/loss_mld", "train/loss_cd", "train/loss_id", "val/map"} <= {
        *trainer.callback_metrics
    }
