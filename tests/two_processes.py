"""Run a function on two gloo ranks, in processes forked from one that has imported the package already."""

from __future__ import annotations

import os
import socket
import traceback
import warnings
from collections.abc import Callable
from typing import Any

from tests.forked import CONTEXT, THREADS


def _child(
    rank: int, port: int, function: Callable[..., Any], args: tuple[Any, ...], environment: dict[str, str], queue: Any
) -> None:
    import torch
    from lightning.pytorch.utilities import rank_zero_only

    # set as in a process that is launched with its rank: else both take themselves for rank 0 until a Trainer is made,
    # and one may remove files that the other has just written
    rank_zero_only.rank = rank
    torch.set_num_threads(int(THREADS))
    warnings.simplefilter("ignore")
    # the environment of this test, not of the one that started the fork server, which may have set a seed
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(
        LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    try:
        queue.put((rank, True, function(*args)))
    except BaseException:
        queue.put((rank, False, traceback.format_exc()))


def on_two_ranks(function: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``function(*args)`` returned on rank 0 and on rank 1 (plain values: they cross a pipe).

    ``function`` makes its ``Trainer(strategy="ddp", devices=2, accelerator="cpu")``; it must be importable.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = CONTEXT.Queue()
    shared = (port, function, args, {**os.environ}, queue)
    children = [CONTEXT.Process(target=_child, args=(rank, *shared)) for rank in range(2)]
    for child in children:
        child.start()
    try:
        answers = {rank: (done, value) for rank, done, value in (queue.get(timeout=120) for _ in children)}
    finally:
        for child in children:
            child.join(10)
            child.kill()
    for rank in range(2):
        assert answers[rank][0], f"rank {rank}:\n{answers[rank][1]}"
    return [answers[rank][1] for rank in range(2)]
