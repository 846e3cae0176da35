"""Which axes, groups, slices of the batch and masked elements belong together."""

from collections.abc import Callable
from typing import NamedTuple

from keras import ops

from keras_bn.core import native
from keras_bn.core.moments import Moments
from keras_bn.types import Shape, Tensor


class Pooling(NamedTuple):
    """Which elements of a tensor belong to one set.

    Attributes:
        axes: The axes that are summed over; what is left is one cell for each element.
        weights: How much each element counts; None for 1.
        total: Sums an array of cells over those that belong together, given back to each of them;
            None where each cell is a set.
        together: How many cells make a set, where that is the same for all and known.
        are_neighbours: Whether the cells of a set follow each other, axis after axis.
        is_centered: Whether moments are about the mean; else about 0, which stands for the mean.
        across: Merges the moments with those of the other replicas; None where there are none.
    """

    axes: tuple[int, ...]
    weights: Tensor | None = None
    total: Callable[[Tensor], Tensor] | None = None
    together: int | None = None
    are_neighbours: bool = False
    is_centered: bool = True
    across: Callable[[Moments], Moments] | None = None


def reduced_axes(rank: int, kept: tuple[int, ...]) -> tuple[int, ...]:
    """Return the axes, of `rank`, that are not kept."""
    return tuple(axis for axis in range(rank) if axis not in kept)


def kept_shape(shape: Shape, kept: tuple[int, ...]) -> Shape:
    """Return the shape with 1 along every axis that is not kept, to broadcast over the input."""
    return tuple(size if axis in kept else 1 for axis, size in enumerate(shape))


def mask_weights(mask: Tensor, shape: Shape, kept: tuple[int, ...]) -> Tensor | None:
    """Return the mask with one axis per axis of the input, or None where it does not fit.

    Args:
        mask: Broadcastable to the input without its kept axes, or one axis less than the input
            (Keras' form, which lacks the last one).
        shape: The input's.
        kept: The axes that are kept.

    Returns:
        The mask, reshaped only.
    """
    pooled = reduced_axes(len(shape), kept)
    missing = len(pooled) - len(mask.shape)
    if missing >= 0:
        aligned = _align(mask, pooled[missing:], shape)
        if aligned is not None:
            return aligned
    if len(mask.shape) == len(shape) - 1:
        return _align(mask, tuple(range(len(shape) - 1)), shape)
    return None


def _align(mask: Tensor, axes: tuple[int, ...], shape: Shape) -> Tensor | None:
    """Put the mask's axes at `axes` of the input and 1 elsewhere; None where the sizes differ."""
    sizes = tuple(mask.shape)
    pairs = zip(sizes, (shape[axis] for axis in axes), strict=True)
    if any(None not in (have, want) and have not in (1, want) for have, want in pairs):
        return None
    known = ops.shape(mask)
    aligned = [1] * len(shape)
    for axis, size in zip(axes, known, strict=True):
        aligned[axis] = size
    return ops.reshape(mask, aligned)


def split_groups(array: Tensor, axis: int, groups: int) -> Tensor:
    """Split the channel axis into groups and the channels of a group; an axis of size 1 stays."""
    shape = ops.shape(array)
    sizes = (1, 1) if array.shape[axis] == 1 else (groups, shape[axis] // groups)
    return native.reshape(array, (*shape[:axis], *sizes, *shape[axis + 1 :]))


def join_groups(array: Tensor, axis: int, channels: int) -> Tensor:
    """Undo `split_groups`; what there is once for each group is given to each of its channels."""
    shape = ops.shape(array)
    groups = array.shape[axis]
    spread = (*shape[: axis + 1], channels // groups, *shape[axis + 2 :])
    return ops.reshape(
        ops.broadcast_to(array, spread), (*shape[:axis], channels, *shape[axis + 2 :])
    )


def group_total(axis: int, channels: int, groups: int) -> Callable[[Tensor], Tensor]:
    """Return the sum over the channels of a group, given back to each of them.

    Args:
        axis: The channel axis of the arrays to be summed.
        channels: Their size along it.
        groups: Number of groups of neighbouring channels.

    Returns:
        A function of an array that keeps its shape.
    """

    def total(array: Tensor) -> Tensor:
        sums = ops.sum(split_groups(array, axis, groups), axis=axis + 1, keepdims=True)
        return join_groups(sums, axis, channels)

    return total


class Ghosts(NamedTuple):
    """Slices of a batch that are pooled one by one: sample i belongs to ghost i mod `number`.

    Attributes:
        samples: Number of samples, along the first axis.
        number: Number of ghosts, at least 1.
        size: Number of samples in the first ghost; the others have as many or one less.
    """

    samples: Tensor
    number: Tensor
    size: Tensor

    @property
    def are_full(self) -> bool:
        """Whether all ghosts are known to have the same size."""
        missing = self.size * self.number - self.samples
        return isinstance(missing, int) and missing == 0

    def split(self, array: Tensor) -> Tensor:
        """Split the samples into (size, number), filled up with zeros."""
        shape = ops.shape(array)
        if not self.are_full:
            missing = self.size * self.number - self.samples
            array = ops.concatenate([array, ops.zeros((missing, *shape[1:]), array.dtype)])
        return ops.reshape(array, (self.size, self.number, *shape[1:]))

    def join(self, array: Tensor) -> Tensor:
        """Undo `split`."""
        shape = ops.shape(array)
        joined = ops.reshape(array, (self.size * self.number, *shape[2:]))
        return joined if self.are_full else joined[: self.samples]

    def total(self, array: Tensor) -> Tensor:
        """Sum over the samples of a ghost, given back to each of them."""
        split = self.split(array)
        sums = ops.sum(split, axis=0, keepdims=True)
        return self.join(ops.broadcast_to(sums, ops.shape(split)))


def ghosts_of(x: Tensor, size: int) -> Ghosts:
    """Return the fewest ghosts of at most `size` samples each, whose sizes are all but equal."""
    samples = ops.shape(x)[0]
    # The size is a tensor where it is not known before the call.
    largest = max if x.shape[0] is not None else ops.maximum
    number = (largest(samples, 1) - 1) // size + 1
    return Ghosts(samples, number, -(-samples // number))
