"""A picture of learning curves, side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Curves = Mapping[str, Sequence[float]]

# Okabe and Ito's colours, told apart by the colour-blind; markers too, for print in grey.
# The first is a broad band, so that a second curve on top of it leaves both to be seen.
LOOKS: tuple[dict[str, Any], ...] = (
    {"color": "0.8", "linewidth": 8, "solid_capstyle": "round"},
    {"color": "#0072b2", "marker": "o"},
    {"color": "#e69f00", "marker": "s"},
    {"color": "#009e73", "marker": "^"},
)


def draw(panels: Mapping[str, Curves], title: str, legend: str, path: Path) -> None:
    """Write a picture to `path`: a panel per set of curves, one scale for all.

    Args:
        panels: The curves of each panel by its title; a curve is one test loss per epoch by its
            label.
        title: What one sees.
        legend: What the labels say.
        path: A file whose ending matplotlib knows.
    """
    figure = Figure(figsize=(11, 6.5), layout="constrained")  # no pyplot: needs no screen
    axes = figure.subplots(1, len(panels), sharey=True)
    for panel, (name, curves) in zip(axes, panels.items(), strict=True):
        _draw_panel(panel, name, curves)
        panel.legend(title=legend, loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)
    axes[0].set_ylabel("test loss")
    figure.suptitle(title, fontsize="x-large")
    figure.savefig(path, dpi=150)


def _draw_panel(axes: Axes, name: str, curves: Curves) -> None:
    for (label, values), look in zip(curves.items(), LOOKS, strict=True):
        axes.plot(range(1, len(values) + 1), values, label=label, **look)
    axes.set(title=name, xlabel="passes over the training images", yscale="log")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
