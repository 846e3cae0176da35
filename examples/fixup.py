"""A residual network of 110 layers without any normalization, beside one with and one that fails.

    KERAS_BACKEND=jax python examples/fixup.py [--epochs 20] [--seed 0] [--output FOLDER]

Trains the residual network of He et al. for small images (54 branches of two convolutions, a
convolution before and a dense layer after them) on scikit-learn's digits, three times, with the
same optimizer, learning rate, batches and number of steps:

- Fixup: keras_bn.FixupBranch, no normalization,
- BatchNormalization: keras_bn.BatchNormalization after each convolution,
- plain: He's initialization as in the second, no normalization.

Prints a table and writes a picture of the learning curves. It takes minutes on two cores, least
with JAX; --epochs makes it shorter.

What to look for: a plain branch adds as much variance as its input has, so through 54 of them the
signal explodes: the plain network's first epoch has a loss thousands of times that of guessing.
With JAX it then goes on guessing, at a loss of log(10) = 2.303; with TensorFlow and PyTorch its
loss is NaN. Fixup starts each branch at 0 and its first layer small, and trains, if more slowly
than batch normalization. The authors of Fixup give its scalars a tenth of the rate.
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import keras
from digits import Data, Stopwatch, load_data
from keras import layers
from learning_curves import LOOKS
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from reporting import table, versions
from threadpoolctl import threadpool_limits

import keras_bn

OUTPUT = Path(__file__).parent / "output" / "fixup" / keras.config.backend()
PICTURE = "learning_curves.png"
HEADER = ("network", "weights", "first epoch", "training loss", "test loss", "accuracy", "seconds")
NOTES = """
first epoch          mean training loss of the first pass over the images
training, test loss  of the last epoch; guessing has log(10) = 2.303
seconds              of all epochs, with the test after each and the compilation"""

# Channels of the three stages, on 8x8, 4x4 and 2x2 pixels, and the branches of each.
FILTERS, BRANCHES = (8, 16, 32), 18
DEPTH = len(FILTERS) * BRANCHES
LAYERS = 2 * DEPTH + 2
# A divisor of the number of images, so that nothing is compiled for a last, smaller batch.
BATCH_SIZE, RATE, MOMENTUM = 48, 0.01, 0.9
GUESSING = math.log(10)

convolution = partial(layers.Conv2D, padding="same", use_bias=False, kernel_initializer="he_normal")


@dataclass(frozen=True)
class Run:
    """How the training of one network went; a number per epoch."""

    network: str
    weights: int
    training_losses: list[float]
    losses: list[float]
    accuracies: list[float]
    seconds: float


def blocks() -> list[tuple[int, int]]:
    """Return filters and strides of each residual block: the first of a later stage halves."""
    return [
        (filters, 2 if block == 0 and filters != FILTERS[0] else 1)
        for filters in FILTERS
        for block in range(BRANCHES)
    ]


def without_normalization() -> keras.Model:
    """Return the network with Fixup."""
    inputs = keras.Input((8, 8, 1))
    x = convolution(FILTERS[0], 3)(inputs)
    x = layers.ReLU()(keras_bn.FixupBias()(x))
    for filters, strides in blocks():
        branch = keras_bn.FixupBranch(
            [convolution(filters, 3, strides, activation="relu"), convolution(filters, 3)],
            depth=DEPTH,
            shortcut=None if strides == 1 else convolution(filters, 1, strides),
        )
        x = layers.ReLU()(branch(x))
    x = keras_bn.FixupBias()(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, layers.Dense(10, kernel_initializer="zeros")(x))


def ordinary(normalization: Callable[[], keras.layers.Layer]) -> keras.Model:
    """Return the network with a normalization, or whatever `normalization` makes, in its place."""
    inputs = keras.Input((8, 8, 1))
    x = layers.ReLU()(normalization()(convolution(FILTERS[0], 3)(inputs)))
    for filters, strides in blocks():
        shortcut = x
        if strides != 1:
            shortcut = normalization()(convolution(filters, 1, strides)(x))
        y = layers.ReLU()(normalization()(convolution(filters, 3, strides)(x)))
        y = normalization()(convolution(filters, 3)(y))
        x = layers.ReLU()(layers.Add()([shortcut, y]))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


NETWORKS: dict[str, Callable[[], keras.Model]] = {
    "Fixup, no normalization": without_normalization,
    # Moving statistics that arrive within a run as short as this.
    "BatchNormalization": partial(ordinary, partial(keras_bn.BatchNormalization, momentum=0.9)),
    "plain, no normalization": partial(ordinary, layers.Identity),
}


def train(network: str, data: Data, epochs: int, seed: int) -> Run:
    """Train one of the networks, with Keras' own progress bar.

    Args:
        network: Its name in `NETWORKS`.
        data: Images and digits.
        epochs: Passes over the images.
        seed: Of the weights and the batches.

    Returns:
        The run.
    """
    print(f"\n{network}", flush=True)
    keras.utils.set_random_seed(seed)
    model = NETWORKS[network]()
    rate = keras.optimizers.schedules.CosineDecay(
        RATE, decay_steps=epochs * len(data.train_images) // BATCH_SIZE
    )
    model.compile(
        optimizer=keras.optimizers.SGD(rate, momentum=MOMENTUM),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    stopwatch = Stopwatch()
    history = model.fit(
        data.train_images,
        data.train_digits,
        batch_size=BATCH_SIZE,
        epochs=epochs,
        validation_data=(data.test_images, data.test_digits),
        validation_batch_size=len(data.test_images),
        callbacks=[stopwatch],
        verbose=1 if sys.stdout.isatty() else 2,  # a bar in a file is a line every 50 ms
    ).history
    curves = (history[name] for name in ("loss", "val_loss", "val_accuracy"))
    return Run(network, model.count_params(), *curves, sum(stopwatch.seconds))


def draw(runs: list[Run], path: Path) -> None:
    """Write the picture: training loss and test accuracy of all runs, a panel each."""
    figure = Figure(figsize=(11, 5.5), layout="constrained")  # no pyplot: needs no screen
    left, right = figure.subplots(1, 2)
    draw_panel(left, "training loss", {label(run): run.training_losses for run in runs})
    draw_panel(right, "test accuracy", {label(run): run.accuracies for run in runs})
    left.set_yscale("log")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_locator(ticker.NullLocator())
    right.set_ylim(0, 1)
    right.yaxis.set_major_formatter(ticker.PercentFormatter(1.0))
    for axes, guessing in ((left, GUESSING), (right, 0.1)):
        axes.axhline(guessing, color="0.6", linestyle=":", zorder=0)
        axes.annotate(
            "guessing",
            (0.99, guessing),
            xytext=(0, 5),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            horizontalalignment="right",
            color="0.4",
        )
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(runs), frameon=False)
    figure.suptitle(headline(runs), fontsize="x-large")
    figure.savefig(path, dpi=150)


def draw_panel(axes: Axes, title: str, curves: dict[str, list[float]]) -> None:
    """Draw curves of one number per epoch."""
    for (name, values), look in zip(curves.items(), LOOKS[1:], strict=True):
        axes.plot(range(1, len(values) + 1), values, label=name, markersize=5, **look)
    axes.set(title=title, xlabel="passes over the training images")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def label(run: Run) -> str:
    """Return a run's name for the picture, which cannot show a loss that is NaN."""
    return run.network + (" (loss NaN)" if math.isnan(run.training_losses[-1]) else "")


