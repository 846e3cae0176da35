"""Sums in PyTorch that do not lose digits however many terms there are."""

import torch

from keras_bn.types import Tensor

Axes = tuple[int, ...]


def sum_over(values: Tensor, axes: Axes, dtype: torch.dtype) -> Tensor:
    """Sum over `axes`, axes kept."""
    if not axes:
        return values.to(dtype)
    if not torch.compiler.is_compiling() or values.device.type != "cpu":
        return _in_blocks(values, axes, dtype)
    # torch 2.13: inductor's loops on the CPU add one by one (48 units in the last place for 4096
    # elements) where eager kernels sum in blocks. float64 is fused and costs no copy.
    if dtype == torch.float64:
        total: Tensor = torch.ops.keras_bn.eager_sum(values.to(dtype), axes)
        return total
    return values.sum(axes, keepdim=True, dtype=torch.float64).to(dtype)


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
