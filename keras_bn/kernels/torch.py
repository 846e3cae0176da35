"""The kernels in PyTorch: two autograd functions that save `x` and nothing else of its size.

Their derivatives are written in differentiable operations, so gradients of gradients work, and
`generate_vmap_rule` lets `torch.func` transform them.
"""

import math
from typing import Any

import torch

from keras_bn.core.affine import Affine
from keras_bn.core.dtypes import statistics_dtype
from keras_bn.core.moments import Moments, positive
from keras_bn.types import Tensor

Axes = tuple[int, ...]


def moments(x: Tensor, axes: Axes, weights: Tensor | None = None) -> Moments:
    """Return the moments of `x` over `axes`; see `keras_bn.kernels`."""
    if weights is None:
        # A list: torch 2.13 cannot trace a generator.
        count: Any = math.prod([x.shape[axis] for axis in axes])
    else:
        weights = weights.detach().expand(x.shape)
        count = _sum(weights, axes, weights.dtype)
    pivot, offset, m2 = _Moments.apply(x, weights, positive(count), axes)
    return Moments(count, pivot, offset, m2)


def apply(x: Tensor, affine: Affine, dtype: str) -> Tensor:
    """Return (x - center)·scale + shift in `dtype`; see `keras_bn.kernels`."""
    y: Tensor = _Apply.apply(x, *affine, getattr(torch, dtype))
    return y


def hold(x: Tensor) -> Tensor:
    """Return a constant that the backward pass takes as it is now.

    torch 2.13: compiled code may compute it again in the backward pass, from statistics that the
    forward pass has moved meanwhile, and silently return a wrong gradient.
    """
    return torch.ops.keras_bn.hold(x) if torch.compiler.is_compiling() else x


class _Moments(torch.autograd.Function):
    """Pivot, offset and m2, in two passes over `x`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weights: Tensor | None, count: Tensor, axes: Axes
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = getattr(torch, statistics_dtype(str(x.dtype).removeprefix("torch.")))
        pivot = _total(_masked(x, weights), weights, axes, dtype) / count
        deviation = _masked(x - pivot, weights)
        first = _total(deviation, weights, axes, dtype)
        offset = first / count
        second = _total(deviation * deviation, weights, axes, dtype)
        return pivot, offset, (second - first * offset).clamp_min(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weights, count, ctx.axes = inputs
        pivot, offset, _ = output
        ctx.mark_non_differentiable(pivot)
        ctx.has_weights = weights is not None
        ctx.count = None if ctx.has_weights else count
        ctx.save_for_backward(x, pivot, offset, *((weights, count) if ctx.has_weights else ()))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """dx = w·(d_mean / n + 2·d_m2·(x - mean))."""
        x, pivot, offset, *rest = ctx.saved_tensors
        weights, count = rest if ctx.has_weights else (None, ctx.count)
        _, d_mean, d_m2 = grads
        dx = d_mean / count + 2.0 * d_m2 * ((x - pivot) - offset)
        if weights is not None:
            dx = _masked(dx * weights, weights)
        return dx.to(x.dtype), None, None, None


class _Apply(torch.autograd.Function):
    """(x - center)·scale + shift."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, center: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype
    ) -> Tensor:
        return torch.addcmul(shift, x - center, scale).to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """dx = dy·scale, d_shift = Σ dy, d_scale = Σ dy·(x - center), d_center = -scale·d_shift."""
        x, center, scale = ctx.saved_tensors
        dy = grads[0].to(scale.dtype)
        axes = tuple(axis for axis, size in enumerate(scale.shape) if size == 1)
        d_shift = _sum(dy, axes, scale.dtype)
        d_scale = _sum(dy * (x - center), axes, scale.dtype)
        return (dy * scale).to(x.dtype), -scale * d_shift, d_scale, d_shift, None


def _masked(values: Tensor, weights: Tensor | None) -> Tensor:
    """Put 0 where the weight is 0, whatever stood there."""
    return values if weights is None else torch.where(weights > 0, values, 0)


def _total(values: Tensor, weights: Tensor | None, axes: Axes, dtype: torch.dtype) -> Tensor:
    """Sum over `axes`, weighted, axes kept."""
    return _sum(values if weights is None else values * weights, axes, dtype)


def _sum(values: Tensor, axes: Axes, dtype: torch.dtype) -> Tensor:
    """Sum over `axes`, axes kept."""
    if not axes:
        return values.to(dtype)
    if not torch.compiler.is_compiling() or values.device.type != "cpu":
        return _sum_long(values, axes, dtype)
    # torch 2.13: inductor's loops on the CPU add one by one (48 units in the last place for 4096
    # elements) where eager kernels sum in blocks. float64 is fused and costs no copy.
    if dtype == torch.float64:
        total: Tensor = torch.ops.keras_bn.eager_sum(values, axes)
        return total
    return values.sum(axes, keepdim=True, dtype=torch.float64).to(dtype)


def _sum_long(values: Tensor, axes: Axes, dtype: torch.dtype) -> Tensor:
    """Sum by the eager kernel; along an axis of many thousands, in blocks, and those in float64."""
    # The kernel sums in blocks itself (torch 2.13), but in so long ones that what stands beside an
    # outlier is lost.
    longest = max(axes, key=lambda axis: values.shape[axis])
    size = values.shape[longest]
    block = next((b for b in range(1024, 255, -1) if size > 8192 and size % b == 0), None)
    if block is None:
        return values.sum(axes, keepdim=True, dtype=dtype)
    inner = [axis + (axis > longest) for axis in axes if axis != longest] + [longest + 1]
    split = values.unflatten(longest, (size // block, block))
    blocks = split.sum(inner, keepdim=True, dtype=dtype).squeeze(longest + 1)
    return blocks.sum(longest, keepdim=True, dtype=torch.float64).to(dtype)


@torch.library.custom_op("keras_bn::eager_sum", mutates_args=())
def _eager_sum(values: torch.Tensor, axes: list[int]) -> torch.Tensor:
    """Sum by the eager kernel, in compiled code too."""
    return values.sum(axes, keepdim=True)


@_eager_sum.register_fake
def _(values: torch.Tensor, axes: list[int]) -> torch.Tensor:
    return values.sum(axes, keepdim=True)


@torch.library.custom_op("keras_bn::hold", mutates_args=())
def _hold(x: torch.Tensor) -> torch.Tensor:
    """Copy, in a way that the compiler does not see through."""
    return x.clone()


@_hold.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)
