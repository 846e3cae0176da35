"""Whatever a data set comes as, one batch of numbers after the other."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from keras import ops

from keras_bn.errors import invalid

# How many rows of an array are one batch, as in `fit`.
BATCH_SIZE = 32

# Elements that are summarized at a time: their float64 copies stay in the processor's cache.
_BLOCK = 2**17


def is_array(data: Any) -> bool:
    """Say whether this is an array, a tensor of any backend, a data frame or an HDF5 data set."""
    return hasattr(data, "shape") and hasattr(data, "__array__")


def features(item: Any) -> Any:
    """Return x of (x,), (x, y) or (x, y, weights), which PyTorch's DataLoader gives as a list.

    A list or tuple of numbers is a row of x itself.
    """
    if not isinstance(item, list | tuple) or not item or not is_array(item[0]):
        return item
    return item[0] if isinstance(item, tuple) or len(item[0].shape) > 0 else item


def batches(
    layer: str,
    data: Any,
    rank: int | None,
    batch_size: int | None = None,
    steps: int | None = None,
) -> Iterator[Any]:
    """Yield the batches of a data set; see `FeatureScaling.adapt`.

    Args:
        layer: Name of the layer, for errors.
        data: An array, or anything that yields batches or single samples; `features` of it.
        rank: Rank of a batch, one more than that of a sample; None for any.
        batch_size: How many rows of an array make a step.
        steps: How many batches to take; None for all.

    Yields:
        Arrays; of an array all that is taken, at once and as it is.

    Raises:
        invalid: If a batch size is given for data that come in batches.
    """
    data = features(data) if isinstance(data, tuple) else data
    if not isinstance(data, Iterable) or isinstance(data, str | bytes | dict):
        data = numbers(layer, data)
    if is_array(data):
        yield data if steps is None else data[: steps * (batch_size or BATCH_SIZE)]
        return
    if batch_size is not None:
        raise invalid(layer, "batch_size", "None for data that come in batches", batch_size)
    for item in itertools.islice(data, steps):
        batch = numbers(layer, features(item))
        yield batch[np.newaxis] if batch.ndim + 1 == rank else batch


def blocks(layer: str, array: Any, kept: tuple[int, ...]) -> Iterator[np.ndarray[Any, Any]]:
    """Yield an array in NumPy, in parts of some rows each, at least one."""
    shape = tuple(array.shape)
    if not shape or 0 in kept:
        yield numbers(layer, array)
        return
    rows = max(1, _BLOCK // max(1, int(np.prod(shape[1:]))))
    for start in range(0, max(1, shape[0]), rows):
        yield numbers(layer, array[start : start + rows])


def numbers(layer: str, data: Any) -> np.ndarray[Any, Any]:
    """Return an array, a tensor, a list of numbers or a number as a NumPy array."""
    array = None
    if is_array(data) or isinstance(data, list | tuple | int | float):
        array = ops.convert_to_numpy(data) if ops.is_tensor(data) else np.asarray(data)
    # NumPy itself knows bfloat16 as bytes.
    if array is None or (array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16"):
        raise invalid(
            layer,
            "data",
            "an array of real numbers, or an iterable of batches of them",
            type(data).__name__,
            "From batches of another form, map out the array first.",
            kind=TypeError,
            dtype=None if array is None else array.dtype.name,
        )
    return array
