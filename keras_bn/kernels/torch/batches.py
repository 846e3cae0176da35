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

# Rows that the kernel adds one by one; of fewer, some channels of many lie far from 0.
_MOST, _FEWEST = 32, 16


def normalize_batch(x: Tensor, learned: Learned, plan: Plan) -> tuple[Tensor, Moments] | None:
    """Return y and the moments, as `keras_bn.kernels.normalize`; None where this does not serve."""
    if not _are_few(x, learned, plan):
        return None
    axes = plan.pooling.axes
    sizes = x.shape[len(axes) :]
    rows = x.numel() // sizes.numel()
    flat = [None if part is None else part.flatten() for part in learned]
    matrix = x.view(rows, -1)
    y, *_ = torch.native_batch_norm(matrix, *flat, None, None, True, 1.0, plan.epsilon)
    # Added one by one, the kernel's own are as right as y has to be, not as what is kept of them.
    variance, mean = torch.var_mean(matrix.detach(), 0, correction=0)
    # The least is NaN where one is.
    if not torch.addcmul(variance, mean, mean, value=-(NEAR**-2)).min().item() >= 0:
        return None
    mean, m2 = (part.view(*(1 for _ in axes), *sizes) for part in (mean, variance * rows))
    y = y.view(x.shape).to(getattr(torch, plan.dtype))
    return y, Moments(rows, mean, torch.zeros_like(mean), m2)


def _are_few(x: Tensor, learned: Learned, plan: Plan) -> bool:
    """Say whether each set is a column of a matrix of few rows, and nothing else is to do."""
    axes, weights, total, *_, across = plan.pooling
    is_more = any(part is not None for part in (weights, total, across, plan.correct))
    if is_more or axes != tuple(range(len(axes))) or not is_dense(x, plan.dtype):
        return False
    columns = x.shape[len(axes) :].numel()
    is_alike = all(part.numel() == columns for part in learned.given)
    is_few = _FEWEST * columns <= x.numel() <= _MOST * columns
    # Half precision would have statistics of its own.
    is_wide = x.dtype in (torch.float32, torch.float64)
    return is_alike and is_few and is_wide and not is_transformed(x, *learned.given)
