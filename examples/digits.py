"""Handwritten digits with four normalization layers, at batch size 32 and at batch size 2.

    KERAS_BACKEND=torch python examples/digits.py [--epochs 12 4] [--seed 0] [--output FOLDER]

Trains the same small convolutional network on scikit-learn's digits (8x8 pixels, 1200 images to
train with, 597 to test) with stock Keras' BatchNormalization and with keras_bn's
BatchNormalization, BatchRenormalization and GroupNormalization. Saves each model, loads all of them
in a new process and checks that they predict the same there. Prints a table and where it wrote the
models and a picture of the learning curves.

What to look for: at batch size 2, batch normalization normalizes by the statistics of two images
and is tested with those of all; renormalization reconciles the two, and group normalization needs
neither. At batch size 32 batch normalization starts late, since its moving statistics (momentum
0.99) take most of the run to arrive. The two rows of BatchNormalization are all but the same at
batch size 32. At 2 they differ about as two seeds do: in the dense layer the larger of two values
becomes about 1 and the other -1, and where they are close, rounding decides. By how much seeds
differ is printed below the table.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import keras
import learning_curves
import numpy as np
from reporting import table, versions
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from threadpoolctl import threadpool_limits

import keras_bn

EXAMPLES = Path(__file__).parent
OUTPUT = EXAMPLES / "output" / "digits" / keras.config.backend()
PICTURE = "learning_curves.png"
HEADER = ("layer", "batch", "epochs", "accuracy", "loss", "s/epoch", "first epoch", "reload")
NOTES = """
accuracy, loss  on the test images, after the last epoch
s/epoch         median without the first epoch, which may compile; with the test after each
reload          largest difference of a probability, predicted here and in the new process
At batch size 2 rounding changes about as much as a seed does. {layer},
with seeds {seeds}: {accuracies}."""

TRAIN = 1_200
BATCH_SIZES = (32, 2)
RESEEDED, SEEDS = "keras.layers.BatchNormalization", 3  # whose accuracy is told for so many seeds
TOLERANCE = 1e-5  # of a predicted probability, between this process and the one that loads

MakeLayer = Callable[[], keras.layers.Layer]


@dataclass(frozen=True)
class Data:
    """Images of shape (number, 8, 8, 1) with values from 0 to 1, and the digit on each."""

    train_images: np.ndarray
    test_images: np.ndarray
    train_digits: np.ndarray
    test_digits: np.ndarray


@dataclass(frozen=True)
class Run:
    """A trained model and how its training went."""

    layer: str
    batch_size: int
    model: keras.Model
    losses: list[float]
    accuracies: list[float]
    seconds: list[float]

    @property
    def name(self) -> str:
        """The name of its files."""
        return f"{self.layer}-{self.batch_size}"


class Stopwatch(keras.callbacks.Callback):
    """Measures the seconds of each epoch, the test at its end included."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Start."""
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Stop."""
        self.seconds.append(time.perf_counter() - self.start)


def load_data() -> Data:
    """Return the digits that come with scikit-learn, always split in the same way."""
    digits = load_digits()
    images = (digits.images / digits.images.max()).astype("float32")[..., np.newaxis]
    return Data(*train_test_split(images, digits.target, train_size=TRAIN, random_state=0))


def layers(steps: int) -> dict[str, MakeLayer]:
    """Return what makes each normalization layer.

    Args:
        steps: The length of the run. Renormalization corrects nothing in its first tenth, and is
            at its full limits from the middle on.

    Returns:
        Functions of no arguments, by the name of the layer.
    """
    warm_up = (steps // 10, steps // 2)
    return {
        "keras.layers.BatchNormalization": keras.layers.BatchNormalization,
        "keras_bn.BatchNormalization": keras_bn.BatchNormalization,
        "keras_bn.BatchRenormalization": partial(
            keras_bn.BatchRenormalization, rmax_steps=warm_up, dmax_steps=warm_up
        ),
        "keras_bn.GroupNormalization": partial(keras_bn.GroupNormalization, groups=8),
    }


def network(normalization: MakeLayer, steps: int) -> keras.Model:
    """Return the compiled network: two convolutions and a dense layer, each one normalized."""
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, padding="same", use_bias=False),
            normalization(),
            keras.layers.Activation("relu"),
            keras.layers.Conv2D(32, 3, strides=2, padding="same", use_bias=False),
            normalization(),
            keras.layers.Activation("relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(64, use_bias=False),
            normalization(),
            keras.layers.Activation("relu"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    rate = keras.optimizers.schedules.CosineDecay(2e-3, decay_steps=steps)
    model.compile(
        optimizer=keras.optimizers.Adam(rate),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    return model


def train(layer: str, data: Data, batch_size: int, epochs: int, seed: int) -> Run:
    """Train the network with one kind of layer, with Keras' own progress bar."""
    print(f"\n{layer}, batch size {batch_size}, seed {seed}", flush=True)
    keras.utils.set_random_seed(seed)
    steps = epochs * -(-len(data.train_images) // batch_size)
    model = network(layers(steps)[layer], steps)
    stopwatch = Stopwatch()
    history = model.fit(
        data.train_images,
        data.train_digits,
        batch_size=batch_size,
        epochs=epochs,
        validation_data=(data.test_images, data.test_digits),
        validation_batch_size=len(data.test_images),
        callbacks=[stopwatch],
        verbose=1 if sys.stdout.isatty() else 2,  # a bar in a file is a line every 50 ms
    ).history
    losses, accuracies = history["val_loss"], history["val_accuracy"]
    return Run(layer, batch_size, model, losses, accuracies, stopwatch.seconds)


def reload_differences(runs: list[Run], images: np.ndarray, folder: Path) -> list[float]:
    """Save the models, load them in a new process, and compare the predictions.

    Args:
        runs: The models.
        images: What to predict for.
        folder: Where the files go.

    Returns:
        Per model, the largest difference of a predicted probability.
    """
    paths = [folder / f"{run.name}.keras" for run in runs]
    for run, path in zip(runs, paths, strict=True):
        run.model.save(path)
    inputs, outputs = folder / "inputs.npy", folder / "predictions.npz"
    np.save(inputs, images)
    script = EXAMPLES / "predict_saved.py"
    print(flush=True)
    subprocess.run([sys.executable, script, inputs, outputs, *paths], check=True)
    with np.load(outputs) as loaded:
        return [_difference(run.model, images, loaded[run.name]) for run in runs]


def _difference(model: keras.Model, images: np.ndarray, expected: np.ndarray) -> float:
    predicted = keras.ops.convert_to_numpy(model(images))
    return float(np.abs(predicted - expected).max())


def draw(runs: list[Run], path: Path) -> None:
    """Write the picture: the test losses of all runs, a panel per batch size."""
    panels: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        label = f"{run.layer}  {run.accuracies[-1]:.1%}"
        panels.setdefault(f"batch size {run.batch_size}", {})[label] = run.losses
    learning_curves.draw(panels, headline(runs), "test accuracy at the end", path)


def headline(runs: list[Run]) -> str:
    """Return what the smaller batch size does to each layer of keras_bn."""
    points: dict[str, list[float]] = {}
    for run in runs:
        points.setdefault(run.layer, []).append(100 * run.accuracies[-1])
    changes = [
        f"{small - large:+.1f} with {layer.removeprefix('keras_bn.')}"
        for layer, (large, small) in points.items()
        if layer.startswith("keras_bn.")
    ]
    large, small = BATCH_SIZES
    title = f"Batch size {small} instead of {large} changes the test accuracy, in points, by\n"
    return title + ", ".join(changes).replace("-", "\N{MINUS SIGN}")


def row(run: Run, difference: float) -> list[str]:
    """Return a model's line of the table."""
    return [
        run.layer,
        str(run.batch_size),
        str(len(run.losses)),
        f"{run.accuracies[-1]:.1%}",
        f"{run.losses[-1]:.3f}",
        f"{np.median(run.seconds[1:]):.2f}",
        f"{run.seconds[0]:.2f}",
        f"{difference:.1g}",
    ]


def notes(by_seed: dict[int, Run]) -> str:
    """Return what stands below the table, with how much seeds differ."""
    seeds = ", ".join(map(str, by_seed))
    accuracies = ", ".join(f"{run.accuracies[-1]:.1%}" for run in by_seed.values())
    return NOTES.format(layer=RESEEDED, seeds=seeds, accuracies=accuracies)


def report(
    runs: list[Run], differences: list[float], by_seed: dict[int, Run], folder: Path
) -> None:
    """Print the table and where the files are.

    Args:
        runs: In the order of the table.
        differences: One per run, as from `reload_differences`.
        by_seed: Runs that differ in their seed alone.
        folder: Where the files are.

    Raises:
        SystemExit: If a model predicts something else after loading.
    """
    print(f"\n{versions()}\n")
    print(table(HEADER, map(row, runs, differences)))
    print(notes(by_seed))
    print(f"\nModels:  {folder}\nPicture: {folder / PICTURE}")
    changed = [r.name for r, d in zip(runs, differences, strict=True) if not d <= TOLERANCE]
    if changed:
        sys.exit(f"Predictions differ by more than {TOLERANCE} after loading: {', '.join(changed)}")


def options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--epochs",
        type=int,
        nargs=2,
        default=(12, 4),
        metavar=("LARGE", "SMALL"),
        help="passes over the data at batch size 32 and at 2, each at least 2 (default 12 4)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default 0)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"folder (default {OUTPUT})")
    chosen = parser.parse_args()
    if min(chosen.epochs) < 2:
        parser.error("--epochs must be at least 2: the first is not timed.")
    return chosen


def main() -> None:
    """Train, save, load, draw and report."""
    chosen = options()
    chosen.output.mkdir(parents=True, exist_ok=True)
    data = load_data()
    runs = [
        train(layer, data, batch_size, epochs, chosen.seed)
        for batch_size, epochs in zip(BATCH_SIZES, chosen.epochs, strict=True)
        for layer in layers(0)
    ]
    (first,) = (run for run in runs if (run.layer, run.batch_size) == (RESEEDED, BATCH_SIZES[-1]))
    by_seed = {chosen.seed: first} | {
        seed: train(RESEEDED, data, BATCH_SIZES[-1], chosen.epochs[-1], seed)
        for seed in range(chosen.seed + 1, chosen.seed + SEEDS)
    }
    differences = reload_differences(runs, data.test_images, chosen.output)
    draw(runs, chosen.output / PICTURE)
    report(runs, differences, by_seed, chosen.output)


if __name__ == "__main__":
    # So small a network gains nothing from more threads, and where others use the cores it would
    # lose most of its time to them (PyTorch's wait for each other thousands of times a second).
    with threadpool_limits(limits=1):
        main()
