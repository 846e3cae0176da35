"""Replicas in PyTorch: the processes of a group of `torch.distributed`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import distributed

from keras_bn.core.moments import Moments, merge_gathered
from keras_bn.types import Tensor


def across(layer: str, axis_name: str | None, group: Any) -> Callable[[Moments], Moments] | None:
    """Return what merges moments over the replicas; see `keras_bn.kernels.active`."""
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    if distributed.get_world_size(group) == 1:
        return None

    def gather(values: Tensor) -> Tensor:
        if values.is_meta:  # Keras infers shapes
            return values.expand(distributed.get_world_size(group), *values.shape)
        return _Gathered.apply(values, group)

    return partial(merge_gathered, gather=gather)


class _Gathered(torch.autograd.Function):
    """The values of all processes, stacked."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        size = distributed.get_world_size(group)
        gathered = values.new_empty((size, *values.shape))
        distributed.all_gather(list(gathered), values.contiguous(), group)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Own.apply(grad, ctx.group), None


class _Own(torch.autograd.Function):
    """The sum over all processes of what each has for this one: the adjoint of `_Gathered`."""

    @staticmethod
    def forward(ctx: Any, stacked: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = stacked.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total, group=group)
        return total[distributed.get_rank(group)]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Gathered.apply(grad, ctx.group), None
