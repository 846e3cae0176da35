"""Show what inference would use after so many training steps: the moving mean and variance.

    python benchmarks/moving_statistics.py           print the tables
    python benchmarks/moving_statistics.py --write   put them and a picture into docs/

Normal data of a known mean and variance in batches of 32, momentum 0.99; every layer sees the same
batches. It takes a few seconds, and prints the same on every backend.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import keras
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from measuring import replace

import keras_bn

DOCS = Path(__file__).parents[1] / "docs"
MEAN, STD, BATCH, STEPS = 5.0, 3.0, 32, 500
TRUTH = {"moving_mean": MEAN, "moving_variance": STD**2}
SHOWN = (1, 10, 50, 100, 500)

LAYERS = {
    "Keras": keras.layers.BatchNormalization,
    "ours": keras_bn.BatchNormalization,
    "debias": lambda: keras_bn.BatchNormalization(debias=True),
    "debias, unbiased": lambda: keras_bn.BatchNormalization(debias=True, unbiased=True),
    "momentum=None": lambda: keras_bn.BatchNormalization(momentum=None),
}

# Okabe and Ito's colours; the first is a broad band, as a second curve lies on top of it.
LOOKS = (
    {"color": "0.8", "linewidth": 8, "solid_capstyle": "round"},
    {"color": "#0072b2"},
    {"color": "#e69f00"},
    {"color": "#cc79a7", "linestyle": "--"},
    {"color": "#009e73"},
)

# For each layer, the moving mean and variance after each step.
Curves = dict[str, dict[str, list[float]]]


def main() -> None:
    """Measure, and print or write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="write to docs/")
    options = parser.parse_args()
    curves = {name: trained(make()) for name, make in LAYERS.items()}
    if not options.write:
        print(tables(curves))
        return
    replace(DOCS / "statistics.md", "statistics", tables(curves))
    draw(curves, DOCS / "statistics.png")


def trained(layer: keras.layers.Layer) -> dict[str, list[float]]:
    """Return the moving statistics after each step."""
    data = np.random.default_rng(0).normal(MEAN, STD, (STEPS, BATCH, 1)).astype("float32")
    found: dict[str, list[float]] = {name: [] for name in TRUTH}
    for batch in data:
        layer(batch, training=True)
        for name, values in found.items():
            values.append(float(keras.ops.convert_to_numpy(getattr(layer, name))[0]))
    return found


def tables(curves: Curves) -> str:
    """Return a table for each statistic, in Markdown."""
    return "\n\n".join(table(curves, name) for name in TRUTH)


def table(curves: Curves, name: str) -> str:
    """Return the table of a statistic."""
    lines = [(f"{name}, step", *curves, "truth"), ("---:",) * (len(curves) + 2)]
    for step in SHOWN:
        values = (found[name][step - 1] for found in curves.values())
        lines.append((str(step), *(f"{value:.2f}" for value in values), f"{TRUTH[name]:.2f}"))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(curves: Curves, path: Path) -> None:
    """Write a picture: a panel for each statistic."""
    figure = Figure(figsize=(11, 5), layout="constrained")  # no pyplot: needs no screen
    for axes, name in zip(figure.subplots(1, len(TRUTH)), TRUTH, strict=True):
        draw_panel(axes, curves, name)
    lines, labels = axes.get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle("What inference would use after so many training steps", fontsize="x-large")
    figure.savefig(path, dpi=120)


def draw_panel(axes: Axes, curves: Curves, name: str) -> None:
    """Draw the curves of a statistic."""
    for (label, found), look in zip(curves.items(), LOOKS, strict=True):
        axes.plot(range(1, STEPS + 1), found[name], label=label, **look)
    axes.axhline(TRUTH[name], color="black", linestyle=":", label="truth")
    axes.set(title=name.replace("_", " "), xlabel="training steps", xscale="log", ylim=(0, None))
    axes.set_xticks(SHOWN, [str(step) for step in SHOWN])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
