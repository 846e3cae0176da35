"""Batch normalization of a few rows by PyTorch's own kernel as a whole, kept right.

As in `rows` and `groups`: that kernel adds one by one, which so few rows allow, and its statistics
are right for what is near 0. Of so little Python takes most of the time, and this is one call.
"""

import torch

from keras_bn.core.affine import Learned
from keras_bn.core.moments import Moments
from keras_bn.kernels.normalization import Plan
from keras_bn.kernels.torch.autograd import is_transformed
from keras_bn.kernels.torch.rows import NEAR, is_dense
from keras_bn.types import Tensor

# Rows that the kernel adds one by one. Of 32 squares the sum can miss the contract's bound: more
# than 16 are added again, in float64, as long as that takes less time than Python does.
_FEWEST, _SQUARES, _MOST, _SMALL = 8, 16, 32, 1 << 16
# κ up to which y is right of up to so many rows, whose mean may be off by n/2 rounding errors. Of
# noise, eight rows have a mean of more than two standard deviations in one column of a thousand.
_FAR, _FEW = 4.0, 12


def normalize_batch(x: Tensor, learned: Learned, plan: Plan) -> tuple[Tensor, Moments] | None:
    """Return y and the moments, as `keras_bn.kernels.normalize`; None where this does not serve."""
    if not _are_few(x, learned, plan):
        return None
    axes = plan.pooling.axes
    sizes = x.shape[len(axes) :]
    rows = x.numel() // sizes.numel()
    flat = [None if part is None else part.flatten() for part in learned]
    matrix = x.view(rows, -1)
    mean, variance = x.new_zeros(2, sizes.numel())
    # The share of 1.0 puts mean and unbiased variance of these rows there.
    y, *_ = torch.native_batch_norm(matrix, *flat, mean, variance, True, 1.0, plan.epsilon)
    if rows > _SQUARES:
        variance, mean = torch.var_mean(matrix.detach(), 0)
    near = _FAR if rows <= _FEW else NEAR
    # The least is NaN where one is.
    if not torch.addcmul(variance, mean, mean, value=-(near**-2)).min().item() >= 0:
        return None
    mean, m2 = (part.view(*(1 for _ in axes), *sizes) for part in (mean, variance * (rows - 1)))
    y = y.view(x.shape).to(getattr(torch, plan.dtype))
    return y, Moments(rows, mean, torch.zeros_like(mean), m2)


def _are_few(x: Tensor, learned: Learned, plan: Plan) -> bool:
    """Say whether each set is a column of a matrix of few rows, and nothing else is to do."""
    axes, weights, total, *_, across = plan.pooling
    is_more = any(part is not None for part in (weights, total, across, plan.correct))
    if is_more or axes != tuple(range(len(axes))) or not is_dense(x, plan.dtype):
        return False
    columns = x.shape[len(axes) :].numel()
    # What is shared by columns, as of ghosts, would be copied for each.
    is_alike = all(part.numel() == columns and part.is_contiguous() for part in learned.given)
    most = _MOST if x.numel() <= _SMALL else _SQUARES
    is_few = _FEWEST * columns <= x.numel() <= most * columns
    # Half precision would have statistics of its own.
    is_wide = x.dtype in (torch.float32, torch.float64)
    return is_alike and is_few and is_wide and not is_transformed(x, *learned.given)
