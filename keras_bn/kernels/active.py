"""The kernels of the active backend; no other backend's are imported.

`KERAS_BN_KERNELS=generic` switches these off: every layer then goes through `generic`;
`KERAS_BN_KERNELS=uncompiled` leaves out what is written in C, see `compiled`.
"""

import importlib
import os
from collections.abc import Callable
from typing import Any

import keras
from keras import ops
from keras.backend import standardize_dtype

from keras_bn.core import native
from keras_bn.core.affine import Affine, Learned
from keras_bn.core.estimators import Average, Corrector
from keras_bn.core.moments import Moments, is_known, is_static
from keras_bn.core.pooling import Pooling
from keras_bn.kernels import generic, normalization
from keras_bn.kernels.normalization import Plan
from keras_bn.types import Tensor

_backend = keras.backend.backend()
_is_generic = os.environ.get("KERAS_BN_KERNELS") == "generic"
_is_known = _backend in ("tensorflow", "jax", "torch")
_replicas: Any = None
_own: Any = generic
if _is_known:
    # Here, not where it is used: torch 2.13 does not trace an import.
    _replicas = importlib.import_module(f"keras_bn.kernels.{_backend}.replicas")
    _own = importlib.import_module(f"keras_bn.kernels.{_backend}")
_kernel: Any = generic if _is_generic else _own

_whole: Callable[..., tuple[Tensor, Any]] | None = getattr(_kernel, "normalize", None)
apply: Callable[..., Tensor] = _kernel.apply
harmless: Callable[..., Tensor] = getattr(_kernel, "harmless", generic.harmless)


def moments(x: Tensor, axes: tuple[int, ...], weights: Tensor | None = None) -> Moments:
    """Return the moments of `x` over `axes`; see `keras_bn.kernels`."""
    x = x if weights is None else harmless(x, weights)
    found: Moments = _kernel.moments(x, axes, weights)
    return found


def moved(
    mean: Tensor, variance: Tensor, batch: Moments, average: Average
) -> tuple[Tensor, Tensor, Any]:
    """Return a kept mean and variance that have taken up the moments of a batch, where known.

    Args:
        mean: What is kept.
        variance: What is kept, in the same shape.
        batch: Moments of so many sets; no derivative goes through them.
        average: How they are taken up.

    Returns:
        The new mean and variance, and for each set, or of all in one, whether it was known.
    """
    if hasattr(_kernel, "moved"):
        found: tuple[Tensor, Tensor, Any] | None = _kernel.moved(mean, variance, batch, average)
        if found is not None:
            return found
    batch = batch.reshaped(mean.shape)
    known, dtype = is_known(batch), standardize_dtype(mean.dtype)
    batch = Moments(*(p if is_static(p) else native.cast(p, dtype) for p in batch))
    new = average.moved(mean, variance, batch)
    return native.where(known, new[0], mean), native.where(known, new[1], variance), known


def across(layer: str, axis_name: str | None, group: Any) -> Callable[[Moments], Moments] | None:
    """Return what merges moments with those of all replicas; None where there are no others.

    Args:
        layer: Name of the layer, for errors.
        axis_name: Name of the mapped axis of replicas, in JAX.
        group: Process group of the replicas, in PyTorch; None for all processes.

    Raises:
        ValueError: It cannot be found out what the replicas are.
    """
    if _replicas is None:
        return None
    found: Callable[[Moments], Moments] | None = _replicas.across(layer, axis_name, group)
    return found


def normalize(
    x: Tensor,
    pooling: Pooling,
    learned: Learned,
    epsilon: float,
    dtype: str,
    correct: Corrector | None = None,
    kept: Moments | None = None,
    merges: bool = False,
) -> tuple[Tensor, Moments]:
    """Return y = gamma·(r·(x - mean)/√(variance + epsilon) + d) + beta and the moments.

    Args:
        x: The input.
        pooling: Which of its elements belong to one set.
        learned: gamma and beta, broadcast over `x`.
        epsilon: Added to the variance [x²].
        dtype: Dtype of y.
        correct: Gives r and d, constants for gradients; None for 1 and 0.
        kept: Moments in place of those of an empty set; None to take 0.
        merges: Whether the moments are those of all sets along the second axis together. The first
            one is then summed over, there are no weights, and all sizes are known.

    Returns:
        y and the moments; those of an empty set have count 0.
    """
    return _made(x, learned, Plan(pooling, epsilon, dtype, correct, kept, _hold, merges=merges))


def normalized(x: Tensor, pooling: Pooling, learned: Learned, epsilon: float, dtype: str) -> Tensor:
    """Return the y of `normalize` alone."""
    y, _ = _made(x, learned, Plan(pooling, epsilon, dtype, hold=_hold, is_alone=True))
    return y


def _made(x: Tensor, learned: Learned, plan: Plan) -> tuple[Tensor, Any]:
    pooling = plan.pooling
    if pooling.total is not None:
        total = pooling.total
        # Compiled code would sum what belongs together again for each element (torch 2.13).
        plan = plan._replace(pooling=pooling._replace(total=lambda cells: _hold(total(cells))))
    # JAX would count a collective inside a derivative by hand twice: then in parts.
    is_whole = pooling.across is None or hasattr(pooling.across, "total")
    if is_whole and _whole is not None:
        return _whole(x, learned, plan)
    y, found, *_ = normalization.normalize(_kernel, x, learned, plan)
    return y, found


def for_each(part: Tensor, number: Tensor) -> Tensor:
    """Return what is learned, with a second axis in front of its own, of so many sets or of 1."""
    # XLA sums the gradient along the first axis, but hardly along a second one.
    if _backend == "torch" or (hasattr(_kernel, "has_passes") and _kernel.has_passes()):
        return part[None]
    return ops.broadcast_to(part, (number, *ops.shape(part)[1:]))[None]


def known_number(x: Tensor) -> Tensor | int:
    """Return a whole number as one of Python, where that takes no time; else the tensor."""
    return _kernel.known_number(x) if hasattr(_kernel, "known_number") else x


def is_compiling() -> bool:
    """Say whether a compiler that cannot trace a warning is at work."""
    return bool(_own.is_compiling()) if hasattr(_own, "is_compiling") else False


def _hold(x: Tensor) -> Tensor:
    """Keep compiled PyTorch from computing a value again, where it is used or may have moved."""
    return _own.hold(x) if hasattr(_own, "hold") else x


def is_foreign(x: Tensor) -> bool:
    """Say whether `x` belongs to a graph of TensorFlow, as in `tf.data`, beside another backend."""
    module = type(x).__module__
    return _backend != "tensorflow" and module.startswith("tensorflow.") and not hasattr(x, "numpy")


def apply_foreign(x: Tensor, affine: Affine, dtype: str) -> Tensor:
    """As `apply`, of such a tensor and a map in NumPy."""
    # Whoever has such a tensor has imported TensorFlow.
    from keras_bn.kernels import tensorflow

    return tensorflow.apply(x, affine, dtype)
