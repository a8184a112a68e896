"""Synthetic label noise that depends on the sample."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_kd.data.array_files import image_statistics
from lightning_kd.data.label_noise import CleanLabels, LabelNoise, at_least_two, check_rate


class InstanceDependentNoise(LabelNoise):
    """Noise in which each sample has its own probability of a wrong label and its own likely wrong labels.

    Sample ``i`` gets a wrong label with probability ``q_i``, drawn from a normal distribution of mean ``rate`` and
    standard deviation 0.1, truncated to (0, 1). The wrong label is drawn from the softmax, over the other classes, of
    the sample times a fixed Gaussian matrix ``[D, C]``. Samples are first normalised to mean 0 and variance 1 over the
    data set, per channel of images and per feature. The samples must be in memory.

    Args:
        rate: in [0, 1]; about the fraction of wrong labels. Truncation raises it near 0 and lowers it near 1: 0.01
            gives 0.08, 0.05 gives 0.10, 0.1 gives 0.13, 0.2 gives 0.21, 0.4 gives 0.40, and 1 gives 0.92.
        soft: scale the Gaussian matrix to variance 1/D, which spreads wrong labels over the classes. ``False`` keeps
            variance 1 as in the papers' code, so that an image has mostly one possible wrong label.
        seed: fixes the labels; 0 or more.

    Raises:
        ValueError: for an argument out of its range; when drawn, for samples that are not in memory.

    Source: Xia et al., arXiv 2006.07836.
    """

    def __init__(self, rate: float, soft: bool = True, seed: int = 0) -> None:
        self.rate = check_rate(rate)
        self.soft = soft
        super().__init__(seed)

    def draw(self, clean: CleanLabels, generator: np.random.Generator) -> np.ndarray:
        at_least_two(clean.class_names)
        image, target = clean.image, clean.target
        if not isinstance(image, Tensor | np.ndarray):
            raise ValueError(
                f"InstanceDependentNoise needs the samples in memory, got {type(image).__name__}: use a data module "
                "that holds arrays, or a LabelFile"
            )
        image = torch.as_tensor(image)
        if len(image) != len(target):
            raise ValueError(f"image has {len(image)} samples, got {len(target)} labels: give one label for each")
        rate = _truncated_normal(self.rate, 0.1, len(target), generator)
        features = image[0].numel()
        table = generator.standard_normal((features, clean.num_classes))
        if self.soft:
            table /= features**0.5
        uniform = generator.random(len(target))
        mean, std = _statistics(image)
        given = np.empty(len(target), dtype=np.int64)
        for start in range(0, len(target), 2048):  # float64 copies of all images at once would take gigabytes
            part = slice(start, start + 2048)
            own = target[part]
            rows = np.arange(len(own))
            score = ((image[part].double() - mean) / std).flatten(1).numpy() @ table
            score[rows, own] = -np.inf
            probability = np.exp(score - score.max(1, keepdims=True))
            probability *= (rate[part] / probability.sum(1))[:, None]
            probability[rows, own] = 1 - rate[part]
            cumulative = probability.cumsum(1)
            given[part] = (cumulative / cumulative[:, -1:] <= uniform[part, None]).sum(1)
        return given


def _truncated_normal(mean: float, std: float, count: int, generator: np.random.Generator) -> np.ndarray:
    """Normal numbers, float64 ``[count]``, redrawn until they are in (0, 1); ``mean`` must be in [0, 1]."""
    value = generator.normal(mean, std, count)
    while len(outside := np.flatnonzero((value <= 0) | (value >= 1))):
        value[outside] = generator.normal(mean, std, len(outside))
    return value


def _statistics(image: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, float64, of each channel of ``[N, C, H, W]`` or each feature of ``[N, D]``."""
    if image.dtype == torch.uint8:
        mean, std = (255 * torch.tensor(v, dtype=torch.float64)[:, None, None] for v in image_statistics(image))
        return mean, std
    std, mean = torch.std_mean(image.double(), dim=0, correction=0)
    return mean, torch.where(std > 0, std, 1.0)
