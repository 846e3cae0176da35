"""The compiled passes on tensors of PyTorch; each gives None for what they do not serve."""

import math
from typing import Any, NamedTuple

import torch

from keras_bn.core.affine import AS_IS, Affine, Learned
from keras_bn.core.estimators import Average
from keras_bn.core.moments import Moments, degrees_of_freedom, is_static, positive
from keras_bn.kernels.compiled import RANK, are_in_turn, corrected, mask_of
from keras_bn.kernels.normalization import Plan, Whole, varies
from keras_bn.kernels.torch import operations
from keras_bn.kernels.torch.operations import DTYPES, sums_of
from keras_bn.kernels.torch.tracing import are_memory, is_transformed, takes_operations
from keras_bn.types import Tensor

Axes = tuple[int, ...]


def serves(x: Tensor) -> bool:
    """Say whether the passes take a tensor."""
    return _is_known(x) and are_memory(x)


def _is_known(x: Tensor) -> bool:
    return x.dtype in DTYPES and x.ndim <= RANK and x.numel() > 0


def _serves_compiled(x: Tensor) -> bool:
    """Say whether the passes take a tensor, in compiled code too."""
    return _is_known(x) and (are_memory(x) or (x.is_cpu and takes_operations()))


def moments(
    x: Tensor, weights: Tensor | None, count: Any, axes: Axes, is_centered: bool = True
) -> list[Tensor] | None:
    """Return pivot, offset and m2 over the axes; about 0 if not centered."""
    parts: list[Tensor] | None = []
    if weights is not None:
        weight, counts = _dense(weights), _dense(count, like=sums_of(x, axes))
        parts = None if weight is None or counts is None else weight + counts
    if not serves(x) or parts is None:
        return None
    return list(operations.moments(x, parts, mask_of(axes), is_centered).unbind())


def products(x: Tensor, dy: Tensor, center: Tensor, axes: Axes) -> list[Tensor] | None:
    """Return Σ dy and Σ dy·(x - center)."""
    small = _dense(center, like=sums_of(x, axes))
    if not serves(x) or not serves(dy) or small is None:
        return None
    return list(operations.products(x, dy, *small).unbind())


def mapped_products(
    x: Tensor, dy: Tensor, affine: Affine, gamma: Tensor | None, axes: Axes, shared: Axes
) -> list[Tensor] | None:
    """Return Σ gamma·dy, Σ gamma·dy·z, Σ dy and Σ dy·z; see `passes.mapped_products`."""
    sums, others = sums_of(x, axes), sums_of(x, shared)
    gamma = x.new_ones(others, dtype=torch.float32) if gamma is None else gamma
    small, learned = _dense(*_filled(affine), like=sums), _dense(gamma, like=others)
    if not serves(x) or not serves(dy) or small is None or learned is None:
        return None
    out, columns = operations.mapped_products(x, dy, *small, *learned)
    return [*out.unbind(), *columns.unbind()]


def mapped(
    x: Tensor, affine: Affine, dtype: torch.dtype, learned: Learned = AS_IS
) -> Tensor | None:
    """Return ((x - center)·scale + shift)·gamma + beta."""
    gamma, beta = learned
    if gamma is None and beta is not None:
        gamma = torch.ones_like(beta)
    elif beta is None and gamma is not None:
        beta = torch.zeros_like(gamma)
    if not serves(x) or dtype not in DTYPES:
        return None
    small, columns = _dense(*_filled(affine)), _dense(gamma, beta)
    if small is None or columns is None:
        return None
    given = columns if gamma is not None else []
    y: Tensor = operations.mapped(x, *small, given, x.requires_grad, dtype)
    return y


def combined(
    x: Tensor,
    dy: Tensor,
    center: Tensor | None,
    terms: tuple[Tensor, Tensor, Tensor | None],
    weights: Tensor | None,
    gamma: Tensor | None,
) -> Tensor | None:
    """Return gamma·dy·a + w·((x - center)·b + c), in the dtype of x, for the terms a, b, c."""
    if not serves(x) or not serves(dy):
        return None
    if weights is not None and gamma is not None:
        return None
    a, b, c = terms
    small = _dense(*_filled(Affine(center, b, c)), a)
    weight, learned = _dense(weights), _dense(gamma)
    if small is None or weight is None or learned is None:
        return None
    one, other = ([part for part in parts if part is not None] for parts in (weight, learned))
    dx: Tensor = operations.combined(x, dy, *small, one, other)
    return dx


