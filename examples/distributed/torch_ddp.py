"""Train on digits with tiny batches in several processes, with and without `synchronized=True`.

    KERAS_BACKEND=torch python examples/distributed/torch_ddp.py

Starts its processes on this machine (gloo, `torch.distributed`). Each has 2 images of every batch;
`DistributedDataParallel` around a `keras.Model` averages the gradients in a custom loop. Prints the
loss of each epoch, and at the end the test accuracy of

- one process that has the whole batches,
- the processes, each with the statistics of its own 2 images,
- the processes with `synchronized=True`.

Over several machines, run one process per device with `torchrun`, which sets what the engine
needs, and then `init_process_group` without a store; the rest stays as it is here. About two
minutes.
"""

import argparse
import multiprocessing
import os
import tempfile
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import torch
from task import load_data, network
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

# Beside `task`, which tells where it lies.
from reporting import table, versions  # isort: skip

PER_PROCESS = 2
SEED = 0


def shuffled(count: int, batch: int, epoch: int) -> np.ndarray:
    """Return the samples of each step of an epoch, the same in all processes."""
    order = np.random.default_rng([SEED, epoch]).permutation(count)
    return order[: count - count % batch].reshape(-1, batch)


def train(model: keras.Model, module: Any, name: str, batch: int, epochs: int) -> None:
    """Train a model on this process' part of every batch.

    Args:
        model: The model.
        module: What is called: the model, or DistributedDataParallel around it.
        name: Printed by the first process with the loss of each epoch.
        batch: Number of images of all processes together.
        epochs: Number of epochs.
    """
    images, digits, *_ = (torch.from_numpy(array) for array in load_data())
    rank, size = (0, 1) if module is model else (distributed.get_rank(), batch // PER_PROCESS)
    optimizer = torch.optim.SGD([v.value for v in model.trainable_variables], 0.02, momentum=0.9)
    for epoch in range(epochs):
        losses = []
        for step in shuffled(len(images), batch, epoch):
            part = step[rank::size]
            # Keras takes `training` as an argument; `module.train()` would not reach its layers.
            logits = module(images[part], training=True)
            loss = torch.nn.functional.cross_entropy(logits, digits[part].long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        if rank == 0:
            print(f"{name}: epoch {epoch + 1} of {epochs}, loss {np.mean(losses):.3f}", flush=True)


def accuracy(model: keras.Model) -> float:
    """Return the share of the test images that are recognized."""
    *_, images, digits = load_data()
    with torch.no_grad():
        found = model(torch.from_numpy(images), training=False).argmax(-1).numpy()
    return float(np.mean(found == digits))


def work(rank: int, folder: str, options: argparse.Namespace, found: Any) -> None:
    """Be one process: train in turn with and without synchronization."""
    torch.set_num_threads(1)
    size = options.processes
    store = distributed.FileStore(os.path.join(folder, "store"), size)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    for synchronized in (False, True):
        model = network(SEED, synchronized=synchronized)
        name = f"{size} processes" + (", synchronized" if synchronized else "")
        module = DistributedDataParallel(model)
        train(model, module, name, size * PER_PROCESS, options.epochs)
        # Without synchronization each process keeps statistics of its own; we take the first's.
        if rank == 0:
            found.put((name, accuracy(model)))
    distributed.destroy_process_group()


def in_processes(options: argparse.Namespace) -> list[tuple[str, float]]:
    """Start the processes and return what the first one finds."""
    context = multiprocessing.get_context("forkserver")  # imports once for all
    found = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=work, args=(rank, folder, options, found))
            for rank in range(options.processes)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a process failed; what it said stands above")
    return [found.get() for _ in range(2)]


def main() -> None:
    """Train in one process and in several, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, default=4, help="default 4")
    parser.add_argument("--epochs", type=int, default=4, help="default 4")
    options = parser.parse_args()
    torch.set_num_threads(1)

    batch = options.processes * PER_PROCESS
    model = network(SEED)
    train(model, model, "1 process", batch, options.epochs)
    results = [(f"1 process, batches of {batch}", accuracy(model)), *in_processes(options)]
    print(f"\n{versions()}; {options.epochs} epochs, batches of {batch}, {PER_PROCESS} per process")
    print(table(["run", "test accuracy"], [(name, f"{share:.1%}") for name, share in results]))


if __name__ == "__main__":
    main()
