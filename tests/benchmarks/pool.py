"""The benches of querying a pool: 50,000 samples, 512 features, 100 classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import lightning as L
import numpy as np
import torch
from measure import Clock, Settings, Variant, compare
from sklearn.metrics import pairwise_distances
from sklearn.mixture import GaussianMixture
from torch import Tensor

from lightning_kd.active_learning import (
    PoolClassifier,
    badge_select,
    draw_until,
    k_center_greedy,
    known_posterior,
    lewis_weights,
    max_lewis_weights,
    predictive_entropy,
    select_query,
)
from lightning_kd.data import Arrays, ClassificationDataModule, OpenSetDataModule
from lightning_kd.pool import UNKNOWN, PoolRecord

FEATURES, CLASSES = 512, 100


def clustered(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Features of ``CLASSES`` clusters, ``[count, FEATURES]``, none negative, as after a ReLU; and their clusters."""
    centre = torch.randn(CLASSES, FEATURES, generator=generator)
    cluster = torch.randint(CLASSES, (count,), generator=generator)
    return (centre[cluster] + 0.7 * torch.randn(count, FEATURES, generator=generator)).relu(), cluster


def plain_k_center(pool: np.ndarray, labelled: np.ndarray) -> Iterator[int]:
    """Yield one pick at a time: distances of the whole pool to the latest one, and running minima."""
    nearest = pairwise_distances(pool, labelled).min(axis=1)
    while True:
        chosen = int(np.argmax(nearest))
        yield chosen
        nearest = np.minimum(nearest, pairwise_distances(pool, pool[[chosen]])[:, 0])


def k_center(settings: Settings) -> None:
    """A pick of k-center greedy out of a query of 1,500, the first distances to 1,000 labelled samples aside."""
    count, budget, turn = settings.size(50_000, 5_000), settings.size(1_500, 300), settings.size(50, 20)
    features, _ = clustered(count + 1_000, torch.Generator().manual_seed(0))
    pool, labelled = features[:count], features[count:]
    one_by_one = plain_k_center(pool.numpy(), labelled.numpy())
    found = [next(one_by_one)]
    ours: list[int] = []

    def plain() -> float:
        with Clock() as clock:
            found.extend(next(one_by_one) for _ in range(turn))  # goes on where the last turn ended
        return clock.seconds / turn

    def lazy() -> float:
        with Clock() as start:
            k_center_greedy(pool, labelled, 1)
        with Clock() as clock:
            ours[:] = k_center_greedy(pool, labelled, budget).tolist()
        return (clock.seconds - start.seconds) / (budget - 1)

    variants = [
        Variant("pairwise_distances for each pick", plain),
        Variant(f"k_center_greedy, {budget:,} picks", lazy, ">= 60"),
    ]
    compare(f"k-center: a pick of {count:,} x {FEATURES}", variants, settings.rounds)
    shared = min(len(found), budget)
    same = sum(a == b for a, b in zip(found, ours, strict=False))
    print(f"the same in {same} of the {shared} picks that both made\n", flush=True)


def plain_badge(probabilities: Tensor, feature: Tensor, budget: int, generator: np.random.Generator) -> list[int]:
    """k-means++ seeding on the whole gradient embeddings, ``[N, CLASSES * FEATURES]`` in memory."""
    residual = -probabilities.clone()
    residual[torch.arange(len(residual)), probabilities.argmax(1)] += 1
    embedding = (residual[:, :, None] * feature[:, None, :]).flatten(1).numpy()
    picks = [int((embedding**2).sum(axis=1).argmax())]
    nearest = np.full(len(embedding), np.inf)
    while len(picks) < budget:
        nearest = np.minimum(nearest, pairwise_distances(embedding, embedding[picks[-1:]])[:, 0])
        weight = nearest.astype(np.float64) ** 2
        weight[picks] = 0
        picks.append(int(generator.choice(len(weight), p=weight / weight.sum())))
    return picks


