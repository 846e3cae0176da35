"""The whole of a normalization, from a kernel's `moments` and `apply`."""

from collections.abc import Callable
from typing import Any, NamedTuple

from keras import ops

from keras_bn.core.affine import AS_IS, Affine, Learned, compose, standardize, uncentered
from keras_bn.core.estimators import Correction, Corrector, Limits
from keras_bn.core.moments import Moments, is_static, merge, merge_equal, or_else
from keras_bn.core.pooling import Pooling
from keras_bn.types import Tensor

# r and d of batch renormalization, constants for gradients; None for 1 and 0.
Corrected = tuple[Tensor, Tensor] | None


def as_it_is(x: Tensor) -> Tensor:
    """Return what is given."""
    return x


class Plan(NamedTuple):
    """What a normalization does, beside its tensors.

    Attributes:
        pooling: Which elements belong to one set.
        epsilon: Added to the variance [x²].
        dtype: Dtype of the output.
        correct: Gives r and d from the moments, where gamma does not vary within a set; None for
            1 and 0.
        kept: Moments in place of those of an empty set; None to take 0.
        hold: Keeps a compiler from computing a value again, where it is used or may have moved.
        is_alone: Whether all that is asked for is y, of a plan without `correct`; a kernel may give
            None for the moments.
        merges: Whether the moments are those of all sets along the second axis together. The first
            one is then summed over, and all counts are Python numbers.
    """

    pooling: Pooling
    epsilon: float
    dtype: str
    correct: Corrector | None = None
    kept: Moments | None = None
    hold: Callable[[Tensor], Tensor] = as_it_is
    is_alone: bool = False
    merges: bool = False

    def cells(self, x: Tensor) -> int:
        """Return how many cells have their moments together."""
        number: int = (self.pooling.together or 1) * (x.shape[1] if self.merges else 1)
        return number

    @property
    def is_simple(self) -> bool:
        """Whether there are only elements of x to sum, in sets whose cells are neighbours.

        r and d may be those of a `Correction`, which says what they are made of.
        """
        _, weights, total, *_, across = self.pooling
        is_scattered = total is not None and not self.pooling.are_neighbours
        is_known = self.correct is None or isinstance(self.correct, Correction)
        return weights is None and across is None and is_known and not is_scattered


class Seen(NamedTuple):
    """What the derivative of a normalization needs, beside x and what is learned.

    Attributes:
        count: Number of elements of each set.
        affine: The map to mean 0 and variance 1, or of uncentered sets its scale alone.
        correction: What `Plan.correct` gave.
    """

    count: Tensor
    affine: Affine
    correction: Corrected


class Whole(NamedTuple):
    """The same of what one pass made of all.

    Attributes:
        affine: Center, scale and shift of each cell, in one tensor; with r and d of sets that were
            corrected.
    """

    affine: Tensor

    @property
    def correction(self) -> Corrected:
        """r and d, or None."""
        return None if self.affine.shape[0] == 3 else (self.affine[3], self.affine[4])


class How(NamedTuple):
    """What a pass does, beside its tensors: a plan in numbers.

    Attributes:
        axes: Summed over.
        dtype: Dtype of the output.
        epsilon: Added to the variance.
        together: How many neighbouring cells make a set.
        is_centered: Whether moments are about the mean.
        varies: Whether gamma varies within a set.
        is_training: Whether so many tensors are at work that no cache holds the result.
        is_corrected: Whether sets are corrected; the last inputs say towards what.
        merges: As in a plan.
    """

    axes: tuple[int, ...]
    dtype: str = "float32"
    epsilon: float = 0.0
    together: int = 1
    is_centered: bool = True
    varies: bool = False
    is_training: bool = False
    is_corrected: bool = False
    merges: bool = False

    def results(self, x: Tensor) -> list[tuple[Any, str]]:
        """Return shapes and dtypes of what the pass gives; see `in_one`."""
        sums = [1 if axis in self.axes else size for axis, size in enumerate(x.shape)]
        affine = (5 if self.is_corrected else 3, *sums)
        rest = (3, 1, 1, *sums[2:]) if self.merges else (2, *sums)
        return [(x.shape, self.dtype), (affine, "float32"), (rest, "float32")]


