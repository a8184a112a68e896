"""How fast the collection is against plain code: ``python tests/benchmarks/run.py [BENCH ...] [options]``.

Ratios only, and never asserted: the variants of a table take turns in one process, so other work of the machine slows
them alike. Printed are the median over rounds of the ratio within a round, and the ratio of the best times. One thread
by default, and then processor time: with several, a neighbour that holds one core stops them all.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import warnings

import torch
from benches import BENCHES
from measure import Settings, clock_name


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the collection against plain code, as ratios.")
    parser.add_argument("bench", nargs="*", help=f"any of {', '.join(BENCHES)}; default: all")
    parser.add_argument("--rounds", type=int, help="turns of each variant (default: 5, with --quick 2)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--quick", action="store_true", help="shorter turns, smaller batches; under two minutes")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.bench if name not in BENCHES]
    if unknown:
        parser.error(f"no bench {unknown[0]!r}: choose from {', '.join(BENCHES)}")
    rounds = arguments.rounds if arguments.rounds is not None else 2 if arguments.quick else 5
    for name, value in (("rounds", rounds), ("threads", arguments.threads)):
        if value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")

    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"{os.cpu_count()} cores ({platform.machine()}){load}, GPU: {gpu}")
    print(
        f"torch {torch.__version__}, threads: {arguments.threads}, time: {clock_name()}, rounds: {rounds}\n", flush=True
    )
    for name in arguments.bench or BENCHES:
        BENCHES[name](Settings(rounds, arguments.quick))


if __name__ == "__main__":
    main()
