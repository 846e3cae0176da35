"""Layer normalization of rows of memory by PyTorch's own kernel, kept right.

PyTorch's kernel loses the digits of rows far from 0 (torch 2.13: the variance is off by 2e-4 at
κ = 1e4), and adds the gradients of gamma and beta row by row (100,000 equal terms: 5e-4). So rows
far from 0, which most data lacks, are centered first, and those sums go in blocks. Long rows, of
which it adds elements one by one, too, go another way.
"""

from collections.abc import Sequence
from functools import partial
from itertools import repeat
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
NEAR = 2.0
# Rows that a thread adds one by one for gamma, whose terms differ (the sum of n rows that are all
# the same is off by n/4 units in the last place), and for beta, whose terms often do not.
_ROWS, _FEW_ROWS = 1 << 14, 32
# Elements of a row, of which the kernel adds every eighth one by one for the gradient of x.
LONGEST = 4096
# Elements of a piece that is copied first.
_PIECE = 1 << 18


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


def normalize_rows(
    x: Tensor, axes: Axes, learned: Learned, epsilon: float, dtype: str
) -> Tensor | None:
    """Return y, as `keras_bn.kernels.normalize_rows`; None for what is not rows of memory."""
    if not _are_rows(x, axes, dtype) or learned.gamma is None:
        return None
    shape = x.shape[axes[0] :]

    def flat(given: Any) -> list[Tensor | None]:
        return [None if part is None else part.reshape(shape) for part in learned.filled(given)]

    is_plain = not is_transformed(x, *learned.given)
    if is_plain and not torch.is_grad_enabled():
        return _standardized(x, shape, flat(learned.given), epsilon)[0].to(getattr(torch, dtype))
    # So few rows have right gradients, too.
    is_few = x.numel() <= _FEW_ROWS * shape.numel() and x.dtype == learned.gamma.dtype
    if is_plain and is_few:
        y, mean, inverse = torch.native_layer_norm(x, shape, *flat(learned.given), epsilon)
        if are_near(mean, inverse):
            return y.to(getattr(torch, dtype))
    plan = Plan(Pooling(axes), epsilon, dtype)

    def forward(x: Tensor, *given: Tensor) -> Any:
        y, seen = _standardized(x, shape, flat(given), epsilon)
        return (y.to(getattr(torch, dtype)),), (), seen

    def backward(inputs: Any, seen: _Seen, grads: Any) -> Any:
        (x, *given), (dy,) = inputs, grads
        found = _gradients(seen, x, dy, shape, flat(given))
        return found[0], *(d.reshape(part.shape) for d, part in zip(found[1:], given, strict=True))

    def plain(inputs: Any, _: Any) -> Any:
        return normalize(generic, inputs[0], learned.filled(inputs[1:]), plan)[:1], ()

    (y,) = run(Step(forward, backward, plain), x, *learned.given)
    return y


def _are_rows(x: Tensor, axes: Axes, dtype: str) -> bool:
    """Say whether the axes are the last ones, in memory too, of a tensor that the kernel takes."""
    are_last = axes == tuple(range(x.ndim - len(axes), x.ndim))
    return are_last and is_dense(x, dtype) and bool(x.shape[axes[0] :].numel() <= LONGEST)


def is_dense(x: Tensor, dtype: str) -> bool:
    """Say whether a native kernel takes a tensor: eager, contiguous, in a dtype that it keeps."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or not x.numel():
        return False
    # The kernel rounds its result to the dtype of x.
    is_kept = x.dtype in (torch.float32, torch.float64) or x.dtype == getattr(torch, dtype)
    return bool(is_kept and x.is_contiguous())


def are_near(mean: Tensor, inverse: Tensor) -> bool:
    """Say whether rows are so near to 0 that the kernel's statistics are right."""
    return bool((mean * inverse).abs_().max().item() <= NEAR)


def _standardized(x: Tensor, shape: Any, learned: Any, epsilon: float) -> tuple[Tensor, _Seen]:
    """Return gamma·(x - mean)/√(variance + epsilon) + beta and what the kernel made of the rows."""
    y, mean, inverse = torch.native_layer_norm(x, shape, *learned, epsilon)
    if are_near(mean, inverse):
        return y, _Seen(None, mean, inverse)
    found, length = [], _PIECE // shape.numel()
    for rows, center in zip(_pieces(x, shape, length), _pieces(mean, shape, length), strict=True):
        z, *statistics = torch.native_layer_norm(rows - center, shape, *learned, epsilon)
        found.append((z.to(x.dtype), *statistics))
    y, *seen = (_joined(part) for part in zip(*found, strict=True))
    return y.view(x.shape), _Seen(mean, *(part.view(mean.shape) for part in seen))


def _gradients(seen: _Seen, x: Tensor, dy: Tensor, shape: Any, learned: Any) -> list[Tensor]:
    """Return the gradients of x, gamma and, where it is given, beta."""
    gamma, beta = learned
    # First, because what it reads is then near.
    others = tuple(range(dy.ndim - len(shape)))
    d_beta = [] if beta is None else [sum_over(dy, others, gamma.dtype)]

    def of(wanted: list[bool], d: Tensor, rows: Tensor, *seen: Tensor | None) -> Any:
        center, mean, inverse = seen
        rows = rows.to(gamma.dtype) if center is None else rows.to(gamma.dtype) - center
        backward = torch.ops.aten.native_layer_norm_backward
        return backward(d.to(rows.dtype), rows, shape, mean, inverse, gamma, beta, [*wanted, False])

    def of_pieces(wanted: list[bool], length: int) -> tuple[Sequence[Tensor], Tensor]:
        parts = (dy, x, *seen)
        cut = (repeat(None) if part is None else _pieces(part, shape, length) for part in parts)
        dx, d_gamma, _ = zip(*map(partial(of, wanted), *cut), strict=True)
        return dx, torch.stack(d_gamma).sum(0, dtype=torch.float64).to(gamma.dtype)

    # Wide, because the kernel would round gamma's gradient to half precision (torch 2.13).
    if seen.center is not None or x.dtype != gamma.dtype:
        found, d_gamma = of_pieces([True, True], _PIECE // shape.numel())
        dx = _joined([part.to(x.dtype) for part in found]).view(x.shape)
        return [dx, d_gamma, *d_beta]
    # To join what was made of pieces takes longer than to read the rows again.
    length = _ROWS * torch.get_num_threads()
    is_one = x.numel() <= length * shape.numel()
    dx, d_gamma, _ = of([True, is_one], dy, x, *seen)
    return [dx, d_gamma if is_one else of_pieces([False, True], length)[1], *d_beta]


def _pieces(x: Tensor, shape: Any, length: int) -> tuple[Tensor, ...]:
    """Return pieces of so many rows each."""
    pieces: tuple[Tensor, ...] = x.flatten(0, -len(shape) - 1).split(max(1, length))
    return pieces


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    """Return the rows of all pieces, without a copy of a single one."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
