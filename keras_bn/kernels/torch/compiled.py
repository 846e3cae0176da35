"""The compiled passes on tensors of PyTorch; each gives None for what they do not serve."""

import ctypes
import math
from typing import Any, NamedTuple

import torch
from torch._C import (  # nothing public says who looks at the operations of a program
    _get_tracing_state,
    _len_torch_dispatch_stack,
)

from keras_bn.core.affine import AS_IS, Affine, Learned
from keras_bn.core.moments import Moments
from keras_bn.kernels.compiled import TYPES, are_in_turn, corrected, dims, library
from keras_bn.kernels.normalization import Plan, Whole, varies
from keras_bn.types import Tensor

Axes = tuple[int, ...]

_library: Any = library()
_types = {getattr(torch, name): number for name, number in TYPES.items()}
if _library is not None and not _library.keras_bn_reads_half():
    del _types[torch.float16]
_plain = (torch.Tensor, torch.nn.Parameter)


def is_memory(x: Tensor) -> bool:
    """Say whether a tensor is memory of the CPU, and nobody else looks at what is done with it."""
    return (
        not torch.compiler.is_compiling()
        and _get_tracing_state() is None
        and not _len_torch_dispatch_stack()
        and x.is_cpu
        and type(x) in _plain
        and not x.is_neg()
    )


def serves(x: Tensor) -> bool:
    """Say whether the passes take a tensor."""
    return _library is not None and is_memory(x) and x.dtype in _types and x.numel() > 0


