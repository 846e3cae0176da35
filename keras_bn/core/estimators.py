"""From moments in time to stored statistics: moving averages, and renormalization's correction."""

from collections.abc import Callable
from typing import Any, NamedTuple

from keras import ops
from keras.backend import standardize_dtype

from keras_bn.core import native
from keras_bn.core.moments import Moments, is_static, positive
from keras_bn.types import Tensor

# Gives r and d of renormalization from the moments of a batch.
Corrector = Callable[[Moments], tuple[Tensor, Tensor]]


def moving_average(old: Tensor, new: Tensor, momentum: float) -> Tensor:
    """Return old·momentum + new·(1 - momentum); at momentum 0 that is the new value alone."""
    if is_static(momentum) and momentum == 0:
        return new
    return old * momentum + new * (1.0 - momentum)


class Average(NamedTuple):
    """How a kept mean and variance take up the moments of batches.

    Attributes:
        momentum: The share of the old values, one for all or in their shape.
        unbiased: Whether the variance is that of what a batch is a sample of.
        epsilon: Added to the variances, the roots of which are averaged; None to average the
            variances themselves.
    """

    momentum: Any
    unbiased: bool = False
    epsilon: float | None = None

    def moved(self, mean: Tensor, variance: Tensor, batch: Moments) -> tuple[Tensor, Tensor]:
        """Return the new mean and variance; `batch` has the dtype of the old ones."""
        fresh = batch.unbiased_variance if self.unbiased else batch.variance
        mean = moving_average(mean, batch.mean, self.momentum)
        if self.epsilon is None:
            return mean, moving_average(variance, fresh, self.momentum)
        old, new = (native.sqrt(part + self.epsilon) for part in (variance, fresh))
        squared = native.square(moving_average(old, new, self.momentum))
        return mean, native.relu(squared - self.epsilon)


def counted_momentum(count: Tensor, new: Tensor, momentum: float | None) -> tuple[Tensor, Tensor]:
    """Return the new count of a moving average, and the old average's share in the new one.

    The count is the sum of the weights in the average. With `momentum` the new batch has weight 1
    and all others fade: after t steps the count is (1 - momentum^t) / (1 - momentum), batch i has
    the share momentum^(t-i) / count, and the initial value none. With None the weights stay.

    Args:
        count: The sum so far; 0 for an average of nothing.
        new: The weight of the batch.
        momentum: By which the count fades at each step; None for 1.

    Returns:
        The new count, and a share in [0, 1].
    """
    total = (count if momentum is None else count * momentum) + new
    # The rounding of the sum fades as fast as what it sums, and all shares keep the sum 1.
    return total, 1.0 - new / positive(total)


def settled_count(momentum: float | None) -> float:
    """Return the count of moving statistics that came without one.

    With `momentum` it is the limit, 1 / (1 - momentum): they count as settled, and the next batch
    has the share 1 - momentum. For a cumulative average it is 0: nobody knows of how many elements
    they are, so they serve until the next batch takes their place.
    """
    # At momentum 1 they never move; 1 / 0 would turn the share into NaN.
    return 0.0 if momentum is None else 1.0 / max(1.0 - momentum, 2.0**-126)


def linear_ramp(
    step: Tensor | int, start: float, end: float, steps: tuple[int, int] | None, dtype: str
) -> Tensor | float:
    """Return the value that goes linearly from `start` to `end` between two steps.

    Args:
        step: Number of training steps done [steps].
        start: Value up to the first of `steps`.
        end: Value from the second of `steps` on.
        steps: Where the ramp begins and ends [steps]; None for `end` throughout.
        dtype: Dtype of the result.

    Returns:
        A tensor without axes; for a step that is a Python number, a number.
    """
    if steps is None:
        return end if is_static(step) else ops.convert_to_tensor(end, dtype)
    first, last = steps
    # A ramp without length is a jump: the divisor must not be 0.
    length = max(last - first, 1)
    if is_static(step):
        return start + (end - start) * min(max((step - first) / length, 0.0), 1.0)
    return start + (end - start) * ops.clip(ops.cast(step - first, dtype) / length, 0.0, 1.0)


def at_least(x: Tensor, low: Tensor) -> Tensor:
    """Return the larger of two values; NaN stays NaN.

    `keras.ops.maximum` (Keras 3.15) rounds float64 to float32 in PyTorch.
    """
    low = ops.convert_to_tensor(low, standardize_dtype(x.dtype))
    return native.where(x < low, low, x)


class Limits(NamedTuple):
    """How far renormalization may correct: r in [rmin, rmax], |d| <= dmax; None for no limit."""

    rmin: Tensor | None
    rmax: Tensor | None
    dmax: Tensor | None


class Correction(NamedTuple):
    """Gives r and d of renormalization from the moments of a batch; see `renorm_correction`.

    Attributes:
        mean: The kept mean [x].
        variance: The kept variance [x²].
        limits: How far the correction may go.
        epsilon: Added to this variance and to that of the batch [x²].
        count_kept: Where it is 0 nothing is kept yet; None for anywhere.
    """

    mean: Tensor
    variance: Tensor
    limits: Limits
    epsilon: float
    count_kept: Tensor | None = None

    def __call__(self, batch: Moments) -> tuple[Tensor, Tensor]:
        """Return r and d."""
        pair = (batch.variance, self.variance)
        stddev, stddev_kept = (native.sqrt(variance + self.epsilon) for variance in pair)
        kept = (self.mean, stddev_kept, self.limits, self.count_kept)
        return renorm_correction(batch, stddev, *kept)


def renorm_correction(
    moments: Moments,
    stddev: Tensor,
    mean_kept: Tensor,
    stddev_kept: Tensor,
    limits: Limits,
    count_kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return r and d, which correct a batch towards the kept statistics; constants for gradients.

    r = stddev / stddev_kept, d = (mean - mean_kept) / stddev_kept, each within its limits.

    Args:
        moments: The batch's; an empty one is not corrected.
        stddev: The batch's standard deviation, √(variance + epsilon) [x].
        mean_kept: The kept mean [x].
        stddev_kept: The kept standard deviation, positive [x].
        limits: How far the correction may go.
        count_kept: Where it is 0 nothing is kept yet, and nothing corrected; None for anywhere.

    Returns:
        r and d, without unit.

    References:
        Ioffe, "Batch Renormalization", 2017, https://arxiv.org/abs/1702.03275, algorithm 1.
    """
    r = stddev / stddev_kept
    d = ((moments.pivot - mean_kept) + moments.offset) / stddev_kept
    if limits.rmin is not None:
        r = at_least(r, limits.rmin)
    if limits.rmax is not None:
        r = -at_least(-r, -limits.rmax)
    if limits.dmax is not None:
        d = at_least(-at_least(-d, -limits.dmax), -limits.dmax)
    counts = [c for c in (moments.count, count_kept) if c is not None and not is_static(c)]
    for count in counts:
        filled = count > 0
        r, d = native.where(filled, r, 1.0), native.where(filled, d, 0.0)
    return native.stop_gradient(r), native.stop_gradient(d)
