"""Time the layers beside Keras' own and beside the backend's native ones, in turn, in one process.

    python benchmarks/layers.py                    the backend of KERAS_BACKEND
    python benchmarks/layers.py --only "graph BN"  the rows whose name holds all of these words
    python benchmarks/layers.py --json FILE        also write every figure

A row is a layer on a shape: forward, gradients of x, gamma and beta, and statistics in training;
the output in inference. `x Keras` and `x native` say how many times faster ours is: the median
over rounds in which each runs once. `limit` is how many times longer ours takes than the bytes
that must move would take at the bandwidth of the best streaming pass in this process. BN must
read x twice before y (the statistics need all of it) and dy and x twice before dx; a sample of
the others may be kept in the cache. `saved` is what PyTorch or JAX keeps for the backward pass,
over the input's bytes. BN: BatchNormalization, BRN: BatchRenormalization beside `renorm=True`,
GN: GroupNormalization(32), IN: InstanceNormalization beside GroupNormalization(-1), LN and RMS over
the last axis; `ghost` is BatchNormalization in ghosts of 8 and `masked` with one sample of four
masked out, both beside ours without. `make bench` has
the C library keep freed memory: otherwise page faults are most of what is measured.
`KERAS_BN_KERNELS=uncompiled` leaves out our passes in C, `KERAS_BN_KERNELS=generic` all fast paths.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import engines
import keras
import numpy as np
from measuring import geometric_mean, heading, in_turn, ratio, streaming_bandwidth, table

import keras_bn
from keras_bn.kernels.compiled import library

BACKEND = keras.backend.backend()
# The shape, and the axis of the channels.
SHAPES = {
    "conv": ((32, 56, 56, 64), -1),
    "conv2": ((32, 28, 28, 128), -1),
    "dense": ((4096, 1024), -1),
    "seq": ((32, 512, 256), -1),
    "conv, channels first": ((32, 64, 56, 56), 1),
    "seq, channels first": ((32, 256, 512), 1),
    "wide": ((128, 32768), -1),
    "small": ((32, 16), -1),
}
# Those whose geometric mean is told.
MAIN_SHAPES = ("conv", "conv2", "dense", "seq")


class Masked(keras_bn.BatchNormalization):
    """Batch normalization with every fourth sample masked out."""

    def build(self, input_shape: tuple[int, ...]) -> None:
        """Make the mask, too."""
        super().build(input_shape)
        self._counted = np.ones(input_shape[:-1], "bool")
        self._counted[::4] = False

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Normalize under the mask."""
        return super().call(inputs, training, keras.ops.convert_to_tensor(self._counted))


LAYERS: dict[str, tuple[Callable, Callable]] = {
    "BN": (keras_bn.BatchNormalization, keras.layers.BatchNormalization),
    "BRN": (
        lambda **options: keras_bn.BatchRenormalization(
            rmax_steps=None, dmax_steps=None, **options
        ),
        lambda **options: keras.layers.BatchNormalization(renorm=True, **options),
    ),
    "GN": (keras_bn.GroupNormalization, keras.layers.GroupNormalization),
    "IN": (
        keras_bn.InstanceNormalization,
        lambda **options: keras.layers.GroupNormalization(groups=-1, **options),
    ),
    "LN": (keras_bn.LayerNormalization, keras.layers.LayerNormalization),
    "RMS": (keras_bn.RMSNormalization, keras.layers.RMSNormalization),
    "ghost": (
        lambda **options: keras_bn.BatchNormalization(virtual_batch_size=8, **options),
        keras_bn.BatchNormalization,
    ),
    "masked": (Masked, keras_bn.BatchNormalization),
}

# What is timed beside our own layer without it.
OPTIONAL = ("ghost", "masked")
# How often the bytes of x must move, in training and in inference.
BATCH = ("BN", "BRN", *OPTIONAL)
PASSES = {name: (8 if name in BATCH else 5, 2) for name in LAYERS}


class Case(NamedTuple):
    """One row."""

    mode: str
    layer: str
    shape: str
    dtype: str
    training: bool

    @property
    def name(self) -> str:
        """What `--only` looks into."""
        return f"{self.mode} {self.layer} {self.shape} {self.dtype} {self.use}"

    @property
    def use(self) -> str:
        """Training or inference."""
        return "train" if self.training else "infer"