def normalize(x: Tensor, learned: Learned, plan: Plan) -> tuple[Tensor, Any, Whole] | None:
    """Return y, the moments, and the map of each cell, which the gradient needs."""
    axes, together = plan.pooling.axes, plan.pooling.together or 1
    dtype, sums = getattr(torch, plan.dtype), sums_of(x, axes)
    if not _serves_compiled(x) or dtype not in DTYPES:
        return None
    columns, kept = _columns(learned, sums, axes), _kept(plan, sums)
    if columns is None or kept is None:
        return None
    y, affine, rest = operations.normalize(
        x, columns.parts, kept, mask_of(axes), columns.varies, together, plan.epsilon,
        plan.pooling.is_centered, x.requires_grad, plan.merges, dtype,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        # Keras sets a mask on it, which torch 2.13 forbids on one of several results.
        y = y.view_as(y)
    if plan.is_alone:
        return y, None, Whole(affine)
    size = math.prod([x.shape[axis] for axis in axes])
    parts = rest.unbind() if plan.merges else (affine[0], *rest.unbind())
    return y, Moments(size * plan.cells(x), *parts), Whole(affine)


def moved(mean: Tensor, variance: Tensor, batch: Moments, average: Average) -> Any:
    """Return a mean and a variance moved towards a batch, and whether any of it is known."""
    count, *parts = batch
    is_number = is_static(count) and is_static(average.momentum) and count > 0
    is_served = DTYPES and is_number and not is_transformed(*parts)
    if not is_served or not _are_rows(mean, variance, *parts):
        return None
    divisor = positive(degrees_of_freedom(count)) if average.unbiased else count
    epsilon = -1.0 if average.epsilon is None else average.epsilon
    new, are_any = operations.moved(mean, variance, *parts, divisor, average.momentum, epsilon)
    return (*new.unbind(), are_any)


def _are_rows(first: Tensor, *others: Tensor) -> bool:
    """Say whether tensors are as many elements in the order of memory, as the passes take them."""
    number = first.numel()
    parts = (first, *others)
    return are_memory(*parts) and all(
        part.dtype == torch.float32 and part.numel() == number and part.is_contiguous()
        for part in parts
    )


def gradients(
    x: Tensor, dy: Tensor, learned: Learned, whole: Whole, plan: Plan
) -> tuple[Tensor, ...]:
    """Return the gradients of x and of what is learned, from the maps that `normalize` gave."""
    gamma, beta = learned
    if gamma is None and beta is not None:
        gamma = torch.ones_like(beta)
    are_varied, together = varies(learned, plan.pooling.axes), plan.pooling.together or 1
    given = [] if gamma is None else [gamma.contiguous()]
    dx, found = operations.gradients(
        x, dy, whole.affine, given, are_varied, together, plan.pooling.is_centered
    )
    pairs = zip((found[1], found[0]), learned, strict=True)
    return dx, *[gradient for gradient, part in pairs if part is not None]


def _kept(plan: Plan, sums: Axes) -> list[Tensor] | None:
    """Return what sets are corrected towards, and the limits; None if the passes do not so.

    That is means, variances; least and most of r, most of d.
    """
    correct: Any = plan.correct
    if correct is None:
        return []
    parts, limits = _dense(correct.mean, correct.variance), corrected(correct, sums)
    if parts is None or limits is None:
        return None
    if any(isinstance(limit, torch.Tensor) for limit in limits):
        ends = torch.stack([torch.as_tensor(limit, dtype=torch.float64) for limit in limits])
    else:
        ends = torch.tensor(limits, dtype=torch.float64)
    return [*parts, ends]


class _Columns(NamedTuple):
    """What is learned, as the passes take it.

    Attributes:
        parts: gamma and beta, or nothing.
        varies: Whether they vary within a set.
    """

    parts: list[Tensor]
    varies: bool


def _columns(learned: Learned, sums: Axes, axes: Axes) -> _Columns | None:
    """Return gamma and beta; None where the passes do not take them."""
    if learned.is_nothing:
        return _Columns([], False)
    gamma, beta = learned
    gamma = torch.ones_like(beta) if gamma is None else gamma
    beta = torch.zeros_like(gamma) if beta is None else beta
    parts, shape = _dense(gamma, beta), tuple(gamma.shape)
    are_varied = varies(learned, axes)
    if parts is None or not (are_varied or shape == sums or are_in_turn(shape, sums)):
        return None
    return _Columns(parts, are_varied)


def _filled(affine: Affine) -> Affine:
    """Return the map with 0 in place of what is missing."""
    if affine.center is not None and affine.shift is not None:
        return affine
    missing = torch.zeros_like(affine.scale)
    return Affine(*(missing if part is None else part for part in affine))


def _dense(*parts: Tensor | None, like: Axes | None = None) -> list[Any] | None:
    """Return dense tensors of one shape; None for those of another dtype or device."""
    given = [part for part in parts if part is not None]
    are_alike = True
    for part in given:
        if part.dtype != torch.float32 or not part.is_cpu:
            return None
        are_alike = are_alike and part.shape == given[0].shape
    if like is not None or not are_alike:
        shape = like or torch.broadcast_shapes(*(part.shape for part in given))
        return [None if part is None else part.expand(shape).contiguous() for part in parts]
    return [None if part is None else part.contiguous() for part in parts]
