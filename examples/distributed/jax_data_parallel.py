"""Batch normalization over eight devices with two images each, in JAX.

    KERAS_BACKEND=jax python examples/distributed/jax_data_parallel.py [--epochs 4] [--devices 8]

Trains a small network on scikit-learn's digits, the same global batches for each of

- one device with the whole batch, `fit`;
- `keras.distribution.DataParallel`, `fit`: arrays are whole there, so statistics are of the global
  batch with and without `synchronized=True`;
- a loop of its own with `shard_map`, `synchronized=True` and `axis_name`;
- the same loop without them: each device normalizes by its two images alone, and what is kept is
  the average over the devices.

The devices are virtual ones of this processor. Prints a line per epoch, and at the end a table with
the accuracy on the test images and how far the kept statistics are from those of one device. The
first three are the same but for rounding, which training amplifies. About one minute.
"""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial

import jax
import keras
import numpy as np
import task
from jax.sharding import Mesh, PartitionSpec
from reporting import table, versions  # `task` says where that is

AXIS = "replicas"
PER_DEVICE = 2
SPLIT, WHOLE = PartitionSpec(AXIS), PartitionSpec()
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
HEADER = ("training", "synchronized", "test accuracy", "kept statistics off by")

Data = tuple[np.ndarray, np.ndarray]


def batches(epoch: int, data: Data, size: int) -> list[Data]:
    """Return the batches of an epoch, the same for every run."""
    order = np.random.default_rng(epoch).permutation(len(data[0]))
    steps = len(order) // size
    chosen = np.split(order[: steps * size], steps)
    return [tuple(part[own] for part in data) for own in chosen]


def fit(data: Data, size: int, epochs: int) -> keras.Model:
    """Train with `fit`, on all devices of the distribution that is set."""
    model = task.network(synchronized=True)
    model.compile(keras.optimizers.Adam(2e-3), LOSS, metrics=["accuracy"])
    for epoch in range(epochs):
        x, y = (np.concatenate(part) for part in zip(*batches(epoch, data, size), strict=True))
        history = model.fit(x, y, batch_size=size, shuffle=False, verbose=0).history
        report(epoch, epochs, history["loss"][0])
    return model


def fit_parallel(data: Data, size: int, epochs: int) -> keras.Model:
    """Train with `fit` under `keras.distribution.DataParallel`."""
    keras.distribution.set_distribution(keras.distribution.DataParallel())
    model = fit(data, size, epochs)
    keras.distribution.set_distribution(None)
    return model


def loop(data: Data, size: int, epochs: int, **options: object) -> keras.Model:
    """Train in a loop of its own, the forward pass mapped over the devices."""
    model = task.network(**options)
    optimizer = keras.optimizers.Adam(2e-3)
    optimizer.build(model.trainable_variables)
    step = training_step(model, optimizer)
    groups = (model.trainable_variables, model.non_trainable_variables, optimizer.variables)
    state = [[variable.value for variable in group] for group in groups]
    for epoch in range(epochs):
        losses = []
        for x, y in batches(epoch, data, size):
            loss, state = step(state, x, y)
            losses.append(float(loss))  # waits, so that steps do not pile up
        report(epoch, epochs, float(np.mean(losses)))
    for group, values in zip(groups, state, strict=True):
        for variable, value in zip(group, values, strict=True):
            variable.assign(np.asarray(value))
    return model


def training_step(model: keras.Model, optimizer: keras.optimizers.Optimizer) -> Callable:
    """Return a function that takes a step: from weights, images and digits to loss and weights."""
    mesh = Mesh(np.array(jax.devices()), (AXIS,))

    @partial(jax.shard_map, mesh=mesh, in_specs=(WHOLE, WHOLE, SPLIT), out_specs=(SPLIT, WHOLE))
    def forward(trainable: list, fixed: list, x: jax.Array) -> tuple:
        logits, kept = model.stateless_call(trainable, fixed, x, training=True)
        # Synchronized, all devices have the same; otherwise they keep the average.
        return logits, jax.lax.pmean(kept, AXIS)

    def loss(trainable: list, fixed: list, x: jax.Array, y: jax.Array) -> tuple:
        logits, kept = forward(trainable, fixed, x)
        return LOSS(y, logits), kept

    @jax.jit
    def step(state: list, x: jax.Array, y: jax.Array) -> tuple:
        trainable, fixed, slots = state
        (value, fixed), gradients = jax.value_and_grad(loss, has_aux=True)(trainable, fixed, x, y)
        trainable, slots = optimizer.stateless_apply(slots, gradients, trainable)
        return value, [trainable, fixed, slots]

    return step


def report(epoch: int, epochs: int, loss: float) -> None:
    """Print how far the training is."""
    print(f"  epoch {epoch + 1} of {epochs}: loss {loss:.3f}", flush=True)


def accuracy(model: keras.Model, images: np.ndarray, digits: np.ndarray) -> float:
    """Return the share of right answers, on one device."""
    alone = task.network()
    alone.set_weights(model.get_weights())
    return float(np.mean(alone.predict(images, verbose=0).argmax(-1) == digits))


def statistics(model: keras.Model) -> np.ndarray:
    """Return all that is kept."""
    return np.concatenate([np.asarray(v.value) for v in model.non_trainable_variables])


def main() -> None:
    """Train in each way and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=4, help="passes over the data (default 4)")
    parser.add_argument("--devices", type=int, default=8, help="virtual devices (default 8)")
    chosen = parser.parse_args()
    if keras.config.backend() != "jax":
        sys.exit("Set KERAS_BACKEND=jax.")
    jax.config.update("jax_num_cpu_devices", chosen.devices)
    # jax 0.10.2: the devices share as many threads as there are cores, or devices; where others
    # take one, those that wait for each other can wait for ever. This sets more.
    os.environ["NPROC"] = str(8 * chosen.devices)

    images, digits, *test = task.load_data()
    size = chosen.devices * PER_DEVICE
    synchronized = partial(loop, synchronized=True, axis_name=AXIS)
    ways = [
        (f"one device, batch of {size}", "-", fit),
        ("DataParallel, fit", "always", fit_parallel),
        ("shard_map, own loop", "yes", synchronized),
        ("shard_map, own loop", "no", loop),
    ]
    rows, models = [], []
    for name, how, train in ways:
        print(f"{name}, synchronized: {how}", flush=True)
        models.append(train((images, digits), size, chosen.epochs))
        distance = np.abs(statistics(models[-1]) - statistics(models[0])).max()
        rows.append([name, how, f"{accuracy(models[-1], *test):.1%}", f"{distance:.1g}"])
    print(f"\n{versions()}; {chosen.devices} devices, {PER_DEVICE} images each")
    print(table(HEADER, rows))


if __name__ == "__main__":
    main()
