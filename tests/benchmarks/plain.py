"""What the collection is compared with: the plain code of training scripts, without Lightning."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_kd.core.batch import Batch
from lightning_kd.core.feature_hooks import find_classifier
from lightning_kd.nets import build_network


class PictureDataset(Dataset):
    """Images in one array, each made a PIL image and transformed when it is asked for."""

    def __init__(self, pixels: np.ndarray, labels: Sequence[int], transform: Callable[[Image.Image], Tensor]) -> None:
        self.pixels = pixels
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[position])), self.labels[position]


class Meter:
    """The mean of a number over the samples so far."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def update(self, value: float, count: int) -> None:
        self.total += value * count
        self.count += count


def top_accuracies(logits: Tensor, target: Tensor, most: Sequence[int]) -> list[Tensor]:
    """In percent: how often the target is among the highest 1, 5, ... logits."""
    best = logits.topk(max(most), dim=1).indices
    hits = best == target[:, None]
    return [hits[:, :k].float().sum() * (100.0 / len(target)) for k in most]


def script_network(name: str, num_classes: int) -> nn.Module:
    """A network as training scripts have it: contiguous, ReLU in place."""
    network = build_network(name, num_classes)
    for module in network.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = True
    return network


class TwoHeads(nn.Module):
    """A student that gives the logits of its classifier and of a second one on the same feature."""

    def __init__(self, name: str, num_classes: int) -> None:
        super().__init__()
        self.trunk = script_network(name, num_classes)
        path, self.main = find_classifier(self.trunk)
        setattr(self.trunk, path, nn.Identity())
        self.auxiliary = nn.Linear(self.main.in_features, num_classes)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.trunk(image)
        return self.main(feature), self.auxiliary(feature)


class DualHeadLoop:
    """Dual-head distillation as a script trains it: two heads, a frozen teacher, meters of loss and accuracy.

    Args:
        student: network name.
        teacher: network name.
        num_classes: number of classes.
        device: where it trains.
        align: two backward passes, whose gradients are put into one vector each and projected there.
    """

    def __init__(self, student: str, teacher: str, num_classes: int, device: torch.device, align: bool = False) -> None:
        self.student = TwoHeads(student, num_classes).to(device)
        self.teacher = script_network(teacher, num_classes).to(device).eval()
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        self.align = align
        self.temperature = 2.0

    def run(self, batches: Iterable[Batch]) -> None:
        """Train on some batches."""
        batch_time, losses, top1, top5 = Meter(), Meter(), Meter(), Meter()
        self.student.train()
        end = time.perf_counter()
        for image, target, *_ in batches:
            logits, auxiliary_logits = self.student(image)
            with torch.no_grad():
                teacher_logits = self.teacher(image)
            ce = F.cross_entropy(logits, target)
            kd = self.distillation_loss(auxiliary_logits, teacher_logits)
            loss = ce + kd
            first, fifth = top_accuracies(logits, target, (1, 5))
            losses.update(loss.item(), len(target))
            top1.update(first.item(), len(target))
            top5.update(fifth.item(), len(target))
            if self.align:
                self.aligned_backward(ce, kd)
            else:
                self.optimizer.zero_grad()
                loss.backward()
            self.optimizer.step()
            batch_time.update(time.perf_counter() - end, 1)
            end = time.perf_counter()

    def distillation_loss(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        difference = (student_logits - teacher_logits) / self.temperature
        divergence = -0.5 * (F.logsigmoid(difference) + F.logsigmoid(-difference)) - math.log(2)
        return self.temperature**2 * divergence.sum(1).mean()

    def aligned_backward(self, ce: Tensor, kd: Tensor) -> None:
        primary, primary_reached = self.flat_gradient(ce, keep=True)
        auxiliary, auxiliary_reached = self.flat_gradient(kd, keep=False)
        first, second = primary.clone(), auxiliary.clone()
        dot = torch.dot(first, second)
        if dot < 0:
            second -= dot / first.norm() ** 2 * first
        both = (primary_reached * auxiliary_reached).bool()
        merged = torch.zeros_like(primary)
        merged[both] = torch.stack([first[both], second[both]]).sum(0)
        merged[~both] = torch.stack([first[~both], second[~both]]).sum(0)
        start = 0
        for parameter in self.parameters():
            parameter.grad = merged[start : start + parameter.numel()].view_as(parameter).clone()
            start += parameter.numel()

    def flat_gradient(self, objective: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
        """The gradient of all parameters as one vector, and 1 where the objective reaches a parameter, else 0."""
        self.optimizer.zero_grad()
        objective.backward(retain_graph=keep)
        gradients, reached = [], []
        for parameter in self.parameters():
            if parameter.grad is None:
                gradients.append(torch.zeros_like(parameter).flatten())
                reached.append(torch.zeros_like(parameter).flatten())
            else:
                gradients.append(parameter.grad.clone().flatten())
                reached.append(torch.ones_like(parameter).flatten())
        return torch.cat(gradients), torch.cat(reached)

    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def train_classifier(network: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[Batch]) -> None:
    """A minimal supervised loop without metrics, log and checkpoints."""
    network.train()
    for image, target, *_ in batches:
        optimizer.zero_grad()
        F.cross_entropy(network(image), target).backward()
        optimizer.step()