def how_of(learned: Learned, plan: Plan) -> How:
    """Return what a pass does for a simple plan."""
    axes, together = plan.pooling.axes, plan.pooling.together or 1
    return How(
        axes,
        plan.dtype,
        plan.epsilon,
        together,
        plan.pooling.is_centered,
        varies(learned, axes),
        is_corrected=plan.correct is not None,
        merges=plan.merges,
    )


def normalize(kernel: Any, x: Tensor, learned: Learned, plan: Plan) -> tuple[Tensor, Moments, Seen]:
    """Return y = gamma·(r·(x - mean)/√(variance + epsilon) + d) + beta, and what it is made with.

    Args:
        kernel: Has `moments` and `apply`; see `keras_bn.kernels`.
        x: The input.
        learned: gamma and beta, broadcast over `x`.
        plan: What to do.

    Returns:
        y, the moments, of an empty set with count 0, and what the derivative needs.
    """
    moments = _pooled(kernel, x, plan.pooling)
    filled = moments
    if plan.kept is not None:
        kept = (part if is_static(part) else plan.hold(part) for part in plan.kept)
        filled = or_else(moments, Moments(*kept))
    affine = standardize(filled, plan.epsilon)
    if not plan.pooling.is_centered:
        affine = uncentered(affine)
    correction = None
    if plan.correct is not None:
        r, d = plan.correct(moments)
        correction = (plan.hold(r), plan.hold(d))
    seen = Seen(filled.count, affine, correction)
    if correction is not None:
        affine = compose(affine, *correction)
    moments = _together(kernel, moments) if plan.merges else moments
    if varies(learned, plan.pooling.axes):
        return kernel.apply(x, affine, plan.dtype, learned), moments, seen
    return kernel.apply(x, compose(affine, *learned), plan.dtype), moments, seen


def in_one(kernel: Any, how: How, x: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the pass in C returns, made with a kernel.

    Args:
        kernel: As for `normalize`.
        how: What to do.
        x: The input.
        *others: gamma and beta, or neither; then the mean and the variance that sets are corrected
            towards, and the limits.

    Returns:
        y; each cell's center, scale and shift, with r and d of sets that are corrected; its offset
        and m2, or pivots, offsets and m2 that are merged.
    """
    sets = (_total_of(how.together), how.together, True) if how.together > 1 else ()
    pooling = Pooling(how.axes, None, *sets)._replace(is_centered=how.is_centered)
    learned: list[Tensor] = [*others]
    correct: Any = None
    if how.is_corrected:
        *learned, mean, variance, limits = others
        correct = Correction(mean, variance, Limits(*ops.unstack(limits)), how.epsilon)
    plan = Plan(pooling, how.epsilon, how.dtype, correct, merges=how.merges)
    y, moments, seen = normalize(kernel, x, Learned(*learned) if learned else AS_IS, plan)
    zero = ops.zeros_like(seen.affine.scale)
    affine = [zero if part is None else part for part in seen.affine]
    rest = moments[1 if how.merges else 2 :]
    return y, ops.stack([*affine, *(seen.correction or ())]), ops.stack(rest)


def _total_of(together: int) -> Callable[[Tensor], Tensor]:
    """Return the sum over so many neighbours, given back to each of them."""

    def total(cells: Tensor) -> Tensor:
        sets = ops.reshape(cells, (-1, together))
        sums = ops.broadcast_to(ops.sum(sets, 1, keepdims=True), ops.shape(sets))
        return ops.reshape(sums, ops.shape(cells))

    return total


def varies(learned: Learned, axes: tuple[int, ...]) -> bool:
    """Say whether gamma or beta varies within a set: then it is not part of the set's map."""
    parts = (part for part in learned if part is not None)
    return any(part.shape[axis] != 1 for part in parts for axis in axes)


def _together(kernel: Any, sets: Moments) -> Moments:
    """Return the moments of all sets along the second axis together."""
    found = merge_equal(Moments(sets.count, *(part[0] for part in sets[1:])), kernel.moments)
    return Moments(found.count, *(part[None] for part in found[1:]))


def _pooled(kernel: Any, x: Tensor, pooling: Pooling) -> Moments:
    """Return the moments of each set, once for each of its cells."""
    if not pooling.is_centered:
        second: Moments = kernel.second_moments(x, pooling.axes)
        return second
    found = kernel.moments(x, pooling.axes, pooling.weights)
    found = found if pooling.total is None else merge(found, pooling.total, pooling.together)
    return found if pooling.across is None else pooling.across(found)
