"""The compiled passes as operations of PyTorch, on tensors in the CPU's memory.

What each does is in kernels/compiled/torch_ops.c; here is what it takes and gives. In compiled code
PyTorch's compiler takes a whole normalization and its gradients as they are. Sums and maps by
themselves it joins with what is around them.
"""

import ctypes
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keras_bn.kernels.compiled import dtypes, library, place

Axes = tuple[int, ...]

SPACE = torch.library.Library("keras_bn", "FRAGMENT")


def _ending() -> str | None:
    """Return the ending of the operations' names; None where PyTorch cannot have them."""
    passes = library()
    if passes is None:
        return None
    # PyTorch keeps compiled code on disk, with the shapes that an operation of that name had.
    files = (Path(__file__), Path(os.path.realpath(str(place("passes")))))
    ending = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]
    # What this has loaded is where the functions of PyTorch are.
    handle = ctypes.c_void_p(ctypes.CDLL(torch._C.__file__)._handle)
    return ending if passes.keras_bn_implement_for_torch(handle, ending.encode()) else None


_ENDING = _ending()
# What they take; nothing where there are none.
DTYPES = {getattr(torch, name) for name in dtypes() if _ENDING is not None}


def sums_of(x: Tensor, axes: Any) -> Axes:
    """Return the shape of sums over axes."""
    return tuple([1 if axis in axes else size for axis, size in enumerate(x.shape)])


def _operation(arguments: str) -> Callable[..., Any]:
    """Return what makes an operation of a function that gives its results without values.

    Where there are no passes it makes None of it, so that nobody takes those for results.
    """

    def made(shapes: Any) -> Any:
        if _ENDING is None:
            return None
        name = f"{shapes.__name__}_{_ENDING}"
        SPACE.define(name + arguments)
        torch.library.register_fake(f"keras_bn::{name}", shapes, lib=SPACE)
        return getattr(torch.ops.keras_bn, name).default

    return made


def _without(axes: int, x: Tensor) -> Axes:
    """Return the shape of sums over the axes in a mask."""
    return tuple([1 if axes >> axis & 1 else size for axis, size in enumerate(x.shape)])


def _parts(number: int, of: Any, x: Tensor) -> Tensor:
    return x.new_empty((number, *of), dtype=torch.float32)


@_operation(
    "(Tensor x, Tensor[] learned, Tensor[] kept, int axes, bool varies, SymInt together,"
    " float epsilon, bool is_centered, bool is_training, bool merges, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)"
)
def normalize(x: Tensor, learned: Any, kept: Any, axes: int, *options: Any) -> Any:
    """Make y; center, scale and shift, r and d of each cell; what `normalization.in_one` says."""
    # Of what is learned gamma and beta or nothing; of what sets are corrected towards means and
    # variances, and the limits, or nothing.
    sums = _without(axes, x)
    *_, merges, dtype = options
    rest = _parts(3, (1, 1, *sums[2:]), x) if merges else _parts(2, sums, x)
    return torch.empty_like(x, dtype=dtype), _parts(5 if kept else 3, sums, x), rest


@_operation(
    "(Tensor x, Tensor dy, Tensor affine, Tensor[] gamma, bool varies, SymInt together,"
    " bool is_centered) -> (Tensor, Tensor)"
)
def gradients(x: Tensor, dy: Tensor, affine: Tensor, gamma: Any, *options: Any) -> Any:
    """Make dx; the gradients of beta and gamma."""
    columns = gamma[0].shape if gamma else (1,) * x.ndim
    return torch.empty_like(x), _parts(2, columns, x)


@_operation("(Tensor x, Tensor[] weights, int axes, bool is_centered) -> Tensor")
def moments(x: Tensor, weights: Any, axes: int, is_centered: bool) -> Any:
    """Make pivots, offsets and m2; of weights, these and their sums are given, or nothing."""
    return _parts(3, _without(axes, x), x)


@_operation("(Tensor x, Tensor dy, Tensor center) -> Tensor")
def products(x: Tensor, dy: Tensor, center: Tensor) -> Any:
    """Make Σ dy and Σ dy·(x - center)."""
    return _parts(2, center.shape, x)


@_operation(
    "(Tensor x, Tensor dy, Tensor center, Tensor scale, Tensor shift, Tensor gamma)"
    " -> (Tensor, Tensor)"
)
def mapped_products(x: Tensor, dy: Tensor, center: Tensor, *others: Any) -> Any:
    """Make Σ gamma·dy and Σ gamma·dy·z of each cell; Σ dy and Σ dy·z of each column."""
    return _parts(2, center.shape, x), _parts(2, others[-1].shape, x)


@_operation(
    "(Tensor x, Tensor center, Tensor scale, Tensor shift, Tensor[] learned, bool is_training,"
    " ScalarType dtype) -> Tensor"
)
def mapped(x: Tensor, *others: Any) -> Any:
    """Make ((x - center)·scale + shift)·gamma + beta, with both or neither."""
    return torch.empty_like(x, dtype=others[-1])


@_operation(
    "(Tensor x, Tensor dy, Tensor center, Tensor slope, Tensor level, Tensor factor,"
    " Tensor[] weights, Tensor[] gamma) -> Tensor"
)
def combined(x: Tensor, *others: Any) -> Any:
    """Make gamma·dy·factor + w·((x - center)·slope + level), in the dtype of x."""
    return torch.empty_like(x)


@_operation(
    "(Tensor mean, Tensor variance, Tensor center, Tensor offset, Tensor m2, float divisor,"
    " float momentum, float epsilon) -> (Tensor, bool)"
)
def moved(mean: Tensor, *others: Any) -> Any:
    """Make a mean and a variance moved towards moments, and say whether any of these are known."""
    return _parts(2, mean.shape, mean), True
