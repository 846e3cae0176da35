"""Sums in PyTorch that do not lose digits however many terms there are."""

import math

import torch

from keras_bn.kernels.torch.tracing import takes_operations
from keras_bn.types import Tensor

Axes = tuple[int, ...]


def sum_over(values: Tensor, axes: Axes, dtype: torch.dtype) -> Tensor:
    """Sum over `axes`, axes kept."""
    if not axes:
        return values.to(dtype)
    if not torch.compiler.is_compiling() or values.device.type != "cpu":
        return _in_blocks(values, axes, dtype)
    # torch 2.13: inductor's loops on the CPU add one by one (48 units in the last place for 4096
    # elements) where eager kernels sum in blocks.
    if dtype == torch.float64 and takes_operations():
        total: Tensor = torch.ops.keras_bn.eager_sum(values.to(dtype), axes)
        return total
    return _in_short_blocks(values, axes, dtype)


# Elements that a loop may add one by one (32, equal or nearly so, can miss the contract's bound),
# and the vector that it adds at a time along memory.
_BLOCK, _VECTOR = 16, 8
# Up to so many terms a sum is no loop, but made again wherever it is used (torch 2.13).
_INLINED = 8


def _in_short_blocks(values: Tensor, axes: Axes, dtype: torch.dtype) -> Tensor:
    """Sum by compiled loops: blocks along one axis, and their sums in float64."""
    # Here, because it takes half a second, and nobody needs it who does not compile.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    axis = max(axes)
    size = values.shape[axis]
    room = _BLOCK * _VECTOR if statically_known_true(values.stride(axis) == 1) else _BLOCK
    number = math.prod([values.shape[axis] for axis in axes])
    if statically_known_true(number > room):
        room = min(room, number // (_INLINED + 1))
    # A size that varies from call to call is not known to be a multiple of any.
    block = next((b for b in range(room, 3, -1) if statically_known_true(size % b == 0)), None)
    if block is None:
        return values.sum(axes, keepdim=True, dtype=torch.float64).to(dtype)
    blocks = values.unflatten(axis, (size // block, block)).sum(axis + 1, dtype=dtype)
    return blocks.sum(axes, keepdim=True, dtype=torch.float64).to(dtype)


def _in_blocks(values: Tensor, axes: Axes, dtype: torch.dtype) -> Tensor:
    """Sum by the eager kernel; along an axis of many thousands, in blocks, and those in float64."""
    # The kernel sums in blocks itself (torch 2.13), but in so long ones that what stands beside an
    # outlier is lost.
    longest = max(axes, key=lambda axis: values.shape[axis])
    size = values.shape[longest]
    lengths = range(1024, 255, -1) if size > 8192 else ()
    block = next((b for b in lengths if size % b == 0), None)
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
