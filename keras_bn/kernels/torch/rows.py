"""Layer normalization of rows of memory by PyTorch's own kernel, kept right.

PyTorch's kernel loses the digits of rows far from 0 (torch 2.13: the variance is off by 2e-4 at
κ = 1e4), and adds the gradients of gamma and beta row by row (100,000 equal terms: 5e-4). So rows
far from 0, which most data lacks, are centered first, and those sums go in blocks.
"""

from typing import Any, NamedTuple

import torch

from keras_bn.core.affine import Learned
from keras_bn.core.pooling import Pooling
from keras_bn.kernels import generic
from keras_bn.kernels.normalization import Plan, normalize
from keras_bn.kernels.steps import Step
from keras_bn.kernels.torch.autograd import is_transformed, run
from keras_bn.kernels.torch.sums import sum_over
from keras_bn.types import Tensor

Axes = tuple[int, ...]

# κ up to which the kernel's own statistics are within the contract.
_NEAR = 2.0
# Rows that the kernel adds one by one for gamma, whose terms differ, and for beta, whose may not.
_ROWS, _FEW_ROWS = 1024, 32


class _Seen(NamedTuple):
    """What the kernel made of each row.

    Attributes:
        center: What was subtracted before; None for nothing.
        mean: The mean of what was left.
        inverse: 1 / √(variance + epsilon).
    """

    center: Tensor | None
    mean: Tensor
    inverse: Tensor

    def rows(self, x: Tensor) -> Tensor:
        """Return x as the kernel saw it."""
        return x if self.center is None else x - self.center


def normalize_rows(
    x: Tensor, axes: Axes, learned: Learned, epsilon: float, dtype: str
) -> Tensor | None:
    """Return y, as `keras_bn.kernels.normalize_rows`; None for what is not rows of memory."""
    if not _are_rows(x, axes) or learned.gamma is None:
        return None
    shape = x.shape[axes[0] :]
    if x.numel() <= _FEW_ROWS * shape.numel() and not is_transformed(x, *learned.given):
        native = [None if part is None else part.reshape(shape) for part in learned]
        y, mean, inverse = torch.native_layer_norm(x, shape, *native, epsilon)
        if _are_near(mean, inverse):
            return y.to(getattr(torch, dtype))  # so few rows have right gradients, too
    plan = Plan(Pooling(axes), epsilon, dtype, lambda _: None)

    def flat(given: Any) -> list[Tensor | None]:
        return [None if part is None else part.reshape(shape) for part in learned.filled(given)]

    def forward(x: Tensor, *given: Tensor) -> Any:
        y, seen = _standardized(x, shape, flat(given), epsilon)
        return (y.to(getattr(torch, dtype)),), (), seen

    def backward(inputs: Any, seen: _Seen, grads: Any) -> Any:
        (x, *given), (dy,) = inputs, grads
        found = _gradients(seen, seen.rows(x), dy, shape, flat(given))
        return found[0], *(d.reshape(part.shape) for d, part in zip(found[1:], given, strict=True))

    def plain(inputs: Any, _: Any) -> Any:
        return normalize(generic, inputs[0], learned.filled(inputs[1:]), plan)[:1], ()

    (y,) = run(Step(forward, backward, plain), x, *learned.given)
    return y


def _are_rows(x: Tensor, axes: Axes) -> bool:
    """Say whether the axes are the last ones, in memory too, of a tensor that the kernel takes."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or not x.numel():
        return False
    last = axes == tuple(range(x.ndim - len(axes), x.ndim))
    return last and x.is_contiguous() and x.dtype in (torch.float32, torch.float64)


def _are_near(mean: Tensor, inverse: Tensor) -> bool:
    """Say whether rows are so near to 0 that the kernel's statistics are right."""
    return bool((mean.abs() * inverse).max() <= _NEAR)


def _standardized(x: Tensor, shape: Any, learned: Any, epsilon: float) -> tuple[Tensor, _Seen]:
    """Return gamma·(x - mean)/√(variance + epsilon) + beta and what the kernel made of the rows."""
    y, mean, inverse = torch.native_layer_norm(x, shape, *learned, epsilon)
    if _are_near(mean, inverse):
        return y, _Seen(None, mean, inverse)
    y, rest, inverse = torch.native_layer_norm(x - mean, shape, *learned, epsilon)
    return y, _Seen(mean, rest, inverse)


def _gradients(seen: _Seen, rows: Tensor, dy: Tensor, shape: Any, learned: Any) -> list[Tensor]:
    """Return the gradients of x, gamma and, where it is given, beta."""
    dy = dy.to(rows.dtype)
    statistics = (seen.mean, seen.inverse)
    backward = torch.ops.aten.native_layer_norm_backward
    gamma, beta = learned
    dx, *_ = backward(dy, rows, shape, *statistics, gamma, beta, [True, False, False])
    tensors = (part.flatten(0, -len(shape) - 1) for part in (dy, rows, *statistics))
    pieces = zip(*(part.split(_ROWS) for part in tensors), strict=True)
    sums = [backward(d, x, shape, *s, gamma, beta, [False, True, False])[1] for d, x, *s in pieces]
    d_gamma = torch.stack(sums).sum(0, dtype=torch.float64).to(rows.dtype)
    if beta is None:
        return [dx, d_gamma]
    return [dx, d_gamma, sum_over(dy, tuple(range(dy.ndim - len(shape))), rows.dtype)]
