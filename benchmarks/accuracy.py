"""Measure how exact the layers are, beside Keras' own and beside the contract.

    python benchmarks/accuracy.py                                the backend of KERAS_BACKEND
    python benchmarks/accuracy.py --all                          all three, a process for each
    python benchmarks/accuracy.py --all --write docs/numerics.md put the tables between the marks

The variance is what one training step at momentum 0 leaves in `moving_variance`; its error is
relative to the float64 reference. The error of the output is relative to 1 + |y|. Both are the
largest of all channels and elements. u is 2^-24, κ is |mean| / standard deviation.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import keras
import numpy as np
from measuring import BACKENDS, heading, printed_by, replace, table

import keras_bn
from keras_bn.kernels import reference

EPSILON = 1e-3
U = 2.0**-24

# The name, the shape (channels last), and κ at standard deviation 1.
DATA = [(f"κ = {kappa:g}", (16, 32, 32, 8), kappa) for kappa in (0, 100, 1000, 10000, 100000)]
DATA += [(f"κ = {kappa:g}, 524288 rows", (524288, 8), kappa) for kappa in (0, 1000)]
HEAD = ("mode", "data", "variance: ours", "variance: Keras", "bound")
HEAD += ("BN y: ours", "BN y: Keras", "bound", "GN y: ours", "GN y: Keras")
HEAD += ("LN y: ours", "LN y: Keras")


def main() -> None:
    """Measure, and print or write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--all", action="store_true", help="all backends, a process for each")
    parser.add_argument("--markdown", action="store_true", help="print a table in Markdown")
    parser.add_argument("--write", type=Path, help="replace the tables in this file")
    options = parser.parse_args()
    if not options.all and options.write is None:
        print(heading(), "", table([HEAD, *rows()], options.markdown), sep="\n")
        return
    more = ["--markdown"] if options.markdown or options.write is not None else []
    names = BACKENDS if options.all else (keras.backend.backend(),)
    found = "\n\n".join(printed_by(__file__, name, *more) for name in names)
    if options.write is None:
        print(found)
    else:
        replace(options.write, "accuracy", found)


def rows() -> Iterator[tuple[str, ...]]:
    """Measure each mode on all data."""
    for mode, run in modes().items():
        for name, shape, kappa in DATA:
            x = np.random.default_rng(0).normal(kappa, 1, shape).astype("float32")
            errors = [f"{error:.0e}" for error in measure(run, x)]
            bounds = [f"{8 * U * (1 + size):.0e}" for size in (kappa**2 * U, kappa)]
            yield mode, name, *errors[:2], bounds[0], *errors[2:4], bounds[1], *errors[4:]


def measure(run: Callable, x: np.ndarray) -> list[float]:
    """Return the errors of both variances, and of both outputs of BN, GN and LN, ours first."""
    pooled = tuple(range(x.ndim - 1))
    variance = np.ravel(reference.moments(x, pooled).variance)
    y = reference.normalize(x, pooled, epsilon=EPSILON)
    batch, group, last = [], [], []
    for library in (keras_bn, keras.layers):
        layer = library.BatchNormalization(momentum=0.0, epsilon=EPSILON)
        batch.append(run(layer, x, training=True))
        group.append(run(library.GroupNormalization(groups=2, epsilon=EPSILON), x))
        last.append(run(library.LayerNormalization(epsilon=EPSILON), x))
    errors = [np.max(np.abs(found[1] / variance - 1)) for found in batch]
    along = reference.normalize(x, (x.ndim - 1,), epsilon=EPSILON)
    for outputs, wanted in ((batch, y), (group, grouped(x)), (last, along)):
        errors += [np.max(np.abs(z - wanted) / (1 + np.abs(wanted))) for z, _ in outputs]
    return errors


def grouped(x: np.ndarray) -> np.ndarray:
    """Return the exact output of group normalization in two groups."""
    split = x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
    pooled = (*range(1, x.ndim - 1), x.ndim)
    return reference.normalize(split, pooled, epsilon=EPSILON).reshape(x.shape)


def modes() -> dict[str, Callable]:
    """Return, for the active backend, a function for each mode that runs a layer on an array."""
    return {
        "tensorflow": {"eager": eager, "graph": tf_graph, "saved": tf_saved, "XLA": tf_xla},
        "jax": {"eager": eager, "jit": jax_jit},
        "torch": {"eager": eager, "compile": torch_compile},
    }[keras.backend.backend()]


def eager(layer: Any, x: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the output, and what the layer now keeps as its variance."""
    return result(layer, layer(keras.ops.convert_to_tensor(x), **options))


def tf_graph(layer: Any, x: np.ndarray, *, xla: bool = False, **options: Any) -> Any:
    """Run the layer in a `tf.function`."""
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")  # it warns of one function per layer
    layer.build(x.shape)
    function = tf.function(lambda x: layer(x, **options), jit_compile=xla)
    return result(layer, function(tf.convert_to_tensor(x)))


def tf_xla(layer: Any, x: np.ndarray, **options: Any) -> Any:
    """Run the layer in a `tf.function` compiled by XLA."""
    return tf_graph(layer, x, xla=True, **options)


def tf_saved(layer: Any, x: np.ndarray, **options: Any) -> Any:
    """Run what is saved of the graph: nothing is put in the place of its functions."""
    import tensorflow as tf

    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    found = tf_graph(layer, x, **options)
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": False})
    return found


def jax_jit(layer: Any, x: np.ndarray, **options: Any) -> Any:
    """Run the layer, stateless, under `jax.jit`."""
    import jax

    layer.build(x.shape)

    def function(trainable: Any, kept: Any, x: Any) -> Any:
        return layer.stateless_call(trainable, kept, x, **options)

    values = (
        [v.value for v in vs] for vs in (layer.trainable_variables, layer.non_trainable_variables)
    )
    y, kept = jax.jit(function)(*values, x)
    for variable, value in zip(layer.non_trainable_variables, kept, strict=True):
        variable.assign(value)
    return result(layer, y)


def torch_compile(layer: Any, x: np.ndarray, **options: Any) -> Any:
    """Run the layer under `torch.compile`."""
    import torch

    layer.build(x.shape)
    torch.compiler.reset()
    function = torch.compile(lambda x: layer(x, **options))
    return result(layer, function(torch.from_numpy(x)))


def result(layer: Any, y: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the output and the kept variance in float64."""
    kept = getattr(layer, "moving_variance", None)
    arrays = (None if a is None else keras.ops.convert_to_numpy(a) for a in (y, kept))
    return tuple(None if array is None else array.astype("float64") for array in arrays)


if __name__ == "__main__":
    main()
