"""Start the processes of a `torch.distributed` group, run checks in them, print what they found.

    KERAS_BACKEND=torch python tests/distributed/torch_ranks.py 2 values

The last line is JSON: for each check what each rank returned.
"""

import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from tests.distributed import torch_training, torch_values

CHECKS = {
    "values": torch_values.CHECKS,
    "three": torch_values.CHECKS_OF_THREE,
    "training": torch_training.CHECKS,
}
LIMIT = timedelta(seconds=60)


def join(folder: str, rank: int, size: int, limit: timedelta = LIMIT) -> None:
    """Join a group of processes on this machine."""
    # A file in place of a port: nothing to be in use already.
    store = distributed.FileStore(str(Path(folder, "store")), size)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)


def work(folder: str, rank: int, size: int, checks: dict[str, Callable[[str], object]]) -> None:
    """Run the checks in one process; the first one prints."""
    torch.set_num_threads(1)
    join(folder, rank, size)
    found = {name: check(folder) for name, check in checks.items()}
    everyone = [None] * size
    distributed.all_gather_object(everyone, found)
    if rank == 0:
        named = {name: [each[name] for each in everyone] for name in found}
        sys.stdout.write(json.dumps(named) + "\n")
        sys.stdout.flush()
    distributed.destroy_process_group()


def main() -> None:
    """Run the checks of a group in so many processes."""
    size, checks = int(sys.argv[1]), CHECKS[sys.argv[2]]
    # Forked, so that what is imported here, with the compiler, is imported once.
    torch.compiler.reset()
    start = multiprocessing.get_context("fork").Process
    with tempfile.TemporaryDirectory() as folder:
        processes = [start(target=work, args=(folder, r, size, checks)) for r in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    sys.exit(max(abs(process.exitcode) for process in processes))


if __name__ == "__main__":
    main()
