"""Replicas in PyTorch: the processes of a group of `torch.distributed`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import distributed

from keras_bn.core.moments import Moments
from keras_bn.errors import invalid
from keras_bn.types import Tensor


def across(layer: str, axis_name: str | None, group: Any) -> Callable[[Moments], Moments] | None:
    """Return what merges moments over the replicas; see `keras_bn.kernels.active`."""
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    if distributed.get_world_size(group) == 1:
        return None
    return Replicas(layer, group)


class Replicas:
    """The processes of a group; called, it merges moments with those of the others.

    Args:
        layer: Name of the layer, for errors.
        group: The process group; None for all processes.
    """

    def __init__(self, layer: str, group: Any) -> None:
        self._layer, self._group = layer, group

    def __call__(self, own: Moments) -> Moments:
        """Return the moments of all processes together, in one exchange."""
        count = own.count * torch.ones_like(own.pivot)
        values = torch.stack((count, own.pivot, own.offset, own.m2))
        # Within a derivative by hand nothing has a gradient.
        gathered = _Gathered.apply(values, self) if torch.is_grad_enabled() else self.gather(values)
        return _merged(*gathered.unbind(1))

    def gather(self, values: Tensor) -> Tensor:
        """Stack the values of all processes, without gradient."""
        size = distributed.get_world_size(self._group)
        if values.is_meta:  # Keras infers shapes
            return values.expand(size, *values.shape)
        gathered = values.new_empty((size, *values.shape))
        self._exchange(distributed.all_gather, list(gathered.unbind()), values)
        return gathered

    def total(self, values: Tensor) -> Tensor:
        """Sum over the processes, without gradient."""
        # Of a few KiB gloo gathers in two thirds of the time of a reduction (torch 2.13).
        return self.gather(values.contiguous()).sum(0)

    def own(self, stacked: Tensor) -> Tensor:
        """Sum over the processes what each has for this one, without gradient."""
        sums = stacked.clone(memory_format=torch.contiguous_format)
        if not sums.is_meta:
            self._exchange(distributed.all_reduce, sums)
        return sums[distributed.get_rank(self._group)]

    def _exchange(self, collective: Callable[..., Any], *tensors: Any) -> None:
        try:
            collective(*tensors, group=self._group)
        except RuntimeError as error:
            raise invalid(
                self._layer,
                "process_group",
                "of processes that take the same steps",
                self._group,
                f"Another one ended, ran fewer steps or something else. PyTorch says: {error}",
                kind=RuntimeError,
                rank=distributed.get_rank(self._group),
                size=distributed.get_world_size(self._group),
            ) from error


def _merged(count: Tensor, pivot: Tensor, offset: Tensor, m2: Tensor) -> Moments:
    """Merge parts along the first axis, as `keras_bn.core.moments.merge`."""
    # Torch's own operations: for what is so small `keras.ops` takes several times as long
    # (torch 2.13, Keras 3.15).
    total = count.sum(0)
    share = count / torch.where(total > 0, total, 1)
    center = (share * pivot).sum(0).detach()
    # An empty part may lie so far off that it overflows.
    distance = torch.where(count > 0, pivot - center + offset, 0)
    rest = (share * distance).sum(0)
    spread = torch.addcmul(m2, count, (distance - rest).square())
    return Moments(total, center, rest, spread.sum(0))


class _Gathered(torch.autograd.Function):
    """The values of all processes, stacked."""

    @staticmethod
    def forward(values: Tensor, replicas: Replicas) -> Tensor:
        return replicas.gather(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.replicas = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Own.apply(grad, ctx.replicas), None


class _Own(torch.autograd.Function):
    """The sum over all processes of what each has for this one: the adjoint of `_Gathered`."""

    @staticmethod
    def forward(stacked: Tensor, replicas: Replicas) -> Tensor:
        return replicas.own(stacked)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.replicas = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Gathered.apply(grad, ctx.replicas), None
