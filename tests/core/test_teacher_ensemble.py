"""Several teachers: the mean of their probabilities, and the settings of each."""

import pytest
import torch
from torch import nn

from lightning_kd.core.problems import SingleLabel
from lightning_kd.core.teacher import FrozenTeacher
from lightning_kd.core.teacher_ensemble import TeacherEnsemble, teacher_settings


class ConstantNetwork(nn.Module):
    """Gives the same probabilities for every image, and keeps the images."""

    def __init__(self, *probabilities):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probabilities).log())
        self.seen = []

    def forward(self, image):
        self.seen.append(image)
        return self.logits.expand(len(image), -1)


def ensemble(*each, **options):
    return TeacherEnsemble([FrozenTeacher(one, SingleLabel(3), **options) for one in each])


def test_ensemble_gives_the_mean_of_the_probabilities():
    both = ensemble(ConstantNetwork(0.8, 0.1, 0.1), ConstantNetwork(0.2, 0.6, 0.2))
    answer = both(torch.zeros(2, 4))
    torch.testing.assert_close(answer.exp(), torch.tensor([0.5, 0.35, 0.15]).expand(2, 3))
    torch.testing.assert_close(answer.softmax(1), answer.exp())
    assert not answer.requires_grad
    torch.testing.assert_close(both.each(torch.zeros(2, 4))[1].softmax(1)[0], torch.tensor([0.2, 0.6, 0.2]))


def test_ensemble_is_in_eval_mode_and_in_no_state_dict():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = nn.Linear(4, 3)
            bodies = [nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)) for _ in range(2)]
            self.teacher = ensemble(*bodies)

    holder = Holder().train()
    assert not any(module.training for module in holder.teacher.modules())
    assert [name for name, _ in holder.named_parameters()] == ["student.weight", "student.bias"]
    assert list(holder.state_dict()) == ["student.weight", "student.bias"]
    other = Holder()
    before = other.teacher.teachers[1].network[0].weight.clone()
    other.load_state_dict(holder.state_dict())
    assert torch.equal(other.teacher.teachers[1].network[0].weight, before)


def test_settings_are_given_for_all_teachers_or_for_each():
    first, second = teacher_settings(
        ["cnn", nn.Linear(3, 3)],
        3,
        weights=["a.pt", None],
        mean=[0.5, 0.4, 0.3],
        std=[None, [1.0, 1.0, 1.0]],
        size=48,
    )
    assert first == {"name": "cnn", "weights": "a.pt", "mean": [0.5, 0.4, 0.3], "std": None, "size": (48, 48)}
    assert second == {
        "name": None, "weights": None, "mean": [0.5, 0.4, 0.3], "std": [1.0, 1.0, 1.0], "size": (48, 48),
    }  # fmt: skip
    assert [one["size"] for one in teacher_settings(["a", "b"], 3, size=[32, (40, 48)])] == [(32, 32), (40, 48)]
    assert teacher_settings("a", 3, size=[32, 48]) == [{"name": "a", "size": (32, 48)}]
    with pytest.raises(ValueError, match=r"teacher_weights must be one for all 2 teachers or a list of 2, got \['a'\]"):
        teacher_settings(["a", "b"], 3, weights=["a"])