def badge(settings: Settings) -> None:
    """A query of BADGE; whole embeddings of 50,000 samples would be 10 GB, so that few samples are compared."""
    few, many, picks = settings.size(2_000, 500), settings.size(50_000, 5_000), settings.size(10, 5)
    generator = torch.Generator().manual_seed(0)
    feature, _ = clustered(many, generator)
    probabilities = (3 * torch.randn(many, CLASSES, generator=generator)).softmax(1)

    def plain() -> float:
        with Clock() as clock:
            plain_badge(probabilities[:few], feature[:few], picks, np.random.default_rng(0))
        return clock.seconds / (picks * few)

    def ours(count: int, picks: int) -> float:
        with Clock() as clock:
            badge_select(probabilities[:count], feature[:count], picks, np.random.default_rng(0))
        return clock.seconds / (picks * count)

    variants = [
        Variant(f"{few:,} whole embeddings, {picks} picks", plain),
        Variant(f"badge_select, the same {few:,}, {picks} picks", lambda: ours(few, picks), ">= 10"),
        Variant(f"badge_select, {many:,}, {5 * picks} picks", lambda: ours(many, 5 * picks), ">= 10"),
    ]
    compare(f"badge: a pick, of a sample of {CLASSES} x {FEATURES}", variants, settings.rounds, show="us")


def plain_posterior(logits: Tensor) -> dict[int, float]:
    """A loop that puts sample by sample into lists, a mixture for each predicted class, a dictionary of posteriors."""
    values: dict[int, list[float]] = {c: [] for c in range(CLASSES)}
    members: dict[int, list[int]] = {c: [] for c in range(CLASSES)}
    for start in range(0, len(logits), 128):
        largest, predicted = logits[start : start + 128].max(1)
        for i in range(len(predicted)):
            c = predicted[i].item()
            if c < CLASSES:
                values[c].append(largest[i].item())
                members[c].append(start + i)
    found: dict[int, float] = {}
    for c, activations in values.items():
        if len(activations) > 1:
            column = np.array(activations)[:, None]
            mixture = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=0).fit(column)
            posterior = mixture.predict_proba(column)[:, mixture.means_.argmax()]
            found.update(zip(members[c], posterior.tolist(), strict=True))
    return found


def posterior(settings: Settings) -> None:
    """LfOSA: the posterior of each sample of the pool from its logits."""
    count = settings.size(50_000, 5_000)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count, CLASSES + 1, generator=generator)
    certain = 4 + 4 * torch.randint(2, (count,), generator=generator) + torch.randn(count, generator=generator)
    logits[torch.arange(count), torch.randint(CLASSES + 1, (count,), generator=generator)] += certain

    def plain() -> float:
        with Clock() as clock:
            plain_posterior(logits)
        return clock.seconds

    def ours() -> float:
        with Clock() as clock:
            known_posterior(logits, CLASSES)
        return clock.seconds

    variants = [
        Variant("a loop over samples, sklearn mixtures", plain),
        Variant("known_posterior", ours, ">= 20"),
    ]
    compare(f"posterior: {count:,} samples, {CLASSES} classes", variants, settings.rounds)


class MadeUpSource(ClassificationDataModule):
    """Random images, or random features."""

    def __init__(self, count: int, shape: tuple[int, ...]) -> None:
        names = [str(c) for c in range(10)]
        super().__init__(
            class_names=names, input_shape=shape, mean=[0.0] * shape[0], std=[1.0] * shape[0], val_fraction=0.0
        )
        self.count = count

    def load_arrays(self) -> Arrays:
        generator = torch.Generator().manual_seed(0)
        shape = (self.count, *self.input_shape)
        image = (
            torch.randint(256, shape, dtype=torch.uint8, generator=generator) if len(shape) == 4 else torch.rand(shape)
        )
        target = torch.arange(self.count) % 10
        return Arrays(image, target, image[:1_000], target[:1_000])


