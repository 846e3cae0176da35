"""The differentiable steps on the big tensor, with their derivatives by hand.

A backend gives the passes over the big tensor (sums and maps, without gradients) and `run`, which
hands it a derivative. What lies between the passes is small, and is written here for all.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from keras import ops
from keras.backend import standardize_dtype

from keras_bn.core import native
from keras_bn.core.affine import AS_IS, Affine, Learned, uncentered
from keras_bn.core.moments import Moments, is_static, positive, settled
from keras_bn.kernels import generic
from keras_bn.kernels.normalization import Plan, Seen, Whole, normalize, varies
from keras_bn.types import Tensor

Axes = tuple[int, ...]
Tensors = tuple[Tensor, ...]


class Step(NamedTuple):
    """A function of tensors, with its derivative.

    Attributes:
        forward: Gives, from the inputs, the outputs, further results without gradient, and what
            the derivative needs beside the inputs: constants of the pooled size. It is a
            function of tensors, and reads no variable.
        backward: Gives the gradients of the inputs from the inputs, the constants and the
            gradients of the outputs.
        plain: Gives outputs and further results from the inputs in differentiable operations, to
            differentiate twice (then with the constants, which must not change) or in other ways
            (with None).
    """

    forward: Callable[..., tuple[Tensors, Tensors, Any]]
    backward: Callable[..., Tensors]
    plain: Callable[..., tuple[Tensors, Tensors]]


class Kernel:
    """The kernels of a backend, from its passes; see `keras_bn.kernels` for the contract.

    Args:
        passes: A module with sums (`number`, `total`, `squares`, `deviations`, `products`,
            `mapped_products`) and maps (`mapped`, `scaled`, `combined`, `weighted`). Where the
            backend has them, `moments` in one pass, and a whole `normalize` with its `gradients`.
        run: Gives the results of a step and its inputs, with the step's derivative; the further
            results have none.
    """

    def __init__(self, passes: Any, run: Callable[..., Tensors]) -> None:
        self._passes, self._run = passes, run

    def moments(self, x: Tensor, axes: Axes, weights: Tensor | None = None) -> Moments:
        """Return the moments of `x` over `axes`."""
        passes = self._passes
        weights = None if weights is None else _spread(weights, x)

        def forward(x: Tensor) -> Any:
            found = Forward(passes).moments(x, axes, weights)
            return _tensors(found), (), Moments(*map(_apart, found))

        def backward(inputs: Any, found: Moments, grads: Any) -> Any:
            """dx = w·(d_mean / n + 2·d_m2·(x - mean))."""
            (x,), (*_, d_mean, d_m2) = inputs, grads
            slope = 2.0 * d_m2
            level = d_mean / positive(found.count) - slope * found.offset
            dx = passes.mapped(x, Affine(found.pivot, slope, level), _dtype(x))
            return (passes.weighted(dx, weights),)

        def plain(inputs: Any, _: Any) -> Any:
            return _tensors(generic.moments(inputs[0], axes, weights)), ()

        found = self._run(Step(forward, backward, plain), x)
        *count, pivot, offset, m2 = found
        count = native.stop_gradient(*count) if count else passes.number(x, axes)
        return Moments(count, native.stop_gradient(pivot), offset, m2)

    def apply(self, x: Tensor, affine: Affine, dtype: str) -> Tensor:
        """Return (x - center)·scale + shift in `dtype`."""
        passes = self._passes

        def forward(x: Tensor, *affine: Tensor) -> Any:
            return (passes.mapped(x, Affine(*affine), dtype),), (), None

        def backward(inputs: Any, _: Any, grads: Any) -> Any:
            """dx = dy·scale, d_shift = Σ dy, d_scale = Σ dy·(x - center)."""
            (x, center, scale, _), (dy,) = inputs, grads
            axes = tuple(axis for axis, size in enumerate(scale.shape) if size == 1)
            d_shift, d_scale = passes.products(x, dy, center, axes)
            return passes.scaled(dy, scale, _dtype(x)), -scale * d_shift, d_scale, d_shift

        def plain(inputs: Any, _: Any) -> Any:
            return (generic.apply(inputs[0], Affine(*inputs[1:]), dtype),), ()

        (y,) = self._run(Step(forward, backward, plain), x, *affine)
        return y

    def normalize(self, x: Tensor, learned: Learned, plan: Plan) -> tuple[Tensor, Moments | None]:
        """Return y and the moments, as `normalization.normalize`.

        Differentiated as a whole, dx is one map of x and dy; else it is the sum of what comes
        through y and of what comes through the moments.
        """
        passes, axes, weights = self._passes, plan.pooling.axes, plan.pooling.weights
        further: Any = (lambda _: ()) if plan.is_alone else _tensors
        if weights is not None:
            plan = plan._replace(pooling=plan.pooling._replace(weights=_spread(weights, x)))

        def forward(x: Tensor, *given: Tensor) -> Any:
            whole = self._whole(x, learned.filled(given), plan)
            if whole is not None:
                y, found, seen = whole
                return (y,), further(found), seen
            y, found, seen = normalize(Forward(passes), x, learned.filled(given), plan)
            # The others are no outputs.
            count, center = _apart(seen.count), _apart(seen.affine.center)
            seen = seen._replace(count=count, affine=seen.affine._replace(center=center))
            return (y,), further(found), seen

        def backward(inputs: Any, seen: Any, grads: Any) -> Any:
            (x, *given), (dy,) = inputs, grads
            parts = learned.filled(given)
            is_whole = isinstance(seen, Whole)
            found = passes.gradients(x, dy, parts, seen, plan) if is_whole else None
            if found is None:
                return _gradients(passes, x, dy, parts, _seen_of(seen, passes, x, plan), plan)
            pairs = zip(found[1:], given, strict=True)
            return found[0], *[_folded(own, part) for own, part in pairs]

        def plain(inputs: Any, seen: Any) -> Any:
            is_fixed = seen is not None and plan.correct is not None
            fixed = plan._replace(correct=lambda _: seen.correction) if is_fixed else plan
            y, found, _ = normalize(generic, inputs[0], learned.filled(inputs[1:]), fixed)
            return (y,), further(found)

        y, *found = self._run(Step(forward, backward, plain), x, *learned.given)
        if plan.is_alone:
            return y, None
        if len(found) == 4:
            return y, Moments(*found)
        return y, Moments(passes.number(x, axes) * plan.cells(x), *found)

    def _whole(self, x: Tensor, learned: Learned, plan: Plan) -> tuple[Tensor, Moments, Any] | None:
        """Return what one pass makes of all; None where there is none, or more to do."""
        find = getattr(self._passes, "normalize", None)
        return find(x, learned, plan) if find is not None and plan.is_simple else None


def _seen_of(seen: Seen | Whole, passes: Any, x: Tensor, plan: Plan) -> Seen:
    """Return what `_gradients` needs."""
    if isinstance(seen, Seen):
        return seen
    affine = Affine(*(seen.affine[part] for part in range(3)))
    affine = affine if plan.pooling.is_centered else uncentered(affine)
    count = passes.number(x, plan.pooling.axes) * (plan.pooling.together or 1)
    return Seen(count, affine, seen.correction)


class Forward(NamedTuple):
    """The kernels of some passes, without gradients."""

    passes: Any

    def moments(self, x: Tensor, axes: Axes, weights: Tensor | None = None) -> Moments:
        """Two passes: the mean, and the deviations from it; one where the backend knows how."""
        passes = self.passes
        count = passes.number(x, axes) if weights is None else self._count(x, axes, weights)
        divisor = positive(count)
        is_able = hasattr(passes, "moments")
        found = passes.moments(x, weights, count, axes) if is_able else None
        if found is not None:
            return Moments(count, *found)
        pivot = settled(passes.total(x, weights, axes) / divisor)
        first, second = passes.deviations(x, pivot, weights, axes)
        offset = first / divisor
        # The pivot is the rounded mean, so this subtracts next to nothing.
        return Moments(count, pivot, offset, ops.relu(second - first * offset))

    def _count(self, x: Tensor, axes: Axes, weights: Tensor) -> Tensor:
        """Return the sum of the weights, each of which may stand for several elements."""
        shared = tuple(axis for axis in axes if weights.shape[axis] == 1)
        # In float64: what is lost here, sums about a pivot multiply by how far off that is.
        number = self.passes.number(x, shared)
        number = number if is_static(number) else ops.cast(number, "float64")
        count = self.passes.total(ops.cast(weights, "float64"), None, axes) * number
        sums = [1 if axis in axes else size for axis, size in enumerate(ops.shape(x))]
        return ops.broadcast_to(ops.cast(count, weights.dtype), sums)

    def second_moments(self, x: Tensor, axes: Axes) -> Moments:
        """One pass: the squares."""
        m2 = self.passes.squares(x, axes)
        return Moments(self.passes.number(x, axes), ops.zeros_like(m2), ops.zeros_like(m2), m2)

    def apply(self, x: Tensor, affine: Affine, dtype: str, learned: Learned = AS_IS) -> Tensor:
        """The map."""
        y: Tensor = self.passes.mapped(x, affine, dtype, learned)
        return y


def _gradients(
    passes: Any, x: Tensor, dy: Tensor, learned: Learned, seen: Any, plan: Plan
) -> tuple[Tensor, ...]:
    """Return the gradients of x and of what is learned, through y.

    With z = (x - mean)/√(variance + epsilon), g = gamma·r, weights w and sums over a set of n:
    dx = (g·dy - w·(Σ g·dy + z·Σ g·dy·z) / n) / √(variance + epsilon).
    """
    count, affine, correction = seen
    axes, weights, total, *_ = plan.pooling
    across: Any = plan.pooling.across  # with `total`, or this would not be one step
    outer, inner = (learned, AS_IS) if varies(learned, axes) else (AS_IS, learned)
    center, inverse, shift = affine
    if outer.is_nothing:
        first, second = passes.products(x, dy, center, axes)
        second = second * inverse if shift is None else second * inverse + first * shift
    else:
        shared = _shared_axes(learned)
        first, second, d_beta, d_gamma = passes.mapped_products(
            x, dy, affine, outer.gamma, axes, shared
        )
    r, d = (1.0, None) if correction is None else correction
    factor = r if inner.gamma is None else r * inner.gamma
    share = factor / positive(count)
    terms = [share * part for part in (first, second) if part is not None]
    if total is not None:
        terms = [total(part) for part in terms]
    if across is not None:
        terms = across.total(ops.stack(terms))
    *level, slope = terms
    slope = -inverse * slope
    # Σ g·dy / n and Σ g·dy·z / n, as a level and a slope of x - center.
    line = (slope * inverse, None if shift is None else slope * shift - inverse * level[0])
    dx = passes.combined(x, dy, center, (inverse * factor, *line), weights, outer.gamma)
    if outer.is_nothing:
        d_gamma, d_beta = r * second if d is None else r * second + d * first, first
    pairs = ((d_gamma, learned.gamma), (d_beta, learned.beta))
    return dx, *(_folded(cells, part) for cells, part in pairs if part is not None)


def _shared_axes(learned: Learned) -> Axes:
    """Return the axes along which gamma and beta are the same."""
    return tuple(axis for axis, size in enumerate(learned.given[0].shape) if size == 1)


def _folded(cells: Tensor, like: Tensor) -> Tensor:
    """Sum what all cells that share a parameter give for it."""
    if cells.shape == like.shape:
        return cells
    pairs = enumerate(zip(cells.shape, like.shape, strict=True))
    axes = tuple(axis for axis, (have, want) in pairs if want == 1 and have != 1)
    return ops.sum(cells, axis=axes, keepdims=True) if axes else cells


def _spread(weights: Tensor, x: Tensor) -> Tensor:
    """Return the weights as a constant, of size 1 or that of `x` along each axis."""
    # A size that is not known may be 1, too.
    pairs = zip(weights.shape, ops.shape(x), strict=True)
    sizes = [1 if own == 1 else size for own, size in pairs]
    return ops.stop_gradient(ops.broadcast_to(weights, sizes))


def _tensors(moments: Moments) -> tuple[Tensor, ...]:
    """Return the parts that are tensors: a count may be a number."""
    return moments[is_static(moments.count) :]


def _apart(part: Tensor) -> Tensor:
    """Return a copy without gradient: PyTorch must not keep its own outputs for the backward."""
    return part if is_static(part) or part is None else native.stop_gradient(part)


def _dtype(x: Tensor) -> str:
    name: str = standardize_dtype(x.dtype)
    return name
