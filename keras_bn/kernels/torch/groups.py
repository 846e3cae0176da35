"""Group and instance normalization, channels first, by PyTorch's own kernel, kept right.

As in `rows`: the kernel's statistics are right for what is near 0, and for what is not the general
path takes over. Its gradients add every eighth element of a channel one by one, so channels are
to be short, and beta's goes in blocks.
"""

import math
from typing import Any

import torch

from keras_bn.core.affine import Learned
from keras_bn.core.pooling import Pooling
from keras_bn.kernels import generic
from keras_bn.kernels.normalization import Plan, normalize
from keras_bn.kernels.steps import Step
from keras_bn.kernels.torch.autograd import is_transformed, run
from keras_bn.kernels.torch.rows import LONGEST, are_near, is_dense
from keras_bn.kernels.torch.sums import sum_over
from keras_bn.types import Tensor


def normalize_groups(
    x: Tensor, pooling: Pooling, learned: Learned, epsilon: float, dtype: str
) -> Tensor | None:
    """Return y, as `keras_bn.kernels.normalize_groups`; None where the kernel does not serve."""
    is_differentiable = torch.is_grad_enabled()
    if not _are_groups(x, pooling, dtype) or is_transformed(x, *learned.given):
        return None
    channels = x.shape[1]
    length = math.prod(x.shape[2:])
    if is_differentiable and length > LONGEST:
        return None
    sizes = (len(x), channels, length, channels // (pooling.together or 1))
    with torch.no_grad():
        flat = [None if part is None else part.flatten() for part in learned]
        y, mean, inverse = torch.native_group_norm(x, *flat, *sizes, epsilon)
        if not are_near(mean, inverse):
            return None
        y = y.to(getattr(torch, dtype))
    if not is_differentiable:
        return y

    def backward(inputs: Any, seen: Any, grads: Any) -> Any:
        (x, *given), (dy,) = inputs, grads
        gamma, beta = learned.filled(given)
        weight = None if gamma is None else gamma.flatten()
        wanted = [True, gamma is not None, False]
        native = torch.ops.aten.native_group_norm_backward
        dx, d_gamma, _ = native(dy.to(x.dtype).contiguous(), x, *seen, weight, *sizes, wanted)
        gradients = [dx] if gamma is None else [dx, d_gamma.view(gamma.shape)]
        if beta is not None:
            gradients.append(sum_over(dy, (0, *pooling.axes), beta.dtype))
        return tuple(gradients)

    def plain(inputs: Any, _: Any) -> Any:
        plan = Plan(pooling, epsilon, dtype)
        return normalize(generic, inputs[0], learned.filled(inputs[1:]), plan)[:1], ()

    step = Step(lambda *_: ((y,), (), (mean, inverse)), backward, plain)
    return run(step, x, *learned.given)[0]


def _are_groups(x: Tensor, pooling: Pooling, dtype: str) -> bool:
    """Say whether each set is the memory of some channels of a sample, without weights."""
    are_last = pooling.axes == tuple(range(2, x.ndim)) and pooling.weights is None
    return are_last and is_dense(x, dtype)
