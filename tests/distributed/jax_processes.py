"""Two processes of `keras.distribution` that train, and what happens when one of them fails.

    python tests/distributed/jax_processes.py

Prints as JSON: how far the weights of each process are from those of one process alone, the error
when the other process has died, and what both say when one takes a step less.
"""

import contextlib
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import jax
import keras
import numpy as np
from keras import distribution as parallel

from tests.distributed.jax_fit import SAMPLES, STEPS, data, difference, images, trained

PROCESSES = 2
LIMIT = 5  # after this time a process that waits for the end of the other gives up [s]


def connect(address: str, number: int) -> None:
    """Make this process one of two."""
    keras.utils.set_random_seed(0)  # or the processes agree on a seed, which takes seconds
    quick = functools.partial(jax.distributed.initialize, shutdown_timeout_seconds=LIMIT)
    with mock.patch.object(jax.distributed, "initialize", quick):
        parallel.initialize(address, PROCESSES, number)
    # Arrays are not split by Keras 3.15.1: each process hands over its own part.
    parallel.set_distribution(parallel.DataParallel(auto_shard_dataset=False))


def train(model: keras.Model, number: int, steps: int) -> None:
    """Train with this process' half of each batch."""
    split = [part.reshape(STEPS, PROCESSES, -1, *part.shape[1:]) for part in data(model)]
    x, y = (part[:steps, number].reshape(-1, *part.shape[3:]) for part in split)
    model.fit(x, y, batch_size=SAMPLES // PROCESSES, shuffle=False, verbose=0)


def whole(number: int, folder: Path) -> None:
    """Train, save the weights; then the second process dies, and the first goes on."""
    model = images("synchronized")
    train(model, number, STEPS)
    values = [v.value.addressable_data(0) for v in model.weights]
    np.savez(folder / f"{number}.npz", *values)
    if number == 0:
        try:
            train(model, number, 1)
            jax.block_until_ready([v.value for v in model.weights])
        except (jax.errors.JaxRuntimeError, ValueError) as error:  # which one, varies
            (folder / "error").write_text(str(error))
    while not (folder / "0.npz").exists():
        time.sleep(0.1)
    os._exit(0)  # at the usual end a process waits for the other one


def short(number: int, _folder: Path) -> None:
    """Train, the second process for one step less."""
    model = images("plain")
    train(model, number, 2 - number)
    jax.block_until_ready([v.value for v in model.weights])


def start(part: str, folder: str, address: str) -> list[subprocess.Popen]:
    """Start both processes of a part."""
    return [
        subprocess.Popen(
            [sys.executable, __file__, part, str(number), folder, address],
            env=os.environ | {"JAX_COORDINATOR_BIND_ADDRESS": address},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(PROCESSES)
    ]


@contextlib.contextmanager
def free_address() -> Iterator[str]:
    """Hold a port that nobody else gets; who shares it, as the coordinator does, may listen."""
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{reserved.getsockname()[1]}"


def main() -> None:
    """Start both parts and print what came of them."""
    with tempfile.TemporaryDirectory() as folder, free_address() as one, free_address() as other:
        started = {"whole": start("whole", folder, one), "short": start("short", folder, other)}
        wanted = trained(images("synchronized"))
        said = {part: [p.communicate()[0] for p in pair] for part, pair in started.items()}
        if any(process.returncode for process in started["whole"]):
            sys.exit("\n".join(said["whole"]))
        files = [np.load(Path(folder, f"{number}.npz")) for number in range(PROCESSES)]
        found = {
            "differences": [difference(list(file.values()), wanted) for file in files],
            "error of the first": Path(folder, "error").read_text(),
            "ended": [process.returncode for process in started["short"]],
            "said": said["short"],
        }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        part, number, folder, address = sys.argv[1:]
        connect(address, int(number))
        {"whole": whole, "short": short}[part](int(number), Path(folder))