def headline(runs: list[Run]) -> str:
    """Return how each of the networks ended."""
    ends = ", ".join(f"{run.network.split(',')[0]} {run.accuracies[-1]:.1%}" for run in runs)
    return f"A residual network of {LAYERS} layers on digits, test accuracy:\n{ends}"


def row(run: Run) -> list[str]:
    """Return a run's line of the table."""
    return [
        run.network,
        f"{run.weights:,}",
        f"{run.training_losses[0]:.4g}",
        f"{run.training_losses[-1]:.3f}",
        f"{run.losses[-1]:.3f}",
        f"{run.accuracies[-1]:.1%}",
        f"{run.seconds:.0f}",
    ]


def options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20, help="of each network (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default 0)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"folder (default {OUTPUT})")
    chosen = parser.parse_args()
    if chosen.epochs < 1:
        parser.error("--epochs must be at least 1.")
    return chosen


def main() -> None:
    """Train, draw and report."""
    chosen = options()
    chosen.output.mkdir(parents=True, exist_ok=True)
    data = load_data()
    runs = [train(network, data, chosen.epochs, chosen.seed) for network in NETWORKS]
    draw(runs, chosen.output / PICTURE)
    steps = chosen.epochs * len(data.train_images) // BATCH_SIZE
    print(f"\n{versions()}; {LAYERS} layers, {steps} steps\n")
    print(table(HEADER, map(row, runs)))
    print(f"{NOTES}\n\nPicture: {chosen.output / PICTURE}")


if __name__ == "__main__":
    # So small a network gains nothing from more threads, and where others use the cores it would
    # lose most of its time to them (PyTorch's wait for each other thousands of times a second).
    with threadpool_limits(limits=1):
        main()
