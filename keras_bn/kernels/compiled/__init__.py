"""The passes over big tensors on the CPU in C, where the package was built with a compiler.

`KERAS_BN_KERNELS=uncompiled` does without them: then each pass is several of the backend's
operations.
"""

import ctypes
import importlib.util
import math
import os
from functools import cache, lru_cache
from itertools import accumulate
from operator import mul
from typing import Any

from keras_bn.types import Shape

# How calls.h numbers dtypes.
TYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
# The passes have room for so many axes, and one of their own.
RANK = 7

_INT, _LONG, _REAL, _DATA = ctypes.c_int, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
_NEST, _BIG = [_INT, _DATA], [_DATA, _INT]
_ARGUMENTS = {
    "moments": [*_NEST, *_BIG, _DATA, _DATA, _REAL, _INT, _LONG, _DATA, _INT],
    "products": [*_NEST, *_BIG, *_BIG, _DATA, _LONG, _DATA, _INT],
    "mapped_products": [*_NEST, *_BIG, *_BIG, *[_DATA] * 4, _LONG, _LONG, _DATA, _DATA, _INT],
    "map": [*_NEST, *_BIG, *_BIG, *[_DATA] * 5, _INT, _INT],
    "combined": [*_NEST, *_BIG, *_BIG, *_BIG, *[_DATA] * 6, _INT],
    "normalize": [
        *_NEST,
        *_BIG,
        *_BIG,
        *[_DATA] * 2,
        _INT,
        _REAL,
        _LONG,
        _REAL,
        _INT,
        _LONG,
        _LONG,
        *[_DATA] * 3,
        _LONG,
        *[_DATA] * 2,
        _INT,
        _INT,
    ],
    "gradients": [
        *_NEST,
        *_BIG,
        *_BIG,
        *_BIG,
        _DATA,
        _INT,
        _REAL,
        _LONG,
        _INT,
        _LONG,
        _LONG,
        *[_DATA] * 2,
        _INT,
    ],
    "merge": [*[_DATA] * 3, _LONG, _LONG, _REAL, _DATA, _INT],
    "move": [*[_DATA] * 5, _LONG, *[_REAL] * 3, _DATA],
}


def place(name: str) -> str | None:
    """Return where a compiled library is; None where it was not built, or is not wanted."""
    found = importlib.util.find_spec(f"{__name__}.{name}")
    is_wanted = os.environ.get("KERAS_BN_KERNELS") != "uncompiled"
    return found.origin if found is not None and is_wanted else None


@cache
def library() -> ctypes.CDLL | None:
    """Return the library, with the threads that the backend has; None where there is none."""
    path = place("passes")
    if path is None:
        return None
    # For the whole process: TensorFlow's operations are a library of their own, which calls it.
    loaded = ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
    for name, types in _ARGUMENTS.items():
        getattr(loaded, f"keras_bn_{name}").argtypes = types
    process = ctypes.CDLL(None)
    if hasattr(process, "GOMP_parallel"):
        loaded.keras_bn_threads(ctypes.cast(process.GOMP_parallel, _DATA))
    return loaded


@cache
def cores() -> int:
    """Return how many cores this process may use."""
    is_told = hasattr(os, "sched_getaffinity")  # on Linux
    return len(os.sched_getaffinity(0)) if is_told else os.cpu_count() or 1


@cache
def xla_calls() -> dict[str, Any]:
    """Return the passes as custom calls of XLA, by name; none where there is no library."""
    loaded = library()
    names = ("moments", "merge", "products", "map", "combined", "normalize", "gradients")
    return {f"keras_bn_{name}": getattr(loaded, f"keras_bn_xla_{name}") for name in names if loaded}


@cache
def call_types() -> frozenset[str]:
    """Return the dtypes that these take."""
    loaded = library()
    if loaded is None:
        return frozenset()
    return frozenset(TYPES if loaded.keras_bn_reads_half() else TYPES.keys() - {"float16"})


def numbers(
    axes: tuple[int, ...],
    together: int = 1,
    is_centered: bool = True,
    *,
    is_given: bool = False,
    varies: bool = False,
    is_training: bool = True,
    threads: int | None = None,
) -> list[int]:
    """Return what a custom call does, beside its operands, as xla_calls.c reads it.

    Args:
        axes: Summed over.
        together: How many neighbouring cells make a set; of a merge, how many elements do.
        is_centered: Whether moments are about the mean.
        is_given: Whether gamma is, or the weights are.
        varies: Whether gamma varies within a set.
        is_training: Whether so many tensors are at work that no cache holds the result.
        threads: How many at most; None for one on each core that this process may use.
    """
    mask = sum(2**axis for axis in axes)
    options = (is_centered, is_given, varies, is_training)
    return [mask, together, *map(int, options), threads or cores()]


@lru_cache(maxsize=4096)
def dims(
    shape: Shape,
    x: Shape,
    dy: Shape | None = None,
    y: Shape | None = None,
    weight: Shape | None = None,
    cell: Shape | None = None,
    column: Shape | None = None,
) -> ctypes.Array[ctypes.c_int64]:
    """Return sizes and strides as passes.c takes them.

    Args:
        shape: Sizes of the tensor.
        x: Strides of the input [elements].
        dy: Strides of the gradient of the output.
        y: Strides of the output.
        weight: Shape of the weights, which are dense.
        cell: Shape of what there is for each sum, dense.
        column: Shape of gamma and beta, dense.

    Returns:
        A row for the sizes, and one for the strides of each operand, 0 where it is absent.
    """
    absent = (0,) * len(shape)
    large = [given or absent for given in (x, dy, y)]
    small = [absent if sizes is None else strides(sizes) for sizes in (weight, cell, column)]
    rows: list[Any] = [number for row in (shape, *large, *small) for number in row]
    return (ctypes.c_int64 * len(rows))(*rows)


def corrected(correct: Any, sums: Any) -> list[float] | None:
    """Return the limits of r and d, far off where there are none.

    Args:
        correct: A `Correction`.
        sums: Shape of what there is for each cell.

    Returns:
        Least and most of r, most of d; None where the passes do not correct so.
    """
    if correct.count_kept is not None or not are_in_turn(tuple(correct.mean.shape), sums):
        return None
    ends = zip(correct.limits, (-math.inf, math.inf, math.inf), strict=True)
    return [far if end is None else end for end, far in ends]


def are_in_turn(columns: Any, sums: Any) -> bool:
    """Say whether the columns of cells one after the other are the same again and again.

    The passes take gamma and beta, where they do not vary within a set, only so.

    Args:
        columns: Shape of what there is for each column.
        sums: Shape of what there is for each cell.

    Returns:
        Whether cell i has column i mod their number.
    """
    first = next((axis for axis, size in enumerate(columns) if size != 1), len(columns))
    return tuple(columns)[first:] == tuple(sums)[first:]


def strides(sizes: Shape) -> Shape:
    """Return the strides of a dense array [elements], 0 where it is broadcast."""
    steps = [*accumulate(reversed(sizes[1:]), mul, initial=1)][::-1]
    return tuple(0 if size == 1 else step for size, step in zip(sizes, steps, strict=True))
