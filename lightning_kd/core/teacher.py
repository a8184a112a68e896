"""The frozen teacher of a distillation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.argument_checks import naming_argument
from lightning_kd.core.kept_precision import KeptPrecision
from lightning_kd.core.problems import Problem
from lightning_kd.core.starting_weights import pretrained_network
from lightning_kd.core.weights import load_weights, other_classes

__all__ = ["FrozenTeacher", "teacher_network"]


class FrozenTeacher(KeptPrecision):
    """A trained network that is never trained further: always in eval mode, without gradient, not in checkpoints.

    Its parameters have ``requires_grad=False``, so that no optimizer takes them. The ``state_dict`` of a module that
    holds it does not contain it, and loading one leaves it unchanged, also under ``WeightAveraging``, DDP and
    ``compile``. Its own weights are ``teacher.network.state_dict()``.

    ``modules()``, ``parameters()`` and ``buffers()`` of a module that holds it do not go into the teacher, so callbacks
    that train, average or reset what they find do not touch it. Called on the teacher itself they give everything.

    Args:
        network: the trained network; it is frozen in place.
        problem: the problem that it solves, which gives the shape of its logits.
        mean: per-channel mean of the teacher's own normalisation, if it differs from that of the images that it is
            given; together with ``std``. Call ``set_data_normalisation`` with that of the images then.
        std: per-channel standard deviation, likewise.
        size: height and width to which images are resized (bilinear, antialiased) for the teacher, or one number for
            both. Default: not resized.
        channels_last: convert images to the channels_last memory format.

    Raises:
        ValueError: for a wrong number of classes, or for only one of ``mean`` and ``std``.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        network: nn.Module,
        problem: Problem,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        size: int | Sequence[int] | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        if (mean is None) != (std is None):
            raise ValueError(f"teacher_mean and teacher_std go together, got {mean} and {std}: give both, or neither")
        outputs = [module.out_features for module in network.modules() if isinstance(module, nn.Linear)]
        classes = _classes_of(network) if problem.one_class and problem.num_classes not in outputs else None
        if classes is not None:  # otherwise the head is another layer, and the first batch shows a wrong shape
            raise ValueError(
                f"the teacher has {classes} classes, the data {problem.num_classes}: train or name another"
            )
        self.network = network.requires_grad_(False)
        self._parts = list(network.modules())  # checked in each step
        self.problem = problem
        self.mean, self.std = mean, std
        self.size = checked_size(size)
        self.channels_last = channels_last
        self.keep_precise("scale", "shift")
        if mean is not None:
            for name in ("scale", "shift"):
                self.register_buffer(name, torch.ones(len(mean)).view(-1, 1, 1), persistent=False)
        self.register_state_dict_post_hook(_leave_out)
        self.register_load_state_dict_pre_hook(_keep_own)
        self.eval()

    def train(self, mode: bool = True) -> FrozenTeacher:
        return super().train(False)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        if memo is None:  # called on the teacher itself
            yield from super().named_modules(None, prefix, remove_duplicate)
        elif self not in memo:  # called on a module that holds it
            if remove_duplicate:
                memo.add(self)
            yield prefix, self

    def check_classes(self, data: Any) -> None:
        """Raise if the data have other classes than the weights were trained on; unnamed classes are not checked.

        Raises:
            ValueError: if the classes differ, or have another order.
        """
        if (what := other_classes(self.network, data)) is not None:
            raise ValueError(
                f"the teacher was trained on other classes than the data has, or in another order ({what}): give "
                "teacher_weights of the same classes, or the data in the same order"
            )

    def fingerprint(self) -> bytes:
        """The sha256 (32 bytes) of all that determines its outputs: weights, buffers, input size, normalisation."""
        found = hashlib.sha256(repr((self.mean, self.std, self.size)).encode())
        for name, value in self.network.state_dict().items():
            value = value.detach().cpu()
            value = value.float() if value.is_floating_point() else value  # the same in runs of any precision
            found.update(f"{name}{list(value.shape)}".encode())
            found.update(value.contiguous().numpy().tobytes())
        return found.digest()

    def set_data_normalisation(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Tell the teacher the images' normalisation, from which they are converted to its own.

        Args:
            mean: per-channel mean of the data.
            std: per-channel standard deviation of the data.
        """
        data_mean, data_std, own_mean, own_std = (
            torch.tensor(values, dtype=torch.float32, device=self.scale.device).view_as(self.scale)
            for values in (mean, std, self.mean, self.std)
        )
        self.scale.copy_(data_std / own_std)
        self.shift.copy_((data_mean - own_mean) / own_std)

    def forward(self, image: Tensor) -> Tensor:
        """Logits in the shape of the problem, without gradient, for images ``[B, C', H, W]`` or rows ``[B, D]``."""
        return self.logits(self.output(image), image)

    def logits(self, output: Any, image: Tensor) -> Tensor:
        """The logits in the result of ``output(image)``."""
        return self.problem.logits(output, image, self.network, "the teacher")

    @torch.no_grad()
    def output(self, image: Tensor) -> Any:
        """Everything that the network returns for images, without gradient, for methods that need more than logits."""
        if any(module.training for module in self._parts):  # set by someone, past train() of this class
            self.eval()
        if self.mean is not None:
            shape = (-1, *[1] * (image.ndim - 2))
            image = (image * self.scale.view(shape) + self.shift.view(shape)).to(image.dtype)
        if self.size is not None and image.shape[-2:] != self.size:
            image = F.interpolate(image, self.size, mode="bilinear", antialias=True)
        if self.channels_last and image.ndim == 4:
            image = image.contiguous(memory_format=torch.channels_last)
        return self.network(image)


def teacher_network(
    teacher: str | nn.Module, weights: str | None, num_classes: int, build: Callable[[str | nn.Module], nn.Module]
) -> nn.Module:
    """The teacher's network with its weights.

    Args:
        teacher: network name or module. A module without ``weights`` is taken as trained.
        weights: a checkpoint or ``state_dict`` file; ``"default"`` for the published weights of a ``timm/`` or
            ``torchvision/`` network; ``"random"`` for random weights.
        num_classes: number of logits.
        build: makes the network from a name, as ``Task.build``.

    Raises:
        ValueError: for a name without weights, or a module with ``"default"``.
        FileNotFoundError: if there is no file ``weights``.
    """
    if isinstance(teacher, str) and weights is None:
        raise ValueError(
            f"teacher {teacher!r} has no weights: set teacher_weights to a checkpoint or state_dict file, "
            "to 'default' for a timm/ or torchvision/ network's published ones, or to 'random' to try things out"
        )
    if weights == "default":
        if not isinstance(teacher, str):
            raise ValueError("teacher_weights 'default' needs the teacher by name, got a module: give its name")
        with naming_argument("teacher"):
            teacher = pretrained_network(teacher, num_classes)
    with naming_argument("teacher"):
        network = build(teacher)
    if weights not in (None, "default", "random"):
        try:
            with naming_argument("teacher_weights"):
                load_weights(network, weights, num_classes)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error}. Train the teacher first, or set 'random' where only the student is evaluated"
            ) from error
    return network


def checked_size(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """``size`` as ``(height, width)``; ``None`` stays.

    Raises:
        ValueError: unless it is one whole number above 0, or two.
    """
    if size is None:
        return None
    both = (size, size) if isinstance(size, int) else tuple(size)
    if len(both) != 2 or not all(isinstance(side, int) and side > 0 for side in both):
        raise ValueError(f"teacher_size must be a whole number above 0, or [height, width], got {size}: give such")
    return both[0], both[1]


def _classes_of(network: nn.Module) -> int | None:
    """The number of outputs of the last layer with weights if it is linear, else ``None``."""
    with_weights = [module for module in network.modules() if any(True for _ in module.parameters(recurse=False))]
    last = with_weights[-1] if with_weights else None
    return last.out_features if isinstance(last, nn.Linear) else None


def _leave_out(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    for key in [key for key in state_dict if key.startswith(prefix)]:
        del state_dict[key]


def _keep_own(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    assert isinstance(module, FrozenTeacher)
    for key, value in module.network.state_dict(prefix=f"{prefix}network.").items():
        state_dict.setdefault(key, value)
