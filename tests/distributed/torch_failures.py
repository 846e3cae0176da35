"""Start pairs of processes of which one fails; print what the other one says, and when.

    KERAS_BACKEND=torch python tests/distributed/torch_failures.py

The last line is JSON: for each case what process 0 ended in.
"""

import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.shards import SPACE, built
from tests.distributed.torch_ranks import join

LIMIT = timedelta(seconds=4)


def forward(layer: Any, samples: int = 4) -> Any:
    """Return the output for some batch."""
    x = torch.randn(samples, *SPACE, requires_grad=True)
    return layer(x, training=True)


def backward(layer: Any) -> None:
    """Take a whole step."""
    forward(layer).sum().backward()


def end(layer: Any) -> None:
    """End at once, as a process does that crashes."""
    os._exit(1)


def end_halfway(layer: Any) -> None:
    """End after the forward pass."""
    forward(layer)
    os._exit(1)


def stay(layer: Any) -> None:
    """Take no step, and do not end before the other one gives up."""
    time.sleep(60)


def synchronize(layer: Any) -> None:
    """Take no step, and wait for the others."""
    distributed.barrier()


def batches(number: int) -> Callable[[Any], None]:
    """Return what takes so many steps, within the guard against uneven numbers."""

    def run(layer: Any) -> None:
        model = DistributedDataParallel(layer)
        with model.join(throw_on_early_termination=True):
            for _ in range(number):
                backward(model)

    return run


# What process 0 does, and process 1; both have taken a step.
CASES: dict[str, tuple[Callable[[Any], object], Callable[[Any], object]]] = {
    "ended": (backward, end),
    "ended halfway": (backward, end_halfway),
    "one step short": (backward, stay),
    "one step short, at a barrier": (backward, synchronize),
    "one step short, checked": (backward, synchronize),
    "one step short, joined": (batches(3), batches(2)),
}


def work(case: str, rank: int, folder: str, found: Any) -> None:
    """Run one process of a case."""
    if case.endswith("checked"):
        os.environ["TORCH_DISTRIBUTED_DEBUG"] = "DETAIL"
        distributed.set_debug_level_from_env()
    torch.set_num_threads(1)
    join(folder, rank, 2, LIMIT)
    layer = built("batch", synchronized=True)
    backward(layer)
    start, said = time.monotonic(), None
    try:
        CASES[case][rank](layer)
    except RuntimeError as error:
        said = str(error)
    if rank == 0:
        found.put({"case": case, "said": said, "seconds": time.monotonic() - start})


def main() -> None:
    """Run all cases at the same time."""
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for case in CASES:
            os.mkdir(os.path.join(folder, case))
            processes += [
                context.Process(target=work, args=(case, rank, os.path.join(folder, case), found))
                for rank in range(2)
            ]
        for process in processes:
            process.start()
        results = [found.get(timeout=300) for _ in CASES]
        for process in processes:
            process.kill()
            process.join()
    sys.stdout.write(json.dumps({result.pop("case"): result for result in results}) + "\n")


if __name__ == "__main__":
    main()
