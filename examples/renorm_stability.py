"""Batch renormalization that trains, beside one that diverges.

    KERAS_BACKEND=jax python examples/renorm_stability.py

Trains a multilayer perceptron of eight hidden layers, each Dense, normalization and relu, with SGD
at learning rate 0.1 and momentum 0.9 on inputs far from standardized, N(3, 5²). Batch size 64, 400
steps, five seeds for each of

- keras_bn.BatchNormalization,
- keras_bn.BatchRenormalization, its warm-up scaled to the run,
- keras.layers.BatchNormalization(renorm=True) at its defaults: no warm-up, no limits on r and d.

Prints a line per run, and at the end a table: how many seeds ended in NaN, after how many steps,
and the median test loss and accuracy of the others. About one minute.
"""

import argparse
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import keras
import numpy as np
from reporting import table, versions
from threadpoolctl import threadpool_limits

import keras_bn

FEATURES, CLASSES, WIDTH, DEPTH = 32, 10, 128, 8
TRAIN, TEST, BATCH_SIZE, EPOCHS = 6_400, 1_000, 64, 4
STEPS = EPOCHS * TRAIN // BATCH_SIZE
WARM_UP = (STEPS // 10, STEPS // 2)

RIVALS: dict[str, Callable[[], keras.layers.Layer]] = {
    "keras_bn.BatchNormalization": keras_bn.BatchNormalization,
    "keras_bn.BatchRenormalization": partial(
        keras_bn.BatchRenormalization, rmax_steps=WARM_UP, dmax_steps=WARM_UP
    ),
    "keras.layers.BatchNormalization(renorm=True)": partial(
        keras.layers.BatchNormalization, renorm=True
    ),
}


@dataclass(frozen=True)
class Result:
    """How one training run ended."""

    steps: int
    loss: float
    accuracy: float

    @property
    def diverged(self) -> bool:
        """Whether the loss became NaN."""
        return bool(np.isnan(self.loss))

    def __str__(self) -> str:
        """Say it in words."""
        if self.diverged:
            return f"NaN after {self.steps} steps"
        return f"test loss {self.loss:.3f}, accuracy {self.accuracy:.1%}"


def data(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs from N(3, 5²) and the class of each: the largest of ten linear functions."""
    rng = np.random.default_rng(seed)
    x = rng.normal(3.0, 5.0, size=(TRAIN + TEST, FEATURES)).astype("float32")
    directions = rng.normal(size=(FEATURES, CLASSES))
    return x, np.argmax((x - 3.0) @ directions, axis=1)


def network(normalization: Callable[[], keras.layers.Layer]) -> keras.Model:
    """Return the perceptron with a fresh normalization layer in each hidden block."""
    model = keras.Sequential([keras.Input((FEATURES,))])
    for _ in range(DEPTH):
        model.add(keras.layers.Dense(WIDTH))
        model.add(normalization())
        model.add(keras.layers.Activation("relu"))
    model.add(keras.layers.Dense(CLASSES))
    model.compile(
        optimizer=keras.optimizers.SGD(learning_rate=0.1, momentum=0.9),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def train(normalization: Callable[[], keras.layers.Layer], seed: int) -> Result:
    """Train once; data, initial weights and batches follow from the seed.

    Args:
        normalization: Makes a normalization layer.
        seed: Any number.

    Returns:
        Steps taken, and test loss and accuracy; both NaN if the training loss became NaN.
    """
    x, y = data(seed)
    keras.utils.set_random_seed(seed)
    model = network(normalization)
    stop = keras.callbacks.TerminateOnNaN()
    history = model.fit(
        x[:TRAIN], y[:TRAIN], batch_size=BATCH_SIZE, epochs=EPOCHS, callbacks=[stop], verbose=0
    )
    steps = int(model.optimizer.iterations)
    if np.isnan(history.history["loss"][-1]):
        return Result(steps, np.nan, np.nan)
    loss, accuracy = model.evaluate(x[TRAIN:], y[TRAIN:], batch_size=TEST, verbose=0)
    return Result(steps, loss, accuracy)


def median(values: Iterable[float], form: str) -> str:
    """Return the median as text, a dash if there is nothing to take it of."""
    values = list(values)
    return format(statistics.median(values), form) if values else "-"


def row(name: str, results: list[Result]) -> list[str]:
    """Return a rival's line of the table."""
    diverged = [result for result in results if result.diverged]
    trained = [result for result in results if not result.diverged]
    return [
        name,
        f"{len(diverged)} of {len(results)}",
        median((result.steps for result in diverged), ".0f"),
        median((result.loss for result in trained), ".3f"),
        median((result.accuracy for result in trained), ".1%"),
    ]


def main() -> None:
    """Train every rival with every seed and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="runs per rival (default 5)")
    seeds = range(parser.parse_args().seeds)

    rows = []
    for name, normalization in RIVALS.items():
        results = []
        for seed in seeds:
            results.append(train(normalization, seed))
            print(f"{name}, seed {seed}: {results[-1]}", flush=True)
        rows.append(row(name, results))
    print(f"\n{versions()}; {STEPS} steps, medians over the seeds concerned")
    print(table(["layer", "NaN", "at step", "test loss", "test accuracy"], rows))


if __name__ == "__main__":
    # So small a network gains nothing from more threads, and where others use the cores it would
    # lose most of its time to them (PyTorch's wait for each other thousands of times a second).
    with threadpool_limits(limits=1):
        main()
