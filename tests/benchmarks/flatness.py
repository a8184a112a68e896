"""The benches of optimum shifting, SAM and curvature."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import Clock, Settings, Variant, compare
from torch import Tensor, nn

from lightning_kd.core.batch import Batch
from lightning_kd.flatness import SAM, shift_linear
from lightning_kd.metrics import hessian_eigenvalues, hessian_trace
from lightning_kd.nets import build_network


def plain_shift(weight: Tensor, inputs: Tensor) -> Tensor:
    """The projector from a singular value decomposition of the inputs."""
    wide = inputs.double()
    _, sizes, rows = torch.linalg.svd(wide, full_matrices=False)
    rank = int((sizes > max(wide.shape) * torch.finfo(inputs.dtype).eps * sizes[0]).sum())
    return (weight.double() @ rows[:rank].mT @ rows[:rank]).to(weight)


def epoch_seconds(network: nn.Module, classes: int, side: int, batch: int, images: int, rounds: int) -> float:
    """How long the training steps of an epoch take, from a few of them."""
    network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    image = torch.randn(batch, 3, side, side).contiguous(memory_format=torch.channels_last)
    target = torch.arange(batch) % classes
    best = float("inf")
    for _ in range(rounds + 1):
        with Clock() as clock:
            optimizer.zero_grad()
            F.cross_entropy(network(image), target).backward()
            optimizer.step()
        best = min(best, clock.seconds)
    return best * images / batch


def shift(settings: Settings) -> None:
    """A shift of three heads, against the projector of an SVD; the usual ones as a share of a training epoch."""
    generator = torch.Generator().manual_seed(0)
    epochs: dict[tuple[int, int, int], tuple[str, Callable[[], float]]] = {
        (100, 512, 10): (
            "resnet18 on 50,000 images of 32x32",
            lambda: epoch_seconds(build_network("resnet18", 10), 10, 32, 32, 50_000, settings.size(3, 1)),
        ),
        (512, 2048, 100): ("", lambda: 0.0),
        (2000, 2048, 1000): (
            "resnet50 on 1,281,167 images of 224x224",
            lambda: epoch_seconds(
                build_network("torchvision/resnet50", 1000), 1000, 224, 4, 1_281_167, settings.size(2, 1)
            ),
        ),
    }
    for (count, dim, classes), (name, epoch) in epochs.items():
        if settings.quick and count == 2000:
            continue
        inputs = torch.randn(count, dim, generator=generator).relu()
        weight = torch.randn(classes, dim, generator=generator)
        found: dict[str, Tensor] = {}
        times: list[float] = []

        def by_svd(weight: Tensor = weight, inputs: Tensor = inputs, found: dict[str, Tensor] = found) -> float:
            with Clock() as clock:
                found["svd"] = plain_shift(weight.double(), inputs)
            return clock.seconds

        def ours(
            weight: Tensor = weight,
            inputs: Tensor = inputs,
            found: dict[str, Tensor] = found,
            times: list[float] = times,
        ) -> float:
            with Clock() as clock:
                found["ours"] = shift_linear(weight.double(), None, inputs).weight
            times.append(clock.seconds)
            return clock.seconds

        variants = [Variant("SVD, float64", by_svd), Variant("shift_linear", ours, ">= 3" if count == 512 else "")]
        compare(f"shift: {count} samples, head {dim} x {classes}", variants, settings.rounds)
        difference = float((found["ours"] - found["svd"]).abs().max() / found["svd"].abs().max())
        print(f"largest relative difference {difference:.1e}")
        if name:
            print(f"share of the steps of an epoch, {name}: {min(times) / epoch():.1e}")
        print(flush=True)


def network_and_batch(size: int) -> tuple[nn.Module, Batch]:
    """A resnet8 and one batch of 32x32 images."""
    network = build_network("resnet8", 10).to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(size, 3, 32, 32, generator=generator).contiguous(memory_format=torch.channels_last)
    return network, Batch(image, torch.arange(size) % 10)


def sam(settings: Settings) -> None:
    """A step of SAM against two plain steps of its base optimizer."""
    network, batch = network_and_batch(64)
    steps = settings.size(6, 3)

    def base(parameters: object) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=5e-4)  # type: ignore[arg-type]

    def run(optimizer: torch.optim.Optimizer, evaluations: int) -> float:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(network(batch.image), batch.target)
            loss.backward()
            return loss

        with Clock() as clock:
            for _ in range(steps * evaluations):
                optimizer.step(closure)  # type: ignore[arg-type]
        return clock.seconds / steps

    plain, ours = base(network.parameters()), SAM(network.parameters(), base)
    variants = [
        Variant("two steps of SGD", lambda: run(plain, 2)),
        Variant("a step of SAM", lambda: run(ours, 1), ">= 0.95"),
    ]
    compare("sam: a step, batch 64", variants, settings.rounds)


def curvature(settings: Settings) -> None:
    """A Hessian-vector product inside the eigenvalues and the trace against two gradient evaluations."""
    network, batch = network_and_batch(128)
    network.eval().to(memory_format=torch.contiguous_format)  # faster in the second derivative
    batch = batch._replace(image=batch.image.contiguous())
    parameters = [p for p in network.parameters() if p.requires_grad]
    count = settings.size(12, 6)

    def loss_of(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch.image), batch.target)

    def gradients() -> float:
        with Clock() as clock:
            for _ in range(settings.size(6, 3)):
                for _ in range(2):
                    torch.autograd.grad(loss_of(network, batch), parameters)
        return clock.seconds / settings.size(6, 3)

    def eigenvalues() -> float:
        with Clock() as clock:
            found = hessian_eigenvalues(network, loss_of, [batch], steps=count)
        return clock.seconds / found.hvps

    def trace() -> float:
        with Clock() as clock:
            found = hessian_trace(network, loss_of, [batch], min_probes=count, max_probes=count)
        return clock.seconds / found.hvps

    variants = [
        Variant("two gradients", gradients),
        Variant("a product in hessian_eigenvalues", eigenvalues, ">= 0.85"),
        Variant("a product in hessian_trace", trace, ">= 0.85"),
    ]
    compare("curvature: a Hessian-vector product, batch 128", variants, settings.rounds)