def main() -> None:
    """Measure and print; write where that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", help="words that a row's name must hold")
    parser.add_argument("--seconds", type=float, default=1.0, help="per row")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    options = parser.parse_args()
    kept = "kept" if "MALLOC_TRIM_THRESHOLD_" in os.environ else "given back to the system"
    passes = "with" if library() is not None else "without"
    print(f"{heading()}; {passes} passes in C; freed memory is {kept}", flush=True)
    found = []
    for case in cases():
        if all(word in case.name.split() for word in options.only.split()):
            found.append(measured(case, options.seconds))
            print("  ".join(f"{k} {v}" for k, v in shown(found[-1]).items()), flush=True)
    for line in summary(found):
        print(line)
    if options.json is not None:
        options.json.write_text(json.dumps({"heading": heading(), "rows": found}, indent=1))


def cases() -> Iterator[Case]:
    """List the rows."""
    for mode in engines.active().MODES:
        for layer in LAYERS:
            for shape in SHAPES:
                for dtype in ("float32", "bfloat16"):
                    for training in (True, False):
                        case = Case(mode, layer, shape, dtype, training)
                        if makes_sense(case):
                            yield case


def makes_sense(case: Case) -> bool:
    """Leave out what nobody runs, and what takes a compiler minutes to say the same again."""
    if case.layer == "IN" and len(SHAPES[case.shape][0]) == 2:
        return False  # one element each
    if case.layer in ("LN", "RMS") and "first" in case.shape:
        return False  # Keras normalizes last axes only
    if case.layer in OPTIONAL and not case.training:
        return False  # the same code
    if case.layer == "masked" and ("first" in case.shape or case.dtype != "float32"):
        return False  # enough to say what a mask costs
    if case.shape == "wide" and (case.layer, case.dtype) != ("BN", "float32"):
        return False  # images that were flattened
    if case.shape == "small":
        return (
            case.mode in ("eager", "graph")
            and case.layer in ("BN", "LN")
            and case.dtype == "float32"
        )
    if BACKEND != "torch" and case.mode == "eager":
        return False
    return case.mode != "compile" or (case.dtype == "float32" and "first" not in case.shape)


def measured(case: Case, seconds: float) -> dict[str, Any]:
    """Time a case."""
    shape, axis = SHAPES[case.shape]
    engine = engines.active()
    rng = np.random.default_rng(0)
    x, dy = (engine.tensor(rng.standard_normal(shape, "float32"), case.dtype) for _ in range(2))
    dy = dy if case.training else None
    policy = "float32" if case.dtype == "float32" else "mixed_bfloat16"
    # Keras' group normalization takes no `training`.
    use = {"training": case.training} if case.layer in BATCH else {}
    made = [make(axis=axis, dtype=policy) for make in LAYERS[case.layer]]
    for layer in made:
        layer.build(shape)
    steps = {
        name: engine.layer_step(layer, use, x, dy, case.mode)
        for name, layer in zip(("ours", "keras"), made, strict=True)
    }
    native = engine.native_step(case.layer, x, dy, case.mode, axis)
    if native is not None:
        steps["native"] = native
    times = in_turn(steps, seconds)
    nbytes = int(np.prod(shape)) * (4 if case.dtype == "float32" else 2)
    least = PASSES[case.layer][not case.training] * nbytes / streaming_bandwidth(nbytes, engine)
    row = case._asdict() | {"backend": BACKEND}
    row |= {f"{name} ms": 1e3 * float(np.median(rounds)) for name, rounds in times.items()}
    row["limit"] = float(np.median(times["ours"])) / least
    for rival in sorted(set(times) - {"ours"}):
        row[f"x {rival}"] = ratio(times[rival], times["ours"])
    if case.training:
        for name, layer in zip(("ours", "keras"), made, strict=True):
            saved = engine.saved_bytes(layer, use, x)
            if saved is not None and case.mode != "compile":
                row[f"saved {name}"] = saved / nbytes
    return row


def shown(row: dict[str, Any]) -> dict[str, str]:
    """Return a row's figures as text."""
    name = f"{row['mode']:7} {row['layer']:3} {row['shape']:20} {row['dtype']:8}"
    name += " train" if row["training"] else " infer"
    figures = {k: f"{v:7.2f}" for k, v in row.items() if isinstance(v, float)}
    return {name: ""} | figures


def summary(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Return the geometric means over the four shapes, and the worst case of each mode."""
    for mode in dict.fromkeys(row["mode"] for row in rows):
        for dtype in ("float32", "bfloat16"):
            chosen = [r for r in rows if (r["mode"], r["dtype"]) == (mode, dtype)]
            lines = [("", *LAYERS)]
            for rival in ("x keras", "x native"):
                cells = []
                for layer in LAYERS:
                    values = [
                        r[rival]
                        for r in chosen
                        if r["layer"] == layer
                        and r["shape"] in MAIN_SHAPES
                        and r["training"]
                        and rival in r
                    ]
                    cells.append(f"{geometric_mean(values):.2f}" if values else "-")
                lines.append((rival, *cells))
            beside_keras = [r for r in chosen if r["layer"] not in OPTIONAL]
            if beside_keras:
                worst = min(beside_keras, key=lambda r: r["x keras"])
                yield f"\n{mode}, {dtype}: geometric mean over {', '.join(MAIN_SHAPES)}, training"
                yield table(lines, markdown=False)
                yield f"worst single case: {worst['x keras']:.2f} ({next(iter(shown(worst)))})"


if __name__ == "__main__":
    main()
