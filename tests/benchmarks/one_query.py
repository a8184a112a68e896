"""One query of 1,000 labels for five networks on Fashion-MNIST: Lewis weights, random, k-center, and how they do.

``python tests/benchmarks/one_query.py --root DATA [--out runs/one_query] [--seeds 0 1 2]``. About 25 minutes of one
thread. Started again after an interruption it repeats only the unfinished piece of work: each finished one is a line of
``OUT/results.csv``. At the end it prints the table.

For each seed 500 images are labelled at random, on which each network is trained first; strategies query by
their features of the other 59,500. Then each network is trained from scratch on the 1,500 labels of each strategy.
"""

from __future__ import annotations

import argparse
import csv
import gc
import logging
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch

from lightning_kd.active_learning import max_lewis_weights
from lightning_kd.active_learning.representations import CheckpointFeatures
from lightning_kd.cli import main as command
from lightning_kd.data import FashionMNISTDataModule, OpenSetDataModule

NETWORKS = ("mlp_64", "mlp_256_128", "cnn_tiny", "cnn", "resnet8")
STRATEGIES = ("lewis", "random", "k_center")
COLUMNS = ("seed", "what", "network", "value", "seconds")


class Pieces:
    """The finished pieces of work, each a line of a CSV file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            path.write_text(",".join(COLUMNS) + "\n")
        with path.open(newline="") as file:
            self.rows = [row for row in csv.DictReader(file) if row["seconds"]]  # a cut last line is done again

    def do(self, seed: int, what: str, network: str, work: Callable[[], float]) -> None:
        """Do the work and add its value and seconds to the file, unless they are there."""
        if any((row["seed"], row["what"], row["network"]) == (str(seed), what, network) for row in self.rows):
            return
        began = time.process_time()
        value = work()
        gc.collect()
        cells = (str(seed), what, network, f"{value:.6f}", f"{time.process_time() - began:.1f}")
        self.rows.append(dict(zip(COLUMNS, cells, strict=True)))
        with self.path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(cells)
        print(*cells, flush=True)

    def values(self, what: str, network: str | None = None) -> dict[str, list[float]]:
        """The values of a kind of work by seed, of one network or of all."""
        found: dict[str, list[float]] = {}
        for row in self.rows:
            if row["what"] == what and network in (None, row["network"]):
                found.setdefault(row["seed"], []).append(float(row["value"]))
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--root", default="data", help="the folder with Fashion-MNIST")
    parser.add_argument("--out", default="runs/one_query")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    pieces = Pieces(Path(given.out) / "results.csv")
    for seed in given.seeds:
        one_seed(seed, given, pieces, Path(given.out) / f"seed{seed}")
    table(pieces, given.networks)


def one_seed(seed: int, given: argparse.Namespace, pieces: Pieces, folder: Path) -> None:
    shared = ["--data.source.root", given.root, "--data.split_seed", str(seed), "--seed_everything", str(seed)]
    shared += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false", "--overwrite"]

    def train(network: str, run: Path, *more: str) -> float:
        words = ["--config", "active_learning/plain_fashion", *shared, "--trainer.max_epochs", str(given.epochs)]
        command(["fit", *words, "--model.network", network, "--run", str(run), *more])
        command(["test", "--config", f"{run}/config.yaml", "--ckpt_path", "last"])
        with (run / "metrics.csv").open(newline="") as file:
            return [float(row["test/acc"]) for row in csv.DictReader(file) if row.get("test/acc")][-1]

    def extract(network: str) -> float:
        source = FashionMNISTDataModule(given.root, val_fraction=0.0)
        data = OpenSetDataModule(source, 10, initial_count=500, budget=1000, rounds=1, split_seed=seed)
        data.setup()
        features = CheckpointFeatures(f"{folder}/first_{network}/checkpoints/last.ckpt", data)
        loader = data.loader("train", np.arange(len(data.train_target)))
        parts = [(batch.index, features(batch.image, batch.index)) for batch in loader]
        index, rows = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
        np.savez(folder / f"{network}.npz", feature=rows, index=index)
        return float(rows.shape[1])

    def total(count: int) -> float:
        files = [np.load(folder / f"{network}.npz")["feature"] for network in given.networks[:count]]
        return float(max_lewis_weights([np.pad(rows, ((0, 0), (0, 1)), constant_values=1) for rows in files]).sum())

    def ask(strategy: str) -> float:
        files = "[" + ", ".join(str(folder / f"{network}.npz") for network in given.networks) + "]"
        words = ["--config", "active_learning/lewis_fashion", *shared, "--model.feature_networks", files]
        words += ["--model.network", "mlp_64", "--trainer.max_epochs", "1"]  # only the query is of interest
        command(["active", *words, "--model.strategy", strategy, "--run", str(folder / f"asked_{strategy}")])
        return 1000.0

    for network in given.networks:
        pieces.do(seed, "first", network, lambda network=network: train(network, folder / f"first_{network}"))  # type: ignore[misc]
        pieces.do(seed, "features", network, lambda network=network: extract(network))  # type: ignore[misc]
    for count in range(1, len(given.networks) + 1):
        pieces.do(seed, "T", str(count), lambda count=count: total(count))  # type: ignore[misc]
    for strategy in STRATEGIES:
        pieces.do(seed, "query", strategy, lambda strategy=strategy: ask(strategy))  # type: ignore[misc]
        answers = ["--data.answers", str(folder / f"asked_{strategy}")]
        weighted = ["--model.use_sampling_weights", "true"]
        for name, more in [(strategy, answers), *([("lewis weighted", answers + weighted)] * (strategy == "lewis"))]:
            for network in given.networks:
                run = folder / f"{name.replace(' ', '_')}_{network}"
                pieces.do(seed, name, network, lambda n=network, run=run, more=more: train(n, run, *more))  # type: ignore[misc]


def table(pieces: Pieces, networks: list[str]) -> None:
    print("\n| labels by | n | mean of all networks % | " + " | ".join(networks) + " |")
    print("| --- | --: | --: |" + " --: |" * len(networks))
    for what in ("first", "random", "k_center", "lewis", "lewis weighted"):
        whole = [v for v in pieces.values(what).values() if len(v) == len(networks)]
        cells = [spread([mean(seed) for seed in whole])]
        cells += [spread([v for seed in pieces.values(what, network).values() for v in seed]) for network in networks]
        print(f"| {what} | {len(whole)} | " + " | ".join(cells) + " |")
    sums = [mean(v for seed in pieces.values("T", str(k + 1)).values() for v in seed) for k in range(len(networks))]
    print("\nT of the first networks: " + ", ".join(f"{value:.1f}" for value in sums))
    seconds = {what: sum(float(r["seconds"]) for r in pieces.rows if r["what"] == what) for what in ("features", "T")}
    print(f"processor seconds: {seconds}; in all {sum(float(row['seconds']) for row in pieces.rows):.0f}")


def spread(values: list[float]) -> str:
    """Mean and standard deviation in percent."""
    if not values:
        return ""
    return f"{100 * mean(values):.2f}" + (f" ± {100 * stdev(values):.2f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