def lewis(settings: Settings) -> None:
    """Lewis weights for p = 2 and 1; then one query for three networks against five rounds of their mean entropy."""
    count = settings.size(50_000, 5_000)
    features, _ = clustered(count, torch.Generator().manual_seed(0))

    def whole() -> float:
        with Clock() as clock:
            torch.linalg.qr(features.double())[0].square().sum(1)
        return clock.seconds

    def weights(p: float) -> float:
        with Clock() as clock:
            lewis_weights(features, p, tolerance=1e-6)
        return clock.seconds

    variants = [
        Variant("a thin QR of all rows at once, p = 2", whole),
        Variant("lewis_weights, p = 2, in blocks", lambda: weights(2.0), ">= 0.4"),
        Variant("lewis_weights, p = 1", lambda: weights(1.0)),
    ]
    compare(f"lewis: weights of {count:,} x {FEATURES}", variants, settings.rounds)

    budget, rounds, names = settings.size(500, 100), 5, ("mlp_32", "cnn_tiny", "mlp_64_32")
    data = OpenSetDataModule(
        MadeUpSource(settings.size(10_000, 2_000), (1, 28, 28)), 10, initial_count=200, budget=budget, rounds=rounds
    )
    data.setup()

    truth = torch.from_numpy(data.oracle(np.arange(len(data.train_target))))

    def trained(labelled: np.ndarray) -> list[PoolClassifier]:
        """The networks, trained on these samples from scratch."""
        tasks = []
        for name in names:
            task = PoolClassifier(name, 10, input_shape=(1, 28, 28), strategy="k_center").train()
            loader = data.source.loader("train", labelled, shuffle=True, batch_size=32)
            optimizer = torch.optim.SGD(task.parameters(), lr=0.01, momentum=0.9)
            for _ in range(10):
                for batch in loader:
                    optimizer.zero_grad()
                    torch.nn.functional.cross_entropy(task(batch.image), truth[batch.index]).backward()
                    optimizer.step()
            tasks.append(task.eval())
        return tasks

    @torch.no_grad()
    def pool_outputs(task: PoolClassifier, name: str) -> Tensor:
        """The features or probabilities of a network for the pool."""
        loader = data.source.loader("train", data.unlabelled_indices)
        outputs = (task.predict_step(batch, 0) for batch in loader)
        return torch.cat([output[name] for output in outputs])

    start, pool = data.known_indices, data.unlabelled_indices

    def at_once() -> float:
        with Clock() as clock:
            largest = max_lewis_weights([pool_outputs(task, "feature") for task in trained(start)])
            drawn = draw_until(largest, budget, np.random.default_rng(0))
            trained(np.union1d(start, pool[drawn.distinct]))
        return clock.seconds

    def by_rounds() -> float:
        with Clock() as clock:
            labelled = start
            for _ in range(rounds):
                entropy = torch.stack(
                    [predictive_entropy(pool_outputs(task, "probabilities")) for task in trained(labelled)]
                )
                order = pool[entropy.mean(0).argsort(descending=True)]
                labelled = np.union1d(labelled, order[~np.isin(order, labelled)][: budget // rounds])
            trained(labelled)
        return clock.seconds

    variants = [
        Variant(f"{rounds} rounds of mean entropy", by_rounds),
        Variant("one query by Lewis weights", at_once, ">= 2"),
    ]
    compare(f"lewis: from 200 to {200 + budget} labels of {len(pool):,}, 3 networks", variants, settings.rounds)


def score(settings: Settings) -> None:
    """Scoring a pool and choosing from it, an image, against a bare prediction of the same images."""
    data = OpenSetDataModule(MadeUpSource(settings.size(20_000, 4_000), (3, 32, 32)), 4, initial_count=400, budget=300)
    data.setup()
    count = len(data.unlabelled_indices)
    task = PoolClassifier("cnn", 4, strategy="entropy")

    def trainer() -> L.Trainer:
        return L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)

    def plain() -> float:
        with Clock() as clock:
            trainer().predict(task, dataloaders=data.loader("train", data.unlabelled_indices))
        return clock.seconds / count

    def ours() -> float:
        with Clock() as clock:
            select_query(trainer(), task, data)
        return clock.seconds / count

    variants = [Variant("trainer.predict", plain), Variant("choose", ours, ">= 0.95")]
    compare(f"score: one of {count:,} images, cnn", variants, settings.rounds, show="us")


def books(settings: Settings) -> None:
    """Reading a record with the 10,000 answers of a round: new index sets, and a view for a strategy."""
    sizes = [settings.size(n, n // 10) for n in (50_000, 1_000_000)]

    def turn(count: int) -> Callable[[], float]:
        data = OpenSetDataModule(MadeUpSource(count, (1,)), 4, initial_count=400, budget=300)
        data.setup()
        record = PoolRecord(Path("pool.json"))
        asked = data.unlabelled_indices[:10_000]
        record.add_query(asked, np.zeros(len(asked)), ["0"] * len(asked))
        names = [*data.class_names, UNKNOWN]
        record.add_answers({int(i): names[a] for i, a in zip(asked, data.oracle(asked), strict=True)}, "oracle")

        def take() -> float:
            with Clock() as clock:
                data.set_record(record)
                data.view()
            return clock.seconds

        return take

    variants = [Variant(f"{count:,} samples", turn(count)) for count in sizes]
    compare("books: 10,000 answers taken, well under 1,000 ms", variants, settings.rounds)
