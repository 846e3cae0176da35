"""The passes over big tensors on the CPU in C, where the package was built with a compiler.

`KERAS_BN_KERNELS=uncompiled` does without them: then each pass is several of the backend's
operations.
"""

import ctypes
import importlib.util
import math
import os
from functools import cache
from typing import Any

# The passes have room for so many axes, and one of their own.
RANK = 7


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
    process = ctypes.CDLL(None)
    if hasattr(process, "GOMP_parallel"):
        loaded.keras_bn_threads(ctypes.cast(process.GOMP_parallel, ctypes.c_void_p))
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
    names = ("moments", "products", "map", "combined", "normalize", "gradients")
    return {f"keras_bn_{name}": getattr(loaded, f"keras_bn_xla_{name}") for name in names if loaded}


@cache
def dtypes() -> frozenset[str]:
    """Return the dtypes that the passes take; none where there is no library."""
    loaded = library()
    if loaded is None:
        return frozenset()
    half = ("float16",) if loaded.keras_bn_reads_half() else ()
    return frozenset(("float32", "bfloat16", *half))


def mask_of(axes: tuple[int, ...]) -> int:
    """Return axes as one number, with a bit for each, as shape.h reads them."""
    return sum(1 << axis for axis in axes)


def numbers(
    axes: tuple[int, ...],
    together: int = 1,
    is_centered: bool = True,
    *,
    is_given: bool = False,
    varies: bool = False,
    is_training: bool = True,
    is_corrected: bool = False,
    merges: bool = False,
    threads: int | None = None,
) -> list[int]:
    """Return what a custom call does, beside its operands, as xla_calls.c reads it.

    Args:
        axes: Summed over.
        together: How many neighbouring cells make a set.
        is_centered: Whether moments are about the mean.
        is_given: Whether gamma is, or the weights are.
        varies: Whether gamma varies within a set.
        is_training: Whether so many tensors are at work that no cache holds the result.
        is_corrected: Whether sets are corrected, or were.
        merges: Whether the moments are those of all sets along the second axis together.
        threads: How many at most; None for one on each core that this process may use.
    """
    options = (is_centered, is_given, varies, is_training, is_corrected, merges)
    return [mask_of(axes), together, *map(int, options), threads or cores()]


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
