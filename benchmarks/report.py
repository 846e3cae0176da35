"""Draw and tabulate in docs/performance.md what `layers.py --json` has written.

    python benchmarks/report.py tensorflow.json jax.json torch.json

Figures are geometric means over the four main shapes; a ratio above 1 says that ours is faster. A
row that several files hold is that of the last of them.
"""

import argparse
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from layers import LAYERS, MAIN_SHAPES, OPTIONAL
from measuring import geometric_mean, replace, table

matplotlib.use("Agg")
from matplotlib import pyplot as plt

DOCS = Path(__file__).parents[1] / "docs"
BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
SHOWN = [name for name in LAYERS if name not in OPTIONAL]
USES = {
    "training, float32": (True, "float32"),
    "training, bfloat16": (True, "bfloat16"),
    "inference, float32": (False, "float32"),
    "inference, bfloat16": (False, "bfloat16"),
}

Rows = list[dict[str, Any]]


def main() -> None:
    """Read, tabulate, draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("files", type=Path, nargs="+", help="written by layers.py --json")
    found = [json.loads(path.read_text()) for path in parser.parse_args().files]
    named = ("backend", "mode", "layer", "shape", "dtype", "training")
    rows = list({tuple(r[key] for key in named): r for one in found for r in one["rows"]}.values())
    engines = list(dict.fromkeys((row["backend"], row["mode"]) for row in rows))
    headings = "; ".join(dict.fromkeys(one["heading"].removeprefix("### ") for one in found))
    parts = [
        f"{headings}.",
        *(beside_keras(rows, engines, use) for use in USES),
        small(rows, engines),
        rest(rows, engines),
    ]
    replace(DOCS / "performance.md", "measured", "\n\n".join(part for part in parts if part))
    draw(rows, engines)


def beside_keras(rows: Rows, engines: list[tuple[str, str]], use: str) -> str:
    """Return the table of one use: times Keras, and the slowest row."""
    lines = [(f"{use}, times Keras", *SHOWN, "slowest row")]
    for engine in engines:
        chosen = [row for row in of(rows, engine, use) if row["layer"] not in OPTIONAL]
        cells = [mean_of(chosen, layer, times_keras) for layer in SHOWN]
        if set(cells) != {""}:
            worst = min((row for row in chosen if row["shape"] != "small"), key=times_keras)
            slowest = f"{worst['layer']} {worst['shape']} {worst['x keras']:.2f}"
            lines.append((name(engine), *cells, slowest))
    return table(lines, markdown=True) if len(lines) > 1 else ""


def small(rows: Rows, engines: list[tuple[str, str]]) -> str:
    """Return the table of what is small: there Python and the number of operations count."""
    uses = list(product(("BN", "LN"), (True, False)))
    names = (f"{layer} {'training' if training else 'inference'}" for layer, training in uses)
    lines = [("32×16, times Keras", *names)]
    for engine in engines:
        chosen = [r for r in rows if (r["backend"], r["mode"], r["shape"]) == (*engine, "small")]
        found = {(row["layer"], row["training"]): f"{times_keras(row):.2f}" for row in chosen}
        if found:
            lines.append((name(engine), *(found.get(use, "") for use in uses)))
    return table(lines, markdown=True)


def rest(rows: Rows, engines: list[tuple[str, str]]) -> str:
    """Return the table of everything else, in training."""
    lines = [("training", *LAYERS)]
    figures: dict[str, tuple[str, Callable[[dict[str, Any]], float | None]]] = {
        "times native": ("float32", lambda row: row.get("x native")),
        "times as long as the streaming limit": ("float32", lambda row: row["limit"]),
        "times as long as without ghosts of 8, without a mask": (
            "float32",
            lambda row: 1 / row["x keras"] if row["layer"] in OPTIONAL else None,
        ),
        "saved for backward, times the input": ("float32", lambda row: row.get("saved ours")),
        "the same, bfloat16": ("bfloat16", lambda row: row.get("saved ours")),
    }
    for engine, (title, (dtype, figure)) in product(engines, figures.items()):
        chosen = of(rows, engine, f"training, {dtype}")
        cells = [mean_of(chosen, layer, figure) for layer in LAYERS]
        if set(cells) != {""}:
            lines.append((f"{name(engine)}: {title}", *cells))
    for engine in engines:
        cells = [half_beside_single(rows, engine, layer) for layer in LAYERS]
        if set(cells) != {""}:
            lines.append((f"{name(engine)}: bfloat16 as fast as float32, times", *cells))
    return table(lines, markdown=True)


def half_beside_single(rows: Rows, engine: tuple[str, str], layer: str) -> str:
    """Return how many times faster a step in bfloat16 is than one in float32."""
    single, half = (
        {row["shape"]: row["ours ms"] for row in of(rows, engine, use) if row["layer"] == layer}
        for use in ("training, float32", "training, bfloat16")
    )
    both = [single[shape] / half[shape] for shape in MAIN_SHAPES if shape in half]
    return f"{geometric_mean(both):.2f}" if both else ""


def of(rows: Rows, engine: tuple[str, str], use: str) -> Rows:
    """Return the rows of an engine and a use."""
    wanted = (*engine, *USES[use])
    return [r for r in rows if (r["backend"], r["mode"], r["training"], r["dtype"]) == wanted]


def mean_of(rows: Rows, layer: str, figure: Callable[[dict[str, Any]], float | None]) -> str:
    """Return the geometric mean of a figure over the main shapes."""
    some = [figure(r) for r in rows if r["layer"] == layer and r["shape"] in MAIN_SHAPES]
    values = [value for value in some if value is not None]
    return f"{geometric_mean(values):.2f}" if values else ""


def times_keras(row: dict[str, Any]) -> float:
    """Return how many times faster ours is."""
    return float(row["x keras"])


def name(engine: tuple[str, str]) -> str:
    """Return the name of an engine."""
    backend, mode = engine
    return f"{BACKENDS[backend]}, {mode}"


def draw(rows: Rows, engines: list[tuple[str, str]]) -> None:
    """Draw how many times faster than Keras each layer trains."""
    figure, axes = plt.subplots(figsize=(10, 4.2), layout="constrained")
    found = {
        name(engine): [
            mean_of(of(rows, engine, "training, float32"), layer, times_keras) for layer in SHOWN
        ]
        for engine in engines
    }
    shown = {title: means for title, means in found.items() if "" not in means}
    width = 0.8 / len(shown)
    for number, (title, means) in enumerate(shown.items()):
        left = np.arange(len(SHOWN)) + (number - (len(shown) - 1) / 2) * width
        bars = axes.bar(left, np.array(means, float) - 1, width, bottom=1, label=title)
        labels = [f"{float(text):.1f}" for text in means]
        axes.bar_label(bars, labels, fontsize=7, padding=1)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(range(len(SHOWN)), SHOWN)
    axes.set_ylabel("times as fast as Keras")
    axes.set_title("Training step, float32: geometric mean over four shapes")
    figure.legend(loc="outside lower center", ncols=len(shown), fontsize=8)
    figure.savefig(DOCS / "performance.png", dpi=120)


if __name__ == "__main__":
    main()