def moments(
    x: Tensor, weights: Tensor | None, count: Any, axes: Axes, is_centered: bool = True
) -> list[Tensor] | None:
    """Return pivot, offset and m2 over the axes; about 0 if not centered."""
    sums = _sums(x, axes)
    weight, counts = _dense(weights), _dense(None if isinstance(count, int) else count, like=sums)
    if not serves(x) or weight is None or counts is None:
        return None
    out = x.new_empty((3, *sums), dtype=torch.float32)
    nest = dims(x.shape, x.stride(), None, None, *_shapes(*weight), sums)
    cells = out.numel() // 3
    number = count if isinstance(count, int) else 0
    done = _library.keras_bn_moments(
        x.ndim, nest, *_data(x), *_addresses(*weight, *counts), number, is_centered, cells,
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return list(out.unbind()) if done else None


def products(x: Tensor, dy: Tensor, center: Tensor, axes: Axes) -> list[Tensor] | None:
    """Return Σ dy and Σ dy·(x - center)."""
    sums = _sums(x, axes)
    small = _dense(center, like=sums)
    if not serves(x) or not serves(dy) or small is None:
        return None
    out = x.new_empty((2, *sums), dtype=torch.float32)
    nest = dims(x.shape, x.stride(), dy.stride(), None, None, sums)
    done = _library.keras_bn_products(
        x.ndim, nest, *_data(x), *_data(dy), *_addresses(*small), out.numel() // 2,
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return list(out.unbind()) if done else None


def mapped_products(
    x: Tensor, dy: Tensor, affine: Affine, gamma: Tensor | None, axes: Axes, shared: Axes
) -> list[Tensor] | None:
    """Return Σ gamma·dy, Σ gamma·dy·z, Σ dy and Σ dy·z; see `passes.mapped_products`."""
    sums, others = _sums(x, axes), _sums(x, shared)
    gamma = x.new_ones(others, dtype=torch.float32) if gamma is None else gamma
    small, learned = _dense(*_filled(affine), like=sums), _dense(gamma, like=others)
    if not serves(x) or not serves(dy) or small is None or learned is None:
        return None
    out, columns = (
        x.new_empty((2, *sums), dtype=torch.float32),
        x.new_empty((2, *others), dtype=torch.float32),
    )
    nest = dims(x.shape, x.stride(), dy.stride(), None, None, sums, others)
    done = _library.keras_bn_mapped_products(
        x.ndim, nest, *_data(x), *_data(dy), *_addresses(*small, *learned), out.numel() // 2,
        columns.numel() // 2, out.data_ptr(), columns.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return [*out.unbind(), *columns.unbind()] if done else None


def mapped(
    x: Tensor, affine: Affine, dtype: torch.dtype, learned: Learned = AS_IS
) -> Tensor | None:
    """Return ((x - center)·scale + shift)·gamma + beta."""
    gamma, beta = learned
    if gamma is None and beta is not None:
        gamma = torch.ones_like(beta)
    elif beta is None and gamma is not None:
        beta = torch.zeros_like(gamma)
    small, columns = _dense(*_filled(affine)), _dense(gamma, beta)
    if not serves(x) or dtype not in _types or small is None or columns is None:
        return None
    y = torch.empty_like(x, dtype=dtype)
    column = None if gamma is None else columns[0].shape
    nest = dims(x.shape, x.stride(), None, y.stride(), None, small[0].shape, column)
    done = _library.keras_bn_map(
        x.ndim, nest, *_data(x), *_data(y), *_addresses(*small, *columns), x.requires_grad,
        torch.get_num_threads(),
    )  # fmt: skip
    return y if done else None


def combined(
    x: Tensor,
    dy: Tensor,
    center: Tensor | None,
    terms: tuple[Tensor, Tensor, Tensor | None],
    weights: Tensor | None,
    gamma: Tensor | None,
) -> Tensor | None:
    """Return gamma·dy·a + w·((x - center)·b + c), in the dtype of x, for the terms a, b, c."""
    a, b, c = terms
    small = _dense(*_filled(Affine(center, b, c)), a)
    weight, learned = _dense(weights), _dense(gamma)
    if not serves(x) or not serves(dy) or small is None or weight is None or learned is None:
        return None
    dx = torch.empty_like(x)
    shapes = _shapes(*weight, small[0], *learned)
    nest = dims(x.shape, x.stride(), dy.stride(), dx.stride(), *shapes)
    done = _library.keras_bn_combined(
        x.ndim, nest, *_data(x), *_data(dy), *_data(dx), *_addresses(*weight, *small, *learned),
        torch.get_num_threads(),
    )  # fmt: skip
    return dx if done else None


def normalize(x: Tensor, learned: Learned, plan: Plan) -> tuple[Tensor, Moments, Whole] | None:
    """Return y, the moments, and the map of each cell, which the gradient needs."""
    dtype, sums = getattr(torch, plan.dtype), _sums(x, plan.pooling.axes)
    columns, kept = _columns(learned, sums, plan.pooling.axes), _kept(plan, sums)
    if not serves(x) or dtype not in _types or columns is None or kept is None:
        return None
    y = torch.empty_like(x, dtype=dtype)
    affine, rest = (x.new_empty((number, *sums), dtype=torch.float32) for number in (3, 4))
    correction = x.new_empty((2, *sums), dtype=torch.float32) if kept.values is not None else None
    nest = dims(x.shape, x.stride(), None, y.stride(), None, sums, columns.shape)
    cells = affine.numel() // 3
    size, together = x.numel() // cells, plan.pooling.together or 1
    done = _library.keras_bn_normalize(
        x.ndim, nest, *_data(x), *_data(y), *_addresses(*columns.parts), columns.varies, size,
        together, plan.epsilon, plan.pooling.is_centered, cells, math.prod(columns.shape),
        affine.data_ptr(), rest.data_ptr(), *_addresses(kept.values), kept.number, kept.limits,
        *_addresses(correction), x.requires_grad, torch.get_num_threads(),
    )  # fmt: skip
    if not done:
        return None if x.is_contiguous() else normalize(x.contiguous(), learned, plan)
    pair = None if correction is None else (correction[0], correction[1])
    return y, Moments(size * together, affine[0], rest[0], rest[1]), Whole(affine, pair)


def gradients(
    x: Tensor, dy: Tensor, learned: Learned, whole: Whole, plan: Plan
) -> tuple[Tensor, ...]:
    """Return the gradients of x and of what is learned, from the maps that `normalize` gave."""
    affine = whole.affine
    if dy.dtype not in _types or dy.stride() != x.stride():
        dy = torch.empty_like(x).copy_(dy)
    dx, work = torch.empty_like(x), torch.empty_like(affine)
    columns: Any = _columns(learned, affine.shape[1:], plan.pooling.axes)
    gamma, _ = columns.parts
    found = affine.new_empty((2, *columns.shape))
    nest = dims(x.shape, x.stride(), dy.stride(), dx.stride(), None, work.shape[1:], columns.shape)
    cells = work.numel() // 3
    done = _library.keras_bn_gradients(
        x.ndim, nest, *_data(x), *_data(dy), *_data(dx), *_addresses(gamma), columns.varies,
        x.numel() // cells, plan.pooling.together or 1, plan.pooling.is_centered, cells,
        math.prod(columns.shape), affine.data_ptr(), work.data_ptr(), found.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    if not done:
        return gradients(x.contiguous(), dy, learned, whole, plan)
    d_beta, d_gamma = found.unbind()
    pairs = zip((d_gamma, d_beta), learned, strict=True)
    return dx, *(gradient for gradient, part in pairs if part is not None)


class _Kept(NamedTuple):
    """What sets are corrected towards, as the passes take it.

    Attributes:
        values: Means, then standard deviations; None for nothing.
        number: How many there are of each.
        limits: Least and most of r, most of d.
    """

    values: Tensor | None
    number: int
    limits: Any


def _kept(plan: Plan, sums: Axes) -> _Kept | None:
    """Return what sets are corrected towards; None where the passes do not take it."""
    correct: Any = plan.correct
    if correct is None:
        return _Kept(None, 0, None)
    parts, limits = _dense(correct.mean, correct.stddev), corrected(correct, sums)
    if parts is None or limits is None:
        return None
    given = (ctypes.c_double * 3)(*map(float, limits))
    return _Kept(torch.stack(parts), correct.mean.numel(), given)


class _Columns(NamedTuple):
    """What is learned, as the passes take it.

    Attributes:
        parts: gamma and beta, both or neither.
        shape: Their shape, over that of the input.
        varies: Whether they vary within a set.
    """

    parts: list[Tensor | None]
    shape: Axes
    varies: bool


def _columns(learned: Learned, sums: Axes, axes: Axes) -> _Columns | None:
    """Return gamma and beta; None where the passes do not take them."""
    if learned.is_nothing:
        return _Columns([None, None], (1,) * len(sums), False)
    gamma, beta = learned
    gamma = torch.ones_like(beta) if gamma is None else gamma
    beta = torch.zeros_like(gamma) if beta is None else beta
    parts, shape = _dense(gamma, beta), tuple(gamma.shape)
    are_varied = varies(learned, axes)
    if parts is None or not (are_varied or are_in_turn(shape, sums)):
        return None
    return _Columns(parts, shape, are_varied)


def _filled(affine: Affine) -> Affine:
    """Return the map with 0 in place of what is missing."""
    if affine.center is not None and affine.shift is not None:
        return affine
    missing = torch.zeros_like(affine.scale)
    return Affine(*(missing if part is None else part for part in affine))


def _dense(*parts: Tensor | None, like: Axes | None = None) -> list[Any] | None:
    """Return dense tensors of one shape; None for those of another dtype or device."""
    given = [part for part in parts if part is not None]
    if any(part.dtype != torch.float32 or not part.is_cpu for part in given):
        return None
    if like is not None or any(part.shape != given[0].shape for part in given):
        shape = like or torch.broadcast_shapes(*(part.shape for part in given))
        return [None if part is None else part.expand(shape).contiguous() for part in parts]
    return [None if part is None else part.contiguous() for part in parts]


def _sums(x: Tensor, axes: Axes) -> Axes:
    return tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))


def _shapes(*parts: Tensor | None) -> list[Axes | None]:
    return [None if part is None else part.shape for part in parts]


def _data(x: Tensor) -> tuple[int, int]:
    return x.data_ptr(), _types[x.dtype]


def _addresses(*parts: Tensor | None) -> list[int | None]:
    return [None if part is None else part.data_ptr() for part in parts]
