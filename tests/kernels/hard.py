"""Data on which a careless kernel fails, and how far a careful one may be off.

u is the unit roundoff of the statistics' dtype, κ = |mean| / standard deviation.
"""

import math
from collections.abc import Callable

import ml_dtypes
import numpy as np

from keras_bn.kernels import reference

EPSILON = 1e-3

# One channel of n values each; the first ones matter most, as a shape may have few channels.
KINDS: dict[str, Callable] = {
    "kappa 1e3": lambda rng, n: rng.normal(1e3, 1, n),
    "kappa 1e5": lambda rng, n: rng.normal(-1e5, 1, n),
    "kappa 0": lambda rng, n: rng.normal(0, 1, n),
    "constant": lambda rng, n: np.full(n, 0.1),
    "kappa 1e4, sorted": lambda rng, n: np.sort(rng.normal(1e4, 1, n)),
    "kappa 1e2, tiny": lambda rng, n: rng.normal(1e-2, 1e-4, n),
    "kappa 1e4, huge": lambda rng, n: rng.normal(1e8, 1e4, n),
    "constant, kappa infinite": lambda rng, n: np.full(n, 1234567.0),
    "two values": lambda rng, n: rng.integers(0, 2, n) + 1e4,
    "zeros": lambda rng, n: np.zeros(n),
}

# The square of 4e3 is where float32 loses most of the 1s that are added to it one by one.
OUTLIERS: dict[str, Callable] = {
    "1e4 first": lambda rng, n: np.append(1e4, rng.normal(0, 1, n))[:n],
    "4e3 first": lambda rng, n: np.append(4e3, rng.normal(0, 1, n))[:n],
    "4e3 last": lambda rng, n: np.append(rng.normal(0, 1, n), 4e3)[-n:],
    "1e4 last": lambda rng, n: np.append(rng.normal(0, 1, n), 1e4)[-n:],
}

# Few different values, none of them exact: the roundings of a long sum all go the same way.
COARSE: dict[str, Callable] = {
    "zeros and ones": lambda rng, n: 1.0 * (rng.uniform(size=n) < 0.3),
    "half zeros": lambda rng, n: np.maximum(rng.normal(0, 1, n), 0),
    "thirds": lambda rng, n: rng.integers(-5, 6, n) / 3,
    "ones and zeros": lambda rng, n: 1.0 * (rng.uniform(size=n) < 0.9),
}

# Each array of them has squares of its own, but few.
EQUAL: dict[str, Callable] = {
    "multiples": lambda rng, n: rng.uniform(1, 2) * rng.integers(-2, 3, n),
    "two values": lambda rng, n: rng.uniform(1, 2) * rng.permutation(np.resize([-1, 1], n)),
}

# What float16 can hold: 65504 is its largest number, 2^-24 its smallest.
HALF_KINDS: dict[str, Callable] = {
    "near 65504": lambda rng, n: 65504.0 - 32 * rng.integers(0, 9, n),
    "both ends": lambda rng, n: 65504.0 * rng.choice([-1, 1], n),
    "constant 65504": lambda rng, n: np.full(n, 65504.0),
    "kappa 1e2": lambda rng, n: rng.normal(1e2, 1, n),
    "kappa 0": lambda rng, n: rng.normal(0, 1, n),
    "subnormal in float16": lambda rng, n: 2.0**-24 * rng.integers(0, 99, n),
}


def unit_roundoff(dtype: str) -> float:
    """Return the unit roundoff of a dtype."""
    return {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}[
        dtype
    ]


def channels(
    shape: tuple[int, ...], kept: int, dtype: str = "float32", kinds: dict | None = None
) -> np.ndarray:
    """Return an array with one kind of data per channel, over and over."""
    rng = np.random.default_rng(0)
    kinds = kinds or (HALF_KINDS if dtype.endswith("float16") else KINDS)
    makers = list(kinds.values())
    size = int(np.prod(shape)) // shape[kept]
    columns = [makers[c % len(makers)](rng, size) for c in range(shape[kept])]
    moved = [n for axis, n in enumerate(shape) if axis != kept]
    array = np.stack(columns).reshape(shape[kept], *moved)
    return np.ascontiguousarray(np.moveaxis(array, 0, kept)).astype(numpy_dtype(dtype))


def numpy_dtype(name: str) -> np.dtype:
    """Return the NumPy dtype of this name, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def others(rank: int, kept: int) -> tuple[int, ...]:
    """Return the axes that are pooled."""
    return tuple(axis for axis in range(rank) if axis != kept)


def exact_moments(x: np.ndarray, axes: tuple[int, ...]) -> reference.Exact:
    """Return the moments with each sum rounded once: it judges float64, and the reference."""
    columns = np.moveaxis(np.asarray(x, "float64"), axes, range(-len(axes), 0))
    shape = [1 if axis in axes else n for axis, n in enumerate(x.shape)]
    columns = columns.reshape(-1, int(np.prod([x.shape[axis] for axis in axes])))
    found = np.transpose([_column_moments(column) for column in columns])
    return reference.Exact(*(np.reshape(part, shape) for part in found))


def _column_moments(column: np.ndarray) -> tuple[int, float, float]:
    mean = math.fsum(column) / len(column)
    deviation = column - mean
    offset = math.fsum(deviation) / len(column)
    return len(column), mean, math.fsum([*deviation**2, -len(column) * offset**2])


def share(error: np.ndarray, bound: np.ndarray) -> float:
    """Return the largest share of its bound that an error uses up; NaN if there is one."""
    # Where the bound is 0 the error must be 0.
    return float(np.max(np.abs(error) / np.maximum(bound, np.finfo("float64").tiny)))


def variance_bound(exact: reference.Exact, u: float) -> np.ndarray:
    """Return how far a variance may be off: 8·u·(1 + κ²·u) of it, constant channels included."""
    return 8 * u * (exact.variance + exact.mean**2 * u)


def output_bound(y: np.ndarray, exact: reference.Exact, u: float) -> np.ndarray:
    """Return how far standardized values y may be off: 8·u·(1 + |y|), whatever κ is.

    The pivot is within 8·u of the mean, so x - pivot is exact (for small κ: off by u·|y|). The
    offset is a mean of such differences, off by 8·u of them: of 1, and of the 8·κ·u that the pivot
    was off. The scale is off by half the variance's error and two roundings, product and sum by
    one each. The term with κ is 0.05 at κ = 1e5: it is there for channels that are constant.
    """
    kappa = np.abs(exact.mean) / np.sqrt(exact.variance + EPSILON)
    return 8 * u * (1 + np.abs(y) + 8 * kappa * u)


def gradient_bound(
    z: np.ndarray, s: np.ndarray, g: np.ndarray, axes: tuple[int, ...], dtype: str
) -> np.ndarray:
    """Return how far dx may be off: 8·u of the sum of the sizes of its terms, at any κ.

    dx = (g - Σg/n - z·Σ(g·z)/n) / s. The error of z is that of y, the sums are as exact as the
    variance's. A half-precision dx is added up from rounded terms, and may be too small for
    float16's exponents.
    """
    mean_g, mean_gz = (np.mean(np.abs(part), axes, keepdims=True) for part in (g, g * z))
    sizes = (np.abs(g) + mean_g + (1 + np.abs(z)) * mean_gz) / s
    half = dtype.endswith("float16")
    smallest = float(ml_dtypes.finfo(dtype).smallest_subnormal) if half else 0.0
    return (8 * 2.0**-53 if dtype == "float64" else 8 * 2.0**-24) * sizes + half * (
        2 * unit_roundoff(dtype) * sizes + smallest
    )
