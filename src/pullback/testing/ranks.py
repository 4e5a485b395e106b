"""Several processes of one gloo group, for tests of what must agree across ranks."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from torch import distributed, multiprocessing


def run_ranks(
    function: Callable[..., Any],
    *args: Any,
    ranks: int = 2,
    timeout: float = 200.0,
    start: Literal["spawn", "fork"] = "spawn",
) -> list[Any]:
    """Call ``function(rank, *args)`` in ``ranks`` processes that form a gloo group, one torch thread each.

    Args:
        function: what a rank does; with ``start="spawn"`` it must stand at the top of a module.
        *args: handed to every rank.
        ranks: number of processes.
        timeout: seconds after which all are killed.
        start: how processes start; "fork" takes any function, and is not on every platform.

    Returns:
        What each rank returned, by rank: tensors, numbers, strings and containers of these.

    Raises:
        torch.multiprocessing.ProcessRaisedException: if a rank raised; the message holds its traceback.
        TimeoutError: if a rank has not ended in time.
        RuntimeError: if torch was built without gloo.

    Example:
        >>> import operator
        >>> run_ranks(operator.neg)
        [0, -1]
    """
    if not distributed.is_available() or not distributed.is_gloo_available():
        raise RuntimeError("torch must be built with the gloo backend to run ranks, got a build without it.")
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.start_processes(
            _rank, args=(ranks, folder, timeout, function, args), nprocs=ranks, join=False, start_method=start
        )
        deadline = time.monotonic() + timeout
        try:
            while not context.join(timeout=max(deadline - time.monotonic(), 0.1)):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{ranks} ranks must end within {timeout:g} s, and have not.")
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


def _rank(
    rank: int, ranks: int, folder: str, timeout: float, function: Callable[..., Any], args: Any
) -> None:
    """One process from start to end."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        store=distributed.FileStore(f"{folder}/store", ranks),
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=timeout),
    )
    torch.save(function(rank, *args), f"{folder}/{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # everything is saved; under load gloo's own threads may still abort an ordinary exit
